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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from pipeline.storage.csv_table import cell
from pipeline.tasks.visobert.reviews.reviews import Reviews, folded
from pipeline.tasks.visobert.reviews.sentiments import UNKNOWN

SHINGLE = 5  # characters
THRESHOLD = 0.8
NEIGHBOURS = 32
OVERSAMPLED = 0.1  # share of copies in a training split above which it counts as oversampled

_PAIRS = 50_000  # candidate pairs that are compared at once

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Reviews that are copies of each other."""

    kind: str  # exact, or near where its texts differ
    members: tuple[tuple[str, int], ...]  # (split, position within its Reviews), in that order
    conflict: bool  # an aspect is labelled in two ways

    def count(self, split: str) -> int:
        return sum(name == split for name, _ in self.members)


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
    """For each of D distinct texts, the number of its component: texts that near copies join have the same. [D]"""
    shingles = shingle(texts)
    near, components = np.empty((0, 2), dtype=np.int64), np.arange(len(texts))
    for candidates in _candidates(shingles):
        apart = candidates[components[candidates[:, 0]] != components[candidates[:, 1]]]
        near = np.concatenate([near, apart[similar(shingles, apart)]])
        graph = coo_array((np.ones(len(near)), near.T), shape=(len(texts), len(texts)))
        components = connected_components(graph, directed=False)[1]
    return components


def shingle(texts: Sequence[str]) -> csr_array:
    """Which SHINGLE-character pieces each text has, the rare ones first; a shorter text is one piece. [D, pieces]"""
    vectorizer = CountVectorizer(analyzer=_pieces, binary=True, dtype=np.int32)
    found = csr_array(vectorizer.fit_transform(texts))
    ranked = found[:, np.argsort(found.sum(axis=0), kind="stable")]
    ranked.sort_indices()
    return ranked


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1)))


def _candidates(shingles: csr_array) -> Iterator[Ints]:
    """Pairs (earlier, later text) that share a piece of their prefixes and are near enough in size. [P, 2] at a time

    First those that are next to each other among the texts with that piece, from short to long, then the others.
    """
    sizes = np.diff(shingles.indptr)
    longest = sizes - np.ceil(THRESHOLD * sizes - 1e-9).astype(np.int64) + 1
    within = np.arange(shingles.nnz) - np.repeat(shingles.indptr[:-1], sizes)
    prefix = within < np.repeat(longest, sizes)
    owners, pieces = np.repeat(np.arange(len(sizes)), sizes)[prefix], shingles.indices[prefix]
    order = np.lexsort((owners, sizes[owners], pieces))
    owners, pieces = owners[order], pieces[order]
    for distance in range(1, NEIGHBOURS + 1):
        left, right = owners[:-distance], owners[distance:]
        near = (pieces[:-distance] == pieces[distance:]) & (sizes[left] >= THRESHOLD * sizes[right] - 1e-9)
        if not near.any():
            break
        yield np.unique(np.sort(np.stack([left[near], right[near]], axis=1), axis=1), axis=0)


def similar(shingles: csr_array, pairs: Ints) -> npt.NDArray[np.bool_]:
    """Is the Jaccard similarity of each pair at least THRESHOLD? pairs: [P, 2] -> [P]"""
    shared = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(pairs), _PAIRS):
        first, second = pairs[start : start + _PAIRS].T
        shared.append(shingles[first].multiply(shingles[second]).sum(axis=1))
    both, of_each = np.concatenate(shared), np.diff(shingles.indptr)[pairs].sum(axis=1)
    near: npt.NDArray[np.bool_] = both >= THRESHOLD * (of_each - both) - 1e-9
    return near


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
    """The first of all reviews with the same folded text and the same labels, and those without a text: positions."""
    seen: dict[tuple[str | int, bytes], int] = {}
    for position, text in enumerate(reviews.texts):
        seen.setdefault((folded(text) or position, reviews.labels[position].tobytes()), position)
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
