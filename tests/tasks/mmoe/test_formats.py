"""The same column as CSV, JSON Lines and Parquet: each kind of value, with its ids and numbers worked out by hand."""

import csv
import json
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_tables import column, values_of, write_schema

from pipeline.data.encoding import Encoder
from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.preparation import prepare

RARE, GONE = "out of vocabulary", "missing"
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
HANOI = timezone(timedelta(hours=7))
HUE = unicodedata.normalize("NFD", "Huế")
SIGNED = pa.array([0.0, 0.0, -0.0, 1.5, 1.5])


def written(folder: Path, cells: Sequence[str], parsed: Sequence[Any], array: pa.Array) -> list[Path]:
    """One column as CSV texts, as JSON values, and as an Arrow array."""
    files = [folder / f"data.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    with files[0].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["click", "bought", "x"], *([1, 0, cell] for cell in cells)])
    lines = [json.dumps({"click": 1, "bought": 0, "x": value}) for value in parsed]
    files[1].write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"click": [1] * len(array), "bought": [0] * len(array), "x": array}), files[2])
    return files


def decoded(folder: Path) -> list[Any]:
    """The text of each id."""
    texts = [RARE, GONE, *(value for value, _ in values_of(folder, "x"))]
    return [[texts[i] for i in ids] if isinstance(ids, list) else texts[ids] for ids in column(folder, "x")]


@pytest.mark.parametrize(("forms", "keys", "expected"), [
    ((["0.0", "0.0", "-0.0", "1.5", "1.5"], [0.0, 0.0, -0.0, 1.5, 1.5], SIGNED), {"min_count": 2},
     ["0.0", "0.0", RARE, "1.5", "1.5"]),
    ((["0.0000005", "0.0000000"], ["0.0000005", "0.0000000"],
      pa.array([Decimal("5e-7"), Decimal(0)], pa.decimal128(10, 7))), {}, ["0.0000005", "0.0000000"]),
    ((["5.00000000", "0.00000000"], ["5.00000000", "0.00000000"],
      pa.array([Decimal(5), Decimal(0)], pa.decimal64(10, 8))), {}, ["5", "0"]),
    ((["-1.0", "5.0", "5.5"], [-1.0, 5.0, 5.5], pa.array([-1.0, 5.0, 5.5])), {"missing_values": ["-1"]},
     [GONE, "5.0", "5.5"]),
    ((["-1", "-2"], [-1, -2], pa.array([-1, -2])), {"missing_values": ["-1.0"]}, [GONE, "-2"]),
    ((["1", "01", "1.5"], ["1", "01", 1.5], pa.array(["1", "01", "1.5"])), {"missing_values": ["1.00"]},
     [GONE, "01", "1.5"]),
    ((["FALSE", "true"], [False, True], pa.array([False, True])), {"missing_values": ["false"]}, [GONE, "True"]),
    ((["inf", "-inf", "", "0.5"], [float("inf"), -float("inf"), float("nan"), 0.5],
      pa.array([float("inf"), -float("inf"), float("nan"), 0.5])), {"missing_values": []},
     ["inf", "-inf", GONE, "0.5"]),
    ((["0.1", "1000.0"], [0.1, 1000.0], pa.array([0.1, 1000], pa.float16())), {}, ["0.1", "1000.0"]),
    ((["2024-05-01 12:00:00.000000001", "1969-12-31 23:59:59.999999999"],
      ["2024-05-01T12:00:00.000000001", "1969-12-31 23:59:59.999999999"],
      pa.array([1_714_564_800_000_000_001, -1], pa.timestamp("ns"))), {},
     ["2024-05-01 12:00:00.000000001", "1969-12-31 23:59:59.999999999"]),
    ((["2024-05-01 12:00:00+00:00", "2024-05-01 00:00:00Z"], ["2024-05-01T12:00:00.000Z", "2024-05-01T00:00:00.000Z"],
      pa.array([NOON, NOON.replace(hour=0)], pa.timestamp("ms", "UTC"))), {}, ["2024-05-01 12:00:00", "2024-05-01"]),
    ((["2024-05-01 19:00:00+07:00", "2024-05-01 00:00:00+07:00"],
      [str(NOON.astimezone(HANOI)), "2024-05-01T00:00:00+07:00"],
      pa.array([NOON, NOON - timedelta(hours=19)], pa.timestamp("us", "Asia/Ho_Chi_Minh"))), {},
     ["2024-05-01 19:00:00+07:00", "2024-05-01 00:00:00+07:00"]),
    ((["2024-05-01 12:00:00+00", "2024-05-01 12:00:00 UTC", "2024-05-01T19:00:00+0700", "2024-05-01 19:00:00.5+07"],
      ["2024-05-01T12:00:00Z"] * 2 + ["2024-05-01T19:00:00+07:00", "2024-05-01T19:00:00.500+07:00"],
      pa.array(["2024-05-01 12:00:00"] * 2 + ["2024-05-01 19:00:00+07:00", "2024-05-01 19:00:00.5+07:00"])), {},
     ["2024-05-01 12:00:00"] * 2 + ["2024-05-01 19:00:00+07:00", "2024-05-01 19:00:00.5+07:00"]),
    ((["12345678", "1.2345678E7", "9", "9.0"], [12345678, "1.2345678E7", 9, "9.0"],
      pa.array([12345678.0, 12345678.0, 9.0, 9.0])), {}, ["12345678", "12345678", "9", "9"]),
    ((["100000", "1e+05", "2e+22"], [100000, "1e+05", "2e+22"], pa.array([1e5, 1e5, 2e22])), {},
     ["100000", "100000", "20000000000000000000000"]),
    ((["12E4", "120000"], ["12E4", "120000"], pa.array(["12E4", "120000"])), {}, ["12E4", "120000"]),
    ((["1.5e+00", "100000"], ["1.5e+00", "100000"], pa.array(["1.5e+00", "100000"])), {}, ["1.5e+00", "100000"]),
    ((["Huế", HUE, "[18,25]", "[Promo]"], ["Huế", HUE, "[18,25]", "[Promo]"],
      pa.array(["Huế", HUE, "[18,25]", "[Promo]"])), {}, ["Huế", "Huế", "[18,25]", "[Promo]"]),
    ((["12:30:00", "00:00:00.25"], ["12:30:00", "00:00:00.25"],
      pa.array([time(12, 30), time(0, 0, 0, 250_000)], pa.time64("us"))), {}, ["12:30:00", "00:00:00.25"]),
    ((["12:30:10", "00:00:00"], ["12:30:10", "00:00:00"], pa.array([time(12, 30, 10), time(0)], pa.time32("s"))), {},
     ["12:30:10", "00:00:00"]),
])  # fmt: skip
def test_ids(tmp_path: Path, forms: tuple[Any, Any, pa.Array], keys: dict[str, Any], expected: list[str]) -> None:
    feature = {"kind": "categorical", "min_count": keys.get("min_count", 1)}
    schema = write_schema(tmp_path, {"x": feature}, **{key: keys[key] for key in keys if key != "min_count"})
    for file in written(tmp_path, *forms):
        prepare(file, schema, tmp_path / "out")
        assert decoded(tmp_path) == expected, file.name


@pytest.mark.parametrize(("cells", "parsed", "array", "expected"), [
    (["true", "FALSE", "1", ""], [True, False, 1, None], pa.array([True, False, True, None]), [1, 0, 1, 7]),
    (["False", "false", "0", "TRUE"], [False, "false", 0, True], pa.array(["False", "false", "0", "TRUE"]),
     [0, 0, 0, 1]),
    (["0.5", "3", "-0.0000005"], [0.5, 3, -5e-7],
     pa.array([Decimal("0.5"), Decimal(3), Decimal("-5e-7")], pa.decimal128(12, 7)), [0.5, 3, -5e-7]),
])  # fmt: skip
def test_numbers(tmp_path: Path, cells: list[str], parsed: list[Any], array: pa.Array, expected: list[float]) -> None:
    schema = write_schema(tmp_path, {"x": {"kind": "numeric", "missing": 7}})
    for file in written(tmp_path, cells, parsed, array):
        prepare(file, schema, tmp_path / "out")
        assert column(tmp_path, "x") == pytest.approx(expected, rel=1e-7), file.name


def test_conditions_compare_the_written_number(tmp_path: Path) -> None:
    """0.1 in 32 bits is 0.100000001, which is more than 0.1."""
    schema = write_schema(tmp_path, {"x": "categorical"}, split={"validation": {"where": "x == 0.1"}, "test": 0.0})
    for file in written(tmp_path, ["0.1", "0.2"], [0.1, 0.2], pa.array([0.1, 0.2], pa.float32())):
        prepare(file, schema, tmp_path / "out")
        assert values_of(tmp_path, "x") == [("0.2", 1)], file.name


DAYS = ["2024-05-01 00:00:00", "2024-05-01 13:00:00", "2024-04-30 23:00:00"]
TIMES = (DAYS, DAYS, pa.array([datetime.fromisoformat(day) for day in DAYS]))
TRUTH = (["true", "false", "true"], [True, False, True], pa.array([True, False, True]))
USERS = (["123", "123.0", "7.0"], [123, 123.0, 7.0], pa.array([123.0, 123.0, 7.0]))


@pytest.mark.parametrize(("forms", "condition", "expected"), [
    (TIMES, 'x >= "2024-05-01T12:00:00"', [0, 1, 0]),
    (TIMES, 'x >= "2024-05-01 00:00:00"', [1, 1, 0]),
    (TIMES, 'x >= "2024-05-01"', [1, 1, 0]),
    (TIMES, 'x < "2024-05-01 00:00:00"', [0, 0, 1]),
    (TIMES, 'x == "2024-05-01 00:00:00"', [1, 0, 0]),
    (TIMES, 'x not in ["2024-05-01", "2024-05-01T13:00:00.000Z"]', [0, 0, 1]),
    (TRUTH, 'x == "true"', [1, 0, 1]),
    (TRUTH, 'x in ["TRUE"]', [1, 0, 1]),
    (TRUTH, 'x != "True"', [0, 1, 0]),
    (USERS, 'x == "123"', [1, 1, 0]),
    (USERS, 'x in ["123.0", ""]', [1, 1, 0]),
    (USERS, 'x == "1.23e+02"', [1, 1, 0]),
    ((["Huê\u0301", "Hue"], ["Huê\u0301", "Hue"], pa.array(["Huê\u0301", "Hue"])), 'x == "Huế"', [1, 0]),
    ((["Huế", "Hue"], ["Huế", "Hue"], pa.array(["Huế", "Hue"])), 'x == "Huê\u0301"', [1, 0]),
])  # fmt: skip
def test_conditions_read_texts_as_cells(
    tmp_path: Path, forms: tuple[Any, Any, pa.Array], condition: str, expected: list[int]
) -> None:
    schema = write_schema(tmp_path, {"bought": "categorical"}, labels={"click": condition})
    for file in written(tmp_path, *forms):
        prepare(file, schema, tmp_path / "out")
        assert column(tmp_path, "click") == expected, file.name


@pytest.mark.parametrize(("cells", "parsed", "array", "expected"), [
    (['[true, "x"]', "[True, 'x']", "x|True"], [[True, "x"], [True, "x"], ["x", True]],
     pa.array([["True", "x"], ["True", "x"], ["x", "True"]]), [["True", "x"], ["True", "x"], ["x", "True"]]),
    (["[true, false]", "[True]", ""], [[True, False], [True], None], pa.array([[True, False], [True], None]),
     [["True", "False"], ["True"], []]),
    (["[1.5, NaN, Infinity]", "[nan, 0.25]", "[]"], [[1.5, float("nan"), float("inf")], [float("nan"), 0.25], []],
     pa.array([[1.5, float("nan"), float("inf")], [float("nan"), 0.25], []]), [["1.5", "inf"], ["0.25"], []]),
    (["[0.0000000, 1.5000000]", "0.0000000"], [["0.0000000", "1.5000000"], ["0.0000000"]],
     pa.array([[Decimal(0), Decimal("1.5")], [Decimal(0)]], pa.list_(pa.decimal128(9, 7))),
     [["0.0000000", "1.5000000"], ["0.0000000"]]),
])  # fmt: skip
def test_lists(tmp_path: Path, cells: list[str], parsed: list[Any], array: pa.Array, expected: list[list[str]]) -> None:
    schema = write_schema(tmp_path, {"x": "multi"}, missing_values=["-"])
    for file in written(tmp_path, cells, parsed, array):
        prepare(file, schema, tmp_path / "out")
        assert decoded(tmp_path) == expected, file.name


@pytest.mark.parametrize(
    ("text", "value", "array"),
    [("['a', 'b']", ["a", "b"], pa.array([["a"], ["a", "b"]])), ("[]", [], pa.array([["a"], []])),
     ('{"a": 1}', {"a": 1}, None)],
)  # fmt: skip
def test_several_values_of_a_categorical_feature(tmp_path: Path, text: str, value: Any, array: pa.Array) -> None:
    schema = write_schema(tmp_path, {"x": "categorical"})
    for file in written(tmp_path, ["a", text], [None, value], pa.array(["a", text]) if array is None else array):
        with pytest.raises(UserError, match=f"{file.name}.*: row [12], column x: found .*allowed: "):
            prepare(file, schema, tmp_path / "out")


@pytest.mark.parametrize(
    "cell", ["{sport,news}", "{}", "('sport', 'news')", "{'sport'}", "set()", '{"a": 0.5}', "(1, 2)"]
)
def test_a_cell_that_is_another_collection(tmp_path: Path, cell: str) -> None:
    for file in written(tmp_path, ["a|b", cell], ["a|b", cell], pa.array(["a|b", cell])):
        with pytest.raises(UserError, match=f"{file.name}.*: row 2, column x: found .*allowed: ids with the separator"):
            prepare(file, write_schema(tmp_path, {"x": "multi"}), tmp_path / "out")


def test_the_weight_of_a_missing_id_goes_with_it(tmp_path: Path) -> None:
    """A list of one missing id is, as text, a missing cell."""
    ids, weights = [["a", "b"], ["NA"], []], [[1.0, 2.0], [0.5], []]
    table = pa.table({"click": [1, 1, 1], "bought": [0, 0, 0], "x": ids, "w": weights})
    pq.write_table(table, tmp_path / "data.parquet")
    rows = "".join(f"1,0,{'|'.join(x)},{'|'.join(map(str, w))}\n" for x, w in zip(ids, weights, strict=True))
    (tmp_path / "data.csv").write_text(f"click,bought,x,w\n{rows}", encoding="utf-8")
    schema = write_schema(tmp_path, {"x": {"kind": "multi", "weights": "w"}})
    for name in ("data.csv", "data.parquet"):
        prepare(tmp_path / name, schema, tmp_path / "out")
        assert decoded(tmp_path) == [["a", "b"], [], []], name
        assert column(tmp_path, "x.weights") == [[1.0, 2.0], [], []], name
    (tmp_path / "data.csv").write_text("click,bought,x,w\n1,0,a,1\n1,0,NA,1|2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"row 2, column w: found 2 weights for the 0 ids of x"):
        prepare(tmp_path / "data.csv", schema, tmp_path / "out")


def test_a_decimal_is_shown_as_a_number(tmp_path: Path) -> None:
    click = pa.array([Decimal(1), Decimal(2)], pa.decimal128(4, 1))
    pq.write_table(pa.table({"click": click, "bought": [0, 0], "x": ["a", "b"]}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"row 2, column click: found 2\.0, allowed: 0 or 1$"):
        prepare(tmp_path / "data.parquet", write_schema(tmp_path, {"x": "categorical"}), tmp_path / "out")


def test_a_folder_whose_files_have_different_types(tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    for name, array in (("0", pa.array(["007", "007"])), ("1", pa.array([7]))):
        table = pa.table({"click": [1] * len(array), "bought": [0] * len(array), "x": array})
        pq.write_table(table, tmp_path / "days" / f"{name}.parquet")
    schema = write_schema(tmp_path, {"x": {"kind": "categorical", "min_count": 2}})
    prepare(tmp_path / "days", schema, tmp_path / "out")
    assert decoded(tmp_path) == ["007", "007", RARE]


def test_a_frame_has_the_ids_of_its_file(tmp_path: Path) -> None:
    schema = write_schema(tmp_path, {"x": {"kind": "categorical", "min_count": 2}})
    for file in written(tmp_path, ["0.0", "0.0", "-0.0", "1.5", "1.5"], SIGNED.to_pylist(), SIGNED):
        prepare(file, schema, tmp_path / "out")
        assert Encoder.load(tmp_path / "out").encode(pd.DataFrame({"x": SIGNED}))["x"].to_pylist() == [2, 2, 0, 3, 3]


def test_decimals_of_a_frame_have_points_whatever_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("click;bought;x\n1;0;0,5\n1;0;1.000,25\n", encoding="utf-8")
    dialect = {"delimiter": ";", "decimal": ",", "thousands": "."}
    prepare(tmp_path / "data.csv", write_schema(tmp_path, {"x": "numeric"}, csv=dialect), tmp_path / "out")
    frame = pd.DataFrame({"x": [Decimal("0.5"), Decimal("1000.25")]})
    assert Encoder.load(tmp_path / "out").encode(frame)["x"].to_pylist() == [0.5, 1000.25]


def test_numbers_of_a_frame_of_mixed_types_are_numbers_whatever_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("click;bought;x\n1;0;0,5\n1;0;1.000,25\n", encoding="utf-8")
    dialect = {"delimiter": ";", "decimal": ",", "thousands": "."}
    prepare(tmp_path / "data.csv", write_schema(tmp_path, {"x": "numeric"}, csv=dialect), tmp_path / "out")
    frame = pd.DataFrame({"x": pd.Series([1.234, "2,5", 7], dtype=object)})
    assert Encoder.load(tmp_path / "out").encode(frame)["x"].to_pylist() == pytest.approx([1.234, 2.5, 7])
