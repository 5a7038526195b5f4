"""Coverage of intervals on new rows in simulated worlds: `python -m bench.coverage [WORLDS]` (4,000: five minutes).

In a world, an arm and the baseline are trained with n seeds and tested on the same rows, 75 of them conversions. The
score of a row is a sum of parts: one that all runs share, one that the arm's runs share, one of the run alone, and a
shift of the conversions, which has a part of the run's own. The true difference over all seeds and rows is known. An
interval should hold it in 95% of the worlds. Beside it stand the interval over seeds alone, and the one over rows alone
for the mean of these seeds (DeLong's).
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit
from scipy.stats import t

from pipeline.maths.row_covariance import RowCovariance, auc_influence, new_rows_interval, ratio_influence
from pipeline.maths.sequential import LOOKS, nominal_level
from pipeline.maths.statistics import paired

Array = npt.NDArray[np.float64]
CONVERSIONS, ROWS = 75, 1575
SEEDS = (3, 5, 10)
SHIFTS = np.array([1.2, 1.0])  # of the arm's and the baseline's conversions, on average
LEVEL = 0.05
INTERCEPT = -3.0  # of the logit whose log loss is measured


class Case(NamedTuple):
    """What makes scores vary. All parts of a row's score have variance 1 together."""

    rows: float  # variance of the part that an arm's runs share
    interaction: float  # variance of the part of one run
    seeds: float  # standard deviation of a run's shift of the conversions


CASES = {
    "rows": Case(rows=0.3, interaction=0.02, seeds=0.02),
    "seeds": Case(rows=0.02, interaction=0.02, seeds=0.4),
    "interaction": Case(rows=0.02, interaction=0.5, seeds=0.02),
    "all alike": Case(rows=0.1, interaction=0.3, seeds=0.12),
}


class Coverage(NamedTuple):
    """Shares of the worlds in which an interval holds the true difference, and the mean share of rows in V."""

    both: float
    seeds_alone: float
    rows_alone: float
    rows_share: float


def simulate(metric: str, case: Case, seeds: int, worlds: int, random: np.random.Generator) -> Coverage:
    """metric: auc or logloss. For the log loss, the number of conversions varies as the rows do."""
    measure, truth = (_auc, _true_auc(case)) if metric == "auc" else (_logloss, _true_logloss(case))
    held, shares = np.zeros(3), 0.0
    for _ in range(worlds):
        conversions = CONVERSIONS if metric == "auc" else int(random.binomial(ROWS, CONVERSIONS / ROWS))
        rows = RowCovariance((conversions, ROWS - conversions) if metric == "auc" else (ROWS,))
        differences = []
        for arm, base in _scores(case, seeds, conversions, random):
            (of_arm, arm_influence), (of_base, base_influence) = measure(arm, conversions), measure(base, conversions)
            rows.add(arm_influence - base_influence)
            differences.append(of_arm - of_base)
        both, alone = new_rows_interval(differences, rows, LEVEL), paired(differences, 1 - LEVEL)
        assert both is not None
        assert alone.low is not None
        assert alone.high is not None
        variance = (rows.variance + (seeds - 1) * rows.covariance) / seeds  # over rows, of the mean of these seeds
        half = t.isf(LEVEL / 2, rows.deciding_rows - 1) * math.sqrt(variance)
        held += both.low < truth < both.high, alone.low < truth < alone.high, abs(both.mean - truth) < half
        shares += both.rows_share
    return Coverage(*(held / worlds).tolist(), shares / worlds)


def _scores(case: Case, seeds: int, conversions: int, random: np.random.Generator) -> Array:
    """Scores of a world, those of the conversions first: [seeds, arm and baseline, rows]."""
    shared = random.normal(scale=math.sqrt(1 - case.rows - case.interaction), size=ROWS)
    arms = random.normal(scale=math.sqrt(case.rows), size=(2, ROWS))
    scores = shared + arms + random.normal(scale=math.sqrt(case.interaction), size=(seeds, 2, ROWS))
    scores[..., :conversions] += SHIFTS[:, None] + random.normal(scale=case.seeds, size=(seeds, 2, 1))
    return scores


def _auc(scores: Array, conversions: int) -> tuple[float, Array]:
    influence = auc_influence(scores[:conversions], scores[conversions:])
    return float(influence[:conversions].mean()), influence


def _true_auc(case: Case) -> float:
    """A run's AUC is ndtr(shift / sqrt(2)); its mean over Gaussian shifts has a closed form."""
    arm, base = ndtr(SHIFTS / math.sqrt(2 + case.seeds**2))
    return float(arm - base)


def _logloss(scores: Array, conversions: int) -> tuple[float, Array]:
    sign = np.where(np.arange(ROWS) < conversions, -1, 1)
    losses = np.logaddexp(0, sign * (scores + INTERCEPT))
    return float(losses.mean()), ratio_influence(losses, np.ones(ROWS))


def _true_logloss(case: Case) -> float:
    """Arm and baseline differ on conversions alone. Their mean loss is computed by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    logits = SHIFTS[:, None] + math.sqrt(1 + case.seeds**2) * points + INTERCEPT
    arm, base = np.logaddexp(0, -logits) @ (weights / weights.sum())
    return float(arm - base) * CONVERSIONS / ROWS


def any_look_misses(rows_spread: float, sweeps: int, random: np.random.Generator) -> float:
    """Share of sweeps of one arm in which the interval of any look misses, at the level that pays for all looks.

    Differences are Gaussian with variance 1 over seeds; what rows add to all of them has the standard deviation
    `rows_spread`, and its variance is estimated from CONVERSIONS rows. The intervals are as in `new_rows_interval`.
    """
    level, degrees = nominal_level(1), CONVERSIONS - 1
    differences = random.normal(size=(sweeps, LOOKS[-1])) + random.normal(scale=rows_spread, size=(sweeps, 1))
    of_rows = rows_spread**2 * random.chisquare(degrees, sweeps) / degrees
    missed = np.zeros(sweeps, dtype=bool)
    for seeds in LOOKS:
        of_seeds = differences[:, :seeds].var(1, ddof=1) / seeds
        both = of_seeds + of_rows
        freedom = both**2 / (of_seeds**2 / (seeds - 1) + of_rows**2 / degrees)
        half = np.maximum(-stdtrit(seeds - 1, level / 2) * np.sqrt(of_seeds),
                          -stdtrit(freedom, level / 2) * np.sqrt(both))  # fmt: skip
        missed |= np.abs(differences[:, :seeds].mean(1)) > half
    return float(missed.mean())


def main(worlds: int) -> None:
    print("metric   variance from  seeds  seeds and rows  seeds alone  rows alone  share of rows in V")
    for metric in ("auc", "logloss"):
        for name, case in CASES.items():
            for seeds in SEEDS:
                both, alone, rows, share = simulate(metric, case, seeds, worlds, np.random.default_rng(seeds))
                print(f"{metric:7}  {name:13}  {seeds:5}  {both:14.1%}  {alone:11.1%}  {rows:10.1%}  {share:18.0%}",
                      flush=True)  # fmt: skip
    print("spread of rows, in sd of seeds: share of sweeps in which any look misses")
    for spread in (0.02, 0.2, 0.5, 2.0):
        print(f"{spread:g}: {any_look_misses(spread, 5 * worlds, np.random.default_rng(0)):.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
