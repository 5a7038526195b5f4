"""Sweeps as users start them: flat runs, a verdict, and no repeated work after interruptions."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from conftest import ROOT, SHRUNK, Call, in_laboratory, lending, only_full, store_in, wait_for
from filelock import FileLock
from laboratory import ARMS, METRIC, MMOE, SWEEPS_WORKERS, Laboratory, lending_workers
from safetensors.numpy import load_file
from scipy import stats

from pipeline.comparison.verdicts import load_runs
from pipeline.config.strict_config import load
from pipeline.data.schema import DataSchema
from pipeline.errors import UserError
from pipeline.names import MEASURED
from pipeline.runs.launch import TORCH_THREADS
from pipeline.sweeps.adoption import EqualRuns
from pipeline.sweeps.data_check import check_data
from pipeline.sweeps.jobs import Job
from pipeline.sweeps.local_workers import LocalWorkers
from pipeline.sweeps.requests import DataDigest, DigestData
from pipeline.sweeps.summary_run import SummaryRun
from pipeline.sweeps.sweep_config import SweepConfig
from pipeline.sweeps.sweep_plan import resolve
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.run import MemoryRun
from pipeline.tracking.writer_client import Writer

SETTINGS: dict[str, Any] = {key: yaml.safe_load(value) for key, value in SHRUNK.items()}


def sweep_file(folder: Path, impressions: Path, **changes: Any) -> Path:
    settings = SETTINGS | {"data": str(impressions)} | changes.pop("settings", {})
    sweep = {
        "task": "train_mmoe",
        "config": str(ROOT / "configs/mtl_mmoe.yaml"),
        "settings": settings,
        "baseline": {"aux_focal": False},
        "arms": [{"lambda": 5.0}, {"lambda": 0.0}],
        "seeds": [0, 1],
        "jobs": 1,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in (sweep | changes).items() if value is not None}))
    return file


@pytest.fixture
def run_sweep(call_pipeline: Call) -> Call:
    """`run_sweep(file, *arguments)`: run a sweep in this process, with worker processes."""
    return partial(call_pipeline, "sweep", "--config")


def sweep_id_of(stderr: str) -> str:
    return re.findall(r"sweep ([0-9a-f]{16})", stderr)[0]


def by_arm(client: Any, sweep_id: str, roles: tuple[str, ...] = ("baseline", "arm", "control")) -> dict[Any, Any]:
    stored = client.search_runs(["0"], f"tags.sweep_id = '{sweep_id}'")
    runs = [run for run in stored if run.data.tags["role"] in roles]
    named = {(run.data.tags["arm"], int(run.data.tags["seed"])): run for run in runs}
    assert len(named) == len(runs), "two runs of one key"
    return named


def history(run: Any) -> pd.DataFrame:
    frame = pd.read_parquet(Path(run.data.tags["run_dir"]) / "history.parquet")
    frame = frame[~frame["metric"].str.startswith(MEASURED)]
    return frame[["metric", "step", "value"]].sort_values(["metric", "step"]).reset_index(drop=True)


def assert_same_results(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for key, run in one.items():
        pd.testing.assert_frame_equal(history(run), history(other[key]), check_exact=True)
        folders = [Path(each.data.tags["run_dir"]) for each in (run, other[key])]
        first, second = (load_file(folder / "final" / "model.safetensors") for folder in folders)
        assert all(np.array_equal(first[name], second[name]) for name in first)


def table_of(stderr: str) -> str:
    """The printed table, without the ids and files that differ between starts."""
    return stderr[stderr.index("mean ± sd") : stderr.index("\nreport: ")]


@pytest.fixture
def finished(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """The finished sweep MMOE (two arms, a control, the baseline; two seeds), in its folder."""
    monkeypatch.chdir(laboratory.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{laboratory.folder / 'mlflow.db'}")
    for name, value in laboratory.processes.items():
        monkeypatch.setattr(name, value)
    return laboratory


def runs_of(finished: Laboratory) -> dict[Any, Any]:
    return by_arm(finished.client, sweep_id_of(finished.printed))


def comparison_of(finished: Laboratory) -> Path:
    """The folder of the finished sweep's comparison, as printed at its end."""
    (page,) = re.findall(r"^report: file://(.+)$", finished.printed, re.MULTILINE)
    return Path(page).parent


@in_laboratory
def test_a_sweep_through_mlproject(finished: Laboratory) -> None:
    client, runs = finished.client, runs_of(finished)
    (data,) = (finished.folder / "data_cache").glob("*/schema.json")
    assert set(runs) == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    preamble = finished.printed.partition("\nsweep ")[0]
    assert "embedded data: generated, 10,000 impressions, because data.path is null" in preamble.splitlines()
    for (arm, seed), run in runs.items():
        tags, params = run.data.tags, run.data.params
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"{arm} s{seed}"
        assert "mlflow.parentRunId" not in tags
        assert params["seed"] == str(seed)
        assert tags["role"] == {"baseline": "baseline", "w+5 w3": "control"}.get(arm, "arm")
        assert tags["branch_step"] == "3"
        assert tags["data_digest"] == DataSchema.read(data.parent).digest
        assert tags["tracking.log_model"] == "false"
        logged = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "global_step")}
        assert logged == {step: step for step in range(12)}
        # what MLflow has is what the run's history has, the prefix's points among it
        for metric in ("loss_ctcvr_bce", "valid/auc_ctcvr", "aux_focal_lambda"):
            points = sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric))
            rows = history(run).query("metric == @metric")
            assert points == list(zip(rows["step"], rows["value"], strict=True)), metric
    colors = {arm: {run.data.tags["mlflow.runColor"] for (name, _), run in runs.items() if name == arm}
              for arm, _ in runs}  # fmt: skip
    assert all(len(own) == 1 for own in colors.values())
    assert len(set.union(*colors.values())) == 4
    assert {run.data.tags["branched_from"] for (_, seed), run in runs.items() if seed == 0}.isdisjoint(
        run.data.tags["branched_from"] for (_, seed), run in runs.items() if seed == 1
    )

    # lambda 0 is the baseline to the last bit; lambda 5 is not
    for seed in (0, 1):
        zero, base, five = (runs[arm, seed].data.metrics for arm in ("l0 g2 w3", "baseline", "l5 g1 w3"))
        assert zero["test/auc_ctcvr"] == base["test/auc_ctcvr"]
        assert five["test/logloss_ctcvr"] != base["test/logloss_ctcvr"]
        assert five["aux_focal_lambda"] == 5

    # the table, from MLflow's metrics by scipy
    value = {key: run.data.metrics[METRIC] for key, run in runs.items()}
    differences = [value["l5 g1 w3", seed] - value["baseline", seed] for seed in (0, 1)]
    low, high = stats.t.interval(1 - 0.05 / 2, 1, np.mean(differences), stats.sem(differences))  # two arms
    (summary,) = by_arm_summary(client, sweep_id_of(finished.printed))
    table = pd.read_csv(comparison_of(finished) / "comparison.csv").set_index("arm")
    assert table.loc["l5 g1 w3", "difference"] == pytest.approx(np.mean(differences), abs=1e-12)
    assert table.loc["l5 g1 w3", "low"] == pytest.approx(low, rel=1e-6)
    assert table.loc["l5 g1 w3", "high"] == pytest.approx(high, rel=1e-6)
    p = stats.ttest_1samp(differences, 0).pvalue
    assert table.loc["l5 g1 w3", "p_adjusted"] == pytest.approx(min(1, 2 * p), rel=1e-6)
    assert table.loc["l0 g2 w3", "difference"] == 0
    assert table.loc["l0 g2 w3", "verdict"] == "not distinguishable"
    control = [value["l5 g1 w3", seed] - value["w+5 w3", seed] for seed in (0, 1)]
    assert table.loc["l5 g1 w3", "control.difference"] == pytest.approx(np.mean(control), abs=1e-12)
    assert "trained 78 optimizer steps for runs of 96" in finished.printed  # 2 prefixes of 3, and 8 runs from 3 to 12
    assert summary.info.status == "FINISHED"
    left = {item.path for item in client.list_artifacts(summary.info.run_id)}
    assert left >= {"comparison.html", "comparison.csv", "comparison.md", "sweep.yaml"}
    assert "not distinguishable" in summary.data.tags["mlflow.note.content"]
    assert table.index.tolist() == list(ARMS)  # the plan's order
    assert (comparison_of(finished) / "comparison.html").is_file()


@in_laboratory
def test_again_it_finds_all_finished(finished: Laboratory, run_sweep: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = finished.client.create_run("0", run_name="legendary-gnat-695").info.run_id  # as `mlflow run` does
    monkeypatch.setenv("MLFLOW_RUN_ID", launcher)
    before = {run.info.run_id for run in finished.runs("")}
    again = run_sweep("mmoe.yaml", "--jobs", "2")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before") == 8
    assert table_of(again.stderr) == table_of(finished.printed)
    assert {run.info.run_id for run in finished.runs("")} == before
    roles = sorted(run.data.tags["role"] for run in finished.runs(f"tags.sweep_id = '{sweep_id_of(again.stderr)}'"))
    assert roles == sorted(["baseline"] * 2 + ["arm"] * 4 + ["control"] * 2 + ["summary"])
    assert finished.client.get_run(launcher).data.tags["role"] == "launcher"
    assert {run.info.status for run in finished.runs("tags.role != 'launcher'")} == {"FINISHED"}


@in_laboratory
@pytest.mark.faults
@only_full
def test_runs_alone_have_the_same_points_and_weights(finished: Laboratory, run_sweep: Call) -> None:
    arguments = ["--share_prefix", "false", "--seeds", "[1]", "--jobs", "1", "--experiment", "apart"]
    apart = run_sweep("mmoe.yaml", *arguments)
    assert apart.returncode == 0, apart.stderr
    assert "trained 48 optimizer steps for runs of 48" in apart.stderr
    stored = finished.client.search_runs([finished.client.get_experiment_by_name("apart").experiment_id])
    others = {(run.data.tags["arm"], 1): run for run in stored if run.data.tags["role"] != "summary"}
    assert len(stored) == len(others) + 1
    assert {run.data.tags["sweep_id"] for run in stored}.isdisjoint({sweep_id_of(finished.printed)})
    assert not any("branch_step" in run.data.tags for run in others.values())
    assert_same_results({key: run for key, run in runs_of(finished).items() if key[1] == 1}, others)


def by_arm_summary(client: Any, sweep_id: str) -> list[Any]:
    stored = client.search_runs(["0"], f"tags.sweep_id = '{sweep_id}'")
    return [run for run in stored if run.data.tags["role"] == "summary"]


@in_laboratory
@pytest.mark.faults
@only_full
def test_killed_it_goes_on_to_the_same_table(
    laboratory: Laboratory, workplace: Path, client: Any, run_sweep: Call
) -> None:
    """SIGKILL to the whole process group; the results are those of an undisturbed sweep."""
    file = workplace / "sweep.yaml"
    file.write_text(yaml.safe_dump(MMOE | {"config": str(ROOT / "configs/mtl_mmoe.yaml")}))
    command = [sys.executable, "-m", "pipeline", "sweep", "--config", str(file)]
    with (workplace / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=workplace, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: process.poll() is not None or _begun(workplace) > 2)
        assert process.poll() is None, "it ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    sweep_id = _newest_sweep(client)
    finished = {key: run.info.run_id for key, run in by_arm(client, sweep_id).items() if run.info.status == "FINISHED"}
    assert 0 < len(finished) < 8
    last = run_sweep(str(file))
    assert last.returncode == 0, last.stderr
    runs = by_arm(client, _newest_sweep(client))
    assert len(runs) == 8
    assert {key: run.info.run_id for key, run in runs.items()}.items() >= finished.items()
    assert {run.info.status for run in client.search_runs(["0"])} == {"FINISHED"}
    assert len(by_arm_summary(client, _newest_sweep(client))) == 1
    assert table_of(last.stderr) == table_of(laboratory.printed)
    assert_same_results(runs, runs_of(laboratory))
    for run in runs.values():  # each point once, though some were written by a start that was killed
        for metric in ("loss_total", "system/rows_per_second", "test/auc_ctcvr"):
            points = client.get_metric_history(run.info.run_id, metric)
            assert len({point.step for point in points}) == len(points)
            rows = pd.read_parquet(Path(run.data.tags["run_dir"]) / "history.parquet").query("metric == @metric")
            assert sorted((p.step, p.value) for p in points) == sorted(zip(rows["step"], rows["value"], strict=True))


@in_laboratory
@pytest.mark.faults
@only_full
def test_killed_between_looks_it_comes_to_the_same_decisions(
    workplace: Path, client: Any, impressions: Path, run_sweep: Call
) -> None:
    """SIGKILL to the whole process group after the first look, beside the same sweep undisturbed."""
    arms = [{"name": "zero", "lambda": 0.0}, {"name": "five", "lambda": 5.0}, {"name": "one", "lambda": 1.0}]
    changes = {"arms": arms, "seeds": {"first": 3, "most": 8}, "metric": "test/logloss_ctcvr", "title": "own"}
    file = sweep_file(workplace, impressions, **changes)
    command = [sys.executable, "-m", "pipeline", "sweep", "--config", str(file)]
    log = workplace / "log"
    with log.open("w") as text:
        process = subprocess.Popen(command, cwd=workplace, stdout=text, stderr=text, start_new_session=True)
        wait_for(lambda: process.poll() is not None or "look at 3 seeds" in log.read_text())
        assert process.poll() is None, "it ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = run_sweep(str(file))
    assert killed.returncode == 0, killed.stderr
    apart = {"output_dir": str(workplace / "apart"), "experiment": "apart"}
    undisturbed = run_sweep(str(sweep_file(workplace, impressions, settings=apart, **changes)))
    looks = [[line for line in text.splitlines() if line.startswith("look at")]
             for text in (killed.stderr, undisturbed.stderr)]  # fmt: skip
    assert looks[0] == looks[1] != []
    assert "zero is identical" in looks[0][0]
    assert table_of(killed.stderr) == table_of(undisturbed.stderr)
    by_arm(client, sweep_id_of(killed.stderr))  # one run of each arm and seed


def _begun(workplace: Path) -> int:
    """Number of the arms' runs that have begun."""
    return len(list((workplace / "outputs").glob("*/config.yaml")))


def _newest_sweep(client: Any) -> str:
    stored = client.search_runs(["0"], "tags.sweep_id like '%'", order_by=["attributes.start_time DESC"])
    return str(stored[0].data.tags["sweep_id"]) if stored else "none"


shares_worker = pytest.mark.xdist_group("workshop")  # starts its worker once


@dataclass(frozen=True)
class Workshop:
    """A folder with a tracking store, a worker and a writer for all sweeps there, since starting them takes seconds."""

    folder: Path
    client: Any  # MLflow's
    workers: LocalWorkers
    writer: Writer


@pytest.fixture(scope="module")
def started_workshop(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Workshop]:
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("workshop")
    store_in(folder, empty_store)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("GIT_DIR", str(folder))  # hides changes of this code, whose runs would not be adopted
        workers, writer = LocalWorkers(1, folder / "workers"), Writer()
    with writer:
        yield Workshop(folder, MlflowClient(uri), workers, writer)
    workers.close()
    assert [worker.poll() for worker in workers.workers] == [0]  # it saw the end of its input


@pytest.fixture
def workshop(started_workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Sweeps that are started in this process use its worker and its writer."""
    monkeypatch.setattr("pipeline.sweeps.summary_run.code_changes", lambda _: "")
    for name in SWEEPS_WORKERS:
        monkeypatch.setattr(name, lending_workers(started_workshop.workers))
    monkeypatch.setattr("pipeline.tracking.writer_client.Writer", lending(started_workshop.writer))
    monkeypatch.chdir(started_workshop.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{started_workshop.folder / 'mlflow.db'}")
    return started_workshop


@shares_worker
def test_an_arm_that_fails_leaves_the_others(workshop: Workshop, impressions: Path, run_sweep: Call) -> None:
    client = workshop.client
    arms = [{"lambda": 5.0}, {"name": "wild", "aux_focal": False, "optim.dense.lr": 1e30}]
    file = sweep_file(workshop.folder, impressions, arms=arms, seeds=[3])
    result = run_sweep(str(file))
    assert result.returncode == 1
    assert re.search(r"failed:\n- wild s3: loss_\w+ is (nan|inf) at step \d+", result.stderr)
    assert "1 of 3 runs failed" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert "one seed: no verdict" in result.stderr
    runs = by_arm(client, sweep_id_of(result.stderr))
    assert {arm: run.info.status for (arm, _), run in runs.items()} == {
        "baseline": "FINISHED", "l5 g1 w5": "FINISHED", "wild": "FAILED"
    }  # fmt: skip
    failed = runs["wild", 3]
    assert len(client.get_metric_history(failed.info.run_id, "loss_total")) >= 1  # its first step is there
    (summary,) = by_arm_summary(client, sweep_id_of(result.stderr))
    assert summary.info.status == "FAILED"
    assert "wild s3" in summary.data.tags["mlflow.note.content"]


@pytest.mark.faults
@only_full
def test_what_failed_is_tried_again_in_the_same_run(
    workplace: Path, client: Any, impressions: Path, run_sweep: Call
) -> None:
    arms = [{"name": "wild", "aux_focal": False, "optim.dense.lr": 1e30}]
    file = sweep_file(workplace, impressions, arms=arms, seeds=[3])
    first, again = run_sweep(str(file)), run_sweep(str(file))
    assert (first.returncode, again.returncode) == (1, 1)
    assert again.stderr.count("finished before") == 1
    assert {run.info.status for run in client.search_runs(["0"], "tags.arm = 'wild'")} == {"FAILED"}
    assert by_arm(client, sweep_id_of(again.stderr)).keys() == {("baseline", 3), ("wild", 3)}


@pytest.mark.faults
@only_full
def test_ctrl_c_ends_every_process_and_leaves_no_run_running(workplace: Path, client: Any, impressions: Path) -> None:
    file = sweep_file(workplace, impressions, settings={"training.max_steps": None, "epochs": 4000})
    command = [sys.executable, "-m", "pipeline", "sweep", "--config", str(file), "--share_prefix", "false"]
    process = subprocess.Popen(command, cwd=workplace, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        journals = (workplace / "outputs").glob
        wait_for(lambda: any('"global_step"' in file.read_text() for file in journals("*/journal.jsonl")))
        os.killpg(process.pid, signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # as `mlflow run` does on Ctrl-C
        _, stderr = process.communicate(timeout=300)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode in {130, 143}  # the kernel gives the two to two threads: either is heard first
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
    roles = {run.data.tags["role"]: run.info.status for run in client.search_runs(["0"])}
    assert set(roles.values()) == {"KILLED"}
    assert "summary" in roles


@in_laboratory
def test_a_sweep_does_not_run_beside_itself(finished: Laboratory, run_sweep: Call) -> None:
    with FileLock(f"{comparison_of(finished)}.lock"):  # as a sweep at work holds it
        result = run_sweep("mmoe.yaml")
    assert result.returncode == 2
    assert "already running" in result.stderr.splitlines()[-1]


@shares_worker
def test_a_search_finds_an_arm_and_confirms_it_on_other_seeds(
    workshop: Workshop, impressions: Path, run_sweep: Call
) -> None:
    client = workshop.client
    search = {
        "trials": 3, "startup_trials": 1, "settings": {"aux_focal": True},
        "space": {"lambda": {"low": 0.01, "high": 10, "log": True}, "gamma": {"choices": [1, 2]}},
    }  # fmt: skip
    file = sweep_file(workshop.folder, impressions, arms=None, search=search)
    result = run_sweep(str(file))
    assert result.returncode == 0, result.stderr
    sweep_id = sweep_id_of(result.stderr)
    trials = by_arm(client, sweep_id, ("trial",))
    assert {seed for _, seed in trials} == {1000}
    assert sorted(int(run.data.tags["trial"]) for run in trials.values()) == list(range(3))
    complete = [run for run in trials.values() if "pruned" not in run.data.tags]
    reached = [max(point.value for point in client.get_metric_history(run.info.run_id, "valid/auc_ctcvr"))
               for run in complete]  # fmt: skip
    best = [run for run, value in zip(complete, reached, strict=True) if value == max(reached)]  # there may be several
    runs = by_arm(client, sweep_id)
    assert {seed for _, seed in runs} == {0, 1}
    (arm,) = {name for name, _ in runs} - {"baseline"}
    keys = ("loss.aux_focal.lambda", "loss.aux_focal.gamma")
    assert [runs[arm, 0].data.params[key] for key in keys] in [[run.data.params[key] for key in keys] for run in best]
    assert all(0.01 <= float(run.data.params[keys[0]]) <= 10 for run in trials.values())
    for run in trials.values():
        steps = len(client.get_metric_history(run.info.run_id, "loss_total"))
        assert steps == 12 or "pruned" in run.data.tags
    assert arm in table_of(result.stderr)
    assert "trial" not in table_of(result.stderr)


@shares_worker
def test_arms_on_different_data_are_refused(tmp_path: Path, impressions: Path, workshop: Workshop) -> None:
    settings = {"data.embedded.cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / "outputs"), "data": None}
    rows = [{"data.embedded.rows": 1000}, {"data.embedded.rows": 1200}]
    file = sweep_file(tmp_path, impressions, baseline=rows[0] | {"aux_focal": False}, arms=rows, settings=settings)
    plan = resolve(load(SweepConfig, file), file, MmoeConfig, [ROOT])
    refusal = r"baseline has data \w{12}\.\.\., .* has \w{12}\.\.\.: a sweep is on one data set"
    with pytest.raises(UserError, match=refusal):
        check_data(plan, workshop.workers)


@pytest.mark.faults
@only_full
def test_a_search_whose_launcher_is_killed_goes_on_with_the_trials_that_it_was_at(
    workplace: Path, client: Any, impressions: Path, run_sweep: Call, tmp_path: Path
) -> None:
    trials, steps = 3, 1000
    search = {"trials": trials, "startup_trials": trials, "settings": {"aux_focal": True},
              "space": {"lambda": {"low": 0.01, "high": 10, "log": True}, "gamma": {"choices": [1, 2]}}}  # fmt: skip
    long = {"epochs": 20, "training.max_steps": steps, "evaluation.every_steps": 200, "checkpoint.every_steps": 50}
    file = sweep_file(workplace, impressions, arms=None, search=search, settings=long, seeds=[0])
    command = [sys.executable, "-m", "pipeline", "sweep", "--config", str(file)]
    with (workplace / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=workplace, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or _is_trained(workplace, trial=1))
        assert process.poll() is None, (workplace / "log").read_text()
        os.kill(process.pid, signal.SIGKILL)  # the launcher alone: the worker ends its run, and itself
        process.wait()
        wait_for(lambda: _session(process.pid) == [])
        begun = {run.data.tags["trial"]: run for run in by_arm(client, _newest_sweep(client), ("trial",)).values()}
        assert {number: run.info.status for number, run in begun.items()} == {"0": "FINISHED", "1": "KILLED"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    result = run_sweep(str(file))
    assert result.returncode == 0, result.stderr
    ended = {run.data.tags["trial"]: run for run in by_arm(client, sweep_id_of(result.stderr), ("trial",)).values()}
    assert {number: run.info.status for number, run in ended.items()} == dict.fromkeys("012"[:trials], "FINISHED")
    assert {number: ended[number].info.run_id for number in begun} == {
        number: run.info.run_id for number, run in begun.items()
    }
    assert "resumed_at" in ended["1"].data.tags
    assert "ignored" not in result.stderr  # what Optuna says of an evaluation that is reported twice
    (study,) = (workplace / "outputs" / "sweeps").glob("*/search.db")
    assert [trial.state.name for trial in trials_of(study)] == ["COMPLETE"] * trials

    # the draws are those of a search that nothing happened to
    output = tmp_path / "undisturbed"
    other = run_sweep(str(file), "--output_dir", str(output), "--experiment", "undisturbed")
    assert other.returncode == 0, other.stderr
    (undisturbed,) = (output / "sweeps").glob("*/search.db")
    for one, same in zip(trials_of(study), trials_of(undisturbed), strict=True):
        assert (one.params, one.value) == (same.params, same.value)
        assert one.intermediate_values == same.intermediate_values


@pytest.mark.faults
@only_full
def test_a_search_trains_a_setting_once_and_gives_up_one_that_fails(
    workplace: Path, client: Any, impressions: Path, run_sweep: Call
) -> None:
    """Two settings, one of which diverges: repeated proposals get the outcome of the first."""
    search = {"trials": 4, "startup_trials": 4, "settings": {"aux_focal": True},
              "space": {"optim.dense.lr": {"choices": [1e-3, 1e30]}}}  # fmt: skip
    file = sweep_file(workplace, impressions, arms=None, search=search, seeds=[0])
    result = run_sweep(str(file))
    assert result.returncode == 1
    assert "1 of 2 runs failed" in result.stderr.splitlines()[-1]
    trials = client.search_runs(["0"], "tags.role = 'trial'")
    assert sorted((float(run.data.params["optim.dense.lr"]), run.info.status) for run in trials) == [
        (1e-3, "FINISHED"), (1e30, "FAILED"),
    ]  # fmt: skip
    (study,) = (workplace / "outputs" / "sweeps").glob("*/search.db")
    ends = [(trial.params["optim.dense.lr"], trial.state.name, trial.value) for trial in trials_of(study)]
    complete, failed = ([end for end in ends if end[1] == state] for state in ("COMPLETE", "FAIL"))
    assert len(complete) == 4 or len(failed) == 4
    assert {(place, state) for place, state, _ in complete + failed} == {(0, "COMPLETE"), (1, "FAIL")}
    assert len({value for _, _, value in complete}) == 1


def trials_of(file: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{file}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def _is_trained(workplace: Path, trial: int) -> bool:
    """Whether the trial's run is past its first checkpoint."""
    for journal in (workplace / "outputs").glob("*/journal.jsonl"):
        text = journal.read_text()
        if f'"trial":"{trial}"' in text:
            return '"step":60,' in text
    return False


def _session(leader: int) -> list[int]:
    """Ids of the session's live processes."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it ended just now
            state, *_, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                pids.append(int(folder.name))
    return pids


@in_laboratory
def test_a_report_that_cannot_be_written_takes_no_sweep_down(
    finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished.folder / "mmoe.yaml"
    run = MemoryRun(folder=tmp_path)
    plan = resolve(load(SweepConfig, file), file, MmoeConfig, [finished.folder])
    summary = SummaryRun(run, sweep_id_of(finished.printed))  # type: ignore[arg-type]
    monkeypatch.setattr(run, "tracking_uri", "here", raising=False)
    monkeypatch.setattr("pipeline.comparison.verdicts.write_page", lambda *_: 1 / 0)
    summary.conclude(plan, tmp_path, {})
    stderr = capsys.readouterr().err
    assert re.search(r"^warning: the report is left out: ZeroDivisionError: division by zero \(", stderr, re.MULTILINE)
    assert run.status == "FINISHED"
    assert f"sweep {summary.sweep_id} in here" in stderr
    assert "| w+5 w3 |" in run.tags["mlflow.note.content"]
    assert run.artifacts == ["sweep.yaml"]


@shares_worker
def test_a_sweep_grows_and_other_sweeps_adopt_its_runs(
    workshop: Workshop, impressions: Path, run_sweep: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds until decided; then an arm and two seeds more; then a list of seeds: every run is trained once."""
    client = workshop.client
    zero, five, one = ({"name": name, "lambda": value} for name, value in (("zero", 0.0), ("five", 5.0), ("one", 1.0)))
    settings = {"title": "own", "seeds": {"first": 3, "most": 3}, "metric": "test/logloss_ctcvr",
                "settings": {"evaluation.every_steps": 12}}  # fmt: skip
    first = run_sweep(str(sweep_file(workshop.folder, impressions, arms=[zero, five], **settings)))
    assert first.returncode == 0, first.stderr
    assert "zero is identical" in first.stderr
    sweep_id = sweep_id_of(first.stderr)
    runs = by_arm(client, sweep_id)
    assert len(runs) == 9

    settings["seeds"] = {"first": 3, "most": 5}
    file = sweep_file(workshop.folder, impressions, arms=[zero, five, one], **settings)
    planned = run_sweep(str(file), "--plan", "true")
    assert planned.returncode == 0, planned.stderr
    assert by_arm(client, sweep_id).keys() == runs.keys()  # it trained nothing
    found = [(arm, runs[arm, 2].data.tags["weights_digest"] == runs["baseline", 2].data.tags["weights_digest"])
             for arm in ("zero", "five")]  # fmt: skip
    assert found == [("zero", True), ("five", False)]
    assert "- zero: identical already, after 3 seeds" in planned.stderr

    second = run_sweep(str(file))
    assert second.returncode == 0, second.stderr
    assert sweep_id_of(second.stderr) == sweep_id
    grown = by_arm(client, sweep_id)  # which asserts one run of each arm and seed
    assert {key: run.info.run_id for key, run in grown.items()}.items() >= {
        key: run.info.run_id for key, run in runs.items()}.items()  # fmt: skip
    assert ("zero", 3) not in grown
    (summary,) = by_arm_summary(client, sweep_id)
    families = [json.loads(summary.data.tags[f"family_{number}"]) for number in (1, 2)]
    assert [(family["arms"], family["looks"]) for family in families] == [(["zero", "five"], [3, 5]), (["one"], [3, 5])]
    assert "2 families, each at most 5%, together at most 10%" in second.stderr

    listed = settings | {"seeds": [0, 1, 2]}
    adopted = run_sweep(str(sweep_file(workshop.folder, impressions, arms=[five, {"lambda": 1.0}], **listed)))
    assert adopted.returncode == 0, adopted.stderr
    assert adopted.stderr.count(": adopted (run ") == 9
    assert "3 families, each at most 5%, together at most 15%" in adopted.stderr
    other = sweep_id_of(adopted.stderr)
    assert other != sweep_id
    assert by_arm(client, other) == {}  # the runs keep the tag of their first sweep
    table = load_runs(other)
    assert set(table["run_id"]) == {grown[arm, seed].info.run_id for arm in ("baseline", "five", "one")
                                    for seed in range(3)}  # fmt: skip
    assert set(table["arm"]) == {"baseline", "five", "l1 g1 w5"}

    monkeypatch.setattr("pipeline.sweeps.summary_run.code_version", lambda: "0123456789")
    refused = run_sweep(str(sweep_file(workshop.folder, impressions, arms=[five], **listed)))
    assert refused.returncode == 0, refused.stderr
    assert ": adopted (run " not in refused.stderr
    assert "finished runs of other code or threads are not adopted: baseline s0" in refused.stderr


def test_runs_of_changed_code_are_not_adopted() -> None:
    """Changes that are not committed, of the code that made a run or of this code, may have changed its numbers."""
    config = load(MmoeConfig, None, {})

    def adopts(theirs: str, ours: str) -> tuple[bool, str]:
        tags = {"run_key": config.fingerprint("d"), "mlflow.source.git.commit": "0123456789",
                "threads": str(max(1, TORCH_THREADS - 1))} | ({"code_changes": theirs} if theirs else {})  # fmt: skip
        run = StoredRun("r", "run", "FINISHED", 0, "", {}, {}, tags)
        equal = EqualRuns(lambda: [run], "0123456789", ours)
        return equal.adopt("arm s0", config, "d") is not None, equal.note()

    assert adopts("", "") == adopts("12345678", "12345678") == (True, "")
    note = "finished runs of other code or threads are not adopted: arm s0 (code 0123456{}); here: code 0123456{}"
    changed = " with uncommitted changes "
    assert adopts("12345678", "") == (False, note.format(f"{changed}12345678", ""))
    assert adopts("", "12345678") == (False, note.format("", f"{changed}12345678"))
    assert adopts("87654321", "12345678") == (False, note.format(f"{changed}87654321", f"{changed}12345678"))


@shares_worker
def test_a_worker_that_dies_is_replaced_and_its_job_alone_fails(workshop: Workshop, impressions: Path) -> None:
    workers = workshop.workers
    (first,) = workers.workers
    os.kill(first.pid, signal.SIGSTOP)  # it takes a job and does nothing

    def kill() -> None:
        wait_for(lambda: workers.workers[first])
        os.kill(first.pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    config = f"data: {{path: {impressions}}}"
    requests = {"lost": config, "fine": config, "wrong": "x: 1"}
    lost, fine, wrong = jobs = [Job(name, DigestData("train_mmoe", text)) for name, text in requests.items()]
    workers.work(jobs)
    assert lost.error == f"its process ended with code -9; see {workers.folder / 'worker-0.log'}"
    assert isinstance(fine.reply, DataDigest)
    assert wrong.error == "config: unknown key x; --help lists the keys"
    assert list(workers.workers) != [first]
