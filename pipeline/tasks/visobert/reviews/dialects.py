"""Dialects of labels: which texts mean positive, negative, neutral, not mentioned, or mentioned without a polarity."""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Meaning = Literal["positive", "negative", "neutral", "not_mentioned", "mentioned"]
DialectName = Literal["english", "POS/NEG/NEU", "vietnamese", "-1/0/1", "0-3"]
Spellings = Mapping[Meaning, Sequence[str]]

SENTIMENTS: tuple[Meaning, ...] = ("positive", "negative", "neutral")
DIALECTS: Mapping[DialectName, Spellings] = {
    "english": {"positive": ["Positive"], "negative": ["Negative"], "neutral": ["Neutral"]},
    "POS/NEG/NEU": {"positive": ["POS"], "negative": ["NEG"], "neutral": ["NEU"]},
    "vietnamese": {
        "positive": ["Tích cực"],
        "negative": ["Tiêu cực"],
        "neutral": ["Trung tính", "Trung lập"],
    },
    "-1/0/1": {"positive": ["1"], "negative": ["-1"], "neutral": ["0"]},
    "0-3": {"positive": ["1"], "negative": ["2"], "neutral": ["3"], "not_mentioned": ["0"]},
}
WORDS: Sequence[DialectName] = ("english", "POS/NEG/NEU", "vietnamese")  # their words have one meaning each

_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(?:\.0*)?(?:e[+-]?0+)?")
_UNCLEAR = re.compile(r"[+-]?[0-9.]+|none|null|nan|n/?a|-|true|false|yes|no")  # means something else in every project


def label_key(text: str) -> str:
    """Key that is equal for the spellings of a label: NFC, case folded, single spaces; `+1`, `1.0`, `1e0` are `1`."""
    key = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    number = _NUMBER.fullmatch(key)
    return str(int(number[1])) if number else key


def repeated_spelling(spellings: Spellings) -> str | None:
    """Describe a text that has two meanings; None if there is none."""
    seen: dict[str, Meaning] = {}
    for meaning, texts in spellings.items():
        for text in texts:
            if (first := seen.setdefault(label_key(text), meaning)) != meaning:
                return f"{text!r} is both {first} and {meaning}"
    return None


@dataclass(frozen=True)
class Dialect:
    """The meaning of label texts. An empty label means not mentioned, unless the dialect says otherwise."""

    spellings: Spellings
    chosen: bool = True  # False: `data.labels` is null, so that only words are labels

    @classmethod
    def of(cls, labels: DialectName | Spellings | None) -> "Dialect":
        """The dialect of `data.labels`: by name, as a mapping, or the words of all dialects."""
        if labels is None:
            words = {meaning: [text for name in WORDS for text in DIALECTS[name][meaning]] for meaning in SENTIMENTS}
            return cls(words, chosen=False)
        return cls(DIALECTS[labels] if isinstance(labels, str) else labels)

    def meaning(self, text: str) -> Meaning | None:
        """The meaning of a label; None if it is in no dialect."""
        return self._meanings.get(label_key(text))

    def closest(self, text: str) -> str | None:
        """The word that was probably meant; None if no word is similar. Short words and numbers are never suggested."""
        words = {key: shown for key, shown in self._shown.items() if len(key) > 3 and not _NUMBER.fullmatch(key)}
        match = difflib.get_close_matches(label_key(text), list(words), 1, 0.6)
        return words[match[0]] if match else None

    @property
    def examples(self) -> list[str]:
        """The first spellings of positive, negative and neutral, or their own names."""
        return [next(iter(self.spellings.get(meaning, ())), meaning.capitalize()) for meaning in SENTIMENTS]

    @property
    def allowed(self) -> str:
        """What a label may be, in words."""
        parts = []
        for meaning, texts in (self.spellings if self.chosen else DIALECTS["english"]).items():
            shown = ", ".join(text for text in texts if text.strip())
            if shown:
                parts.append(shown if label_key(shown) == meaning else f"{shown} ({meaning.replace('_', ' ')})")
        return ", ".join(parts) + (" or nothing" if self._meanings[""] == "not_mentioned" else "")

    def hint(self, text: str) -> str:
        """What to do about a label in no dialect; empty if there is nothing to say."""
        if word := self.closest(text):
            return f"; did you mean {word}?"
        if not self.chosen and _UNCLEAR.fullmatch(label_key(text)):
            return "; data.labels decides what it means: -1/0/1, 0-3 or a mapping"
        return ""

    def is_foreign_number(self, text: str) -> bool:
        """Return True if numbers are labels of the dialect, but not this one."""
        numbers = any(_NUMBER.fullmatch(key) for key in self._meanings)
        return numbers and _NUMBER.fullmatch(label_key(text)) is not None and self.meaning(text) is None

    @cached_property
    def _meanings(self) -> dict[str, Meaning]:
        meanings: dict[str, Meaning] = {"": "not_mentioned"}
        return meanings | {label_key(text): meaning for meaning, texts in self.spellings.items() for text in texts}

    @cached_property
    def _shown(self) -> dict[str, str]:
        return {label_key(text): text for texts in self.spellings.values() for text in texts}
