"""The look-up's gradient against torch's own, and the mapped streams on disk."""

import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.data.schema import DataSchema
from pipeline.data.streams import BATCH_ROWS
from pipeline.tasks.mmoe.impressions.embedded_impressions import generate
from pipeline.tasks.mmoe.impressions.embedding import grouped, lookup
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.impressions.impression_table import read_split

torch.set_num_threads(1)

Lengths = list[int]


def batch_of(lengths: Lengths, table_rows: int, seed: int) -> tuple[Impressions, npt.NDArray[np.int32]]:
    """Bags of these lengths with ids and weights at random, and the bag of each id."""
    random = np.random.Generator(np.random.PCG64(seed))
    count = sum(lengths)
    ids = random.integers(0, table_rows, count).astype(np.int32)
    bags = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    weights = random.normal(size=count).astype(np.float32)
    nothing = torch.zeros(len(lengths))
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tensors = [torch.from_numpy(part) for part in (ids, weights)]
    return Impressions(nothing, nothing, nothing[:, None], *tensors, starts, grouped(ids, bags, weights)), bags


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 20), st.sampled_from([1, 3, 8, 10, 16]),
    st.integers(0, 1000),
)  # fmt: skip
def test_the_gradient_is_torchs(lengths: Lengths, table_rows: int, width: int, seed: int) -> None:
    """Of embedding_bag with autograd walking the table, for the sparse and for the dense form.

    In another order, up to 180 terms of size 1 to 10: the square root of so many roundings of 6e-8 is near 1e-5.
    """
    batch, bags = batch_of(lengths, table_rows, seed)
    start, factor = torch.randn(table_rows, width), torch.randn(len(lengths), width)
    theirs = start.clone().requires_grad_()
    flat = torch.zeros(len(lengths), width).index_add(
        0, torch.from_numpy(bags).long(), theirs[batch.ids.long()] * batch.weights[:, None]
    )
    (flat * factor).sum().backward()
    for sparse in (True, False):
        ours = start.clone().requires_grad_()
        found = lookup(ours, batch, sparse)
        torch.testing.assert_close(found, flat.detach(), rtol=1e-4, atol=1e-4)
        (found * factor).sum().backward()
        assert ours.grad is not None
        assert ours.grad.is_sparse == sparse
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 1000))
def test_groups_are_the_places_of_each_row(lengths: Lengths, table_rows: int, seed: int) -> None:
    batch, bags = batch_of(lengths, table_rows, seed)
    groups = batch.groups
    assert groups is not None
    expected: dict[int, list[tuple[int, float]]] = {}
    for row, bag, weight in zip(batch.ids.tolist(), bags.tolist(), batch.weights.tolist(), strict=True):
        expected.setdefault(row, []).append((bag, weight))
    assert groups.rows.tolist() == sorted(expected)
    pairs = list(zip(groups.bags.tolist(), groups.weights.tolist(), strict=True))
    found = [pairs[first:last] for first, last in itertools.pairwise(groups.starts.tolist())]
    assert found == [expected[row] for row in sorted(expected)]


def test_without_gradients_no_groups_are_needed() -> None:
    batch, _ = batch_of([2, 0, 1], 5, 0)
    table = torch.randn(5, 8)
    plain = functional.embedding_bag(
        batch.ids, table, batch.starts, mode="sum", per_sample_weights=batch.weights, include_last_offset=True
    )
    torch.testing.assert_close(lookup(table, batch, sparse=True), plain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More training rows than a record batch holds."""
    made = tmp_path_factory.mktemp("streams")
    generate(made, rows=BATCH_ROWS + 20_000, seed=0)
    return made


def test_streams_are_kept_and_made_anew_for_other_data(folder: Path) -> None:
    schema, file = DataSchema.read(folder), folder / "train.arrow"
    first = read_split(folder, schema, "train")
    made = file.stat()
    rows = [pa.ipc.open_file(file).get_batch(number).num_rows for number in range(2)]
    assert rows == [BATCH_ROWS, len(first) - BATCH_ROWS]
    again = read_split(folder, schema, "train")
    assert file.stat().st_mtime_ns == made.st_mtime_ns
    chosen = np.array([0, BATCH_ROWS - 1, BATCH_ROWS, len(first) - 1])
    os.utime(folder / "train.parquet")
    changed = read_split(folder, schema, "train")
    assert file.stat().st_mtime_ns > made.st_mtime_ns
    for table in (again, changed):
        for one, other in zip(first.streams.gather(chosen), table.streams.gather(chosen), strict=True):
            assert np.array_equal(one, other)
    assert [part.name for part in folder.glob("*arrow*")] == ["train.arrow"]


def test_streams_are_kept_under_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "test.arrow").unlink(missing_ok=True)
    monkeypatch.chdir(folder.parent)
    read_split(Path(folder.name), DataSchema.read(folder), "test")
    assert (folder / "test.arrow").is_file()


@pytest.mark.parametrize("left", [0, 7, 1000])
def test_a_damaged_stream_file_is_made_anew(folder: Path, left: int) -> None:
    schema, file = DataSchema.read(folder), folder / "validation.arrow"
    whole = read_split(folder, schema, "validation").streams.gather(np.arange(50))
    file.write_bytes(file.read_bytes()[:left])
    found = read_split(folder, schema, "validation").streams.gather(np.arange(50))
    assert all(np.array_equal(one, other) for one, other in zip(whole, found, strict=True))


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams then live in a temporary file that nobody sees."""
    schema, make = DataSchema.read(folder), tempfile.mkstemp

    def refuse(prefix: str, dir: Path | None = None) -> tuple[int, str]:  # noqa: A002
        if dir is not None:
            raise PermissionError(13, "Permission denied")
        return make(prefix=prefix, dir=tmp_path)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    (folder / "test.arrow").unlink(missing_ok=True)
    before = {file.name for file in folder.iterdir()}
    table = read_split(folder, schema, "test")
    assert {file.name for file in folder.iterdir()} == before
    assert not list(tmp_path.iterdir())
    click, conversion = table.labels
    expected = schema.splits["test"]
    assert (int(click.sum()), int(conversion.sum())) == (expected.clicks, expected.conversions)


def test_rows_out_of_range(folder: Path) -> None:
    table = read_split(folder, DataSchema.read(folder), "test")
    for index in ([-1], [len(table)], [0, len(table) + 5]):
        with pytest.raises(IndexError):
            table.batch(np.array(index))
