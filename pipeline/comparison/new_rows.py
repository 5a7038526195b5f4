"""What the runs' stored test rows say about new rows: intervals over seeds and rows."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.comparison.run_loading import READERS, artifact_uris
from pipeline.comparison.selection import first_text, runs_by_seed
from pipeline.maths.arrays import Floats
from pipeline.maths.metrics import auc
from pipeline.maths.row_covariance import NewRows, RowCovariance, auc_influence, new_rows_interval, ratio_influence
from pipeline.names import TEST_ROWS_FILE
from pipeline.runtime.console import warn
from pipeline.runtime.text import listed
from pipeline.tasks.registry import declarations
from pipeline.tracking.stored_runs import artifact

ROUNDING = float(np.finfo(np.float32).eps)  # twice the largest relative rounding error of float32


def new_rows(  # noqa: PLR0917 (each is another table of the comparison's)
    groups: Mapping[str, pd.DataFrame],
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    metric: str,
    levels: Mapping[str, float],
    notes: list[str],
) -> dict[str, NewRows]:
    """Compute each arm's difference to the baseline with an interval for new seeds and new test rows.

    groups: arm -> its runs; values: arm -> seed -> metric, for the seeds to use; levels: arm -> two-sided level of its
    interval, for the arms wanted. Each run's rows are read once, one seed's runs at a time.

    An arm has no interval if a run of it or of the baseline stored no rows, rows that do not reproduce the logged
    metric, or other rows than the first run's. `notes` says so.
    """
    arms = {arm: values[arm].keys() & values[baseline].keys() for arm in levels if arm != baseline}
    arms = {arm: seeds for arm, seeds in arms.items() if len(seeds) > 1}
    if not metric.startswith("test/") or not arms:
        return {}
    reader = _Reader(groups, values, metric)
    sums: dict[str, RowCovariance] = {}
    for seed in sorted(set().union(*arms.values())):
        wanted = [arm for arm, seeds in arms.items() if seed in seeds]
        influences = reader.influences([baseline, *wanted], seed) if wanted else {}
        for arm in wanted:
            if baseline in influences and arm in influences:
                own = sums.setdefault(arm, RowCovariance(reader.row_groups))
                own.add(influences[arm] - influences[baseline])
            else:
                del arms[arm]
    notes += reader.notes()
    intervals = {}
    for arm, seeds in arms.items():
        differences = [values[arm][seed] - values[baseline][seed] for seed in sorted(seeds)]
        interval = new_rows_interval(differences, sums[arm], levels[arm], reader.rows_name)
        if interval:
            intervals[arm] = interval
    return intervals


class _Reader:
    """Reads the runs' test rows, and collects the runs whose rows cannot be used."""

    def __init__(
        self, groups: Mapping[str, pd.DataFrame], values: Mapping[str, Mapping[int, float]], metric: str
    ) -> None:
        self.values, self.metric = values, metric
        self.run_ids = {arm: runs_by_seed(group) for arm, group in groups.items()}
        self.uris = {run: uri for group in groups.values() for run, uri in artifact_uris(group).items()}
        self.events = declarations(first_text(next(iter(groups.values())), "task")).events
        self.first: MetricRows | None = None  # all runs must have its rows
        self.missing, self.other_rows, self.other_metric = list[str](), list[str](), list[str]()

    def influences(self, arms: Sequence[str], seed: int) -> dict[str, Floats]:
        """Influence of each row on the metric of each arm's run [rows], for the runs whose rows can be used."""
        influences = {}
        with tempfile.TemporaryDirectory(prefix="focal-pipeline-") as folder, ThreadPoolExecutor(READERS) as pool:
            read = partial(self._read, seed=seed, folder=Path(folder))
            for arm, (rows, influence) in zip(arms, pool.map(read, arms), strict=True):
                logged = self.values[arm][seed]
                self.first = self.first or (rows if influence is not None else None)
                if rows is None:
                    self.missing.append(f"{arm} s{seed}")
                elif influence is None:
                    found = f"{rows.kind} {rows.metric():.9g}, logged {logged:.9g}"
                    self.other_metric.append(f"{arm} s{seed} ({found})")
                elif self.first and not rows.same_rows(self.first):
                    self.other_rows.append(f"{arm} s{seed}")
                else:
                    influences[arm] = influence
        return influences

    def _read(self, arm: str, seed: int, folder: Path) -> tuple["MetricRows | None", Floats | None]:
        """Rows of a run, and their influence on the metric if they reproduce it."""
        run = self.run_ids[arm][seed]
        file = artifact(run, self.uris[run], TEST_ROWS_FILE, folder)
        try:
            rows = read_rows(file, self.metric) if file else None
        except (OSError, pa.ArrowException) as error:
            warn(f"{file}: {error}")
            rows = None
        return rows, rows.influence() if rows and rows.reproduce(self.values[arm][seed]) else None

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Numbers of rows that were sampled apart."""
        assert self.first
        positives, rows = int(np.count_nonzero(self.first.first > 0)), len(self.first.first)
        return (positives, rows - positives) if self.first.labelled else (rows,)

    @property
    def rows_name(self) -> str:
        """What the rows of the rarer class are."""
        if not self.first or not self.first.labelled:
            return "rows"
        positives, negatives = self.row_groups
        if positives > negatives:
            return "negative rows"
        return self.events.get(self.metric.rsplit("_", 1)[-1], "positive rows")

    def notes(self) -> list[str]:
        reasons = {
            "test rows differ from the baseline's": self.other_rows,
            f"{self.metric} recomputed from the test rows is not the logged one": self.other_metric,
            "test rows are missing": self.missing if self.first else [],  # no run stores the rows of some metrics
        }
        return [f"no interval on new rows, because {why}: {listed(runs)}" for why, runs in reasons.items() if runs]


@dataclass(frozen=True)
class MetricRows:
    """Inputs of a metric for each test row: label and score, or numerator and denominator."""

    first: Floats
    second: Floats
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

    def influence(self) -> Floats:
        """Influence of each row on the metric [rows]; for an AUC the rows of class 1 come first."""
        if self.labelled:
            event = self.first > 0
            return auc_influence(self.second[event], self.second[~event])
        return ratio_influence(self.first, self.second)

    def reproduce(self, logged: float) -> bool:
        """Whether the rows reproduce the logged metric, up to float32 rounding.

        NumPy and torch sum float32 numbers pairwise in blocks. The error of such a sum of N numbers is at most
        log2(N) + 16 roundings of the sum of absolute values (Higham 2002, section 4.2). Scores are such sums as well,
        and may have been rounded after the AUC was computed, so two scores this close may have been in either order.
        """
        slack = ROUNDING * (16 + math.log2(max(1, len(self.first))))
        if abs(self.metric() - logged) <= slack and self.labelled:
            return True
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


def _auc(label: Floats, score: Floats) -> float:
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
