"""Batches of prepared impressions against plain Python per row, and refusals of damaged folders."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.layout import Layout
from pipeline.data.schema import LABELS, BaseRates, DataSchema, Feature, Split
from pipeline.data.schema import SAMPLE_WEIGHT as WEIGHT
from pipeline.data.streams import SCHEMA, Streams, record_batch
from pipeline.errors import UserError
from pipeline.tasks.mmoe.impressions.embedded_impressions import generate
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions, assemble
from pipeline.tasks.mmoe.impressions.impression_table import ImpressionTable, read_split

torch.set_num_threads(1)

Row = dict[str, Any]  # categorical: id; multi: list of ids, or of (id, weight); numeric: a number; the two labels
Bag = list[tuple[int, float]]

COLOUR = Feature(name="colour", kind="categorical", size=4)
PRICE = Feature(name="price", kind="numeric", edges=(0.0, 1.0))
TAGS = Feature(name="tags", kind="multi", size=6, weighted=True, weight_separator=":")
SLOT = Feature(name="slot", kind="categorical", size=3)
TOPICS = Feature(name="topics", kind="multi", size=5)
AGE = Feature(name="age", kind="numeric", edges=(0.0, 1.0))
DEVICE = Feature(name="device", kind="categorical", size=7)
ALL = {feature.name: feature for feature in (COLOUR, PRICE, TAGS, SLOT, TOPICS, AGE, DEVICE)}
ONE_ID_A_BAG = ["colour", "price", "slot", "device"]

number = st.floats(-1e6, 1e6, width=32)


def row_of(features: Sequence[Feature]) -> st.SearchStrategy[Row]:
    cells: dict[str, st.SearchStrategy[Any]] = {"click": st.integers(0, 1), "conversion": st.integers(0, 1)}
    for feature in features:
        ids = st.integers(0, feature.size - 1)
        cells[feature.name] = {
            "categorical": ids,
            "multi": st.lists(st.tuples(ids, number) if feature.weighted else ids, max_size=4),
            "numeric": number,
        }[feature.kind]
    return st.fixed_dictionaries(cells)


@st.composite
def tables(draw: Callable[..., Any]) -> tuple[list[Feature], list[Row]]:
    allowed = draw(st.sampled_from([list(ALL), ONE_ID_A_BAG]))
    names = draw(st.lists(st.sampled_from(allowed), min_size=1, unique=True))
    features = [ALL[name] for name in names]
    return features, draw(st.lists(row_of(features), min_size=1, max_size=8))


def columns_of(rows: Sequence[Row], features: Sequence[Feature]) -> dict[str, pa.Array]:
    """Columns of a Parquet split."""
    columns = {name: pa.array([row[name] for row in rows], pa.int8()) for name in ("click", "conversion")}
    for feature in features:
        values = [row[feature.name] for row in rows]
        if feature.weighted:
            columns[feature.name] = pa.array([[one for one, _ in bag] for bag in values], pa.list_(pa.int32()))
            weights = [[weight for _, weight in bag] for bag in values]
            columns[f"{feature.name}.weights"] = pa.array(weights, pa.list_(pa.float32()))
        else:
            kinds = {"categorical": pa.int32(), "multi": pa.list_(pa.int32()), "numeric": pa.float32()}
            columns[feature.name] = pa.array(values, kinds[feature.kind])
    return columns


def layout_of(features: Sequence[Feature]) -> Layout:
    return Layout(tuple(features))


def expected_bags(row: Row, features: Sequence[Feature]) -> list[Bag]:
    """For each id feature, the rows of the fused table with their weights; without weights, the mean."""
    bags, first = [], 0
    for feature in features:
        if feature.kind == "numeric":
            continue
        cell = row[feature.name]
        if feature.kind == "categorical":
            bags.append([(first + cell, 1.0)])
        elif feature.weighted:
            bags.append([(first + one, weight) for one, weight in cell])
        else:
            bags.append([(first + one, float(np.float32(1 / len(cell)))) for one in cell])
        first += feature.size
    return bags


def bags_of(batch: Impressions) -> list[list[Bag]]:
    """[row][feature] -> (table row, weight)"""
    pairs = list(zip(batch.ids.tolist(), batch.weights.tolist(), strict=True))
    starts = batch.starts.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(pairs)
    bags = [pairs[first:last] for first, last in itertools.pairwise(starts)]
    features = len(bags) // len(batch) if len(batch) else 0
    return [bags[row * features : (row + 1) * features] for row in range(len(batch))]


def assert_holds(batch: Impressions, rows: Sequence[Row], features: Sequence[Feature]) -> None:
    assert len(batch) == len(rows)
    assert batch.click.tolist() == [row["click"] for row in rows]
    assert batch.conversion.tolist() == [row["conversion"] for row in rows]
    numeric = [feature.name for feature in features if feature.kind == "numeric"]
    assert batch.numeric.shape == (len(rows), len(numeric))
    assert batch.numeric.tolist() == [[row[name] for name in numeric] for row in rows]
    assert bags_of(batch) == [expected_bags(row, features) for row in rows]
    assert len(batch.starts) == len(rows) * sum(feature.kind != "numeric" for feature in features) + 1
    assert batch.ids.dtype == batch.starts.dtype == torch.int32
    assert batch.weights.dtype == torch.float32
    assert batch.click.dtype == batch.conversion.dtype == batch.numeric.dtype == torch.float32


def impressions(columns: dict[str, pa.Array], layout: Layout, weighted: bool = False) -> ImpressionTable:
    """The columns as a split of one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(record_batch(columns, layout, "input", weighted))
    return ImpressionTable(Streams(sink.getvalue(), layout.features, weighted))


def every(table: ImpressionTable) -> Impressions:
    return table.batch(np.arange(len(table)))


@settings(deadline=None, max_examples=60)
@given(tables(), st.booleans())
def test_impressions_are_the_columns(table: tuple[list[Feature], list[Row]], sliced: bool) -> None:
    """Sliced columns too, whose lists do not start at 0."""
    features, rows = table
    columns = columns_of([rows[-1], *rows] if sliced else rows, features)
    if sliced:
        columns = {name: column.slice(1) for name, column in columns.items()}
    assert_holds(every(impressions(columns, layout_of(features))), rows, features)
    predicted = assemble(columns, layout_of(features))
    assert_holds(predicted, [row | {"click": 0, "conversion": 0} for row in rows], features)


@settings(deadline=None, max_examples=100)
@given(tables(), st.booleans(), st.data())
def test_batch_is_a_gather_of_rows(table: tuple[list[Feature], list[Row]], weighted: bool, data: st.DataObject) -> None:
    """Any rows in any order, repeated, or none; with and without weights of the rows."""
    features, rows = table
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    weights = data.draw(st.lists(number, min_size=len(rows), max_size=len(rows)))
    columns = columns_of(rows, features) | ({WEIGHT: pa.array(weights, pa.float32())} if weighted else {})
    whole = impressions(columns, layout_of(features), weighted)
    assert len(whole) == len(rows)
    index = np.array(chosen, dtype=np.int64)
    picked = [rows[one] for one in chosen]
    assert_holds(whole.batch(index), picked, features)
    found = whole.batch(index).sample_weight
    assert (None if found is None else found.tolist()) == ([weights[one] for one in chosen] if weighted else None)
    assert [label.tolist() for label in whole.labels] == [[row[name] for row in rows] for name in LABELS]
    assert_holds(whole.batch(torch.from_numpy(index)), picked, features)


@settings(deadline=None, max_examples=25)
@given(tables(), st.integers(1, 10))
def test_batches_are_all_rows_in_order(table: tuple[list[Feature], list[Row]], size: int) -> None:
    features, rows = table
    whole = impressions(columns_of(rows, features), layout_of(features))
    parts = whole.batches(size)
    assert [row for part in parts for row in part] == list(range(len(rows)))
    assert len(parts) == math.ceil(len(rows) / size)
    assert max(len(part) for part in parts) <= size


def test_layout_by_hand() -> None:
    schema = DataSchema(
        features=tuple(ALL.values()), splits={}, base_rates=BaseRates(ctr=0.5, cvr=0.5), vocabulary_sha256=""
    )
    layout = Layout(schema.features)
    assert [feature.name for feature in layout.id_features] == ["colour", "tags", "slot", "topics", "device"]
    assert [feature.name for feature in layout.numeric_features] == ["price", "age"]
    assert layout.offsets == {"colour": 0, "tags": 4, "slot": 10, "topics": 13, "device": 18}
    assert layout.table_rows == 25
    assert layout_of([COLOUR, PRICE, SLOT]).offsets == {"colour": 0, "slot": 4}
    assert layout_of([PRICE]).offsets == {}
    assert layout_of([PRICE]).table_rows == 0


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("features", [[COLOUR, PRICE, TAGS, TOPICS], [COLOUR, PRICE]], ids=["bags", "no bags"])
def test_moving_a_batch(features: list[Feature], weighted: bool) -> None:
    """To its own device: itself. To another one: all but the groups, which the gradient on the CPU needs."""
    row: Row = {"click": 1, "conversion": 0, "colour": 1, "price": 2.0, "tags": [(1, 2.0)], "topics": [1, 2]}
    columns = columns_of([row] * 3, features) | ({WEIGHT: pa.array([1, 2, 3], pa.float32())} if weighted else {})
    batch = impressions(columns, layout_of(features), weighted).batch(np.arange(3), groups=True)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert len(moved) == 3
    assert batch.groups is not None
    assert moved.groups is None
    for name, value in vars(batch).items():
        if name != "groups" and value is not None:
            other = getattr(moved, name)
            assert other.device.type == "meta"
            assert (other.shape, other.dtype) == (value.shape, value.dtype)
    assert (batch.sample_weight is None, moved.sample_weight is None) == (not weighted, not weighted)


# A prepared folder


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataSchema]:
    folder = tmp_path_factory.mktemp("generated")
    return folder, generate(folder, rows=2000, seed=0)


def test_reading_a_generated_split(generated: tuple[Path, DataSchema]) -> None:
    """Every cell of some rows, and the true probabilities, as pandas reads them."""
    folder, schema = generated
    for split, count in (("train", 1600), ("validation", 200), ("test", 200)):
        table = read_split(folder, schema, split)
        assert len(table) == count
        frame = pq.read_table(folder / f"{split}.parquet").to_pylist()
        chosen = np.array([0, 7, 7, count - 1, 3], dtype=np.int64)
        rows = [dict(frame[one]) for one in chosen]
        for row in rows:
            row["interests"] = list(zip(row["interests"], row["interests.weights"], strict=True))
        assert_holds(table.batch(chosen), rows, schema.features)
        assert table.truth is not None
        for name in ("p_ctr", "p_cvr"):
            assert table.truth[name].tolist() == [row[name] for row in frame]


ROWS: list[Row] = [
    {"click": 1, "conversion": 1, "colour": 3, "price": 0.5, "tags": [(1, 2.0), (5, -1.0)], "topics": [1, 2]},
    {"click": 1, "conversion": 0, "colour": 0, "price": -2.0, "tags": [], "topics": [0]},
    {"click": 0, "conversion": 0, "colour": 2, "price": 7.0, "tags": [(0, 1.0)], "topics": []},
    {"click": 0, "conversion": 0, "colour": 1, "price": 0.0, "tags": [(2, 0.25)], "topics": [4, 4, 3]},
    {"click": 0, "conversion": 0, "colour": 1, "price": 1.0, "tags": [(3, 1.0)], "topics": [1]},
]
FEATURES = [COLOUR, PRICE, TAGS, TOPICS]


def prepared(
    folder: Path, columns: dict[str, pa.Array] | None = None, rows: int = len(ROWS), row_group_size: int = 2
) -> DataSchema:
    """A folder with one split, in several row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns_of(ROWS, FEATURES) if columns is None else columns)
    pq.write_table(table, folder / "train.parquet", row_group_size=row_group_size, compression="zstd")
    return DataSchema(
        features=tuple(FEATURES),
        splits={"train": Split(file="train.parquet", rows=rows, clicks=2, conversions=1, sha256="")},
        base_rates=BaseRates(ctr=0.4, cvr=0.5),
        vocabulary_sha256="",
    )


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_reading_several_row_groups(tmp_path: Path, row_group_size: int) -> None:
    schema = prepared(tmp_path, row_group_size=row_group_size)
    table = read_split(tmp_path, schema, "train")
    assert_holds(every(table), ROWS, FEATURES)
    assert table.truth is None


def test_reading_takes_features_by_name(tmp_path: Path) -> None:
    """Columns in another order, and some that the schema does not know."""
    columns = {"other": pa.array(["x"] * 5)} | dict(reversed(columns_of(ROWS, FEATURES).items()))
    assert_holds(every(read_split(tmp_path, prepared(tmp_path, columns), "train")), ROWS, FEATURES)


def test_a_folder_that_looks_like_a_partition(tmp_path: Path) -> None:
    """`colour=9` in the path is a name, not a value."""
    folder = tmp_path / "colour=9"
    assert_holds(every(read_split(folder, prepared(folder), "train")), ROWS, FEATURES)


def test_reading_an_empty_split(tmp_path: Path) -> None:
    columns = {name: column.slice(0, 0) for name, column in columns_of(ROWS, FEATURES).items()}
    assert len(read_split(tmp_path, prepared(tmp_path, columns, rows=0), "train")) == 0


def refused(folder: Path, schema: DataSchema, *, split: str = "train") -> str:
    """The one-line error, which names the file or the folder."""
    with pytest.raises(UserError) as caught:
        read_split(folder, schema, split)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_missing_split_column_or_file(tmp_path: Path) -> None:
    schema = prepared(tmp_path)
    message = refused(tmp_path, schema, split="validation")
    assert "no split validation" in message
    assert "train" in message
    assert "no column p_ctr" in refused(tmp_path, schema.model_copy(update={"truth": True}))
    (tmp_path / "train.parquet").unlink()
    message = refused(tmp_path, schema)
    assert "train.parquet: no such file" in message
    assert "prepare_ctr" in message
    (tmp_path / "train.parquet").mkdir()
    assert "train.parquet" in refused(tmp_path, schema)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99, "text"])
def test_files_that_are_not_whole_parquet(tmp_path: Path, keep: Any) -> None:
    schema = prepared(tmp_path)
    whole = (tmp_path / "train.parquet").read_bytes()
    content = b"click,conversion\n1,0\n" * 100 if keep == "text" else whole[: int(keep * len(whole))]
    (tmp_path / "train.parquet").write_bytes(content)
    assert "train.parquet: not a whole Parquet file" in refused(tmp_path, schema)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    schema = prepared(tmp_path)
    (tmp_path / "train.parquet").chmod(0)
    assert "Permission denied" in refused(tmp_path, schema)


def test_parquet_damaged_inside(generated: tuple[Path, DataSchema], tmp_path: Path) -> None:
    """The footer is intact, the pages are not."""
    folder, schema = generated
    content = bytearray((folder / "train.parquet").read_bytes())
    middle = len(content) // 3
    content[middle : middle + 2000] = bytes(2000)
    (tmp_path / "train.parquet").write_bytes(content)
    assert "corrupt" in refused(tmp_path, schema)


@pytest.mark.parametrize("name", ["click", "conversion", "colour", "price", "tags", "tags.weights", "topics"])
def test_absent_column(tmp_path: Path, name: str) -> None:
    columns = columns_of(ROWS, FEATURES)
    del columns[name]
    assert f"no column {name}," in refused(tmp_path, prepared(tmp_path, columns))


@pytest.mark.parametrize("rows", [4, 6])
def test_other_number_of_rows(tmp_path: Path, rows: int) -> None:
    message = refused(tmp_path, prepared(tmp_path, rows=rows))
    assert "5 rows" in message
    assert f"says {rows}" in message


@pytest.mark.parametrize(
    ("name", "column", "largest"),
    [
        ("colour", pa.array([0, 1, 4, 0, 0], pa.int32()), 3),
        ("colour", pa.array([0, -1, 3, 0, 0], pa.int32()), 3),
        ("topics", pa.array([[0], [], [1, 5], [], []], pa.list_(pa.int32())), 4),
        ("topics", pa.array([[0], [], [1, -2], [], []], pa.list_(pa.int32())), 4),
    ],
    ids=["too large", "negative", "too large in a bag", "negative in a bag"],
)
def test_id_out_of_range(tmp_path: Path, name: str, column: pa.Array, largest: int) -> None:
    columns = columns_of(ROWS, FEATURES) | {name: column}
    message = refused(tmp_path, prepared(tmp_path, columns))
    assert f"column {name}: id outside of 0..{largest}" in message


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("colour", pa.array(["0", "1", "2", "3", "0"])),
        ("colour", pa.array([[0], [1], [2], [3], [0]], pa.list_(pa.int32()))),
        ("colour", pa.array([0, 1, None, 3, 0], pa.int32())),
        ("colour", pa.array([0.0, 1.5, 2.0, 3.0, 0.0])),
        ("topics", pa.array([0, 1, 2, 3, 0], pa.int32())),
        ("topics", pa.array([["a"], [], [], [], []])),
        ("topics", pa.array([[1], None, [], [2], []], pa.list_(pa.int32()))),
        ("topics", pa.array([[1], [None], [], [2], []], pa.list_(pa.int32()))),
        ("tags.weights", pa.array([[1.0], [], [1.0], [1.0], [1.0]], pa.list_(pa.float32()))),
        ("tags.weights", pa.array([[1.0, None], [], [1.0], [1.0], [1.0]], pa.list_(pa.float32()))),
        ("price", pa.array(["a", "b", "c", "d", "e"])),
        ("price", pa.array([0.0, None, 0.0, 0.0, 0.0])),
        ("click", pa.array(["1", "1", "0", "x", "0"])),
        ("click", pa.array([1, 1, None, 0, 0], pa.int8())),
    ],
    ids=["text id", "bag for an id", "missing id", "fractional id", "id for a bag", "text in a bag", "missing bag",
         "missing id in a bag", "fewer weights than ids", "missing weight", "text number", "missing number",
         "text label", "missing label"],
)  # fmt: skip
def test_column_of_another_kind(tmp_path: Path, name: str, column: pa.Array) -> None:
    """A column that contradicts the schema is refused."""
    columns = columns_of(ROWS, FEATURES) | {name: column}
    assert name in refused(tmp_path, prepared(tmp_path, columns))
