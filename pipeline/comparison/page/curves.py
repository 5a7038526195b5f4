"""Histories of runs as curves worth drawing: averaged, thinned, one curve an arm with its spread over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]

MOST_POINTS = 300  # of a curve; a panel is some 300 pixels wide
SMOOTH_ABOVE = 100  # curves of fewer points, such as those of evaluations, are drawn as they are
SMOOTHED_SHARE = 25  # the window is one in so many of a run's points


@dataclass(frozen=True)
class Curve:
    """One metric of one arm: arrays [P] of equal length, P <= MOST_POINTS."""

    steps: Steps
    mean: Floats  # over the seeds that have the step
    low: Floats  # of these seeds
    high: Floats
    seeds: int


def smooth(values: Floats, width: int) -> Floats:
    """Averages over the last `width` values [N], over fewer at the start.

    Only what came before counts: arms that are equal up to a step are drawn equal up to that step.
    """
    until = np.arange(1, len(values) + 1)
    since = np.maximum(0, until - width)
    total = np.concatenate([[0.0], np.cumsum(values)])
    averages: Floats = (total[until] - total[since]) / (until - since)
    return averages


def window(points: int) -> int:
    """How many points of a run's curve are averaged into one."""
    return max(1, points // SMOOTHED_SHARE) if points > SMOOTH_ABOVE else 1


def thin(count: int, most: int = MOST_POINTS) -> Steps:
    """Indices of at most `most` of `count` points, evenly spaced, the first and the last among them."""
    return np.unique(np.rint(np.linspace(0, count - 1, min(count, most))).astype(np.int64))


def combine(seeds: Sequence[tuple[Steps, Floats]]) -> Curve:
    """The runs of an arm as one curve. Each run: its steps [N], rising, and values [N], finite; N >= 1.

    Where runs were logged at different steps they are read between their points, never beyond them.
    """
    every = np.unique(np.concatenate([steps for steps, _ in seeds]))
    grid = every[thin(len(every))]
    values = np.full((len(seeds), len(grid)), np.nan)
    for row, (steps, raw) in zip(values, seeds, strict=True):
        row[:] = np.interp(grid, steps, smooth(raw, window(len(raw))), left=np.nan, right=np.nan)
    some = ~np.isnan(values).all(0)  # between the end of one run and the start of another there may be none
    grid, values = grid[some], values[:, some]
    return Curve(grid, np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0), len(seeds))


def curves(
    history: "pd.DataFrame", metrics: Sequence[str], arms: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Curve]]:
    """metric -> arm -> curve, in the order of `metrics` and `arms`, for those that have a finite value.

    history: columns run, metric, step, value. arms: name -> run ids.
    """
    found = history[history["metric"].isin(metrics) & np.isfinite(history["value"])]
    points = {
        (str(metric), str(run)): _points(part)
        for (metric, run), part in found.groupby(["metric", "run"], observed=True)
    }
    drawn = {
        metric: {
            name: combine([points[metric, run] for run in runs if (metric, run) in points])
            for name, runs in arms.items()
            if any((metric, run) in points for run in runs)
        }
        for metric in metrics
    }
    return {metric: of_arms for metric, of_arms in drawn.items() if of_arms}


def _points(part: "pd.DataFrame") -> tuple[Steps, Floats]:
    """One run's points by step; of several at one step the last counts."""
    ordered = part.drop_duplicates("step", keep="last").sort_values("step", kind="stable")
    return ordered["step"].to_numpy(np.int64), ordered["value"].to_numpy(np.float64)


def left_out(history: "pd.DataFrame", metrics: Sequence[str]) -> int:
    """How many points of the metrics are NaN or infinite, and so not drawn."""
    return int((history["metric"].isin(metrics) & ~np.isfinite(history["value"])).sum())


def gates(history: "pd.DataFrame", arms: Mapping[str, Sequence[str]], metric: str = "aux_focal_on") -> dict[str, int]:
    """arm -> the first step at which its gate is open, for the arms whose gate opens."""
    is_open = history[(history["metric"] == metric) & (history["value"] == 1)]
    first = is_open.groupby("run", observed=True)["step"].min().to_dict()
    opened = {name: [int(first[run]) for run in runs if run in first] for name, runs in arms.items()}
    return {name: min(steps) for name, steps in opened.items() if steps}
