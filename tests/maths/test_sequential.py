"""Repeated confidence intervals against hand derivations, scipy's t test on raw differences, and simulation."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import nct, t, ttest_1samp

from pipeline.maths.sequential import (
    LOOKS,
    PATHS,
    POWER_PATHS,
    Look,
    decided_by_one_seed,
    half_width,
    look,
    looks,
    minimum_detectable_difference,
    nominal_level,
    scheduled_looks,
)

Array = npt.NDArray[np.float64]
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a division by zero would only warn

DIFFERENCES = st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=3, max_size=20)
MARGINS = st.one_of(st.none(), st.floats(0.01, 20))
LEVELS = st.sampled_from([0.05, 0.0084, 0.0019])
MIRRORED = {"better": "worse", "worse": "better", "better, by less than the margin": "worse, by less than the margin",
            "worse, by less than the margin": "better, by less than the margin"}  # fmt: skip


# levels


def smallest_p_values(differences: Array) -> Array:
    """differences: [paths, 80]. Smallest p value over the looks, each by scipy's t test. [paths]"""
    return np.min([ttest_1samp(differences[:, :seeds], 0, axis=1).pvalue for seeds in LOOKS], axis=0)


def test_levels_are_those_of_t_tests_on_raw_differences() -> None:
    """The number of raw paths below the level is binomial; the simulated level adds the error of its own paths."""
    paths = 60_000
    found = smallest_p_values(np.random.default_rng(5).normal(size=(paths, LOOKS[-1])))
    for arms in (1, 4, 10):
        share = 0.05 / arms
        error = math.sqrt(paths * share * (1 - share) * (1 + paths / PATHS))
        assert (found <= nominal_level(arms)).sum() == pytest.approx(paths * share, abs=4 * error)


@pytest.mark.parametrize("arms", [1, 2, 4, 10, 50])
def test_levels_lie_between_those_of_one_look_and_of_bonferroni_over_looks(arms: int) -> None:
    assert 0.05 / arms / len(LOOKS) < nominal_level(arms) < 0.05 / arms
    assert nominal_level(arms + 1) < nominal_level(arms)


def test_scheduled_looks() -> None:
    assert scheduled_looks(3, 20) == (3, 5, 8, 12, 20)
    assert scheduled_looks(8, 8) == (8,)
    assert scheduled_looks(3, 80) == LOOKS


# one look


def test_interval_by_hand() -> None:
    """Two degrees of freedom: t = sqrt(2) c / sqrt(1 - c^2) for confidence c; -1, 0, 4: mean 1, variance 7."""
    found = look([-1, 0, 4], 0.19, higher_is_better=True)
    half = math.sqrt(2) * 0.81 / math.sqrt(1 - 0.81**2) * math.sqrt(7 / 3)
    assert (found.seeds, found.mean, found.sd) == (3, 1.0, pytest.approx(math.sqrt(7)))
    assert (found.low, found.high) == (pytest.approx(1 - half, rel=1e-9), pytest.approx(1 + half, rel=1e-9))


@pytest.mark.parametrize(
    ("differences", "margin", "higher", "lower"),
    [
        ([1, 2, 3, 4], None, "better", "worse"),
        ([1, 2, 3, 4], 4.5, "better", "worse"),
        ([1, 2, 3, 4], 4.6, "better, by less than the margin", "worse, by less than the margin"),
        ([-4, -3, -2, -1], 4.6, "worse, by less than the margin", "better, by less than the margin"),
        ([-1.5, -0.5, 0.5, 1.5], None, None, None),
        ([-1.5, -0.5, 0.5, 1.5], 2.0, None, None),
        ([-1.5, -0.5, 0.5, 1.5], 2.1, "equal within the margin", "equal within the margin"),
        ([-0.5, 0.5, 1.5, 2.5], 3.1, "equal within the margin", "equal within the margin"),
        ([-0.5, 0.5, 1.5, 2.5], 3.0, None, None),
    ],
)
def test_decisions_by_hand(
    differences: list[float], margin: float | None, higher: str | None, lower: str | None
) -> None:
    """1, 2, 3, 4 and their shifts: half-width 3.18245 sqrt(5/12) = 2.0543 at 5%."""
    assert look(differences, 0.05, higher_is_better=True, margin=margin).decision == higher
    assert look(differences, 0.05, higher_is_better=False, margin=margin).decision == lower


@pytest.mark.parametrize("margin", [None, 0.001, 5.0])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_differences_without_variance_decide_nothing(margin: float | None, higher_is_better: bool) -> None:
    for value in (0.0, 0.1, -3.0):
        found = look([value] * 5, 0.05, higher_is_better=higher_is_better, margin=margin)
        assert found == Look(5, value, 0.0, None, None, None)


@pytest.mark.parametrize("margin", [None, 0.001])
def test_identical_needs_the_same_weights_at_every_seed_and_no_margin(margin: float | None) -> None:
    """The digests at the third seed differ: the arms' best weights were from before they parted."""
    seen = partial(looks, [0.0] * 5, (3, 5), 0.01, higher_is_better=True, margin=margin)
    same, parted = [True] * 5, [True, True, False, True, True]
    assert [x.decision for x in seen(same_weights=same)] == ["identical"]
    assert [x.decision for x in seen(same_weights=parted)] == [None, None]
    assert [x.decision for x in seen(same_weights=same[:2])] == [None, None]
    assert [x.decision for x in seen()] == [None, None]
    constant = look([0.1] * 3, 0.01, higher_is_better=True, margin=margin, same_weights=True)
    assert constant.decision is None  # the metric was measured differently


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_what_cannot_be_looked_at_is_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        look(differences, 0.05, higher_is_better=True)


@given(DIFFERENCES, LEVELS, MARGINS)
def test_an_arm_that_is_better_makes_the_baseline_worse(
    differences: list[float], level: float, margin: float | None
) -> None:
    found = look(differences, level, higher_is_better=True, margin=margin)
    swapped = look([-value for value in differences], level, higher_is_better=True, margin=margin)
    assert (swapped.mean, swapped.sd) == (-found.mean, found.sd)
    assert swapped.decision == MIRRORED.get(str(found.decision), found.decision)
    lower = look([-value for value in differences], level, higher_is_better=False, margin=margin)
    assert lower.decision == found.decision
    if found.low is not None and found.high is not None:
        assert (swapped.low, swapped.high) == (-found.high, -found.low)


@given(DIFFERENCES, LEVELS, MARGINS, st.integers(-40, 40))
def test_decisions_do_not_depend_on_the_unit(
    differences: list[float], level: float, margin: float | None, power: int
) -> None:
    """A power of two scales without rounding."""
    unit = 2.0**power
    found = look(differences, level, higher_is_better=True, margin=margin)
    scaled = look(
        [value * unit for value in differences],
        level,
        higher_is_better=True,
        margin=None if margin is None else margin * unit,
    )
    assert scaled.decision == found.decision
    assert (scaled.mean, scaled.sd) == (found.mean * unit, found.sd * unit)


# several looks


def test_the_first_look_that_decides_is_the_last() -> None:
    """Three seeds about 1 decide at 5%: half-width 4.3027 * 0.1 / sqrt(3) = 0.25; with -1, 1, 3 it is 4.97."""
    close, wide = [0.9, 1.0, 1.1], [-1.0, 1.0, 3.0]
    assert [x.seeds for x in looks([*close, -9, -9], (3, 5), 0.05, higher_is_better=True)] == [3]
    assert [x.seeds for x in looks([*wide, 1, 1], (3, 5), 0.05, higher_is_better=True)] == [3, 5]
    assert looks([], (3, 5), 0.05, higher_is_better=True) == ()
    assert looks(close[:2], (3, 5), 0.05, higher_is_better=True) == ()


def test_a_failed_seed_is_not_replaced_by_a_later_one() -> None:
    made = looks([-1.0, 1.0, 3.0, None, 1.0, 1.0, 1.0, 1.0], (3, 5, 8), 0.05, higher_is_better=True)
    assert [x.seeds for x in made] == [3]
    assert looks([None, 1.0, 1.1, 0.9], (3,), 0.05, higher_is_better=True) == ()


@given(DIFFERENCES, LEVELS, MARGINS, st.integers(0, 20))
def test_looks_do_not_change_when_seeds_are_added(
    differences: list[float], level: float, margin: float | None, seeds: int
) -> None:
    schedule = scheduled_looks(3, 20)
    whole = looks(differences, schedule, level, higher_is_better=True, margin=margin)
    part = looks(differences[:seeds], schedule, level, higher_is_better=True, margin=margin)
    shorter = looks(differences, schedule[:2], level, higher_is_better=True, margin=margin)
    assert part == whole[: len(part)]
    assert shorter == whole[: len(shorter)]
    assert [x.seeds for x in whole] == list(schedule[: len(whole)])
    assert [x.decision for x in whole[:-1]] == [None] * len(whole[:-1])


# planning


@given(DIFFERENCES, LEVELS)
def test_half_width_is_that_of_the_interval(differences: list[float], level: float) -> None:
    found = look(differences, level, higher_is_better=True)
    if found.low is not None and found.high is not None:
        half = half_width(found.sd, found.seeds, level)
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
@pytest.mark.parametrize(("level", "power"), [(0.0084, 0.8), (0.05, 0.8), (0.0019, 0.5)])
def test_minimum_detectable_difference_of_one_look_is_exact(seeds: int, level: float, power: float) -> None:
    """Noncentral t. The share of paths below their quantile has the error of a binomial one."""
    sd = 0.013
    effect = minimum_detectable_difference(sd, (seeds,), level, power)
    reached = nct.sf(t.isf(level / 2, seeds - 1), seeds - 1, effect / sd * math.sqrt(seeds))
    assert reached == pytest.approx(power, abs=5 * math.sqrt(power * (1 - power) / POWER_PATHS))


def found_by(differences: Array, schedule: Sequence[int], level: float) -> float:
    """Share of paths [paths, seeds] for which a t test above 0 at some look is below the level."""
    tests = [ttest_1samp(differences[:, :seeds], 0, axis=1) for seeds in schedule]
    return float(np.any([(test.pvalue < level) & (test.statistic > 0) for test in tests], axis=0).mean())


@pytest.mark.parametrize(("arms", "most"), [(1, 12), (4, 20)])
def test_minimum_detectable_difference_of_several_looks_is_found(arms: int, most: int) -> None:
    paths, level, schedule = 20_000, nominal_level(arms), scheduled_looks(3, most)
    effect = minimum_detectable_difference(2.0, schedule, level)
    differences = np.random.default_rng(most).normal(effect, 2.0, (paths, most))
    error = math.sqrt(0.8 * 0.2 * (1 / paths + 1 / POWER_PATHS))
    assert found_by(differences, schedule, level) == pytest.approx(0.8, abs=4 * error)


# one seed


def test_a_seed_that_decides_by_hand() -> None:
    """1, 2, 3, 4 at 5%: without the third, mean 7/3 and variance 7/3, half-width 3.18245 sqrt(7/3) / 2 = 2.43.

    Without the second the mean is 8/3, with the same variance; without an end 2 or 3, half-width 1.59.
    """
    assert decided_by_one_seed([1, 2, 3, 4], 0.05, higher_is_better=True) == (2,)
    assert decided_by_one_seed([-4, -3, -2, -1], 0.05, higher_is_better=True) == (1,)
    assert decided_by_one_seed([1.9, 2.0, 2.1, 2.0], 0.05, higher_is_better=True) == ()
    assert decided_by_one_seed([-1.5, -0.5, 0.5, 1.5], 0.05, higher_is_better=True) == ()  # open
    assert decided_by_one_seed([0.0] * 4, 0.05, higher_is_better=True, margin=1) == ()
    assert decided_by_one_seed([1.0, 1.0, 1.01], 0.05, higher_is_better=True) == (2,)  # the only spread there is
    assert decided_by_one_seed([1.0, 1.001], 0.05, higher_is_better=True) == ()


@given(DIFFERENCES, LEVELS, MARGINS, st.randoms(use_true_random=False))
def test_seeds_that_decide_do_not_depend_on_their_order(
    differences: list[float], level: float, margin: float | None, random: Random
) -> None:
    whole = [round(8 * value) / 8 for value in differences]  # sums without rounding
    order = list(range(len(whole)))
    random.shuffle(order)
    found = decided_by_one_seed(whole, level, higher_is_better=True, margin=margin)
    shuffled = decided_by_one_seed([whole[seed] for seed in order], level, higher_is_better=True, margin=margin)
    assert sorted(order[place] for place in shuffled) == list(found)


# whole sweeps


def test_sweeps_without_an_effect_rarely_claim_one() -> None:
    """Any look of either arm, up to 80 seeds: at most 5% of 250 sweeps, so 12.5 with a standard deviation of 3.4."""
    random = np.random.default_rng(2)
    level = nominal_level(2)
    claims: list[set[str | None]] = []
    for _ in range(250):
        baseline, *arms = random.normal(0.75, 0.004, (3, LOOKS[-1]))
        claims.append({looks(arm - baseline, LOOKS, level, higher_is_better=True)[-1].decision for arm in arms})
    false = [decisions - {None} for decisions in claims if decisions != {None}]
    assert 2 <= len(false) <= 24  # within 3.3 standard deviations
    assert set.union(*false) == {"better", "worse"}


def test_a_difference_as_large_as_the_margin_is_rarely_called_equal() -> None:
    """Its interval would have to exclude it: at most 5% of 250 sweeps, so 12.5 with a standard deviation of 3.4."""
    differences = np.random.default_rng(0).normal(0.6, 1, (250, LOOKS[-1])).tolist()
    level = nominal_level(1)
    made = Counter(looks(own, LOOKS, level, higher_is_better=True, margin=0.6)[-1].decision for own in differences)
    assert 0 < made["equal within the margin"] <= 24
    assert made["worse"] == 0
    assert made["better"] > 200
