"""Prepared folders that something else than `prepare_ctr` wrote: Ray Data, whole and in parts, and what verifies them.

`make faults`: 5 million rows instead of 20,000, in parts and damaged, too. What needs Ray skips without it, and fails
instead where CI_RAY=1.
"""

import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import FULL, ROOT, SHRUNK, Call, only_full
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tasks.mmoe import statistics
from pipeline.tasks.mmoe.contract import describe, verify
from pipeline.tasks.mmoe.data import read_split
from pipeline.tasks.mmoe.prepare import prepare
from pipeline.tasks.mmoe.reading import Source
from pipeline.tasks.mmoe.schema import DataSchema

ROWS = 5_000_000 if FULL else 20_000
one_process = pytest.mark.xdist_group("ray_data")  # runs the job once
CHUNK_ROWS = 100_000 if FULL else 1_500  # of a row group
PIECE_ROWS = 1_000_000 if FULL else 3_000
JOB = ROOT / "docs/examples/prepare_ctr_ray.py"
FILES = ("train.parquet", "validation.parquet", "test.parquet", "vocabulary.parquet", "schema.json")
SCHEMA = {
    "labels": {"click": "click", "conversion": "bought"},
    "features": {
        "user": {"kind": "categorical", "min_count": 2, "hash_buckets": 100},
        "item": {"kind": "categorical", "min_count": 3},
        "tags": {"kind": "multi", "weight_separator": ":"},
        "price": {"kind": "numeric", "missing": "mean"},
        "age": {"kind": "numeric"},
    },
    "split": {"seed": 3, "train": 0.8, "validation": 0.1, "test": 0.1},
}


def raw_rows(rows: int) -> Iterator[pd.DataFrame]:
    """Rows of skewed ids, bags of weighted tags and a number that is missing at times, from their place alone."""
    for start in range(0, rows, CHUNK_ROWS):
        count, random = min(CHUNK_ROWS, rows - start), np.random.default_rng([7, start + 1])
        click, sizes = random.random(count) < 0.1, random.integers(0, 3, count)
        ids, weights = random.zipf(1.5, 2 * count) % 500, random.integers(1, 9, 2 * count)
        tags = [f"t{tag}:{weight}" for tag, weight in zip(ids, weights, strict=True)]
        yield pd.DataFrame({
            "click": click.astype(int),
            "bought": (click & (random.random(count) < 0.2)).astype(int),
            "user": random.zipf(1.2, count) % 300_000,
            "item": [f"i{item}" for item in random.zipf(1.3, count) % 50_000],
            "tags": ["|".join(tags[2 * row : 2 * row + size]) for row, size in enumerate(sizes)],
            "price": np.where(random.random(count) < 0.05, np.nan, np.round(np.exp(random.normal(3, 1, count)), 2)),
            "age": random.integers(15, 90, count),
        })  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw rows as `parquet`, as `csv` and as `damaged` CSV, two files each; what `prepare_ctr` makes of them."""
    folder = tmp_path_factory.mktemp("raw")
    kinds = {name: folder / name for name in ("parquet", "csv", "damaged")}
    for kind in kinds.values():
        kind.mkdir()
    chunks = list(raw_rows(ROWS))
    for number, half in enumerate((chunks[: len(chunks) // 3], chunks[len(chunks) // 3 :])):
        with pq.ParquetWriter(kinds["parquet"] / f"{number}.parquet", pa.Table.from_pandas(half[0]).schema) as writer:
            for chunk in half:
                writer.write_table(pa.Table.from_pandas(chunk))
        text = pd.concat(half).to_csv(index=False)
        (kinds["csv"] / f"{number}.csv").write_text(text)
        (kinds["damaged"] / f"{number}.csv").write_text(text + (number == 1) * "0,0,1,i1,t1:1,dear,30\n")
    (folder / "by_row.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    by_user = SCHEMA | {"split": SCHEMA["split"] | {"by": "user"}}
    (folder / "by_user.yaml").write_text(yaml.safe_dump(by_user, sort_keys=False))
    prepare(kinds["parquet"], folder / "by_row.yaml", folder / "alone")
    prepare(kinds["csv"], folder / "by_user.yaml", folder / "alone_by_user")
    return folder


# ---------------------------------------------------------------- by Ray Data

SESSION = """
import json, runpy, sys
job, *calls = json.loads(sys.argv[1])
main = runpy.run_path(job)["main"]
for number, call in enumerate(calls):
    print(f"call {number}", flush=True)
    print(f"call {number}", flush=True, file=sys.stderr)
    try:
        main(call, standalone_mode=False)
    except SystemExit as ended:
        print(f"code {ended.code}", flush=True)
"""


@pytest.fixture(scope="module")
def by_ray(raw: Path) -> list[tuple[str, str]]:
    """What the job says on standard output and standard error: a file a split; in parts; of damaged rows."""
    if importlib.util.find_spec("ray") is None:
        (pytest.fail if os.environ.get("CI_RAY") == "1" else pytest.skip)("Ray is not installed")
    size = ["--piece-rows", str(PIECE_ROWS)]
    calls = [
        [str(raw / "parquet"), str(raw / "by_row.yaml"), str(raw / "whole"), *size],
        [str(raw / "csv"), str(raw / "by_user.yaml"), str(raw / "parts"), "--parts"],
        [str(raw / "damaged"), str(raw / "by_user.yaml"), str(raw / "nothing")],
    ][: 3 if FULL else 1]
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    settings = {
        "RAY_TMPDIR": temporary, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", SESSION, json.dumps([str(JOB), *calls])], cwd=raw,
            env={**os.environ, **settings}, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = (re.split(r"^call \d+\n", text, flags=re.MULTILINE)[1:] for text in (done.stdout, done.stderr))
    return list(zip(*outputs, strict=True))


@one_process
@pytest.mark.faults
def test_every_file_is_that_of_prepare_ctr(raw: Path, by_ray: list[tuple[str, str]]) -> None:
    schema = DataSchema.read(raw / "alone")
    assert sum(split.rows for split in schema.splits.values()) == ROWS
    assert len(Source(raw / "parquet").pieces(PIECE_ROWS)) > 4  # and each cuts a file of the splits
    for name in FILES:
        assert (raw / "whole" / name).read_bytes() == (raw / "alone" / name).read_bytes(), name
    said = by_ray[0][0].splitlines()
    assert said[-1] == f"digest {schema.digest}"
    assert said[-4:-1] == [
        f"{name}: {split.rows} rows, {split.clicks} clicks, {split.conversions} conversions"
        for name, split in schema.splits.items()
    ]


@one_process
@pytest.mark.faults
@only_full
def test_parts_hold_the_same_rows(raw: Path, by_ray: list[tuple[str, str]]) -> None:
    schema, alone = DataSchema.read(raw / "parts"), DataSchema.read(raw / "alone_by_user")
    for name, split in schema.splits.items():
        assert len(list((raw / "parts" / name).iterdir())) == 2
        assert pq.read_table(raw / "parts" / name).equals(pq.read_table(raw / "alone_by_user" / f"{name}.parquet"))
        counts = {"rows", "clicks", "conversions"}
        assert split.model_dump(include=counts) == alone.splits[name].model_dump(include=counts)
    assert (schema.features, schema.base_rates, schema.source) == (alone.features, alone.base_rates, alone.source)
    assert schema.vocabulary_sha256 == alone.vocabulary_sha256
    assert verify(raw / "parts") == schema
    assert by_ray[1][0].splitlines()[-1] == f"digest {schema.digest}"


@one_process
@pytest.mark.faults
@only_full
def test_a_bad_cell_is_told_as_prepare_ctr_tells_it(raw: Path, by_ray: list[tuple[str, str]]) -> None:
    with pytest.raises(UserError) as alone:
        prepare(raw / "damaged", raw / "by_user.yaml", raw / "nothing")
    assert "1.csv: row" in str(alone.value)
    assert "code 2" in by_ray[2][0].splitlines()  # beside what Ray may say of a worker that it ended
    assert [line for line in by_ray[2][1].splitlines() if line.startswith("error: ")] == [f"error: {alone.value}"]
    assert not (raw / "nothing").exists()


def trained(folder: Path, call_pipeline: Call) -> list[dict[str, Any]]:
    """The training log without what depends on the clock."""
    settings = SHRUNK | {"data": str(folder), "training.max_steps": "20", "tracking.enabled": "false"}
    done = call_pipeline("train_mmoe", *(part for key, value in settings.items() for part in (f"--{key}", value)))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("system/")} for line in lines]


@one_process
def test_training_reads_what_ray_wrote(
    raw: Path, by_ray: list[tuple[str, str]], workplace: Path, call_pipeline: Call
) -> None:
    log = trained(raw / "whole", call_pipeline)
    assert log[-1]["global_step"] >= 19
    assert all(np.isfinite(line["loss_total"]) for line in log if "loss_total" in line)


@one_process
@pytest.mark.faults
@only_full
def test_training_on_parts_is_training_on_the_file(
    raw: Path, by_ray: list[tuple[str, str]], workplace: Path, call_pipeline: Call
) -> None:
    assert trained(raw / "parts", call_pipeline) == trained(raw / "alone_by_user", call_pipeline)


# ---------------------------------------------------------------- pieces that are put together


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 9))
def test_pieces_cover_every_row_once_and_in_order(sizes: list[int], rows: int, batch_rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        row = 0
        for file in range(2):
            with pq.ParquetWriter(Path(name) / f"{file}.parquet", pa.schema([("row", pa.int64())])) as writer:
                for size in [1, *sizes]:
                    writer.write_table(pa.table({"row": np.arange(row, row + size)}))
                    row += size
        source, found = Source(Path(name)), []
        for piece in source.pieces(rows):
            for batch in source.read(piece, ["row"], batch_rows):
                values = batch.columns["row"].to_pylist()
                assert values == list(range(batch.start, batch.start + batch.rows))
                in_file = row // 2 * (batch.file.name == "1.parquet")
                assert batch.place(0) == f"{batch.file}: row {values[0] - in_file + 1}"
                found += values
        assert found == list(range(row))
        assert len(source.pieces(rows)) >= len(source.pieces(10**9)) == 2


@given(
    st.lists(st.lists(st.sampled_from([0.1, 3e9, -7.3e-5, 1 / 3, float("nan")]), max_size=20), max_size=6), st.data()
)
def test_numbers_of_parts_are_those_of_all_to_the_last_bit(parts: list[list[float]], data: st.DataObject) -> None:
    values = np.array([value for part in parts for value in part])[:, None] * np.array([1.0, 1.7])
    numbers = np.arange(len(values)) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK_ROWS", 7)
        whole, merged, start = statistics.Numbers(2, 10), statistics.Numbers(2, 10), 0
        whole.add(numbers, values)
        for part in parts:
            own = statistics.Numbers(2, 10, before=start)
            cut = start + data.draw(st.integers(0, len(part)))
            own.add(numbers[start:cut], values[start:cut])
            own.add(numbers[cut : start + len(part)], values[cut : start + len(part)])
            merged.merge(own)
            start += len(part)
        assert ordered(merged.sample()) == ordered(whole.sample())
        assert merged.means().tobytes() == whole.means().tobytes()


def ordered(sample: Any) -> list[str]:
    """NaN is equal to NaN as text."""
    return sorted(map(str, sample.tolist()))


def test_parts_out_of_order_are_refused() -> None:
    whole, late = statistics.Numbers(1), statistics.Numbers(1, before=5)
    with pytest.raises(ValueError, match="begin after 5, allowed: 0"):
        whole.merge(late)


def test_a_sample_with_a_limit_is_the_same_sample() -> None:
    rows, kept = 400_000, 20_000
    numbers, values = np.arange(rows), np.arange(rows, dtype=float)[:, None]
    free, limited = statistics.Numbers(1, kept), statistics.Numbers(1, kept)
    free.add(numbers, values)
    sent = 0
    for start in range(0, rows, 50_000):
        limit = statistics.sample_limit(rows, kept)
        part = statistics.Numbers(1, kept, before=start, limit=limit)
        part.add(numbers[start : start + 50_000], values[start : start + 50_000])
        sent += len(part._keys)
        limited.merge(part)
    assert kept <= sent < 1.15 * kept
    assert ordered(limited.sample()) == ordered(free.sample())
    low = statistics.Numbers(1, kept, limit=2**58)
    low.add(numbers, values)
    with pytest.raises(ValueError, match="too low"):
        low.sample()


# ---------------------------------------------------------------- folders of any origin


@pytest.fixture
def folder(raw: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(raw / "alone_by_user", tmp_path / "folder"))


def in_parts(folder: Path, split: str, sizes: list[int]) -> None:
    """A split's file as a folder as Spark names things."""
    table, start = pq.read_table(folder / f"{split}.parquet"), 0
    (folder / split).mkdir()
    for number, size in enumerate([*sizes, table.num_rows]):
        pq.write_table(table.slice(start, size), folder / split / f"part-{number:05}-7e1c.c000.zstd.parquet")
        start += size
    (folder / split / "_SUCCESS").touch()
    (folder / split / ".part-00000-7e1c.c000.zstd.parquet.crc").touch()
    (folder / split / "._part-00000.parquet").touch()
    (folder / f"{split}.parquet").unlink()


def test_a_folder_of_parts_is_read_as_the_file(folder: Path, raw: Path) -> None:
    alone = DataSchema.read(folder)
    in_parts(folder, "train", [1, 0, 4_999])
    schema = describe(folder, alone.features, "another program")
    assert schema == verify(folder) == DataSchema.read(folder)
    assert schema.splits["train"].file == "train"
    digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted((folder / "train").glob("part*"))]
    assert schema.splits["train"].sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert schema.splits["validation"] == alone.splits["validation"]
    assert (schema.base_rates, schema.vocabulary_sha256) == (alone.base_rates, alone.vocabulary_sha256)
    found, expected = (
        read_split(place, described, "train").streams
        for place, described in ((folder, schema), (raw / "alone_by_user", alone))
    )
    assert found.rows == expected.rows == alone.splits["train"].rows
    rows = np.arange(found.rows)
    for one, other in zip(found.gather(rows), expected.gather(rows), strict=True):
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
    "an id out of its table": ("test.parquet", "item", lambda cells: [*cells[:-1], 10**6], "column item: id outside"),
    "an id in no row": ("train.parquet", "user", lambda cells: [None, *cells[1:]], "column user"),
    "no number": ("train.parquet", "price", lambda cells: [float("nan"), *cells[1:]], "column price"),
    "more weights than ids": ("train.parquet", "tags.weights", lambda cells: [[1.0] * 9, *cells[1:]], "tags.weights"),
    "an infinite weight": (
        "train.parquet", "tags.weights", lambda cells: [[float("inf")] * len(cell) for cell in cells], "tags.weights",
    ),
    "ids out of order": ("vocabulary.parquet", "id", lambda ids: ids[::-1], "feature user"),
    "a value twice": ("vocabulary.parquet", "value", lambda values: [values[1], *values[1:]], "feature user"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_training_could_not_read_is_not_described(folder: Path, name: str) -> None:
    file, column, change, told = CHANGES[name]
    features = DataSchema.read(folder).features
    (folder / "schema.json").unlink()
    edited(folder / file, column, change)
    with pytest.raises(UserError, match=re.escape(told)) as refused:
        describe(folder, features)
    assert str(folder / file) in str(refused.value)
    assert not (folder / "schema.json").exists()


def test_the_page_describes_a_folder_as_describe_takes_it() -> None:
    page = (ROOT / "docs/prepare_ctr.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    with pytest.raises(UserError, match=r"data/mine/train.parquet: no such file"):  # the features are well-formed
        exec(example, {})  # noqa: S102


def test_what_schema_json_says_is_held(folder: Path, call_pipeline: Call) -> None:
    schema = verify(folder)
    done = call_pipeline("verify", str(folder))
    assert done.returncode == 0
    assert done.stdout == f"{folder}: as its schema.json says, {ROWS} rows, digest {schema.digest}\n"
    train, original = schema.splits["train"], (folder / "schema.json").read_bytes()
    for change, told in (
        ({"splits": schema.splits | {"train": train.model_copy(update={"clicks": train.clicks + 1})}}, "splits.train"),
        ({"splits": schema.splits | {"train": train.model_copy(update={"sha256": "0" * 64})}}, "splits.train"),
        ({"vocabulary_sha256": "0" * 64}, "vocabulary_sha256"),
        ({"base_rates": schema.base_rates.model_copy(update={"cvr": 0.5})}, "base_rates"),
        ({"features": schema.features[::-1]}, None),  # their order is free
        ({"features": (schema.features[0].model_copy(update={"size": 7}), *schema.features[1:])}, "column user"),
    ):
        schema.model_copy(update=change).write(folder)
        if told is None:
            verify(folder)
            continue
        with pytest.raises(UserError, match=re.escape(told)):
            verify(folder)
    (folder / "schema.json").write_bytes(original)
    (folder / "test.parquet").unlink()
    done = call_pipeline("verify", str(folder))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{folder / 'test.parquet'}: no such file" in done.stderr
