"""Both tasks keep what the training loop expects of a task; planted mistakes are found by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from pipeline.config.strict_config import load
from pipeline.conformance import (
    CHECKS,
    Check,
    check_batches_are_reproducible,
    check_evaluation_is_deterministic,
    check_export_predicts,
    check_losses_are_shares,
    check_optimizers_hold_every_parameter,
    check_resumes_exactly,
    check_shared_prefix,
    check_steps_change_no_buffer,
)
from pipeline.errors import UserError
from pipeline.runs.launch import train_run
from pipeline.tasks.base import predictor_module
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.task import VisobertTask

Make = Callable[..., Any]
DROPOUT = {"model.experts.dropout": 0.3, "model.gate.noise": 0.5, "model.embedding_dropout": 0.1}


@pytest.fixture
def mmoe(small: Make) -> MmoeConfig:
    config: MmoeConfig = small(**DROPOUT, **{"training.accumulation_steps": 2, "loss.aux_focal.lambda": 0.5})
    return config


@pytest.fixture
def visobert(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> VisobertConfig:
    overrides = {
        "data.embedded.rows": "300", "data.cache": str(tmp_path_factory.getbasetemp() / "reviews"),
        "output_dir": str(tmp_path / "outputs"), "training.max_steps": "4", "training.batch_size": "16",
        "training.accumulation_steps": "2", "training.threads": "1", "training.amp": "no", "baselines": "false",
        "evaluation.every_steps": "2",
    }  # fmt: skip
    return load(VisobertConfig, ROOT / "configs/config_multi_embedded.yaml", overrides)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_mmoe_conforms(check: Check, mmoe: MmoeConfig, tmp_path: Path) -> None:
    check(MmoeTask, mmoe, tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.xdist_group("review model")
def test_the_review_model_conforms(check: Check, visobert: VisobertConfig, tmp_path: Path) -> None:
    check(VisobertTask, visobert, tmp_path)


# --- planted mistakes ------------------------------------------------------------------------------------------------


class OwnRows(MmoeTask):
    """Divides a loss by the micro-batch's own rows."""

    def losses(self, output: Any, batch: Impressions, counts: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        losses = dict(super().losses(output, batch, counts, step))
        return losses | {"loss_ctr": losses["loss_ctr"] * counts["rows"] / len(batch)}


class RandomBatch(MmoeTask):
    def batch(self, rows: Any) -> Impressions:
        return super().batch(np.random.permutation(rows))


class GlobalPlan(MmoeTask):
    def plan(self, epoch: int) -> Any:
        return [np.random.permutation(np.asarray(rows)) for rows in super().plan(epoch)]


class BatchNorm(MmoeTask):
    def model(self) -> Any:
        model = super().model()
        model.norm = nn.BatchNorm1d(2)
        return model

    def forward(self, model: nn.Module, batch: Impressions) -> Any:
        output = model(batch)
        return output._replace(logits=model.norm(output.logits))


class FrozenBatchNorm(BatchNorm):
    """Its normalisation stays in evaluation mode, as in a pretrained model whose statistics are kept."""

    def model(self) -> Any:
        model = super().model()
        model.norm.eval()
        model.norm.train = lambda *_: model.norm  # type: ignore[method-assign]
        return model


class CountedBatches(MmoeTask):
    def model(self) -> Any:
        model = super().model()
        model.register_buffer("batches", torch.zeros(()))
        return model

    def forward(self, model: nn.Module, batch: Impressions) -> Any:
        model.batches += model.training
        return model(batch)


class TrainingMode(MmoeTask):
    def evaluate(self, model: nn.Module, split: str, device: str) -> Mapping[str, float]:
        return super().evaluate(model.train(), split, device)


class MissingParameter(MmoeTask):
    def optimizers(self, model: nn.Module) -> Any:
        optimizers = super().optimizers(model)
        optimizers["dense"].param_groups[0]["params"].pop()
        return optimizers


class OtherColumns(MmoeTask):
    def export(self, model: nn.Module, folder: Path) -> Any:
        return replace(super().export(model, folder), outputs={"p_click": "double"})


class HiddenState(MmoeTask):
    """Counts its batches: a resumed training starts from 0 again."""

    def batch(self, rows: Any) -> Impressions:
        self.batches = getattr(self, "batches", 0) + 1
        batch = super().batch(rows)
        return batch if self.batches < 8 else super().batch(rows[:1])


class LatePrefix(MmoeConfig):
    """Names a prefix that ends two steps after the focal term begins to act."""

    def shared_prefix(self) -> Any:
        config, step = super().shared_prefix()
        return config, step + 2


@pytest.mark.parametrize(
    ("task", "check", "reason"),
    [
        (OwnRows, check_losses_are_shares, r"losses\['loss_ctr'\] .* divide sums by the step's counts"),
        (RandomBatch, check_batches_are_reproducible, "batch.rows. differs the second time"),
        (GlobalPlan, check_batches_are_reproducible, "plan.epoch. gives other rows the second time"),
        (CountedBatches, check_steps_change_no_buffer, "buffer batches is changed by a training step"),
        (TrainingMode, check_evaluation_is_deterministic, "evaluate draws random numbers"),
        (MissingParameter, check_optimizers_hold_every_parameter, "parameter .* is in 0 optimizers"),
        (OtherColumns, check_export_predicts, r"predict gives \['p_ctr', .*p_click"),
        (HiddenState, check_resumes_exactly, "resumed after half of the steps, the model differs"),
    ],
)
def test_a_mistake_is_found(task: type[MmoeTask], check: Check, reason: str, mmoe: MmoeConfig, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=reason):
        check(task, mmoe, tmp_path)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_run_refuses_running_statistics(kind: type[nn.Module], mmoe: MmoeConfig) -> None:
    """One line before the first step, whichever check is asked for."""

    class Normed(BatchNorm):
        def model(self) -> Any:
            model = super().model()
            model.norm = kind(2)
            return model

    with pytest.raises(UserError) as caught:
        train_run(mmoe, Normed, None)
    assert str(caught.value) == (
        f"model: found {kind.__name__} norm with running statistics, which depend on the micro-batches, allowed: "
        "LayerNorm, GroupNorm, or the module in evaluation mode"
    )


def test_a_logged_model_needs_a_predictor(mmoe: MmoeConfig) -> None:
    """That of the base class for a task outside a package; a task without one is refused before it trains."""
    assert predictor_module(OwnRows(mmoe)) == "pipeline.tasks.mmoe.predict"

    logged = mmoe.with_values(tracking={"log_model": True})
    bare = SimpleNamespace(config=logged, known_metrics=lambda _: {"valid/auc_ctcvr": ""})
    with pytest.raises(UserError, match="SimpleNamespace: found no module `predict` beside it, allowed: a package"):
        train_run(logged, lambda _: bare, None)  # type: ignore[arg-type, return-value]


def test_statistics_that_no_step_changes_are_allowed(mmoe: MmoeConfig, tmp_path: Path) -> None:
    check_steps_change_no_buffer(FrozenBatchNorm, mmoe, tmp_path)


def test_a_prefix_that_is_too_long_is_found(mmoe: MmoeConfig, tmp_path: Path) -> None:
    config = LatePrefix.model_validate(mmoe.model_dump(by_alias=True))
    with pytest.raises(AssertionError, match="started from the prefix of 7 steps"):
        check_shared_prefix(MmoeTask, config, tmp_path)
    assert torch.get_num_threads() == 1
