"""Raw tables for `prepare_ctr`: schemas, a small shop, and the columns of what was prepared."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from pipeline.data.schema import DataSchema
from pipeline.tasks.mmoe.prepare.preparation import prepare

LABELS = {"click": "click", "conversion": "bought"}
ALL_TRAINING = {"train": 1.0, "validation": 0.0, "test": 0.0}
GOOD = "click,bought,city,price\n1,1,a,1\n1,0,b,2\n0,0,a,3\n"
PLAIN = {"city": "categorical", "price": "numeric"}
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


def values_of(folder: Path, feature: str) -> list[tuple[str, int]]:
    return [(value, count) for name, value, _, count in vocabulary(folder) if name == feature]


def scalar_splitmix(value: int) -> int:
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
