"""Bootstrap over test rows within each seed: the uncertainty of a difference between two trained models."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from pipeline.comparison.run_loading import artifact_uris
from pipeline.comparison.selection import runs_by_seed
from pipeline.maths.metrics import auc
from pipeline.maths.statistics import bootstrap_auc, bootstrap_ratio, percentile_interval
from pipeline.names import TEST_ROWS_FILE
from pipeline.runtime.text import listed
from pipeline.tracking.stored_runs import artifact

Array = npt.NDArray[np.float64]
Interval = tuple[float, float, float]  # difference, low, high
ROUNDING = float(np.finfo(np.float32).eps)  # twice the largest relative rounding error of float32


def row_intervals(
    groups: Mapping[str, pd.DataFrame],
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    metric: str,
    notes: list[str],
) -> dict[str, dict[int, Interval]]:
    """Compute differences to the baseline with 95% intervals over test rows, for pairs of runs that stored their rows.

    Returns arm -> seed -> interval. Runs whose rows do not reproduce their logged metric are left out, because the
    rows belong to another metric. `notes` names the runs that are left out.
    """
    intervals: dict[str, dict[int, Interval]] = {}
    if not metric.startswith("test/"):
        return intervals
    run_ids = {arm: runs_by_seed(group) for arm, group in groups.items()}
    uris = {run: uri for group in groups.values() for run, uri in artifact_uris(group).items()}
    other_rows, other_metric = list[str](), list[str]()
    for seed in run_ids[baseline]:
        rows: dict[str, MetricRows] = {}
        with tempfile.TemporaryDirectory(prefix="focal-pipeline-") as folder:
            for arm, runs in run_ids.items():
                file = artifact(runs[seed], uris[runs[seed]], TEST_ROWS_FILE, Path(folder)) if seed in runs else None
                own, logged = read_rows(file, metric) if file else None, values[arm].get(seed, math.nan)
                if own and own.reproduce(logged):
                    rows[arm] = own
                elif own:
                    other_metric.append(f"{arm} s{seed} ({own.kind} {own.metric():.9g}, logged {logged:.9g})")
        base = rows.pop(baseline, None)
        if base is None:
            continue
        other_rows += [f"{arm} s{seed}" for arm, own in rows.items() if not own.same_rows(base)]
        rows = {arm: own for arm, own in rows.items() if own.same_rows(base)}
        if not rows:
            continue
        resampled = _resampled([base, *rows.values()], seed)
        for arm, column in zip(rows, resampled.T[1:], strict=True):
            low, high = percentile_interval(column - resampled[:, 0])
            if math.isfinite(low):
                intervals.setdefault(arm, {})[seed] = (values[arm][seed] - values[baseline][seed], low, high)
    if other_rows:
        notes.append(f"no interval over test rows, because they differ from the baseline's: {listed(other_rows)}")
    if other_metric:
        notes.append(f"no interval over test rows, because {metric} recomputed from them is not the logged one: "
                     f"{listed(other_metric)}")  # fmt: skip
    return intervals


@dataclass(frozen=True)
class MetricRows:
    """Inputs of a metric for each test row: label and score, or numerator and denominator."""

    first: Array
    second: Array
    labelled: bool  # True: label and score, for an AUC

    @property
    def kind(self) -> str:
        return "AUC" if self.labelled else "ratio of sums"

    def metric(self) -> float:
        """The metric computed from the rows; NaN where it is undefined."""
        if self.labelled:
            return _auc(self.first, self.second)
        denominator = self.second.sum()
        return float(self.first.sum() / denominator) if denominator else math.nan

    def reproduce(self, logged: float) -> bool:
        """Whether the rows reproduce the logged metric, up to float32 rounding.

        NumPy and torch sum float32 numbers pairwise in blocks. The error of such a sum of N numbers is at most
        log2(N) + 16 roundings of the sum of absolute values (Higham 2002, section 4.2). Scores are such sums as well,
        and may have been rounded after the AUC was computed, so two scores this close may have been in either order.
        """
        slack = ROUNDING * (16 + math.log2(max(1, len(self.first))))
        if self.labelled:
            shift = np.where(self.first > 0, -slack, slack) * np.abs(self.second)
            low, high = _auc(self.first, self.second + shift), _auc(self.first, self.second - shift)
            return low - slack <= logged <= high + slack
        metric, denominator = self.metric(), self.second.sum()
        if math.isnan(metric):
            return False
        sizes = np.abs(self.first).sum() + abs(metric) * np.abs(self.second).sum()
        return bool(abs(metric - logged) <= slack * sizes / abs(denominator))

    def same_rows(self, other: "MetricRows") -> bool:
        """Whether both have the same test rows, as far as shapes and labels show."""
        alike = self.labelled == other.labelled and self.first.shape == other.first.shape
        return alike and (not self.labelled or np.array_equal(self.first, other.first))


def _auc(label: Array, score: Array) -> float:
    """AUC, or NaN if it is undefined."""
    try:
        return auc(label, score) if np.isin(label, (0, 1)).all() else math.nan
    except ValueError:  # one class, or infinite scores
        return math.nan


def read_rows(file: Path, metric: str) -> MetricRows | None:
    """Read the rows of a test metric from a run's file; None if they are missing or incomplete."""
    name = metric.removeprefix("test/")
    columns = set(pq.read_schema(file).names)
    for first, second in (("label", "score"), ("numerator", "denominator")):
        pair = [f"{first}/{name}", f"{second}/{name}"]
        if columns.issuperset(pair):
            table = pq.read_table(file, columns=pair)
            arrays = [table[column].to_numpy().astype(np.float64) for column in pair]
            known = ~np.isnan(arrays[0])  # the metric leaves out rows without a label
            rows = MetricRows(arrays[0][known], arrays[1][known], labelled=first == "label")
            return None if np.isnan(rows.second).any() else rows
    return None


def _resampled(rows: Sequence[MetricRows], seed: int) -> Array:
    """The metric on resampled test rows: [resamples, runs]. Every run has the same resamples."""
    second = np.stack([own.second for own in rows])
    if rows[0].labelled:
        return bootstrap_auc(rows[0].first, second, seed=seed)
    return bootstrap_ratio(np.stack([own.first for own in rows]), second, seed=seed)
