"""Generated Vietnamese phone reviews, with the sentiment that each one expresses about eleven aspects.

A buyer in some mood says something about a few aspects, one after the other or against each other, and something about
nothing; then writes it down in a manner of his own (short forms, misspellings, no tones, emoticons); then an annotator
labels it, and errs at times. The three draw from streams of their own, so the same reviews can be had cleanly written
or correctly labelled. Why no model reaches 100%: phrases that people use for two sentiments or two aspects, opinions
that do not name their aspect, praise that is not meant, and the annotator.
"""

import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.folders import made_once
from pipeline.tasks.visobert import phrases
from pipeline.tasks.visobert.config import EmbeddedReviewsConfig
from pipeline.tasks.visobert.phrases import (
    ABOUT_ANY,
    ABOUT_BOTH,
    CONTRASTS,
    DECOYS,
    EMOTICONS,
    FIELDS,
    FILLERS,
    LEADS,
    MISSPELT,
    NOUNS,
    PHRASES,
    SAME,
    SLOTS,
    TEENCODE,
    TURN,
    TURN_TO,
)

GENERATOR_VERSION = 1  # another version is other data
SPLITS = ("train", "validation", "test")
ASPECTS = ("Battery", "Camera", "Performance", "Display", "Design", "Packaging", "Price", "Shop_Service", "Shipping",
           "General", "Others")  # fmt: skip
SENTIMENTS = ("Positive", "Negative", "Neutral")

# What is said: weights, and chances where a comment says so.
MOODS = {"happy": 0.50, "torn": 0.18, "cross": 0.32}
SENTIMENT_IN = {
    "happy": {"Positive": 0.94, "Negative": 0.02, "Neutral": 0.04},
    "torn": {"Positive": 0.43, "Negative": 0.37, "Neutral": 0.20},
    "cross": {"Positive": 0.04, "Negative": 0.90, "Neutral": 0.06},
}
ASPECTS_SAID = {0: 0.03, 1: 0.37, 2: 0.33, 3: 0.165, 4: 0.065, 5: 0.025, 6: 0.015}
ASPECT_IN = {"Battery": 13, "Camera": 12, "Performance": 13, "Display": 9, "Design": 10, "Packaging": 7, "Price": 11,
             "Shop_Service": 10, "Shipping": 10, "General": 14, "Others": 2}  # fmt: skip
FILLERS_SAID = {0: 0.46, 1: 0.30, 2: 0.16, 3: 0.05, 5: 0.02, 7: 0.01}
WORDINESS = {0.15: 0.6, 0.45: 0.3, 0.75: 0.1}  # chance that a writer says an opinion again in other words, and again
ABOUT_ANY_CHANCE = 0.25  # the phrase is one that fits any aspect, so that its noun alone tells of which
LEAD_CHANCE = 0.6  # a phrase that does not name its aspect is led in by its name
BOTH_CHANCE = 0.1  # two neighbours of one sentiment share a clause
SAME_SENTENCE_CHANCE = 0.55
DECOY_CHANCE = 0.08  # a filler names an aspect and has no opinion of it
FIELDS_CHANCE = 0.06  # the review begins with the form's own fields, a line each
REPOST_CHANCE = 0.004  # the review is word by word one of before, of a buyer with two orders

# How it is written: chances of a writer's habits.
TONELESS_CHANCE = 0.08
NFD_CHANCE = 0.04
CAPITALS_CHANCE = 0.02
EMOTICON_CHANCE = 0.25
SHORT_FORMS = {0.0: 0.6, 0.2: 0.27, 0.6: 0.13}  # share of words with a short form that are shortened
TYPOS = {0.0: 0.7, 0.03: 0.25, 0.08: 0.05}  # share of words with a wrong letter
BREAKS = {". ": 45, ", ": 22, " ": 10, "... ": 6, "! ": 4, "\n": 8, ".\n": 5}
ENDS = {".": 40, "": 40, "!": 6, "...": 5, "!!!": 3, " ạ": 3, " .": 3}

# How it is labelled: the annotator's errors.
LOST_CHANCE = 0.01  # of a label
CONFUSED_CHANCE = 0.02  # of a label: another sentiment; what is about none of the ten is Neutral to all
SPURIOUS_CHANCE = 0.01  # of a review: one aspect more than it speaks of

T = TypeVar("T")
Labels = dict[str, str]  # aspect -> sentiment
_SLOT = re.compile(r"\{([^{}]+)\}")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SHORT = re.compile(r"\b(" + "|".join(sorted(TEENCODE | MISSPELT, key=lambda word: (-len(word), word))) + r")\b", re.I)


@dataclass(frozen=True)
class Review:
    text: str
    labels: Labels  # as annotated
    truth: Labels  # as meant


class Draw:
    """Random choices that are the same on every platform: uniform numbers and comparisons, no logarithms."""

    def __init__(self, *words: int) -> None:
        self._random = np.random.Generator(np.random.PCG64(words))
        self._block: list[float] = []

    def number(self) -> float:
        """Uniform in [0, 1)."""
        if not self._block:
            self._block = self._random.random(1024).tolist()
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        return self.number() < probability

    def one(self, items: Sequence[T]) -> T:
        return items[int(self.number() * len(items))]

    def weighted(self, items: Mapping[T, float]) -> T:
        rest = self.number() * sum(items.values())
        for item, weight in items.items():
            rest -= weight
            if rest < 0:
                return item
        return item  # rounding


def embedded_reviews(config: EmbeddedReviewsConfig, cache: Path) -> Path:
    """The folder with train.csv, validation.csv and test.csv; made on first use, kept in the cache.

    Raises:
        UserError: the cache folder cannot be written.
    """
    source = b"".join(Path(file).read_bytes() for file in (__file__, phrases.__file__))
    folder = cache / f"reviews-{config.rows}-{config.seed}-{hashlib.sha256(source).hexdigest()[:12]}"
    files = [f"{split}.csv" for split in SPLITS]
    return made_once(folder, files, lambda work: generate(work, config.rows, config.seed), "data.cache")


def generate(folder: Path, rows: int, seed: int) -> None:
    """Write `rows` reviews, 80% train, 10% validation, 10% test, with a column `data` and one an aspect."""
    sizes = {"train": rows * 8 // 10, "validation": rows // 10}
    sizes["test"] = rows - sum(sizes.values())
    for split, count in sizes.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["data", *ASPECTS])
            for review in reviews(split, count, seed):
                writer.writerow([review.text, *(review.labels.get(aspect, "") for aspect in ASPECTS)])


def reviews(split: str, count: int, seed: int, clean: bool = False) -> Iterator[Review]:
    """`count` reviews of the split. clean: the very same ones, written without any habit or error of the writers."""
    # the seed comes last: it is the one number that may take several words of the generator's seed
    content, habits, annotator = (Draw(GENERATOR_VERSION, kind, SPLITS.index(split) + 1, seed) for kind in (1, 2, 3))
    before: list[tuple[str, Labels]] = []
    for _ in range(count):
        if before and content.chance(REPOST_CHANCE):
            text, truth = content.one(before)
        else:
            sentences, truth, feeling = _content(content)
            text = ". ".join(sentences) if clean else _written(habits, sentences, feeling)
            before.append((text, truth))
        yield Review(text, _annotated(annotator, truth), truth)


def _content(draw: Draw) -> tuple[list[str], Labels, str]:
    """Sentences without stops or capitals, the labels, and the sentiment that prevails."""
    mood = draw.weighted(MOODS)
    truth: Labels = {}
    for _ in range(draw.weighted(ASPECTS_SAID)):
        aspect = draw.weighted({name: weight for name, weight in ASPECT_IN.items() if name not in truth})
        truth[aspect] = "Neutral" if aspect == "Others" else draw.weighted(SENTIMENT_IN[mood])
    sentences = _sentences(draw, _clauses(draw, truth))
    for _ in range(max(draw.weighted(FILLERS_SAID), 0 if truth else 1)):
        filler = _filled(draw, draw.one(DECOYS if draw.chance(DECOY_CHANCE) else FILLERS))
        if filler not in sentences:
            sentences.insert(int(draw.number() * (len(sentences) + 1)), filler)
    if draw.chance(FIELDS_CHANCE):
        fields = [_filled(draw, draw.one(FIELDS)) for _ in range(1 + int(draw.number() * 2))]
        sentences[0] = "\n".join([*fields, sentences[0]])
    feeling = {"happy": "Positive", "torn": "Neutral", "cross": "Negative"}[mood]
    return sentences, truth, feeling


def _clauses(draw: Draw, truth: Labels) -> list[tuple[str, str]]:
    """Clauses and their sentiments, in an order that speaks of every aspect at least once."""
    clauses: list[tuple[str, str]] = []
    waiting, wordiness = list(truth.items()), draw.weighted(WORDINESS)
    while waiting:
        aspect, sentiment = waiting.pop(0)
        follower = waiting[0] if waiting else ("Others", "")
        if follower[1] == sentiment and "Others" not in (aspect, follower[0]) and draw.chance(BOTH_CHANCE):
            waiting.pop(0)
            phrase = draw.one(ABOUT_BOTH[sentiment])
            for place, name in (("{0}", aspect), ("{1}", follower[0])):
                phrase = phrase.replace(place, draw.one(NOUNS[name]))
            clauses.append((_filled(draw, phrase), sentiment))
        else:
            said = [_phrase(draw, aspect, sentiment)]
            while draw.chance(wordiness):
                again = _phrase(draw, aspect, sentiment)
                if again not in said:
                    said.append(again)
            clauses += [(_filled(draw, phrase), sentiment) for phrase in said]
    return clauses


def _phrase(draw: Draw, aspect: str, sentiment: str) -> str:
    if aspect == "Others":
        return draw.one(PHRASES[aspect][sentiment])
    noun = draw.one(NOUNS[aspect])
    if draw.chance(ABOUT_ANY_CHANCE):
        return draw.one(ABOUT_ANY[sentiment]).replace("{}", noun)
    phrase = draw.one(PHRASES[aspect][sentiment])
    if not any(name in phrase for name in NOUNS[aspect]) and draw.chance(LEAD_CHANCE):
        return draw.one(LEADS).replace("{}", noun) + phrase
    return phrase


def _filled(draw: Draw, phrase: str) -> str:
    return " ".join(_SLOT.sub(lambda slot: draw.one(SLOTS[slot[1]]), phrase).split())


def _sentences(draw: Draw, clauses: list[tuple[str, str]]) -> list[str]:
    """Clauses joined by what suits their sentiments: and, but, although ..."""
    sentences: list[str] = []
    before = ""
    for clause, sentiment in clauses:
        if not sentences or clause in sentences[-1] or not draw.chance(SAME_SENTENCE_CHANCE):
            sentences.append(clause)
        elif sentiment == before:
            sentences[-1] += draw.one(SAME) + clause
        elif draw.chance(0.2):
            sentences[-1] = draw.one(CONTRASTS).format(sentences[-1], clause)
        else:
            sentences[-1] += draw.one(TURN_TO[sentiment] if draw.chance(0.5) else TURN) + clause
        before = sentiment
    return sentences


def _written(draw: Draw, sentences: list[str], feeling: str) -> str:
    """The sentences as one writer types them."""
    short, typos, capital = draw.weighted(SHORT_FORMS), draw.weighted(TYPOS), draw.chance(0.55)
    stop, toneless = draw.weighted(BREAKS), draw.chance(TONELESS_CHANCE)
    text = stop.join(sentence[0].upper() + sentence[1:] if capital else sentence for sentence in sentences)
    text += draw.weighted(ENDS)
    if short:
        text = _SHORT.sub(lambda word: _shortened(draw, word[0]) if draw.chance(short) else word[0], text)
    if typos:
        text = _WORD.sub(lambda word: _mistyped(draw, word[0]) if draw.chance(typos) else word[0], text)
    if draw.chance(0.06):
        text = re.sub(r"\b(quá|lắm|tốt|ok|ghê|tệ)\b", lambda word: word[0] + word[0][-1] * 3, text)
    if toneless:
        text = without_tones(text)
    if draw.chance(CAPITALS_CHANCE):
        text = text.upper()
    if draw.chance(EMOTICON_CHANCE):
        kind = feeling if draw.chance(0.8) else draw.one(SENTIMENTS)
        text += draw.one(("", " ")) + draw.one(EMOTICONS[kind]) * draw.weighted({1: 0.75, 2: 0.15, 3: 0.1})
    return unicodedata.normalize("NFD" if draw.chance(NFD_CHANCE) else "NFC", text)


def _shortened(draw: Draw, word: str) -> str:
    known = word.lower()
    if known in MISSPELT:
        return MISSPELT[known] if draw.chance(0.3) else word
    return draw.one(TEENCODE[known])


def _mistyped(draw: Draw, word: str) -> str:
    """A letter is missing, there twice, or after its neighbour."""
    place = 1 + int(draw.number() * (len(word) - 2))
    before, one, other, after = word[:place], word[place], word[place + 1], word[place + 2 :]
    return before + draw.one((other + after, one + one + other + after, other + one + after))


def without_tones(text: str) -> str:
    """Vietnamese as typed without its marks: đẹp lắm -> dep lam."""
    letters = unicodedata.normalize("NFD", text.replace("đ", "d").replace("Đ", "D"))
    return "".join(letter for letter in letters if not "\u0300" <= letter <= "\u036f")


def _annotated(draw: Draw, truth: Labels) -> Labels:
    labels = {}
    for aspect, sentiment in truth.items():
        lost, confused, other = draw.chance(LOST_CHANCE), draw.chance(CONFUSED_CHANCE), draw.number()
        if confused and aspect != "Others":
            others = [name for name in SENTIMENTS if name != sentiment]
            labels[aspect] = others[int(other * 2)]
        elif not lost:
            labels[aspect] = sentiment
    if draw.chance(SPURIOUS_CHANCE):
        aspect = draw.one([name for name in ASPECTS[:-1] if name not in truth])
        labels[aspect] = draw.one(SENTIMENTS)
    return labels
