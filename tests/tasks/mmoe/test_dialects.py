"""CSV dialects: the same rows in every dialect, numbers as people write them, and lists within cells."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_tables import column, prepare_text, values_of, write_schema

from pipeline.data.cells import Cells
from pipeline.data.encoding import Encoder
from pipeline.data.schema import MISSING_TEXT, DataSchema
from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.preparation import prepare

FEATURES = {"city": "categorical", "tags": {"kind": "multi", "separator": "/"}, "price": "numeric"}
ROWS = [
    {"click": 1, "bought": 1, "city": 'Huế, "cũ"', "tags": "a/b", "price": 1234.5},
    {"click": 1, "bought": 0, "city": "Hà; Nội", "tags": "", "price": -0.25},
    {"click": 0, "bought": 0, "city": "Vinh\nmới", "tags": "b", "price": 1234567.0},
]


def number(value: float, decimal: str, thousands: str | None) -> str:
    text = f"{value:,.2f}"
    return text.translate({ord(","): thousands or "", ord("."): decimal})


@pytest.mark.parametrize(("dialect", "encoding"), [
    ({}, "utf-8-sig"),
    ({"delimiter": ";", "decimal": ","}, "utf-8"),
    ({"delimiter": r"\t", "decimal": ",", "thousands": "."}, "utf-8"),
    ({"delimiter": "|", "thousands": ","}, "utf-16"),
    ({"delimiter": ";", "decimal": ",", "thousands": " ", "encoding": "utf-16-le"}, "utf-16-le"),
    ({"quote": "'", "encoding": "UTF8"}, "utf-8"),
    ({"quote": "'", "escape": "\\", "encoding": "cp1258"}, "cp1258"),
    ({"thousands": "'", "encoding": "utf_8_sig"}, "utf-8-sig"),
])  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_one_table_in_every_dialect(tmp_path: Path, dialect: dict[str, Any], encoding: str, zipped: bool) -> None:
    rows = ROWS
    if encoding == "cp1258":  # has no letter ế
        rows = [row | {"city": str(row["city"]).translate(str.maketrans("ếộớũ", "êôơu"))} for row in ROWS]
    escape = dialect.get("escape")
    file = tmp_path / ("data.csv.gz" if zipped else "data.csv")
    frame = pd.DataFrame(rows)
    frame["price"] = [
        number(value, dialect.get("decimal", "."), dialect.get("thousands")).replace(" ", "\u00a0")
        for value in frame["price"]
    ]
    text = frame.to_csv(
        index=False, sep=dialect.get("delimiter", ",").replace(r"\t", "\t"), quotechar=dialect.get("quote", '"'),
        quoting=csv.QUOTE_ALL if escape else csv.QUOTE_MINIMAL, escapechar=escape, doublequote=escape is None,
    ).encode(encoding)  # fmt: skip
    file.write_bytes(gzip.compress(text) if zipped else text)
    keys = dialect if "utf-16" not in encoding else dialect | {"encoding": encoding}
    schema = prepare(file, write_schema(tmp_path, FEATURES, csv=keys), tmp_path / "out")
    assert column(tmp_path, "price") == [1234.5, -0.25, 1234567.0]
    assert [column(tmp_path, label) for label in ("click", "conversion")] == [[1, 1, 0], [1, 0, 0]]
    assert dict(values_of(tmp_path, "city")) == {row["city"]: 1 for row in rows}
    assert values_of(tmp_path, "tags") == [("b", 2), ("a", 1)]
    # a logged model reads the same texts, and numbers
    for prices in (frame["price"], pd.DataFrame(rows)["price"]):
        encoded = Encoder.load(tmp_path / "out").encode(frame.assign(price=prices))
        assert encoded["price"].to_pylist() == [1234.5, -0.25, 1234567.0]
        assert encoded["city"].to_pylist() == column(tmp_path, "city")
    assert DataSchema.read(tmp_path / "out") == schema


def test_without_a_quote_character_quotes_are_text(tmp_path: Path) -> None:
    text = 'click;bought;city\n1;0;5" disk\n0;0;"\n'
    prepare_text(tmp_path, text, {"city": "categorical"}, csv={"delimiter": ";", "quote": None})
    assert dict(values_of(tmp_path, "city")) == {'5" disk': 1, '"': 1}


@given(st.floats(-1e9, 1e9), st.sampled_from([".", ","]), st.sampled_from([None, ".", ",", "'", " ", "_"]),
       st.integers(0, 6))  # fmt: skip
def test_numbers_are_read_as_they_are_written(value: float, decimal: str, thousands: str | None, digits: int) -> None:
    if decimal == thousands:
        return
    text = f"{value:,.{digits}f}"
    written = text.translate({ord(","): thousands or "", ord("."): decimal})
    cells = Cells(MISSING_TEXT, decimal=decimal, thousands=thousands)
    assert cells.numbers(_texts([written, ""]), "x", str)[0] == float(text.replace(",", ""))


@pytest.mark.parametrize(("decimal", "thousands", "text"), [
    (",", None, "2.5"), (",", ".", "2.5"), (",", ".", "12.34,5"), (".", ",", "1,5"), (".", ",", "1234,567"),
    (",", " ", "1 23"), (".", "'", "1'2345"), (",", None, "1,2,3"), (",", ".", "x"), (",", None, "inf"),
])  # fmt: skip
def test_other_numbers_are_refused(decimal: str, thousands: str | None, text: str) -> None:
    cells = Cells(MISSING_TEXT, decimal=decimal, thousands=thousands)
    example = f"1{thousands or ''}234{decimal}5"
    with pytest.raises(UserError) as caught:
        cells.numbers(_texts(["", text]), "x", lambda row: f"row {row}")
    assert f"row 1, column x: found {text!r}, allowed: a number, written like {example}" in str(caught.value)


def _texts(values: list[str]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string())


@pytest.mark.parametrize(("csv_keys", "expected"), [
    ({"quote": "''"}, "csv.quote: found \"''\", allowed: an ASCII character"),
    ({"quote": ","}, "csv.quote: found ',', which is csv.delimiter"),
    ({"escape": '"'}, "csv.escape: found '\"', which is csv.quote"),
    ({"encoding": "cp9999"}, "csv.encoding: found 'cp9999', allowed: a text encoding of Python"),
    ({"encoding": "rot13"}, "csv.encoding: found 'rot13', allowed: a text encoding of Python"),
    ({"encoding": "cp1252"}, "not cp1252 text, as csv.encoding says: "),
    ({"encoding": "utf-16"}, "not utf-16 text, as csv.encoding says: "),
    ({"decimal": ",", "thousands": ","}, "decimal and thousands are both ',', allowed: different marks"),
    ({"decimal": ";"}, "csv.decimal"),
    ({"thousands": "x"}, "csv.thousands"),
])  # fmt: skip
def test_bad_dialects(tmp_path: Path, csv_keys: dict[str, Any], expected: str) -> None:
    (tmp_path / "data.csv").write_bytes(b"click,bought,city\n1,0,a\n0,0,\x81\x90\x8f\n")
    schema = write_schema(tmp_path, {"city": "categorical"}, csv=csv_keys)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "data.csv", schema, tmp_path / "out")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_lists_as_json_and_as_python_write_them(tmp_path: Path) -> None:
    ids = ["a, b", 'say "x"', "😀", "it's", "c\\d"]
    cells = [json.dumps(ids), json.dumps(ids, ensure_ascii=False), str(ids), '["a\\/b", null, true, 7, 2.50]', "[]"]
    frame = pd.DataFrame({"click": 0, "bought": 0, "tags": cells})
    frame.to_csv(tmp_path / "data.csv", index=False)
    prepare(tmp_path / "data.csv", write_schema(tmp_path, {"tags": "multi"}), tmp_path / "out")
    assert dict(values_of(tmp_path, "tags")) == dict.fromkeys(ids, 3) | {"a/b": 1, "True": 1, "7": 1, "2.50": 1}
    lengths = [len(bag) for bag in pq.read_table(tmp_path / "out" / "train.parquet")["tags"].to_pylist()]
    assert lengths == [5, 5, 5, 4, 0]
    frame["tags"] = ["['a', None]", '["a", null]', "[None]", "['None']", "['a', '-']"]
    frame.to_csv(tmp_path / "data.csv", index=False)
    prepare(tmp_path / "data.csv", write_schema(tmp_path, {"tags": "multi"}, missing_values=["-"]), tmp_path / "out")
    assert dict(values_of(tmp_path, "tags")) == {"a": 3, "None": 1}
    for bad in ('[{"a": 1}]', "[[1]]", '["a"', '["\\ud83d"]'):
        frame["tags"] = bad
        frame.to_csv(tmp_path / "data.csv", index=False)
        if bad.endswith("]"):
            with pytest.raises(UserError, match=r"row 1, column tags: found .*, allowed: ids with the separator"):
                prepare(tmp_path / "data.csv", write_schema(tmp_path, {"tags": "multi"}), tmp_path / "out")
        else:  # not in brackets: a text
            prepare(tmp_path / "data.csv", write_schema(tmp_path, {"tags": "multi"}), tmp_path / "out")
            assert values_of(tmp_path, "tags") == [('["a"', 5)]


@pytest.mark.parametrize("text", ["1,0,\\N\n1,0,Vinh\n", "1,0,Vinh\r\n1,0,\\N", "\\N,0,Vinh\n"])
def test_a_null_of_mysql_is_no_letter(tmp_path: Path, text: str) -> None:
    r"""With csv.escape, `\N` would be read as `N`; without it, it can be a missing value. `A\N` is `AN`."""
    (tmp_path / "data.csv").write_text("click,bought,city\n" + text, encoding="utf-8")
    schema = write_schema(tmp_path, {"city": "categorical"}, csv={"escape": "\\"})
    with pytest.raises(UserError, match=r"data.csv: found \\N, which csv.escape reads as N, allowed: empty cells, or"):
        prepare(tmp_path / "data.csv", schema, tmp_path / "out")
    (tmp_path / "data.csv").write_text("click,bought,city\n1,0,A\\N\n", encoding="utf-8")
    prepare(tmp_path / "data.csv", schema, tmp_path / "out")
    assert values_of(tmp_path, "city") == [("AN", 1)]
    if text.startswith("1"):
        prepare_text(tmp_path, "click,bought,city\n" + text, {"city": "categorical"}, missing_values=["\\N"])
        assert values_of(tmp_path, "city") == [("Vinh", 1)]
