"""A branch of a shared prefix is, bit for bit, the run that it would be alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, only_full
from safetensors.torch import load_file

from pipeline.config.strict_config import load
from pipeline.names import MEASURED
from pipeline.runs.shared_prefix import start_from_prefix, train_prefix
from pipeline.runtime.console import Console
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training
from pipeline.training.recorder import NonFiniteError

Make = Callable[..., MmoeConfig]
ARMS: dict[str, dict[str, Any]] = {
    "off": {"loss.aux_focal.enabled": "false"},
    "lambda": {"loss.aux_focal.lambda": 0.5},
    "gamma": {"loss.aux_focal.gamma": 2, "loss.aux_focal.lambda": 3},
    "later": {"loss.aux_focal.warmup_steps": 8, "loss.aux_focal.lambda": 0.5},
    "weight": {"loss.aux_focal.enabled": "false", "loss.late_pos_weight.warmup_steps": 5,
               "loss.late_pos_weight.ctcvr": 40},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"model.experts.dropout": 0.3, "model.gate.noise": 0.5, "model.embedding_dropout": 0.1},
    "dense table, accumulation": {"optim.embedding.name": "adam", "training.accumulation_steps": 2,
                                  "training.clip_norm": 0.5},
    "bf16, evaluated by epoch": {"training.amp": "bf16", "evaluation.every_steps": "null",
                                 "training.batch_size": 1300, "training.num_train_epochs": 3},
    "stopped early, before and after": {"evaluation.every_steps": 2, "evaluation.patience": 2,
                                        "evaluation.metric": "valid/calibration_ctr"},
    "evaluated at the gate, sparse log": {"evaluation.every_steps": 5, "tracking.log_every": 3,
                                          "tracking.influence_every": 3},
}  # fmt: skip


def alone(config: MmoeConfig) -> MemoryRun:
    torch.set_num_threads(1)
    run = MemoryRun()
    Training(MmoeTask(config), run, Console(0, quiet=True), "cpu").train()
    return run


def branched(config: MmoeConfig, folder: Path, task: MmoeTask) -> MemoryRun:
    run = MemoryRun()
    training = Training(task.with_config(config), run, Console(0, quiet=True), "cpu")
    torch.rand(7)  # whatever another run left behind
    start_from_prefix(training, folder)
    training.train()
    return run


def points(run: MemoryRun) -> list[tuple[int, dict[str, float]]]:
    return [(step, {name: value for name, value in values.items() if not name.startswith(MEASURED)})
            for step, values in run.points if not all(name.startswith(MEASURED) for name in values)]  # fmt: skip


def weights(run: MemoryRun) -> dict[str, torch.Tensor]:
    found = {}
    for kind in ("final", "best"):
        file = run.folder / kind / "model.safetensors"
        found |= {f"{kind}/{name}": value for name, value in load_file(file).items()} if file.exists() else {}
    return found


@pytest.mark.parametrize(
    "settings",
    [pytest.param(settings, id=name, marks=[] if settings else [pytest.mark.faults, only_full])
     for name, settings in SETTINGS.items()],
)  # fmt: skip
def test_every_arm_branches_to_the_bits_it_has_alone(small: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    configs = {name: small(**settings, **arm) for name, arm in ARMS.items()}
    prefixes = {name: config.shared_prefix() for name, config in configs.items()}
    assert len({config.fingerprint() for config, _ in prefixes.values()}) == 1
    folders = {step: tmp_path / str(step) for step in (5, 8)}
    torch.set_num_threads(1)
    task = MmoeTask(prefixes["off"][0])
    steps = train_prefix(task, folders, "cpu")
    found = {}
    for name, config in configs.items():
        whole, part = alone(config), branched(config, folders[prefixes[name][1] or 8], task)
        assert points(part) == points(whole), name
        one, other = weights(part), weights(whole)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
        found[name] = points(whole)
    assert steps <= 8
    if "evaluation.patience" not in settings:
        assert steps == 8
        assert len({str(values) for values in found.values()}) == len(ARMS)  # the arms do differ


def test_points_carry_the_arms_own_constants(small: Make, tmp_path: Path) -> None:
    config = small(**{"loss.aux_focal.lambda": 0.5, "loss.aux_focal.gamma": 2})
    task = MmoeTask(config.shared_prefix()[0])
    train_prefix(task, {5: tmp_path / "5"}, "cpu")
    run = branched(config, tmp_path / "5", task)
    logged = [values for _, values in run.points if "global_step" in values]
    assert [values["global_step"] for values in logged] == list(range(12))
    assert {(values["aux_focal_lambda"], values["aux_focal_gamma"]) for values in logged} == {(0.5, 2.0)}
    assert [values["aux_focal_on"] for values in logged] == [False] * 5 + [True] * 7
    assert run.times == sorted(run.times)  # the prefix's points keep the time at which they were made


def test_a_prefix_that_breaks_says_where(small: Make, tmp_path: Path) -> None:
    config = small(**{"optim.dense.lr": 1e30, "loss.aux_focal.enabled": "false"})
    with pytest.raises(NonFiniteError, match="at step"):
        train_prefix(MmoeTask(config), {5: tmp_path / "5"}, "cpu")
    assert not list(tmp_path.glob("5*"))


def test_a_prefix_longer_than_the_training_is_the_training(small: Make, tmp_path: Path) -> None:
    config = small(**{"loss.aux_focal.warmup_steps": 50})
    task = MmoeTask(config.shared_prefix()[0])
    assert train_prefix(task, {50: tmp_path / "50"}, "cpu") == 12
    assert points(branched(config, tmp_path / "50", task)) == points(alone(config))


def test_a_task_shares_what_is_loaded_where_the_config_names_the_same(small: Make, tmp_path: Path) -> None:
    task = MmoeTask(small())
    other = task.with_config(small(**{"optim.dense.lr": 0.1}))
    assert other.data is task.data
    assert other.config.optim.dense.lr == 0.1
    overrides = {"data.embedded.rows": "300", "data.cache": str(tmp_path), "baselines": "false"}
    file = ROOT / "configs/config_multi_embedded.yaml"
    reviews = VisobertTask(load(VisobertConfig, file, overrides))
    same = reviews.with_config(load(VisobertConfig, file, overrides | {"multi_label.focal_alpha": "[1, 2, 3]"}))
    assert same is not None
    assert same.data.splits is reviews.data.splits
    assert same.data.table("train") is reviews.data.table("train")
    assert list(same.alpha.vector) == [1, 2, 3]
    changed = reviews.with_config(load(VisobertConfig, file, overrides | {"data.embedded.seed": "5"}))
    assert changed is not None
    assert changed.data.splits is not reviews.data.splits
    fetched = load(VisobertConfig, file, overrides | {"data_prep_run": "some run"})
    assert reviews.with_config(fetched) is None  # only the entry point can fetch its alpha
