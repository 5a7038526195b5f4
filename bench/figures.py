"""Print figures, and measure two alternatives against each other."""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
RATE = "rows per CPU second"


class Timed(NamedTuple):
    seconds: Callable[[], float]  # does the work and returns its CPU seconds
    rows: int  # number of rows processed


def figure(name: str, value: float, unit: str, reference: float | None = None, spread_of: Sequence[float] = ()) -> None:
    """Print a figure. spread_of: the ratios of all pairs, or the values if there is no reference."""
    line: dict[str, Any] = {"name": name, "value": _rounded(value), "unit": unit, "reference": None, "ratio": None}
    if reference is not None:
        line["reference"] = _rounded(reference)
        line["ratio"] = _rounded(statistics.median(spread_of) if spread_of else value / reference)
    line["spread"] = [_rounded(end) for end in interval(spread_of)] if len(spread_of) > 1 else None
    print(json.dumps(line), file=_standard_output, flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the median by order statistics; with fewer than 6 values, the lowest and the highest."""
    ordered, count = sorted(values), len(values)
    cut = 0  # values dropped at each end: the probability of missing the median stays below 2.5% on each side
    while sum(math.comb(count, k) for k in range(cut + 2)) / 2**count < 0.025:
        cut += 1
    return ordered[min(cut, (count - 1) // 2)], ordered[max(count - 1 - cut, count // 2)]


def measured(name: str, own: Timed, reference: Timed, pairs: int, unit: str = RATE) -> None:
    """Measure rows per CPU second of two alternatives in turn. The first measurement of each is discarded."""
    own.seconds(), reference.seconds()
    values, references = [], []
    for pair in range(pairs):
        for way, rates in [(own, values), (reference, references)][:: 1 if pair % 2 else -1]:
            rates.append(way.rows / way.seconds())
    ratios = [value / other for value, other in zip(values, references, strict=True)]
    figure(name, statistics.median(values), unit, statistics.median(references), ratios)


def clock(device: str) -> float:
    """Seconds: of this process's CPU time, or for CUDA of wall time once the GPU has done all its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def report(name: str, values: Sequence[float], unit: str) -> None:
    """Print the median of values without a reference."""
    figure(name, statistics.median(values), unit, spread_of=values)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Redirect output to the null device. It is still formatted and written, as in a run that prints to a file."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else float(round(value))


_standard_output = sys.stdout
