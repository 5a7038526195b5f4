"""The second pass over raw Ali-CCP files: vocabularies from the counts, and the spills of codes to Parquet columns."""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.tasks.mmoe.aliccp import kernels
from pipeline.tasks.mmoe.aliccp.config import MOST_FIELDS, RawFeature
from pipeline.tasks.mmoe.aliccp.scan import Scan, rows_file, users_file
from pipeline.tasks.mmoe.prepare import arrow_schema
from pipeline.tasks.mmoe.schema import FIRST_ID, LABELS, MISSING, OUT_OF_VOCABULARY, Feature

SEPARATOR, WEIGHT_SEPARATOR = "|", ":"  # in raw frames that a logged model is asked with
CHUNK_WORDS = 1 << 20  # read at once
GAP_WORDS = 1 << 13  # records further apart are read apart
CELLS = 1 << 23  # of a row group, about

Words = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


def features_of(scan: Scan, schema_file: Path) -> dict[int, Feature]:
    """The features by the number of their field: the declared ones first, then the others by name.

    Raises:
        UserError: a declared field is not there or is declared as what it is not; names that would clash.
    """
    declared, facts, names = scan.source.features, scan.fields.facts, scan.names()
    numbers = [*range(len(declared)), *sorted(range(len(declared), len(names)), key=lambda number: names[number])]
    features = {}
    for number in numbers:
        name, wish = names[number], declared.get(names[number], RawFeature())
        in_common, in_skeleton = facts[number, kernels.IN_COMMON], facts[number, kernels.IN_SKELETON]
        if facts[number, kernels.KIND] == kernels.IGNORED:
            continue
        if not in_common and not in_skeleton:
            if name in declared:
                there = ", ".join(
                    names[other] for other in numbers if facts[other, kernels.IN_COMMON : kernels.REPEATED].any()
                )
                raise UserError(f"{schema_file}: features.{name}: no such field in the files; there are: {there}")
            continue
        kind = wish.kind
        if kind == "auto":
            several = facts[number, kernels.REPEATED] or facts[number, kernels.WEIGHTED] or (in_common and in_skeleton)
            kind = "multi" if several else "categorical"
        if kind == "categorical" and in_common and in_skeleton:
            raise UserError(
                f"{schema_file}: features.{name}: found in the common features and in the skeleton, allowed: kind multi"
            )
        weighted = kind == "multi" and wish.weighted
        features[number] = Feature(
            name=name, kind=kind, weighted=weighted, separator=SEPARATOR,
            weight_separator=WEIGHT_SEPARATOR if weighted else None,
            hash_buckets=scan.source.hash_buckets if wish.hash_buckets is None else wish.hash_buckets,
        )  # fmt: skip
    written = list(LABELS)
    for feature in features.values():
        written += [feature.name, f"{feature.name}.weights"][: 1 + feature.weighted]
    twice = sorted({name for name in written if written.count(name) > 1})
    if twice:
        raise UserError(
            f"{schema_file}: features.{twice[0]}: the prepared files have such a column; allowed: kind ignore"
        )
    if not features:
        raise UserError(f"{schema_file}: no field of the files is a feature")
    return features


def vocabularies(scan: Scan, features: dict[int, Feature], target: Words) -> Iterator[tuple[Feature, pa.Table]]:
    """Each feature with its size, and its vocabulary (value, count): the most frequent ids first, then numbers by
    value, then texts. Fills `target`, [codes, 2]: column and id of every code.

    Columns are numbered: the categorical ones in their order, then the multi-valued ones.
    """
    table, codes = scan.table, int(scan.table.used[0])
    order, bounds = kernels.grouped(table.owners[:codes], kernels.FIRST_FIELD_SPACE + MOST_FIELDS)
    columns = {name: column for column, name in enumerate(column_names(list(features.values())))}
    for number, feature in features.items():
        space = kernels.FIRST_FIELD_SPACE + number
        own = order[bounds[space] : bounds[space + 1]]
        wish = scan.source.features.get(feature.name, RawFeature())
        counts = table.values[own]
        common = counts >= (wish.min_count or scan.source.min_count)
        known = _ordered(table, own[common], counts[common])
        target[own, 0] = columns[feature.name]
        target[own, 1] = OUT_OF_VOCABULARY
        target[known, 1] = np.arange(FIRST_ID, FIRST_ID + len(known), dtype=np.int32)
        if feature.hash_buckets:
            rare = own[~common]
            hashes = kernels.text_hashes(*kernels.spelt(table, rare))
            buckets = (hashes % np.uint64(feature.hash_buckets)).astype(np.int32)
            target[rare, 1] = FIRST_ID + len(known) + buckets
        text, offsets = kernels.spelt(table, known)
        values = pa.StringArray.from_buffers(len(known), pa.py_buffer(offsets), pa.py_buffer(text))
        size = FIRST_ID + len(known) + feature.hash_buckets
        yield feature.model_copy(update={"size": size}), pa.table({"value": values, "count": table.values[known]})


def column_names(features: list[Feature]) -> list[str]:
    """In the order of the numbers of columns."""
    return [feature.name for kind in ("categorical", "multi") for feature in features if feature.kind == kind]


def count_common(scan: Scan, folder: Path) -> None:
    """Add the ids of the users, as often as each has training rows."""
    for first, last, words in _chunks(folder / users_file(0), scan.user_words(0)):
        rows, lengths = scan.user_rows[first:last], scan.user_words(0)[first:last]
        kernels.count_common(words, lengths, rows, scan.table.values)


def _ordered(table: kernels.Table, codes: Longs, counts: Longs) -> Longs:
    is_text = (table.owners[codes] & 1).astype(bool)
    keys = table.keys[codes]
    if is_text.any():
        text, offsets = kernels.spelt(table, codes[is_text])
        spelt = [text[start:end].tobytes() for start, end in pairwise(offsets)]
        ranks = np.empty(len(spelt), dtype=np.uint64)
        ranks[sorted(range(len(spelt)), key=spelt.__getitem__)] = np.arange(len(spelt), dtype=np.uint64)
        keys[is_text] = ranks
    return codes[np.lexsort((keys, is_text, -counts))]


class Layout(NamedTuple):
    """Where the columns are in the records of users, which hold every single-valued column of theirs, then the
    lengths of the multi-valued ones, then their ids and values."""

    place: Longs  # [columns] among the user's single or multi-valued ones; -1 = not a user's
    multi: npt.NDArray[np.bool_]  # [columns]
    weighted: npt.NDArray[np.bool_]  # [columns]
    singles: int  # of users
    multis: int

    @classmethod
    def of(cls, features: list[Feature], of_users: set[str]) -> "Layout":
        by_name = {feature.name: feature for feature in features}
        place, counts = [], {"categorical": 0, "multi": 0}
        ordered = [by_name[name] for name in column_names(features)]
        for feature in ordered:
            place.append(counts[feature.kind] if feature.name in of_users else -1)
            counts[feature.kind] += feature.name in of_users
        multi = np.array([feature.kind == "multi" for feature in ordered])
        weighted = np.array([feature.weighted for feature in ordered])
        return cls(np.array(place, dtype=np.int64), multi, weighted, counts["categorical"], counts["multi"])


def records_file(group: int) -> str:
    return f"users-{group}.records"


def encode_users(
    folder: Path, group: int, lengths: Words, columns: tuple[Words, Layout], progress: Callable[[int], None]
) -> Words:
    """The spill of a group's users as records of ids; [users] words of each record. `columns`: target, layout."""
    target, layout = columns
    found = np.empty(len(lengths), dtype=np.int32)
    with (folder / records_file(group)).open("wb", buffering=0) as file:
        for first, last, words in _chunks(folder / users_file(group), lengths):
            out = np.empty(2 * len(words) + (last - first) * (layout.singles + layout.multis), dtype=np.int32)
            record_words = found[first:last]
            state = (out, out.view(np.float32), record_words)
            kernels.encode_users(words, lengths[first:last], target, tuple(layout), state)
            _write(file, out[: record_words.sum(dtype=np.int64)])
            progress(last)
    return found


def _chunks(file: Path, lengths: Words) -> Iterator[tuple[int, int, Words]]:
    """(first user, user after the last one, their words) in turn."""
    ends = np.cumsum(lengths, dtype=np.int64)
    with file.open("rb", buffering=0) as stream:
        first = before = 0
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(ends, before + CHUNK_WORDS, side="right")))
            words = np.empty(int(ends[last - 1]) - before, dtype=np.int32)
            _read(stream.fileno(), words, 4 * before)
            yield first, last, words
            first, before = last, int(ends[last - 1])


class SplitRows:
    """The rows of a split as Parquet columns, a row group at a time."""

    def __init__(self, features: list[Feature], layout: Layout, target: Words, group_rows: int) -> None:
        self.features, self.layout, self.target, self.group_rows = features, layout, target, group_rows
        names = column_names(features)
        self._singles = int((~layout.multi).sum())
        self._columns = {name: column for column, name in enumerate(names)}
        multis = len(names) - self._singles
        of_users = layout.place >= 0
        self._user_layout = (
            np.flatnonzero(of_users & ~layout.multi),
            np.flatnonzero(of_users & layout.multi) - self._singles,
            layout.weighted,
        )
        self._single = np.empty((self._singles, group_rows), dtype=np.int32)
        self._offsets = np.zeros((multis, group_rows + 1), dtype=np.int32)
        self._room = np.full(multis, 4 * group_rows, dtype=np.int64)
        self._make_room()
        self.sums = dict.fromkeys(LABELS, 0)
        self.rows = 0
        self.unknown, self.known = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def write(self, folder: Path, split: str, records: Path, lengths: Words, progress: Callable[[int], None]) -> None:
        """`folder/<split>.parquet` of the split's spill; `lengths`: words of each user's record."""
        schema = arrow_schema(self.features)
        users = Records(records, lengths)
        with pq.ParquetWriter(folder / f"{split}.parquet", schema, **PARQUET) as writer:
            for words, starts, click, conversion, owners in _row_groups(folder / rows_file(split), self.group_rows):
                copies, places = users.of(owners)
                self._fill((words, starts, copies, places))
                table = self._table(len(starts), click, conversion, schema)
                writer.write_table(table, row_group_size=self.group_rows)
                self.rows += len(starts)
                progress(self.rows)

    def _fill(self, source: Any) -> None:
        row = 0
        while True:
            columns = (self._single, self._offsets, self._ids, self._values, self._bases)
            row, full = kernels.fill_columns(source, row, self.target, self._user_layout, columns)
            if full < 0:
                return
            ids, values, bases = self._ids, self._values, self._bases
            self._room[full] *= 2
            self._make_room()
            for multi, used in enumerate(self._offsets[:, row]):
                old, new = bases[multi], self._bases[multi]
                self._ids[new : new + used] = ids[old : old + used]
                self._values[new : new + used] = values[old : old + used]

    def _make_room(self) -> None:
        self._bases = np.concatenate([[0], np.cumsum(self._room)])
        self._ids = np.empty(self._bases[-1], dtype=np.int32)
        self._values = np.empty(self._bases[-1], dtype=np.float32)

    def _table(self, rows: int, click: Any, conversion: Any, schema: pa.Schema) -> pa.Table:
        columns = [pa.array(click), pa.array(conversion)]
        for label, values in zip(LABELS, (click, conversion), strict=True):
            self.sums[label] += int(np.count_nonzero(values))
        for feature in self.features:
            column = self._columns[feature.name]
            if feature.kind == "categorical":
                ids = self._single[column, :rows]
                columns.append(pa.array(ids))
            else:
                multi = column - self._singles
                offsets = pa.array(self._offsets[multi, : rows + 1])
                part = slice(self._bases[multi], self._bases[multi] + self._offsets[multi, rows])
                ids = self._ids[part]
                columns.append(pa.ListArray.from_arrays(offsets, pa.array(ids)))
                if feature.weighted:
                    columns.append(pa.ListArray.from_arrays(offsets, pa.array(self._values[part])))
            self.unknown[feature.name] += int(np.count_nonzero(ids == OUT_OF_VOCABULARY))
            self.known[feature.name] += int(np.count_nonzero(ids > MISSING))
        return pa.table(columns, schema=schema)


class Records:
    """The encoded users of a group, read from their file as they are needed."""

    def __init__(self, file: Path, lengths: Words) -> None:
        self.file = file
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def of(self, owners: Words) -> tuple[Words, Longs]:
        """(records of the rows' users, where that of each row begins or -1)."""
        users, numbers = np.unique(owners[owners >= 0], return_inverse=True)
        begins, ends = self.starts[users], self.starts[users + 1]
        to = np.cumsum(ends - begins) - (ends - begins)
        copies = np.empty(int((ends - begins).sum()), dtype=np.int32)
        places = np.full(len(owners), -1, dtype=np.int64)
        places[owners >= 0] = to[numbers]
        apart = np.flatnonzero(begins[1:] - ends[:-1] > GAP_WORDS) + 1
        with self.file.open("rb", buffering=0) as stream:
            for first, last in zip([0, *apart], [*apart, len(users)], strict=True):
                at = int(first)
                while at < last:
                    stop = max(at + 1, int(np.searchsorted(ends[:last], begins[at] + CHUNK_WORDS, side="right")))
                    window = np.empty(int(ends[stop - 1] - begins[at]), dtype=np.int32)
                    _read(stream.fileno(), window, 4 * int(begins[at]))
                    kernels.gather(window, begins[at], (begins[at:stop], ends[at:stop], to[at:stop]), copies)
                    at = stop
        return copies, places


def _row_groups(file: Path, rows: int) -> Iterator[tuple[Any, ...]]:
    """(words, starts, click, conversion, users) of `rows` rows at a time, the last time fewer."""
    size, offset, held = file.stat().st_size // 4, 0, 0
    buffer = np.empty(CHUNK_WORDS, dtype=np.int32)
    starts, users = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int32)
    click, conversion = np.empty(rows, dtype=np.int8), np.empty(rows, dtype=np.int8)
    found = used = 0
    with file.open("rb", buffering=0) as stream:
        while True:
            found, used = kernels.walk_rows(buffer[:held], (starts, click, conversion, users), found)
            if found == rows or (offset == size and found):
                yield buffer, starts[:found], click[:found], conversion[:found], users[:found]
                buffer[: held - used] = buffer[used:held].copy()
                held, found = held - used, 0
            elif offset == size:
                return
            else:
                more = min(CHUNK_WORDS, size - offset)
                if held + more > len(buffer):
                    buffer = np.concatenate([buffer[:held], np.empty(max(held, more), dtype=np.int32)])
                _read(stream.fileno(), buffer[held : held + more], 4 * offset)
                offset, held = offset + more, held + more


def _read(descriptor: int, words: Words, offset: int) -> None:
    rest = words.view(np.uint8).data
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if not count:
            raise OSError("a work file is too short")
        rest, offset = rest[count:], offset + count


def _write(file: Any, words: Words) -> None:
    rest = words.view(np.uint8).data
    while rest:
        rest = rest[file.write(rest) :]


PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "use_byte_stream_split": True,
}
