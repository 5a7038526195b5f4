"""Error rates, power and cost of sweeps that add seeds, over 10,000 simulated sweeps a case."""

import math

import pytest
from conftest import only_full

from bench import sequential_seeds
from bench.sequential_seeds import ARMS, BETTER, EFFECTS, LAST, MOST, cost, designs, false_claims, false_equals

pytestmark = [pytest.mark.faults, only_full]
LIMIT = 0.05 + 3 * math.sqrt(0.05 * 0.95 / sequential_seeds.SWEEPS)  # 5.65%: the binomial error of a share of 5%


@pytest.mark.parametrize("arms", ARMS)
def test_false_claims_about_gaussian_differences_stay_below_5_percent(arms: int) -> None:
    *sound, repeated = designs(arms)
    assert all(false_claims(design, arms) <= LIMIT for design in sound)
    assert false_claims(repeated, arms) > 0.2  # looks must be paid for
    for margin in (0.5, 0.7, 1.0):
        assert 0 < false_equals(arms, margin) <= LIMIT


def test_four_arms_are_decided_for_two_fifths_of_the_steps() -> None:
    """With 80% power for the effect that is the minimum detectable difference of 20 seeds and four arms."""
    found = cost(EFFECTS)
    assert found.prefixes == pytest.approx((2000 + 5 * 1125) / (5 * 3125))
    assert found.steps <= 0.40
    assert found.steps < found.prefixes < found.stopping < 1
    assert found.answers.share(BETTER, EFFECTS.index(1)) == pytest.approx(0.8, abs=0.01)
    assert found.answers.seeds.max() == MOST < LAST
