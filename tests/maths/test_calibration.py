"""Calibration: the optimum against closed forms and another optimizer, and what a run of the MMoE makes of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit
from torch import Tensor

from pipeline.maths.calibration import PRIOR_SD, fit_funnel, fit_temperature, rescaled
from pipeline.maths.metrics import binary_metrics
from pipeline.names import MEASURED
from pipeline.runtime.console import Console
from pipeline.tasks.base import evaluate, evaluating
from pipeline.tasks.mmoe import predict
from pipeline.tasks.mmoe.config import HEADS, MmoeConfig
from pipeline.tasks.mmoe.evaluation import labelled
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

Make = Callable[..., MmoeConfig]
Floats = npt.NDArray[np.float64]


def rows(count: int, seed: int, scales: tuple[float, float], shifts: tuple[float, float]) -> list[Tensor]:
    """Logits and labels of a model whose calibration is known; click rate about 0.15, 0.2 of them convert."""
    random = np.random.default_rng(seed)
    true = random.normal((-2, -1.5), 1, (count, 2))
    click = random.random(count) < expit(true[:, 0])
    conversion = click & (random.random(count) < expit(true[:, 1]))
    z = (true - shifts) / scales
    return [torch.from_numpy(part) for part in (z[:, 0], z[:, 1], click.astype(float), conversion.astype(float))]


def numbers(fitted: Any) -> list[float]:
    """Log scale and shift of the click, then of the conversion."""
    return [value for head in fitted for value in (math.log(head.scale), head.shift)]


def loss_and_gradient(x: Any, parts: list[Tensor]) -> tuple[float, Floats]:
    """The objective written with plain probabilities; its gradient by torch."""
    z_ctr, z_cvr, click, conversion = parts
    at = torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(at[0].exp() * z_ctr + at[1])
    both = p * torch.sigmoid(at[2].exp() * z_cvr + at[3])
    value = (at[0] ** 2 + at[2] ** 2) / (2 * 0.25**2)
    for label, probability in ((click, p), (conversion, both)):
        value = value - (label * probability.log() + (1 - label) * (1 - probability).log()).sum()
    value.backward()  # type: ignore[no-untyped-call]
    assert at.grad is not None
    return value.item(), at.grad.numpy()


@pytest.mark.parametrize("count", [200, 3000])
@pytest.mark.parametrize("shifts", [(0.0, 0.0), (-4.0, -3.0), (1.0, 5.0)])
def test_the_optimum_is_another_optimizers(count: int, shifts: tuple[float, float]) -> None:
    parts = rows(count, count, (1.3, 0.8), shifts)
    found, start = numbers(fit_funnel(*parts)), [math.log(1.3), shifts[0], math.log(0.8), shifts[1]]
    expected = minimize(loss_and_gradient, start, args=(parts,), jac=True, method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found, expected.x, rtol=0, atol=1e-6)
    value, gradient = loss_and_gradient(found, parts)
    assert np.abs(gradient).max() < 1e-6 * value


def test_a_known_distortion_is_found_and_undone() -> None:
    found = numbers(fit_funnel(*rows(200_000, 1, (1.2, 0.9), (-3.5, -2.0))))
    # 30,000 clicks and 6,000 conversions: standard errors are below 0.01 and 0.03
    np.testing.assert_allclose(found, [math.log(1.2), -3.5, math.log(0.9), -2.0], rtol=0, atol=0.1)
    again = fit_funnel(*rows(200_000, 1, (1.2, 0.9), (-3.5, -2.0)))
    assert numbers(again) == found


@pytest.mark.parametrize("constant", [0.0, 2.0, -800.0])
def test_equal_logits_become_the_rates(constant: float) -> None:
    """Scale and shift do the same there, so the prior keeps the scale; p_ctr is 8/20, and p_ctcvr 2/20."""
    label = torch.arange(20)
    z = torch.full((20,), constant)
    found = fit_funnel(z, z, (label < 8).float(), (label < 2).float())
    assert found
    ctr, cvr = found
    assert (ctr.scale, cvr.scale) == pytest.approx((1, 1), abs=1e-6)
    rates = expit([ctr.scale * constant + ctr.shift, cvr.scale * constant + cvr.shift])
    assert rates.tolist() == pytest.approx([8 / 20, 2 / 8], rel=1e-6)


@pytest.mark.parametrize(("clicks", "conversions"), [(0, 0), (5, 0), (5, 5), (20, 3)])
def test_without_both_kinds_of_rows_and_of_clicks_there_is_no_optimum(clicks: int, conversions: int) -> None:
    label, z = torch.arange(20), torch.linspace(-1, 1, 20)
    assert fit_funnel(z, z, (label < clicks).float(), (label < conversions).float()) is None


def test_logits_that_are_no_numbers_are_refused() -> None:
    z, label = torch.tensor([0.0, 1.0, math.nan]), torch.tensor([1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="NaN"):
        fit_funnel(z, z, label, torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="NaN"):
        fit_temperature(z[:, None], torch.zeros(3))


@pytest.mark.parametrize(("copies", "z"), [(1, 3.0), (1, -3.0), (40, -1.0), (40, 2.0)])
def test_the_strength_of_the_prior_by_hand(copies: int, z: float) -> None:
    """Cells of class 1 with logits (0, z): the derivative by t = log T, n z/T sigmoid(-z/T) + t / 0.25^2, is 0."""
    found = fit_temperature(torch.tensor([[0.0, z]] * copies), torch.ones(copies))
    assert math.log(found) == pytest.approx(-(0.25**2) * copies * z / found * expit(-z / found), abs=1e-8)
    assert (found < 1) == (z > 0)


def test_a_temperature_against_another_optimizer() -> None:
    random = np.random.default_rng(0)
    logits, label = 3 * random.normal(size=(500, 3)), random.integers(0, 3, 500)
    chosen = logits[np.arange(500), label]

    def loss(t: Any) -> float:
        scaled = logits / np.exp(t[0])
        sums = np.log(np.exp(scaled).sum(1)) - chosen / np.exp(t[0])
        return float(sums.sum() + t[0] ** 2 / (2 * PRIOR_SD**2))

    expected = minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    found = fit_temperature(torch.from_numpy(logits), torch.from_numpy(label))
    assert math.log(found) == pytest.approx(expected.x[0], abs=1e-6)
    assert fit_temperature(torch.empty(0, 3), torch.empty(0)) == 1


# ---------------------------------------------------------------- a run


def trained(config: MmoeConfig) -> tuple[MmoeTask, MemoryRun, Training]:
    torch.set_num_threads(1)
    task, run = MmoeTask(config), MemoryRun()
    training = Training(task, run, Console(0, quiet=True), "cpu")
    training.train()
    return task, run, training


def logged(run: MemoryRun) -> dict[tuple[int, str], float]:
    return {(step, name): value for step, values in run.points for name, value in values.items()
            if not name.startswith(MEASURED)}  # fmt: skip


def test_a_run_of_the_mmoe(
    small: Make, many_impressions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data.path": many_impressions, "training.batch_size": 256, "optim.dense.lr": 0.03}
    task, run, training = trained(small(**options))
    model = training.result.model
    assert {key: float(value) for key, value in run.params.items()} == {
        f"calibration.{head}.{name}": task.evaluation.calibration[head][name]
        for head in HEADS
        for name in ("scale", "shift")
    }
    with evaluating(model):
        assert task.calibrate(model, "cpu") == task.evaluation.calibration

    # the same run without it: the same points, but for the calibrated metrics
    _, plain, _ = trained(small(**options, model__calibrate="false"))
    assert plain.params == {}
    points = logged(run)
    added = {name: value for (_, name), value in points.items() if name.endswith("_calibrated")}
    assert {at: value for at, value in points.items() if at[1] not in added} == logged(plain)
    assert set(added) == {"test/auc_ctcvr_calibrated"} | {
        f"test/{name}_{event}_calibrated"
        for name in ("ece", "logloss", "calibration")
        for event in ("ctr", "cvr", "ctcvr")
    }
    metrics = training.result.metrics
    assert metrics["test/calibration_ctcvr"] > 10  # positive weights of 24.7 and 300
    assert metrics["test/calibration_ctcvr_calibrated"] < 4  # of 4 conversions
    assert metrics["test/calibration_ctr_calibrated"] == pytest.approx(1, abs=0.2)
    for event in ("ctr", "ctcvr"):
        assert metrics[f"test/logloss_{event}_calibrated"] < metrics[f"test/logloss_{event}"]

    # one logit ranks as before
    table = task.data.held_out("test")
    with evaluating(model):
        z = task.evaluation.predict(model, table, "cpu").logits.double()
    before, after = (labelled(table, logits) for logits in (z, rescaled(z, task.evaluation.calibration, HEADS)))
    for event in ("ctr", "cvr"):
        aucs = [binary_metrics(events[event][0], *(part.numpy() for part in events[event][1])).get("auc")
                for events in (before, after)]  # fmt: skip
        assert aucs[0] == pytest.approx(aucs[1], rel=0, abs=1e-12)

    # the logged model
    task.export(model, tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text()) == task.evaluation.calibration
    answer, frame = predict.load(tmp_path), pd.DataFrame(predict.raw_example(Path(many_impressions), 300))
    found, raw = answer(frame), answer(frame, raw=True)
    for head in HEADS:
        expected = (
            task.evaluation.calibration[head]["scale"] * logit(raw[f"p_{head}"])
            + task.evaluation.calibration[head]["shift"]
        )
        np.testing.assert_allclose(logit(found[f"p_{head}"]), expected, rtol=1e-9)
    np.testing.assert_array_equal(found["p_ctcvr"], found["p_ctr"] * found["p_cvr"])

    # without a conversion
    click, conversion = task.data.held_out("valid").labels
    task.data.held_out("valid").__dict__["labels"] = (click, np.zeros_like(conversion))
    capsys.readouterr()
    with evaluating(model):
        assert task.calibrate(model, "cpu") == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("probabilities are not calibrated: found 4000 validation rows, ")
    assert f" {click.sum()} clicks and 0 conversions; needed: a conversion" in line
    assert not [name for name in evaluate(task, model, "test", "cpu") if name.endswith("_calibrated")]
    task.export(model, tmp_path)
    pd.testing.assert_frame_equal(predict.load(tmp_path)(frame), raw)
