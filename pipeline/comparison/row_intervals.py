"""How far the choice of test rows moves the difference between two trained models: a bootstrap within each seed."""

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
from pipeline.comparison.selection import run_ids, some
from pipeline.maths.metrics import auc
from pipeline.maths.statistics import bootstrap_auc, bootstrap_ratio, percentile_interval
from pipeline.names import TEST_ROWS_FILE
from pipeline.tracking.stored_runs import artifact

ROUNDING = float(np.finfo(np.float32).eps)  # twice the largest relative error of a number in float32


def row_intervals(
    groups: Mapping[str, pd.DataFrame],
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    metric: str,
    notes: list[str],
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Arm -> seed -> difference to the baseline and its 95% interval over test rows, where both kept their rows.

    A run whose rows do not make its logged metric has no interval: what they would show is another metric's.
    """
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    if not metric.startswith("test/"):
        return found
    ids = {arm: run_ids(group) for arm, group in groups.items()}
    uris = {run: uri for group in groups.values() for run, uri in artifact_uris(group).items()}
    unlike, others = list[str](), list[str]()
    for seed in ids[baseline]:
        with tempfile.TemporaryDirectory(prefix="focal-pipeline-") as folder:
            here = {arm: of[seed] for arm, of in ids.items() if seed in of}
            files = {arm: artifact(run, uris[run], TEST_ROWS_FILE, Path(folder)) for arm, run in here.items()}
            rows = {arm: read_rows(file, metric) if file else None for arm, file in files.items()}
        for arm, its in rows.items():
            if its and not its.make(values[arm][seed]):
                rows[arm] = None
                made, logged = f"{its.kind} {its.metric():.9g}", f"logged {values[arm][seed]:.9g}"
                others.append(f"{arm} s{seed} ({made}, {logged})")
        base = rows.pop(baseline)
        same = {arm: its for arm, its in rows.items() if its and base and its.fits(base)}
        unlike += [f"{arm} s{seed}" for arm, its in rows.items() if its and base and arm not in same]
        if base is None or not same:
            continue
        resampled = _resampled([base, *same.values()], seed)
        for arm, column in zip(same, resampled.T[1:], strict=True):
            low, high = percentile_interval(column - resampled[:, 0])
            if math.isfinite(low):
                found.setdefault(arm, {})[seed] = (values[arm][seed] - values[baseline][seed], low, high)
    if unlike:
        notes.append(f"no interval over test rows, because they are others than the baseline's: {some(unlike)}")
    if others:
        notes.append(f"no interval over test rows, because {metric} recomputed from them is not the logged one: "
                     f"{some(others)}")  # fmt: skip
    return found


@dataclass(frozen=True)
class MetricRows:
    """What a run's metric is made of, a test row each: label and score, or numerator and denominator."""

    first: npt.NDArray[np.float64]
    second: npt.NDArray[np.float64]
    labelled: bool  # label and score: an AUC

    @property
    def kind(self) -> str:
        """How the metric is made of the rows."""
        return "AUC" if self.labelled else "ratio of sums"

    def metric(self) -> float:
        """The metric recomputed from the rows; NaN where they make none."""
        if self.labelled:
            return _auc(self.first, self.second)
        below = self.second.sum()
        return float(self.first.sum() / below) if below else math.nan

    def make(self, logged: float) -> bool:
        """The metric of the rows is the logged one, up to rounding in float32.

        A sum of N numbers in float32, taken in pairs of blocks as NumPy and torch do, is off by at most log2(N) + 16
        roundings of the sum of their sizes (Higham 2002, section 4.2). Scores are such sums too, and may have been
        rounded after the AUC was computed: two of them that are as close as that may have stood in either order.
        """
        slack = ROUNDING * (16 + math.log2(max(1, len(self.first))))
        if self.labelled:
            shift = np.where(self.first > 0, -slack, slack) * np.abs(self.second)
            low, high = _auc(self.first, self.second + shift), _auc(self.first, self.second - shift)
            return low - slack <= logged <= high + slack
        made, below = self.metric(), self.second.sum()
        if math.isnan(made):
            return False
        sizes = np.abs(self.first).sum() + abs(made) * np.abs(self.second).sum()
        return bool(abs(made - logged) <= slack * sizes / abs(below))

    def fits(self, other: "MetricRows") -> bool:
        """They are of the same test rows, as far as labels tell."""
        same = self.labelled == other.labelled and self.first.shape == other.first.shape
        return same and (not self.labelled or np.array_equal(self.first, other.first))


def _auc(label: npt.NDArray[np.float64], score: npt.NDArray[np.float64]) -> float:
    """NaN where there is none."""
    try:
        return auc(label, score) if np.isin(label, (0, 1)).all() else math.nan
    except ValueError:  # one class, or infinite scores
        return math.nan


def read_rows(file: Path, metric: str) -> MetricRows | None:
    """What a run's file has for a metric of the test split; None = nothing, or not for every row."""
    name = metric.removeprefix("test/")
    columns = set(pq.read_schema(file).names)
    for first, second in (("label", "score"), ("numerator", "denominator")):
        pair = [f"{first}/{name}", f"{second}/{name}"]
        if columns.issuperset(pair):
            table = pq.read_table(file, columns=pair)
            arrays = [table[column].to_numpy().astype(np.float64) for column in pair]
            known = ~np.isnan(arrays[0])  # a row without a label is not what the metric is about
            rows = MetricRows(arrays[0][known], arrays[1][known], labelled=first == "label")
            return None if np.isnan(rows.second).any() else rows
    return None


def _resampled(rows: Sequence[MetricRows], seed: int) -> npt.NDArray[np.float64]:
    """The metric on resampled test rows: [resamples, runs], the same rows for every run."""
    second = np.stack([its.second for its in rows])
    if rows[0].labelled:
        return bootstrap_auc(rows[0].first, second, seed=seed)
    return bootstrap_ratio(np.stack([its.first for its in rows]), second, seed=seed)
