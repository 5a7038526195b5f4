"""Prepared folders of any origin: parts instead of files, `describe` and `verify`."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, Call

from pipeline.data.contract import describe, verify
from pipeline.data.schema import DataSchema
from pipeline.errors import UserError
from pipeline.tasks.mmoe.impressions.impression_table import read_split
from pipeline.tasks.mmoe.prepare.preparation import prepare

ROWS = 20_000
SCHEMA = {
    "labels": {"click": "click", "conversion": "bought"},
    "features": {
        "user": {"kind": "categorical", "min_count": 2, "hash_buckets": 100},
        "item": {"kind": "categorical", "min_count": 3},
        "tags": {"kind": "multi", "weight_separator": ":"},
        "price": {"kind": "numeric", "missing": "mean"},
        "age": {"kind": "numeric"},
    },
    "split": {"by": "user", "seed": 3, "train": 0.8, "validation": 0.1, "test": 0.1},
}


def raw_rows() -> pd.DataFrame:
    """Rows of skewed ids, bags of weighted tags and a number that is missing at times."""
    random = np.random.default_rng(7)
    click, sizes = random.random(ROWS) < 0.1, random.integers(0, 3, ROWS)
    ids, weights = random.zipf(1.5, 2 * ROWS) % 500, random.integers(1, 9, 2 * ROWS)
    tags = [f"t{tag}:{weight}" for tag, weight in zip(ids, weights, strict=True)]
    return pd.DataFrame({
        "click": click.astype(int),
        "bought": (click & (random.random(ROWS) < 0.2)).astype(int),
        "user": random.zipf(1.2, ROWS) % 300_000,
        "item": [f"i{item}" for item in random.zipf(1.3, ROWS) % 50_000],
        "tags": ["|".join(tags[2 * row : 2 * row + size]) for row, size in enumerate(sizes)],
        "price": np.where(random.random(ROWS) < 0.05, np.nan, np.round(np.exp(random.normal(3, 1, ROWS)), 2)),
        "age": random.integers(15, 90, ROWS),
    })  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    raw_rows().to_parquet(folder / "raw.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    prepare(folder / "raw.parquet", folder / "schema.yaml", folder / "prepared")
    return folder / "prepared"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "folder"))


def in_parts(folder: Path, split: str, sizes: list[int]) -> None:
    """Replace a split file by a folder of parts with the names that Spark uses."""
    table, start = pq.read_table(folder / f"{split}.parquet"), 0
    (folder / split).mkdir()
    for number, size in enumerate([*sizes, table.num_rows]):
        pq.write_table(table.slice(start, size), folder / split / f"part-{number:05}-7e1c.c000.zstd.parquet")
        start += size
    (folder / split / "_SUCCESS").touch()
    (folder / split / ".part-00000-7e1c.c000.zstd.parquet.crc").touch()
    (folder / split / "._part-00000.parquet").touch()
    (folder / f"{split}.parquet").unlink()


def test_a_folder_of_parts_is_read_as_the_file(folder: Path, prepared: Path) -> None:
    alone = DataSchema.read(folder)
    in_parts(folder, "train", [1, 0, 4_999])
    schema = describe(folder, alone.features, "another program")
    assert schema == verify(folder) == DataSchema.read(folder)
    assert schema.splits["train"].file == "train"
    digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted((folder / "train").glob("part*"))]
    assert schema.splits["train"].sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert schema.splits["validation"] == alone.splits["validation"]
    assert (schema.base_rates, schema.vocabulary_sha256) == (alone.base_rates, alone.vocabulary_sha256)
    streams, expected = (
        read_split(place, described, "train").streams for place, described in ((folder, schema), (prepared, alone))
    )
    assert streams.rows == expected.rows == alone.splits["train"].rows
    rows = np.arange(streams.rows)
    for one, other in zip(streams.gather(rows), expected.gather(rows), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (folder / "train.arrow").is_file()


def test_streams_are_made_again_when_a_part_changes(folder: Path) -> None:
    in_parts(folder, "test", [700, 300])
    schema = describe(folder, DataSchema.read(folder).features)
    before = read_split(folder, schema, "test").batch(np.arange(1000)).numeric
    edited(folder / "test" / "part-00001-7e1c.c000.zstd.parquet", "age", lambda ages: [age + 1 for age in ages])
    after = read_split(folder, schema, "test").batch(np.arange(1000)).numeric
    assert (after - before).sum(0).tolist() == [0, 300]  # price, age


def edited(file: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(file)
    place = table.column_names.index(column)
    changed = pa.array(change(table[column].to_pylist()), table[column].type)
    pq.write_table(table.set_column(place, table.field(place), changed), file)


Change = tuple[str, str, Callable[[list[Any]], list[Any]], str]
CHANGES: dict[str, Change] = {
    "a label that is none": ("train.parquet", "click", lambda cells: [2, *cells[1:]], "column click"),
    "a conversion without a click": ("test.parquet", "conversion", lambda cells: [1] * len(cells), "of clicked rows"),
    "no number": ("train.parquet", "price", lambda cells: [float("nan"), *cells[1:]], "column price"),
    "an infinite weight": (
        "train.parquet", "tags.weights", lambda cells: [[float("inf")] * len(cell) for cell in cells], "tags.weights",
    ),
    "ids out of order": ("vocabulary.parquet", "id", lambda ids: ids[::-1], "feature user"),
    "a value twice": ("vocabulary.parquet", "value", lambda values: [values[1], *values[1:]], "feature user"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_invalid_data_is_not_described(folder: Path, name: str) -> None:
    file, column, change, expected = CHANGES[name]
    features = DataSchema.read(folder).features
    (folder / "schema.json").unlink()
    edited(folder / file, column, change)
    with pytest.raises(UserError, match=re.escape(expected)) as refused:
        describe(folder, features)
    assert str(folder / file) in str(refused.value)
    assert not (folder / "schema.json").exists()


def test_the_page_describes_a_folder_as_describe_takes_it() -> None:
    page = (ROOT / "docs/prepare_ctr.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    with pytest.raises(UserError, match=r"data/mine/train.parquet: no such file"):  # the features are well-formed
        exec(example, {})  # noqa: S102


def test_verify_refuses_a_schema_that_contradicts_the_files(folder: Path, call_pipeline: Call) -> None:
    schema = verify(folder)
    done = call_pipeline("verify", str(folder))
    assert done.returncode == 0
    assert done.stdout == f"{folder}: as its schema.json says, {ROWS} rows, digest {schema.digest}\n"
    train, original = schema.splits["train"], (folder / "schema.json").read_bytes()
    for change, expected in (
        ({"splits": schema.splits | {"train": train.model_copy(update={"clicks": train.clicks + 1})}}, "splits.train"),
        ({"splits": schema.splits | {"train": train.model_copy(update={"sha256": "0" * 64})}}, "splits.train"),
        ({"vocabulary_sha256": "0" * 64}, "vocabulary_sha256"),
        ({"base_rates": schema.base_rates.model_copy(update={"cvr": 0.5})}, "base_rates"),
        ({"features": schema.features[::-1]}, None),  # their order is free
        ({"features": (schema.features[0].model_copy(update={"size": 7}), *schema.features[1:])}, "column user"),
    ):
        schema.model_copy(update=change).write(folder)
        if expected is None:
            verify(folder)
            continue
        with pytest.raises(UserError, match=re.escape(expected)):
            verify(folder)
    (folder / "schema.json").write_bytes(original)
    (folder / "test.parquet").unlink()
    done = call_pipeline("verify", str(folder))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{folder / 'test.parquet'}: no such file" in done.stderr
