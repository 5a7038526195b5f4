"""The scripts of docs/findings: worlds with a known truth, and the tests of confirmations."""

import math
import sys
from types import SimpleNamespace as Fake
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import t

sys.path.append(str(ROOT / "docs" / "findings"))

import confirm
import worlds

ROWS, TRAIN = 20_000, 12_000


def labelled(monkeypatch: pytest.MonkeyPatch, swapped: float) -> pd.DataFrame:
    monkeypatch.setattr(worlds, "ENDS", {"train": TRAIN, "validation": 14_000, "test": ROWS})
    random = np.random.default_rng(5)
    rows = pd.DataFrame({"user": np.arange(ROWS), "p_ctr": random.uniform(0.01, 0.1, ROWS),
                         "p_cvr": random.uniform(0.01, 0.1, ROWS)})  # fmt: skip
    return worlds.world(rows, ctr=0.3, cvr=0.2, swapped=swapped)


def test_labels_are_drawn_at_the_rates_and_ranked_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = labelled(monkeypatch, 0)
    assert rows["p_ctr"].mean() == pytest.approx(0.3)
    assert np.average(rows["p_cvr"], weights=rows["p_ctr"]) == pytest.approx(0.2)
    for label, p in (("click", rows["p_ctr"]), ("conversion", rows["p_ctr"] * rows["p_cvr"])):
        assert abs(rows[label].sum() - p.sum()) < 5 * math.sqrt((p * (1 - p)).sum())
    odds = np.log(rows["p_ctr"] / (1 - rows["p_ctr"]))
    before = np.random.default_rng(5).uniform(0.01, 0.1, ROWS)
    assert np.ptp(odds - np.log(before / (1 - before))) < 1e-9  # one shift of all logits


def test_a_share_of_training_conversions_swaps_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, noisy = labelled(monkeypatch, 0), labelled(monkeypatch, 0.3)
    assert (noisy["conversion"] <= noisy["click"]).all()
    train = slice(0, TRAIN - 1)  # of loc, which includes its end
    moved = (noisy["conversion"] - clean["conversion"]).loc[train]
    share = round(0.3 * clean["conversion"].loc[train].sum())
    assert [(moved == -1).sum(), (moved == 1).sum()] == [share, share]
    assert noisy["click"].sum() == clean["click"].sum()
    assert noisy.loc[TRAIN:].equals(clean.loc[TRAIN:])  # labels of the other splits are clean


def arm(name: str, values: dict[int, float], verdict: str = "", mean: float = 0.0) -> Any:
    return Fake(name=name, values=values, verdict=verdict, difference=Fake(mean=mean))


def sweep(design: str, seeds: range, differences: dict[str, list[float]], verdicts: dict[str, str]) -> Any:
    arms = [arm("baseline", dict.fromkeys(seeds, 1.0))]
    arms += [arm(name, {seed: 1 + by for seed, by in zip(seeds, own, strict=True)}, verdicts[name], float(np.mean(own)))
             for name, own in differences.items()]  # fmt: skip
    return Fake(design=design, metric="test/x", mode="max", data_digest="d" * 64, arms=arms)


def test_confirmations_are_one_sided_and_adjusted_over_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = [1.0, 2.0, 3.0, 2.0], [-1.0, 1.0, -2.0, -2.0]
    first = {"up": "better", "down": "worse", "level": "equal within the margin", "alone": "worse"}
    results = {
        "first": sweep("sequential", range(4), dict.fromkeys(first, [0.0] * 4), first),
        "second": sweep("fixed", range(100, 104), {"up": up, "down": down}, {"up": "", "down": ""}),
    }
    monkeypatch.setattr(confirm, "load_sweeps", lambda _: pd.DataFrame({"sweep_id": list(results)}))
    monkeypatch.setattr(confirm, "load_runs", lambda sweep: sweep)
    monkeypatch.setattr(confirm, "compare", lambda runs, **_: results[runs])
    assert "p" not in confirm.confirmations("any")  # four of ten seeds: not finished
    monkeypatch.setattr(confirm, "SEEDS", 4)
    table = confirm.confirmations("any").set_index("arm")
    assert list(table.index) == ["up", "down", "alone"]  # the arm that is equal is not asked about
    # t = mean / (sd / 2): 2 / (sqrt(2 / 3) / 2) up, and 1 / (sqrt(6 / 3) / 2) down
    p_up, p_down = (float(t.sf(value, 3)) for value in (2 / (math.sqrt(2 / 3) / 2), 1 / (math.sqrt(2) / 2)))
    assert table["p"].iloc[:2].tolist() == pytest.approx([p_up, p_down])
    assert table["p (Holm)"].iloc[:2].tolist() == pytest.approx([2 * p_up, p_down])
    assert table["confirmed"].tolist() == [True, False, "not tested"]
    assert table["seeds"].iloc[:2].tolist() == [4, 4]


def test_seeds_that_the_first_sweep_had_confirm_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        "first": sweep("sequential", range(4), {"up": [1.0] * 4}, {"up": "better"}),
        "second": sweep("fixed", range(3, 7), {"up": [1.0, 2.0, 3.0, 2.0]}, {"up": ""}),
    }
    monkeypatch.setattr(confirm, "load_sweeps", lambda _: pd.DataFrame({"sweep_id": list(results)}))
    monkeypatch.setattr(confirm, "load_runs", lambda sweep: sweep)
    monkeypatch.setattr(confirm, "compare", lambda runs, **_: results[runs])
    monkeypatch.setattr(confirm, "SEEDS", 4)
    assert "p" not in confirm.confirmations("any")
