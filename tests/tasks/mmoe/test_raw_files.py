"""Which files of a folder `prepare_ctr` reads, as which split, and how their columns are called."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_tables import column, values_of, write_schema

from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.preparation import prepare

Stderr = pytest.CaptureFixture[str]


def folder_of(folder: Path, files: dict[str, list[int]]) -> Path:
    """Files with these values of x."""
    for name, numbers in files.items():
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("click,bought,x\n" + "".join(f"0,0,{number}\n" for number in numbers))
    return folder / "data"


def prepared(folder: Path, files: dict[str, list[int]], **own: Path) -> dict[str, list[int]]:
    """The values of x in each split; rows are not divided by shares."""
    schema = write_schema(folder, {"x": "numeric"}, split={"train": 1.0, "validation": 0.0, "test": 0.0})
    prepare(folder_of(folder, files), schema, folder / "out", own=own)
    return {split: values for split in ("train", "validation", "test") if (values := column(folder, "x", split))}


@pytest.mark.parametrize("names", [
    ("train.csv", "test.csv"), ("train-00000-of-00001.csv", "test-00000-of-00001.csv"), ("X_train.csv", "X_test.csv"),
    ("ml_train.csv", "ml_test.csv"), ("Train_1.csv", "TEST_1.csv"), ("a.train.csv", "a.test.csv"),
    ("my train/a.csv", "my test/a.csv"), ("train/day=7/a.csv", "test.csv"),
])  # fmt: skip
def test_splits_by_a_part_of_the_name(tmp_path: Path, names: tuple[str, str], capfd: Stderr) -> None:
    assert prepared(tmp_path, {names[0]: [1, 2], names[1]: [3]}) == {"train": [1, 2], "test": [3]}
    assert ", by its name" in (messages := capfd.readouterr().err)
    assert "warning" not in messages


def test_several_files_of_each_split(tmp_path: Path, capfd: Stderr) -> None:
    files = {f"train-0000{n}-of-00006.csv": [n] for n in range(6)} | {
        "val-1.csv": [7],
        "val-0.csv": [6],
        "test.csv": [8],
    }
    assert prepared(tmp_path, files) == {"train": [0, 1, 2, 3, 4, 5], "validation": [6, 7], "test": [8]}
    assert f"validation: {tmp_path / 'data' / 'val-0.csv'}, val-1.csv, by its name" in capfd.readouterr().err


@pytest.mark.parametrize(("files", "read", "warning"), [
    ({"train.csv": [1], "test.csv": [2], "more.csv": [3]}, [1, 2, 3], "as one with the others: test.csv, train.csv; "),
    ({"log.csv": [1], "log_test.csv": [2]}, [1, 2], "read as one with the others: log_test.csv; "),
    ({"train_test.csv": [1], "test.csv": [2]}, [1, 2], "read as one with the others: test.csv; "),  # the first is both
    ({"test.csv": [1], "val.csv": [2]}, [1, 2], "read as one with the others: test.csv, val.csv; "),
    ({"train_1.csv": [1], "train_2.csv": [2]}, [1, 2], ""),
    ({"latest.csv": [1], "value.csv": [2]}, [1, 2], ""),
    ({"kind=train/a.csv": [1], "kind=test/a.csv": [2]}, [1, 2], ""),  # a column; `where` may make it splits
    ({"train.csv": [1], "test.tsv": [2]}, [1], "not read: test.tsv; allowed: files called .csv"),
    ({"train.csv": [1], "test.csv.zip": [2]}, [1], "not read: test.csv.zip; "),
    ({"train.csv": [1], "test.csv": [2], "archive/old.csv": [3]}, [1, 2], "not read: archive; "),
    ({"a.csv": [1], "week2/b.csv": [2]}, [1], "not read: week2; "),
    ({"a.csv": [1], "week2/deep/b.csv": [2]}, [1], "not read: week2; "),
    ({"a.csv": [1], "plots/b.png": [2], ".git/c.csv": [3], "_old/d.csv": [4]}, [1], ""),
])  # fmt: skip
def test_warnings_of_what_is_pooled_or_not_read(
    tmp_path: Path, files: dict[str, list[int]], read: list[int], warning: str, capfd: Stderr
) -> None:
    splits = prepared(tmp_path, files)
    assert sorted(number for numbers in splits.values() for number in numbers) == read
    messages = capfd.readouterr().err
    assert messages.count("warning: ") == bool(warning)
    assert warning in messages


def test_files_that_are_also_in_the_folder(tmp_path: Path, capfd: Stderr) -> None:
    files = {"train.csv": [1], "test.csv": [2]}
    assert prepared(tmp_path, files, test=tmp_path / "data" / "test.csv") == {"train": [2, 1], "test": [2]}
    assert "read as one with the others: test.csv, train.csv; " in capfd.readouterr().err


@pytest.mark.parametrize("files", [
    {"train/p.csv": [1], "test/p.csv": [2], "items.csv": [3]}, {"train.csv": [1], "train/p.csv": [2]},
    {"a.csv": [1], "test/p.csv": [2]}, {"test/p.csv": [1], "val/p.csv": [2]},
])  # fmt: skip
def test_folders_of_splits_beside_other_data(tmp_path: Path, files: dict[str, list[int]]) -> None:
    with pytest.raises(UserError, match=r"data: found (test|train|test, train|test, val), allowed: train beside"):
        prepared(tmp_path, files)


def test_hidden_and_temporary_folders(tmp_path: Path) -> None:
    files = {"day=7/p.csv": [1], "day=7/.ipynb_checkpoints/p-checkpoint.csv": [2], "day=8/_temporary/0/p.csv": [3],
             "day=8/p.csv": [4], "_delta_log/0.csv": [5]}  # fmt: skip
    assert prepared(tmp_path, files) == {"train": [1, 4]}
    hidden = tmp_path / ".cache" / "_x"  # names above the folder do not count
    hidden.mkdir(parents=True)
    assert prepared(hidden, files) == {"train": [1, 4]}


def test_truth_values_of_folders(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"t=true/a.csv": [1], "t=false/a.csv": [2]})
    split = {"train": 1.0, "validation": 0.0, "test": {"where": 't == "True"'}}
    prepare(data, write_schema(tmp_path, {"x": "numeric"}, split=split), tmp_path / "out")
    assert (column(tmp_path, "x"), column(tmp_path, "x", "test")) == ([2], [1])


@pytest.mark.parametrize(
    "header", ["Click,BOUGHT,Giá", '"click", bought ,giá', unicodedata.normalize("NFD", "click,bought,giá")]
)
def test_a_header_in_another_spelling_is_no_row(tmp_path: Path, header: str) -> None:
    (tmp_path / "data.csv").write_text(f"{header}\n1,0,a\n", encoding="utf-8")
    schema = write_schema(tmp_path, {"giá": "categorical"}, columns=["click", "bought", "giá"])
    prepare(tmp_path / "data.csv", schema, tmp_path / "out")
    assert values_of(tmp_path, "giá") == [("a", 1)]


@pytest.mark.parametrize("name", ["cité ", "cite\u0301", "\tcité"])
def test_names_of_columns_are_stripped_in_every_format(tmp_path: Path, name: str) -> None:
    row: dict[str, Any] = {"click": 1, "bought": 0, name: "a"}
    (tmp_path / "a.csv").write_text(f"click,bought,{name}\n1,0,a\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.table({key: [value] for key, value in row.items()}), tmp_path / "a.parquet")
    (tmp_path / f"p/{name.strip()}=a").mkdir(parents=True)
    (tmp_path / f"p/{name.strip()}=a" / "a.csv").write_text("click,bought\n1,0\n")
    for data in ("a.csv", "a.jsonl", "a.parquet", "p"):
        prepare(tmp_path / data, write_schema(tmp_path, {"cité": "categorical"}), tmp_path / "out")
        assert values_of(tmp_path, "cité") == [("a", 1)], data
    schema = write_schema(tmp_path, {name: "categorical"}, csv={"strip": False})
    prepare(tmp_path / "a.parquet", schema, tmp_path / "out")
    assert len(values_of(tmp_path, unicodedata.normalize("NFC", name))) == 1


def test_conditions_are_matched_in_one_form(tmp_path: Path) -> None:
    """Composed letters in the file, decomposed ones in the schema."""
    (tmp_path / "data.csv").write_text("click,bought,Giá bán,x\n0,0,9,1\n0,0,1,2\n", encoding="utf-8")
    condition = unicodedata.normalize("NFD", "`Giá bán` > 3")
    split = {"train": 1.0, "validation": 0.0, "test": {"where": condition}}
    prepare(tmp_path / "data.csv", write_schema(tmp_path, {"x": "numeric"}, split=split), tmp_path / "out")
    assert (column(tmp_path, "x"), column(tmp_path, "x", "test")) == ([2], [1])
