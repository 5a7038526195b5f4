"""SIGKILL anywhere in a training; started again with resume=auto it is the run that nobody killed."""

import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHRUNK, only_full
from killing import WHO, Kill, start
from safetensors.torch import load_file

from pipeline.names import MEASURED

GATE, EPOCH = 9, 8  # of 24 steps: the gate opens in the second of three epochs
ALWAYS = ("<Training._step", ">Training._backward", ">Training._step")
EVALUATING = ("<BestWeights.consider", ">BestWeights.consider")  # every 4 steps
SAVING = ("<Saver.save", ">Saver.save", "<Checkpoints._prune")  # every 5 steps

pytestmark = [pytest.mark.faults, only_full]


@dataclass(frozen=True)
class Job:
    """A small training of three epochs, as its command line says it."""

    entry: str
    settings: dict[str, str]
    steps: int  # of an epoch

    @property
    def arguments(self) -> list[str]:
        return [self.entry, *(part for key, value in self.settings.items() for part in (f"--{key}", value))]


def mmoe(impressions: Path, dropout: float, accumulation: int, prefetch: int) -> Job:
    """4,000 rows in epochs of 8 steps; one step of each epoch is its last, shorter one."""
    settings = {key: value for key, value in SHRUNK.items() if key != "training.max_steps"}
    settings |= {"data.path": str(impressions), "training.num_train_epochs": "3", "evaluation.every_steps": "4",
                 "training.batch_size": str(500 // accumulation), "training.accumulation_steps": str(accumulation),
                 "training.prefetch": str(prefetch), "model.experts.dropout": str(dropout),
                 "model.gate.noise": str(dropout), "loss.aux_focal.warmup_steps": str(GATE),
                 "checkpoint.every_steps": "5", "tracking.log_report": "false"}  # fmt: skip
    return Job("train_mmoe", settings, EPOCH)


def visobert(cache: Path, dropout: float, accumulation: int, prefetch: int) -> Job:
    settings = {"config": str(ROOT / "configs/config_multi_embedded.yaml"), "data.embedded.rows": "300",
                "data.cache": str(cache), "baselines": "false", "training.num_train_epochs": "3",
                "training.batch_size": str(32 // accumulation), "training.accumulation_steps": str(accumulation),
                "training.prefetch": str(prefetch), "training.threads": "1", "evaluation.every_steps": "4",
                "model.embedded.layers": "1", "model.dropout": str(dropout), "checkpoint.every_steps": "5",
                "tracking.log_model": "false", "tracking.log_report": "false"}  # fmt: skip
    return Job("train_visobert", settings, 0)


def runs(folder: Path) -> dict[str, tuple[str, str]]:
    """Run id -> (status, name of the role)."""
    with sqlite3.connect(folder / "mlflow.db") as base:
        roles = dict(base.execute("select run_uuid, value from tags where key = 'role'").fetchall())
        return {run: (status, roles.get(run, "")) for run, status in base.execute("select run_uuid, status from runs")}


def points(folder: Path, run_id: str) -> list[tuple[str, int, float]]:
    """Every point in the store, doubles included."""
    with sqlite3.connect(folder / "mlflow.db") as base:
        rows = base.execute("select key, step, value, is_nan from metrics where run_uuid = ?", (run_id,)).fetchall()
    return sorted((key, step, float("nan") if is_nan else value) for key, step, value, is_nan in rows)


def weights(folder: Path, run_id: str) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": value for kind in ("final", "best")
            for name, value in load_file(folder / "outputs" / run_id / kind / "model.safetensors").items()}  # fmt: skip


@dataclass
class Reference:
    """The run that nobody killed."""

    job: Job
    points: list[tuple[str, int, float]]
    weights: dict[str, torch.Tensor]
    steps: int

    @classmethod
    def of(cls, job: Job, folder: Path) -> "Reference":
        code, message = start(job.arguments, folder, MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}")
        assert code == 0, message
        ((run_id, (status, _)),) = runs(folder).items()
        assert status == "FINISHED"
        logged = points(folder, run_id)
        steps = sum(key == "global_step" for key, _, _ in logged)
        return cls(job, logged, weights(folder, run_id), steps)

    def check(self, folder: Path, run_id: str) -> None:
        """The run is this one: every point once, and the same bits."""
        logged = points(folder, run_id)
        assert len({(key, step) for key, step, _ in logged}) == len(logged)
        assert [point for point in logged if not point[0].startswith(MEASURED)] == [
            point for point in self.points if not point[0].startswith(MEASURED)
        ]
        found = weights(folder, run_id)
        assert found.keys() == self.weights.keys()
        assert all(torch.equal(found[name], self.weights[name]) for name in found)


def killed_again_and_again(reference: Reference, kills: list[Kill], folder: Path) -> int:
    """Starts that are killed one after the other, then one that is not. Returns how many died of it."""
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    resuming = [*reference.job.arguments, "--resume", "auto"]
    died, run_id = 0, ""
    for kill in kills:
        code, message = start(resuming, folder, kill, **uri)
        assert code == -9, f"{kill}: {message}"
        died += 1
        (run_id,) = runs(folder)
    code, message = start(resuming, folder, **uri)
    assert code == 0, message
    assert runs(folder) == {run_id: ("FINISHED", "")}
    reference.check(folder, run_id)
    code, message = start(resuming, folder, **uri)  # once more: there is nothing left to do
    assert code == 0
    assert f"run {run_id} is finished already" in message
    assert runs(folder) == {run_id: ("FINISHED", "")}
    reference.check(folder, run_id)
    return died


def moments(steps: int, count: int, generator: random.Random) -> list[Kill]:
    """Kills at random steps of every epoch, in the order of the steps; some right at the gate and at an epoch's end."""
    drawn = [GATE - 1, GATE, GATE + 1, EPOCH, 2 * EPOCH - 1]
    drawn += generator.sample(sorted(set(range(1, steps)) - set(drawn)), count - len(drawn))
    return [Kill(step, generator.choice(places_at(step)), generator.choice(WHO)) for step in sorted(drawn)]


def places_at(step: int) -> tuple[str, ...]:
    """What the training passes with so many steps completed."""
    return ALWAYS + (() if step % 4 else EVALUATING) + (() if step % 5 else SAVING)


@pytest.fixture
def places(tmp_path: Path, empty_store: Path) -> Callable[[str], Path]:
    """Empty folders with a store."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(empty_store, folder / "mlflow.db")
        base = sqlite3.connect(folder / "mlflow.db")
        base.execute("update experiments set artifact_location = ?", (str(folder / "mlruns" / "0"),))
        base.commit()
        base.close()
        return folder

    return make


# dropout, accumulation, prefetch
VARIANTS = [(0.3, 1, 2), (0.0, 4, 0), (0.3, 4, 2), (0.0, 1, 0), (0.3, 1, 0), (0.3, 4, 0)]


@pytest.mark.parametrize("task", ["mmoe", "visobert"])
def test_killed_anywhere_it_is_the_run_that_nobody_killed(
    task: str, impressions: Path, tmp_path_factory: Any, places: Callable[[str], Path]
) -> None:
    """60 kills a task: ten in a row in each of six variants."""
    generator = random.Random(7)
    cache = tmp_path_factory.getbasetemp() / "reviews"
    died = 0
    for number, variant in enumerate(VARIANTS):
        job = mmoe(impressions, *variant) if task == "mmoe" else visobert(cache, *variant)
        reference = Reference.of(job, places(f"whole{number}"))
        kills = moments(reference.steps, 10, generator)
        died += killed_again_and_again(reference, kills, places(f"killed{number}"))
        print(f"{task} dropout {variant[0]}, accumulation {variant[1]}, prefetch {variant[2]}: {len(kills)} kills")
    print(f"{task}: {died} kills, every run equal to the one that was not killed")
    assert died == 60
