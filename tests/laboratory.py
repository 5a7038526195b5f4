"""Two small sweeps and a run of data_prep in one store, made once for all tests that look at what sweeps leave."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import mlflow_run, project_in, store_in

from pipeline.__main__ import main

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
COMMANDS = ("data_prep --data.embedded.rows 300", "sweep --config alpha.yaml")  # and MMOE by `mlflow run`


@dataclass(frozen=True)
class Laboratory:
    """A project's folder with what COMMANDS left in its mlflow.db: the newest sweep is MMOE. Tests only read it."""

    folder: Path
    client: Any  # MLflow's
    printed: str  # by MMOE, to standard error

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


def make(folder: Path, empty_store: Path) -> Laboratory:
    """By the entry points; what trains and writes are processes of their own."""
    from mlflow import MlflowClient

    project_in(folder)
    store_in(folder, empty_store)
    for name, sweep in {"mmoe": MMOE, "alpha": ALPHA}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        for arguments in COMMANDS:
            with pytest.raises(SystemExit) as ended:
                main(arguments.split())
            assert ended.value.code == 0, arguments
        result = mlflow_run("sweep", folder, config="mmoe.yaml")
    assert result.returncode == 0, result.stderr
    return Laboratory(folder, MlflowClient(f"sqlite:///{folder / 'mlflow.db'}"), result.stderr)
