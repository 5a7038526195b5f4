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
from raw_tables import (
    GOOD,
    LABELS,
    PLAIN,
    SHOP,
    SHOP_FEATURES,
    column,
    prepare_text,
    scalar_splitmix,
    values_of,
    vocabulary,
    write_schema,
)

from pipeline.data import prepared_folder
from pipeline.data.encoding import Encoder
from pipeline.data.schema import MISSING_TEXT, DataSchema
from pipeline.errors import UserError
from pipeline.storage import folders
from pipeline.tasks.mmoe.prepare.preparation import prepare

EXAMPLES = 200 if os.environ.get("FAULTS") == "full" else 20  # of whole files: each is prepared up to three times
FILES = {"train.parquet", "validation.parquet", "test.parquet", "vocabulary.parquet", "schema.json"}


# ---------------------------------------------------------------- by hand


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


def test_schema_names_its_source(tmp_path: Path) -> None:
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


def test_empty_ids_are_always_missing(tmp_path: Path) -> None:
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
    prepared = []
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
        prepared.append((vocabulary(tmp_path), pq.read_table(tmp_path / "out" / "train.parquet").to_pydict()))
    assert prepared[0] == prepared[1] == prepared[2] == prepared[3]
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


@pytest.mark.parametrize("tags", [[None, ["a"], ["a"]], [["a"], ["a"], None]], ids=["first", "last"])
def test_lists_that_are_missing_in_a_whole_batch(tmp_path: Path, tags: list[list[str] | None]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"click": 1, "bought": 0, "tags": cell}) + "\n" for cell in tags), encoding="utf-8"
    )
    schema = write_schema(tmp_path, {"tags": "multi"})
    digests = {prepare(data, schema, tmp_path / "out", batch_rows=rows).digest for rows in (1, 2, 3)}
    assert len(digests) == 1
    assert column(tmp_path, "tags") == [[] if cell is None else [2] for cell in tags]
    data.write_text('{"click": 1, "bought": 0, "tags": "a"}\n' + data.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"row [23], column tags: found \['a'\], allowed: texts, numbers and truth values, or"
    ):
        prepare(data, schema, tmp_path / "out", batch_rows=1)


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
    assert "more.csv" not in (warning := capfd.readouterr().err)
    assert "read as one with the others: test.csv, train.csv; " in warning


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


def test_random_split_is_the_hash_of_seed_and_row(tmp_path: Path) -> None:
    assert scalar_splitmix(0) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64
    rows, shares = 20_000, {"train": 0.7, "validation": 0.2, "test": 0.1}
    text = "click,bought,row\n" + "".join(f"0,0,{row}\n" for row in range(rows))
    training = {}
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
        training[seed] = set(members["train"])
    assert len(training[0] & training[2**70 + 3]) == pytest.approx(rows * 0.49, rel=0.05)  # the seeds are independent


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
    """None if the training split is empty by chance."""
    split = {"by": by, "train": 0.7, "validation": 0.2, "test": 0.1}
    schema_file = write_schema(folder, FEATURES, split=split, **schema or {})
    try:
        return prepare(data, schema_file, folder / "out", **keys)
    except UserError as error:
        if "none of them in the training split" not in str(error):
            raise
        return None


def canonical(value: Any) -> str | None:
    """The text of a raw cell, computed in plain Python."""
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
@given(raw_rows, st.integers(1, 50), st.integers(1, 3), st.sampled_from(["key", None]), st.sampled_from(["\n", "\r\n"]))
def test_batches_files_and_formats_do_not_matter(
    rows: list[dict[str, Any]], batch_rows: int, files: int, by: str | None, line_end: str
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
        (folder / "whole.jsonl").write_text(json_lines(frame), encoding="utf-8", newline=line_end)
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
            encoded = encoder.encode(raw.set_index("key"))  # the index does not matter
            assert list(encoded) == table.column_names[2:]
            for name, values in encoded.items():
                assert values.equals(table[name].combine_chunks().cast(values.type)), (how, name)


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
