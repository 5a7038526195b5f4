"""Intervals on new rows from runs' stored test rows, against sklearn and the definitions in O(rows^2)."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from sklearn.metrics import average_precision_score, roc_auc_score
from test_compare import Store, arm, new_store, rows_of
from test_row_covariance import Array, delong, off_diagonal_mean, wins

from pipeline.comparison.new_rows import MetricRows, new_rows
from pipeline.comparison.verdicts import compare, load_runs, to_markdown, to_text
from pipeline.names import TEST_ROWS_FILE

pytestmark = pytest.mark.xdist_group("compare")

SEEDS, ROWS = 3, 120
LABEL = [math.nan, *[1.0, 0, 0, 0, 0, 0] * (ROWS // 6)]  # the first row is none of the metric's


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Store]:
    with new_store(tmp_path_factory.mktemp("rows"), empty_store) as store:
        yield store


def scores(seeds: int = SEEDS) -> dict[str, Array]:
    """[seeds, rows] of three arms. The arms' runs share half of their variance with each other."""
    random, event = np.random.default_rng(0), np.array(LABEL[1:], dtype=bool)
    found = {}
    for name, shift in (("baseline", 1.0), ("arm", 1.4), ("other", 0.8)):
        found[name] = shift * event + random.normal(size=ROWS) + random.normal(size=(seeds, ROWS))
    return found


def log_scores(store: Store, sweep: str, logged: dict[str, Array]) -> None:
    for name, own in logged.items():
        for seed, score in enumerate(own):
            rows = rows_of(LABEL, [9.0, *score])
            store.run(name, seed, {"test/auc_ctcvr": roc_auc_score(LABEL[1:], score)}, rows=rows, sweep_id=sweep)


def test_the_interval_of_an_auc_is_delongs_over_seeds(store: Store) -> None:
    log_scores(store, "aucs", own := scores())
    runs = load_runs("aucs")
    result, event = compare(runs), np.array(LABEL[1:], dtype=bool)
    areas = {name: [wins(score[event], score[~event]) for score in mine] for name, mine in own.items()}
    for name in ("arm", "other"):
        gained = [mine - base for mine, base in zip(areas[name], areas["baseline"], strict=True)]
        covariance = off_diagonal_mean(delong(gained))
        differences = [one.mean() for one in gained]
        seeds_variance = np.var(differences, ddof=1) / SEEDS
        degrees = (seeds_variance + covariance) ** 2 / (seeds_variance**2 / 2 + covariance**2 / 19)
        found = arm(result, name).new_rows
        half = max(t.isf(found.level / 2, degrees) * math.sqrt(seeds_variance + covariance),
                   t.isf(found.level / 2, 2) * math.sqrt(seeds_variance))  # fmt: skip
        assert (found.mean, found.rows_variance) == pytest.approx((np.mean(differences), covariance))
        assert (found.low, found.high) == pytest.approx((np.mean(differences) - half, np.mean(differences) + half))
        assert (found.deciding_rows, found.rows_name) == (20, "conversions")
    assert arm(result, "baseline").new_rows is None
    assert not [note for note in result.notes if "new rows" in note]
    for text in (to_text(result), to_markdown(result)):
        assert "20 conversions decide" in text
    without = compare(runs, new_rows=False)
    assert [one.new_rows for one in without.arms] == [None] * 3
    assert [one.verdict for one in without.arms] == [one.verdict for one in result.arms]


def table(store: Store, sweep: str) -> tuple[dict[str, pd.DataFrame], dict[str, dict[int, float]]]:
    runs = load_runs(sweep)
    groups = {str(name): group for name, group in runs.groupby("arm", sort=False)}
    values = {name: dict(zip(group["seed"], group["metrics.test/auc_ctcvr"], strict=True))
              for name, group in groups.items()}  # fmt: skip
    return groups, values


def test_seeds_and_levels_are_those_asked_for_and_each_run_is_read_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.comparison.new_rows import artifact as read

    log_scores(store, "looks", scores(5))
    groups, values = table(store, "looks")
    opened: list[str] = []
    monkeypatch.setattr(
        "pipeline.comparison.new_rows.artifact", lambda run, *rest: opened.append(run) or read(run, *rest)
    )
    values["arm"] = {seed: values["arm"][seed] for seed in (0, 1, 2)}  # decided at the look of three seeds
    found = new_rows(groups, values, "baseline", "test/auc_ctcvr", {"arm": 0.05, "other": 0.01}, notes := [])
    assert (found["arm"].seeds, found["other"].seeds, notes) == (3, 5, [])
    assert len(opened) == len(set(opened)) == 3 + 5 + 5
    assert set(new_rows(groups, values, "baseline", "test/auc_ctcvr", {"other": 0.01}, notes)) == {"other"}
    strict = new_rows(groups, values, "baseline", "test/auc_ctcvr", {"other": 0.001}, notes)
    assert strict["other"].high - strict["other"].low > found["other"].high - found["other"].low
    opened.clear()
    assert new_rows(groups, values, "baseline", "valid/auc_ctcvr", {"other": 0.05}, notes) == {}
    values["other"] = {4: values["other"][4]}
    assert new_rows(groups, values, "baseline", "test/auc_ctcvr", {"other": 0.05}, notes) == {}
    assert opened == []


def log_ratio(store: Store, sweep: str, name: str, runs: dict[str, Sequence[Any]]) -> None:
    for arm_name, seeds in runs.items():
        for seed, (above, below) in enumerate(seeds):
            rows = {f"numerator/{name}": above, f"denominator/{name}": below}
            store.run(arm_name, seed, {f"test/{name}": sum(above) / sum(below)}, rows=rows, sweep_id=sweep)


def test_the_interval_of_a_mean_is_that_of_its_rows(store: Store) -> None:
    """Ratios over ones are means: c is the covariance of the rows' differences over the number of rows."""
    random = np.random.default_rng(1)
    shared = random.normal(0.3, 1, 200)
    base, own = random.normal(size=(3, 200)), random.normal(size=(3, 200)) + shared
    ones = [1.0] * 200
    log_ratio(store, "means", "loss_x", {name: [(list(values), ones) for values in runs]
                                         for name, runs in (("baseline", base), ("arm", own))})  # fmt: skip
    found = arm(compare(load_runs("means"), "test/loss_x"), "arm").new_rows
    assert found.rows_variance == pytest.approx(off_diagonal_mean(np.cov(own - base)) / 200)
    assert found.rows_name == "rows"
    assert 30 < found.deciding_rows < 200  # Gaussian influences: about 200 / 3


def test_rows_that_make_another_metric_than_was_logged_give_no_interval(store: Store) -> None:
    """PR-AUC beside label and score, whose AUC is another number; F1 macro beside the sums of F1 micro."""
    label, random = np.repeat([1, 0], [40, 160]), np.random.default_rng(0)
    for seed in range(3):
        for arm_name, shift in (("baseline", 0.5), ("better", 1.0), ("good", 1.5)):
            score = random.standard_normal(200) + shift * label
            hits, pairs = random.integers(0, 3, 200), random.integers(3, 6, 200)
            logged = {
                "test/pr_auc_x": average_precision_score(label, score),
                "test/auc_x": roc_auc_score(label, score),
                "test/logloss_x": float(np.mean(score, dtype=np.float32)),  # a mean of rows, in float32
                "test/f1_macro": np.mean(hits / pairs),
                "test/f1_micro": hits.sum() / pairs.sum() if (arm_name, seed) != ("better", 1) else 0.5,
            }
            rows = rows_of(label, score.astype(np.float32), "pr_auc_x") | rows_of(label, score, "auc_x")
            for name, above, below in (("logloss_x", score, np.ones(200)), *(
                (f"f1_{kind}", hits, pairs) for kind in ("macro", "micro"))):  # fmt: skip
                rows |= {f"numerator/{name}": above, f"denominator/{name}": below}
            store.run(arm_name, seed, logged, rows=rows, sweep_id="other metrics")
    runs = load_runs("other metrics")
    noted = "no interval on new rows, because test/{} recomputed from the test rows is not the logged one: "
    for name, kind in (("pr_auc_x", "AUC"), ("f1_macro", "ratio of sums")):
        result = compare(runs, f"test/{name}")
        assert [one.new_rows for one in result.arms] == [None] * 3
        (note,) = (note for note in result.notes if "new rows" in note)
        assert note.startswith(noted.format(name) + f"baseline s0 ({kind} 0.")
        assert f"logged {result.arms[0].values[0]:.9g}" in note
    for name in ("auc_x", "logloss_x", "f1_micro"):
        result = compare(runs, f"test/{name}")
        assert arm(result, "good").new_rows.rows_name == ("positive rows" if name == "auc_x" else "rows")
        assert (arm(result, "better").new_rows is None) == (name == "f1_micro")
        assert [note.startswith(noted.format(name) + "better s1 (ratio of sums 0.") and note.endswith(", logged 0.5)")
                for note in result.notes if "new rows" in note] == [True] * (name == "f1_micro")  # fmt: skip


def test_other_rows_missing_rows_and_a_broken_file_give_no_interval(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    log_scores(store, "broken", own := scores() | {"third": scores()["arm"] + 1})
    moved = [math.nan, *[0, 1.0, 0, 0, 0, 0] * (ROWS // 6)]
    for seed, score in enumerate(own["other"]):
        auc = roc_auc_score(moved[1:], score)
        store.run("moved", seed, {"test/auc_ctcvr": auc}, rows=rows_of(moved, [9.0, *score]), sweep_id="broken")
    runs = load_runs("broken")
    ids = {(name, seed): run for name, seed, run in zip(runs["arm"], runs["seed"], runs["run_id"], strict=True)}
    (store.artifacts(ids["other", 1]) / TEST_ROWS_FILE).unlink()
    (store.artifacts(ids["third", 2]) / TEST_ROWS_FILE).write_bytes(b"PAR1")
    result = compare(runs)
    assert {one.name: one.new_rows is not None for one in result.arms} == {
        "baseline": False, "arm": True, "other": False, "third": False, "moved": False,
    }  # fmt: skip
    assert [note for note in result.notes if "new rows" in note] == [
        "no interval on new rows, because test rows differ from the baseline's: moved s0",
        "no interval on new rows, because test rows are missing: other s1, third s2",
    ]
    assert TEST_ROWS_FILE in capsys.readouterr().err
    (store.artifacts(ids["baseline", 0]) / TEST_ROWS_FILE).unlink()
    result = compare(runs)
    assert {one.new_rows for one in result.arms} == {None}
    assert [note for note in result.notes if "missing: baseline s0" in note]


def test_seeds_that_all_differ_by_nothing_give_no_interval(store: Store) -> None:
    """Best weights from before the gate are the baseline's: no difference, and no knowledge of one."""
    own = scores()
    log_scores(store, "gate", {"baseline": own["baseline"], "arm": own["baseline"]})
    result = compare(load_runs("gate"))
    assert arm(result, "arm").difference.mean == 0
    assert arm(result, "arm").new_rows is None


def test_rounding_of_rows_to_float32_is_no_other_metric() -> None:
    """Scores that differ in float64 alone are ties in float32, and the AUC of the rows is another."""
    label, random = np.repeat([1.0, 0.0], 500), np.random.default_rng(1)
    score = 1 + np.where(random.random(1000) < 0.5, random.random(1000) * 1e-8, random.standard_normal(1000))
    rows = MetricRows(label, score.astype(np.float32).astype(np.float64), labelled=True)
    logged = roc_auc_score(label, score)
    assert abs(rows.metric() - logged) > 1e-5
    assert rows.reproduce(logged)
    assert not rows.reproduce(logged + 0.2)
    assert not any(MetricRows(label * 0, score, labelled=True).reproduce(value) for value in (0.0, 0.5, math.nan))
    assert not any(MetricRows(label, score * 0, labelled=False).reproduce(value) for value in (0.0, math.nan, math.inf))
