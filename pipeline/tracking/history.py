"""A run's whole history as one Parquet file, made from its journal in pieces."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.storage.files import replacing
from pipeline.storage.journal import Record, points

GROUP_POINTS = 50_000  # of a row group: what is in memory at a time


def write_history(journal: Path, file: Path, moved: Callable[[], None] = lambda: None) -> None:
    """Every point of the journal in its order: metric, step, value, and the time in milliseconds since the epoch.

    moved: called after each piece.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {"metric": pa.string(), "step": pa.int64(), "value": pa.float64(), "timestamp": pa.int64()}.items()
    )
    with replacing(file) as work, pq.ParquetWriter(work, schema) as writer:
        for columns in _groups(points(journal)):
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema))
            moved()


def _groups(records: Iterator[Record]) -> Iterator[list[list[Any]]]:
    columns: list[list[Any]] = [[], [], [], []]
    for record in records:
        for key, value in record["values"].items():
            for column, entry in zip(columns, (key, record["step"], float(value), record["time"]), strict=True):
                column.append(entry)
        if len(columns[0]) >= GROUP_POINTS:
            yield columns
            columns = [[], [], [], []]
    if columns[0]:
        yield columns
