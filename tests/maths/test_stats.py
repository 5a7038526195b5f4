"""The statistics of a comparison against hand derivations, scipy, sklearn and simulation."""

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_rel

from pipeline.maths.sequential import decision_of
from pipeline.maths.statistics import Paired, paired

Array = npt.NDArray[np.float64]
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a division by zero would only warn

DIFFERENCES = st.lists(
    st.floats(-10, 10, allow_nan=False).map(lambda value: round(value, 6)), min_size=2, max_size=12
)  # on a grid: what rounding leaves of a shift stays far below it


# paired


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
def test_paired_is_scipys(n: int) -> None:
    random = np.random.default_rng(n)
    baseline = random.normal(0.75, 0.01, n)
    arm = baseline + random.normal(0.002, 0.003, n)
    found, expected = paired(arm - baseline), ttest_rel(arm, baseline)
    interval = expected.confidence_interval(0.95)
    assert (found.n, found.mean, found.sd) == (
        n, pytest.approx(np.mean(arm - baseline)), pytest.approx(np.std(arm - baseline, ddof=1))
    )  # fmt: skip
    assert [found.p, found.low, found.high] == pytest.approx([expected.pvalue, *interval], rel=1e-10, abs=1e-14)


def test_paired_by_hand() -> None:
    """1, 2, 3, 4: mean 5/2, variance 5/3, t = 2.5 / sqrt(5/12); 3.182446 is the table's 97.5% point for 3 seeds."""
    found = paired([1, 2, 3, 4])
    half = 3.182446305284263 * math.sqrt(5 / 12)
    assert (found.n, found.mean, found.sd) == (4, 2.5, pytest.approx(math.sqrt(5 / 3)))
    assert (found.low, found.high) == (pytest.approx(2.5 - half, abs=1e-9), pytest.approx(2.5 + half, abs=1e-9))


@given(st.floats(-1, 1), st.floats(0.001, 1))
@settings(deadline=None)
def test_paired_of_two_and_three_seeds_by_closed_form(mean: float, spread: float) -> None:
    """One degree of freedom: the Cauchy distribution; two: F(t) = 1/2 + t / (2 sqrt(2 + t^2))."""
    two, three = paired([mean - spread, mean + spread]), paired([mean - spread, mean, mean + spread])
    t = abs(mean) / spread  # the error of the mean: sqrt(2) spread / sqrt(2)
    assert two.p == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=3e-8)  # scipy drops t**2 below 1e-16
    assert two.high == pytest.approx(mean + spread * math.tan(0.475 * math.pi), rel=1e-9, abs=1e-9)
    t = abs(mean) / (spread / math.sqrt(3))
    assert three.p == pytest.approx(1 - t / math.sqrt(2 + t**2), abs=3e-8)


def test_interval_at_another_level() -> None:
    low, high = student.interval(0.8, 3, loc=2.5, scale=math.sqrt(5 / 12))
    found = paired([1, 2, 3, 4], level=0.8)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-10), pytest.approx(high, rel=1e-10))


@given(DIFFERENCES)
@settings(deadline=None)
def test_the_interval_leaves_out_zero_where_p_is_below_5_percent(differences: list[float]) -> None:
    found = paired(differences)
    assert found.p is not None
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.p <= 1
    assert found.low <= found.mean <= found.high
    if abs(found.p - 0.05) > 1e-9:
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


@given(DIFFERENCES)
@settings(deadline=None)
def test_swapping_arm_and_baseline_turns_the_sign(differences: list[float]) -> None:
    found, swapped = paired(differences), paired([-value for value in differences])
    assert (swapped.mean, swapped.sd, swapped.p) == (-found.mean, found.sd, found.p)
    assert (swapped.low, swapped.high) == (-(found.high or 0), -(found.low or 0))


@given(DIFFERENCES, st.floats(-100, 100), st.sampled_from([1e-200, 1e-3, 7.0, 1e200]))
@settings(deadline=None)
def test_a_shift_moves_the_interval_and_a_unit_scales_it(differences: list[float], shift: float, factor: float) -> None:
    found, moved = paired(differences), paired([value + shift for value in differences])
    scaled = paired([value * factor for value in differences])
    assert moved.mean == pytest.approx(found.mean + shift, abs=1e-10)
    assert moved.sd == pytest.approx(found.sd, abs=1e-10)
    assert moved.high == pytest.approx((found.high or 0) + shift, abs=1e-10)
    assert scaled.p == pytest.approx(found.p, rel=1e-6, abs=1e-12)
    assert scaled.sd == pytest.approx((found.sd or 0) * factor, rel=1e-9)
    assert scaled.low == pytest.approx((found.low or 0) * factor, rel=1e-9, abs=1e-9 * factor)


def test_an_arm_that_equals_the_baseline_is_not_distinguishable() -> None:
    assert paired([0.0] * 5) == Paired(5, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert decision_of(0.0, 0.0, higher_is_better=True) is None


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("value", [0.1, -0.1, 1e-3, 5e-324])
def test_a_constant_difference_is_certain(n: int, value: float) -> None:
    assert paired([value] * n) == Paired(n, value, 0.0, value, value, 0.0)


def test_a_difference_constant_up_to_rounding_is_all_but_certain() -> None:
    differences = [0.751 - 0.75, 0.0011 - 0.0001, 8.001 - 8]
    assert len(set(differences)) == 3
    found = paired(differences)
    assert found.p is not None
    assert found.p < 1e-20
    assert (found.low, found.high) == (pytest.approx(0.001, abs=1e-11), pytest.approx(0.001, abs=1e-11))
    assert paired([1e-3, 1e-3 + 1e-17]).p == pytest.approx(0, abs=1e-12)


def test_one_seed_has_no_interval() -> None:
    assert paired([0.02]) == Paired(1, 0.02, None, None, None, None)


def test_no_seed_has_no_mean() -> None:
    found = paired([])
    assert math.isnan(found.mean)
    assert (found.n, found.sd, found.low, found.high, found.p) == (0, None, None, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [[], [0.1, 0.2]])
def test_a_failed_run_is_no_difference(bad: float, others: list[float]) -> None:
    with pytest.raises(ValueError, match="allowed: finite numbers"):
        paired([*others, bad])


# whole sweeps


def verdicts(metric: Array) -> list[str | None]:
    """Of intervals that Bonferroni's correction widens. metric: [arms + 1, seeds], the baseline first."""
    found = [paired(arm - metric[0], 1 - 0.05 / (len(metric) - 1)) for arm in metric[1:]]
    return [decision_of(arm.low or 0, arm.high or 0, higher_is_better=True) for arm in found]


@pytest.mark.parametrize("seeds", [2, 5])
def test_sweeps_without_an_effect_rarely_claim_one(seeds: int) -> None:
    """Four arms that share the baseline's noise and a seed's luck: any claim in at most 5% of sweeps, so in 25 of 500.

    Of 500 draws at 5% the standard deviation is 4.9; without the adjustment, 60 and more would claim something.
    """
    random = np.random.default_rng(seeds)
    luck = random.normal(0.75, 0.02, (500, 1, seeds))
    sweeps = luck + random.normal(0, 0.004, (500, 5, seeds))
    found = [verdicts(sweep) for sweep in sweeps]
    false = sum(set(words) != {None} for words in found)
    claims = Counter(word for words in found for word in words if word)
    assert 8 <= false <= 37  # nor is the test so timid that it never speaks
    assert set(claims) == {"better", "worse"}
    assert 0.25 < claims["better"] / claims.total() < 0.75
