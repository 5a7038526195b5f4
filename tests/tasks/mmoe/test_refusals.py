"""Bad input of `prepare_ctr`: one line that says what and where."""

import gzip
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from raw_tables import GOOD, LABELS, PLAIN, write_schema

from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.preparation import prepare


def refusal(folder: Path, data: Path, features: dict[str, Any] = PLAIN, **keys: Any) -> str:
    """The error message, which must be one short line."""
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


@pytest.mark.parametrize(("text", "expected"), [
    ("click,bought,city,price\n1,1,a,1\n2,0,b,2\n", "row 2, column click: found '2', allowed: 0 or 1"),
    ("click,bought,city,price\n1,1,a,1\n,0,b,2\n", "row 2, column click: found '', allowed: 0 or 1"),
    ("click,bought,city,price\n1,maybe,a,1\n", "row 1, column bought: found 'maybe', allowed: 0 or 1"),
    ("click,bought,city,price\n1,1,a,1\n1,0,a,1\n0,1,b,2\n", "row 3: a conversion (bought) without a click (click)"),
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
    ("click,bought,city,city\n1,1,a,1\n", "column city appears twice"),
    ("click,bought,city,price\n", "no rows, allowed: at least one training row"),
    ("", "the file is empty"),
    ("\n\n", "no rows"),
    ('click,bought,city,price\n1,1,a,1\n1,1,a,"2\n1,1,a,3\n', "row 2: found a quote that is never closed"),
    ('click,bought,city,price\n1,1,"disk 5\\" SATA",1\n', "row 1: found text after a closing quote, allowed: quotes"),
    ('click,bought,city,price\n1,1,a,1\n\n1,1,"b" c,1\n', "row 2: found text after a closing quote"),
    ("PK\x03\x04", "found a ZIP archive; unpack it, allowed: UTF-8 text"),
])  # fmt: skip
def test_bad_csv(tmp_path: Path, text: str, expected: str) -> None:
    data = tmp_path / "data.csv"
    data.write_text(text, encoding="utf-8")
    features = PLAIN if text.count("city") < 2 else {"city": "categorical"}
    message = refusal(tmp_path, data, features)
    assert expected in message
    assert str(data) in message or "schema.yaml" in message


@pytest.mark.parametrize(("features", "keys", "expected"), [
    (PLAIN | {"click": "categorical"}, {}, "features.click: a label reads column click; as a feature it would leak"),
    (PLAIN, {"labels": LABELS | {"conversion": "click and city == 'a'"}}, "features.city: a label reads column city"),
    (PLAIN, {"labels": LABELS | {"click": "price > 1"}}, "features.price: a label reads column price"),
    ({"city": {"kind": "multi", "weights": "bought"}}, {}, "features.city: a label reads column bought"),
    (PLAIN, {"labels": LABELS | {"click": "price >"}}, "neither a column of"),
    (PLAIN, {"labels": LABELS | {"click": "pricy > 3"}}, "labels.click: no column pricy; did you mean price?"),
    (PLAIN, {"labels": LABELS | {"click": 'bought != "NA"'}}, "compares with 'NA', which missing_values reads as no"),
    (
        {"price": "numeric"},
        {"labels": {"click": "bought", "conversion": 'click and city == "a"'}},
        "labels.conversion: click is both a column of",
    ),
    (PLAIN, {"split": {"test": {"where": "days > 3"}}}, "split.test.where: no column days"),
    (PLAIN, {"split": {"test": {"where": "days >"}}}, "split.test.where: neither a column"),
    (PLAIN, {"split": {"test": {"when": "price > 3"}}}, "split.test"),
    (PLAIN, {"split": {"test": "price >= 8"}}, "(a condition is written {where: 'day >= 8'}; a file is n"),
    (PLAIN, {"split": {"validation": "NL/dev.csv"}}, "a file is named by data.validation)"),
    (PLAIN, {"labels": LABELS | {"click": 'bought != "-1.0"'}, "missing_values": ["-1"]}, "compares with '-1.0'"),
    ({"city": "categorical", False: "categorical"}, {}, "features: found key false, allowed: text; write it in q"),
    (PLAIN, {"columns": ["click", False]}, "YAML reads it as false: write the name in quotes"),
    (PLAIN, {"csv": {"delimiter": ",,"}}, "csv.delimiter: found ',,', allowed: an ASCII character"),
    (PLAIN, {"csv": {"escape": ","}}, "csv.escape: found ',', which is csv.delimiter"),
    ({"price": "numeric"}, {"labels": LABELS | {"click": "city < 3"}}, "row 1, column city: found 'a', allowed: a nu"),
    (PLAIN, {"split": {"by": "town"}}, "split.by: no column town"),
    ({"price": {"kind": "multi", "weights": "weight"}}, {}, "features.price.weights: no column weight"),
    ({"price": {"kind": "numeric", "missing": 1e39}}, {}, "features.price.missing: found 1e+39"),
    ({"price": {"kind": "categorical", "bins": 3}}, {}, "bins has no meaning for kind categorical"),
    ({"price": "number"}, {}, "features.price.kind"),
    (PLAIN, {"csv": {"delimiter": "é"}}, "csv.delimiter: found 'é', allowed: an ASCII character"),
    (PLAIN, {"columns": ["click", "bought", "city"]}, "row 1: found 4 columns, allowed: 3"),
    ({"city": {"kind": "multi", "weight_separator": ":"}}, {}, "row 1, column city: found no value, allowed: a finit"),
    ({"city": {"kind": "multi", "weights": "price", "separator": "b"}}, {}, "row 2, column price: found 1 weights for"),
    (PLAIN, {"split": {"train": 1e-9, "validation": 0.5, "test": 0.5 - 1e-9}}, "3 rows, none of them in the training"),
])  # fmt: skip
def test_bad_schema(tmp_path: Path, features: dict[str, Any], keys: dict[str, Any], expected: str) -> None:
    data = tmp_path / "data.csv"
    data.write_text(GOOD, encoding="utf-8")
    if keys.get("columns"):
        features = {"city": "categorical"}
    assert expected in refusal(tmp_path, data, features, **keys)


@pytest.mark.parametrize(("text", "features", "expected"), [
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
])  # fmt: skip
def test_features_that_the_data_cannot_have(tmp_path: Path, text: str, features: dict[str, Any], expected: str) -> None:
    (tmp_path / "data.csv").write_text(text, encoding="utf-8")
    assert expected in refusal(tmp_path, tmp_path / "data.csv", features)


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


@pytest.mark.parametrize(("text", "expected"), [
    ('{"click": 1, "bought": 0, "city": "a", "price": 1}\n{"click": 1,\n', "row 2: not JSON"),
    ('{"click": 1, "bought": 0, "city": "a", "price": 1}\n\n[1]\n', "row 2: found b'[1]\\n', allowed: an object"),
    ('{"click": 1, "click": 1, "bought": 0, "city": "a", "price": 1}', "row 1: not JSON: key 'click' appears twice"),
    ('{"click": 1, "bought": 0, "city": {"a": 1}, "price": 1}', "row 1, column city: found {'a': '1'}, allowed: texts"),
    ('{"click": 1, "bought": 0, "city": [{"a": 1}], "price": 1}', "row 1, column city: found [{'a': '1'}], allowed:"),
    ('{"click": 1, "bought": 0, "city": "\\ud83d", "price": 1}', "row 1, column city: found '\\ud83d', allowed: texts"),
    ('{"click": 1, "bought": 0, "town": "a", "price": 1}', "no column city"),
    ('{"click": 1, "bought": 0, "city": "a", "price": "x"}', "row 1, column price: found 'x', allowed: a number"),
])  # fmt: skip
def test_bad_json(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    assert expected in refusal(tmp_path, tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", ["part.json", "x.ndjson", "part.JSON.gz"])
def test_json_by_another_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"click": 1, "bought": 0, "city": "a", "price": 1}')
    assert f"{name}: found JSON by its name, allowed: one object per line in a file called .jsonl" in refusal(
        tmp_path, tmp_path / name
    )


@pytest.mark.parametrize("marks", [{"thousands": "."}, {"decimal": ","}])
def test_marks_in_numbers_of_json(tmp_path: Path, marks: dict[str, str]) -> None:
    """With points between thousands, 1.234 would be read as 1234."""
    (tmp_path / "data.jsonl").write_text('{"click": 1, "bought": 0, "city": "a", "price": 1.234}')
    marks = {"decimal": ",", **marks}
    assert "numbers of JSON have a" in refusal(tmp_path, tmp_path / "data.jsonl", csv=marks)


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
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(b'{"click": 1, "bought": 0, "city": "a", "price": 1}' * 9)[:-6])
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
    """A folder, used without root privileges (root may read everything)."""
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
