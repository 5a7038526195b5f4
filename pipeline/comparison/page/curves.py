"""Curves of the page: each arm's history averaged over seeds, smoothed and thinned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd
from scipy.stats import t

from pipeline.maths.arrays import Floats, Ints

Run = tuple[Ints, Floats]  # steps [N], increasing, and finite values [N] of a metric
Arms = Mapping[str, Mapping[int, str]]  # name -> seed -> run id
PointsByRun = Mapping[tuple[str, str], Run]  # (metric, run id) -> points

MOST_POINTS = 300  # points per curve: a panel is about 300 pixels wide
SMOOTH_ABOVE = 100  # points: curves with no more than this, such as those of evaluations, are not smoothed
SMOOTHED_SHARE = 25  # a smoothing window holds 1 / SMOOTHED_SHARE of a run's points
LEVEL = 0.05  # two-sided, of the interval of a difference at each step


@dataclass(frozen=True)
class Curve:
    """One metric of one arm, or its difference to the baseline: arrays [P] of equal length, P <= MOST_POINTS."""

    steps: Ints
    mean: Floats  # over the seeds that have the step
    low: Floats  # lowest value of these seeds; of a difference, the low end of its interval
    high: Floats
    seeds: int


def points_by_run(history: pd.DataFrame, metrics: Sequence[str]) -> PointsByRun:
    """Finite points of each metric and run. history: columns run, metric, step, value."""
    finite = history[history["metric"].isin(metrics) & np.isfinite(history["value"])]
    return {
        (str(metric), str(run)): _points(part)
        for (metric, run), part in finite.groupby(["metric", "run"], observed=True)
    }


def _points(part: pd.DataFrame) -> Run:
    """Points of one run, sorted by step. Only the last point of a step is kept."""
    ordered = part.drop_duplicates("step", keep="last").sort_values("step", kind="stable")
    return ordered["step"].to_numpy(np.int64), ordered["value"].to_numpy(np.float64)


def curves(
    points: PointsByRun, metrics: Sequence[str], arms: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[str, Curve]]:
    """Compute curves: metric -> arm -> curve, in the order of `metrics` and `arms`, where there is a finite value."""
    drawn = {
        metric: {
            name: combine([points[metric, run] for run in runs.values() if (metric, run) in points])
            for name, runs in arms.items()
            if any((metric, run) in points for run in runs.values())
        }
        for metric in metrics
    }
    return {metric: by_arm for metric, by_arm in drawn.items() if by_arm}


def differences(points: PointsByRun, metrics: Sequence[str], arms: Arms, baseline: str) -> dict[str, dict[str, Curve]]:
    """Compute curves of the differences to the baseline, as `curves` does, over the seeds that both have."""
    base = arms[baseline]
    drawn: dict[str, dict[str, Curve]] = {}
    for metric in metrics:
        for name, runs in arms.items():
            pairs = [((metric, run), (metric, base[seed])) for seed, run in runs.items() if seed in base]
            known = [(points[own], points[other]) for own, other in pairs if own in points and other in points]
            curve = combine_differences(known) if name != baseline else None
            if curve:
                drawn.setdefault(metric, {})[name] = curve
    return drawn


def combine_differences(seeds: Sequence[tuple[Run, Run]]) -> Curve | None:
    """Difference of an arm to the baseline, paired by seed and step, with Student's 95% interval over the seeds.

    seeds: for each seed, the points of the arm's run and of the baseline's. Steps that not all of these runs have are
    left out. Long curves are smoothed and thinned as `combine` does. The interval is that of each step alone.

    Returns: None without a common step. With one seed, low and high are the difference itself.
    """
    every = [steps for pair in seeds for steps, _ in pair]
    common = reduce(_intersection, every) if every else np.empty(0, np.int64)
    if not len(common):
        return None
    width, shown = window(len(common)), thin(len(common))
    apart = []
    for (steps, values), (other_steps, other_values) in seeds:
        difference = values[np.isin(steps, common)] - other_values[np.isin(other_steps, common)]
        apart.append(smooth(difference, width)[shown])
    differences = np.stack(apart)
    mean, half = differences.mean(0), np.zeros(len(shown))
    if len(seeds) > 1:
        half = t.isf(LEVEL / 2, len(seeds) - 1) * differences.std(0, ddof=1) / math.sqrt(len(seeds))
    return Curve(common[shown], mean, mean - half, mean + half, len(seeds))


def _intersection(one: Ints, other: Ints) -> Ints:
    return one if np.array_equal(one, other) else np.intersect1d(one, other, assume_unique=True)


def combine(seeds: Sequence[Run]) -> Curve:
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


def thin(count: int) -> Ints:
    """Evenly spaced indices of up to MOST_POINTS of `count` points, with the first and the last."""
    return np.unique(np.rint(np.linspace(0, count - 1, min(count, MOST_POINTS))).astype(np.int64))


def left_out(history: pd.DataFrame, metrics: Sequence[str]) -> int:
    """Number of points of the metrics that are not drawn because they are NaN or infinite."""
    return int((history["metric"].isin(metrics) & ~np.isfinite(history["value"])).sum())


def gates(history: pd.DataFrame, arms: Arms, metrics: Sequence[str]) -> dict[str, int]:
    """Map each arm with a gate that opens to the first step at which one is open in any run.

    metrics: those of gates, which are 1 while the gate is open.
    """
    is_open = history[history["metric"].isin(metrics) & (history["value"] == 1)]
    first = is_open.groupby("run", observed=True)["step"].min().to_dict()
    return {name: min(int(first[run]) for run in runs.values() if run in first)
            for name, runs in arms.items() if any(run in first for run in runs.values())}  # fmt: skip
