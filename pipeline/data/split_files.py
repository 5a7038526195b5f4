"""The splits of a prepared folder: checks of their Parquet columns, and their streams."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.layout import Layout
from pipeline.data.recut import Recut
from pipeline.data.schema import LABELS, SAMPLE_WEIGHT, VOCABULARY_FILE, DataSchema, split_parts
from pipeline.data.streams import BATCH_ROWS, Streams, mapped, record_batch
from pipeline.errors import UserError
from pipeline.storage.files import NotAFileError, check_file

TRUTH = ("p_ctr", "p_cvr")


def check_files(folder: Path, schema: DataSchema) -> None:
    """Check that all files of a prepared folder exist, including those that are read later.

    Raises:
        UserError: a file is missing or not a regular file.
    """
    for split in schema.splits.values():
        with split_errors(folder / split.file):
            split_parts(folder / split.file)
    vocabulary = folder / VOCABULARY_FILE
    if vocabulary.exists():  # training does not need it
        with split_errors(vocabulary):
            check_file(vocabulary)


def open_streams(folder: Path, schema: DataSchema, split: str) -> Streams:
    """Open the streams of a split; at first use, create them from its Parquet files.

    Raises:
        UserError: a Parquet file is missing, truncated or different from the schema.
    """
    if split not in schema.splits:
        raise UserError(f"{folder}: no split {split}; the schema has {', '.join(schema.splits)}")
    file = folder / schema.splits[split].file
    with split_errors(file):
        stats = [part.stat() for part in split_parts(file)]
        made_of = " ".join([schema.digest, split, *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)])
        buffer = mapped(record_batches(file, schema, split), file.with_suffix(".arrow"), made_of)
    return Streams(buffer, schema.features, schema.sample_weight)


def read_truth(file: Path) -> Mapping[str, npt.NDArray[np.float64]]:
    """Read the true probabilities of a generated split: `p_ctr` and `p_cvr`."""
    with split_errors(file):
        table = pa.concat_tables(pq.read_table(part, columns=[*TRUTH]) for part in split_parts(file))
        return {name: table[name].to_numpy() for name in table.column_names}


def record_batches(file: Path, schema: DataSchema, split: str) -> Iterator[pa.RecordBatch]:
    """Convert the Parquet files of a split to record batches of BATCH_ROWS encoded rows (format: `streams.py`).

    Raises:
        UserError: a column is missing, or a column or the number of rows differs from the schema.
    """
    layout = Layout(schema.features)
    columns = schema.row_columns
    for feature in schema.features:
        columns += [feature.name] + ([f"{feature.name}.weights"] if feature.weighted else [])
    rows = 0
    with split_errors(file):
        parts = split_parts(file)
    for part in parts:
        with split_errors(part):
            footer = pq.read_metadata(part)
        names = footer.schema.to_arrow_schema().names
        missing = [name for name in [*columns, *(TRUTH if schema.truth else ())] if name not in names]
        if missing:
            raise UserError(f"{part}: no column {missing[0]}, which schema.json names")
        rows += footer.num_rows
    if rows != schema.splits[split].rows:
        raise UserError(f"{file}: {rows} rows, but schema.json says {schema.splits[split].rows}")

    def tables() -> Iterator[pa.Table]:
        recut = Recut(BATCH_ROWS)
        for part in parts:
            # pre_buffer=True would hold the whole file in memory
            for batch in pq.ParquetFile(part, pre_buffer=False).iter_batches(BATCH_ROWS, columns=columns):
                table = pa.Table.from_batches([batch])
                _check_columns(table, schema, part)
                yield from recut.add(table)
        yield from recut.rest()

    for table in tables():
        arrays = {name: _combined(table[name]) for name in columns}
        yield record_batch(arrays, layout, str(file), schema.sample_weight)


@contextmanager
def split_errors(file: Path) -> Iterator[None]:
    """Report errors in a split's file as one-line UserErrors."""
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


def _check_columns(table: pa.Table, schema: DataSchema, file: Path) -> None:
    """Check the columns' types, and that no value is missing."""

    def check(column: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(
                f"{file}: column {column} is not as schema.json says, allowed: {allowed}; run prepare_ctr again"
            )

    for feature in schema.features:
        name, column = feature.name, table[feature.name]
        if feature.kind == "numeric":
            check(name, _is_complete(column, pa.types.is_floating), "a number in every row")
        elif feature.kind == "categorical":
            check(name, _is_complete(column, pa.types.is_integer), "an id in every row")
        else:
            check(name, _are_lists(column, pa.types.is_integer), "a list of ids in every row")
            if feature.weighted:
                weights = table[f"{name}.weights"]
                check(f"{name}.weights", _are_lists(weights, pa.types.is_floating), "a list of weights in every row")
                same = pc.all(pc.equal(pc.list_value_length(column), pc.list_value_length(weights))).as_py()
                check(f"{name}.weights", same is not False, f"as many weights as {name} has ids")
    for label in LABELS:
        check(label, _is_complete(table[label], pa.types.is_integer), "0 or 1 in every row")
    if schema.sample_weight:
        check(SAMPLE_WEIGHT, _is_complete(table[SAMPLE_WEIGHT], pa.types.is_floating), "a number in every row")


def _is_complete(column: pa.ChunkedArray, has_kind: Callable[[pa.DataType], bool]) -> bool:
    return has_kind(column.type) and not column.null_count


def _are_lists(column: pa.ChunkedArray, has_kind: Callable[[pa.DataType], bool]) -> bool:
    if not pa.types.is_list(column.type) or column.null_count:
        return False
    return _is_complete(pc.list_flatten(column), has_kind)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
