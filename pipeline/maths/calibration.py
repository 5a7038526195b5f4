"""Calibration of a trained model: a scale, a shift or a temperature of its logits, fitted on rows not trained on.

Positive weights and focal losses distort the probabilities but not the ranking. Platt (1999, "Probabilistic outputs
for support vector machines") corrects a score z to sigmoid(scale * z + shift) by maximum likelihood; Guo et al. (2017,
"On calibration of modern neural networks", section 4.2) divide the logits of a softmax by one temperature. Here the
log of a scale or temperature also has the prior N(0, PRIOR_SD^2), which keeps it near 1 when there are few rows.

Losses are sums over rows, in nats; logits and shifts are log odds; all is computed in float64. Shapes: N = rows,
C = classes, P = fitted parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.maths.losses import binary_cross_entropy, log_probability, product

PRIOR_SD = 0.25  # of the log of a scale or temperature
TOLERANCE = 1e-18  # squared distance to the optimum, in standard errors
MOST_STEPS, MOST_HALVINGS = 100, 60
ROUNDING = 1e-14  # of a loss, as a share of it
LEAST_CURVATURE = 1e-9  # keeps the system solvable where probabilities are 0 or 1 up to rounding

Fitted = Mapping[str, Mapping[str, float]]  # head -> parameter -> value; empty = not calibrated


class Affine(NamedTuple):
    """The calibrated logit is scale * logit + shift."""

    scale: float
    shift: float


def fit_funnel(z_ctr: Tensor, z_cvr: Tensor, click: Tensor, conversion: Tensor) -> tuple[Affine, Affine] | None:
    """The calibration of the click's logit and of the conversion's given a click.

    It minimises the cross-entropy of the click plus that of click and conversion together (p_ctcvr = p_ctr * p_cvr,
    Ma et al. 2018, equation 1) plus log(scale)^2 / (2 PRIOR_SD^2) of each head. None where that has no minimum:
    without a click, a row that was not clicked, a conversion, or a click that did not convert.

    z_ctr, z_cvr: [N] logits. click, conversion: [N], 0 or 1; a conversion is a click too.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    rows, clicks, conversions = len(click), click.sum().item(), conversion.sum().item()
    if not 0 < conversions < clicks < rows:
        return None
    z = _finite(torch.stack([z_ctr, z_cvr]))  # [2, N]
    click, conversion, ones = click.double(), conversion.double(), torch.ones_like(z[0])

    def at(x: Tensor) -> _Point:
        """`x`: log scale and shift of the click, then of the conversion."""
        logs, shifts = x[::2], x[1::2]
        scaled = z * logs.exp()[:, None]
        ctr, cvr = map(log_probability, scaled + shifts[:, None])
        both = product(ctr, cvr)
        loss = binary_cross_entropy(ctr, click) + binary_cross_entropy(both, conversion)
        # of the loss by the calibrated logits: its gradient, and its expected curvature as products of square roots
        ratio = (torch.stack([ctr.log_1mp, cvr.log_1mp]) - both.log_1mp).exp()
        slope = (both.log_p.exp() - conversion) * ratio
        slope[0] += ctr.log_p.exp() - click
        design = torch.stack([scaled[0], ones, scaled[1], ones])  # of the calibrated logits by x
        of_both = design * (_deviation(both) * ratio).repeat_interleave(2, 0)
        of_click = design[:2] * _deviation(ctr)
        curvature = of_both @ of_both.T
        curvature[:2, :2] += of_click @ of_click.T
        gradient = (design * slope.repeat_interleave(2, 0)).sum(1)
        return _with_prior(_Point(loss.sum(), gradient, curvature), x, slice(0, None, 2))

    # start at the mean rates: the loss is flat where probabilities are 1 up to rounding
    rates = torch.tensor([clicks / rows, conversions / clicks], dtype=torch.float64)
    start = torch.stack([torch.zeros(2), torch.logit(rates) - z.mean(1)], 1).flatten()
    x = _minimise(at, start).tolist()
    return Affine(math.exp(x[0]), x[1]), Affine(math.exp(x[2]), x[3])


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The temperature T at which softmax(logits / T) has the least cross-entropy plus log(T)^2 / (2 PRIOR_SD^2).

    logits: [N, C]; label: [N], the index of the class. Without rows: 1.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    z, index = _finite(logits), label.long()[:, None]

    def at(x: Tensor) -> _Point:
        scaled = z * (-x).exp()
        log_p = torch.log_softmax(scaled, -1)
        p = log_p.exp()
        mean = (p * scaled).sum(-1)
        gradient = (scaled.gather(-1, index)[:, 0] - mean).sum()
        curvature = (p * (scaled - mean[:, None]).square()).sum()
        point = _Point(-log_p.gather(-1, index).sum(), gradient[None], curvature[None, None])
        return _with_prior(point, x, slice(None))

    return math.exp(_minimise(at, torch.zeros(1, dtype=torch.float64)).item())


def rescaled(logits: Tensor, fitted: Fitted, heads: Sequence[str]) -> Tensor:
    """Calibrate logits [N, heads] with the scale and shift of each head, in float64."""
    scale, shift = (torch.tensor([fitted[head][name] for head in heads], dtype=torch.float64)
                    for name in Affine._fields)  # fmt: skip
    return logits.double() * scale + shift


class _Point(NamedTuple):
    """A loss with its derivatives at some values of the parameters."""

    value: Tensor  # 0-d
    gradient: Tensor  # [P]
    curvature: Tensor  # [P, P], expected (Fisher information)


def _with_prior(point: _Point, x: Tensor, logs: slice) -> _Point:
    """Add the prior on the parameters `logs`."""
    point.gradient[logs] += x[logs] / PRIOR_SD**2
    point.curvature.diagonal()[logs] += 1 / PRIOR_SD**2
    return point._replace(value=point.value + x[logs].square().sum() / (2 * PRIOR_SD**2))


def _deviation(event: tuple[Tensor, Tensor]) -> Tensor:
    """sqrt(p (1 - p)) of an event with log p and log(1 - p)."""
    return (0.5 * (event[0] + event[1])).exp()


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ValueError("logits: found NaN or infinity, allowed: finite numbers")
    return logits.double()


def _minimise(at: Callable[[Tensor], _Point], x: Tensor) -> Tensor:
    """Fisher scoring (Newton's method with the expected curvature); a step that raises the loss is halved."""
    here = at(x)
    for _ in range(MOST_STEPS):
        damped = here.curvature + LEAST_CURVATURE * torch.eye(len(x), dtype=x.dtype)
        step = torch.linalg.solve(damped, here.gradient)
        if here.gradient @ step < TOLERANCE:
            break
        for _ in range(MOST_HALVINGS):
            there = at(x - step)
            if there.value <= here.value + ROUNDING * here.value.abs():
                break
            step = step / 2
        x, here = x - step, there
    return x
