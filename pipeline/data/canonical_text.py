"""Canonical texts: a value has the same text in every file format.

Strings are put in NFC. Integers and decimals are written in digits, and floats as the shortest decimals that round-trip
(`0.5`, `3.0`, `1e+22`). Booleans are `True` and `False`. Dates are written as `2024-05-01`, and times as
`2024-05-01 12:00:00`, with a fraction if it is not zero and an offset (`+07:00`) if it is not UTC, or as a date at
midnight. Times of day are `12:00:00`. If all values of a column are whole numbers, `3.0` and `3e+00` become `3`; if all
are booleans, `true` becomes `True`.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
TRUTH = r"(?i:true|false)"
_SPELLINGS = {"whole": r"^[+-]?[0-9]+(\.0*)?$", "truth": rf"^{TRUTH}$"}
_UTC = r"Z| ?UTC|\+00:00"
_DATED = r"^(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.\d]*[+-]\d\d)"
_TIMES = (
    (rf"{_DATED}$", r"\1:00"),
    (rf"{_DATED}(\d\d)$", r"\1:\2"),
    (rf"^(\d{{4}}-\d\d-\d\d)[ T]00:00:00(?:\.0+)?(?:{_UTC})?$", r"\1"),
    (rf"^(\d{{4}}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d*?[1-9])?\.?0*(?:{_UTC}|([+-]\d\d:\d\d))?$", r"\1 \2\3\4"),
)
_EXPONENT = r"^[+-]?[0-9](\.[0-9]+E|(\.[0-9]+)?e\+)[0-9]{1,2}$"  # as R, Spark and Python write numbers; not 12E4


def number_text(text: str) -> str | None:
    """Canonical text of a number or boolean (`07` -> `7`, `true` -> `True`); None for other texts."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.capitalize()
    try:
        if _INTEGER.fullmatch(text):
            return str(int(text))  # exact, however long
        if not NUMBER.fullmatch(text):
            return None
        value = float(text)
        return f"{value:.0f}" if value.is_integer() else repr(value)  # keeps the sign of -0.0
    except ValueError:
        return None


def spellings(texts: pa.Array) -> set[str]:
    """The spellings `whole` and `truth` (see `Feature.spelling`) that fit all texts; nulls are ignored."""
    texts = _without_exponents(texts)
    return {
        spelling for spelling, pattern in _SPELLINGS.items()
        if pc.all(pc.match_substring_regex(texts, pattern), min_count=0).as_py() is not False
    }  # fmt: skip


def respelt(texts: pa.Array, *forms: str) -> pa.Array:
    """Convert texts to the canonical form of each spelling that they match; others are unchanged."""
    if "whole" in forms:
        texts = _without_exponents(texts)
        if pc.any(pc.match_substring(texts, ".")).as_py():
            texts = pc.replace_substring_regex(texts, r"^([+-]?[0-9]+)\.0*$", r"\1")
    if "truth" in forms:
        texts = pc.if_else(pc.match_substring_regex(texts, _SPELLINGS["truth"]), pc.utf8_capitalize(texts), texts)
    return texts


def _without_exponents(texts: pa.Array) -> pa.Array:
    """Write whole numbers with an exponent in digits: `1.2E7` is `12000000`."""
    if not pc.any(pc.match_substring_regex(texts, _EXPONENT)).as_py():
        return texts
    written = texts.to_pylist()
    for position, text in enumerate(written):
        if text and re.match(_EXPONENT, text) and float(text).is_integer():
            written[position] = f"{float(text):.0f}"
    return pa.array(written, pa.string())


def canonical_texts(distinct: pa.Array) -> pa.Array:
    """Canonical texts of distinct values; null for NaN."""
    kind = distinct.type
    if pa.types.is_decimal(kind):  # Arrow writes 0.0000005 as 5E-7
        return pa.array([f"{value:f}" for value in distinct.to_pylist()], pa.string())
    if pa.types.is_floating(kind):
        values = distinct.to_numpy(zero_copy_only=False)
        return pa.array(values.astype(str).astype(object), pa.string(), mask=np.isnan(values))
    return distinct.cast(pa.string())


def canonical_times(texts: pa.Array) -> pa.Array:
    """Write times as `2024-05-01 12:00:00`, `2024-05-01 12:00:00.5+07:00` or, at midnight, `2024-05-01`."""
    if (pc.max(pc.binary_length(texts)).as_py() or 0) < len("2024-05-01 00:00:00"):
        return texts
    for pattern, replacement in _TIMES:
        texts = pc.replace_substring_regex(texts, pattern, replacement)
    return texts
