"""Write all points of a run's journal to a Parquet file."""

from collections.abc import Callable
from pathlib import Path

from pipeline.storage.files import replacing
from pipeline.storage.journal import read_points

GROUP_POINTS = 50_000  # per row group; one group is held in memory at a time


def write_history(journal: Path, file: Path, on_progress: Callable[[], None] = lambda: None) -> None:
    """Write every point in journal order: metric, step, value, and timestamp in milliseconds since the epoch.

    on_progress: called after each row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {"metric": pa.string(), "step": pa.int64(), "value": pa.float64(), "timestamp": pa.int64()}.items()
    )
    rows: list[tuple[str, int, float, int]] = []

    def write_group() -> None:
        columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True))
        writer.write_table(pa.table(columns, schema=schema))
        rows.clear()
        on_progress()

    with replacing(file) as work, pq.ParquetWriter(work, schema) as writer:
        for record in read_points(journal):
            rows += [(key, record["step"], float(value), record["time"]) for key, value in record["values"].items()]
            if len(rows) >= GROUP_POINTS:
                write_group()
        if rows:
            write_group()
