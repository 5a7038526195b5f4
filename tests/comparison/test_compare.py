"""Loading runs and comparing arms, against numbers derived by hand and MLflow's own client."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, lending
from hypothesis import given
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.comparison.compare_config import CompareConfig, check_source
from pipeline.comparison.run_loading import points_of_file, points_of_store
from pipeline.comparison.verdicts import (
    Comparison,
    compare,
    load_history,
    load_runs,
    load_sweeps,
    to_frame,
    to_markdown,
    to_text,
    write,
)
from pipeline.config.strict_config import load
from pipeline.errors import UserError
from pipeline.maths.statistics import paired
from pipeline.names import TEST_ROWS_FILE
from pipeline.tracking.client import Point
from pipeline.tracking.writer_client import Writer

UNIT = 1 / 64  # differences of such numbers are exact
LABEL = [None, *[0] * 8, *[1] * 8]  # the first row is none of the metric's
BASE = {0: 0.5, 1: 0.625, 2: 0.75}
DIGEST = "d" * 64
pytestmark = pytest.mark.xdist_group("compare")  # one process makes their store

EARLIER = {"gate/ctr/0": 0.25, "checkpoint/megabytes": 2.0}  # metrics as earlier versions named them
SWEEP, LONELY, SWITCHED = "5eed000000000001", "5eed000000000002", "5eed000000000003"
Points = Sequence[tuple[str, int, float, int]]  # metric, step, value, timestamp


class Store:
    """A tracking store with runs made by hand."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(self.uri)
        self.experiments: dict[str, str] = {}

    def experiment(self, name: str, location: str) -> None:
        self.experiments[name] = self.client.create_experiment(name, location)

    def run(
        self,
        arm: str | None,
        seed: int | None,
        metrics: Mapping[str, float],
        *,
        experiment: str = "sweeps",
        params: Mapping[str, str] | None = None,
        points: Points = (),
        history: bool = True,
        rows: Mapping[str, Any] | None = None,
        status: str = "FINISHED",
        **tags: str | None,
    ) -> str:
        """`points`: logged beside `metrics`, and written to history.parquet where `history`."""
        from mlflow.entities import Metric, Param, RunTag

        run = self.client.create_run(self.experiments[experiment], run_name=arm if seed is None else f"{arm} s{seed}")
        run_id = str(run.info.run_id)
        known = {"arm": arm, "seed": None if seed is None else str(seed), "task": "mmoe", "data_digest": DIGEST}
        known |= {"role": "baseline" if arm == "baseline" else "arm" if arm else None} | tags
        settings = {"evaluation.metric": "valid/auc_ctcvr", "evaluation.mode": "max"} | dict(params or {})
        every = [*points, *((name, 100, value, 7) for name, value in metrics.items())]
        self.client.log_batch(
            run_id,
            [Metric(name, value, time, step) for name, step, value, time in every],
            [Param(key, value) for key, value in settings.items()],
            [RunTag(key, value) for key, value in known.items() if value is not None],
        )
        folder = self.artifacts(run_id)
        folder.mkdir(parents=True)
        if history:
            write_history(every, folder / "history.parquet")
        if rows:
            (folder / TEST_ROWS_FILE).parent.mkdir()
            pq.write_table(pa.table(dict(rows)), folder / TEST_ROWS_FILE)
        self.client.set_terminated(run_id, status)
        return run_id

    def artifacts(self, run_id: str) -> Path:
        """The run's artifact folder according to MLflow."""
        from mlflow.utils.file_utils import local_file_uri_to_path

        return Path(local_file_uri_to_path(self.client.get_run(run_id).info.artifact_uri))


def write_history(points: Points, file: Path) -> None:
    metric, step, value, time = zip(*points, strict=True) if points else ((), (), (), ())
    types = {"metric": pa.string(), "step": pa.int64(), "value": pa.float64(), "timestamp": pa.int64()}
    columns = zip((metric, step, value, time), types.items(), strict=True)
    pq.write_table(pa.table({name: pa.array(values, kind) for values, (name, kind) in columns}), file)


def rows_of(label: Sequence[float | None], score: Sequence[float], name: str = "auc_ctcvr") -> dict[str, Any]:
    return {f"label/{name}": pa.array(label), f"score/{name}": pa.array(score)}


def scores_of(area: float) -> list[float]:
    """Scores whose AUC is a multiple of UNIT, for LABEL: each of the first positives is above all 8 negatives."""
    whole, rest = divmod(round(area / UNIT), 8)
    won = [8] * whole + [rest] * (whole < 8) + [0] * (7 - whole)
    return [9.0, *range(1, 9), *(count + 0.5 for count in won)]


@contextmanager
def new_store(folder: Path, empty_store: Path, artifacts: str = "artifacts") -> Iterator[Store]:
    """A store with the experiment `sweeps`, which MLflow and the pipeline use."""
    import mlflow

    shutil.copyfile(empty_store, folder / "mlflow.db")
    store = Store(folder)
    store.experiment("sweeps", (folder / artifacts).as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store.uri)
        mlflow.set_tracking_uri(store.uri)
        yield store
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Store]:
    """A sweep of three arms and a control over three seeds, and unrelated runs."""
    with new_store(tmp_path_factory.mktemp("compare"), empty_store, "a folder, 100% mine") as store:
        store.experiment("loose", str(store.folder / "loose"))
        fill(store)
        yield store


def fill(store: Store) -> None:
    arms = {  # differences in units, lambda
        "l.1 g1 control": ((0, 1, -1), "0.1"),
        "l.1 g1": ((1, 2, 3), "0.1"),
        "baseline": ((0, 0, 0), "0.1"),
        "l0": ((0, 0, 0), "0.0"),
        "bad": ((-32, -33, -32), "5.0"),
    }
    for seed, base in BASE.items():
        for arm, (units, weight) in arms.items():
            value = base + units[seed] * UNIT
            settings = {
                "loss.aux_focal.lambda": weight,
                "loss.aux_focal.enabled": str(arm != "baseline").lower(),
                "optim.dense.lr": "3e-4" if arm == "l0" else "0.0003",  # one number, typed in two ways
                "lambda": weight,
                "output_dir": f"outputs/{arm}",
                "tracking.log_every": str(seed),
                "seed": str(seed),
            }
            control = {"role": "control", "control_of": "l.1 g1"} if arm.endswith("control") else {}
            typed = {"canonical.optim.dense.lr": "0.0003"} if arm == "l0" else {}
            metrics = {
                "test/auc_ctcvr": value,
                "valid/auc_ctcvr": value - UNIT,
                "test/auc_ctr": base + seed * UNIT if arm == "l.1 g1" else base,
                "test/ece_ctcvr": 0.25,
                "test/logloss_ctr": math.nan if arm == "bad" else 0.5,
                "test/auc_ctcvr_bayes": 0.9,
                "test/pr_auc_ctcvr": 0.1,
                "test/f1/screen": 0.3,
            } | (EARLIER if arm == "l0" else {"gate/ctr/expert_0": 0.25, "system/checkpoint_megabytes": 2.0})
            scores = None if arm == "bad" else rows_of(LABEL, scores_of(value))
            store.run(
                arm,
                seed,
                metrics,
                params=settings,
                points=[("valid/auc_ctcvr", 50, value + seed * UNIT, 3)],
                rows=scores,
                history=seed != 1,
                sweep_id=SWEEP,
                **{"mlflow.runColor": "#123456"} if arm in ("baseline", "l0") else {},
                **control,
                **typed,
                **{"device": "auto", "fork": "null"} if arm == "l0" else {},
            )
    store.run("bad", 3, {}, status="FAILED", sweep_id=SWEEP)
    store.run("sweep", None, {"test/auc_ctcvr": 1.0}, sweep_id=SWEEP, role="launcher")
    summary = {"metric": "test/auc_ctcvr", "mode": "max", "margin": "0.002"}
    store.run("sweep CTCVR", None, {"test/auc_ctcvr": 1.0}, sweep_id=SWEEP, role="summary", **summary)
    for arm, value in (("baseline", 0.5), ("l.1 g1", 0.75)):
        store.run(arm, 4, {"test/auc_ctcvr": value}, sweep_id=LONELY)
    store.run("l.1 g1", 4, {"test/auc_ctcvr": 0.5}, sweep_id=SWITCHED)
    for seed in (0, 1):
        for weight, value in (("0.1", 0.5), ("0.2", 0.75)):
            params = {"loss.aux_focal.lambda": weight, "loss.static.lambda": "1", "optim.lr": "1"}
            store.run(None, seed, {"test/auc_ctcvr": value + seed * UNIT}, experiment="loose", params=params)


@pytest.fixture(scope="module")
def comparison(store: Store) -> Comparison:
    return compare(load_runs(SWEEP))


def arm(comparison: Comparison, name: str) -> Any:
    return next(arm for arm in comparison.arms if arm.name == name)


def test_runs_of_a_sweep_one_row_each(store: Store) -> None:
    runs = load_runs(SWEEP)
    assert list(runs.index) == list(range(15))
    expected = [(name, seed) for name in ("baseline", "l.1 g1", "l0", "bad", "l.1 g1 control") for seed in (0, 1, 2)]
    assert list(zip(runs["arm"], runs["seed"], strict=True)) == expected
    assert str(runs["seed"].dtype) == "Int64"
    assert set(runs["status"]) == {"FINISHED"}
    assert runs.attrs["metric"] == "test/auc_ctcvr"
    assert runs.attrs["mode"] == "max"
    assert list(runs.attrs["left_out"].values()) == ["FAILED"]
    assert list(runs["params.optim.dense.lr"].unique()) == ["0.0003"]  # canonical, however it was typed
    assert not [name for name in runs if name.startswith("tags.canonical")]
    first = runs.iloc[0]
    kept = store.client.get_run(first["run_id"])
    assert first["metrics.test/auc_ctcvr"] == kept.data.metrics["test/auc_ctcvr"] == 0.5
    assert first["start_time"].timestamp() * 1000 == pytest.approx(kept.info.start_time)
    assert first["color"] == "#123456"
    assert (first["task"], first["role"], first["data_digest"]) == ("mmoe", "baseline", DIGEST)
    assert runs.loc[runs["arm"] == "l.1 g1 control", "control_of"].tolist() == ["l.1 g1"] * 3
    assert math.isnan(runs.loc[runs["arm"] == "bad", "metrics.test/logloss_ctr"].iloc[0])
    assert len(load_runs(SWEEP, finished=False)) == 16
    earlier = runs[runs["arm"] == "l0"]
    assert all((earlier[f"metrics.{name}"] == value).all() for name, value in EARLIER.items())
    assert (earlier["tags.device"] == "auto").all()  # later versions tag no defaults
    assert runs["tags.device"].isna().sum() == 12


def test_runs_of_ids_an_experiment_and_a_filter(store: Store) -> None:
    loose = load_runs(experiment="loose")
    assert len(loose) == 4
    assert loose["arm"].isna().all()
    assert loose.attrs["left_out"] == {}
    assert set(load_runs(experiment=store.experiments["loose"])["run_id"]) == set(loose["run_id"])
    some = loose["run_id"].tolist()[2:]
    assert load_runs(runs=[*some, some[0]])["run_id"].tolist() == sorted(some, key=loose["run_id"].tolist().index)
    result = load_runs(filter="params.`loss.aux_focal.lambda` = '0.2'")
    assert set(result["params.loss.aux_focal.lambda"]) == {"0.2"}
    assert len(result) == 2
    assert len(load_runs(experiment="loose", filter="metrics.`test/auc_ctcvr` > 0.7")) == 2


def test_more_runs_than_a_page_and_more_ids_than_a_filter_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.client.PAGE_ROWS", 4)
    monkeypatch.setattr("pipeline.tracking.stored_runs.PAGE_IDS", 2)
    runs = load_runs(SWEEP)
    assert len(runs) == runs["run_id"].nunique() == 15
    ids = runs["run_id"].tolist()
    assert sorted(load_runs(runs=ids)["run_id"]) == sorted(ids)


def test_the_comparison_has_the_numbers_derived_by_hand(comparison: Comparison) -> None:
    assert [a.name for a in comparison.arms] == ["baseline", "l.1 g1", "l.1 g1 control", "l0", "bad"]
    assert [a.role for a in comparison.arms] == ["baseline", "arm", "control", "arm", "arm"]
    assert (comparison.metric, comparison.mode, comparison.task) == ("test/auc_ctcvr", "max", "mmoe")
    assert comparison.seeds == (0, 1, 2)
    base, focal, zero, bad = (arm(comparison, name) for name in ("baseline", "l.1 g1", "l0", "bad"))
    assert base.values == BASE
    assert base.mean == 0.625
    assert base.spread == 0.125  # deviations -1/8, 0, 1/8 over n - 1 = 2
    assert (base.difference, base.p_adjusted, base.verdict, base.side) == (None, None, "", {})
    # t with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2), so t^2 = 2 (1 - p)^2 / (1 - (1 - p)^2), here of p = 5% / 3
    share = (1 - 0.05 / 3) ** 2
    half = math.sqrt(2 * share / (1 - share)) * UNIT / math.sqrt(3)
    assert focal.difference.mean == pytest.approx(2 * UNIT, rel=1e-12)
    assert focal.difference.sd == pytest.approx(UNIT, rel=1e-12)
    assert focal.difference.low == pytest.approx(2 * UNIT - half, rel=1e-9)
    assert focal.difference.high == pytest.approx(2 * UNIT + half, rel=1e-9)
    p_focal, p_bad = 1 - math.sqrt(12) / math.sqrt(14), 1 - 97 / math.sqrt(97**2 + 2)
    assert focal.difference.p == pytest.approx(p_focal, rel=1e-9)
    assert bad.difference.p == pytest.approx(p_bad, rel=1e-6)
    # Bonferroni over the three arms that are not controls
    assert bad.p_adjusted == pytest.approx(3 * p_bad, rel=1e-6)
    assert focal.p_adjusted == pytest.approx(3 * p_focal, rel=1e-9)
    assert {a.level for a in comparison.arms[1:]} == {0.05 / 3}
    assert (comparison.design, comparison.families, base.looks, base.level) == ("fixed", (), (), None)
    assert (focal.verdict, bad.verdict) == ("not distinguishable", "worse")
    assert list(zero.difference.__dict__.values()) == [3, 0, 0, 0, 0, 1]  # exactly the baseline
    assert (zero.p_adjusted, zero.verdict, zero.minimum_detectable) == (1, "not distinguishable", 0)


def test_a_control_stands_beside_its_arm_and_takes_no_part_in_the_verdict(comparison: Comparison) -> None:
    control, focal = arm(comparison, "l.1 g1 control"), arm(comparison, "l.1 g1")
    assert (control.verdict, control.p_adjusted, control.minimum_detectable) == ("control", None, None)
    assert control.control_of == "l.1 g1"
    assert control.difference.mean == 0
    assert focal.against_control.mean == pytest.approx(2 * UNIT)  # 1 - 0, 2 - 1, 3 + 1 units
    assert focal.against_control.sd == pytest.approx(UNIT * math.sqrt(3))  # deviations -1, -1, 2
    assert [a.against_control for a in comparison.arms if a.name != "l.1 g1"] == [None] * 4


def test_best_values_come_from_all_evaluations(comparison: Comparison) -> None:
    """At step 50 the arm had value + seed units, at the end value - 1: seeds 0, 1, 2 are 0, 1, 2 units above."""
    assert arm(comparison, "baseline").best == pytest.approx(0.625 + UNIT)
    assert arm(comparison, "baseline").best_spread == pytest.approx(0.125 + UNIT)
    lowest = compare(load_runs(SWEEP), mode="min")
    assert arm(lowest, "baseline").best == pytest.approx(0.625 - UNIT)
    assert arm(lowest, "bad").verdict == "better"


def test_side_effects(comparison: Comparison) -> None:
    assert comparison.side_metrics == ("test/auc_ctr", "test/ece_ctcvr", "test/logloss_ctr")
    side = arm(comparison, "l.1 g1").side
    assert side["test/auc_ctr"].mean == pytest.approx(UNIT)  # 0, 1, 2 units
    assert side["test/ece_ctcvr"].mean == 0
    assert list(arm(comparison, "bad").side) == ["test/auc_ctr", "test/ece_ctcvr"]  # its log loss is NaN


def test_calibrated_metrics_follow_the_models_own_and_fitted_values_are_no_settings(store: Store) -> None:
    runs = load_runs(SWEEP)
    more = {f"metrics.test/{kind}_{event}_calibrated": 0.5 for kind in ("auc", "ece") for event in ("ctcvr", "ctr")}
    fitted = {"params.calibration.ctr.scale": [str(row) for row in range(len(runs))]}
    result, plain = compare(runs.assign(**more, **fitted)), compare(runs)
    assert result.side_metrics == (
        "test/auc_ctr", "test/ece_ctcvr", "test/auc_ctcvr_calibrated", "test/ece_ctcvr_calibrated", "test/logloss_ctr",
        "test/auc_ctr_calibrated", "test/ece_ctr_calibrated",
    )  # fmt: skip
    assert (result.metric, result.notes) == (plain.metric, plain.notes)
    assert [arm.differing for arm in result.arms] == [arm.differing for arm in plain.arms]


def test_only_settings_that_differ_are_told(comparison: Comparison) -> None:
    assert arm(comparison, "baseline").differing == {"loss.aux_focal.enabled": "false", "loss.aux_focal.lambda": "0.1"}
    assert arm(comparison, "l0").differing == {"loss.aux_focal.enabled": "true", "loss.aux_focal.lambda": "0.0"}


def test_unfinished_runs_are_counted_in_a_note(comparison: Comparison) -> None:
    assert [note for note in comparison.notes if "1 FAILED" in note and "bad s3" in note]
    by_hand = compare(load_runs(SWEEP, finished=False))
    assert by_hand.notes == comparison.notes
    assert len(by_hand.runs) == 15


def test_one_seed_gets_no_interval_and_no_verdict(store: Store) -> None:
    result = compare(load_runs(LONELY))
    focal = arm(result, "l.1 g1")
    assert (focal.difference.n, focal.difference.mean) == (1, 0.25)
    assert focal.difference.low is focal.difference.p is focal.p_adjusted is focal.minimum_detectable is None
    assert focal.spread is focal.best_spread is None
    assert focal.verdict == "one seed: no verdict"
    assert [note for note in result.notes if "fewer than two seeds" in note and "l.1 g1" in note]


def test_only_shared_seeds_make_a_difference(store: Store) -> None:
    runs = load_runs(SWEEP)
    some = compare(
        runs[~((runs["arm"] == "l.1 g1") & (runs["seed"] == 0)) & ~((runs["arm"] == "baseline") & (runs["seed"] == 2))]
    )
    focal = arm(some, "l.1 g1")
    assert focal.values.keys() == {1, 2}
    assert (focal.difference.n, focal.difference.mean) == (1, 2 * UNIT)
    assert [n for n in some.notes if n.startswith("l.1 g1: seeds 2 have no baseline and seeds 0 of the baseline")]
    apart = compare(runs[(runs["seed"] == 0) == (runs["arm"] == "baseline")])
    assert {a.verdict for a in apart.arms[1:]} == {"no shared seed: no verdict", "control"}
    assert to_text(apart)


def test_a_seed_at_which_nothing_differs_is_told(store: Store) -> None:
    """The tested weights are from before the gate."""
    for name, values, steps in (("baseline", (0.5, 0.6), (150, 100)), ("a", (0.5, 0.7), (150, 100)),
                                ("b", (0.5, 0.8), (150, 300))):  # fmt: skip
        for seed in (0, 1):
            store.run(name, seed, {"test/auc_ctcvr": values[seed], "best_step": steps[seed]}, sweep_id="twins")
    result = compare(load_runs("twins"))
    (note,) = [note for note in result.notes if "every arm has the same" in note]
    assert note.startswith("seed 0: every arm has the same test/auc_ctcvr, at their best at step 150;")
    for arm in ("baseline", "a", "b"):
        store.run(arm, 2, {"test/auc_ctcvr": 0.5, "best_step": 100}, sweep_id="twins")
    (note,) = [note for note in compare(load_runs("twins")).notes if "every arm has the same" in note]
    assert note.startswith("seeds 0, 2: every arm has the same test/auc_ctcvr, at their best at steps 100, 150;")


def test_arms_that_share_a_control_stand_before_it(store: Store) -> None:
    for name, value in (("baseline", 0.5), ("a", 0.625), ("b", 0.75), ("c", 0.5)):
        store.run(name, 0, {"test/auc_ctcvr": value}, sweep_id="shared")
    store.run("w", 0, {"test/auc_ctcvr": 0.5625}, sweep_id="shared", role="control", control_of="a | c")
    result = compare(load_runs("shared"))
    assert [one.name for one in result.arms] == ["baseline", "a", "w", "b", "c"]
    against = {one.name: one.against_control and one.against_control.mean for one in result.arms}
    assert against == {"baseline": None, "a": 0.0625, "w": None, "b": None, "c": -0.0625}


def test_the_newest_of_two_runs_of_an_arm_and_seed_counts(store: Store) -> None:
    runs = load_runs(SWEEP)
    again = runs[(runs["arm"] == "l0") & (runs["seed"] == 1)].assign(run_id="newer", **{"metrics.test/auc_ctcvr": 0.75})
    again["start_time"] += pd.Timedelta(seconds=1)
    result = compare(pd.concat([again, runs], ignore_index=True), metric="test/auc_ctcvr", new_rows=False)
    assert arm(result, "l0").values[1] == 0.75
    assert arm(result, "l0").runs[1] == "newer"
    older = runs.loc[(runs["arm"] == "l0") & (runs["seed"] == 1), "run_id"].iloc[0]
    assert [note for note in result.notes if "newer" in note and older in note]


def test_runs_without_the_metric_are_left_out_with_a_note(store: Store) -> None:
    runs = load_runs(SWEEP)
    runs.loc[runs["arm"] == "bad", "metrics.test/auc_ctcvr"] = [math.nan, math.inf, math.nan]
    runs.loc[(runs["arm"] == "l0") & (runs["seed"] == 2), "metrics.test/auc_ctcvr"] = math.nan
    result = compare(runs)
    assert [a.name for a in result.arms] == ["baseline", "l.1 g1", "l.1 g1 control", "l0"]
    assert arm(result, "l0").difference.n == 2
    assert [note for note in result.notes if "without a number for test/auc_ctcvr" in note and "l0 s2" in note]
    assert [note for note in result.notes if note == "arms without any run left: bad"]


def test_runs_without_arms_are_grouped_by_what_differs(store: Store) -> None:
    loose = load_runs(experiment="loose")
    with pytest.raises(UserError, match=r"no run has the role baseline; .*allowed: lambda 0.1, lambda 0.2$"):
        compare(loose)
    result = compare(loose, baseline="lambda 0.1")
    assert [a.name for a in result.arms] == ["lambda 0.1", "lambda 0.2"]
    assert arm(result, "lambda 0.2").difference.mean == 0.25
    assert arm(result, "lambda 0.2").verdict == "better"  # the same difference at both seeds
    assert result.arms[1].differing == {"loss.aux_focal.lambda": "0.2"}
    of_run = loose.loc[loose["params.loss.aux_focal.lambda"] == "0.2", "run_id"].iloc[1]
    assert compare(loose, baseline=of_run).baseline == "lambda 0.2"
    clash = loose.assign(**{"params.loss.static.lambda": loose["params.loss.aux_focal.lambda"]})
    names = compare(clash, baseline=of_run).arms
    assert names[0].name == "loss.aux_focal.lambda 0.2 loss.static.lambda 0.2"


def test_the_chosen_baseline_is_the_baseline(store: Store) -> None:
    result = compare(load_runs(SWEEP), baseline="l.1 g1")
    assert result.arms[0].name == "l.1 g1"
    assert arm(result, "baseline").role == "arm"
    assert arm(result, "baseline").difference.mean == pytest.approx(-2 * UNIT)


def test_metric_and_mode_come_from_the_sweep_then_from_the_runs(store: Store) -> None:
    runs = load_runs(SWEEP)
    runs.attrs["metric"], runs.attrs["mode"] = "test/ece_ctcvr", "min"
    assert (compare(runs).metric, compare(runs).mode) == ("test/ece_ctcvr", "min")
    runs.attrs.clear()
    assert (compare(runs).metric, compare(runs).mode) == ("test/auc_ctcvr", "max")
    assert compare(runs, "test/logloss_ctr").mode == "min"  # by its name
    runs["params.evaluation.mode"] = "min"
    assert compare(runs).mode == "min"
    untested = runs.drop(columns="metrics.test/auc_ctcvr")
    assert compare(untested).metric == "valid/auc_ctcvr"


def test_settings_that_runs_of_one_arm_do_not_share_are_told(store: Store) -> None:
    runs = load_runs(SWEEP)
    runs.loc[1, "params.loss.aux_focal.lambda"] = "0.7"
    result = compare(runs)
    assert "baseline: its runs differ among themselves in loss.aux_focal.lambda" in result.notes
    assert result.arms[0].differing["loss.aux_focal.lambda"] == "0.1 | 0.7"


def test_colors_are_the_tags_and_never_shared(comparison: Comparison) -> None:
    colors = [a.color for a in comparison.arms]
    assert colors[0] == "#123456"
    assert len(set(colors)) == 5


def test_sweeps_are_listed_by_their_summary_runs(store: Store) -> None:
    (row,) = load_sweeps().to_dict("records")
    columns = {"sweep_id": SWEEP, "title": "CTCVR", "metric": "test/auc_ctcvr", "mode": "max", "margin": 0.002}
    assert {name: row[name] for name in columns} == columns
    with pytest.raises(UserError, match="experiment loose: found no sweep in sqlite"):
        load_sweeps("loose")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "found none, allowed: one of sweep_id, runs, experiment, filter"),
        ({"sweep_id": SWEEP, "experiment": "loose"}, "found sweep_id and experiment"),
        ({"sweep_id": "5eed00000000000f"}, "sweep_id 5eed00000000000f: found no run in sqlite"),
        ({"sweep_id": "it's"}, "sweep_id it's: found no run"),
        ({"runs": ["f" * 32]}, f"no run {'f' * 32} in sqlite"),
        ({"runs": ["'; drop"]}, "no run '; drop in sqlite"),
        ({"experiment": "losse"}, "no experiment losse"),
        ({"filter": "params.x ="}, "tracking store sqlite"),
        ({"filter": "tags.arm = 'nobody'"}, "filter tags.arm = 'nobody': found no run"),
        ({"filter": "tags.role = 'summary'"}, "found no run but 1 that trained nothing"),
        ({"filter": "status = 'FAILED'"}, "none of 1 runs is finished (1 FAILED)"),
    ],
)
def test_a_bad_source_is_told_in_one_line(store: Store, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_runs(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"metric": "auc_ctcvr"}, "metric auc_ctcvr: in none of 15 runs; did you mean test/auc_ctcvr?"),
        ({}, {"mode": "up"}, "mode: found up, allowed: max, min"),
        ({}, {"baseline": "l1"}, "baseline l1: no such arm; allowed: baseline, l.1 g1, l0, bad, l.1 g1 control"),
        ({"role": "arm"}, {}, "no baseline: no run has the role baseline; name one by baseline="),
        ({"role": "baseline"}, {}, "no baseline: several arms have the role baseline: baseline, l.1 g1"),
        ({"task": ["mmoe"] * 14 + ["visobert"]}, {}, "runs of different task cannot be compared: found mmoe (run "),
        ({"data_digest": ["a" * 64] * 14 + ["b" * 64]}, {}, "different data_digest cannot be compared: found aaaa"),
        ({"data_digest": ["a" * 64] * 14 + [None]}, {}, "unknown (run "),
        ({"status": "KILLED"}, {}, "nothing to compare: none of 15 runs is finished and has a seed"),
        ({"seed": pd.NA}, {}, "nothing to compare"),
        ({"metrics.test/auc_ctcvr": [math.nan] * 3 + [0.5] * 12}, {}, "baseline baseline: none of its runs has test/"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told_in_one_line(
    store: Store, change: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        compare(load_runs(SWEEP).assign(**change), **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_of_unknown_task_fit_any(store: Store) -> None:
    runs = load_runs(SWEEP)
    assert compare(runs.assign(task=[None] * 5 + ["mmoe"] * 10)).task == "mmoe"
    assert compare(runs.assign(task=None)).task == ""


def test_no_store_is_told_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'none.db'}")
    try:
        with pytest.raises(UserError, match="there is no such file"):
            load_runs(SWEEP)
    finally:
        mlflow.set_tracking_uri(before)
    assert not list(tmp_path.iterdir())


# histories

ODD: Points = [
    ("b", 2, 0.1, 30),
    ("b", 1, math.nan, 20),
    ("b", 1, math.nan, 20),  # the same point twice: once
    ("b", 1, 1.5, 10),
    ("b", 1, 1.5, 20),  # a later one of the same step and value: kept
    ("b", 1, 0.5, 20),
    ("a", 0, math.inf, 1),
    ("a", 1, -math.inf, 2),
    ("a", -1, 1e-300, 3),
    ("c/x", 0, 0.1 + 0.2, 1),
]
ODD_IN_ORDER = [
    ("a", -1, 1e-300), ("a", 0, math.inf), ("a", 1, -math.inf),
    ("b", 1, 1.5), ("b", 1, 0.5), ("b", 1, 1.5), ("b", 1, math.nan), ("b", 2, 0.1),
    ("c/x", 0, 0.1 + 0.2),
]  # fmt: skip


def listed(history: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(history[["metric", "step", "value"]].itertuples(index=False, name=None))


def same(left: Sequence[tuple[Any, ...]], right: Sequence[tuple[Any, ...]]) -> bool:
    """Equal, NaN equal to NaN."""
    return [(*row[:-1], repr(row[-1])) for row in left] == [(*row[:-1], repr(row[-1])) for row in right]


@pytest.fixture(scope="module")
def odd(store: Store) -> tuple[str, str]:
    """The same points in two runs, with and without the artifact."""
    tags = {"sweep_id": "5eed00000000000a"}
    return tuple(store.run("baseline", seed, {}, points=ODD, history=not seed, **tags) for seed in (0, 1))  # type: ignore[return-value]


def test_history_is_the_same_from_the_artifact_and_from_the_store(store: Store, odd: tuple[str, str]) -> None:
    for run in odd:
        history = load_history([run])
        assert same(listed(history), ODD_IN_ORDER)
        kinds = {name: str(kind) for name, kind in history.dtypes.items()}
        assert kinds == {"run": "category", "metric": "category", "step": "int64", "value": "float64"}
    both = load_history(load_runs(runs=list(odd)))
    assert list(both["run"]) == [odd[0]] * 9 + [odd[1]] * 9
    assert same(listed(both[:9]), listed(both[9:]))


def test_history_equals_mlflows_own(store: Store, odd: tuple[str, str]) -> None:
    runs = [*load_runs(SWEEP)["run_id"][:4], *odd]
    history = load_history(runs)
    largest = np.finfo(float).max
    for (run, metric), points in history.groupby(["run", "metric"], observed=True):
        own = store.client.get_metric_history(run, metric)
        assert sorted(
            zip(points["step"], points["value"].clip(-largest, largest).fillna(0.125), strict=True)
        ) == sorted((point.step, 0.125 if math.isnan(point.value) else point.value) for point in own)
    names = {run: set(store.client.get_run(run).data.metrics) for run in runs}
    assert {run: set(points["metric"]) for run, points in history.groupby("run", observed=True)} == names


def test_history_of_some_metrics_runs_as_given(store: Store, odd: tuple[str, str]) -> None:
    history = load_history([odd[1], odd[0]], ["c/x", "a", "none"])
    assert list(history["run"]) == [odd[1]] * 4 + [odd[0]] * 4
    assert list(history["metric"]) == ["a", "a", "a", "c/x"] * 2
    assert list(history["metric"].cat.categories) == ["a", "c/x"]
    assert len(load_history([odd[0]], "a")) == 3  # type: ignore[arg-type]
    assert load_history([odd[0]], []).empty
    assert load_history([odd[0]], ["none"]).empty
    with pytest.raises(UserError, match="no run"):
        load_history(["f" * 32])


def test_a_damaged_history_file_gives_way_to_the_store(store: Store) -> None:
    run = store.run("baseline", 9, {}, points=ODD, sweep_id="5eed00000000000b")
    file = store.artifacts(run) / "history.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert same(listed(load_history([run])), ODD_IN_ORDER)
    pq.write_table(pa.table({"metric": ["a"], "step": [1]}), file)
    assert same(listed(load_history([run])), ODD_IN_ORDER)


def test_artifacts_that_are_elsewhere_are_fetched(store: Store, odd: tuple[str, str], tmp_path: Path) -> None:
    """With a tracking server, artifacts are downloaded by MLflow's client."""
    from pipeline.tracking.stored_runs import artifact

    served = artifact(odd[0], "mlflow-artifacts:/0/run", "history.parquet", tmp_path)
    assert served is not None
    assert tmp_path in served.parents
    assert served.read_bytes() == (store.artifacts(odd[0]) / "history.parquet").read_bytes()
    assert artifact(odd[1], "mlflow-artifacts:/0/run", "history.parquet", tmp_path) is None
    assert artifact(odd[1], "mlflow-artifacts:/0/run", TEST_ROWS_FILE, tmp_path) is None


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32).map(lambda value: value + 0.0)
points = st.tuples(st.sampled_from(["b", "a", "a/b", "ü"]), st.integers(-2, 2), numbers, st.integers(0, 2))


@given(st.lists(points, max_size=30))
def test_any_points_come_back_ordered_and_once(tmp_path_factory: pytest.TempPathFactory, logged: Points) -> None:
    file = tmp_path_factory.mktemp("history") / "history.parquet"
    write_history(logged, file)
    kept = {(name, step, repr(value), time): (name, step, value, time) for name, step, value, time in logged}
    ordered = sorted(kept.values(), key=lambda p: (p[0], p[1], p[3], math.isnan(p[2]), 0 if math.isnan(p[2]) else p[2]))
    stored: dict[str, list[Point]] = {}
    for name, step, value, time in kept.values():  # the store has every point once
        stored.setdefault(name, []).append(Point(step, value, time))
    for result in (points_of_file(file, None), points_of_store(stored)):
        names = [name for name, count in result.counts.items() for _ in range(count)]
        read = list(zip(names, result.steps.tolist(), result.values.tolist(), strict=True))
        assert same(read, [(name, step, value) for name, step, value, _ in ordered])
    only = points_of_file(file, frozenset({"a"}))
    assert dict(only.counts) == {name: count for name, count in result.counts.items() if name == "a"}


# tables


def test_frame_and_its_csv(comparison: Comparison, tmp_path: Path) -> None:
    frame = to_frame(comparison)
    assert frame["arm"].tolist() == [a.name for a in comparison.arms]
    focal = frame.set_index("arm").loc["l.1 g1"]
    assert focal["difference"] == arm(comparison, "l.1 g1").difference.mean
    assert focal["control.difference"] == arm(comparison, "l.1 g1").against_control.mean
    rows = arm(comparison, "l.1 g1").new_rows
    assert (focal["new_rows.low"], focal["new_rows.high"]) == (rows.low, rows.high)
    assert pd.isna(frame.set_index("arm").loc["bad", "new_rows.low"])
    assert focal["side.test/auc_ctr.difference"] == pytest.approx(UNIT)
    assert focal["params.loss.aux_focal.enabled"] == "true"
    assert (focal["seeds"], focal["seeds_shared"]) == (3, 3)
    frame.to_csv(tmp_path / "table.csv", index=False)
    again = pd.read_csv(
        tmp_path / "table.csv",
        float_precision="round_trip",
        dtype={"params.loss.aux_focal.enabled": str, "params.loss.aux_focal.lambda": str},
    )
    for column in frame:
        assert [None if pd.isna(v) else v for v in again[column]] == [None if pd.isna(v) else v for v in frame[column]]


def test_text_is_aligned_and_ends_with_the_verdict(comparison: Comparison) -> None:
    text = to_text(comparison)
    lines = text.splitlines()
    head = next(line for line in lines if line.endswith("verdict"))
    table = lines[lines.index(head) : lines.index(head) + 7]
    place = head.index("verdict")
    assert [line[place:] for line in table[1:]] == [
        "baseline", "not distinguishable", "", "control", "not distinguishable", "worse",
    ]  # fmt: skip
    assert table[2].startswith("l.1 g1  ")
    assert "+0.031" in table[2]
    assert table[3].startswith("  against its control")
    assert table[4].startswith("  l.1 g1 control")
    assert max(map(len, lines)) <= 120
    assert "auc_ctr" in text
    assert any(line.startswith("note: not finished") for line in lines)


def test_what_is_written_is_what_was_found(comparison: Comparison) -> None:
    """Signs, stars, small p values, intervals on new rows, and which direction is better."""
    focal, lower = arm(comparison, "l.1 g1"), compare(load_runs(SWEEP), mode="min")
    for write_out in (to_text, to_markdown):
        text = write_out(comparison).replace("\N{MINUS SIGN}", "-").replace("\\*", "*")
        assert "*" not in re.sub(r"\*\*|\*(?=[: ])", "", text)
        assert re.search("(more|higher) is better", text)
        assert not re.search("(less|lower) is better", text)
        assert re.search("(less|lower) is better", write_out(lower))
        for p, shown in ((0.0051, r"0\.0051?"), (1e-9, r"< 0\.0+1")):
            side = {"test/auc_ctr": paired([-0.3, -0.2, -0.25])}  # half the interval: 4.30 x 0.05 / sqrt(3) = 0.124
            on_new_rows = replace(focal.new_rows, mean=0.1, low=-0.2, high=0.3)
            one = replace(focal, p_adjusted=p, side=side, new_rows=on_new_rows)
            text = write_out(replace(comparison, arms=(comparison.arms[0], one)))
            text = text.replace("\N{MINUS SIGN}", "-").replace("\\*", "*")  # a star is escaped in Markdown
            assert re.search(rf"{shown}(?!\d)", text)
            assert "-0.25*" in text
            assert re.search(r"\+0\.10+ \(-0\.20+ to \+0\.30+\)", text)


def test_no_more_than_six_side_metrics_in_a_terminal_but_all_in_the_frame(store: Store) -> None:
    runs = load_runs(SWEEP)
    more = {f"metrics.test/{kind}_{event}": 0.5 for kind in ("auc", "ece", "logloss") for event in ("x", "y", "z")}
    result = compare(runs.assign(**more))
    assert len(result.side_metrics) == 12
    assert result.side_metrics[:4] == ("test/auc_ctr", "test/auc_x", "test/auc_y", "test/auc_z")
    assert result.side_metrics[4] == "test/ece_ctcvr"  # of the primary's own event, before others
    head = next(line for line in to_text(result).splitlines() if line.split()[:1] == ["auc_ctr"])
    assert len(head.split()) == 6
    assert sum(column.startswith("side.") and column.endswith("difference") for column in to_frame(result)) == 12


def test_markdown_has_every_arm_and_stays_within_a_length(comparison: Comparison) -> None:
    text = to_markdown(comparison)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in tables[:6]}) == 1
    only = "one seed decides: without seed 1 it would not be worse"  # the others have no spread
    assert f"- **bad**: worse; 3 seeds: −0.505 (−0.545 to −0.465); {only}; mean 0.12 ± 0.13; p " in text
    assert "- **l.1 g1 control**: control of l.1 g1; 3 seeds: 0 (" in text
    many = replace(comparison, arms=comparison.arms[:1] + comparison.arms[1:2] * 100)
    assert len(to_markdown(many)) > 8000
    brief = to_markdown(many, 8000)
    assert len(brief) <= 8000
    assert brief.endswith("comparison.md.\n")
    assert to_markdown(comparison, 8000) == text


def test_names_cannot_break_the_markdown(comparison: Comparison) -> None:
    hostile = replace(comparison.arms[1], name="a|b <script> *x* `y`")
    text = to_markdown(replace(comparison, arms=(comparison.arms[0], hostile)))
    assert "<script>" not in text
    (row, *_) = [line for line in text.splitlines() if line.startswith("| a\\|b &lt;script>")]
    head = next(line for line in text.splitlines() if line.startswith("| arm |"))
    assert row.replace("\\|", "").count("|") == head.count("|")


def test_files_are_written(comparison: Comparison, tmp_path: Path) -> None:
    files = write(comparison, tmp_path / "deep" / "folder")
    assert [file.name for file in files] == ["comparison.csv", "comparison.md", "comparison.html"]
    assert len(pd.read_csv(files[0])) == 5
    page = files[2].read_text(encoding="utf-8")
    assert all(a.name in page for a in comparison.arms)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_dir"):
        write(comparison, tmp_path / "file")


# the entry point


def run_entry(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    return int(ended.value.code or 0)


def test_entry_point_writes_and_says_where(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry("--sweep_id", SWEEP, "--output_dir", str(tmp_path)) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "not distinguishable" in output.err
    assert str(tmp_path / SWEEP / "comparison.html") in output.err
    ids = load_runs(experiment="loose")["run_id"].tolist()
    assert run_entry("--runs", ",".join(ids), "--baseline", "lambda 0.1", "--output_dir", str(tmp_path)) == 0
    assert run_entry("--runs", json.dumps(ids[::-1]), "--baseline", ids[0], "--output_dir", str(tmp_path)) == 0
    assert len(list(tmp_path.iterdir())) == 2  # the same runs, the same folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: runs to compare: found none, allowed: one of sweep_id, runs, experiment, filter"),
        (["--swep_id", SWEEP], "error: unknown key swep_id; did you mean sweep_id?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    store: Store, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_entry(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_in_a_run_of_mlflow_run_it_is_left_there(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run that compares, and one that cannot."""
    before = len(load_runs(experiment="sweeps", finished=False))
    runs = [store.client.create_run(store.experiments["sweeps"]).info.run_id for _ in range(2)]
    with Writer() as writer:
        monkeypatch.setattr("pipeline.comparison.verdicts.Writer", lending(writer))
        for run_id, sweep_id, code in zip(runs, (SWEEP, SWITCHED), (0, 2), strict=True):
            monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
            assert run_entry("--sweep_id", sweep_id, "--output_dir", str(tmp_path)) == code
    run = store.client.get_run(runs[0])
    assert (run.info.status, run.data.tags["role"]) == ("FINISHED", "comparison")
    assert run.data.tags["mlflow.note.content"] == to_markdown(compare(load_runs(SWEEP)), 8000)
    artifacts = {file.path for file in store.client.list_artifacts(runs[0])}
    assert {"comparison.csv", "comparison.md", "comparison.html"} <= artifacts
    run = store.client.get_run(runs[1])
    assert run.info.status == "FAILED"
    assert "no baseline" in run.data.tags["failure"]
    assert len(load_runs(experiment="sweeps", finished=False)) == before  # neither is ever compared


def test_the_shipped_config_asks_for_nothing() -> None:
    config = load(CompareConfig, ROOT / "configs/compare.yaml", {})
    assert config == CompareConfig()
    with pytest.raises(UserError, match="found none"):
        check_source(config.sweep_id, config.runs, config.experiment, config.filter)
    check_source(None, None, "an experiment", "a filter")
    check_source(None, ("a", "b"), None, None)
    assert load(CompareConfig, None, {"runs": "a, b\nc"}).runs == ("a", "b", "c")
