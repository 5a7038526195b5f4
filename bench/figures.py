"""What every bench shares: how a figure is printed and how two ways are measured against each other."""

import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

PAIRS = 21


class Timed(NamedTuple):
    seconds: Callable[[], float]  # does the work, returns the CPU seconds it took
    rows: int  # of that work


def figure(
    name: str, value: float, unit: str, reference: float | None = None, ratios: list[float] | None = None
) -> None:
    quartiles = statistics.quantiles(ratios, n=4) if ratios and len(ratios) > 2 else None
    found: dict[str, Any] = {"name": name, "value": value, "unit": unit, "reference": reference}
    found["ratio"] = statistics.median(ratios) if ratios else None
    found["spread"] = [quartiles[0], quartiles[2]] if quartiles else None
    print(json.dumps(found), flush=True)


def measured(name: str, own: Timed, reference: Timed, pairs: int = PAIRS) -> None:
    """Rows per CPU second of two ways, turn about."""
    own.seconds(), reference.seconds()
    found = [(own.rows / own.seconds(), reference.rows / reference.seconds()) for _ in range(pairs)]
    values, references = zip(*found, strict=True)
    ratios = [value / limit for value, limit in found]
    figure(name, statistics.median(values), "rows per CPU second", statistics.median(references), ratios)
