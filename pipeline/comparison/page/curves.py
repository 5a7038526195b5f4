"""Curves of the page: each arm's history averaged over seeds, smoothed and thinned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]

MOST_POINTS = 300  # points per curve: a panel is about 300 pixels wide
SMOOTH_ABOVE = 100  # points: curves with no more than this, such as those of evaluations, are not smoothed
SMOOTHED_SHARE = 25  # a smoothing window holds 1 / SMOOTHED_SHARE of a run's points


@dataclass(frozen=True)
class Curve:
    """One metric of one arm: arrays [P] of equal length, P <= MOST_POINTS."""

    steps: Steps
    mean: Floats  # over the seeds that have the step
    low: Floats  # lowest value of these seeds
    high: Floats
    seeds: int


def curves(
    history: pd.DataFrame, metrics: Sequence[str], arms: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Curve]]:
    """Compute curves: metric -> arm -> curve, in the order of `metrics` and `arms`, where there is a finite value.

    history: columns run, metric, step, value. arms: name -> run ids.
    """
    finite = history[history["metric"].isin(metrics) & np.isfinite(history["value"])]
    points = {
        (str(metric), str(run)): _points(part)
        for (metric, run), part in finite.groupby(["metric", "run"], observed=True)
    }
    drawn = {
        metric: {
            name: combine([points[metric, run] for run in runs if (metric, run) in points])
            for name, runs in arms.items()
            if any((metric, run) in points for run in runs)
        }
        for metric in metrics
    }
    return {metric: by_arm for metric, by_arm in drawn.items() if by_arm}


def _points(part: pd.DataFrame) -> tuple[Steps, Floats]:
    """Points of one run, sorted by step. Only the last point of a step is kept."""
    ordered = part.drop_duplicates("step", keep="last").sort_values("step", kind="stable")
    return ordered["step"].to_numpy(np.int64), ordered["value"].to_numpy(np.float64)


def combine(seeds: Sequence[tuple[Steps, Floats]]) -> Curve:
    """Combine the runs of an arm into one curve.

    seeds: each run's steps [N], increasing, and finite values [N], N >= 1. Runs that were logged at different steps
    are interpolated, never extrapolated.
    """
    every = np.unique(np.concatenate([steps for steps, _ in seeds]))
    grid = every[thin(len(every))]
    values = np.full((len(seeds), len(grid)), np.nan)
    for row, (steps, raw) in zip(values, seeds, strict=True):
        row[:] = np.interp(grid, steps, smooth(raw, window(len(raw))), left=np.nan, right=np.nan)
    covered = ~np.isnan(values).all(0)  # one run may end before another starts
    grid, values = grid[covered], values[:, covered]
    return Curve(grid, np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0), len(seeds))


def smooth(values: Floats, width: int) -> Floats:
    """Trailing averages over `width` values [N], over fewer at the start.

    Later values do not count, so that arms that are equal up to a step are drawn equal up to that step.
    """
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - width)
    total = np.concatenate([[0.0], np.cumsum(values)])
    averages: Floats = (total[end] - total[start]) / (end - start)
    return averages


def window(points: int) -> int:
    """Width of the smoothing window, in points, for a run with this number of points."""
    return max(1, points // SMOOTHED_SHARE) if points > SMOOTH_ABOVE else 1


def thin(count: int, most: int = MOST_POINTS) -> Steps:
    """Evenly spaced indices of up to `most` of `count` points, with the first and the last."""
    return np.unique(np.rint(np.linspace(0, count - 1, min(count, most))).astype(np.int64))


def left_out(history: pd.DataFrame, metrics: Sequence[str]) -> int:
    """Number of points of the metrics that are not drawn because they are NaN or infinite."""
    return int((history["metric"].isin(metrics) & ~np.isfinite(history["value"])).sum())


def gates(history: pd.DataFrame, arms: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> dict[str, int]:
    """Map each arm with a gate that opens to the first step at which one is open in any run.

    metrics: those of gates, which are 1 while the gate is open.
    """
    is_open = history[history["metric"].isin(metrics) & (history["value"] == 1)]
    first = is_open.groupby("run", observed=True)["step"].min().to_dict()
    return {name: min(int(first[run]) for run in runs if run in first)
            for name, runs in arms.items() if any(run in first for run in runs)}  # fmt: skip
