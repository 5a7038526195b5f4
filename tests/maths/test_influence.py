"""Influence of the parts of a loss, losses that arms share, the re-weighting control, and per-row test scores.

Gradients are checked against losses written here with textbook formulas in float64 and differentiated by `backward`.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pipeline.comparison.new_rows import read_rows
from pipeline.config.strict_config import load
from pipeline.maths.gradients import cosine, flat, gradients, norm
from pipeline.maths.losses import binary_focal_factor, log_probability, multi_label_focal_factor
from pipeline.runtime.console import Console
from pipeline.tasks.base import Task, evaluate, evaluating
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.impressions.impression_table import read_split
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tasks.visobert.config import VisobertConfig
from pipeline.tasks.visobert.model import Output
from pipeline.tasks.visobert.reviews.reviews import Reviews
from pipeline.tasks.visobert.reviews.sentiments import NOT_MENTIONED, UNKNOWN
from pipeline.tasks.visobert.scoring.predictions import Predictions
from pipeline.tasks.visobert.scoring.report import write_pair_rows
from pipeline.tasks.visobert.scoring.scores import score
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

Floats = npt.NDArray[np.float64]
Make = Callable[..., MmoeConfig]
MakeReviews = Callable[..., VisobertTask]

BASE = {f"influence/grad_norm/{name}" for name in ("loss_ctr", "loss_ctcvr_bce", "loss_cvr_aux")}
FOCAL = {
    "influence/focal_over_bce",
    "influence/grad_norm/loss_ctcvr_focal",
    "influence/cosine_bce_focal",
    "influence/focal_grad_ctr_tower",
    "influence/focal_factor_negative",
}
# Up to 3,000 rows whose terms are added in fp32, in another order than here: 3,000 roundings of 6e-8 are 2e-4, and
# gradients are sums that cancel. A part that is weighted, or a row that counts twice, is off by percents.
SUMS = 1e-3
POSITIVE = "influence/focal_factor_positive"  # absent where a step has no conversion


def train(task: Task) -> MemoryRun:
    torch.set_num_threads(1)
    run = MemoryRun()
    Training(task, run, Console(0, quiet=True), "cpu").train()
    return run


def steps(run: MemoryRun) -> list[dict[str, float]]:
    return [values for _, values in run.points if "loss_total" in values]


def influences(run: MemoryRun) -> list[dict[str, float]]:
    """What was measured at each logged step."""
    return [{name: value for name, value in values.items() if name.startswith("influence/")} for values in steps(run)]


def without_influence(run: MemoryRun) -> list[tuple[int, dict[str, float]]]:
    measured = ("influence/", "system/")
    return [(step, {name: value for name, value in values.items() if not name.startswith(measured)})
            for step, values in run.points]  # fmt: skip


def final(run: MemoryRun) -> dict[str, Tensor]:
    return load_file(run.folder / "final" / "model.safetensors")


def assert_same_weights(one: MemoryRun, other: MemoryRun) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def gradient_at(loss: Tensor, parameters: list[nn.Parameter]) -> Floats:
    """By `backward`, as one float64 vector; the graph stays."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    return np.concatenate([part.double().numpy().ravel() for part in parts])


def angle(one: Floats, other: Floats) -> float:
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


# ---------------------------------------------------------------- the maths


def test_gradients_by_hand_leave_everything_as_it_was() -> None:
    """d/da (a.a b) = 2 a b and d/db = a.a at a = (3, 4), b = 2; nothing depends on c."""
    a, b, c = (nn.Parameter(torch.tensor(value)) for value in ([3.0, 4.0], 2.0, [[1.0, 1.0]]))
    loss = (a * a).sum() * b
    found = gradients(loss, [a, b, c])
    assert [part.tolist() for part in found] == [[12, 16], 25, [[0, 0]]]
    assert flat(found).tolist() == [12, 16, 25, 0, 0]
    assert norm(flat(found)).item() == pytest.approx(math.sqrt(144 + 256 + 625))
    assert a.grad is b.grad is c.grad is None
    loss.backward()  # type: ignore[no-untyped-call]  # the graph is still there
    assert a.grad is not None
    assert a.grad.tolist() == [12, 16]


@given(arrays(np.float32, (2, 7), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)), st.floats(1e-3, 1e3))
def test_cosine_is_that_of_numpy_and_knows_no_length(vectors: npt.NDArray[np.float32], scale: float) -> None:
    one, other = (torch.from_numpy(vector.copy()) for vector in vectors)
    exact = vectors.astype(np.float64)
    if min(np.linalg.norm(exact, axis=1)) < 1e-15:
        if not vectors[0].any() or not vectors[1].any():
            assert math.isnan(cosine(one, other).item())
        return
    expected = angle(*exact)
    for left, right in ((one, other), (other, one), (one * scale, other)):
        assert cosine(left, right).item() == pytest.approx(expected, abs=1e-5)  # three sums of 7 terms in fp32
    assert -1 <= cosine(one, one).item() <= 1
    assert cosine(one, -one).item() == pytest.approx(-1, abs=1e-5)
    assert norm(one).item() == pytest.approx(np.linalg.norm(exact[0]), rel=1e-5)


def test_a_gradient_of_zero_has_no_angle() -> None:
    assert math.isnan(cosine(torch.zeros(3), torch.ones(3)).item())


def wide(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(st.floats(-15, 15), st.sampled_from([0.0, 1.0]), st.floats(0, 5))
def test_the_binary_factor_by_its_formula(z: float, label: float, gamma: float) -> None:
    found = binary_focal_factor(log_probability(wide(z)), wide(label), gamma)
    wrong = 1 / (1 + math.exp(z if label else -z))  # 1 - p_t
    assert found.item() == pytest.approx(wrong**gamma, rel=1e-9)


@settings(deadline=None)
@given(arrays(np.float64, (4, 3), elements=st.floats(-10, 10)), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_the_softmax_factor_by_its_formula(logits: Floats, gamma: float) -> None:
    labels = np.array([0, 2, -1, 1])
    found = multi_label_focal_factor(torch.from_numpy(logits), torch.from_numpy(labels), gamma).tolist()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, label in enumerate(labels):
        others = sum(p[row, index] for index in range(3) if index != label)
        assert found[row] == pytest.approx(0 if label < 0 else others**gamma, rel=1e-9)


# ---------------------------------------------------------------- MMoE


def textbook(config: MmoeConfig, logits: Tensor, click: Tensor, bought: Tensor) -> dict[str, Tensor]:
    """The losses of a whole step in float64, positives weighted by 24.7 and 300, and the mean focal factors."""
    focal, z = config.loss.aux_focal, logits.double()
    p_ctr, p_cvr = torch.sigmoid(z).unbind(1)
    p, click, bought = p_ctr * p_cvr, click.double(), bought.double()
    factor = bought * (1 - p) ** focal.gamma + (1 - bought) * p**focal.gamma
    weight = factor.detach() if focal.detach_p_for_weight else factor
    if focal.use_alpha:
        weight = weight * torch.where(bought > 0, focal.alpha, 1 - focal.alpha)
    cross_entropy = -bought * torch.log(p) - (1 - bought) * torch.log(1 - p)
    conversion = -bought * torch.log(p_cvr) - (1 - bought) * torch.log(1 - p_cvr)
    return {
        "loss_ctr": -(24.7 * click * torch.log(p_ctr) + (1 - click) * torch.log(1 - p_ctr)).mean(),
        "loss_ctcvr_bce": -(300 * bought * torch.log(p) + (1 - bought) * torch.log(1 - p)).mean(),
        "loss_ctcvr_focal": (weight * cross_entropy).mean(),
        "loss_cvr_aux": (click * conversion).sum() / click.sum(),
        "positive": factor[bought > 0].mean(),
        "negative": factor[bought == 0].mean(),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss.aux_focal.gamma": 2, "loss.aux_focal.lambda": 0.2, "loss.aux_focal.detach_p_for_weight": "false"},
        {"model.kind": "shared_bottom", "optim.embedding.name": "adam"},
        {"training.batch_size": 500, "training.accumulation_steps": 4, "loss.aux_focal.use_alpha": "true"},
        {"model.towers.hidden": "[]", "esmm.lambda_ctr": 3, "model.gate.entropy_weight": 1},
        {"model.heads.cvr.deep": "false", "model.heads.cvr.wide": "true"},
    ],
    ids=" ".join,
)
def test_a_steps_influence_is_that_of_textbook_losses(
    small: Make, many_impressions: str, options: dict[str, Any]
) -> None:
    """Of the unweighted parts, over all rows of the step, at the experts and at the click's tower."""
    common = {"data.path": many_impressions, "training.batch_size": 2000, "training.max_steps": 1,
              "tracking.influence_every": 1, "loss.aux_focal.warmup_steps": 0}  # fmt: skip
    config = small(**common | options)
    logged = steps(train(MmoeTask(config)))[0]
    torch.manual_seed(config.seed)
    task = MmoeTask(config)
    model, plan = task.model(), task.plan(0)
    batch = task.batch(np.concatenate([plan[index] for index in range(config.training.accumulation_steps)]))
    assert batch.conversion.sum() > 1
    assert len(batch) == 2000
    parts = textbook(config, model(batch).logits, batch.click, batch.conversion)
    assert model.experts is not None
    assert model.towers is not None
    experts = list(model.experts.parameters())
    found = {name: gradient_at(parts[name], experts) for name in parts if name.startswith("loss_")}
    for name, gradient in found.items():
        assert logged[f"influence/grad_norm/{name}"] == pytest.approx(np.linalg.norm(gradient), rel=SUMS), name
    expected = angle(found["loss_ctcvr_bce"], found["loss_ctcvr_focal"])
    assert logged["influence/cosine_bce_focal"] == pytest.approx(expected, abs=SUMS)
    towers = [*model.towers.parameters(), model.last]
    gradient_at(parts["loss_ctcvr_focal"], towers)
    squares = sum(float(weight.grad[0].double().square().sum()) for weight in towers if weight.grad is not None)
    assert logged["influence/focal_grad_ctr_tower"] == pytest.approx(math.sqrt(squares), rel=SUMS)
    ratio = config.loss.aux_focal.lambda_ * parts["loss_ctcvr_focal"] / parts["loss_ctcvr_bce"]
    assert logged["influence/focal_over_bce"] == pytest.approx(ratio.item(), rel=SUMS)
    for name in ("positive", "negative"):
        assert logged[f"influence/focal_factor_{name}"] == pytest.approx(parts[name].item(), rel=SUMS)


def test_shares_add_up_whatever_a_micro_batch_holds(small: Make, many_impressions: str) -> None:
    """3,000 rows in one piece, and in pieces of which some have no conversion and one no click."""
    task = MmoeTask(small(**{"data.path": many_impressions, "loss.aux_focal.warmup_steps": 0}))
    torch.manual_seed(0)
    model, rows = task.model(), np.arange(3000)
    click, conversion = task.data.train.labels
    order = np.argsort((click + conversion)[:3000], kind="stable")
    batches = [[task.batch(rows)], [task.batch(part) for part in np.split(order, [1000, 2000, 2900, 2990])]]
    assert not batches[1][0].click.any()
    found = []
    for parts in batches:
        listed = [task.counts(batch) for batch in parts]
        counts = {name: sum((count[name] for count in listed), torch.zeros(())) for name in listed[0]}
        losses, probed = [], []
        for batch in parts:
            losses.append(task.losses(task.forward(model, batch), batch, counts, 0))
            probed.append(task.probe(model, losses[-1]))
        sums = [{name: sum((one[name] for one in each), torch.zeros(())) for name in each[0]}
                for each in (probed, losses)]  # fmt: skip
        found.append({name: value.item() for name, value in task.influence(*sums).items()})
    assert set(found[0]) == BASE | FOCAL | {POSITIVE}
    assert found[1] == pytest.approx(found[0], rel=SUMS)


def test_nothing_of_the_focal_term_before_the_gate_or_in_the_baseline(small: Make, many_impressions: str) -> None:
    """Arms that differ only behind the gate leave the same points before it, and after it the focal names join."""
    common = {"tracking.influence_every": 1, "data.path": many_impressions, "training.batch_size": 512}
    arms: list[dict[str, Any]] = [
        {"loss.aux_focal.enabled": "false"},
        {},
        {"loss.aux_focal.lambda": 0.2, "loss.aux_focal.gamma": 2},
        {"loss.aux_focal.lambda": 0},
        {"loss.aux_focal.enabled": "false", "loss.late_pos_weight.ctcvr": 50, "loss.late_pos_weight.warmup_steps": 5},
    ]
    runs = [train(MmoeTask(small(**common, **arm))) for arm in arms]
    before = [[{name: value for name, value in values.items() if not name.startswith(("aux_focal_", "system/"))}
               for values in steps(run)[:5]] for run in runs]  # fmt: skip
    assert all(points == before[0] for points in before)
    assert all(set(values) == BASE for values in influences(runs[0]) + influences(runs[1])[:5])
    after = influences(runs[1])[5:]
    assert all(set(values) - {POSITIVE} == BASE | FOCAL for values in after)
    task = MmoeTask(small(**common))
    converted = [bool(task.batch(task.plan(0)[step]).conversion.any()) for step in range(5, 12)]
    assert set(converted) == {True, False}
    assert [POSITIVE in values for values in after] == converted  # the mean over none is not logged
    assert all(0 < values["influence/focal_factor_negative"] < 1 for values in after)
    assert [values["influence/focal_over_bce"] for values in influences(runs[3])[5:]] == [0] * 7
    assert steps(runs[4])[5]["loss_ctcvr_bce"] > steps(runs[0])[5]["loss_ctcvr_bce"]


NOISE = {"model.experts.dropout": 0.2, "model.towers.dropout": 0.1, "model.embedding_dropout": 0.1,
         "model.gate.noise": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        NOISE | {"training.accumulation_steps": 3, "training.batch_size": 40, "training.clip_norm": 0.5,
                 "optim.embedding.name": "adam", "model.gate.entropy_weight": 0.1},
        NOISE | {"training.amp": "bf16"},
        NOISE | {"training.amp": "bf16", "loss.aux_focal.compute_fp32": "false", "model.kind": "shared_bottom"},
        {"training.amp": "fp16"},
    ],
    ids=" ".join,
)  # fmt: skip
def test_measuring_changes_no_bit(small: Make, options: dict[str, Any]) -> None:
    every = "tracking.influence_every"
    none, each, fifth = (train(MmoeTask(small(**options, **{every: count}))) for count in (0, 1, 5))
    for run in (each, fifth):
        assert without_influence(run) == without_influence(none)
        assert_same_weights(run, none)
    assert not any(influences(none))
    assert all(set(values) >= BASE for values in influences(each))
    assert [bool(values) for values in influences(fifth)] == [step % 5 == 0 for step in range(12)]
    assert influences(fifth)[::5] == influences(each)[::5]
    assert all(math.isfinite(value) for values in influences(each) for value in values.values())


def test_measured_where_it_is_logged_and_not_without_components(small: Make) -> None:
    every = {"tracking.influence_every": 2}
    thinned = train(MmoeTask(small(**every, **{"tracking.log_every": 3})))
    assert [bool(values) for values in influences(thinned)] == [True, False, True, False]  # steps 0, 3, 6, 9
    task = MmoeTask(small(**every, **{"loss.aux_focal.log_components": "false"}))
    assert not any(influences(train(task)))
    assert small().tracking.influence_every == 50
    tracking = small(**{"tracking.influence_every": 4, "tracking.log_every": 6}).tracking
    assert [step for step in range(40) if tracking.probes(step)] == [0, 12, 24, 36]


def test_gradients_are_taken_at_no_other_step(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, taken = MmoeTask.probe, list[int]()

    def counted(task: MmoeTask, model: nn.Module, losses: Any) -> Any:
        taken.append(len(losses))
        return probe(task, model, losses)

    monkeypatch.setattr(MmoeTask, "probe", counted)
    train(MmoeTask(small(**{"tracking.influence_every": 5, "training.accumulation_steps": 2})))
    assert len(taken) == 2 * 3  # micro-batches of steps 0, 5 and 10


@pytest.mark.parametrize("log_components", ["true", "false"])
def test_without_components_no_gradient_is_taken(small: Make, log_components: str) -> None:
    task = MmoeTask(small(**{"loss.aux_focal.log_components": log_components, "loss.aux_focal.warmup_steps": 0}))
    model, batch = task.model(), task.batch(np.arange(64))
    losses = task.losses(task.forward(model, batch), batch, task.counts(batch), 0)
    probed = task.probe(model, losses)
    assert bool(probed) == (log_components == "true")
    assert bool(task.influence(probed, losses)) == (log_components == "true")
    unmeasured = task.losses(task.forward(model, batch), batch, task.counts(batch), 1)
    assert [name for name in unmeasured if not name.startswith("loss_")] == []


def test_heads_without_experts_and_without_a_click_tower(small: Make) -> None:
    shallow = {f"model.heads.{task}.{part}": "true" for task in ("ctr", "cvr") for part in ("wide", "fm")}
    common = {"tracking.influence_every": 1, "loss.aux_focal.warmup_steps": 0}
    one = train(MmoeTask(small(**common, **shallow, **{"model.heads.ctr.deep": "false"})))
    for values in influences(one):
        assert "influence/focal_grad_ctr_tower" not in values
        assert values["influence/grad_norm/loss_ctr"] == 0  # the click's head does not see the experts
        assert values["influence/grad_norm/loss_ctcvr_focal"] > 0
    off = {"model.heads.ctr.deep": "false", "model.heads.cvr.deep": "false"}
    none = train(MmoeTask(small(**common, **shallow, **off)))
    factors = {"influence/focal_factor_positive", "influence/focal_factor_negative"}
    assert all(set(values) - factors == {"influence/focal_over_bce"} for values in influences(none))


# ---------------------------------------------------------------- losses that arms share


def logits_of(task: MmoeTask, model: nn.Module, split: str) -> tuple[Floats, Floats, Floats]:
    """Logits [N, 2] and labels of a split, its rows in one batch."""
    table = task.data.held_out(split)
    model.eval()
    with torch.no_grad():
        logits = model(table.batch(np.arange(len(table)))).logits
    return logits.double().numpy(), *(label.astype(np.float64) for label in table.labels)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_validation_losses_by_textbook_formulas_whatever_the_arm(
    small: Make, many_impressions: str, split: str
) -> None:
    arms: list[dict[str, Any]] = [
        {"loss.aux_focal.enabled": "false"},
        {"loss.aux_focal.gamma": 1.5, "loss.aux_focal.use_alpha": "true"},
        {"loss.late_pos_weight.ctcvr": 100, "loss.late_pos_weight.warmup_steps": 0},
    ]
    tasks = [MmoeTask(small(**{"data.path": many_impressions, "evaluation.batch_size": 1111}, **arm)) for arm in arms]
    torch.manual_seed(1)
    model = tasks[0].model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    z, click, bought = logits_of(tasks[0], model, split)
    p_ctr, p_cvr = 1 / (1 + np.exp(-z.T))
    p = p_ctr * p_cvr
    clicked = click == 1
    assert bought.sum() > 1
    expected = {
        "loss_ctr": -np.mean(24.7 * click * np.log(p_ctr) + (1 - click) * np.log(1 - p_ctr)),
        "loss_ctcvr_bce": -np.mean(300 * bought * np.log(p) + (1 - bought) * np.log(1 - p)),
        "loss_cvr_aux": -np.mean(np.where(bought == 1, np.log(p_cvr), np.log(1 - p_cvr))[clicked]),
        "loss_ctcvr_focal_g1": -np.mean(bought * (1 - p) * np.log(p) + (1 - bought) * p * np.log(1 - p)),
        "loss_ctcvr_focal_g2": -np.mean(bought * (1 - p) ** 2 * np.log(p) + (1 - bought) * p**2 * np.log(1 - p)),
    }
    for task in tasks:
        found = evaluate(task, model, split, "cpu")
        losses = {name.removeprefix(f"{split}/"): value for name, value in found.items() if "/loss_" in name}
        assert losses == pytest.approx(expected, rel=1e-4)  # other batches: logits are off by up to 1e-5


def test_a_split_without_a_click_has_no_loss_of_clicks(small: Make) -> None:
    task = MmoeTask(small())
    table = task.data.held_out("valid")
    for label in table.labels:
        label[:] = 0
    names = {name for name in evaluate(task, task.model(), "valid", "cpu") if "/loss_" in name}
    assert names == {"valid/loss_ctr", "valid/loss_ctcvr_bce", "valid/loss_ctcvr_focal_g1", "valid/loss_ctcvr_focal_g2"}


# ---------------------------------------------------------------- the re-weighting control


def test_the_late_weight_acts_from_its_step_on(small: Make, many_impressions: str) -> None:
    """From step 0 on it is the static weight 400; later on it changes nothing before; 0 changes nothing at all."""
    common = {"data.path": many_impressions, "training.batch_size": 512, "loss.aux_focal.enabled": "false"}
    late, clip, start = "loss.late_pos_weight.ctcvr", "loss.pos_weight_clip.ctcvr", "loss.late_pos_weight.warmup_steps"
    plain = train(MmoeTask(small(**common)))
    at_once = train(MmoeTask(small(**common, **{late: 100, start: 0})))
    static = train(MmoeTask(small(**common, **{clip: 400})))
    assert_same_weights(at_once, static)
    assert [v["loss_total"] for v in steps(at_once)] == [v["loss_total"] for v in steps(static)]
    assert {values["pos_weight_ctcvr"] for values in steps(at_once)} == {400}
    off = train(MmoeTask(small(**common, **{late: 0, start: 5})))
    assert without_influence(off) == without_influence(plain)
    assert_same_weights(off, plain)
    later = train(MmoeTask(small(**common, **{late: 100, start: 5})))
    assert [values["pos_weight_ctcvr"] for values in steps(later)] == [300] * 5 + [400] * 7
    assert [v["loss_total"] for v in steps(later)[:5]] == [v["loss_total"] for v in steps(plain)[:5]]
    # at its first step the weights are still those of the plain run: only positives differ, by 100 of 300
    conversions = steps(later)[5]["loss_ctcvr_bce"] - steps(plain)[5]["loss_ctcvr_bce"]
    negatives = steps(plain)[5]["loss_ctcvr_bce"] - 3 * conversions
    assert conversions > 0
    assert 0 < negatives < 0.1
    assert steps(later)[5]["loss_ctr"] == steps(plain)[5]["loss_ctr"]


@given(st.floats(0.1, 1e4), st.none() | st.floats(0.1, 1e4), st.floats(0, 1e3), st.integers(0, 20), st.integers(0, 20))
def test_the_weight_of_conversions_by_hand(raw: float, clip: float | None, late: float, warmup: int, step: int) -> None:
    loss = MmoeConfig.model_validate({"loss": {
        "static_pos_weight": {"ctcvr": raw}, "pos_weight_clip": {"ctcvr": clip},
        "late_pos_weight": {"ctcvr": late, "warmup_steps": warmup},
    }}).loss  # fmt: skip
    static = raw if clip is None or raw < clip else clip
    assert loss.ctcvr_pos_weight(step) == (static + late if step >= warmup else static)
    assert loss.pos_weight("ctcvr") == static


@pytest.mark.parametrize(
    ("overrides", "arm"),
    [
        ({}, "l.1 g1 w2000"),
        ({"loss.aux_focal.lambda": "1.5"}, "l1.5 g1 w2000"),
        ({"loss.aux_focal.lambda": "0"}, "l0 g1 w2000"),
        ({"loss.aux_focal.enabled": "false"}, "baseline"),
        ({"loss.aux_focal.enabled": "false", "loss.late_pos_weight.ctcvr": "0.1"}, "w+.1 w2000"),
        ({"loss.aux_focal.enabled": "false", "loss.late_pos_weight.ctcvr": "50",
          "loss.late_pos_weight.warmup_steps": "7"}, "w+50 w7"),
        ({"loss.late_pos_weight.ctcvr": "0.1"}, "l.1 g1 w2000 w+.1 w2000"),
    ],
)  # fmt: skip
def test_the_arms_name_is_the_runs_without_kind_and_seed(overrides: dict[str, str], arm: str) -> None:
    for seed in ("0", "7"):
        config = load(MmoeConfig, ROOT / "configs/mtl_mmoe.yaml", overrides | {"seed": seed})
        assert config.arm_name() == arm
        assert config.name() == f"mmoe {arm} s{seed}"


def test_arm_names_of_reviews_and_of_no_task() -> None:
    assert load(VisobertConfig, None, {}).arm_name() == "auto g2"
    assert load(VisobertConfig, None, {"multi_label.use_focal_loss": "false", "seed": "3"}).arm_name() == "ce"
    mine = load(VisobertConfig, None, {"run_name": "mine"})
    assert (mine.name(), mine.arm_name()) == ("mine", "auto g2")


def test_warnings_of_the_control(small: Make) -> None:
    late, start = "loss.late_pos_weight.ctcvr", "loss.late_pos_weight.warmup_steps"
    notes = [text for text in small(**{start: 7}).warnings(frozenset({start})) if "late" in text]
    assert notes == [f"{start} has no effect while {late} is 0"]
    assert not any("late" in text for text in small(**{start: 7, late: 1}).warnings(frozenset({start, late})))
    task = MmoeTask(small(**{start: 12, late: 1}))
    assert [text for text in task.warnings(12) if "late" in text] == [
        f"{start} is 12, the last of 12 steps is 11: the weight of conversions will never rise"
    ]
    assert task.warnings(13) == []
    assert MmoeTask(small(**{start: 12})).warnings(12) == []


# ---------------------------------------------------------------- per-row test scores


def test_the_aucs_of_the_file_are_the_logged_ones(small: Make, many_impressions: str, tmp_path: Path) -> None:
    task = MmoeTask(small(**{"data.path": many_impressions, "evaluation.batch_size": 999}))
    torch.manual_seed(2)
    model = task.model()
    with evaluating(model):
        task.report(model, tmp_path, "cpu")
    file = tmp_path / "evaluation" / "test_rows.parquet"
    table, logged = pd.read_parquet(file), evaluate(task, model, "test", "cpu")
    names = [f"{kind}/{metric}" for metric in ("auc_ctr", "auc_ctcvr") for kind in ("label", "score")]
    assert list(table.columns) == names
    assert [str(kind) for kind in table.dtypes] == ["uint8", "float32"] * 2
    for metric in ("auc_ctr", "auc_ctcvr"):
        found = roc_auc_score(table[f"label/{metric}"], table[f"score/{metric}"])
        assert found == pytest.approx(logged[f"test/{metric}"], abs=1e-4)
        assert read_rows(file, f"test/{metric}").reproduce(logged[f"test/{metric}"])
    rows = pd.read_parquet(Path(many_impressions) / "test.parquet", columns=["click", "conversion"])
    assert table["label/auc_ctr"].tolist() == rows["click"].tolist()
    assert table["label/auc_ctcvr"].tolist() == rows["conversion"].tolist()
    z, _, _ = logits_of(task, model, "test")
    p_ctr, p_cvr = 1 / (1 + np.exp(-z.T))
    assert np.allclose(table["score/auc_ctcvr"], np.log(p_ctr * p_cvr), rtol=1e-4)
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.usefixtures("undrawn")
def test_no_rows_unless_they_are_wanted_and_there(small: Make, many_impressions: str, tmp_path: Path) -> None:
    task = MmoeTask(small(**{"data.path": many_impressions, "tracking.log_rows": "false"}))
    with evaluating(model := task.model()):
        task.report(model, tmp_path / "off", "cpu")
    task = MmoeTask(small(**{"data.path": many_impressions}))
    schema = task.data.schema.model_copy(update={"splits": {"empty": task.data.schema.splits["test"].model_copy(
        update={"rows": 0, "file": "empty.parquet"})}})  # fmt: skip
    pq.write_table(pq.read_table(Path(many_impressions) / "test.parquet").slice(0, 0), tmp_path / "empty.parquet")
    empty = read_split(tmp_path, schema, "empty")
    task.data.test = empty
    with evaluating(model := task.model()):
        task.report(model, tmp_path / "empty", "cpu")
    assert not [*(tmp_path / "off").rglob("*.parquet"), *(tmp_path / "empty").rglob("*.parquet")]
    assert [file.name for file in tmp_path.rglob("*.png")] == ["calibration.png"] * 2


# ---------------------------------------------------------------- reviews

ASPECTS = ("Pin", "Camera", "Khác")


@pytest.fixture(scope="module")
def review_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reviews")
    for seed, (name, count) in enumerate({"train": 90, "validation": 40, "test": 35}.items()):
        random = np.random.Generator(np.random.PCG64(seed))
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["data", *ASPECTS])
            for row in range(count):
                words = random.choice(["pin", "tốt", "camera", "tệ", "máy", "lag"], int(random.integers(2, 20)))
                cells = random.choice(["Positive", "Negative", "Neutral", "", "?"], 2, p=[0.3, 0.2, 0.1, 0.3, 0.1])
                writer.writerow([" ".join(words) + f" {row}", *cells, "Neutral" if random.random() < 0.4 else ""])
    return {f"data.{name}": str(folder / f"{name}.csv") for name in ("train", "validation", "test")} | {
        "data.cache": str(folder / "cache")
    }


@pytest.fixture
def make(review_files: dict[str, str]) -> MakeReviews:
    still = {"model.name": "embedded", "model.dropout": "0", "model.embedded.width": "16", "baselines": "false",
             "model.embedded.vocabulary": "300", "model.embedded.dropout": "0", "model.embedded.token_dropout": "0",
             "data.on_bad_label": "drop", "data.detection_only": "[Khác]", "training.max_steps": "6",
             "training.batch_size": "8", "training.batch_tokens": "100000"}  # fmt: skip

    def task(**overrides: Any) -> VisobertTask:
        texts = {key: str(value) for key, value in overrides.items()}
        return VisobertTask(load(VisobertConfig, None, review_files | still | texts))

    return task


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing one takes a second, and nobody looks at it here."""
    for name in ("calibration", "confusion"):
        monkeypatch.setattr(f"pipeline.tracking.plots.{name}", lambda *drawn: drawn[-1].touch())


def mentions(labels: Tensor) -> Tensor:
    """1 mentioned, 0 not, -1 unknown."""
    return torch.where(labels == UNKNOWN, -1, (labels != NOT_MENTIONED).long())


REVIEW_LOSSES: list[dict[str, Any]] = [
    {},
    {"multi_label.focal_gamma": 0.5, "multi_label.focal_alpha": "[0.5, 1.0, 2.0]", "training.accumulation_steps": 4,
     "training.batch_size": 10},
    {"multi_label.focal_gamma": 0, "model.pooling": "cls"},
    {"multi_label.use_focal_loss": "false"},
    {"model.aspect_detection": "false"},
]  # fmt: skip


@pytest.mark.parametrize("options", REVIEW_LOSSES, ids=" ".join)
def test_a_review_steps_influence_is_that_of_textbook_losses(make: MakeReviews, options: dict[str, Any]) -> None:
    common = {"training.batch_size": 40, "training.max_steps": 1, "tracking.influence_every": 1}
    task = make(**common | options)
    logged = influences(train(task))[0]
    torch.manual_seed(task.config.seed)
    model, plan = task.model(), task.plan(0)
    batch = task.batch(np.concatenate([plan[index] for index in range(task.config.training.accumulation_steps)]))
    output, loss = model(batch.ids, batch.mask), task.config.multi_label
    labels = batch.labels.long()
    p = torch.exp(output.sentiment.double()) / torch.exp(output.sentiment.double()).sum(-1, keepdim=True)
    cells = (labels >= 0) & (labels < 3)
    of_label = p.gather(-1, labels.clamp(0, 2).unsqueeze(-1)).squeeze(-1)
    gamma = loss.focal_gamma if loss.use_focal_loss else 0.0
    factor = (1 - of_label) ** gamma
    alpha = torch.tensor(task.alpha.vector if loss.use_focal_loss else (1.0, 1.0, 1.0)).double()
    values = -alpha[labels.clamp(0, 2)] * factor * torch.log(of_label)
    parts = {"loss_sentiment": values[cells].mean()}
    expected: dict[str, float] = {}
    if output.aspect is not None:
        mention, truth = torch.sigmoid(output.aspect.double()), mentions(batch.labels)
        right = torch.where(truth == 1, mention, 1 - mention)
        parts["loss_aspect"] = -torch.log(right)[truth >= 0].mean()
    names = ("encoder.layers.3.", "encoder.norm")  # the last of two convolutions and two recurrences
    top = [weight for name, weight in model.named_parameters() if name.startswith(names)]
    assert len(top) == 6  # two parameters each of norm, linear and the encoder's last norm
    found = {name: gradient_at(part, top) for name, part in parts.items()}
    for name, gradient in found.items():
        expected[f"influence/grad_norm/{name}"] = float(np.linalg.norm(gradient))
    if "loss_aspect" in found:
        expected["influence/cosine_sentiment_aspect"] = angle(found["loss_sentiment"], found["loss_aspect"])
    if loss.use_focal_loss:
        for index, name in enumerate(("positive", "negative", "neutral")):
            expected[f"influence/focal_factor/{name}"] = factor[labels == index].mean().item()
    assert logged == pytest.approx(expected, rel=SUMS, abs=1e-5)


def test_measuring_reviews_changes_no_bit(make: MakeReviews) -> None:
    noisy = {"model.dropout": 0.3, "model.embedded.dropout": 0.2, "model.embedded.token_dropout": 0.15,
             "training.accumulation_steps": 2, "training.amp": "bf16"}  # fmt: skip
    none, each, third = (train(make(**noisy, **{"tracking.influence_every": every})) for every in (0, 1, 3))
    for run in (each, third):
        assert without_influence(run) == without_influence(none)
        assert_same_weights(run, none)
    assert not any(influences(none))
    assert [bool(values) for values in influences(third)] == [True, False, False, True, False, False]
    assert all("influence/cosine_sentiment_aspect" in values for values in influences(each))


def test_a_sentiment_that_a_step_lacks_has_no_factor_and_stops_nothing(make: MakeReviews) -> None:
    task = make(**{"training.batch_size": 1, "tracking.influence_every": 1})
    measured = influences(train(task))
    names = {f"influence/focal_factor/{name}" for name in ("positive", "negative", "neutral")}
    assert any(names - set(values) for values in measured)
    assert any(names & set(values) for values in measured)


@pytest.mark.usefixtures("undrawn")
def test_the_pairs_of_the_file_make_the_logged_f1(make: MakeReviews, tmp_path: Path) -> None:
    task = make(**{"training.max_steps": 30, "training.num_train_epochs": 3})
    torch.manual_seed(0)
    training = Training(task, MemoryRun(), Console(0, quiet=True), "cpu")
    model = training.train().model
    with evaluating(model):
        task.report(model, tmp_path, "cpu")
    rows = pd.read_parquet(tmp_path / "evaluation" / "test_rows.parquet")
    assert list(rows.columns) == ["numerator/pair_f1_micro", "denominator/pair_f1_micro"]
    hits, pairs = rows.sum()
    assert 0 < hits < pairs
    logged = evaluate(task, model, "test", "cpu")["test/pair_f1_micro"]
    assert hits / pairs == pytest.approx(logged, abs=1e-12)
    assert read_rows(tmp_path / "evaluation" / "test_rows.parquet", "test/pair_f1_micro").reproduce(logged)
    # each review by sets of (aspect, sentiment), from the file and from the predictions that were left
    said = pd.read_csv(tmp_path / "evaluation" / "test_predictions.csv")
    truth = pd.read_csv(task.config.data.test or "")
    assert len(rows) == len(truth) == 35
    for row in range(len(truth)):
        judged = [aspect for aspect in ("Pin", "Camera") if truth[aspect][row] != "?"]
        gold = {(a, truth[a][row].lower()) for a in judged if isinstance(truth[a][row], str)}
        predicted = {(a, said[a][row]) for a in judged if isinstance(said[a][row], str)}
        expected = [2 * len(gold & predicted), len(gold) + len(predicted)]
        assert rows.iloc[row].tolist() == expected, row


@pytest.mark.parametrize("seed", range(4))
def test_the_pairs_of_any_answers_by_sets(tmp_path: Path, seed: int) -> None:
    """All kinds of labels, right and wrong sentiments, with and without the mention; the last aspect has no pairs."""
    random = np.random.Generator(np.random.PCG64(seed))
    labels = random.integers(-2, 4, (60, 4)).astype(np.int8)
    polar = np.array([True, True, True, False])
    sentiment = np.where(random.random(labels.shape) < 0.6, labels.clip(0, 2), random.integers(0, 3, labels.shape))
    mentioned = random.random(labels.shape) < 0.6
    output = Output(torch.eye(3)[torch.from_numpy(sentiment)], torch.from_numpy(np.where(mentioned, 1.0, -1.0)))
    answers = Predictions(output, np.full(4, 0.5), tuple("abcd"), polar)
    reviews = Reviews("x", "0" * 64, ("",) * 60, labels, tuple("abcd"), np.arange(1, 61))
    write_pair_rows(tmp_path, reviews, answers)
    rows = pd.read_parquet(tmp_path / "evaluation" / "test_rows.parquet")
    for row in range(60):
        judged = [a for a in range(3) if labels[row, a] in (-1, 0, 1, 2)]  # mentions of unknown polarity: not judged
        gold = {(a, labels[row, a]) for a in judged if labels[row, a] >= 0}
        predicted = {(a, sentiment[row, a]) for a in judged if mentioned[row, a]}
        assert rows.iloc[row].tolist() == [2 * len(gold & predicted), len(gold) + len(predicted)], row
    numerator, denominator = rows.sum()
    logged = score(labels, answers.labels, tuple("abcd"), polar)["pair_f1_micro"]
    assert numerator / denominator == pytest.approx(logged, abs=1e-12)


@pytest.mark.usefixtures("undrawn")
def test_no_pairs_without_detection_test_or_the_switch(
    make: MakeReviews, review_files: dict[str, str], tmp_path: Path
) -> None:
    for number, options in enumerate(({"model.aspect_detection": "false"}, {"tracking.log_rows": "false"})):
        task = make(**options)
        with evaluating(model := task.model()):
            task.report(model, tmp_path / str(number), "cpu")
    texts = {"data.train": review_files["data.train"], "data.cache": review_files["data.cache"], "baselines": "false"}
    texts |= {"model.name": "embedded", "model.embedded.width": "16", "data.on_bad_label": "drop"}
    task = VisobertTask(load(VisobertConfig, None, texts))
    with evaluating(model := task.model()):
        task.report(model, tmp_path / "untested", "cpu")
    assert list((tmp_path / "untested").rglob("valid_aspects.csv"))
    assert not list(tmp_path.rglob("*.parquet"))
