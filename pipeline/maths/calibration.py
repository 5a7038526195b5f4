"""Calibration of a trained model: scale and shift, or temperature, of its logits, fitted on held-out rows.

Positive weights and focal losses distort the probabilities, but hardly the ranking. Platt (1999, "Probabilistic outputs
for support vector machines") corrects a score z to sigmoid(scale * z + shift) by maximum likelihood; Guo et al. (2017,
"On calibration of modern neural networks", section 4.2) divide the logits of a softmax by a temperature. Here the log
of a scale or temperature also has the prior N(0, PRIOR_SD^2), which keeps it near 1 if there are few rows.

Losses are sums over rows, in nats. Logits and shifts are log odds. All computations use float64. Shapes: N = rows,
C = classes, P = fitted parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.maths.losses import binary_cross_entropy, log_probability, product

PRIOR_SD = 0.25  # standard deviation of the prior on the log of a scale or temperature
TOLERANCE = 1e-18  # stop below this squared distance to the optimum, in standard errors
MOST_STEPS, MOST_HALVINGS = 100, 60
ROUNDING = 1e-14  # relative rounding error of a loss
LEAST_CURVATURE = 1e-9  # added to the diagonal, to keep the system solvable if all probabilities round to 0 or 1

Fitted = Mapping[str, Mapping[str, float]]  # head -> parameter -> value; empty = not calibrated


class Affine(NamedTuple):
    """Calibration of a logit: scale * logit + shift."""

    scale: float
    shift: float


def fit_funnel(z_ctr: Tensor, z_cvr: Tensor, click: Tensor, conversion: Tensor) -> tuple[Affine, Affine] | None:
    """Fit the calibration of the logit of a click, and of the logit of a conversion given a click.

    Minimises the cross-entropy of the click plus that of click and conversion together (p_ctcvr = p_ctr * p_cvr, Ma et
    al. 2018, equation 1) plus log(scale)^2 / (2 PRIOR_SD^2) for each head. Returns None if there is no minimum. It
    exists only if there are rows without a click, clicks without a conversion, and conversions.

    z_ctr, z_cvr: [N] logits. click, conversion: [N], 0 or 1; rows with a conversion also have a click.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    rows, clicks, conversions = len(click), click.sum().item(), conversion.sum().item()
    if not 0 < conversions < clicks < rows:
        return None
    z = _finite(torch.stack([z_ctr, z_cvr]))  # [2, N]
    click, conversion, ones = click.double(), conversion.double(), torch.ones_like(z[0])

    def at(x: Tensor) -> _Point:
        """Loss and derivatives at `x`: log scale and shift of the click, then of the conversion."""
        logs, shifts = x[::2], x[1::2]
        scaled = z * logs.exp()[:, None]
        ctr, cvr = map(log_probability, scaled + shifts[:, None])
        both = product(ctr, cvr)
        loss = binary_cross_entropy(ctr, click) + binary_cross_entropy(both, conversion)
        # slope: gradient of the loss with respect to the calibrated logits. of_both, of_click: square roots of the
        # expected curvature (Fisher information) of the two terms of the loss.
        ratio = (torch.stack([ctr.log_1mp, cvr.log_1mp]) - both.log_1mp).exp()
        slope = (both.log_p.exp() - conversion) * ratio
        slope[0] += ctr.log_p.exp() - click
        design = torch.stack([scaled[0], ones, scaled[1], ones])  # derivatives of the calibrated logits
        of_both = design * (_deviation(both) * ratio).repeat_interleave(2, 0)
        of_click = design[:2] * _deviation(ctr)
        curvature = of_both @ of_both.T
        curvature[:2, :2] += of_click @ of_click.T
        gradient = (design * slope.repeat_interleave(2, 0)).sum(1)
        return _with_prior(_Point(loss.sum(), gradient, curvature), x, slice(0, None, 2))

    # start at the mean rates, because the loss is flat where probabilities round to 1
    rates = torch.tensor([clicks / rows, conversions / clicks], dtype=torch.float64)
    start = torch.stack([torch.zeros(2), torch.logit(rates) - z.mean(1)], 1).flatten()
    x = _minimise(at, start).tolist()
    return Affine(math.exp(x[0]), x[1]), Affine(math.exp(x[2]), x[3])


def fit_click(z: Tensor, click: Tensor) -> Affine | None:
    """Fit the calibration of the logit of a click alone; see `fit_funnel`. Returns None without both classes.

    z: [N] logits. click: [N], 0 or 1.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    rate = click.double().mean()
    if not 0 < rate < 1:
        return None
    z, click, ones = _finite(z), click.double(), torch.ones(len(z), dtype=torch.float64)

    def at(x: Tensor) -> _Point:
        scaled = z * x[0].exp()
        ctr = log_probability(scaled + x[1])
        design = torch.stack([scaled, ones])
        weighted = design * _deviation(ctr)
        gradient = (design * (ctr.log_p.exp() - click)).sum(1)
        point = _Point(binary_cross_entropy(ctr, click).sum(), gradient, weighted @ weighted.T)
        return _with_prior(point, x, slice(0, 1))

    log_scale, shift = _minimise(at, torch.stack([torch.zeros_like(rate), torch.logit(rate) - z.mean()])).tolist()
    return Affine(math.exp(log_scale), shift)


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """Fit the temperature T that minimises the cross-entropy of softmax(logits / T) plus log(T)^2 / (2 PRIOR_SD^2).

    logits: [N, C]; label: [N], index of the class. Returns 1 if there are no rows.

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
    """A loss with its derivatives at one point of the parameter space."""

    value: Tensor  # 0-d
    gradient: Tensor  # [P]
    curvature: Tensor  # [P, P], expected (Fisher information)


def _with_prior(point: _Point, x: Tensor, logs: slice) -> _Point:
    """Add the prior on the logarithms of scales or temperatures, the parameters `x[logs]`."""
    point.gradient[logs] += x[logs] / PRIOR_SD**2
    point.curvature.diagonal()[logs] += 1 / PRIOR_SD**2
    return point._replace(value=point.value + x[logs].square().sum() / (2 * PRIOR_SD**2))


def _deviation(event: tuple[Tensor, Tensor]) -> Tensor:
    """Standard deviation sqrt(p (1 - p)) of an event, from (log p, log(1 - p))."""
    return (0.5 * (event[0] + event[1])).exp()


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ValueError("logits: found NaN or infinity, allowed: finite numbers")
    return logits.double()


def _minimise(at: Callable[[Tensor], _Point], x: Tensor) -> Tensor:
    """Minimise by Fisher scoring (Newton's method with the expected curvature), halving steps that raise the loss."""
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
