"""Impressions as one ragged stream of 32-bit words in an Arrow file that is mapped, not read.

So memory holds what is being trained on, and a row taken at random is one place in it. A row is: the labels
(click + 2 conversion), the numeric features (float32), the ids of the categorical features, how many ids each
multi-valued feature has, these ids, and their weights (float32). Ids are rows of the fused table. A record batch has
`BATCH_ROWS` rows, the last one fewer. N = rows, S = categorical, P = multi-valued, M = numeric features.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from pipeline.compute.compiled import compiled
from pipeline.storage.files import check_file
from pipeline.tasks.mmoe.impressions import float_values, table_ids
from pipeline.tasks.mmoe.schema import LABELS, Feature

BATCH_ROWS = 65_536
SCHEMA = pa.schema([("row", pa.list_(pa.int32()))])

Array = npt.NDArray[Any]


class Gathered(NamedTuple):
    """Some rows: every (row, id feature) is a bag of ids, in the order of the features. F = S + P."""

    click: Array  # [N] float32
    conversion: Array  # [N] float32
    numeric: Array  # [N, M] float32
    ids: Array  # [n] int32
    weights: Array  # [n] float32
    bags: Array  # [n] int32: of each id, the number of its bag
    starts: Array  # [N * F + 1] int32: where each bag begins


class Streams:
    """The stream in a buffer of Arrow's IPC file format; `gather` takes any rows."""

    def __init__(self, buffer: pa.Buffer, features: tuple[Feature, ...]) -> None:
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        self._buffer = buffer
        self._words = np.frombuffer(buffer, np.int32, len(buffer) // 4)
        self._is_multi = np.array([feature.kind == "multi" for feature in features if feature.kind != "numeric"], bool)
        self._numeric = sum(feature.kind == "numeric" for feature in features)
        self._single = int((~self._is_multi).sum())
        self._places = np.zeros((reader.num_record_batches, 2), dtype=np.int64)  # of offsets and words, in the buffer
        self.rows = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            if self.rows != number * BATCH_ROWS:
                raise ValueError(f"record batch {number} begins at row {self.rows}, allowed: {number * BATCH_ROWS}")
            self.rows += batch.num_rows
            _, offsets, _, words = batch.column(0).buffers()
            self._places[number] = [(part.address - buffer.address) // 4 for part in (offsets, words)]

    def gather(self, index: Array) -> Gathered:
        """The rows with these numbers, in their order. index: [N] int64."""
        count, features = len(index), len(self._is_multi)
        if count and (index.min() < 0 or index.max() >= self.rows):
            raise IndexError(f"rows {index.min()} to {index.max()} of {self.rows}")
        spare = 1 + self._numeric + features - 2 * self._single  # words: pooled ids have a weight each
        size = _count_ids(self._words, self._places, index, spare)
        found = Gathered(
            np.empty(count, np.float32), np.empty(count, np.float32), np.empty((count, self._numeric), np.float32),
            np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.int32),
            np.empty(count * features + 1, np.int32),
        )  # fmt: skip
        _gather(self._words, self._words.view(np.float32), self._places, index, self._is_multi, *found)
        return found

    def labels(self) -> tuple[Array, Array]:
        """click and conversion of all rows: [N] int8 each."""
        found = np.empty(self.rows, np.int8)
        _labels(self._words, self._places, found)
        return found & 1, found >> 1


def record_batch(
    columns: Mapping[str, pa.Array], features: tuple[Feature, ...], offsets: Mapping[str, int], where: str
) -> pa.RecordBatch:
    """Encoded columns (as in the Parquet splits) of at most `BATCH_ROWS` rows.

    offsets: the first row of each id feature in the fused table. where: what an error names.

    Raises:
        UserError: an id outside of its feature's table.
    """
    count = len(next(iter(columns.values())))
    kinds = {kind: [feature for feature in features if feature.kind == kind]
             for kind in ("numeric", "categorical", "multi")}  # fmt: skip
    lengths = np.zeros((count, len(kinds["multi"])), np.int32)
    for position, feature in enumerate(kinds["multi"]):
        lengths[:, position] = np.diff(columns[feature.name].offsets.to_numpy())
    fixed = 1 + len(features)
    starts = np.concatenate([[0], np.cumsum(fixed + 2 * lengths.sum(1, dtype=np.int64))])
    words = np.empty(starts[-1], np.int32)
    first = starts[:-1]

    click, conversion = (columns[label].to_numpy(zero_copy_only=False) for label in LABELS)
    words[first] = (click != 0) + 2 * (conversion != 0)
    for position, feature in enumerate(kinds["numeric"], 1):
        words[first + position] = float_values(columns[feature.name]).view(np.int32)
    for position, feature in enumerate(kinds["categorical"], 1 + len(kinds["numeric"])):
        words[first + position] = table_ids(columns[feature.name], feature, where) + np.int32(offsets[feature.name])
    before = np.cumsum(lengths, 1, dtype=np.int64) - lengths  # ids of the features before
    pooled = lengths.sum(1, dtype=np.int64)
    for position, feature in enumerate(kinds["multi"]):
        size, column = np.ascontiguousarray(lengths[:, position]), columns[feature.name]
        words[first + fixed - len(kinds["multi"]) + position] = size
        weights = (
            float_values(columns[f"{feature.name}.weights"].flatten()) if feature.weighted else np.empty(0, np.float32)
        )
        _place(
            table_ids(column.flatten(), feature, where), weights, size, first + fixed + before[:, position], pooled,
            offsets[feature.name], feature.weighted, words, words.view(np.float32),
        )  # fmt: skip
    return pa.record_batch(
        [pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), pa.array(words))], schema=SCHEMA
    )


def mapped(batches: Iterator[pa.RecordBatch], file: Path, made_of: str) -> pa.Buffer:
    """The batches in a file beside the data, mapped; made unless it is there and was `made_of` the same.

    Where the folder cannot be written, in a temporary file without a name.
    """
    schema = SCHEMA.with_metadata({"made_of": made_of})
    with suppress(OSError, pa.ArrowInvalid):
        check_file(file)
        buffer = pa.memory_map(str(file)).read_buffer()
        if pa.ipc.open_file(pa.BufferReader(buffer)).schema.equals(schema, check_metadata=True):
            return buffer
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    except OSError:
        handle, name = tempfile.mkstemp(prefix="impressions-")
    work = Path(name)
    try:
        with os.fdopen(handle, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        buffer = pa.memory_map(name).read_buffer()
        if work.parent.resolve() == file.parent.resolve():
            work.chmod(0o644)
            os.replace(work, file)
        return buffer
    finally:
        work.unlink(missing_ok=True)  # what is mapped stays until nobody maps it


@compiled
def _place(
    ids: Array, weights: Array, lengths: Array, first: Array, pooled: Array, offset: int, weighted: bool,
    words: Array, floats: Array,
) -> None:  # fmt: skip
    """One feature's ids, and `pooled` words later their weights; without weights, the mean: 1 / length."""
    position = 0
    for row in range(len(lengths)):
        size = lengths[row]
        for number in range(size):
            place = first[row] + number
            words[place] = ids[position] + offset
            floats[place + pooled[row]] = weights[position] if weighted else np.float32(1) / np.float32(size)
            position += 1


@compiled
def _row(words: Array, places: Array, row: int) -> tuple[int, int]:
    """Where a row begins and ends."""
    offsets, first = places[row // BATCH_ROWS]
    place = offsets + row % BATCH_ROWS
    return first + words[place], first + words[place + 1]


@compiled
def _count_ids(words: Array, places: Array, index: Array, spare: int) -> int:
    """Count the ids of the rows."""
    count = 0
    for row in index:
        begin, end = _row(words, places, row)
        count += (end - begin - spare) // 2
    return count


@compiled
def _labels(words: Array, places: Array, found: Array) -> None:
    for row in range(len(found)):
        offsets, first = places[row // BATCH_ROWS]
        found[row] = words[first + words[offsets + row % BATCH_ROWS]]


@compiled
def _gather(
    words: Array, floats: Array, places: Array, index: Array, is_multi: Array, click: Array, conversion: Array,
    numeric: Array, ids: Array, weights: Array, bags: Array, starts: Array,
) -> None:  # fmt: skip
    position = bag = starts[0] = 0
    for row in range(len(index)):
        place, end = _row(words, places, index[row])
        click[row], conversion[row] = words[place] & 1, words[place] >> 1
        place += 1
        for number in range(numeric.shape[1]):
            numeric[row, number] = floats[place]
            place += 1
        sizes = place
        for multi in is_multi:
            sizes += not multi
        multi_ids = place + len(is_multi)
        pooled = (end - multi_ids) // 2
        for multi in is_multi:
            if multi:
                for _ in range(words[sizes]):
                    ids[position], weights[position], bags[position] = words[multi_ids], floats[multi_ids + pooled], bag
                    multi_ids += 1
                    position += 1
                sizes += 1
            else:
                ids[position], weights[position], bags[position] = words[place], 1, bag
                place += 1
                position += 1
            bag += 1
            starts[bag] = position
