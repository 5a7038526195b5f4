"""The memory-mapped streams of a split on the disk."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.schema import DataSchema
from pipeline.data.split_files import open_streams
from pipeline.data.streams import BATCH_ROWS, Streams
from pipeline.tasks.mmoe.impressions.embedded_impressions import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More training rows than a record batch holds."""
    path = tmp_path_factory.mktemp("streams")
    generate(path, rows=BATCH_ROWS + 20_000, seed=0)
    return path


def assert_equal(streams: Streams, others: Streams, rows: list[int]) -> None:
    index = np.array(rows)
    assert streams.rows == others.rows
    for part, other in zip(streams.gather(index), others.gather(index), strict=True):
        np.testing.assert_array_equal(part, other)


def test_streams_are_reused_for_the_same_data_only(folder: Path) -> None:
    schema, file = DataSchema.read(folder), folder / "train.arrow"
    first = open_streams(folder, schema, "train")
    written = file.stat().st_mtime_ns
    sizes = [pa.ipc.open_file(file).get_batch(number).num_rows for number in range(2)]
    assert sizes == [BATCH_ROWS, first.rows - BATCH_ROWS]
    rows = [0, BATCH_ROWS - 1, BATCH_ROWS, first.rows - 1]
    assert_equal(first, open_streams(folder, schema, "train"), rows)
    assert file.stat().st_mtime_ns == written
    os.utime(folder / "train.parquet")
    assert_equal(first, open_streams(folder, schema, "train"), rows)
    assert file.stat().st_mtime_ns > written
    assert [path.name for path in folder.glob("*arrow*")] == ["train.arrow"]


def test_streams_of_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "test.arrow").unlink(missing_ok=True)
    monkeypatch.chdir(folder.parent)
    open_streams(Path(folder.name), DataSchema.read(folder), "test")
    assert (folder / "test.arrow").is_file()


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_damaged_file_is_written_again(folder: Path, size: int) -> None:
    schema, file = DataSchema.read(folder), folder / "validation.arrow"
    whole = open_streams(folder, schema, "validation")
    content = whole.gather(np.arange(50))
    file.write_bytes(file.read_bytes()[:size])
    for part, other in zip(open_streams(folder, schema, "validation").gather(np.arange(50)), content, strict=True):
        np.testing.assert_array_equal(part, other)


def test_a_folder_without_write_permission(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams are in an unnamed temporary file."""
    schema, mkstemp = DataSchema.read(folder), tempfile.mkstemp

    def refuse(prefix: str, dir: Path | None = None) -> tuple[int, str]:  # noqa: A002
        if dir is not None:
            raise PermissionError(13, "Permission denied")
        return mkstemp(prefix=prefix, dir=tmp_path)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    (folder / "test.arrow").unlink(missing_ok=True)
    before = {file.name for file in folder.iterdir()}
    sums = [int(labels.sum()) for labels in open_streams(folder, schema, "test").labels()]
    assert {file.name for file in folder.iterdir()} == before
    assert not list(tmp_path.iterdir())
    assert sums == [schema.splits["test"].clicks, schema.splits["test"].conversions]


def test_rows_out_of_range(folder: Path) -> None:
    streams = open_streams(folder, DataSchema.read(folder), "test")
    for index in ([-1], [streams.rows], [0, streams.rows + 5]):
        with pytest.raises(IndexError):
            streams.gather(np.array(index))
