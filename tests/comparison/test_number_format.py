"""Numbers end at the second significant digit of their uncertainty."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison.number_format import (
    decimals,
    estimate,
    interval,
    number,
    probability,
    short,
    signed,
    spread,
    two_digits,
)


@pytest.mark.parametrize(
    ("mean", "low", "high", "shown"),
    [
        (-0.001415, -0.008348, 0.005518, "−0.0014 (−0.0083 to +0.0055)"),  # half-width 0.0069
        (-5.846e-8, -0.0069, 0.0069, "−0.0000 (−0.0069 to +0.0069)"),
        (0.00312, 0.00002, 0.00622, "+0.0031 (+0.0000 to +0.0062)"),  # the sign of an end is never lost
        (-0.3051, -0.4049, -0.2053, "−0.31 (−0.40 to −0.21)"),  # 0.0998 in two digits is 0.10
        (-0.3051, -0.4044, -0.2058, "−0.305 (−0.404 to −0.206)"),  # 0.0993 is 0.099
        (12.3, -45.6, 70.2, "+12 (−46 to +70)"),
        (123.4, -432.1, 678.9, "+123 (−432 to +679)"),
        (2.5e-7, 1.5e-7, 3.5e-7, "+0.00000025 (+0.00000015 to +0.00000035)"),
        (0.0, -0.01, 0.01, "0 (−0.010 to +0.010)"),
        (0.0, 0.0, 0.0, "0 (0 to 0)"),
        (0.5, None, None, "+0.5000"),
    ],
)
def test_estimates(mean: float, low: float | None, high: float | None, shown: str) -> None:
    assert estimate(mean, low, high) == shown


@given(st.floats(1e-9, 99.0), st.floats(-10, 10))
def test_two_digits_of_the_uncertainty_are_shown(half: float, mean: float) -> None:
    """By decimal arithmetic: the half-width that the shown ends have is off by at most one unit of the last digit."""
    text = estimate(mean, mean - half, mean + half).replace("−", "-")
    low, high = (Decimal(end) for end in text.split(" (")[1].rstrip(")").split(" to "))
    unit = Decimal(10) ** (Decimal(f"{half:.1e}").adjusted() - 1)
    assert abs((high - low) / 2 - Decimal(half)) <= unit
    assert unit * 10 <= Decimal(f"{half:.1e}") < unit * 100
    assert "e" not in text


@given(st.floats(-1e300, 1e300))
def test_numbers_read_back(value: float) -> None:
    assert float(short(value).replace("−", "-")) == pytest.approx(value, rel=5.1e-4, abs=1e-300)
    assert float(number(value, 4).replace("−", "-")) == pytest.approx(value, abs=5.1e-5)
    assert signed(value, 4)[0] == ("+" if value > 0 else "−" if value < 0 else "0")


def test_a_value_of_unknown_uncertainty_has_four_digits() -> None:
    sizes = {0.8: 4, 0.0123: 5, 0.00213: 6, 25.0: 4, None: 4, math.inf: 4, 0.0: 4}
    assert {size: decimals(None, size) for size in sizes} == sizes
    assert spread(0.00213, None) == "0.002130"


def test_mean_and_spread() -> None:
    assert spread(0.62, 0.0158) == "0.620 ± 0.016"
    assert spread(0.62, 0.0) == "0.6200 ± 0.0000"
    widths = {0.01827: "0.018", 0.000996: "0.0010", 3.14: "3.1", None: "–", 0.0: "0.0000"}
    assert {width: two_digits(width) for width in widths} == widths


def test_what_is_not_there() -> None:
    missing = {number(None, 4), number(math.nan, 4), signed(None, 4), signed(math.nan, 4), interval(None, None)}
    assert missing | {spread(None, None), probability(None)} == {"–"}


def test_zero_has_no_sign() -> None:
    assert (number(-0.00001, 4), signed(0.0, 4)) == ("0.0000", "0")


def test_probabilities() -> None:
    assert [probability(p) for p in (0.0, 0.00009, 0.0123, 1.0)] == ["< 0.0001", "< 0.0001", "0.0123", "1.0000"]
