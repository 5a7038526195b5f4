"""Raw files to training-ready columns: by hand, against an independent reading with pandas, and by properties."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import prepared_folder
from pipeline.data.encoding import Encoder
from pipeline.data.feature_statistics import Numbers, bin_edges
from pipeline.data.schema import MISSING_TEXT, DataSchema
from pipeline.errors import UserError
from pipeline.storage import folders
from pipeline.tasks.mmoe.prepare.preparation import prepare

EXAMPLES = 200 if os.environ.get("FAULTS") == "full" else 20  # of whole files: each is prepared up to three times
LABELS = {"click": "click", "conversion": "bought"}
ALL_TRAINING = {"train": 1.0, "validation": 0.0, "test": 0.0}
FILES = {"train.parquet", "validation.parquet", "test.parquet", "vocabulary.parquet", "schema.json"}


def write_schema(folder: Path, features: dict[str, Any], **keys: Any) -> Path:
    file = folder / "schema.yaml"
    tree = {"labels": LABELS, "features": features, "split": ALL_TRAINING} | keys
    file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def prepare_text(folder: Path, text: str, features: dict[str, Any], **keys: Any) -> DataSchema:
    data = folder / "data.csv"
    data.write_text(text, encoding="utf-8")
    return prepare(data, write_schema(folder, features, **keys), folder / "out")


def column(folder: Path, name: str, split: str = "train") -> list[Any]:
    values: list[Any] = pq.read_table(folder / "out" / f"{split}.parquet")[name].to_pylist()
    return values


def vocabulary(folder: Path) -> list[tuple[str, str, int, int]]:
    table = pq.read_table(folder / "out" / "vocabulary.parquet")
    assert [str(field.type) for field in table.schema] == ["string", "string", "int32", "int64"]
    return list(zip(*(table[name].to_pylist() for name in ("feature", "value", "id", "count")), strict=True))


# ---------------------------------------------------------------- by hand

SHOP = """\
click,bought,city,tags,seen,seen_weight,price,note
1,1, Huế ,a|b|a,7:0.5|8:2,,10,x
true,0,Hà Nội,b,8:1,,20,
0,FALSE,Huế,,,,,x
1,0.0,,c| |NA|a,7:1|:3|9:4,,30,y
1.0,0,Vinh,NA,9:1e-1,,0,z
"""
SHOP_FEATURES = {
    "city": {"kind": "categorical", "min_count": 1},
    "tags": {"kind": "multi", "min_count": 2},
    "seen": {"kind": "multi", "weight_separator": ":"},
    "price": {"kind": "numeric", "missing": "mean"},
}


def test_a_small_shop_by_hand(tmp_path: Path) -> None:
    schema = prepare_text(tmp_path, SHOP, SHOP_FEATURES)

    assert column(tmp_path, "click") == [1, 1, 0, 1, 1]
    assert column(tmp_path, "conversion") == [1, 0, 0, 0, 0]
    # Huế twice; Hà Nội and Vinh once each, by text; the empty cell is missing
    assert column(tmp_path, "city") == [2, 3, 2, 1, 4]
    # a 3 times, b twice, c once: too rare, so out of vocabulary; missing ids are left out
    assert column(tmp_path, "tags") == [[2, 3, 2], [3], [], [0, 2], []]
    # 7, 8 and 9 twice each
    assert column(tmp_path, "seen") == [[2, 3], [3], [], [2, 4], [4]]
    assert column(tmp_path, "seen.weights") == [[0.5, 2.0], [1.0], [], [1.0, 4.0], [np.float32(0.1)]]
    assert column(tmp_path, "price") == [10, 20, 15, 30, 0]  # (10 + 20 + 30 + 0) / 4 = 15
    assert vocabulary(tmp_path) == [
        ("city", "Huế", 2, 2), ("city", "Hà Nội", 3, 1), ("city", "Vinh", 4, 1),
        ("tags", "a", 2, 3), ("tags", "b", 3, 2),
        ("seen", "7", 2, 2), ("seen", "8", 3, 2), ("seen", "9", 4, 2),
    ]  # fmt: skip

    city, tags, seen, price = schema.features
    assert (city.size, tags.size, seen.size, price.size) == (5, 4, 5, 0)
    assert (city.weighted, tags.weighted, seen.weighted) == (False, False, True)
    assert (price.fill, price.edges) == (15.0, (0.0, 10.0, 15.0, 20.0, 30.0))
    # ids of tags: a b a b c a; the missing ones do not count. No id at all in the empty splits
    assert tags.out_of_vocabulary == {"train": 1 / 6, "validation": 0.0, "test": 0.0}
    assert city.out_of_vocabulary == {"train": 0.0, "validation": 0.0, "test": 0.0}
    train = schema.splits["train"]
    assert (train.rows, train.clicks, train.conversions) == (5, 4, 1)
    assert schema.base_rates.model_dump() == {"ctr": 4 / 5, "cvr": 1 / 4}
    assert schema.splits["test"].rows == 0
    for split in ("train", "test"):
        table = pq.read_schema(tmp_path / "out" / f"{split}.parquet")
        assert {field.name: str(field.type).replace("element", "item") for field in table} == {
            "click": "int8", "conversion": "int8", "city": "int32", "tags": "list<item: int32>",
            "seen": "list<item: int32>", "seen.weights": "list<item: float>", "price": "float",
        }  # fmt: skip


def test_schema_says_what_it_was_made_from(tmp_path: Path) -> None:
    schema = prepare_text(tmp_path, SHOP, SHOP_FEATURES, missing_values=["", "NA"], csv={"strip": True})
    assert schema == DataSchema.read(tmp_path / "out")
    assert schema.source == f"data.csv, SHA-256 {hashlib.sha256(SHOP.encode()).hexdigest()}"
    assert schema.missing_values == ("", "NA")
    for split in schema.splits.values():
        assert hashlib.sha256((tmp_path / "out" / split.file).read_bytes()).hexdigest() == split.sha256
    file = tmp_path / "out" / "vocabulary.parquet"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == schema.vocabulary_sha256


def test_weights_in_a_column_of_their_own(tmp_path: Path) -> None:
    text = "click,bought,tags,w\n1,0,a|b,0.5|2\n0,0,,\n1,0,b,3\n1,0,a||b,1||2\n"
    prepare_text(tmp_path, text, {"tags": {"kind": "multi", "weights": "w"}})
    assert column(tmp_path, "tags") == [[3, 2], [], [2], [3, 2]]  # b 3 times, a twice
    assert column(tmp_path, "tags.weights") == [[0.5, 2.0], [], [3.0], [1.0, 2.0]]


STATUS = "status,income,x\nNever,-,1\nMarried,50000+.,1\nWidowed,-,1\nNever,50000+.,1\n"


@pytest.mark.parametrize(("text", "labels", "click", "conversion"), [
    (STATUS, {"click": 'status != "Never"', "conversion": 'click and income == "50000+."'}, [0, 1, 1, 0], [0, 1, 0, 0]),
    # `click` in a conversion is the label, where no column is called so
    ("views,x\n0,1\n5,1\n", {"click": "views > 1", "conversion": "click"}, [0, 1], [0, 1]),
    # was there a time? An empty cell is a missing one
    ("when,views,x\n2024-01-01,3,1\n,3,1\nNA,3,1\n", {"click": "when is not missing", "conversion": "click"},
     [1, 0, 0], [1, 0, 0]),
    ("when,views,x\n2024-01-01,3,1\n,3,1\nNA,3,1\n", {"click": 'when != ""', "conversion": 'when not in ["", "x"]'},
     [1, 0, 0], [1, 0, 0]),
    # a column is preferred to a condition
    ("not clicked,bought,x\n1,0,1\n0,0,1\n", LABELS | {"click": "not clicked"}, [1, 0], [0, 0]),
])  # fmt: skip
def test_labels_by_conditions(
    tmp_path: Path, text: str, labels: dict[str, str], click: list[int], conversion: list[int]
) -> None:
    prepare_text(tmp_path, text, {"x": "numeric"}, labels=labels)
    assert (column(tmp_path, "click"), column(tmp_path, "conversion")) == (click, conversion)


def test_headerless_gzip_quotes_and_line_ends(tmp_path: Path) -> None:
    rows = '\ufeff1;0;"a;b"\r\n\r\n0;0;"say ""x""\r\n"\r\n1;1;c'  # a quoted line end is no open quote
    data = tmp_path / "data.csv.gz"
    data.write_bytes(gzip.compress(rows[:9].encode()) + gzip.compress(rows[9:].encode()))  # of two members
    schema = write_schema(
        tmp_path, {"word": "categorical"}, columns=["click", "bought", "word"], csv={"delimiter": ";", "strip": False}
    )
    prepare(data, schema, tmp_path / "out")
    assert [value for _, value, _, _ in vocabulary(tmp_path)] == ["a;b", "c", 'say "x"\r\n']
    assert column(tmp_path, "click") == [1, 0, 1]


def test_no_id_is_empty_whatever_is_missing(tmp_path: Path) -> None:
    text = "click,bought,tags,word\n1,0,,\n1,0,a||NA|,NA\n"
    features = {"tags": "multi", "word": "categorical"}
    prepare_text(tmp_path, text, features, missing_values=["-"])
    assert column(tmp_path, "tags") == [[], [3, 2]]  # NA, a
    assert column(tmp_path, "word") == [1, 2]  # an empty cell is missing: Parquet's null could be no category
    prepare_text(tmp_path, text, features, missing_values=[])
    assert column(tmp_path, "tags") == [[], [3, 2]]


def test_missing_values_are_the_users(tmp_path: Path) -> None:
    text = "click,bought,code,price\n1,0,NA,-1\n1,0,?,-1.0\n1,0,-1,4\n"
    features = {"code": "categorical", "price": {"kind": "numeric", "missing": 2.5}}
    schema = prepare_text(tmp_path, text, features, missing_values=["?", "-1"])
    assert column(tmp_path, "code") == [2, 1, 1]  # NA is Namibia
    assert column(tmp_path, "price") == [2.5, 2.5, 4.0]  # a number that is missing is so in any spelling
    assert schema.features[1].edges == (2.5, 4.0)


# ---------------------------------------------------------------- one text for one value


def values_of(folder: Path, feature: str) -> list[tuple[str, int]]:
    return [(value, count) for name, value, _, count in vocabulary(folder) if name == feature]


@pytest.mark.parametrize(("cells", "values"), [
    (["123", "123.0", "456", "456.0", ""], [("123", 2), ("456", 2)]),  # a column of pandas with a missing id
    (["007", "007.0", "7", "-3.00"], [("007", 2), ("-3", 1), ("7", 1)]),  # leading zeros stay
    (["1.0", "1", "1.5"], [("1", 1), ("1.0", 1), ("1.5", 1)]),  # versions, say
    (["true", "True", "FALSE"], [("True", 2), ("False", 1)]),
    (["true", "1"], [("1", 1), ("true", 1)]),
    (["2024-05-01 00:00:00", "2024-05-01", "2024-05-01T12:00:00.500"],
     [("2024-05-01", 2), ("2024-05-01 12:00:00.5", 1)]),
])  # fmt: skip
def test_spellings_of_one_value(tmp_path: Path, cells: list[str], values: list[tuple[str, int]]) -> None:
    prepare_text(tmp_path, "click,bought,id\n" + "".join(f"0,0,{cell}\n" for cell in cells), {"id": "categorical"})
    assert values_of(tmp_path, "id") == values


def test_a_value_means_the_same_in_every_format(tmp_path: Path) -> None:
    """CSV, CSV in another dialect and Parquet, as pandas writes them; in the second file the users are floats."""
    frame = pd.DataFrame({
        "click": [1, 1, 0, 0], "bought": [1, 0, 0, 0], "user": [12345678901, 2, 3, 2], "price": [0.1, 3.0, 1e22, 3.0],
        "flag": [True, False, True, True], "tags": [["a", "b"], ["b"], [], ["c c"]],
        "when": [pd.Timestamp(f"2024-05-01 {time}") for time in ("0:00", "12:00", "12:00:00.25", "0:00")],
    })  # fmt: skip
    last = frame.iloc[2:].assign(user=[3, np.nan])
    features = dict.fromkeys(["user", "price", "flag", "when"], "categorical") | {"tags": "multi"}
    found = []
    for name, keys, write in (
        ("plain", {}, lambda part, file: part.to_csv(file.with_suffix(".csv"), index=False)),
        ("dialect", {"csv": {"delimiter": r"\t", "escape": "\\"}},
         lambda part, file: part.assign(tags=part["tags"].map("|".join)).to_csv(
             file.with_suffix(".csv"), index=False, sep="\t", quoting=csv.QUOTE_ALL, escapechar="\\", doublequote=False,
             lineterminator="\r\n")),
        ("parquet", {}, lambda part, file: part.to_parquet(file.with_suffix(".parquet"))),
        ("json", {}, lambda part, file: file.with_suffix(".jsonl").write_text("\n".join(
            json.dumps({key: str(cell) if isinstance(cell, pd.Timestamp) else cell for key, cell in row.items()})
            for row in part.to_dict("records")))),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        for number, part in enumerate((frame.iloc[:2], last)):
            write(part, tmp_path / name / f"day{number}")
        prepare(tmp_path / name, write_schema(tmp_path, features, **keys), tmp_path / "out")
        found.append((vocabulary(tmp_path), pq.read_table(tmp_path / "out" / "train.parquet").to_pydict()))
    assert found[0] == found[1] == found[2] == found[3]
    assert values_of(tmp_path, "user") == [("12345678901", 1), ("2", 1), ("3", 1)]
    assert values_of(tmp_path, "price") == [("3.0", 2), ("0.1", 1), ("1e+22", 1)]
    assert values_of(tmp_path, "when") == [("2024-05-01", 2), ("2024-05-01 12:00:00", 1), ("2024-05-01 12:00:00.25", 1)]


def test_lists_written_as_text(tmp_path: Path) -> None:
    text = (
        """click,bought,tags,w\n0,0,"['a, b', ""it's""]","[1, 2.5]"\n0,0,"[""a, b""]",[3]\n0,0,[],[]\n0,0,x|y,1|2\n"""
    )
    prepare_text(tmp_path, text, {"tags": {"kind": "multi", "weights": "w"}})
    assert values_of(tmp_path, "tags") == [("a, b", 2), ("it's", 1), ("x", 1), ("y", 1)]
    assert column(tmp_path, "tags") == [[2, 3], [2], [], [4, 5]]
    assert column(tmp_path, "tags.weights") == [[1.0, 2.5], [3.0], [], [1.0, 2.0]]
    with pytest.raises(UserError, match=r"row 1, column tags: found .*allowed: ids with the separator between them"):
        prepare_text(tmp_path, "click,bought,tags\n0,0,\"['a' 'b']\"\n", {"tags": "multi"})  # as numpy writes it


def test_names_are_matched_in_one_form_and_may_be_numbers(tmp_path: Path) -> None:
    prepare_text(tmp_path, "click,bought,Gia\u0301\n0,0,2\n", {"Gi\u00e1": "numeric"})
    assert column(tmp_path, "Gi\u00e1") == [2]
    prepare_text(tmp_path, "0,0,x\n", {"2": "categorical"}, columns=[0, 1, 2], labels={"click": 0, "conversion": 1})
    assert values_of(tmp_path, "2") == [("x", 1)]


def test_a_header_is_no_row_where_columns_are_given(tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    (tmp_path / "days" / "1.csv").write_text("0,1,a\n")
    (tmp_path / "days" / "2.csv").write_text("bought, click,city\n0,0,b\n")
    schema = write_schema(tmp_path, {"city": "categorical"}, columns=["bought", "click", "city"])
    prepare(tmp_path / "days", schema, tmp_path / "out")
    assert (column(tmp_path, "click"), column(tmp_path, "city")) == ([1, 0], [2, 3])


# ---------------------------------------------------------------- splits


def days(folder: Path, name: str, numbers: list[int], header: str = "click,bought,day,x") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(header + "\n" + "".join(f"0,0,{day},{day}\n" for day in numbers))
    return file


def split_rows(folder: Path) -> dict[str, list[int]]:
    return {split: column(folder, "x", split) for split in ("train", "validation", "test")}


def test_splits_by_conditions(tmp_path: Path) -> None:
    data = days(tmp_path, "data.csv", [9, 1, 8, 2, 7, 3])
    split = {"validation": {"where": "day == 7"}, "test": {"where": "day >= 7"}}
    prepare(data, write_schema(tmp_path, {"x": "numeric"}, split=split), tmp_path / "out")
    assert split_rows(tmp_path) == {"train": [1, 2, 3], "validation": [], "test": [9, 8, 7]}  # test comes first
    prepare(
        data, write_schema(tmp_path, {"x": "numeric"}, split=split | {"test": {"where": "day > 7"}}), tmp_path / "out"
    )
    assert split_rows(tmp_path) == {"train": [1, 2, 3], "validation": [7], "test": [9, 8]}


def test_splits_of_their_own_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train, test = days(tmp_path, "NL/train.csv", list(range(200))), days(tmp_path, "NL/test.csv", [500, 501])
    schema = write_schema(tmp_path, {"x": "numeric"}, split={})
    by_name = prepare(tmp_path / "NL", schema, tmp_path / "out")
    assert f"test: {test}, by its name" in capfd.readouterr().err
    prepared = prepare(train, schema, tmp_path / "out", own={"test": test})
    assert by_name.splits == prepared.splits
    rows = split_rows(tmp_path)
    assert rows["test"] == [500, 501]
    assert sorted(rows["train"] + rows["validation"]) == list(range(200))
    uniform = [(scalar_splitmix(row ^ scalar_splitmix(0)) >> 11) / 2**53 for row in range(200)]
    assert rows["validation"] == [row for row in range(200) if uniform[row] >= 0.8 / 0.9]  # the other two shares
    other = days(tmp_path, "dev.csv", [7])
    prepare(train, schema, tmp_path / "out", own={"validation": other, "test": test})
    assert split_rows(tmp_path) == {"train": list(range(200)), "validation": [7], "test": [500, 501]}
    with pytest.raises(UserError, match=r"split\.test: found a condition, and data\.test names files"):
        prepare(train, write_schema(tmp_path, {"x": "numeric"}, split={"test": {"where": "x > 1"}}), tmp_path / "out",
                own={"test": test})  # fmt: skip
    days(tmp_path, "NL/more.csv", [7])
    prepare(tmp_path / "NL", schema, tmp_path / "out")
    assert "more.csv" not in (told := capfd.readouterr().err)
    assert "test.csv, train.csv are read as one with the others" in told


def test_partitioned_folders(tmp_path: Path) -> None:
    for day in (1, 2):
        days(tmp_path, f"data/day={day}/city=a%20b/part.csv", [day], "click,bought,_,x")
    days(tmp_path, "data/day=__HIVE_DEFAULT_PARTITION__/city=c/part.csv", [3], "click,bought,_,x")
    features = {"x": "numeric", "city": "categorical", "day": "categorical"}
    schema = write_schema(tmp_path, features, split={"validation": 0, "test": {"where": "day == 2"}})
    prepare(tmp_path / "data", schema, tmp_path / "out")
    assert split_rows(tmp_path) == {"train": [1, 3], "validation": [], "test": [2]}
    assert values_of(tmp_path, "city") == [("a b", 1), ("c", 1)]
    assert column(tmp_path, "day") == [2, 1]


def scalar_splitmix(value: int) -> int:
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_random_split_is_the_hash_of_seed_and_row(tmp_path: Path) -> None:
    assert scalar_splitmix(0) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64
    rows, shares = 20_000, {"train": 0.7, "validation": 0.2, "test": 0.1}
    text = "click,bought,row\n" + "".join(f"0,0,{row}\n" for row in range(rows))
    found = {}
    for seed in (0, 2**70 + 3):
        schema = prepare_text(tmp_path, text, {"row": "numeric"}, split=shares | {"seed": seed})
        members: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        for row in range(rows):
            uniform = (scalar_splitmix(row ^ scalar_splitmix(seed % 2**64)) >> 11) / 2**53
            members["train" if uniform < 0.7 else "validation" if uniform < 0.7 + 0.2 else "test"].append(row)
        for split, share in shares.items():
            assert column(tmp_path, "row", split) == members[split]
            spread = 5 * (rows * share * (1 - share)) ** 0.5
            assert abs(schema.splits[split].rows - rows * share) < spread
        found[seed] = set(members["train"])
    assert len(found[0] & found[2**70 + 3]) == pytest.approx(rows * 0.49, rel=0.05)  # the seeds are independent


def test_split_by_a_column_keeps_its_values_together(tmp_path: Path) -> None:
    users = np.random.default_rng(1).integers(0, 3000, 9000)
    frame = pd.DataFrame({"click": 0, "bought": 0, "user": users, "row": range(len(users))})
    frame["user"] = frame["user"].astype("Int64").mask(frame["row"] % 3 == 0)
    shares = {"by": "user", "train": 0.6, "validation": 0.2, "test": 0.2}
    schema = prepare_text(tmp_path, frame.to_csv(index=False), {"row": "numeric"}, split=shares)
    where = {int(row): split for split in schema.splits for row in column(tmp_path, "row", split)}
    assert len(where) == len(frame)
    split_of = frame["row"].map(where)
    assert split_of.groupby(frame["user"]).nunique().max() == 1
    per_user = split_of.groupby(frame["user"]).first().value_counts(normalize=True)
    assert per_user.to_dict() == pytest.approx({"train": 0.6, "validation": 0.2, "test": 0.2}, abs=0.05)
    # rows without a user are no user: each is on its own
    alone = split_of[frame["user"].isna()].value_counts(normalize=True)
    assert alone.to_dict() == pytest.approx({"train": 0.6, "validation": 0.2, "test": 0.2}, abs=0.05)


# ---------------------------------------------------------------- edges and samples


def test_edges_by_hand() -> None:
    assert bin_edges([3.0] * 5, 4) == (3.0, 4.0)
    assert bin_edges([1e9], 4) == (1e9, 1000000060.0)  # 1e9 + 1 is 1e9 in float32
    top = float(np.finfo(np.float32).max)
    low, high = bin_edges([top], 4)
    assert low < high == float(str(np.float32(top)))
    assert bin_edges([2, 1, 1, 0.1], 4) == (0.1, 1.0, 2.0)  # few distinct values: all of them
    assert bin_edges(np.arange(101.0), 4) == (0.0, 25.0, 50.0, 75.0, 100.0)


def test_edges_of_a_spiky_column() -> None:
    gains = np.concatenate([np.zeros(9_600), np.arange(1.0, 401.0)])  # 96% are 0
    edges = bin_edges(gains, 8)
    # quantiles of all give 0 and 400 only; the others give eight shares of 1..400
    assert edges[:2] == (0.0, 1.0)
    assert edges[-1] == 400.0
    assert len(edges) == 9
    assert np.diff(edges[1:]) == pytest.approx([57.0] * 7, abs=1)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    st.integers(1, 40),
)
def test_edges_increase_within_the_budget(values: list[float], bins: int) -> None:
    edges = bin_edges(values, bins)
    assert 2 <= len(edges) <= bins + 1
    assert (np.diff(np.array(edges, dtype=np.float32)) > 0).all()
    if len(set(values)) > 1:
        assert (np.float32(edges[0]), np.float32(edges[-1])) == (min(values), max(values))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(1, 50))
def test_sample_and_mean_do_not_depend_on_batches(sizes: list[int], kept: int) -> None:
    rows = sum(sizes)
    values = np.random.default_rng(rows).lognormal(size=(rows, 2))
    values[3::7, 1] = np.nan
    whole, cut = Numbers(2, kept), Numbers(2, kept)
    whole.add(np.arange(rows), values)
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        cut.add(np.arange(start, start + size), values[start : start + size])
    smallest = sorted(range(rows), key=scalar_splitmix)[:kept]
    for numbers in (whole, cut):
        assert sorted(numbers.sample()[:, 0]) == sorted(values[smallest, 0])
        assert numbers.means() == pytest.approx(np.nanmean(values, axis=0), rel=1e-11)  # 8,000 roundings
    assert whole.means().tolist() == cut.means().tolist()


# ---------------------------------------------------------------- properties over random frames

words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp"), exclude_characters='|"'), max_size=3)
# as plain as they come, and all that is read as missing
categories = st.one_of(words, st.sampled_from(["a", "b", "c", "07", "7", *MISSING_TEXT]))
codes = st.one_of(st.none(), st.integers(-3, 12), st.just(2**62))
floats = st.one_of(st.none(), st.floats(-1e6, 1e6, width=32), st.just(0.0))
raw_rows = st.lists(
    st.fixed_dictionaries({
        "label": st.sampled_from([(0, 0), (1, 0), (1, 1)]),
        "word": categories,
        "code": codes,
        "flag": st.booleans(),
        "bag": st.lists(st.integers(0, 9), max_size=4),
        "price": floats,
        "key": st.integers(0, 40),
    }),
    min_size=1, max_size=40,
)  # fmt: skip
FEATURES = {
    "word": {"kind": "categorical", "min_count": 2},
    "code": "categorical",
    "flag": "categorical",
    "bag": {"kind": "multi", "weights": "bag_weight"},
    "price": {"kind": "numeric", "missing": 0.5, "bins": 4},
    "order": "numeric",
}


def frame_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame({
        "click": [row["label"][0] for row in rows],
        "bought": [row["label"][1] for row in rows],
        "word": pd.array([row["word"] for row in rows], dtype="str"),
        "code": pd.array([row["code"] for row in rows], dtype="Int64"),
        "flag": [row["flag"] for row in rows],
        "bag": ["|".join(map(str, row["bag"])) for row in rows],
        "bag_weight": ["|".join(str(1 + item / 4) for item in row["bag"]) for row in rows],
        "price": [row["price"] for row in rows],
        "key": [row["key"] for row in rows],
        "order": range(len(rows)),
    }).astype({"price": "float64"})  # fmt: skip


def csv_text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def json_lines(frame: pd.DataFrame) -> str:
    missing = frame.isna().to_numpy()
    rows = [
        {name: None if missing[row, place] else value for place, (name, value) in enumerate(cells.items())}
        for row, cells in enumerate(frame.astype(object).to_dict("records"))
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def try_prepare(
    folder: Path, data: Path, by: str | None = "key", schema: dict[str, Any] | None = None, **keys: Any
) -> DataSchema | None:
    """None where chance left the training split empty."""
    split = {"by": by, "train": 0.7, "validation": 0.2, "test": 0.1}
    schema_file = write_schema(folder, FEATURES, split=split, **schema or {})
    try:
        return prepare(data, schema_file, folder / "out", **keys)
    except UserError as error:
        if "none of them in the training split" not in str(error):
            raise
        return None


def canonical(value: Any) -> str | None:
    """What a raw cell means, said again in plain Python."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    text = str(value).strip()
    return None if text in MISSING_TEXT else text


@pytest.mark.faults
@settings(deadline=None, max_examples=EXAMPLES)
@given(raw_rows)
def test_ids_decode_back_to_the_raw_values(rows: list[dict[str, Any]]) -> None:
    frame = frame_of(rows)
    with workplace() as folder:
        (folder / "data.csv").write_text(csv_text(frame), encoding="utf-8")
        schema = try_prepare(folder, folder / "data.csv")
        if schema is None:
            return
        tables = {split: pq.read_table(folder / "out" / f"{split}.parquet").to_pandas() for split in schema.splits}
        train = frame.iloc[tables["train"]["order"].astype(int)]
        for name in ("word", "code", "flag"):
            counts = Counter(text for text in map(canonical, train[name].tolist()) if text is not None)
            least = 2 if name == "word" else 1
            known = sorted((text for text in counts if counts[text] >= least), key=lambda text: (-counts[text], text))
            assert [(v, i, n) for f, v, i, n in vocabulary(folder) if f == name] == [
                (text, number, counts[text]) for number, text in enumerate(known, 2)
            ]
            for split, table in tables.items():
                raw = frame[name].iloc[table["order"].astype(int)]
                expected = [
                    1 if (text := canonical(value)) is None else known.index(text) + 2 if text in known else 0
                    for value in raw.tolist()
                ]
                assert table[name].tolist() == expected
                present = [number for number in expected if number != 1]
                share = present.count(0) / max(1, len(present))
                assert next(f for f in schema.features if f.name == name).out_of_vocabulary[split] == share
        bags = {number: value for f, value, number, _ in vocabulary(folder) if f == "bag"}
        assert set(bags.values()) == {str(item) for row in train["order"] for item in rows[row]["bag"]}
        for table in tables.values():
            for position, ids, weights in zip(table["order"], table["bag"], table["bag.weights"], strict=True):
                raw_bag = rows[int(position)]["bag"]
                assert [bags.get(number) for number in ids] == [
                    str(item) if str(item) in bags.values() else None for item in raw_bag
                ]
                assert weights.tolist() == [1 + item / 4 for item in raw_bag]
            prices = frame["price"].iloc[table["order"].astype(int)].fillna(0.5)
            assert table["price"].tolist() == prices.astype("float32").tolist()


@pytest.mark.faults
@settings(deadline=None, max_examples=EXAMPLES)
@given(raw_rows, st.integers(1, 50), st.integers(1, 3), st.sampled_from(["key", None]))
def test_batches_files_and_formats_do_not_matter(
    rows: list[dict[str, Any]], batch_rows: int, files: int, by: str | None
) -> None:
    frame = frame_of(rows)
    with workplace() as folder:
        (folder / "whole.csv").write_text(csv_text(frame), encoding="utf-8")
        whole = try_prepare(folder, folder / "whole.csv", by)
        split_up = folder / "parts"
        split_up.mkdir()
        for number, part in enumerate(np.array_split(np.arange(len(frame)), files)):
            compressed = gzip.compress(csv_text(frame.iloc[part]).encode())
            (split_up / f"{number}.csv.gz").write_bytes(compressed)
        (split_up / "notes.txt").write_text("no data")
        seen: list[tuple[str, int, float]] = []
        parts = try_prepare(folder, split_up, by, batch_rows=batch_rows, progress=lambda *stage: seen.append(stage))
        dialect = {"sep": "\t", "quoting": csv.QUOTE_ALL, "escapechar": "\\", "doublequote": False}
        (folder / "dialect.csv").write_text(frame.to_csv(index=False, lineterminator="\r\n", **dialect), newline="")
        read = {"csv": {"delimiter": "\t", "escape": "\\"}}
        other = try_prepare(folder, folder / "dialect.csv", by, batch_rows=batch_rows, schema=read)
        frame.to_parquet(folder / "whole.parquet", row_group_size=7)
        parquet = try_prepare(folder, folder / "whole.parquet", by, batch_rows=batch_rows)
        (folder / "whole.jsonl").write_text(json_lines(frame), encoding="utf-8")
        objects = try_prepare(folder, folder / "whole.jsonl", by, batch_rows=batch_rows)
        if whole is None:
            assert parts is other is parquet is objects is None
            return
        assert parts is not None
        assert parquet is not None
        assert other is not None
        assert objects is not None
        # of the files' bytes and all features
        assert whole.digest == parts.digest == other.digest == parquet.digest == objects.digest
        assert [stage for stage in seen if stage[1] == len(frame)] == [
            ("parts", len(frame), 0),
            ("splits", len(frame), 1),
        ]
        assert max(after[1] - before[1] for before, after in itertools.pairwise(seen)) <= batch_rows


def test_row_groups_do_not_follow_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_folder, "ROW_GROUP_ROWS", 7)
    data = tmp_path / "data.csv"
    data.write_text("click,bought,x\n" + "".join(f"1,0,{row}\n" for row in range(45)), encoding="utf-8")
    schema = write_schema(tmp_path, {"x": "numeric"})
    digests = {prepare(data, schema, tmp_path / "out", batch_rows=rows).digest for rows in (1, 3, 7, 20, 1000)}
    assert len(digests) == 1
    file = pq.ParquetFile(tmp_path / "out" / "train.parquet")
    groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    assert groups == [7, 7, 7, 7, 7, 7, 3]
    assert column(tmp_path, "x") == list(range(45))


@pytest.mark.faults
@settings(deadline=None, max_examples=EXAMPLES)
@given(raw_rows)
def test_a_frame_is_encoded_as_its_file_was(rows: list[dict[str, Any]]) -> None:
    frame = frame_of(rows)
    with workplace() as folder:
        file = folder / "data.csv"
        file.write_text(csv_text(frame), encoding="utf-8")
        prepare(file, write_schema(folder, FEATURES), folder / "out")
        table = pq.read_table(folder / "out" / "train.parquet")
        encoder = Encoder.load(folder / "out")
        bags = [row["bag"] for row in rows]
        weights = [[1 + item / 4 for item in bag] for bag in bags]
        read = {
            "as made": frame,
            "all text": pd.read_csv(file, dtype=str, keep_default_na=False),
            "as pandas reads it": pd.read_csv(file, dtype={"word": str}),
            "lists": frame.assign(bag=bags, bag_weight=weights),
            "arrays": frame.assign(bag=[np.array(bag, dtype=float) for bag in bags], bag_weight=weights),
            "objects": frame.astype(object),
            "categories": frame.astype({"word": "category", "code": "category", "flag": "category"}),
        }
        for how, raw in read.items():
            encoded = encoder.encode(raw.set_index("key"))  # whatever the index is
            assert list(encoded) == table.column_names[2:]
            for name, values in encoded.items():
                assert values.equals(table[name].combine_chunks().cast(values.type)), (how, name)


# ---------------------------------------------------------------- the encoder on frames


def encoder_for(folder: Path, text: str, features: dict[str, Any], **keys: Any) -> Encoder:
    prepare_text(folder, text, features, **keys)
    return Encoder.load(folder / "out")


def encoded(encoder: Encoder, **columns: Any) -> dict[str, list[Any]]:
    return {name: values.to_pylist() for name, values in encoder.encode(pd.DataFrame(columns)).items()}


def test_numbers_find_the_spelling_of_the_file(tmp_path: Path) -> None:
    codes = ["07", "07", "08", "008", "1.50", "12", "1e3", "-05", "9007199254740993"]
    text = "click,bought,code\n" + "".join(f"0,0,{code}\n" for code in codes)
    encoder = encoder_for(tmp_path, text, {"code": "categorical"})
    ids = {value: number for _, value, number, _ in vocabulary(tmp_path)}
    assert encoded(encoder, code=[7, 12, 1000, -5])["code"] == [ids["07"], ids["12"], ids["1e3"], ids["-05"]]
    assert encoded(encoder, code=[1.5, 7.0, np.nan])["code"] == [ids["1.50"], ids["07"], 1]
    assert encoded(encoder, code=[8])["code"] == [0]  # 08 or 008? Nobody can tell
    assert encoded(encoder, code=["7", " 07 ", "08"])["code"] == [0, ids["07"], ids["08"]]  # text says what it means
    assert encoded(encoder, code=[9007199254740993, 9007199254740992])["code"] == [ids["9007199254740993"], 0]
    mixed = [7, "08", 12.0, None, pd.NA, float("nan"), np.int64(12)]  # chunks that pandas read as different types
    assert encoded(encoder, code=mixed)["code"] == [ids["07"], ids["08"], ids["12"], 1, 1, 1, ids["12"]]


def test_truth_values_find_the_spelling_of_the_file(tmp_path: Path) -> None:
    encoder = encoder_for(tmp_path, "click,bought,flag\n0,0,true\n0,0,true\n0,0,FALSE\n", {"flag": "categorical"})
    assert encoded(encoder, flag=[True, False])["flag"] == [2, 3]
    assert encoded(encoder, flag=[False, None])["flag"] == [3, 1]
    assert encoded(encoder, flag=["true", "True", "yes"])["flag"] == [2, 2, 0]


def test_missing_numbers_are_missing_in_frames(tmp_path: Path) -> None:
    text = "click,bought,code,price\n0,0,3,1\n0,0,-1.0,-1.0\n"
    features = {"code": "categorical", "price": {"kind": "numeric", "missing": 7}}
    encoder = encoder_for(tmp_path, text, features, missing_values=["-1.0"])
    found = encoded(encoder, code=[-1, 3], price=[-1, 2])
    assert found == {"code": [1, 2], "price": [7.0, 2.0]}


def test_bags_in_all_their_forms(tmp_path: Path) -> None:
    features = {
        "tags": {"kind": "multi", "separator": ";"},
        "seen": {"kind": "multi", "weight_separator": ":"},
        "liked": {"kind": "multi", "weights": "how_much"},
    }
    text = "click,bought,tags,seen,liked,how_much\n" + '0,0,1;2;2,"5:1|1:2:3",8|8|9,1|2|3\n'
    encoder = encoder_for(tmp_path, text, features)
    assert column(tmp_path, "seen") == [[3, 2]]  # ids "5" and "1:2": the weight follows the last separator
    frame = pd.DataFrame({
        "tags": ["1;;2", [1, 2.0, None], np.array(["2", "9"]), None, (1,), ""],
        "seen": ["5:0.5", ["5:1", "1:2:3"], "", None, "NA", " 5:2 | NA "],
        "liked": [[8], ["9", 8], "8|9", [], None, float("nan")],
        "how_much": [[0.5], [1, 2], "3|4", [], "", None],
    })  # fmt: skip
    found = encoder.encode(frame)
    assert {name: str(values.type) for name, values in found.items()} == {
        "tags": "list<item: int32>", "seen": "list<item: int32>", "seen.weights": "list<item: float>",
        "liked": "list<item: int32>", "liked.weights": "list<item: float>",
    }  # fmt: skip
    assert found["tags"].to_pylist() == [[3, 2], [3, 2], [2, 0], [], [3], []]
    assert found["seen"].to_pylist() == [[3], [3, 2], [], [], [], [3]]
    assert found["seen.weights"].to_pylist() == [[0.5], [1.0, 3.0], [], [], [], [2.0]]
    assert found["liked"].to_pylist() == [[2], [3, 2], [2, 3], [], [], []]
    assert found["liked.weights"].to_pylist() == [[0.5], [1.0, 2.0], [3.0, 4.0], [], [], []]
    single = pd.DataFrame({"tags": [1, 2], "seen": ["", "5:1"], "liked": [8.0, np.nan], "how_much": [0.5, np.nan]})
    assert encoder.encode(single)["tags"].to_pylist() == [[3], [2]]
    assert encoder.encode(single)["liked.weights"].to_pylist() == [[0.5], []]


def test_types_that_parquet_has_and_csv_has_not(tmp_path: Path) -> None:
    when = pd.to_datetime(["2024-05-01 12:00", "2024-05-01 12:00", "2025-01-01 00:00"])
    arrow = {
        "click": pa.array([True, False, False]),
        "bought": pa.array([0, 0, 0], pa.uint8()),
        "seconds": pa.array(when, pa.timestamp("s")),
        "zoned": pa.array(when, pa.timestamp("ns", "UTC")),
        "day": pa.array(when, pa.date32()),
        "big": pa.array([Decimal(10**30), Decimal(10**30), Decimal(10**30 + 1)], pa.decimal128(38, 0)),
        "cost": pa.array([Decimal("1.50"), Decimal("1.50"), Decimal(3)], pa.decimal128(5, 2)),
        "small": pa.array(["a", "a", "b"]).dictionary_encode(),
        "wide": pa.array(["a", "a", "b"], pa.large_string()),
        "bytes": pa.array([b"a", b"a", b"b"], pa.binary()),
        "half": pa.array([0.5, 0.5, None], pa.float16()),
        "single": pa.array([0.1, 0.1, 3], pa.float32()),
        "lists": pa.array([[1, 2, 1], None, [1]], pa.large_list(pa.int8())),
        "pairs": pa.array([[1.0, 2.0], [1.0, None], [None, 2.0]], pa.list_(pa.float64(), 2)),
        "price": pa.array([Decimal(1), Decimal(2), Decimal(3)], pa.decimal128(5, 2)),
    }
    pq.write_table(pa.table(arrow), tmp_path / "data.parquet")
    features: dict[str, Any] = dict.fromkeys([*arrow][2:-3], "categorical")
    features |= {"lists": "multi", "pairs": "multi", "price": "numeric"}
    prepare(tmp_path / "data.parquet", write_schema(tmp_path, features), tmp_path / "out")
    values: dict[str, list[str]] = {}
    for feature, value, _, _ in vocabulary(tmp_path):
        values.setdefault(feature, []).append(value)
    assert values == {
        "seconds": ["2024-05-01 12:00:00", "2025-01-01"],
        "zoned": ["2024-05-01 12:00:00", "2025-01-01"],
        "day": ["2024-05-01", "2025-01-01"],
        "big": [str(10**30), str(10**30 + 1)],
        "cost": ["1.50", "3.00"], "small": ["a", "b"], "wide": ["a", "b"], "bytes": ["a", "b"],
        "half": ["0.5"], "single": ["0.1", "3.0"], "lists": ["1", "2"], "pairs": ["1", "2"],
    }  # fmt: skip
    assert column(tmp_path, "half") == [2, 2, 1]
    assert column(tmp_path, "lists") == [[2, 3, 2], [], [2]]
    assert column(tmp_path, "pairs") == [[2, 3], [2], [3]]
    assert column(tmp_path, "price") == [1, 2, 3]
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    for frame in (pa.table(arrow).to_pandas(), pa.table(arrow).to_pandas(types_mapper=pd.ArrowDtype)):
        for name, found in Encoder.load(tmp_path / "out").encode(frame).items():
            assert found.equals(table[name].combine_chunks().cast(found.type)), name


def test_an_empty_frame_has_the_same_types(tmp_path: Path) -> None:
    encoder = encoder_for(tmp_path, SHOP, SHOP_FEATURES)
    full = encoder.encode(pd.read_csv(io.StringIO(SHOP)))
    empty = encoder.encode(pd.read_csv(io.StringIO(SHOP)).iloc[:0])
    for name, values in empty.items():
        assert (len(values), values.type) == (0, full[name].type)


def test_frames_that_are_refused(tmp_path: Path) -> None:
    text = "click,bought,city,price\n0,0,a,1\n"
    encoder = encoder_for(tmp_path, text, {"city": "categorical", "price": "numeric"})
    good = pd.DataFrame({"city": ["a"] * 3, "price": [1.0] * 3, "more": 1})
    encoder.encode(good)
    for frame, told in [
        (good.drop(columns="price").rename(columns={"more": "prices"}), "no column price; did you mean prices?"),
        (good.assign(price=[1, None, 2]), "row 2, column price: found no value, allowed: a number"),
        (good.assign(price=["1", "2", "3x"]), "row 3, column price: found '3x', allowed: a number"),
        (good.assign(price=[1, np.inf, 2]), "row 2, column price: found inf, allowed: finite"),
        (good.assign(price=[1, 2, 1e39]), "row 3, column price: found 1e+39, allowed: finite"),
        (good.assign(city=[["a"], ["b"], []]), "row 1, column city: found lists, allowed: one value a row"),
        (good.assign(city=[{"a": 1}] * 3), "column city: found values of type struct"),
        (pd.concat([good, good["city"]], axis=1), "column city is there twice"),
    ]:
        with pytest.raises(UserError) as caught:
            encoder.encode(frame)
        assert told in str(caught.value)


def test_a_foreign_vocabulary_is_refused(tmp_path: Path) -> None:
    prepare_text(tmp_path, SHOP, SHOP_FEATURES)
    file = tmp_path / "out" / "vocabulary.parquet"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"not the vocabulary that schema\.json was written with"):
        Encoder.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match="No such file"):
        Encoder.load(tmp_path / "out")


# ---------------------------------------------------------------- bad input: one line that says what and where

GOOD = "click,bought,city,price\n1,1,a,1\n1,0,b,2\n0,0,a,3\n"
PLAIN = {"city": "categorical", "price": "numeric"}


def refusal(folder: Path, data: Path, features: dict[str, Any] = PLAIN, **keys: Any) -> str:
    """The message, which must be one line that names no more than it must."""
    before = sorted(folder.rglob("*"))
    schema = write_schema(folder, features, **keys)
    with pytest.raises(UserError) as caught:
        prepare(data, schema, folder / "out")
    schema.unlink()
    assert sorted(folder.rglob("*")) == before  # nothing is left behind
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("click,bought,city,price\n1,1,a,1\n2,0,b,2\n", "row 2, column click: found '2', allowed: 0 or 1"),
        ("click,bought,city,price\n1,1,a,1\n,0,b,2\n", "row 2, column click: found '', allowed: 0 or 1"),
        ("click,bought,city,price\n1,maybe,a,1\n", "row 1, column bought: found 'maybe', allowed: 0 or 1"),
        (
            "click,bought,city,price\n1,1,a,1\n1,0,a,1\n0,1,b,2\n",
            "row 3: a conversion (bought) without a click (click)",
        ),
        ("click,bought,city,price\n1,1,a,one\n", "row 1, column price: found 'one', allowed: a number"),
        ("click,bought,city,price\n1,1,a,1\n1,1,a,\n", "row 2, column price: found no value, allowed: a number (its f"),
        ("click,bought,city,price\n1,1,a,NaN\n", "row 1, column price: found no value, allowed: a number"),
        ("click,bought,city,price\n1,1,a,1\n1,1,a,-inf\n", "row 2, column price: found -inf, allowed: finite numbers"),
        ("click,bought,city,price\n1,1,a,1e39\n", "row 1, column price: found 1e+39, allowed: finite numbers up to"),
        ('click,bought,city,price\n\n1,1,"a\nb",1\n1,1,a\n', "row 2: found 3 columns, allowed: 4"),
        ("click,bought,city,price\n1,1,a,1\n1,1,a,1,1\n", "row 2: found 5 columns, allowed: 4"),
        ("click,bought,town,price\n1,1,a,1\n", "schema.yaml: features.city: no column city; allowed: click, bought, t"),
        ("click,bought,city,prices\n1,1,a,1\n", "schema.yaml: features.price: no column price; did you mean prices?"),
        ("clack,bought,city,price\n1,1,a,1\n", "labels.click: no column click; did you mean clack?"),
        ("click,bought,city,city\n1,1,a,1\n", "column city is there twice"),
        ("click,bought,city,price\n", "no rows, allowed: at least one training row"),
        ("", "the file is empty"),
        ("\n\n", "no rows"),
        ('click,bought,city,price\n1,1,a,1\n1,1,a,"2\n1,1,a,3\n', "row 2: found a quote that is never closed"),
        (
            'click,bought,city,price\n1,1,"disk 5\\" SATA",1\n',
            "row 1: found text after a closing quote, allowed: quotes",
        ),
        ('click,bought,city,price\n1,1,a,1\n\n1,1,"b" c,1\n', "row 2: found text after a closing quote"),
        ("PK\x03\x04", "found a ZIP archive; unpack it, allowed: UTF-8 text"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, told: str) -> None:
    data = tmp_path / "data.csv"
    data.write_text(text, encoding="utf-8")
    features = PLAIN if text.count("city") < 2 else {"city": "categorical"}
    message = refusal(tmp_path, data, features)
    assert told in message
    assert str(data) in message or "schema.yaml" in message


@pytest.mark.parametrize(
    ("features", "keys", "told"),
    [
        (
            PLAIN | {"click": "categorical"},
            {},
            "features.click: a label reads column click; as a feature it would leak",
        ),
        (
            PLAIN,
            {"labels": LABELS | {"conversion": "click and city == 'a'"}},
            "features.city: a label reads column city",
        ),
        (PLAIN, {"labels": LABELS | {"click": 'price > "1"'}}, "features.price: a label reads column price"),
        ({"city": {"kind": "multi", "weights": "bought"}}, {}, "features.city: a label reads column bought"),
        (PLAIN, {"labels": LABELS | {"click": "price >"}}, "neither a column of"),
        (PLAIN, {"labels": LABELS | {"click": "pricy > 3"}}, "labels.click: no column pricy; did you mean price?"),
        (
            PLAIN,
            {"labels": LABELS | {"click": 'bought != "NA"'}},
            "compares with 'NA', which missing_values reads as no",
        ),
        (
            {"price": "numeric"},
            {"labels": {"click": "bought", "conversion": 'click and city == "a"'}},
            "labels.conversion: click is both a column of",
        ),
        (PLAIN, {"split": {"test": {"where": "days > 3"}}}, "split.test.where: no column days"),
        (PLAIN, {"split": {"test": {"where": "days >"}}}, "split.test.where: neither a column"),
        (PLAIN, {"split": {"test": {"when": "price > 3"}}}, "split.test"),
        ({"city": "categorical", False: "categorical"}, {}, "features: found key false, allowed: text; write it in q"),
        (PLAIN, {"columns": ["click", False]}, "YAML reads it as false: write the name in quotes"),
        (PLAIN, {"csv": {"delimiter": ",,"}}, "csv.delimiter: found ',,', allowed: an ASCII character"),
        (PLAIN, {"csv": {"escape": ","}}, "csv.escape: found ',', which is csv.delimiter"),
        (
            {"price": "numeric"},
            {"labels": LABELS | {"click": "city < 3"}},
            "row 1, column city: found 'a', allowed: a nu",
        ),
        (PLAIN, {"split": {"by": "town"}}, "split.by: no column town"),
        ({"price": {"kind": "multi", "weights": "weight"}}, {}, "features.price.weights: no column weight"),
        ({"price": {"kind": "numeric", "missing": 1e39}}, {}, "features.price.missing: found 1e+39"),
        ({"price": {"kind": "categorical", "bins": 3}}, {}, "bins has no meaning for kind categorical"),
        ({"price": "number"}, {}, "features.price.kind"),
        (PLAIN, {"csv": {"delimiter": "é"}}, "csv.delimiter: found 'é', allowed: an ASCII character"),
        (PLAIN, {"columns": ["click", "bought", "city"]}, "row 1: found 4 columns, allowed: 3"),
        (
            {"city": {"kind": "multi", "weight_separator": ":"}},
            {},
            "row 1, column city: found no value, allowed: a finit",
        ),
        (
            {"city": {"kind": "multi", "weights": "price", "separator": "b"}},
            {},
            "row 2, column price: found 1 weights for",
        ),
        (
            PLAIN,
            {"split": {"train": 1e-9, "validation": 0.5, "test": 0.5 - 1e-9}},
            "3 rows, none of them in the training",
        ),
    ],
)
def test_bad_schema(tmp_path: Path, features: dict[str, Any], keys: dict[str, Any], told: str) -> None:
    data = tmp_path / "data.csv"
    data.write_text(GOOD, encoding="utf-8")
    if keys.get("columns"):
        features = {"city": "categorical"}
    assert told in refusal(tmp_path, data, features, **keys)


@pytest.mark.parametrize(
    ("text", "features", "told"),
    [
        (
            "click,bought,price\n1,0,\n",
            {"price": {"kind": "numeric", "missing": "mean"}},
            "features.price.missing: found mean, but no training row has a value",
        ),
        (
            "click,bought,a,a.weights,w\n1,0,x,1,1\n",
            {"a": {"kind": "multi", "weights": "w"}, "a.weights": "numeric"},
            "features.a.weights: the prepared files have a column a.weights already",
        ),
    ],
)
def test_features_that_the_data_cannot_have(tmp_path: Path, text: str, features: dict[str, Any], told: str) -> None:
    (tmp_path / "data.csv").write_text(text, encoding="utf-8")
    assert told in refusal(tmp_path, tmp_path / "data.csv", features)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes("click,bought,city,price\n1,1,a,1\n1,1,Huế,1\n".encode("cp1258", "replace") + b"1,1,\xe9,1\n")
    assert "row 3, column city: found b'\\xe9', allowed: UTF-8 text" in refusal(tmp_path, data)
    data.write_bytes("click,bought,cité,price\n1,1,a,1\n".encode("latin-1"))
    assert "the header is not UTF-8 text" in refusal(tmp_path, data)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        data.write_bytes(GOOD.encode(encoding))
        assert "found UTF-16, allowed: UTF-8 text" in refusal(tmp_path, data)
    data.write_bytes(gzip.compress(GOOD.encode()))
    assert "found gzip; call it .csv.gz" in refusal(tmp_path, data)


@pytest.mark.parametrize(("text", "told"), [
    ('{"click": 1, "bought": 0, "city": "a", "price": 1}\n{"click": 1,\n', "row 2: not JSON"),
    ('{"click": 1, "bought": 0, "city": "a", "price": 1}\n\n[1]\n', "row 2: found b'[1]\\n', allowed: an object"),
    ('{"click": 1, "click": 1, "bought": 0, "city": "a", "price": 1}', "row 1: not JSON: a key is there twice"),
    ('{"click": 1, "bought": 0, "city": {"a": 1}, "price": 1}', "row 1, column city: found {'a': '1'}, allowed: texts"),
    ('{"click": 1, "bought": 0, "town": "a", "price": 1}', "no column city"),
    ('{"click": 1, "bought": 0, "city": "a", "price": "x"}', "row 1, column price: found 'x', allowed: a number"),
])  # fmt: skip
def test_bad_json(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    assert told in refusal(tmp_path, tmp_path / "data.jsonl")


def test_files_cut_in_half(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 2**40, 20_000)
    text = "click,bought,city,price\n" + "".join(f"1,0,{row},{row}\n" for row in rows)
    compressed = gzip.compress(text.encode())
    data = tmp_path / "data.csv.gz"
    data.write_bytes(compressed[: len(compressed) // 2])
    assert f"{data}: not a whole gzip file" in refusal(tmp_path, data)
    data.write_bytes(compressed[:-6])
    assert f"{data}: not a whole gzip file" in refusal(tmp_path, data)
    data.write_text(text)
    assert f"{data}: not a whole gzip file" in refusal(tmp_path, data)

    parquet = tmp_path / "data.parquet"
    pd.read_csv(io.StringIO(text)).to_parquet(parquet)
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[: len(whole) // 2])
    assert f"{parquet}: not a whole Parquet file" in refusal(tmp_path, parquet)
    parquet.write_bytes(whole[:100] + b"\xff" * 2000 + whole[2100:])
    assert f"{parquet}: not a readable Parquet file" in refusal(tmp_path, parquet)


def test_parquet_has_its_own_columns(tmp_path: Path) -> None:
    parquet = tmp_path / "data.parquet"
    pd.read_csv(io.StringIO(GOOD)).to_parquet(parquet)
    message = refusal(tmp_path, parquet, columns=["click", "bought", "city", "price"])
    assert "columns names a headerless CSV's columns; a Parquet file has its own" in message
    pd.read_csv(io.StringIO(GOOD)).assign(click=[1, 2, 1]).to_parquet(parquet)
    assert f"{parquet}: row 2, column click: found 2, allowed: 0 or 1" in refusal(tmp_path, parquet)


def test_rows_are_counted_within_a_file_whatever_the_batches(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.csv").write_text(GOOD, encoding="utf-8")
    (folder / "b.csv").write_text(GOOD + "1,0,a,x\n", encoding="utf-8")
    schema = write_schema(tmp_path, PLAIN)
    for batch_rows in (1, 2, 3, 100):
        with pytest.raises(UserError, match=r"b\.csv: row 4, column price: found 'x'"):
            prepare(folder, schema, tmp_path / "out", batch_rows=batch_rows)
    schema.unlink()
    (folder / "b.csv").write_text(GOOD.replace("price", "prize"), encoding="utf-8")
    assert f"{folder / 'b.csv'}: no column price; did you mean prize?" in refusal(tmp_path, folder)


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    assert "nothing.csv: No such file or directory" in refusal(tmp_path, tmp_path / "nothing.csv")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.csv").write_text(GOOD, encoding="utf-8")
    message = refusal(tmp_path, folder)
    assert f"{folder}: no data file in this folder, allowed: .csv, .csv.gz, .jsonl, .jsonl.gz, .parquet" in message
    (folder / "a.csv").write_text(GOOD, encoding="utf-8")
    (folder / "b.parquet").write_bytes(b"PAR1")
    assert "found CSV and Parquet files, allowed: one format" in refusal(tmp_path, folder)
    (folder / "b.parquet").rename(folder / "b.csv").write_bytes(b"")
    assert f"{folder / 'b.csv'}: the file is empty" in refusal(tmp_path, folder)


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder, and no right to more than everybody has (root may read everything)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if user == 0:
                os.seteuid(0)


def test_permissions() -> None:
    with without_privileges() as folder:
        data, locked = folder / "data.csv", folder / "locked"
        data.write_text(GOOD, encoding="utf-8")
        locked.mkdir()
        locked.chmod(0o500)
        schema = write_schema(folder, PLAIN)
        with pytest.raises(UserError, match=r"output_dir .*locked/out: Permission denied"):
            prepare(data, schema, locked / "out")
        with pytest.raises(UserError, match=r"output_dir .*locked: Permission denied"):
            prepare(data, schema, locked)
        with pytest.raises(UserError, match=r"output_dir .*schema\.yaml: .* exists"):
            prepare(data, schema, schema)
        data.chmod(0o000)
        with pytest.raises(UserError, match=r"data\.csv: Permission denied"):
            prepare(data, schema, folder / "out")
        locked.chmod(0o000)
        with pytest.raises(UserError, match=r"data\.csv: Permission denied"):
            prepare(locked / "data.csv", schema, folder / "out")
        locked.chmod(0o700)
        assert not list(locked.iterdir())
        assert not (folder / "out").exists()


# ---------------------------------------------------------------- all or nothing


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_failure_leaves_what_was_there_and_success_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_text(tmp_path, GOOD, PLAIN)
    out = tmp_path / "out"
    (out / "notes.txt").write_text("mine")
    before = content(out)
    assert set(before) == FILES | {"notes.txt"}
    with pytest.raises(UserError):
        prepare_text(tmp_path, GOOD + "1,0,a,x\n", PLAIN)
    assert content(out) == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepared_folder.SplitWriter, "add", full)
        with pytest.raises(UserError, match=r"output_dir .*out: No space left on device"):
            prepare_text(tmp_path, GOOD + "1,0,z,9\n", PLAIN)
    assert content(out) == before
    schema = prepare_text(tmp_path, GOOD + "1,1,c,4\n", PLAIN)
    assert set(content(out)) == FILES | {"notes.txt"}
    assert schema.splits["train"].rows == 4
    assert DataSchema.read(out) == schema


def test_one_at_a_time_and_nothing_is_left_of_one_that_was_killed(tmp_path: Path) -> None:
    prepare_text(tmp_path, GOOD, PLAIN)
    before = content(tmp_path / "out")
    (tmp_path / "out" / ".work").mkdir()
    (tmp_path / "out" / ".work" / "train.parquet").write_bytes(b"half")
    with folders.published(tmp_path / "out", []), pytest.raises(UserError, match="another process is writing there"):
        prepare_text(tmp_path, GOOD + "1,1,c,4\n", PLAIN)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("there_before", [True, False])
def test_a_failed_move_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    if there_before:
        prepare_text(tmp_path, GOOD, PLAIN)
    before = content(out)
    rename, moves = os.replace, itertools.count()
    third_new_file = 5 * there_before + 3  # after the five old ones are out of the way

    def fail_once(source: Path, target: Path) -> None:
        if next(moves) == third_new_file:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(folders.os, "replace", fail_once)
    with pytest.raises(UserError, match=r"output_dir .*out: Input/output error"):
        prepare_text(tmp_path, GOOD + "1,0,z,9\n", PLAIN)
    assert content(out) == before


def test_the_data_itself_is_never_written_over(tmp_path: Path) -> None:
    data = tmp_path / "train.parquet"
    pd.read_csv(io.StringIO(GOOD)).to_parquet(data)
    before = data.read_bytes()
    schema = write_schema(tmp_path, PLAIN)
    for given_data in (data, tmp_path):
        with pytest.raises(UserError, match="would write over the data"):
            prepare(given_data, schema, tmp_path)
    assert data.read_bytes() == before


# ---------------------------------------------------------------- the worked example


def test_the_census_example(tmp_path: Path) -> None:
    shipped = ROOT / "configs" / "data" / "census.yaml"
    names = yaml.safe_load(shipped.read_text(encoding="utf-8"))["columns"]
    assert len(names) == 42
    random = np.random.default_rng(0)
    married = random.choice(["Never married", "Divorced", "Married-civilian spouse present"], 400)
    income = random.choice(["- 50000.", "50000+."], 400, p=[0.8, 0.2])
    frame = pd.DataFrame({name: random.choice(["Not in universe", "?", "NA", "Yes"], 400) for name in names})
    numeric = ["age", "wage_per_hour", "capital_gains", "capital_losses", "dividends", "persons_worked_for_employer",
               "weeks_worked"]  # fmt: skip
    for name in [*numeric, "industry_code", "year"]:
        frame[name] = random.integers(0, 60, 400)
    frame["instance_weight"] = random.uniform(1, 2000, 400).round(2)
    frame["marital_status"], frame["income"] = married, income
    lines = [", ".join(map(str, row)) for row in frame.itertuples(index=False)]
    (tmp_path / "census.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    schema = prepare(tmp_path / "census.csv.gz", shipped, tmp_path / "out")
    kinds = {feature.name: feature.kind for feature in schema.features}
    assert set(names) - set(kinds) == {"marital_status", "income", "instance_weight"}
    assert {name for name, kind in kinds.items() if kind == "numeric"} == set(numeric)
    clicks, conversions = married != "Never married", (married != "Never married") & (income == "50000+.")
    assert sum(split.clicks for split in schema.splits.values()) == clicks.sum()
    assert sum(split.conversions for split in schema.splits.values()) == conversions.sum()
    raw = pd.read_csv(tmp_path / "census.csv.gz", header=None, names=names, skipinitialspace=True)
    ids = Encoder.load(tmp_path / "out").encode(raw)
    assert sorted(ids["year"].to_pylist()) == sorted(
        value for split in schema.splits for value in column(tmp_path, "year", split)
    )
    assert set(ids["hispanic_origin"].filter(pa.array(frame["hispanic_origin"] == "NA")).to_pylist()) == {1}
