"""The rows of a split as a stream of 32-bit words in a memory-mapped Arrow file.

Only the rows in use are loaded into memory, and each row is one contiguous range of words: the labels
(click + 2 * conversion), the row's weight if rows have weights (float32), the numeric features (float32), the ids of
the categorical features, the number of ids of each multi-valued feature, these ids, and their weights (float32). Ids
are rows of the fused table. Every record batch has `BATCH_ROWS` rows, except the last one. N = rows, S = categorical,
P = multi-valued, M = numeric features.
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
from pipeline.data.layout import Layout, bag_weights, consecutive, float_values
from pipeline.data.schema import LABELS, SAMPLE_WEIGHT, Feature
from pipeline.storage.files import check_file

BATCH_ROWS = 65_536
SCHEMA = pa.schema([("row", pa.list_(pa.int32()))])

Array = npt.NDArray[Any]


class Gathered(NamedTuple):
    """A selection of rows. Each (row, id feature) is a bag of ids, in the order of the features. F = S + P."""

    click: Array  # [N] float32
    conversion: Array  # [N] float32
    numeric: Array  # [N, M] float32
    ids: Array  # [n] int32
    weights: Array  # [n] float32
    bags: Array  # [n] int32: index of each id's bag
    starts: Array  # [N * F + 1] int32: offset of each bag in `ids`, then the end
    sample_weight: Array  # [N] float32; [0] if rows have no weights


class Streams:
    """A stream in Arrow's IPC file format; `gather` reads arbitrary rows."""

    def __init__(self, buffer: pa.Buffer, features: tuple[Feature, ...], sample_weight: bool = False) -> None:
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        self.sample_weight = sample_weight
        self._buffer = buffer
        self._words = np.frombuffer(buffer, np.int32, len(buffer) // 4)
        self._is_multi = np.array([feature.kind == "multi" for feature in features if feature.kind != "numeric"], bool)
        self._numeric = sum(feature.kind == "numeric" for feature in features)
        self._places = np.zeros((reader.num_record_batches, 2), dtype=np.int64)  # start of offsets and words
        self.rows = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            if self.rows != number * BATCH_ROWS:
                raise ValueError(f"record batch {number} begins at row {self.rows}, allowed: {number * BATCH_ROWS}")
            self.rows += batch.num_rows
            _, offsets, _, words = batch.column(0).buffers()
            self._places[number] = [(part.address - buffer.address) // 4 for part in (offsets, words)]

    def gather(self, index: Array) -> Gathered:
        """Read rows in the given order. index: [N] int64 row numbers."""
        count, features = len(index), len(self._is_multi)
        if count and (index.min() < 0 or index.max() >= self.rows):
            raise IndexError(f"rows {index.min()} to {index.max()} of {self.rows}")
        # a row has (words - fixed) / 2 ids: two words per multi-valued id (id, weight), one per categorical id
        fixed = 1 + self.sample_weight + self._numeric + int(self._is_multi.sum()) - int((~self._is_multi).sum())
        size = _count_ids(self._words, self._places, index, fixed)
        rows = Gathered(
            np.empty(count, np.float32), np.empty(count, np.float32), np.empty((count, self._numeric), np.float32),
            np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.int32),
            np.empty(count * features + 1, np.int32), np.empty(count * self.sample_weight, np.float32),
        )  # fmt: skip
        _gather(self._words, self._words.view(np.float32), self._places, index, self._is_multi, *rows)
        return rows

    def labels(self) -> tuple[Array, Array]:
        """click and conversion of all rows: [N] int8 each."""
        labels = np.empty(self.rows, np.int8)
        for number, (offsets, first) in enumerate(self._places):
            batch = labels[number * BATCH_ROWS : (number + 1) * BATCH_ROWS]
            batch[:] = self._words[first + self._words[offsets : offsets + len(batch)]]
        return labels & 1, labels >> 1


def record_batch(
    columns: Mapping[str, pa.Array], layout: Layout, file: str, sample_weight: bool = False
) -> pa.RecordBatch:
    """Convert at most `BATCH_ROWS` rows of encoded columns (as in the Parquet splits) to a record batch of the stream.

    Raises:
        UserError: an id is outside its feature's table. The message names `file`.
    """
    single, multi = ([feature for feature in layout.id_features if feature.kind == kind]
                     for kind in ("categorical", "multi"))  # fmt: skip
    click, conversion = (columns[label].to_numpy(zero_copy_only=False) for label in LABELS)
    lengths = np.zeros((len(click), len(multi)), np.int32)
    for position, feature in enumerate(multi):
        lengths[:, position] = np.diff(columns[feature.name].offsets.to_numpy())
    names = [SAMPLE_WEIGHT] * sample_weight + [feature.name for feature in layout.numeric_features]
    floats = [float_values(columns[name]) for name in names]
    fixed = 1 + sample_weight + len(layout.features)
    starts = np.concatenate([[0], np.cumsum(fixed + 2 * lengths.sum(1, dtype=np.int64))])
    words = np.empty(starts[-1], np.int32)
    first = starts[:-1]

    words[first] = (click != 0) + 2 * (conversion != 0)
    for position, values in enumerate(floats, 1):
        words[first + position] = values.view(np.int32)
    for position, feature in enumerate(single, 1 + len(floats)):
        words[first + position] = layout.table_ids(columns[feature.name], feature, file)
    # [rows, multi-valued features] number of ids in the row's earlier multi-valued features
    preceding = np.cumsum(lengths, 1, dtype=np.int64) - lengths
    pooled = lengths.sum(1, dtype=np.int64)
    for position, feature in enumerate(multi):
        size = lengths[:, position]
        words[first + fixed - len(multi) + position] = size
        places = consecutive(first + fixed + preceding[:, position], size)
        words[places] = layout.table_ids(columns[feature.name].flatten(), feature, file)
        words.view(np.float32)[places + np.repeat(pooled, size)] = bag_weights(columns, feature, size)
    return pa.record_batch(
        [pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), pa.array(words))], schema=SCHEMA
    )


def mapped(batches: Iterator[pa.RecordBatch], file: Path, made_of: str) -> pa.Buffer:
    """Write the batches to a file and memory-map it. An existing file is reused if it has the same `made_of`.

    If the file's folder is not writable, an unlinked temporary file is used instead.
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
        work.unlink(missing_ok=True)  # a mapped file stays readable after it is unlinked


@compiled
def _row(words: Array, places: Array, row: int) -> tuple[int, int]:
    """Positions of the first word of a row and of the next row."""
    offsets, first = places[row // BATCH_ROWS]
    place = offsets + row % BATCH_ROWS
    return first + words[place], first + words[place + 1]


@compiled
def _count_ids(words: Array, places: Array, index: Array, fixed: int) -> int:
    count = 0
    for row in index:
        begin, end = _row(words, places, row)
        count += (end - begin - fixed) // 2
    return count


@compiled
def _gather(
    words: Array, floats: Array, places: Array, index: Array, is_multi: Array, click: Array, conversion: Array,
    numeric: Array, ids: Array, weights: Array, bags: Array, starts: Array, sample_weight: Array,
) -> None:  # fmt: skip
    position = bag = starts[0] = 0
    for row in range(len(index)):
        place, end = _row(words, places, index[row])
        click[row], conversion[row] = words[place] & 1, words[place] >> 1
        place += 1
        if len(sample_weight):
            sample_weight[row] = floats[place]
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
