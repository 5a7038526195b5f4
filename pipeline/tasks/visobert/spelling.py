"""One spelling of Vietnamese: however a keyboard or a web page writes a text, it is the same text.

A tone on `oa`, `oe` and `uy` at the end of a syllable stands on the first vowel (hòa) or on the second (hoà), depending
on the keyboard. A letter is one code point (NFC) or several (NFD). Web pages write characters as HTML entities.
"""

import html
import re
import unicodedata
from html.entities import html5

_ENTITY = re.compile(r"&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
# In NFD, vowels and tones (grave, acute, tilde, hook above, dot below) are code points of their own.
_SECOND_VOWEL = re.compile(
    r"(?<![qQ])([oO](?=[aeAE])|[uU](?=[yY]))([aeyAEY])([\u0300\u0301\u0303\u0309\u0323])(?![^\W\d_]|[\u0300-\u036f])"
)


def one_spelling(text: str) -> str:
    """The text in NFC, without HTML entities, and with tones on the first vowel of oa, oe and uy.

    >>> one_spelling("Ho&agrave; b&igrave;nh, thuỷ, quý, hoàn")
    'Hòa bình, thủy, quý, hoàn'
    """
    text = _ENTITY.sub(_character, text)
    return unicodedata.normalize("NFC", _SECOND_VOWEL.sub(r"\1\3\2", unicodedata.normalize("NFD", text)))


def _character(entity: re.Match[str]) -> str:
    """The character of an entity. What is no entity stays: `html.unescape` would make `¬x;` of `&notx;`."""
    known = entity[0][1] == "#" or entity[0][1:] in html5
    return html.unescape(entity[0]) if known else entity[0]
