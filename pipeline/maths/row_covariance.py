"""Intervals that hold for new test rows as well as for new seeds.

The mean difference d between an arm and the baseline over n seeds has the variance

    V = s^2 / n + max(c, 0),

where s is the standard deviation of the seeds' differences, and c is the mean, over pairs of seeds i and j, of the
covariance over test rows of d_i and d_j (Obuchowski and Rockette 1995, with seeds for their readers). Whatever the
rows do to all seeds alike is in c. It cancels in s^2, which holds what differs from seed to seed: the seeds' own effect
and their interaction with the rows.

A metric's variance over rows comes from the influence of each row on it, in one pass over the rows and without
resampling: placement values for an AUC (DeLong, DeLong and Clarke-Pearson 1988), the derivative with respect to the
row's weight for a ratio of sums. The latter is the infinitesimal jackknife (Efron 1982, chapter 6): what a bootstrap of
the rows, the same for all seeds, gives without its noise. Rows are taken as independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from pipeline.maths.arrays import Floats


@dataclass(frozen=True)
class NewRows:
    """Mean difference arm - baseline with an interval for new seeds and new test rows like these, in metric units."""

    mean: float
    low: float
    high: float
    level: float  # two-sided: 0.05 for a 95% interval
    seeds: int
    seeds_variance: float  # s^2 / n
    interaction_variance: float  # the part of it that falls with more rows: rows move each seed differently
    rows_variance: float  # max(c, 0)
    degrees: float  # of freedom of the sum of both variances
    deciding_rows: int  # rows of the rarer class; for a ratio of sums, as many rows of equal influence as would do
    rows_name: str  # what those rows are: "conversions", or "rows"

    @property
    def rows_share(self) -> float:
        """The share of the variance that more seeds would leave."""
        return self.rows_variance / (self.seeds_variance + self.rows_variance)

    def half_width(self, seeds: int | None = None, rows: float = 1.0) -> float:
        """The half-width to expect with `seeds` in all and `rows` times as many test rows, at the same level."""
        seeds = seeds or self.seeds
        fixed = self.seeds_variance - self.interaction_variance
        seeds_variance = (fixed + self.interaction_variance / rows) * self.seeds / seeds
        return _half_width(seeds_variance, seeds, self.rows_variance / rows, self.deciding_rows * rows, self.level)[0]


def auc_influence(positive: Floats, negative: Floats) -> Floats:
    """Placement value of each row: the share of rows of the other class that it is on the right side of; ties half.

    positive: scores of the rows of class 1 [P]; negative: of the others [N]. Returns: [P + N], the positives first.
    The mean over either class is the AUC. Computed from ranks (Sun and Xu 2014) in O((P + N) log(P + N)).
    """
    return np.concatenate([_share_below(positive, negative), 1 - _share_below(negative, positive)])


def ratio_influence(numerator: Floats, denominator: Floats) -> Floats:
    """Influence of each row [N] on sum(numerator) / sum(denominator); the ratio varies as their mean does."""
    ratio = numerator.sum() / denominator.sum()
    return np.asarray((numerator - ratio * denominator) / denominator.mean())


class RowCovariance:
    """Covariance over rows of the differences of several seeds, which are added one at a time.

    groups: numbers of rows that were sampled apart: positives and negatives for an AUC, all rows for a ratio.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups, self.seeds = tuple(groups), 0
        self.total = np.zeros(sum(groups))
        self.own = 0.0

    def add(self, influence: Floats) -> None:
        """Add a seed: influences on the arm's metric minus those on the baseline's [rows], group by group."""
        self.seeds += 1
        self.total += influence
        self.own += self._variance(influence)

    @property
    def variance(self) -> float:
        """Mean over seeds of the variance of d_i over rows."""
        return self.own / self.seeds

    @property
    def covariance(self) -> float:
        """Mean over pairs of seeds i != j of the covariance of d_i and d_j over rows."""
        return (self._variance(self.total) - self.own) / (self.seeds * (self.seeds - 1))

    @property
    def deciding_rows(self) -> float:
        """The rows of the smallest group. With one group, the effective number of rows (Kish 1965, section 11.7).

        That is (sum u^2)^2 / sum u^4 of the rows' influences u: so many rows of equal influence would give a variance
        as certain as these do. Rows on which arm and baseline agree do not count.
        """
        if len(self.groups) > 1:
            return min(self.groups)
        squares = np.square(self.total - self.total.mean())
        return float(squares.sum() ** 2 / np.square(squares).sum()) if squares.any() else len(squares)

    def _variance(self, influence: Floats) -> float:
        if min(self.groups) < 2:
            return math.nan
        parts = np.split(influence, np.cumsum(self.groups)[:-1])
        return float(sum(part.var(ddof=1) / len(part) for part in parts))


def new_rows_interval(
    differences: Sequence[float], rows: RowCovariance, level: float, rows_name: str = "rows"
) -> NewRows | None:
    """Interval of the mean difference for new seeds and new rows. None if the seeds do not differ, or are fewer than 2.

    differences: arm - baseline [n], one per seed; rows: of the same seeds; level: two-sided. The degrees of freedom are
    Satterthwaite's (Hillis 2007, with a term for the rows); the interval is never narrower than that over seeds alone.
    """
    seeds = len(differences)
    if seeds < 2 or min(differences) == max(differences) or min(rows.groups) < 2:
        return None
    mean, seeds_variance = float(np.mean(differences)), float(np.var(differences, ddof=1)) / seeds
    covariance = max(rows.covariance, 0.0)
    interaction = min(max(rows.variance - covariance, 0.0) / seeds, seeds_variance)
    half, degrees = _half_width(seeds_variance, seeds, covariance, rows.deciding_rows, level)
    return NewRows(mean, mean - half, mean + half, level, seeds, seeds_variance, interaction, covariance, degrees,
                   round(rows.deciding_rows), rows_name)  # fmt: skip


def _half_width(
    seeds_variance: float, seeds: int, rows_variance: float, deciding_rows: float, level: float
) -> tuple[float, float]:
    """Half-width of the interval, and the degrees of freedom of V."""
    variance = seeds_variance + rows_variance
    shares = seeds_variance / variance, rows_variance / variance  # of V: no square of a tiny variance underflows
    degrees = 1 / (shares[0] ** 2 / (seeds - 1) + shares[1] ** 2 / max(deciding_rows - 1, 1))
    over_seeds = t.isf(level / 2, seeds - 1) * math.sqrt(seeds_variance)
    return float(max(over_seeds, t.isf(level / 2, degrees) * math.sqrt(variance))), degrees


def _share_below(scores: Floats, others: Floats) -> Floats:
    """Share of `others` below each score; ties count half."""
    others = np.sort(others)
    below = np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")
    return below / (2 * len(others))
