"""Every line of the table of docs/data.md on tables: files as its left side says, the schema as its right side says."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import ROOT
from raw_tables import ALL_TRAINING, column, values_of
from test_aliccp import COMMON, SKELETON, line

from pipeline.data.schema import DataSchema
from pipeline.tasks.mmoe.prepare.preparation import prepare

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Tables$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
BASE = {"labels": {"click": "click", "conversion": "bought"}, "features": {"city": "categorical", "price": "numeric"},
        "split": ALL_TRAINING}  # fmt: skip
HEADER, ROWS = "click,bought,city,price", ["1,1,Huế,1234.5", "1,0,Vinh,20", "0,0,Huế,3"]
PLAIN = "\n".join([HEADER, *ROWS]) + "\n"
TAGGED = "click,bought,tags,tag_weights\n"

Write = Callable[[Path], Path]
Check = Callable[[Path, DataSchema], None]


def lines() -> dict[str, str]:
    """What you have -> what you write."""
    assert SECTION
    rows = [re.split(r"(?<!\\)\|", row)[1:-1] for row in SECTION[1].splitlines() if row.startswith("|")]
    table = [tuple(cell.strip() for cell in row) for row in rows[2:]]
    assert all(len(row) == 2 for row in table)
    assert len({have for have, _ in table}) == len(table)
    return dict(table)  # type: ignore[arg-type]


def csv(text: str, name: str = "data.csv", encoding: str = "utf-8") -> Write:
    def write(folder: Path) -> Path:
        content = text.encode(encoding)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return folder / name

    return write


def files(texts: dict[str, str]) -> Write:
    def write(folder: Path) -> Path:
        for name, text in texts.items():
            file = folder / "data" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return folder / "data"

    return write


def parquet(folder: Path) -> Path:
    rows = [row.split(",") for row in ROWS]
    frame = pd.DataFrame(rows, columns=HEADER.split(",")).astype({"click": int, "bought": int, "price": float})
    frame.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def json_lines() -> str:
    rows = [dict(zip(HEADER.split(","), row.split(","), strict=True)) for row in ROWS]
    return "\n".join(json.dumps(row) for row in rows)


def usual(folder: Path, schema: DataSchema) -> None:
    """The same three rows, whatever they were written as."""
    found = [column(folder, name) for name in ("click", "conversion", "price")]
    assert found == [[1, 1, 0], [1, 0, 0], [1234.5, 20, 3]]
    assert values_of(folder, "city") == [("Huế", 2), ("Vinh", 1)]
    assert not schema.click_only
    assert not schema.sample_weight


def has(name: str, *expected: Any, split: str = "train") -> Check:
    """The values of a column, each of its rows."""

    def check(folder: Path, _: DataSchema) -> None:
        assert column(folder, name, split) == list(expected)

    return check


def all_of(*checks: Check) -> Check:
    def check(folder: Path, schema: DataSchema) -> None:
        for each in checks:
            each(folder, schema)

    return check


def values(name: str, *expected: tuple[str, int]) -> Check:
    def check(folder: Path, _: DataSchema) -> None:
        assert values_of(folder, name) == list(expected)

    return check


def rows(**expected: int) -> Check:
    def check(_: Path, schema: DataSchema) -> None:
        assert {name: split.rows for name, split in schema.splits.items()} == expected

    return check


def of_clicks(folder: Path, schema: DataSchema) -> None:
    assert schema.click_only
    assert column(folder, "click") == [1, 0]


def of_criteo(folder: Path, schema: DataSchema) -> None:
    of_clicks(folder, schema)
    assert [column(folder, name) for name in ("I1", "I2")] == [[3, 0], [5, 5]]
    assert values_of(folder, "C1") == [("68fd1e64", 2)]
    assert [feature.size for feature in schema.features[2:]] == [3, 14]  # 2, and what is known, and the buckets


def of_users(folder: Path, schema: DataSchema) -> None:
    prices = {split: {int(price) % 50 for price in column(folder, "price", split)} for split in schema.splits}
    assert sum(split.rows for split in schema.splits.values()) == 200
    assert all(prices.values())
    assert not prices["train"] & prices["validation"]
    assert not prices["train"] & prices["test"]
    assert not prices["validation"] & prices["test"]


def of_aliccp(folder: Path, schema: DataSchema) -> None:
    assert [feature.name for feature in schema.features] == ["101", "205"]
    assert (sum(split.rows for split in schema.splits.values()), schema.splits["train"].rows > 0) == (40, True)


def aliccp(folder: Path) -> Path:
    data = folder / "aliccp"
    data.mkdir()
    samples = "".join(line(f"{number},{number % 2},0,user", f"205={number % 3}") for number in range(40))
    (data / SKELETON).write_text(samples)
    (data / COMMON).write_text(line("user", "101=7"))
    return data


DAYS = "click,bought,city,price,day\n" + "".join(f"0,0,a,{day},{day}\n" for day in (9, 1, 8, 7, 2))
USERS = "click,bought,city,price,user\n" + "".join(f"0,0,a,{row},u{row % 50}\n" for row in range(200))
WEIGHTED = all_of(has("tags", [3, 2], [2]), has("tags.weights", [0.5, 2], [1]))
WIDE = PLAIN.replace("Huế", " Huế ")

CASES: dict[str, tuple[Write, Check]] = {
    "CSV whose first line names the columns": (csv(PLAIN), usual),
    "CSV without a header": (csv("\n".join(ROWS)), usual),
    "semicolons and decimal commas: `1;0;Huế;1.234,5`": (
        csv(PLAIN.replace(",", ";").replace("1234.5", "1.234,5")), usual),
    'commas and marks of thousands: `1,0,Huế,"1,234.5"`': (csv(PLAIN.replace("1234.5", '"1,234.5"')), usual),
    "tabs (`.tsv`, `.txt`)": (csv(PLAIN.replace(",", "\t"), "data.tsv"), usual),
    "values in single quotes": (
        csv(PLAIN.replace("Vinh", "'Vinh, \"mới\"'")), values("city", ("Huế", 2), ('Vinh, "mới"', 1))),
    'quotes that are part of the text: `5" disk`': (
        csv(PLAIN.replace("Vinh", '5" disk')), values("city", ("Huế", 2), ('5" disk', 1))),
    "quotes escaped with a backslash (Spark, Hive, MySQL)": (
        csv(PLAIN.replace("Vinh", '"5\\" disk, new"')), values("city", ("Huế", 2), ('5" disk, new', 1))),
    "text in another encoding (Windows, Vietnamese)": (
        csv(PLAIN.replace("ế", "ê\u0301"), encoding="cp1258"), values("city", ("Huế", 2), ("Vinh", 1))),
    'UTF-16 with tabs (Excel\'s "Unicode text")': (
        csv(PLAIN.replace(",", "\t"), "data.txt", encoding="utf-16"), usual),
    "spaces around values that mean something": (csv(WIDE), values("city", (" Huế ", 2), ("Vinh", 1))),
    "compressed CSV (`.csv.gz`)": (csv(PLAIN, "data.csv.gz"), usual),
    "JSON Lines (`.jsonl`, `.jsonl.gz`)": (csv(json_lines(), "data.jsonl.gz"), usual),
    "Parquet": (parquet, usual),
    "a folder of files in one format": (
        files({"1.csv": "\n".join([HEADER, ROWS[0]]), "2.csv": "\n".join([HEADER, *ROWS[1:]])}), usual),
    "a folder with `train.csv`, `validation.csv` and `test.csv`": (
        files({"train.csv": PLAIN, "validation.csv": f"{HEADER}\n{ROWS[0]}\n", "test.csv": f"{HEADER}\n{ROWS[2]}\n"}),
        all_of(usual, has("price", 1234.5, split="validation"), has("price", 3, split="test"))),
    "a folder of shards: `train-00000-of-00002.csv`, ..., `test-00000-of-00001.csv` (Hugging Face)": (
        files({"train-00000-of-00002.csv": "\n".join([HEADER, ROWS[0]]), "test-00000-of-00001.csv": PLAIN,
               "train-00001-of-00002.csv": "\n".join([HEADER, *ROWS[1:]])}),
        all_of(usual, rows(train=3, validation=0, test=3))),
    "a folder per day: `day=7/part.csv`": (
        files({"day=7/part.csv": PLAIN, "day=8/part.csv": f"{HEADER}\n{ROWS[1]}\n"}),
        all_of(rows(train=3, validation=0, test=1), has("price", 20, split="test"))),
    "labels as 0 and 1, or `true` and `false`": (
        csv(PLAIN.replace("\n1,1", "\nTrue,true").replace("\n0,0", "\nfalse,FALSE")), usual),
    "labels that follow from other columns": (
        csv("seconds,paid_at,city,price\n9,2024-05-01,Huế,1234.5\n4,,Vinh,20\n1,,Huế,3\n"), usual),
    "clicks alone (Avazu)": (csv("click,city,price\n1,a,1\n0,b,2\n"), of_clicks),
    "Criteo: tabs, no header; label, counts `I1`..., hashed categories `C1`...": (
        csv("1\t3\t5\t68fd1e64\t80e26c9b\n0\t\t\t68fd1e64\tfb936136\n", "train.txt"), of_criteo),
    "the original files of Ali-CCP": (aliccp, of_aliccp),
    "a weight of each row": (
        csv("click,bought,city,price,weight\n1,1,a,1,2.5\n0,0,b,2,1\n"), has("sample_weight", 2.5, 1)),
    "a code that is a category: `33` is not more than `4`": (
        csv("click,bought,city,price\n0,0,a,33\n0,0,b,4\n0,0,b,33\n"), has("price", 2, 3, 2)),
    "several ids in a cell: `a/b`": (csv(f"{TAGGED}1,1,a/b,\n0,0,,\n1,0,b,\n"), has("tags", [3, 2], [], [2])),
    "ids with weights: `a:0.5 b:2`": (csv(f"{TAGGED}1,1,a:0.5 b:2,\n1,0,b:1,\n"), WEIGHTED),
    "weights in a column of their own": (csv(f"{TAGGED}1,1,a b,0.5 2\n1,0,b,1\n"), WEIGHTED),
    'lists as JSON writes them: `["a", "b"]`': (
        csv(f'{TAGGED}1,1,"[""a, ê"", ""b""]",\n1,0,"[""b"", null]",\n'), values("tags", ("b", 2), ("a, ê", 1))),
    "lists as Python writes them: `['a', 'b']`": (
        csv(f"{TAGGED}1,1,\"['a, ê', 'b']\",\n1,0,\"['b', None]\",\n"), values("tags", ("b", 2), ("a, ê", 1))),
    "numbers that are missing": (csv("click,bought,city,price\n1,1,a,2\n0,0,b,\n0,0,b,4\n"), has("price", 2, 3, 4)),
    'texts that mean "no value"': (csv(PLAIN.replace("Vinh", "?").replace("Huế", "NA")), has("city", 2, 1, 2)),
    "rare ids, and ids that come later": (csv(PLAIN), values("city", ("Huế", 2))),
    "users whose rows must stay together": (csv(USERS), of_users),
    "days, the last ones for the test": (
        csv(DAYS), all_of(has("price", 1, 2), has("price", 7, split="validation"), has("price", 9, 8, split="test"))),
    "a column with a space in its name, or a sign": (
        csv("Watch time,Paid at,city,price\n9,2024-05-01T00:00:00,Huế,1234.5\n4,2024-04-30 23:00:00,Vinh,20\n"
            "1,,Huế,3\n"),
        usual),
}  # fmt: skip


def test_every_line_has_a_case() -> None:
    assert set(lines()) == set(CASES)


@pytest.mark.parametrize("have", lines())
def test_a_line_of_the_table(tmp_path: Path, have: str) -> None:
    what = lines()[have]
    tree: dict[str, Any] = {} if what == "nothing" else yaml.safe_load(re.fullmatch(r"`+(\{.*\})`+", what)[1])  # type: ignore[index]
    write, check = CASES[have]
    data = write(tmp_path)
    schema = tmp_path / "schema.yaml"
    if tree.get("format") != "aliccp":
        if have.startswith("a folder per day"):  # three rows would be divided at random
            tree["split"] |= {"train": 1.0, "validation": 0.0}
        tree = BASE | tree
    schema.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
    check(tmp_path, prepare(data, schema, tmp_path / "out"))


def test_the_page_says_what_is_out_of_scope() -> None:
    assert SECTION
    assert "More targets" in SECTION[1]
    assert "out of scope" in SECTION[1]
