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

from pipeline.loading import artifact_uris
from pipeline.selection import run_ids, some
from pipeline.stats import bootstrap_auc, bootstrap_ratio, percentile_interval
from pipeline.tracking.reading import artifact

TEST_ROWS_FILE = "evaluation/test_rows.parquet"


def row_intervals(
    groups: Mapping[str, pd.DataFrame],
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    metric: str,
    notes: list[str],
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Arm -> seed -> difference to the baseline and its 95% interval over test rows, where both kept their rows."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    if not metric.startswith("test/"):
        return found
    ids = {arm: run_ids(group) for arm, group in groups.items()}
    uris = {run: uri for group in groups.values() for run, uri in artifact_uris(group).items()}
    unlike: list[str] = []
    for seed in ids[baseline]:
        with tempfile.TemporaryDirectory(prefix="focal-pipeline-") as folder:
            here = {arm: of[seed] for arm, of in ids.items() if seed in of}
            rows = {arm: _test_rows(run, uris[run], metric, Path(folder)) for arm, run in here.items()}
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
    return found


@dataclass(frozen=True)
class _Rows:
    """What a run's metric is made of, a test row each: label and score, or numerator and denominator."""

    first: npt.NDArray[np.float64]
    second: npt.NDArray[np.float64]
    labelled: bool  # label and score: an AUC

    def fits(self, other: "_Rows") -> bool:
        """They are of the same test rows, as far as labels tell."""
        same = self.labelled == other.labelled and self.first.shape == other.first.shape
        return same and (not self.labelled or np.array_equal(self.first, other.first))


def _test_rows(run_id: str, uri: str, metric: str, folder: Path) -> _Rows | None:
    file = artifact(run_id, uri, TEST_ROWS_FILE, folder)
    if file is None:
        return None
    name = metric.removeprefix("test/")
    columns = set(pq.read_schema(file).names)
    for first, second in (("label", "score"), ("numerator", "denominator")):
        pair = [f"{first}/{name}", f"{second}/{name}"]
        if columns.issuperset(pair):
            table = pq.read_table(file, columns=pair)
            arrays = [table[column].to_numpy().astype(np.float64) for column in pair]
            known = ~np.isnan(arrays[0])  # a row without a label is not what the metric is about
            rows = _Rows(arrays[0][known], arrays[1][known], labelled=first == "label")
            return None if np.isnan(rows.second).any() else rows
    return None


def _resampled(rows: Sequence[_Rows], seed: int) -> npt.NDArray[np.float64]:
    """The metric on resampled test rows: [resamples, runs], the same rows for every run."""
    second = np.stack([its.second for its in rows])
    if rows[0].labelled:
        return bootstrap_auc(rows[0].first, second, seed=seed)
    return bootstrap_ratio(np.stack([its.first for its in rows]), second, seed=seed)
