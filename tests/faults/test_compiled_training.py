"""Training with `training.compile`, with the code that torch generates: minutes of a C++ compiler."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SHRUNK, only_full, run_pipeline, store_in
from killing import Kill
from test_kills import Job, Reference, killed_again_and_again, mmoe, places, visobert  # noqa: F401 (a fixture)

from pipeline.config.strict_config import load
from pipeline.runtime.console import Console
from pipeline.tasks.base import Task
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

pytestmark = [pytest.mark.faults, only_full]

STEPS = 200
COMPARED = ("loss", "grad_norm/", "influence/")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One cache of compiled code for these tests, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would show thousands of lines
        yield


def mmoe_task(folder: Path, compiled: bool) -> Task[Any]:
    settings = {"data.embedded.rows": "60000", "training.batch_size": "256", "training.num_train_epochs": "10",
                "training.amp": "no", "training.compile": str(compiled), "loss.aux_focal.warmup_steps": "50",
                "model.experts.dropout": "0.1", "model.gate.noise": "0.1", "model.heads.ctr.fm": "true",
                "model.heads.cvr.wide": "true", "output_dir": str(folder)}  # fmt: skip
    return MmoeTask(load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", settings))


def reviews_task(folder: Path, compiled: bool, **more: str) -> Task[Any]:
    settings = {"data.embedded.rows": "600", "data.cache": str(folder / "cache"), "training.num_train_epochs": "30",
                "training.amp": "no", "training.compile": str(compiled), "baselines": "false"} | more  # fmt: skip
    return VisobertTask(load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml", settings))


def pretrained_task(folder: Path, compiled: bool) -> Task[Any]:
    """An encoder of transformers, with two narrow layers and new weights."""
    from transformers import XLMRobertaConfig

    from bench.visobert import write_model, write_reviews

    if not (folder / "model").exists():
        write_model(folder / "model", write_reviews(folder / "reviews.csv", 600))
        XLMRobertaConfig(vocab_size=15_002, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=96, max_position_embeddings=514, pad_token_id=1,
                         type_vocab_size=2).save_pretrained(str(folder / "model"))  # fmt: skip
    settings = {"data.train": folder / "reviews.csv", "data.cache": folder / "cache", "model.name": folder / "model",
                "model.init": "random", "training.batch_size": 16, "training.num_train_epochs": 10, "baselines": False,
                "training.amp": "no", "training.compile": compiled}  # fmt: skip
    return VisobertTask(load(VisobertConfig, None, {key: str(value) for key, value in settings.items()}))


def values(run: MemoryRun) -> Mapping[int, Mapping[str, float]]:
    return {step: {name: value for name, value in logged.items() if name.startswith(COMPARED)}
            for step, logged in run.points if "loss_total" in logged}  # fmt: skip


@pytest.mark.parametrize("make", [mmoe_task, reviews_task, pretrained_task])
def test_each_of_200_steps_is_the_one_without_compilation(
    make: Callable[[Path, bool], Task[Any]], tmp_path: Path
) -> None:
    """From the same state, dropout and noise included. Over many steps, rounding would grow in any training.

    To 1e-5 of the largest value in the training: where a gradient nearly vanishes, its terms cancel. It sums up to 1e5
    products in another order, which is 300 roundings of 6e-8 if they are independent, and few of them are large.
    """
    torch.set_num_threads(1)
    runs = MemoryRun(), MemoryRun()
    compiled, plain = (Training(make(tmp_path, way), run, Console(0, quiet=True), "cpu")
                       for way, run in zip((True, False), runs, strict=True))  # fmt: skip
    for step in range(1, STEPS + 1):
        plain.load_state(compiled.state())
        compiled.advance(step)
        plain.advance(step)
    for training in (compiled, plain):
        training.recorder.drain()
    logged, expected = map(values, runs)
    assert len(logged) == len(expected) == STEPS
    for name in expected[0] | expected[100]:  # the gate is open at step 100
        pairs = [(logged[step][name], expected[step][name]) for step in expected if name in expected[step]]
        largest = max(abs(value) for _, value in pairs)
        worst = max(abs(one - other) for one, other in pairs) / largest
        print(f"{name}: {worst:.1e} of its largest value")
        assert worst < 1e-5, name


@pytest.mark.parametrize("task", ["mmoe", "visobert"])
def test_killed_and_resumed_it_is_the_run_that_nobody_killed(
    task: str,
    impressions: Path,
    tmp_path: Path,
    places: Callable[[str], Path],  # noqa: F811
) -> None:
    job = mmoe(impressions, 0.3, 1, 2) if task == "mmoe" else visobert(tmp_path / "reviews", 0.3, 4, 0)
    job = replace(job, settings=job.settings | {"training.compile": "true", "training.amp": "no"})
    reference = Reference.of(job, places("whole"))
    kills = [Kill(2), Kill(9, ">Training._backward"), Kill(15, "<Checkpoints._prune")]
    assert killed_again_and_again(reference, kills, places("killed")) == 3


def test_the_workers_of_a_sweep_compile_once(impressions: Path, tmp_path: Path, empty_store: Path) -> None:
    """Three runs in two workers; no library is built twice."""
    store_in(tmp_path, empty_store)
    calls, wrapper = tmp_path / "calls", tmp_path / "g++"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    wrapper.write_text(f'#!/bin/sh\necho "$@" >>{calls}\nexec {compiler} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    settings = {key: yaml.safe_load(value) for key, value in SHRUNK.items()}
    sweep = {"task": "train_mmoe", "config": str(ROOT / "configs/mtl_mmoe.yaml"), "baseline": {"aux_focal": False},
             "settings": settings | {"data": str(impressions), "training.compile": True},
             "arms": [{"lambda": 0.1}, {"lambda": 0.2}], "seeds": [0], "share_prefix": False, "jobs": 2}  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    environment = {"CXX": str(wrapper), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
                   "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}  # fmt: skip
    result = run_pipeline("sweep", "--config", str(file), cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    logs = [log.read_text(encoding="utf-8") for log in tmp_path.rglob("worker-*.log")]
    seconds = [re.findall(r"training\.compile: compiled in (\S+) s", log) for log in logs]
    print(f"seconds of compiling, by worker: {seconds}")
    assert sorted(map(len, seconds)) == [1, 2]
    libraries = re.findall(r" -o (\S+\.so)\b", calls.read_text(encoding="utf-8"))
    print(f"libraries built: {len(libraries)}, different ones: {len(set(libraries))}")
    assert len(libraries) == len(set(libraries)) > 0
