"""Exact and near copies among reviews, within and across splits, and groups with conflicting labels.

Exact copies have equal texts after NFC normalisation, lower-casing and merging of whitespace. Near copies have sets of
character 5-grams with a Jaccard similarity of at least 0.8, for example two texts of ten words that differ in one.

Near copies are found with prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search"). The
shingles (character 5-grams) of every text are ordered from rare to common. The prefix of a text with n shingles is the
first `n - ceil(t * n) + 1` of them. Two texts with a similarity of at least t have a shingle in common that is in the
prefixes of both. As these shingles are rare, few pairs have to be compared, and the result is exact.

There is one exception: if more than NEIGHBOURS texts have a prefix shingle in common, each is compared only with the
next NEIGHBOURS longer ones. This keeps the work near-linear even for thousands of near copies, which are then joined
into groups through their common neighbours.
"""

import csv
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

from pipeline.maths.arrays import Flags, Ints
from pipeline.storage.csv_table import cell
from pipeline.storage.files import write_json
from pipeline.tasks.visobert.reviews.reviews import Reviews, folded
from pipeline.tasks.visobert.reviews.sentiments import UNKNOWN

SHINGLE = 5  # length of a shingle, in characters
THRESHOLD = 0.8
NEIGHBOURS = 32
PAIRS_AT_ONCE = 50_000


@dataclass(frozen=True)
class Group:
    """Reviews that are copies of each other."""

    kind: str  # "exact", or "near" if the texts differ
    members: tuple[tuple[str, int], ...]  # (split, position within its Reviews), in the order of splits and positions
    conflict: bool  # members have different labels for an aspect

    def count(self, split: str) -> int:
        return sum(name == split for name, _ in self.members)


def find_duplicates(splits: Mapping[str, Reviews]) -> list[Group]:
    """Find groups of at least two copies, sorted by kind and size. All splits must have the same aspects.

    A review may belong to two groups: to a group of exact copies, and together with these to a group of near copies.
    """
    places = [(split, position) for split, reviews in splits.items() for position in range(len(reviews))]
    labels = np.concatenate([reviews.labels for reviews in splits.values()])
    texts: dict[str, int] = {}  # distinct text -> number
    exact = np.array(
        [texts.setdefault(folded(text), len(texts)) for reviews in splits.values() for text in reviews.texts]
    )
    near = near_components(list(texts))[exact]
    groups = []
    for kind, numbers in (("exact", exact), ("near", near)):
        order = np.argsort(numbers, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(members) > 1 and (kind == "exact" or len(np.unique(exact[members])) > 1):
                groups.append(Group(kind, tuple(places[member] for member in members), in_conflict(labels[members])))
    return sorted(groups, key=lambda group: (group.kind, -len(group.members)))


def in_conflict(labels: npt.NDArray[np.int8]) -> bool:
    """Return True if the labels of an aspect differ; dropped cells are ignored. labels: [copies, A]"""
    low = np.where(labels == UNKNOWN, 127, labels).min(axis=0)
    high = np.where(labels == UNKNOWN, -128, labels).max(axis=0)
    return bool((low < high).any())


def near_components(texts: Sequence[str]) -> Ints:
    """Component number of each of D distinct texts; texts connected by near copies have the same number. [D]"""
    shingles = _shingles(texts)
    near, components = np.empty((0, 2), dtype=np.int64), np.arange(len(texts))
    for candidates in _candidates(shingles):
        apart = candidates[components[candidates[:, 0]] != components[candidates[:, 1]]]
        near = np.concatenate([near, apart[similar(shingles, apart)]])
        graph = coo_array((np.ones(len(near)), near.T), shape=(len(texts), len(texts)))
        components = connected_components(graph, directed=False)[1]
    return components


def _shingles(texts: Sequence[str]) -> csr_array:
    """Incidence matrix [D, shingles] of texts and shingles, rare ones first. A text below SHINGLE is one shingle."""

    def pieces(text: str) -> Iterator[str]:
        return (text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1)))

    incidence = csr_array(CountVectorizer(analyzer=pieces, binary=True, dtype=np.int32).fit_transform(texts))
    ranked = incidence[:, np.argsort(incidence.sum(axis=0), kind="stable")]
    ranked.sort_indices()
    return ranked


def _candidates(shingles: csr_array) -> Iterator[Ints]:
    """Yield arrays [P, 2] of pairs (earlier text, later text) with a common prefix shingle and similar sizes.

    Texts with a common shingle are sorted by size. The first array has the pairs of direct neighbours in this order,
    the second array the pairs two positions apart, and so on.
    """
    sizes = np.diff(shingles.indptr)
    prefix_sizes = sizes - np.ceil(THRESHOLD * sizes - 1e-9).astype(np.int64) + 1
    positions = np.arange(shingles.nnz) - np.repeat(shingles.indptr[:-1], sizes)
    in_prefix = positions < np.repeat(prefix_sizes, sizes)
    owners, pieces = np.repeat(np.arange(len(sizes)), sizes)[in_prefix], shingles.indices[in_prefix]
    order = np.lexsort((owners, sizes[owners], pieces))
    owners, pieces = owners[order], pieces[order]
    for distance in range(1, NEIGHBOURS + 1):
        left, right = owners[:-distance], owners[distance:]
        near = (pieces[:-distance] == pieces[distance:]) & (sizes[left] >= THRESHOLD * sizes[right] - 1e-9)
        if not near.any():
            break
        yield np.unique(np.sort(np.stack([left[near], right[near]], axis=1), axis=1), axis=0)


def similar(shingles: csr_array, pairs: Ints) -> Flags:
    """Flags [P]: True if the Jaccard similarity of a pair is at least THRESHOLD. pairs: [P, 2]"""
    shared = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        first, second = pairs[start : start + PAIRS_AT_ONCE].T
        shared.append(shingles[first].multiply(shingles[second]).sum(axis=1))
    both, sizes = np.concatenate(shared), np.diff(shingles.indptr)[pairs].sum(axis=1)
    near: Flags = both >= THRESHOLD * (sizes - both) - 1e-9
    return near


def distinct(reviews: Reviews) -> Ints:
    """Positions of distinct reviews: the first of those with equal folded text and equal labels.

    Reviews without a text are always distinct.
    """
    first: dict[tuple[str | int, bytes], int] = {}
    for position, text in enumerate(reviews.texts):
        first.setdefault((folded(text) or position, reviews.labels[position].tobytes()), position)
    return np.fromiter(first.values(), np.int64, len(first))


def summary(splits: Mapping[str, Reviews], groups: Sequence[Group]) -> dict[str, Any]:
    """Counts for duplicates.json: exact and near copies in total, within each split and across each pair of splits."""
    counts: dict[str, Any] = {"shingle_characters": SHINGLE, "near_jaccard": THRESHOLD}
    for kind in ("exact", "near"):
        chosen = [group for group in groups if group.kind == kind]
        counts[kind] = {
            "groups": len(chosen),
            "reviews": sum(len(group.members) for group in chosen),
            "copies": sum(len(group.members) - 1 for group in chosen),
            "conflicting_groups": sum(group.conflict for group in chosen),
            "within": {split: _within(chosen, split) for split in splits},
            "across": {"/".join(pair): _across(chosen, *pair) for pair in combinations(splits, 2)},
        }
    return counts


def _within(groups: Sequence[Group], split: str) -> dict[str, int]:
    counts = [group.count(split) for group in groups]
    return {"groups": sum(count > 1 for count in counts), "copies": sum(count - 1 for count in counts if count)}


def _across(groups: Sequence[Group], first: str, second: str) -> dict[str, int]:
    """Count groups with members in both splits, and reviews of the second split that have a copy in the first."""
    counts = [group.count(second) for group in groups if group.count(first) and group.count(second)]
    return {"groups": len(counts), f"reviews_of_{second}": sum(counts)}


def write_duplicates(
    splits: Mapping[str, Reviews], groups: Sequence[Group], counts: Mapping[str, Any], folder: Path
) -> None:
    """Write duplicates.csv, with one line per review of each group, and duplicates.json with the counts."""
    with (folder / "duplicates.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["group", "kind", "split", "row", "text", "labels", "conflict"])
        for number, group in enumerate(groups, 1):
            for split, position in group.members:
                reviews = splits[split]
                text, labels = cell(reviews.texts[position]), cell(reviews.labels_text(position))
                row = [number, group.kind, split, int(reviews.rows[position]), text, labels]
                writer.writerow([*row, str(group.conflict).lower()])
    write_json(folder / "duplicates.json", counts)
