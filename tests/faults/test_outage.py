"""A tracking server that is killed in mid-run: training goes on, and everything arrives, each point once.

PostgreSQL is under the server, and it stays away for thousands of steps, whose pace is printed; MLflow's own client is
the judge. test_delivery and test_sync have the short forms.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHRUNK, only_full, run_pipeline
from server import MlflowServer, Postgres, need_postgres

from pipeline.names import MEASURED

STEPS = 5000
KILLED_AT = 1000  # logged steps, more or less
BACK_AT = 2500  # until then the server is away
HELD_AT = 3000  # where the training waits until the server is back, or away
BLOCK_STEPS = 50
Points = dict[tuple[str, int], str]  # (metric, step) -> value, bit for bit

pytestmark = [pytest.mark.faults, only_full]

CONFIG = SHRUNK | {
    "training.max_steps": str(STEPS),
    "training.num_train_epochs": str(STEPS),
    "training.batch_size": "2048",
    "evaluation.every_steps": str(STEPS // 2),
    "evaluation.patience": "null",
    "tracking.influence_every": "0",
    "tracking.log_model": "true",
    "tracking.log_report": "false",
}


# In the trainer, which waits for files: what the server does happens in mid-run on a machine of any speed.
HELD = f"""
import time
from pathlib import Path
from pipeline.training.loop import Training

step = Training._step

def held(self, *given):
    for steps, file in (({KILLED_AT + BLOCK_STEPS}, "killed"), ({HELD_AT}, "go")):
        while self.result.steps == steps and not Path(file).exists():
            time.sleep(0.05)
    step(self, *given)

Training._step = held
"""


@pytest.fixture(scope="module")
def backend() -> Iterator[Callable[[str], str]]:
    """`backend(name)`: the URI of an empty database for a server."""
    need_postgres()
    with Postgres() as postgres:
        yield postgres.database


@dataclass
class Trainer:
    """`train_mmoe` in a folder of its own."""

    folder: Path
    impressions: Path
    uri: str

    @property
    def command(self) -> list[str]:
        config = CONFIG | {"data.path": str(self.impressions), "output_dir": str(self.folder / "outputs")}
        options = [part for key, value in config.items() for part in (f"--{key}", value)]
        return ["train_mmoe", "--config", str(ROOT / "configs/mtl_mmoe.yaml"), *options]

    def start(self, changed: str = "") -> "subprocess.Popen[str]":
        """changed: code that runs in the trainer before it begins."""
        program = ["-c", f"{changed}\nfrom pipeline.__main__ import main; main()"] if changed else ["-m", "pipeline"]
        self.folder.mkdir()
        with (self.folder / "stdout").open("w") as output, (self.folder / "stderr").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, *program, *self.command], cwd=self.folder, stdout=output, stderr=errors, text=True,
                env={**os.environ, "MLFLOW_TRACKING_URI": self.uri},
            )  # fmt: skip

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def run_dir(self) -> Path:
        (found,) = [file.parent for file in self.folder.glob("outputs/*/journal.jsonl")]
        return found

    def wait_for(self, steps: int, process: "subprocess.Popen[str]") -> None:
        """Until so many steps are in the journal."""
        end = time.monotonic() + 600
        while time.monotonic() < end and process.poll() is None:
            journals = list(self.folder.glob("outputs/*/journal.jsonl"))
            if journals and journals[0].read_bytes().count(b'"loss_total"') >= steps:
                return
            time.sleep(0.1)
        raise AssertionError(self.stderr)


def history(run_dir: Path) -> Points:
    """The points of history.parquet, each of them once."""
    rows = pq.read_table(run_dir / "history.parquet").to_pylist()
    found = {(row["metric"], row["step"]): row["value"].hex() for row in rows}
    assert len(found) == len(rows)
    return found


def decided(points: Points) -> Points:
    """Without measurements."""
    return {key: value for key, value in points.items() if not key[0].startswith(MEASURED)}


def in_mlflow(client: Any, run: Any) -> Points:
    """Every point that the store has of the run, each of them once."""
    found = [
        ((name, point.step), point.value.hex())
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def only_run(client: Any) -> Any:
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def told_of(run: Any) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Params, and the tags that say what was trained."""
    wanted = ("task", "seed", "data_digest", "run_key")
    return run.data.params, {name: run.data.tags[name] for name in wanted}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, impressions: Path) -> tuple[Points, Any]:
    """The same training, undisturbed, in a store without a server: its points, and its run."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("reference") / "run"
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    trainer = Trainer(folder, impressions, uri)
    assert trainer.start().wait(600) == 0, trainer.stderr
    points = history(trainer.run_dir)
    assert [step for name, step in points if name == "loss_total"] == list(range(STEPS))
    return decided(points), only_run(MlflowClient(uri))


def steps_per_second(run_dir: Path, start_ms: float, end_ms: float) -> float:
    """The median over blocks of steps between the two moments."""
    table = pq.read_table(run_dir / "history.parquet", filters=[("metric", "=", "loss_total")])
    moments = sorted(moment for moment in table["timestamp"].to_pylist() if start_ms <= moment < end_ms)
    blocks = zip(moments[::BLOCK_STEPS], moments[BLOCK_STEPS::BLOCK_STEPS], strict=False)
    return median(1000 * BLOCK_STEPS / max(1, last - first) for first, last in blocks)


def test_a_server_that_comes_back_gets_every_point_once(
    tmp_path: Path, impressions: Path, backend: Callable[[str], str], reference: tuple[Points, Any]
) -> None:
    from mlflow import MlflowClient

    database = backend("returns")
    with MlflowServer(tmp_path / "server", database) as server:
        trainer = Trainer(tmp_path / "run", impressions, server.uri)
        process = trainer.start(HELD)
        trainer.wait_for(KILLED_AT // 4, process)
        began = time.time() * 1000
        trainer.wait_for(KILLED_AT, process)
        server.kill()
        killed = time.time() * 1000
        (trainer.folder / "killed").touch()
        trainer.wait_for(BACK_AT, process)  # fails where every step waits for the server
        restarted = time.time() * 1000
        server.start()
        back = time.time() * 1000
        (trainer.folder / "go").touch()
        assert process.wait(600) == 0, trainer.stderr
    assert trainer.stderr.count("is unavailable") == 1, trainer.stderr
    assert trainer.stderr.count("is back") == 1, trainer.stderr

    client = MlflowClient(database)
    run = only_run(client)
    assert run.info.status == "FINISHED"
    points = history(trainer.run_dir)
    assert in_mlflow(client, run) == points
    assert decided(points) == reference[0]
    assert told_of(run) == told_of(reference[1])

    before = steps_per_second(trainer.run_dir, began, killed)
    during = steps_per_second(trainer.run_dir, killed, restarted)
    print(
        f"\n{len(points)} points, each once; steps/s before {before:.1f}, during {during:.1f} ({during / before:.1%})"
    )
    last = max(pq.read_table(trainer.run_dir / "history.parquet")["timestamp"].to_pylist())
    assert last > back  # it went on training with the server that had come back


def test_a_server_that_never_comes_back_costs_nothing(
    tmp_path: Path, impressions: Path, backend: Callable[[str], str], reference: tuple[Points, Any]
) -> None:
    from mlflow import MlflowClient

    with MlflowServer(tmp_path / "server", backend("lost")) as server:
        trainer = Trainer(tmp_path / "run", impressions, server.uri)
        process = trainer.start(HELD)
        trainer.wait_for(KILLED_AT, process)
    for file in ("killed", "go"):
        (trainer.folder / file).touch()
    assert process.wait(600) == 3, trainer.stderr
    assert f"python -m pipeline sync {trainer.folder / 'outputs'}" in trainer.stderr.splitlines()[-1]
    run_id = trainer.run_dir.name

    database = backend("other")
    with MlflowServer(tmp_path / "other", database) as other:
        synced = run_pipeline("sync", str(trainer.run_dir), cwd=tmp_path, MLFLOW_TRACKING_URI=other.uri)
        assert synced.returncode == 0, synced.stderr
        again = run_pipeline("sync", str(trainer.run_dir), cwd=tmp_path, MLFLOW_TRACKING_URI=other.uri)
        assert again.returncode == 0, again.stderr
        run = only_run(MlflowClient(database))
        artifacts = {file.path for file in MlflowClient(other.uri).list_artifacts(run.info.run_id)}
    client = MlflowClient(database)
    assert run.info.status == "FINISHED"
    assert run.data.tags["original_run_id"] == run_id
    assert run.info.run_id != run_id
    points = history(trainer.run_dir)
    assert in_mlflow(client, run) == points
    assert decided(points) == reference[0]
    assert told_of(run) == told_of(reference[1])
    undisturbed = Path(reference[1].data.tags["run_dir"]).parents[1] / "mlruns" / "0" / reference[1].info.run_id
    assert artifacts == {file.name for file in (undisturbed / "artifacts").iterdir()}
    print(f"\n{len(points)} points, {len(artifacts)} artifacts delivered by sync, equal to the undisturbed run")


LONG_RUN = """
import sys, threading
from pathlib import Path
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.writer_client import Writer

steps = int(sys.argv[1])
with Writer() as writer:
    run = MlflowRun(writer, RunRequest(name="long"), Path("outputs"))
    for quarter in range(4):
        print(writer.process.pid, flush=True)
        sys.stdin.readline()
        for step in range(quarter * steps // 4, (quarter + 1) * steps // 4):
            run.log_metrics(step, {"loss_total": 1 / (step + 1), "global_step": step})
            if step % 10 == 0:
                run.flush()
        run.flush()
    print(writer.process.pid, flush=True)
    sys.stdin.readline()
    run.finish("FINISHED", patience=120)
"""


class Peak:
    """The most memory that processes held together, in MB, as a thread sees it."""

    def __init__(self) -> None:
        self.megabytes, self.ended = 0.0, threading.Event()
        self.pids: set[int] = set()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ended.wait(0.1):
            self.megabytes = max(self.megabytes, sum(_resident(pid) for pid in tuple(self.pids)))


def _resident(pid: int) -> float:
    """MB; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def peak_of(steps: int, folder: Path, server: MlflowServer, away: bool) -> float:
    """Peak resident memory of trainer and writer, MB, with the server away for the middle half of the steps."""
    folder.mkdir()
    peak = Peak()
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_RUN, str(steps)], cwd=folder, env={**os.environ, "MLFLOW_TRACKING_URI": server.uri},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    peak.pids.add(process.pid)
    for quarter in range(5):
        peak.pids.add(int(process.stdout.readline()))
        if away and quarter == 1:
            server.kill()
        if away and quarter == 3:
            server.start()
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait(3000) == 0
    peak.ended.set()
    peak.thread.join()
    return peak.megabytes


def test_two_hundred_thousand_steps_take_no_more_memory_than_a_thousand(
    tmp_path: Path, backend: Callable[[str], str]
) -> None:
    from mlflow import MlflowClient

    database = backend("memory")
    with MlflowServer(tmp_path / "server", database) as server:
        short = peak_of(1000, tmp_path / "short", server, away=False)
        long = peak_of(200_000, tmp_path / "long", server, away=True)
    client = MlflowClient(database)
    newest = client.search_runs(["0"], order_by=["start_time DESC"])[0]
    assert newest.info.status == "FINISHED"
    for name in ("loss_total", "global_step"):
        steps = [point.step for point in client.get_metric_history(newest.info.run_id, name)]
        assert sorted(steps) == list(range(200_000))
    print(f"\npeak memory of trainer and writer: {short:.0f} MB for 1,000 steps, {long:.0f} MB for 200,000")
    assert long - short < 200
