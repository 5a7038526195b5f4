"""Numbers with the digits that their uncertainty allows."""

import math

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
USUAL_DECIMALS, MOST_DECIMALS = 4, 12  # the usual ones where the uncertainty is unknown


def decimals(uncertainty: float | None, size: float | None = None) -> int:
    """Decimals up to the second significant digit of the uncertainty.

    Without uncertainty: four significant digits of `size`, at least four decimals.
    """
    if uncertainty and math.isfinite(uncertainty):
        return min(MOST_DECIMALS, max(0, 1 - _exponent(uncertainty, 2)))
    if size and math.isfinite(size):
        return min(MOST_DECIMALS, max(USUAL_DECIMALS, 3 - _exponent(size, 4)))
    return USUAL_DECIMALS


def _exponent(value: float, digits: int) -> int:
    """Power of ten of the first of the significant digits, after rounding: -1 for 0.0996 in two digits, 0.10."""
    return int(f"{value:.{digits - 1}e}".split("e")[1])


def number(value: float | None, places: int) -> str:
    if value is None or math.isnan(value):
        return NOTHING
    written = f"{value:.{places}f}"
    return written.lstrip("-") if not float(written) else written.replace("-", MINUS)


def signed(value: float | None, places: int) -> str:
    """A difference with its sign, even if it rounds to 0. Exactly 0 has neither sign nor decimals."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{'+' if value > 0 else MINUS}{abs(value):.{places}f}" if value else "0"


def spread(mean: float | None, sd: float | None) -> str:
    """Mean and standard deviation, both up to the latter's second digit."""
    places = decimals(sd, mean)
    return number(mean, places) + ("" if sd is None or mean is None else f" ± {number(sd, places)}")


def two_digits(value: float | None) -> str:
    """A number that is itself uncertain, with two significant digits."""
    return number(value, decimals(abs(value) if value else None))


def half_width(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None else (high - low) / 2


def interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return NOTHING
    places = decimals(half_width(low, high), low)
    return f"{signed(low, places)} to {signed(high, places)}"


def difference(mean: float | None, low: float | None, high: float | None, size: float | None = None) -> str:
    """A difference with the digits of its interval. size: of the compared values, for a difference without interval."""
    return signed(mean, decimals(half_width(low, high), size or mean))


def estimate(mean: float, low: float | None, high: float | None, size: float | None = None) -> str:
    """A difference with its interval in parentheses, if it has one."""
    return difference(mean, low, high, size) + ("" if low is None else f" ({interval(low, high)})")


def probability(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def short(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:.4g}".replace("-", MINUS)
