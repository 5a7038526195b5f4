"""Repeated confidence intervals for a sweep that adds seeds until its arms are decided."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.stats import t

from pipeline.maths.arrays import Floats
from pipeline.maths.statistics import paired

LOOKS = (3, 5, 8, 12, 20, 32, 50, 80)  # numbers of seeds after which an arm may be decided
LEVEL = 0.05  # probability of any false claim in a family of arms
PATHS = 2**20  # simulated paths for a nominal level: 1.4% of standard error for ten arms
POWER_PATHS = 2**16  # simulated paths for a minimum detectable difference

Decision = Literal[
    "better",
    "better, by less than the margin",
    "worse",
    "worse, by less than the margin",
    "equal within the margin",
    "identical",
]


@dataclass(frozen=True)
class Look:
    """What the first seeds say about an arm, in the metric's unit."""

    seeds: int
    mean: float  # of the differences arm - baseline
    sd: float
    low: float | None  # repeated confidence interval of the mean; None if all differences are equal
    high: float | None
    decision: Decision | None  # None: open


def scheduled_looks(first: int, most: int) -> tuple[int, ...]:
    """The looks from `first` to `most` seeds, both of which must be in LOOKS."""
    return tuple(seeds for seeds in LOOKS if first <= seeds <= most)


def nominal_level(arms: int) -> float:
    """Two-sided level of each arm's t interval at each look, for a family of `arms` arms.

    With this level, the probability that any look of any arm excludes the arm's true difference is at most LEVEL
    (repeated confidence intervals: Jennison and Turnbull 1989; divided among arms by Bonferroni). All looks up to the
    last of LOOKS are paid for, so the largest number of seeds may be raised later. For Gaussian differences the
    smallest p value over the looks has the same distribution whatever their variance; this is its LEVEL / arms
    quantile over simulated paths.
    """
    return float(np.quantile(_smallest_p_values(), LEVEL / arms))


@cache
def _smallest_p_values() -> Floats:
    """Smallest two-sided p value over all looks, for each of PATHS paths of Gaussian differences; 1 if above LEVEL."""
    smallest = np.ones(PATHS)
    for seeds, mean, sd in _null_paths(LOOKS, PATHS):
        statistic = np.abs(mean) * math.sqrt(seeds) / sd
        extreme = np.flatnonzero(statistic > t.isf(LEVEL / 2, seeds - 1))
        smallest[extreme] = np.minimum(smallest[extreme], 2 * t.sf(statistic[extreme], seeds - 1))
    return smallest


def _null_paths(schedule: Sequence[int], paths: int) -> Iterator[tuple[int, Floats, Floats]]:
    """At each look: its seeds, and mean and standard deviation of that many standard normal differences. [paths]

    The seeds between two looks enter through their sum and, independent of it, the chi-squared sum of squares about
    their mean.
    """
    random = np.random.default_rng(1989)
    total, squares = np.zeros(paths), np.zeros(paths)
    for before, seeds in pairwise((0, *schedule)):
        added = seeds - before
        step = random.normal(scale=math.sqrt(added), size=paths)
        squares += step**2 / added + (random.chisquare(added - 1, size=paths) if added > 1 else 0)
        total += step
        yield seeds, total / seeds, np.sqrt((squares - total**2 / seeds) / (seeds - 1))


def half_width(sd: float, seeds: int, level: float) -> float:
    """Half-width of the interval of an arm whose `seeds` differences have standard deviation `sd`, in its unit."""
    return float(t.isf(level / 2, seeds - 1)) * sd / math.sqrt(seeds)


def minimum_detectable_difference(sd: float, schedule: Sequence[int], level: float, power: float = 0.8) -> float:
    """Smallest true difference that some look of `schedule` finds with this power, in the unit of `sd`.

    sd: standard deviation of the differences arm - baseline, treated as exact. level: `nominal_level` of the family. A
    simulated path of Gaussian differences is decided at a look if the true difference exceeds its interval's half-width
    less its error; the path needs the smallest of these over the looks, and this is their `power` quantile.
    """
    needed = np.full(POWER_PATHS, np.inf)
    for seeds, error, spread in _null_paths(schedule, POWER_PATHS):
        np.minimum(needed, half_width(1.0, seeds, level) * spread - error, out=needed)
    return float(np.quantile(needed, power)) * sd


def look(
    differences: Sequence[float],
    level: float,
    *,
    higher_is_better: bool,
    margin: float | None = None,
    same_weights: bool = False,
) -> Look:
    """Decide on an arm from its paired differences to the baseline, one per seed.

    level: `nominal_level` of the arm's family. margin: differences below it do not matter. same_weights: at every seed
    both runs ended with the same weights; with differences of 0, the arm is identical. Differences without variance
    decide nothing else: seeds whose best weights are from before the gate differ by exactly 0, whatever the arm does
    later.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    if len(differences) < 2:
        raise ValueError(f"differences: found {len(differences)}, allowed: at least 2")
    result = paired(differences, 1 - level)
    assert result.sd is not None
    if not result.sd:
        identical = same_weights and not result.mean
        return Look(result.n, result.mean, 0.0, None, None, "identical" if identical else None)
    assert result.low is not None
    assert result.high is not None
    decision = decision_of(result.low, result.high, higher_is_better=higher_is_better, margin=margin)
    return Look(result.n, result.mean, result.sd, result.low, result.high, decision)


def decision_of(low: float, high: float, *, higher_is_better: bool, margin: float | None = None) -> Decision | None:
    """Decision on an arm whose mean difference has this interval; None if the interval leaves it open."""
    inside = margin is not None and -margin < low and high < margin
    if low > 0 or high < 0:
        if (low > 0) == higher_is_better:
            return "better, by less than the margin" if inside else "better"
        return "worse, by less than the margin" if inside else "worse"
    return "equal within the margin" if inside else None


def looks(
    differences: Sequence[float | None],
    schedule: Sequence[int],
    level: float,
    *,
    higher_is_better: bool,
    margin: float | None = None,
    same_weights: Sequence[bool] = (),
) -> tuple[Look, ...]:
    """The looks at an arm so far: up to the one that decides it, or the last one whose seeds have all finished.

    differences: arm - baseline for seeds 0, 1, ...; None where a run has not finished or has failed. same_weights:
    for each seed, whether both runs ended with the same weights.
    """
    made: list[Look] = []
    for seeds in schedule:
        known = [difference for difference in differences[:seeds] if difference is not None]
        if len(known) < seeds or (made and made[-1].decision):
            break
        same = len(same_weights) >= seeds and all(same_weights[:seeds])
        made.append(look(known, level, higher_is_better=higher_is_better, margin=margin, same_weights=same))
    return tuple(made)


def decided_by_one_seed(
    differences: Sequence[float], level: float, *, higher_is_better: bool, margin: float | None = None
) -> tuple[int, ...]:
    """Seeds (indices of `differences`) each of which alone brought about the decision; empty if open.

    The decision depends on a seed if it changes with the mean and standard deviation of the others, at the same number
    of seeds: what one seed fewer costs in precision does not count. Two differences are never enough: one has no
    spread.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    decision = look(differences, level, higher_is_better=higher_is_better, margin=margin).decision
    if decision is None or len(differences) < 3:
        return ()
    deciding: list[int] = []
    for seed in range(len(differences)):
        others = paired([*differences[:seed], *differences[seed + 1 :]])
        assert others.sd is not None
        half = half_width(others.sd, len(differences), level)
        low, high = others.mean - half, others.mean + half
        if not half or decision_of(low, high, higher_is_better=higher_is_better, margin=margin) != decision:
            deciding.append(seed)
    return tuple(deciding)
