"""Prepared impressions, gathered into batches without Python per row or per feature.

N = rows, F = id features, M = numeric features, n = ids of a batch.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.errors import UserError
from pipeline.storage.files import NotAFileError, check_file
from pipeline.tasks.base import Rows
from pipeline.tasks.mmoe.embedding import grouped
from pipeline.tasks.mmoe.impressions import Impressions, Layout
from pipeline.tasks.mmoe.raw_files import Recut
from pipeline.tasks.mmoe.schema import LABELS, VOCABULARY_FILE, DataSchema, Feature, parts
from pipeline.tasks.mmoe.streams import BATCH_ROWS, Streams, mapped, record_batch


class ImpressionTable:
    """A split: `batch(rows)` gathers any rows."""

    def __init__(
        self, streams: Streams, truth: Callable[[], Mapping[str, npt.NDArray[np.float64]]] | None = None
    ) -> None:
        """`truth`: reads the true probabilities, where they are known."""
        self.streams, self._truth = streams, truth

    def __len__(self) -> int:
        return self.streams.rows

    @cached_property
    def truth(self) -> Mapping[str, npt.NDArray[np.float64]] | None:
        return self._truth() if self._truth else None

    @cached_property
    def labels(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
        """click and conversion of every row."""
        return self.streams.labels()

    def batch(self, rows: Rows, *, trains: bool = False) -> Impressions:
        """The rows, in their order; `trains`: with what the gradient of the table needs."""
        found = self.streams.gather(np.asarray(rows, dtype=np.int64))
        return Impressions(
            torch.from_numpy(found.click),
            torch.from_numpy(found.conversion),
            torch.from_numpy(found.numeric),
            torch.from_numpy(found.ids),
            torch.from_numpy(found.weights),
            torch.from_numpy(found.starts),
            grouped(found.ids, found.bags, found.weights) if trains else None,
        )

    def batches(self, size: int, first: int = 0, last: int | None = None) -> Sequence[Rows]:
        """The rows from `first` to before `last`, all by default, in their order."""
        last = len(self) if last is None else last
        return np.array_split(np.arange(first, last), max(1, -(-(last - first) // size)))


class Shuffle(Sequence[Rows]):
    """The micro-batches of one epoch: a permutation from (seed, epoch) alone, cut into batches."""

    def __init__(self, rows: int, batch_size: int, seed: int, epoch: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, [seed, epoch]

    @cached_property
    def order(self) -> Rows:
        return np.random.Generator(np.random.PCG64(self.seed)).permutation(self.rows)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]


def check_files(folder: Path, schema: DataSchema) -> None:
    """See that the files of a prepared folder are files, also those that are read late.

    Raises:
        UserError: one is something else, or is not there.
    """
    for split in schema.splits.values():
        with told(folder / split.file):
            parts(folder / split.file)
    vocabulary = folder / VOCABULARY_FILE
    if vocabulary.exists():  # training alone can do without
        with told(vocabulary):
            check_file(vocabulary)


def read_split(folder: Path, schema: DataSchema, split: str) -> ImpressionTable:
    """A split of a prepared folder; the first time, its streams are made of the Parquet.

    Raises:
        UserError: the Parquet is missing, cut, or not what the schema says.
    """
    if split not in schema.splits:
        raise UserError(f"{folder}: no split {split}; the schema has {', '.join(schema.splits)}")
    file = folder / schema.splits[split].file
    with told(file):
        found = [part.stat() for part in parts(file)]
        made_of = " ".join([schema.digest, split, *(f"{part.st_size} {part.st_mtime_ns}" for part in found)])
        batches = record_batches(file, schema, split)
        buffer = mapped(batches, file.with_suffix(".arrow"), made_of)
    return ImpressionTable(Streams(buffer, schema.features), (lambda: _truth(file)) if schema.truth else None)


def record_batches(file: Path, schema: DataSchema, split: str) -> Iterator[pa.RecordBatch]:
    """The record batches of a split's streams, from its Parquet, a row group's worth at a time."""
    layout = Layout.of(schema)
    wanted = [*LABELS]
    for feature in schema.features:
        wanted += [feature.name] + ([f"{feature.name}.weights"] if feature.weighted else [])
    rows = 0
    with told(file):
        found = parts(file)
    for part in found:
        with told(part):
            footer = pq.read_metadata(part)
        there = footer.schema.to_arrow_schema().names
        missing = [name for name in [*wanted, *(("p_ctr", "p_cvr") if schema.truth else ())] if name not in there]
        if missing:
            raise UserError(f"{part}: no column {missing[0]}, which schema.json names")
        rows += footer.num_rows
    if rows != schema.splits[split].rows:
        raise UserError(f"{file}: {rows} rows, but schema.json says {schema.splits[split].rows}")
    for table in _recut(file, schema, wanted):
        yield record_batch({name: _whole(table[name]) for name in wanted}, schema.features, layout.offsets, str(file))


def _recut(file: Path, schema: DataSchema, wanted: Sequence[str]) -> Iterator[pa.Table]:
    """The wanted columns, checked, `BATCH_ROWS` rows at a time whatever the parts are."""
    recut = Recut(BATCH_ROWS)
    for part in parts(file):
        # what is buffered ahead is as large as the file
        for batch in pq.ParquetFile(part, pre_buffer=False).iter_batches(BATCH_ROWS, columns=wanted):
            table = pa.Table.from_batches([batch])
            for feature in schema.features:
                _check_kind(table, feature, part)
            for name in LABELS:
                whole = pa.types.is_integer(table[name].type) and not table[name].null_count
                _check(whole, part, name, "0 or 1 in every row")
            yield from recut.add(table)
    yield from recut.rest()


def _truth(file: Path) -> Mapping[str, npt.NDArray[np.float64]]:
    with told(file):
        table = pa.concat_tables(pq.read_table(part, columns=["p_ctr", "p_cvr"]) for part in parts(file))
        return {name: table[name].to_numpy() for name in table.column_names}


@contextmanager
def told(file: Path) -> Iterator[None]:
    """What is wrong with a split's file, in one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; run prepare_ctr again") from None
    except NotAFileError as error:
        raise UserError(f"{error.filename}: {error.strerror}; run prepare_ctr again") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not a whole Parquet file: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: {os.strerror(error.errno) if error.errno else error}") from None


def _check_kind(table: pa.Table, feature: Feature, file: Path) -> None:
    """A column holds what schema.json says of its feature, without gaps."""
    column = table[feature.name]
    if feature.kind == "numeric":
        _check(pa.types.is_floating(column.type) and not column.null_count, file, feature.name, "a number in every row")
    elif feature.kind == "categorical":
        _check(pa.types.is_integer(column.type) and not column.null_count, file, feature.name, "an id in every row")
    else:
        _check(_holds(column, pa.types.is_integer), file, feature.name, "a list of ids in every row")
        if feature.weighted:
            name = f"{feature.name}.weights"
            _check(_holds(table[name], pa.types.is_floating), file, name, "a list of weights in every row")
            same = pc.all(pc.equal(pc.list_value_length(column), pc.list_value_length(table[name]))).as_py()
            _check(same is not False, file, name, f"as many weights as {feature.name} has ids")


def _holds(column: pa.ChunkedArray, kind: Callable[[pa.DataType], bool]) -> bool:
    """Lists of the kind, none missing, with none missing in them."""
    if not pa.types.is_list(column.type) or not kind(column.type.value_type):
        return False
    return not column.null_count and not pc.list_flatten(column).null_count


def _check(holds: bool, file: Path, column: str, allowed: str) -> None:
    if not holds:
        raise UserError(
            f"{file}: column {column} is not as schema.json says, allowed: {allowed}; run prepare_ctr again"
        )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
