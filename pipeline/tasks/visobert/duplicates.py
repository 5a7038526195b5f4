"""Copies among reviews, exact and near, within and across splits, and where their labels disagree.

Two reviews are exact copies when their texts are equal after NFC, lower-casing and folding of whitespace. They are near
copies when the Jaccard similarity of their sets of character 5-grams is at least 0.8: some ten words with one changed.

Near copies are found with prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search"): order a
text's shingles from rare to common; two texts of similarity >= t must then share one of the first
`n - ceil(t * n) + 1` of the n shingles of each. Those are so rare that few pairs are left to compare, and the result
is exact, not a sample. Only where one of them is shared by more than NEIGHBOURS texts is each text compared with as
many of the next longer ones alone, so that the work stays near-linear even for thousands of near copies; these are
then joined through one another.
"""

import csv
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.storage.csv_table import cell
from pipeline.tasks.visobert.reviews import UNKNOWN, Reviews

SHINGLE = 5  # characters
THRESHOLD = 0.8
NEIGHBOURS = 32
OVERSAMPLED = 0.1  # share of copies in a training split above which it counts as oversampled

_PAIRS = 50_000  # candidate pairs that are compared at once

Ints = npt.NDArray[np.int64]


class Shingles(NamedTuple):
    """Sets of shingles, one after another. D = texts, S = shingles of all texts."""

    ids: Ints  # [S] ascending within a text, so from rare to common
    keys: Ints  # [S] text * different + id, ascending
    different: int  # shingles in all
    offsets: Ints  # [D + 1]

    @property
    def sizes(self) -> Ints:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Group:
    """Reviews that are copies of each other."""

    kind: str  # exact, or near where its texts differ
    members: tuple[tuple[str, int], ...]  # (split, position within its Reviews), in that order
    conflict: bool  # an aspect is labelled in two ways

    def count(self, split: str) -> int:
        return sum(name == split for name, _ in self.members)


def folded(text: str) -> str:
    """What exact copies have in common."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def find_duplicates(splits: Mapping[str, Reviews]) -> list[Group]:
    """Groups of at least two reviews, first the largest. The splits share their aspects.

    A review may stand in two groups: with its exact copies, and with these in a group of near copies.
    """
    places = [(split, position) for split, reviews in splits.items() for position in range(len(reviews))]
    labels = np.concatenate([reviews.labels for reviews in splits.values()])
    texts: dict[str, int] = {}
    of_text = np.array(
        [texts.setdefault(folded(text), len(texts)) for reviews in splits.values() for text in reviews.texts]
    )
    near = near_components(list(texts))
    found = []
    for kind, of_review in (("exact", of_text), ("near", near[of_text])):
        for members in _groups(of_review):
            if kind == "exact" or len(np.unique(of_text[members])) > 1:
                conflict = in_conflict(labels[members])
                found.append(Group(kind, tuple(places[member] for member in members), conflict))
    return sorted(found, key=lambda group: (group.kind, -len(group.members)))


def in_conflict(labels: npt.NDArray[np.int8]) -> bool:
    """Is an aspect labelled in more than one way? Dropped cells agree with anything. labels: [copies, A]"""
    low = np.where(labels == UNKNOWN, 127, labels).min(axis=0)
    high = np.where(labels == UNKNOWN, -128, labels).max(axis=0)
    return bool((low < high).any())


def near_components(texts: Sequence[str]) -> Ints:
    """For each of D distinct texts, the first that it is joined to by near copies, itself if by none. [D]"""
    shingles = shingle(texts)
    joined = np.arange(len(texts))
    compared = np.empty(0, dtype=np.int64)
    for found in _candidates(shingles):
        apart = joined[found[:, 0]] != joined[found[:, 1]]
        keys = _unique(found[apart, 0] * len(texts) + found[apart, 1])
        keys = keys[~_among(keys, compared)]
        pairs = np.stack(np.divmod(keys, len(texts)), axis=1)
        near = similar(shingles, pairs)
        compared = np.sort(np.concatenate([compared, keys[~near]]))
        joined = components(joined, pairs[near]) if near.any() else joined
    return joined


def shingle(texts: Sequence[str]) -> Shingles:
    """The set of SHINGLE-character pieces of each text; a shorter text is one piece. Rare ones have small ids."""
    lengths = np.array([max(len(text), SHINGLE) for text in texts], dtype=np.int64)
    whole = "".join(text.ljust(SHINGLE, "\0") for text in texts)
    characters = np.frombuffer(whole.encode("utf-32-le"), dtype="<u4")
    alphabet, positions = np.unique(characters, return_inverse=True)
    letters = positions.astype(np.uint64)
    # a piece as one number; wraps over only for alphabets of more than 7,000 characters, and then hardly ever collides
    codes = np.zeros(len(letters) - SHINGLE + 1, dtype=np.uint64)
    for shift in range(SHINGLE):
        codes = codes * np.uint64(len(alphabet)) + letters[shift : len(codes) + shift]
    owners = np.repeat(np.arange(len(texts)), lengths)[: len(codes)]
    ends = np.repeat(np.cumsum(lengths), lengths)[: len(codes)]
    inside = np.arange(len(codes)) + SHINGLE <= ends
    distinct_codes, pieces = np.unique(codes[inside], return_inverse=True)
    keys = _unique(owners[inside] * len(distinct_codes) + pieces)  # each piece of a text once
    owners, pieces = np.divmod(keys, len(distinct_codes))
    rank = np.empty(len(distinct_codes), dtype=np.int64)
    rank[np.argsort(np.bincount(pieces), kind="stable")] = np.arange(len(distinct_codes))
    keys = np.sort(owners * len(distinct_codes) + rank[pieces])
    offsets = np.searchsorted(owners, np.arange(len(texts) + 1))
    return Shingles(keys % len(distinct_codes), keys, len(distinct_codes), offsets)


def _candidates(shingles: Shingles) -> Iterator[Ints]:
    """Pairs (earlier, later text) that share a piece of their prefixes and are near enough in size. [P, 2] at a time

    First those that are next to each other among the texts with that piece, from short to long, then the others.
    """
    sizes = shingles.sizes
    longest = sizes - np.ceil(THRESHOLD * sizes - 1e-9).astype(np.int64) + 1
    within = np.arange(len(shingles.ids)) - np.repeat(shingles.offsets[:-1], sizes)
    prefix = within < np.repeat(longest, sizes)
    owners, ids = np.repeat(np.arange(len(sizes)), sizes)[prefix], shingles.ids[prefix]
    order = np.lexsort((owners, sizes[owners], ids))
    owners, ids = owners[order], ids[order]
    for distance in range(1, NEIGHBOURS + 1):
        left, right = owners[:-distance], owners[distance:]
        near = (ids[:-distance] == ids[distance:]) & (sizes[left] >= THRESHOLD * sizes[right] - 1e-9)
        if not near.any():
            break
        yield np.sort(np.stack([left[near], right[near]], axis=1), axis=1)


def similar(shingles: Shingles, pairs: Ints) -> npt.NDArray[np.bool_]:
    """Is the Jaccard similarity of each pair at least THRESHOLD? pairs: [P, 2] -> [P]"""
    sizes = shingles.sizes
    found = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _PAIRS):
        first, second = pairs[start : start + _PAIRS].T
        counts = sizes[first]
        pair = np.repeat(np.arange(len(first)), counts)
        position = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
        wanted = second[pair] * shingles.different + shingles.ids[shingles.offsets[first][pair] + position]
        shared = np.bincount(pair[_among(wanted, shingles.keys)], minlength=len(first))
        found[start : start + _PAIRS] = shared >= THRESHOLD * (counts + sizes[second] - shared) - 1e-9
    return found


def _among(values: Ints, ascending: Ints) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == values
    return found


def _unique(values: Ints) -> Ints:
    """As np.unique, which hashes: ten times slower on millions of values that are nearly all different."""
    ascending = np.sort(values)
    first = np.ones(len(values), dtype=bool)
    first[1:] = ascending[1:] != ascending[:-1]
    distinct: Ints = ascending[first]
    return distinct


def components(parents: Ints, pairs: Ints) -> Ints:
    """The smallest thing that each of D is joined to, through `parents` (a smaller one or itself) or pairs. [D]"""
    parent = parents.tolist()

    def root(thing: int) -> int:
        while parent[thing] != thing:
            parent[thing] = parent[parent[thing]]
            thing = parent[thing]
        return thing

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(thing) for thing in range(len(parent))])


def _groups(of_review: Ints) -> Iterator[Ints]:
    """Positions of equal values, where there are at least two."""
    order = np.argsort(of_review, kind="stable")
    starts = np.flatnonzero(np.diff(of_review[order])) + 1
    yield from (members for members in np.split(order, starts) if len(members) > 1)


def summary(splits: Mapping[str, Reviews], groups: Sequence[Group]) -> dict[str, Any]:
    """Counts of both kinds, within each split and across each two; what duplicates.json holds."""
    told: dict[str, Any] = {"shingle_characters": SHINGLE, "near_jaccard": THRESHOLD}
    for kind in ("exact", "near"):
        chosen = [group for group in groups if group.kind == kind]
        told[kind] = {
            "groups": len(chosen),
            "reviews": sum(len(group.members) for group in chosen),
            "copies": sum(len(group.members) - 1 for group in chosen),
            "conflicting_groups": sum(group.conflict for group in chosen),
            "within": {split: _within(chosen, split) for split in splits},
            "across": {f"{one}/{other}": _across(chosen, one, other) for one, other in combinations(splits, 2)},
        }
    return told


def _within(groups: Sequence[Group], split: str) -> dict[str, int]:
    counts = [group.count(split) for group in groups]
    return {"groups": sum(count > 1 for count in counts), "copies": sum(count - 1 for count in counts if count)}


def _across(groups: Sequence[Group], one: str, other: str) -> dict[str, int]:
    """Groups with members in both splits, and reviews of the second that have a copy in the first."""
    counts = [group.count(other) for group in groups if group.count(one) and group.count(other)]
    return {"groups": len(counts), f"reviews_of_{other}": sum(counts)}


def distinct(reviews: Reviews) -> Ints:
    """The first of all reviews with the same folded text and the same labels: their positions."""
    seen: dict[tuple[str, bytes], int] = {}
    for position, text in enumerate(reviews.texts):
        seen.setdefault((folded(text), reviews.labels[position].tobytes()), position)
    return np.fromiter(seen.values(), np.int64, len(seen))


def write_duplicates(
    splits: Mapping[str, Reviews], groups: Sequence[Group], told: Mapping[str, Any], folder: Path
) -> None:
    """duplicates.csv, a line for each review of each group, and duplicates.json, which holds `told`."""
    with (folder / "duplicates.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["group", "kind", "split", "row", "text", "labels", "conflict"])
        for number, group in enumerate(groups, 1):
            conflict = str(group.conflict).lower()
            for split, position in group.members:
                reviews = splits[split]
                row, text = int(reviews.rows[position]), reviews.texts[position]
                labels = reviews.labels_text(position)
                writer.writerow([number, group.kind, split, row, cell(text), cell(labels), conflict])
    text = json.dumps(told, indent=2, ensure_ascii=False)
    (folder / "duplicates.json").write_text(text + "\n", encoding="utf-8")
