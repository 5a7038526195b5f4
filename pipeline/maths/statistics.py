"""Comparison of an arm with the baseline: tests over seeds, and a bootstrap over test rows."""

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


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for multiple tests by Holm's step-down method (1979). None is kept and not counted as a test."""
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
    """Smallest true |mean difference| that n seeds detect with this power, in the unit of `sd`.

    Computed with the noncentral t distribution for a two-sided paired t test at level / arms. Holm's first step tests
    at that level and its later steps are less strict, so the power is reached whatever the results of other arms.

    `sd`: standard deviation of the differences arm - baseline, treated as exact. If it is estimated from few seeds, the
    result is uncertain.

    Returns: None with fewer than two seeds or without an arm; 0 if `sd` is 0.
    """
    if sd is None or n < 2 or arms < 1:
        return None
    critical = t.isf(level / arms / 2, n - 1)

    def missing(shift: float) -> float:
        # compute the lower tail as the upper tail of the mirrored distribution: nct.cdf is NaN far in the lower tail
        return power - float(nct.sf(critical, n - 1, shift) + nct.sf(critical, n - 1, -shift))

    upper = 1.0
    while missing(upper) > 0:
        upper *= 2
    return float(brentq(missing, 0.0, upper, xtol=1e-12)) * sd / math.sqrt(n)


def verdict(mean: float, p_adjusted: float | None, higher_is_better: bool, level: float = 0.05) -> Verdict:
    """Verdict on an arm. mean: mean difference from the baseline; p_adjusted: p value adjusted for multiple tests."""
    if p_adjusted is None:
        return "one seed: no verdict"
    if p_adjusted > level:
        return "not distinguishable"
    return "better" if (mean > 0) == higher_is_better else "worse"


def bootstrap_auc(label: npt.ArrayLike, scores: npt.ArrayLike, resamples: int = 200, seed: int = 0) -> Array:
    """AUC of A models on bootstrap samples (Efron 1979) of N rows; all models are evaluated on the same samples.

    Differences between models are therefore paired by row. Their spread shows the effect of the choice of test rows on
    the trained models, but not the effect of the training seed.

    label: [N], 0 or 1; scores: [A, N], on any scale; ties count half.

    Returns: [resamples, A]; NaN if a sample contains only one class.

    Raises:
        ValueError: the shapes do not match, a label is not 0 or 1, or a score is NaN.
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
    """sum(numerator) / sum(denominator) of A models on bootstrap samples of N rows.

    Examples are micro F1 (per row: 2 * hits, and predicted + true) and mean log loss. For equal N and seed, the samples
    are those of `bootstrap_auc`.

    numerator, denominator: [A, N]. Returns: [resamples, A]; NaN if the denominators sum to 0.

    Raises:
        ValueError: the shapes do not match.
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if above.ndim != 2 or above.shape != below.shape:
        raise ValueError(f"numerator, denominator: found shapes {above.shape}, {below.shape}, allowed: [A, N] twice")
    ratios = np.full((resamples, len(above)), np.nan)
    for ratio, weights in zip(ratios, _row_weights(above.shape[1], resamples, seed), strict=True):
        # no matrix product, which could round equal rows differently: equal models must differ by exactly 0
        top = np.array([(row * weights).sum() for row in above])
        bottom = np.array([(row * weights).sum() for row in below])
        np.divide(top, bottom, out=ratio, where=bottom != 0)
    return ratios


def percentile_interval(values: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (Efron 1979) of bootstrapped values [R], ignoring NaN; (NaN, NaN) if no value is left."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _row_weights(rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield the row weights of each bootstrap sample: how often each row is drawn. [rows]"""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = random.integers(rows, size=rows)
        yield np.bincount(drawn, minlength=rows).astype(np.float64)


def _places(positive: Array, negative: Array) -> tuple[Places, Places]:
    """Ranks of all rows relative to the K distinct scores of the positives, which are numbered from 0.

    A positive with score k has rank 2k + 1, and so has a negative with an equal score. A negative between two of the
    scores has an even rank. Sorting is needed only once: for any row weights, the AUC is then a few sums over 2K + 1
    ranks.
    """
    distinct, rank = np.unique(positive, return_inverse=True)
    return 2 * rank + 1, np.searchsorted(distinct, negative, "left") + np.searchsorted(distinct, negative, "right")


def _won(positive: Places, negative: Places, of_positive: Array, of_negative: Array) -> float:
    """Weighted number of (positive, negative) pairs in the right order; ties count half. Exact for integer weights."""
    beaten = np.bincount(negative, weights=of_negative, minlength=positive.max() + 2)
    return float(of_positive @ (np.cumsum(beaten) - beaten / 2)[positive])
