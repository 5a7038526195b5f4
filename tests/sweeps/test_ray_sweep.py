"""Sweeps on Ray: on a cluster that the sweep starts, and in `make faults` on one of two nodes on this machine.

The table must be that of `engine=local`, whatever is lost on the way. Without Ray these tests are skipped, or fail if
CI_RAY=1.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Call, only_full, store_in
from test_sweep import assert_same_results, by_arm, by_arm_summary, sweep_file, sweep_id_of, table_of

from pipeline.errors import UserError
from pipeline.sweeps.ray_cluster import refuse_local_store

ARMS: list[dict[str, Any]] = [{"lambda": 5.0}, {"lambda": 0.0}, {"lambda": 1.0}, {"lambda": 5.0, "gamma": 2.0},
                              {"lambda": 1.0, "gamma": 2.0}]  # fmt: skip
SETTINGS = {"epochs": 5, "training.max_steps": 300, "loss.aux_focal.warmup_steps": 10, "evaluation.every_steps": 100,
            "checkpoint.every_steps": 20}  # fmt: skip
SECONDS = 900  # after which a sweep hangs, on the busiest machine
one_process = pytest.mark.xdist_group("ray")  # makes the cluster and the undisturbed sweep once


@dataclass
class TwoNodes:
    """A cluster of two nodes with one CPU each; the second can be lost."""

    cluster: Any
    second: Any = None

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def complete(self) -> None:
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, include_dashboard=False)

    def lose(self) -> None:
        """Lose the second node at once, as in a power cut."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def raylet(self) -> int:
        """Id of the second node's raylet, the parent of its task processes."""
        return int(self.second.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Folder of Ray's files, in which `auto` looks for a cluster."""
    if importlib.util.find_spec("ray") is None:
        (pytest.fail if os.environ.get("CI_RAY") == "1" else pytest.skip)("Ray is not installed")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path is 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes(ray_folder: Path) -> Iterator[TwoNodes]:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, include_dashboard=False)
        yield TwoNodes(cluster)
    finally:
        cluster.shutdown()


@pytest.fixture
def cluster(nodes: TwoNodes) -> TwoNodes:
    nodes.complete()
    return nodes


@dataclass
class Sweep:
    """A sweep in its own process."""

    folder: Path
    file: Path
    engine: tuple[str, ...] = ()
    process: Any = field(init=False)

    def __enter__(self) -> "Sweep":
        command = [sys.executable, "-m", "pipeline", "sweep", "--config", str(self.file), *self.engine]
        self.log = self.folder / "stderr.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stderr=log, stdout=subprocess.DEVNULL, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stderr(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        """Its exit code, once it has ended."""
        self.process.wait(SECONDS)
        return int(self.process.returncode)

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until the condition is true; returns its value. The sweep must not end before."""
        end = time.monotonic() + SECONDS
        while not (result := condition()):
            assert self.process.poll() is None, f"it ended before {what}: {self.stderr()}"
            assert time.monotonic() < end, f"waited in vain for {what}: {self.stderr()}"
            time.sleep(0.02)
        return result

    def in_the_middle(self, of: Callable[[str, int], bool] = lambda _, __: True) -> tuple[str, int] | None:
        """A run past its first checkpoint, and the id of the process that trains it."""
        for journal in (self.folder / "outputs").glob("*/journal.jsonl"):
            text = journal.read_text()
            if '"role":"summary"' in text or '"op":"finish"' in text or '"step":60,' not in text:
                continue
            pid = int(json.loads((journal.parent / "owner.json").read_text())["pid"])
            if of(journal.parent.name, pid) and Path(f"/proc/{pid}").exists():
                return journal.parent.name, pid
        return None


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, impressions: Path) -> tuple[str, Any]:
    """The sweep by `engine=local`: its standard error and its runs."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("local")
    store_in(folder, empty_store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        with Sweep(folder, the_sweep(folder, impressions)) as sweep:
            assert sweep.end() == 0, sweep.stderr()
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return sweep.stderr(), by_arm(client, sweep_id_of(sweep.stderr()))


def the_sweep(folder: Path, impressions: Path) -> Path:
    return sweep_file(folder, impressions, arms=ARMS, jobs=2, metric="test/logloss_ctcvr", settings=SETTINGS)


def assert_as_undisturbed(stderr: str, client: Any, undisturbed: tuple[str, Any]) -> None:
    """Same sweep, table, points and weights; one finished run per key, each point once."""
    expected, expected_runs = undisturbed
    sweep_id = sweep_id_of(stderr)
    assert sweep_id == sweep_id_of(expected)
    assert table_of(stderr) == table_of(expected)
    runs = by_arm(client, sweep_id)
    assert len(runs) == 2 * (len(ARMS) + 1)
    assert len({run.data.tags["run_key"] for run in runs.values()}) == len(runs)
    assert_same_results(runs, expected_runs)
    every = client.search_runs(["0"])
    assert len(every) == len(runs) + len(by_arm_summary(client, sweep_id)) == len(runs) + 1
    assert {run.info.status for run in every} == {"FINISHED"}
    for run in runs.values():
        for metric in ("loss_total", "test/auc_ctcvr"):
            points = client.get_metric_history(run.info.run_id, metric)
            assert len({point.step for point in points}) == len(points)


@one_process
@pytest.mark.faults
@only_full
def test_a_node_and_a_process_are_lost_in_the_middle_of_arms(
    cluster: TwoNodes, workplace: Path, client: Any, impressions: Path, undisturbed: tuple[str, Any]
) -> None:
    file = the_sweep(workplace, impressions)
    with Sweep(workplace, file, ("--engine", "ray", "--ray_address", cluster.address)) as sweep:
        raylet = cluster.raylet()
        lost, _ = sweep.wait_for(lambda: sweep.in_the_middle(lambda _, pid: parent_of(pid) == raylet), "an arm there")
        cluster.lose()
        sweep.wait_for(lambda: "again: its process or node was lost" in sweep.stderr(), "Ray's retry")
        killed, pid = sweep.wait_for(lambda: sweep.in_the_middle(lambda run, _: run != lost), "another arm")
        os.kill(pid, signal.SIGKILL)
        assert sweep.end() == 0, sweep.stderr()
    stderr = sweep.stderr()
    assert len(re.findall("again: its process or node was lost", stderr)) == 2, stderr
    assert "failed" not in stderr
    assert_as_undisturbed(stderr, client, undisturbed)
    for run_id in (lost, killed):  # from a checkpoint of its own, after the shared prefix
        assert int(client.get_run(run_id).data.tags["resumed_at"]) >= 40


@one_process
@pytest.mark.faults
@only_full
def test_cancelled_on_ray_and_finished_by_processes(
    cluster: TwoNodes, workplace: Path, client: Any, impressions: Path, undisturbed: tuple[str, Any]
) -> None:
    file = the_sweep(workplace, impressions)
    with Sweep(workplace, file, ("--engine", "ray", "--ray_address", cluster.address)) as sweep:
        _, asked = sweep.wait_for(sweep.in_the_middle, "an arm")
        os.kill(asked, signal.SIGTERM)  # its node is to go: the run is saved, and goes on elsewhere
        sweep.wait_for(lambda: "again: its process or node was lost" in sweep.stderr(), "Ray's retry")
        sweep.wait_for(lambda: sweep.in_the_middle(lambda _, pid: pid != asked), "an arm after that")
        os.killpg(sweep.process.pid, signal.SIGINT)  # Ctrl-C
        assert sweep.end() == 130, sweep.stderr()
    assert sweep.stderr().splitlines()[-1] == "error: stopped by SIGINT"
    assert "Traceback" not in sweep.stderr()
    left = client.search_runs(["0"])
    assert {run.info.status for run in left} <= {"KILLED", "FINISHED"}, sweep.stderr()
    ended = [run for run in left if run.info.status == "KILLED"]
    assert {run.data.tags["role"] for run in ended} >= {"summary"}
    assert len(ended) >= 2
    with Sweep(workplace, file) as again:
        assert again.end() == 0, again.stderr()
    assert_as_undisturbed(again.stderr(), client, undisturbed)


@one_process
def test_an_arm_that_changes_nothing_is_the_baseline(
    ray_folder: Path, workplace: Path, client: Any, impressions: Path
) -> None:
    """lambda 0 equals the baseline bit for bit, and the first look says so, on a cluster of the sweep's own."""
    file = sweep_file(workplace, impressions, arms=[{"lambda": 0.0}, {"lambda": 5.0}], seeds={"first": 3, "most": 3},
                      jobs=2, metric="test/logloss_ctcvr")  # fmt: skip
    with Sweep(workplace, file, ("--engine", "ray")) as sweep:
        assert sweep.end() == 0, sweep.stderr()
    runs_of_sweep = client.search_runs(["0"], f"tags.sweep_id = '{sweep_id_of(sweep.stderr())}'")
    assert {run.info.status for run in runs_of_sweep} == {"FINISHED"}
    assert "look at 3 seeds: l0 g1 w5 is identical" in sweep.stderr()
    runs = {run.data.tags["arm"]: run for run in runs_of_sweep if run.data.tags.get("seed") == "0"}
    assert set(runs) == {"baseline", "l0 g1 w5", "l5 g1 w5"}
    for run in runs.values():
        points = client.get_metric_history(run.info.run_id, "global_step")
        assert sorted((point.step, point.value) for point in points) == [(step, step) for step in range(12)]
    zero, base, five = (runs[arm].data.metrics["test/logloss_ctcvr"] for arm in ("l0 g1 w5", "baseline", "l5 g1 w5"))
    assert zero == base != five
    assert f"{base:.4f}" in sweep.stderr()


@one_process
@pytest.mark.faults
@only_full
def test_a_search_on_ray_hears_evaluations_and_stops_trials(
    cluster: TwoNodes, workplace: Path, client: Any, impressions: Path
) -> None:
    """Learning rates from useless to too high: some fall behind the median and are stopped."""
    search = {
        "trials": 6, "startup_trials": 2, "settings": {"aux_focal": True}, "metric": "valid/logloss_ctcvr",
        "mode": "min", "space": {"optim.dense.lr": {"low": 1e-6, "high": 1.0, "log": True}},
    }  # fmt: skip
    settings = {"epochs": 4, "training.max_steps": 240, "evaluation.every_steps": 5}
    file = sweep_file(workplace, impressions, arms=None, search=search, settings=settings, seeds=[0], jobs=1)
    with Sweep(workplace, file, ("--engine", "ray", "--ray_address", cluster.address)) as sweep:
        assert sweep.end() == 0, sweep.stderr()
    runs_of_sweep = client.search_runs(["0"], f"tags.sweep_id = '{sweep_id_of(sweep.stderr())}'")
    trials = [run for run in runs_of_sweep if run.data.tags["role"] == "trial"]
    assert sorted(int(run.data.tags["trial"]) for run in trials) == list(range(6))
    stopped = [run for run in trials if "pruned" in run.data.tags]
    assert stopped, sweep.stderr()
    for run in trials:
        steps = len(client.get_metric_history(run.info.run_id, "loss_total"))
        assert steps == 240 if run not in stopped else int(run.data.tags["pruned"]) <= steps < 240
    assert {run.info.status for run in runs_of_sweep} == {"FINISHED"}
    best = min(trial_value(client, run) for run in trials if run not in stopped)
    assert f"{best:.4f}" in sweep.stderr()


def trial_value(client: Any, run: Any) -> float:
    return min(point.value for point in client.get_metric_history(run.info.run_id, "valid/logloss_ctcvr"))


def test_what_ray_cannot_do_is_one_line(
    workplace: Path, impressions: Path, call_pipeline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sweep_file(workplace, impressions)

    def refused(*arguments: str) -> str:
        result = call_pipeline("sweep", "--config", str(file), *arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        return result.stderr.splitlines()[-1]

    address = "--ray_address"
    assert "ray_address: found 127.0.0.1:6379 with engine local, allowed: engine ray" in refused(
        address, "127.0.0.1:6379"
    )
    assert "ray_address" in refused("--engine", "ray", address, "ray://head:10001")
    assert "engine" in refused("--engine", "dask")
    assert "training.threads is null, allowed with engine ray" in refused("--engine=ray", "--training.threads", "null")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert re.search(r"Ray is not installed.*\.\[ray\].*engine local", refused("--engine", "ray"))


@pytest.fixture
def refused(workplace: Path, impressions: Path, call_pipeline: Call) -> Callable[..., str]:
    """`refused(*arguments)`: the one-line error of a sweep on Ray that does not start."""
    file = sweep_file(workplace, impressions)

    def call(*arguments: str) -> str:
        result = call_pipeline("sweep", "--config", str(file), "--engine", "ray", *arguments)
        assert result.returncode == 2
        *warnings, line = result.stderr.splitlines()
        assert all(text.startswith("warning: ") for text in warnings), result.stderr
        assert not list((workplace / "outputs").glob("*/journal.jsonl"))
        return line

    return call


@one_process
def test_a_cluster_that_is_not_there(
    ray_folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = refused("--ray_address", "127.0.0.1:1")
    assert re.fullmatch("error: ray_address 127.0.0.1:1: the cluster does not answer: .*refused", nobody)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert refused().startswith("error: RAY_ADDRESS ray://127.0.0.1:10001: allowed: host:port")


@one_process
@pytest.mark.faults
@only_full
def test_a_cluster_of_another_version(
    cluster: TwoNodes, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(ray, "__version__", "2.0.0")
    assert re.search(r"^error: RAY_ADDRESS .*[Vv]ersion mismatch.*2\.0\.0", refused())


ONE = {"NodeManagerHostname": "head", "NodeManagerAddress": "10.0.0.1"}
OTHER = {"NodeManagerHostname": "gpu-7", "NodeManagerAddress": "10.0.0.2"}


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "sqlite+pysqlite:///x.db", "file:///runs", "./mlruns"])
def test_several_machines_need_a_server(uri: str) -> None:
    refuse_local_store(uri, [ONE, ONE])
    with pytest.raises(UserError, match=r"gpu-7 \(10\.0\.0\.2\), head \(10\.0\.0\.1\); allowed: a server"):
        refuse_local_store(uri, [ONE, OTHER])


@pytest.mark.parametrize("uri", ["http://host:5000", "https://host", "postgresql://u:secret@host/base"])
def test_a_server_serves_several_machines(uri: str) -> None:
    refuse_local_store(uri, [ONE, OTHER])
