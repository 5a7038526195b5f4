"""Comparison of an arm with the baseline: a test over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Paired:
    """Paired differences arm - baseline over n seeds, in the metric's unit. Optional values are None if n < 2."""

    n: int
    mean: float  # NaN if n is 0
    sd: float | None  # standard deviation of the differences, n - 1 in the denominator
    low: float | None  # confidence interval of the mean, not adjusted for the number of arms
    high: float | None
    p: float | None  # two-sided; if all differences are equal: 1 if they are 0, else 0


def paired(differences: Sequence[float], level: float = 0.95) -> Paired:
    """Student's paired t test (1908), with a confidence interval of the mean difference at confidence `level`.

    Raises:
        ValueError: a difference is NaN or infinite.
    """
    values = np.array(differences, dtype=np.float64)
    n = len(values)
    if not np.isfinite(values).all():
        raise ValueError(f"differences: found {values.tolist()}, allowed: finite numbers")
    if n < 2:
        return Paired(n, float(values[0]) if n else math.nan, None, None, None, None)
    if values.min() == values.max():  # rounding of the mean could otherwise give a variance above 0
        mean = float(values[0])
        return Paired(n, mean, 0.0, mean, mean, 0.0 if mean else 1.0)
    unit = float(np.abs(values).max())  # avoids overflow and underflow of squares
    mean, sd = float(np.mean(values / unit)), float(np.std(values / unit, ddof=1))
    error = sd / math.sqrt(n)
    half = float(t.isf((1 - level) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1))
    low, high = (mean - half) * unit, (mean + half) * unit
    return Paired(n, mean * unit, sd * unit, low, high, p)
