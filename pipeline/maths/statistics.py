"""Is an arm better than the baseline? Statistics over seeds, and a bootstrap over test rows beside them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import nct, t

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
Verdict = Literal["better", "worse", "not distinguishable", "one seed: no verdict"]


@dataclass(frozen=True)
class Paired:
    """Differences arm - baseline over n seeds, in the metric's unit. `None`: fewer than two seeds."""

    n: int
    mean: float  # nan without a seed
    sd: float | None  # of the differences, n - 1 in the denominator
    low: float | None  # interval of the mean, for this arm alone: not adjusted for the number of arms
    high: float | None
    p: float | None  # two-sided; without variance 1 where the mean is 0, otherwise 0


def paired(differences: Sequence[float], level: float = 0.95) -> Paired:
    """Student's paired t test (1908) and the interval that belongs to it; `level`: the interval's coverage.

    Raises:
        ValueError: a difference is NaN or infinite.
    """
    values = np.array(differences, dtype=np.float64)
    n = len(values)
    if not np.isfinite(values).all():
        raise ValueError(f"differences: found {values.tolist()}, allowed: finite numbers")
    if n < 2:
        return Paired(n, float(values[0]) if n else math.nan, None, None, None, None)
    if values.min() == values.max():  # the mean of equal numbers may round away from them, and then leaves a variance
        mean = float(values[0])
        return Paired(n, mean, 0.0, mean, mean, 0.0 if mean else 1.0)
    unit = float(np.abs(values).max())  # squares of very large or very small differences leave the range of a float
    mean, sd = float(np.mean(values / unit)), float(np.std(values / unit, ddof=1))
    error = sd / math.sqrt(n)
    half = float(t.isf((1 - level) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1))
    low, high = (mean - half) * unit, (mean + half) * unit
    return Paired(n, mean * unit, sd * unit, low, high, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for their number by Holm's step-down method (1979); `None` stays and does not count."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def minimum_detectable_difference(
    sd: float | None, n: int, arms: int, level: float = 0.05, power: float = 0.8
) -> float | None:
    """The smallest true |mean difference| that n seeds reveal with this power, in the unit of `sd`.

    Of the two-sided paired t test at level / arms, by the noncentral t distribution. Holm's first step tests at
    that level, its later ones more leniently: this is what an arm is sure of whatever the others show.

    `sd`: of the differences arm - baseline, taken for the true one; where the runs of an arm scatter by s
    independently of the baseline's, it is s times the square root of 2. Estimated from a few seeds, it makes the
    result as uncertain as it is itself.

    Returns: None with fewer than two seeds or without an arm; 0 where `sd` is 0.
    """
    if sd is None or n < 2 or arms < 1:
        return None
    critical = t.isf(level / arms / 2, n - 1)

    def missing(shift: float) -> float:
        # the lower tail as the upper one of the mirrored distribution: nct.cdf is NaN far out in its lower tail
        return power - float(nct.sf(critical, n - 1, shift) + nct.sf(critical, n - 1, -shift))

    upper = 1.0
    while missing(upper) > 0:
        upper *= 2
    return float(brentq(missing, 0.0, upper, xtol=1e-12)) * sd / math.sqrt(n)


def verdict(mean: float, p_adjusted: float | None, higher_is_better: bool, level: float = 0.05) -> Verdict:
    """What the seeds say of an arm: mean difference to the baseline, p adjusted for the number of arms."""
    if p_adjusted is None:
        return "one seed: no verdict"
    if p_adjusted > level:
        return "not distinguishable"
    return "better" if (mean > 0) == higher_is_better else "worse"


def bootstrap_auc(label: npt.ArrayLike, scores: npt.ArrayLike, resamples: int = 200, seed: int = 0) -> Array:
    """AUC of A models on resampled rows (Efron 1979): N rows with replacement, the same ones for every model.

    The differences of two columns are paired by row. They show how far the choice of test rows moves one trained
    model against another, not how far another seed would.

    label: [N] of 0 and 1; scores: [A, N], of any scale; tied ones count half.

    Returns: [resamples, A]; NaN where a resample holds one class only.

    Raises:
        ValueError: shapes that do not fit, a label other than 0 and 1, a score that is NaN.
    """
    labels, values = np.asarray(label), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or values.ndim != 2 or values.shape[1] != len(labels):
        raise ValueError(f"label, scores: found shapes {labels.shape}, {values.shape}, allowed: [N], [A, N]")
    if not np.isin(labels, (0, 1)).all() or np.isnan(values).any():
        raise ValueError("label, scores: allowed are labels 0 and 1, and scores that are not NaN")
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    places = [_places(row[positive], row[negative]) for row in values]
    areas = np.full((resamples, len(values)), np.nan)
    for area, weights in zip(areas, _row_weights(len(labels), resamples, seed), strict=True):
        of_positive, of_negative = weights[positive], weights[negative]
        pairs = of_positive.sum() * of_negative.sum()
        if pairs:
            area[:] = [_won(*place, of_positive, of_negative) / pairs for place in places]
    return areas


def bootstrap_ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike, resamples: int = 200, seed: int = 0) -> Array:
    """sum(numerator) / sum(denominator) of A models on resampled rows, those of `bootstrap_auc` at equal N and seed.

    Micro F1 is such a ratio (2 hits over found + true, each counted in its row), and so is a mean log loss.

    numerator, denominator: [A, N]. Returns: [resamples, A]; NaN where a denominator sums to 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if above.ndim != 2 or above.shape != below.shape:
        raise ValueError(f"numerator, denominator: found shapes {above.shape}, {below.shape}, allowed: [A, N] twice")
    ratios = np.full((resamples, len(above)), np.nan)
    for ratio, weights in zip(ratios, _row_weights(above.shape[1], resamples, seed), strict=True):
        # no matrix product: its rounding depends on the place of a row, and equal models must differ by exactly 0
        top = np.array([(row * weights).sum() for row in above])
        bottom = np.array([(row * weights).sum() for row in below])
        np.divide(top, bottom, out=ratio, where=bottom != 0)
    return ratios


def percentile_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrapped values [R], NaN left out (Efron 1979); (NaN, NaN) where none is left."""
    found = np.asarray(values, dtype=np.float64)
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _row_weights(rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn, a resample at a time: [rows]."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = random.integers(rows, size=rows)
        yield np.bincount(drawn, minlength=rows).astype(np.float64)


def _places(positive: Array, negative: Array) -> tuple[Places, Places]:
    """Where the rows stand among the K distinct scores of the positives.

    A positive with the k-th of them is at 2k + 1, and so is a negative tied with it; one between two is at an even
    place. Sorting is done once here: under any weights, AUC is then a few sums over 2K + 1 places.
    """
    distinct, rank = np.unique(positive, return_inverse=True)
    return 2 * rank + 1, np.searchsorted(distinct, negative, "left") + np.searchsorted(distinct, negative, "right")


def _won(positive: Places, negative: Places, of_positive: Array, of_negative: Array) -> float:
    """Weighted number of (positive, negative) pairs in the right order, tied ones half; exact for whole weights."""
    beaten = np.bincount(negative, weights=of_negative, minlength=positive.max() + 2)
    return float(of_positive @ (np.cumsum(beaten) - beaten / 2)[positive])
