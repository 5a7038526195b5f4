"""Warnings of features that determine a label, on inputs that deserve them and on ordinary ones."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, Call
from raw_tables import LABELS, write_schema
from sklearn.metrics import roc_auc_score

from pipeline.data.schema import DataSchema
from pipeline.tasks.mmoe.prepare import determining_features as module
from pipeline.tasks.mmoe.prepare.determining_features import determining_features
from pipeline.tasks.mmoe.prepare.preparation import prepare

ROWS = 3000
SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}


def frame() -> pd.DataFrame:
    """Ordinary features of 3,000 rows, with 900 clicks and 300 conversions or so."""
    random = np.random.default_rng(0)
    city = random.integers(0, 20, ROWS)
    click = random.random(ROWS) < 0.2 + 0.01 * city
    bought = click & (random.random(ROWS) < 0.4)
    return pd.DataFrame({
        "click": click.astype(int), "bought": bought.astype(int), "city": city, "session": np.arange(ROWS),
        "user": random.integers(0, 1500, ROWS), "price": random.normal(0, 1, ROWS).round(3) + 0.3 * click,
    })  # fmt: skip


ORDINARY = {"city": "categorical", "session": "categorical", "user": "categorical", "price": "numeric"}


def warnings_of(folder: Path, table: pd.DataFrame, features: dict[str, Any], **keys: Any) -> list[str]:
    table.to_csv(folder / "data.csv", index=False)
    schema_file = write_schema(folder, features, split=SPLIT, **keys)
    schema = prepare(folder / "data.csv", schema_file, folder / "out")
    return list(determining_features(folder / "out", schema))


def test_ordinary_features_are_silent(tmp_path: Path) -> None:
    """A unique id in every row too, which would be perfect on the rows that it is fitted on."""
    assert warnings_of(tmp_path, frame(), ORDINARY) == []


@pytest.mark.parametrize(("label", "kind", "values"), [
    ("click", "categorical", lambda click, _: np.where(click, "seen", "unseen")),
    ("click", "categorical", lambda click, _: np.where(click, "7", "")),  # missing where there was no click
    ("click", "multi", lambda click, _: np.where(click, "home|clicked|a", "home|a")),
    ("click", "multi", lambda click, _: np.where(click, "home|a", "home|bounced|a")),
    ("click", {"kind": "numeric", "missing": "mean"}, lambda click, n: np.where(click, n % 5, "")),
    ("click", "numeric", lambda click, n: np.where(click, 10_000 + n, n)),
    ("click", "numeric", lambda click, n: np.where(click, -n - 1, n)),  # lower means more clicks
    ("bought", "numeric", lambda bought, n: np.where(bought, 20 + n % 7, 0)),
    ("bought", {"kind": "categorical", "hash_buckets": 50, "min_count": 10**6}, lambda b, _: np.where(b, "yes", "no")),
])  # fmt: skip
def test_a_feature_that_determines_a_label_is_named(tmp_path: Path, label: str, kind: Any, values: Any) -> None:
    table = frame()
    table["status"] = values(table[label].to_numpy() == 1, np.arange(ROWS))
    found = warnings_of(tmp_path, table, ORDINARY | {"status": kind})
    named = [text.removeprefix("feature status alone ranks the ").split()[0] for text in found]
    assert {"click": "clicks", "bought": "conversions"}[label] in named
    assert set(named) <= {"clicks", "conversions"}


def test_scores_of_one_feature_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AUC of rates of training rows, on the rows of the validation split."""
    monkeypatch.setattr(module, "SUSPICIOUS", 0.0)
    table = frame()
    (warning, _) = warnings_of(tmp_path, table, {"city": "categorical"})
    parts = {name: pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("train", "validation")}
    train, valid = parts["train"], parts["validation"]
    mean = train["click"].mean()
    rates = {city: (rows["click"].sum() + mean) / (len(rows) + 1) for city, rows in train.groupby("city")}
    area = roc_auc_score(valid["click"], [rates.get(city, mean) for city in valid["city"]])
    assert f"ranks the clicks of validation with an AUC of {area:.4f}: " in warning


def test_few_rows_are_not_judged(tmp_path: Path) -> None:
    """Nine conversions in validation may be ranked perfectly by chance."""
    table = frame().iloc[:150]
    table["status"] = np.where(table["bought"] == 1, "paid", "open")
    found = warnings_of(tmp_path, table, {"status": "categorical"})
    conversions = DataSchema.read(tmp_path / "out").splits["validation"].conversions
    assert 0 < conversions < module.LEAST_ROWS
    assert not [text for text in found if "conversions" in text]


def test_large_splits_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 600)
    monkeypatch.setattr("pipeline.data.prepared_folder.ROW_GROUP_ROWS", 100)
    table = frame()
    table["status"] = np.where(table["click"] == 1, "seen", "unseen")
    assert len(warnings_of(tmp_path, table, ORDINARY | {"status": "categorical"})) >= 1
    rows = module._Rows(tmp_path / "out" / "train.parquet")
    assert rows.file.num_row_groups >= 17
    assert 500 <= len(rows.label("click")) <= 700


def test_worked_examples_are_silent(impressions: Path, tmp_path: Path) -> None:
    """The generated impressions, and a table in the layout of the census."""
    assert list(determining_features(impressions, DataSchema.read(impressions))) == []
    shipped = ROOT / "configs" / "data" / "census.yaml"
    tree, random = yaml.safe_load(shipped.read_text(encoding="utf-8")), np.random.default_rng(0)
    table = pd.DataFrame({name: random.choice(["Not in universe", "?", "NA", "Yes"], 2000) for name in tree["columns"]})
    for name, feature in tree["features"].items():
        if feature == "numeric" or (isinstance(feature, dict) and feature["kind"] == "numeric"):
            table[name] = random.integers(0, 60, 2000)
    married = random.random(2000) < 1 / (1 + np.exp(-(table["age"] - 30) / 5))  # the old are married, nearly always
    table["marital_status"] = np.where(married, "Divorced", "Never married")
    table["income"] = np.where(random.random(2000) < 0.2, "50000+.", "- 50000.")
    text = "\n".join(", ".join(map(str, row)) for row in table.itertuples(index=False))
    (tmp_path / "census.csv.gz").write_bytes(gzip.compress(text.encode()))
    schema = prepare(tmp_path / "census.csv.gz", shipped, tmp_path / "out")
    assert schema.warnings() == []
    assert list(determining_features(tmp_path / "out", schema)) == []


def test_prepare_ctr_prints_it(tmp_path: Path, call_pipeline: Call) -> None:
    table = frame()
    table["invoice"] = np.where(table["bought"] == 1, table["session"], -1)
    table.to_csv(tmp_path / "data.csv", index=False)
    for features, times in (({"city": "categorical"}, 0), ({"city": "categorical", "invoice": "numeric"}, 1)):
        schema = write_schema(tmp_path, features, split=SPLIT, labels=LABELS)
        done = call_pipeline("prepare_ctr", "--data", str(tmp_path / "data.csv"), "--schema", str(schema),
                             "--output_dir", str(tmp_path / "out"), "--tracking.enabled", "false")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("warning: feature invoice alone ranks the conversions of validation") == times
        assert done.stderr.count("warning: ") == times
