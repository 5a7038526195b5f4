"""Steps of both tasks on another device than the CPU.

Torch's device `meta` has shapes without values. A tensor that stays on the CPU is refused there, as it is on a GPU.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from pipeline.compute.device import precision
from pipeline.config.strict_config import load
from pipeline.maths import losses
from pipeline.tasks.base import TOTAL, Task
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask


@pytest.fixture
def off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Task[Any]], None]:
    """Take a step of a task up to its gradients; every tensor must be there. `meta` has no autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def devices(tensors: Iterable[Tensor]) -> set[str]:
        return {tensor.device.type for tensor in tensors}

    def step(task: Task[Any]) -> None:
        model, batch = task.model().train().to("meta"), task.batch(task.plan(0)[0]).to("meta")
        terms = task.losses(task.forward(model, batch), batch, task.counts(batch), 0)
        probed = task.probe(model, terms)
        terms[TOTAL].backward()
        assert {name for name in terms if name.startswith("influence/")}  # step 0 measures them
        for tensors in (terms, probed, task.influence(probed, terms)):
            assert devices(tensors.values()) == {"meta"}
        assert devices(weight.grad for weight in model.parameters() if weight.grad is not None) == {"meta"}

    return step


def test_a_step_of_the_mmoe(small: Any, off_the_cpu: Any) -> None:
    terms = {"loss.aux_focal.warmup_steps": 0, "model.gate.noise": 0.1, "model.gate.balance_weight": 0.1,
             "model.gate.entropy_weight": 0.1, "model.heads.ctr.fm": True, "model.heads.cvr.wide": True}  # fmt: skip
    off_the_cpu(MmoeTask(small(**terms, optim__embedding__name="adam")))  # `meta` has no sparse gradients


def test_a_step_of_the_reviews(off_the_cpu: Any, tmp_path: Path) -> None:
    config = load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml",
                  {"data.embedded.rows": "200", "data.cache": str(tmp_path), "baselines": "false"})  # fmt: skip
    off_the_cpu(VisobertTask(config))


def test_a_tensor_that_stays_on_the_cpu_is_found(
    off_the_cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = losses._labelled_cells

    def on_the_cpu(logits: Tensor, label: Tensor) -> Any:
        return original(logits + torch.zeros(logits.shape), label)

    monkeypatch.setattr(losses, "_labelled_cells", on_the_cpu)
    with pytest.raises(RuntimeError, match="device"):
        test_a_step_of_the_reviews(off_the_cpu, tmp_path)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_on_a_gpu_with_its_instructions(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch emulates bf16 on older GPUs, which counts unless it is told not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert precision("auto", "cuda") == expected
