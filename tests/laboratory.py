"""Two small sweeps and a run of data_prep in one store, made once for all tests that look at what sweeps leave."""

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FULL, lending, mlflow_run, project_in, store_in

from pipeline.__main__ import main
from pipeline.sweeps.local_workers import LocalWorkers
from pipeline.tracking.writer_client import Writer

METRIC = "test/logloss_ctcvr"
MMOE = {
    "task": "train_mmoe",
    "config": "configs/mtl_mmoe.yaml",
    "settings": {
        "data.embedded.rows": 10_000,
        "batch_size": 256,
        "max_steps": 12,
        "evaluation.every_steps": 6,
        "tracking.log_every": 1,
        "tracking.influence_every": 2,
        "model.experts.hidden": [16],
        "model.towers.hidden": [8],
    },
    "baseline": {"aux_focal": False},
    "arms": [
        {"aux_focal": True, "lambda": 0.0, "gamma": 2.0, "warmup_steps": 3},
        {"aux_focal": True, "lambda": 5.0, "gamma": 1.0, "warmup_steps": 3},
    ],
    "controls": "reweight",
    "seeds": [0, 1],
    "jobs": 1,
    "metric": METRIC,
}
ARMS = ("baseline", "l0 g2 w3", "l5 g1 w3", "w+5 w3")  # of MMOE, a control behind its arm
ALPHA = {
    "task": "train_visobert",
    "config": "configs/config_multi_embedded.yaml",
    "settings": {"data.embedded.rows": 300, "model.embedded.width": 16, "batch_size": 32, "max_steps": 6,
                 "baselines": False},
    "baseline": {"alpha": None, "gamma": 0},
    "arms": [{"alpha": "auto", "gamma": 0}, {"alpha": [1.0, 1.2, 1.5], "gamma": 2}],
    "seeds": [0, 1],
    "jobs": 1,
    "metric": "test/sentiment_f1_macro",
}  # fmt: skip
COMMANDS = ("data_prep --data.embedded.rows 300", "sweep --config alpha.yaml")  # and MMOE
SWEEPS_WORKERS = ("pipeline.sweeps.sweep.LocalWorkers", "pipeline.sweeps.planning.LocalWorkers")


@dataclass(frozen=True)
class Laboratory:
    """A project's folder with what COMMANDS left in its mlflow.db: the newest sweep is MMOE. Tests only read it."""

    folder: Path
    client: Any  # MLflow's
    printed: str  # by MMOE, to standard error
    processes: dict[str, type]  # name -> class: what is called by `call_pipeline` uses the running worker and writer

    def runs(self, condition: str) -> list[Any]:
        found: list[Any] = self.client.search_runs(["0"], condition, order_by=["attributes.start_time ASC"])
        return found

    def sweep(self, task: str) -> str:
        (summary,) = self.runs(f"tags.role = 'summary' AND tags.task = '{task}'")
        return str(summary.data.tags["sweep_id"])

    def by_arm(self, task: str, metric: str) -> dict[str, dict[int, float]]:
        """Arm -> seed -> last value."""
        found: dict[str, dict[int, float]] = {}
        for run in self.runs(f"tags.sweep_id = '{self.sweep(task)}' AND tags.role != 'summary'"):
            found.setdefault(run.data.tags["arm"], {})[int(run.data.tags["seed"])] = run.data.metrics[metric]
        return found

    def points(self, run_id: str, metric: str) -> dict[int, float]:
        """Step -> value."""
        return {point.step: point.value for point in self.client.get_metric_history(run_id, metric)}


@contextmanager
def laboratory_in(folder: Path, empty_store: Path) -> Iterator[Laboratory]:
    """Made by the entry points, with one worker and one writer for all of them, whose starts take seconds.

    MMOE runs in the run that `mlflow run` opens, and in `make faults` by `mlflow run` itself.
    """
    from mlflow import MlflowClient

    project_in(folder)
    store_in(folder, empty_store)
    for name, sweep in {"mmoe": MMOE, "alpha": ALPHA}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep))
    client = MlflowClient(uri := f"sqlite:///{folder / 'mlflow.db'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        workers, writer = LocalWorkers(1, folder / "workers"), Writer()
        processes: dict[str, type] = dict.fromkeys(SWEEPS_WORKERS, lending_workers(workers))
        processes["pipeline.tracking.writer_client.Writer"] = lending(writer)
        for name, value in processes.items():
            patch.setattr(name, value)
        for command in COMMANDS:
            call(command)
        if FULL:
            result = mlflow_run("sweep", folder, config="mmoe.yaml")
            assert result.returncode == 0, result.stderr
            printed = result.stderr
        else:
            opened = client.create_run("0", run_name="legendary-gnat-695").info.run_id  # as `mlflow run` does
            patch.setenv("MLFLOW_RUN_ID", opened)
            printed = call("sweep --config mmoe.yaml")
    with writer:
        yield Laboratory(folder, client, printed, processes)
    workers.close()


def call(command: str) -> str:
    """What an entry point that succeeds prints to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 0, printed.getvalue()
    return printed.getvalue()


def lending_workers(workers: LocalWorkers) -> type[LocalWorkers]:
    """A class whose pools are all the one that runs already: starting a worker takes seconds."""

    class Lent(LocalWorkers):
        def __init__(self, size: int, folder: Path, gpus: Any = ()) -> None:  # noqa: ARG002
            folder.mkdir(parents=True, exist_ok=True)
            self.__dict__ = workers.__dict__

        def close(self) -> None:
            """Its owner does that."""

    return Lent
