"""Features that determine a label, which are usually known only after it: a status, an invoice, a time on the page.

Each feature alone is a small model: it is fitted on rows of the training split and ranks rows of the validation split.
Judged on the rows that it was fitted on, every unique id would be perfect.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.schema import DataSchema, Feature
from pipeline.maths.arrays import Flags, Floats
from pipeline.maths.metrics import auc

SUSPICIOUS = 0.995  # AUC
MOST_ROWS = 500_000  # of a split that are read
LEAST_ROWS = 10  # of each class in the validation split; chance ranks fewer rows perfectly

RowIds = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # ids of all rows, and the number of ids in each row


def determining_features(folder: Path, schema: DataSchema) -> Iterator[str]:
    """Yield a warning for each feature of a folder that `prepare_ctr` wrote that alone ranks a label too well.

    The click is ranked among all rows, the conversion among clicked rows.
    """
    train, valid = (_Rows(folder / schema.splits[split].file) for split in ("train", "validation"))
    labels = {"click": (train.label("click"), valid.label("click"))}
    if not schema.click_only:
        labels["conversion"] = (train.label("conversion"), valid.label("conversion"))
    clicks = labels["click"]
    among = {"click": tuple(np.ones_like(click) for click in clicks), "conversion": clicks}
    for feature in schema.features:
        columns = train.column(feature.name), valid.column(feature.name)
        for name, (fitted, ranked) in labels.items():
            of_train, of_valid = among[name]
            events = ranked[of_valid]
            if min(events.sum(), len(events) - events.sum()) < LEAST_ROWS or not of_train.any():
                continue
            fit, judge = (column.filter(pa.array(rows)) for column, rows in zip(columns, among[name], strict=True))
            area = max(auc(events, score) for score in _scores(feature, fit, judge, fitted[of_train]))
            if area > SUSPICIOUS:
                yield (
                    f"feature {feature.name} alone ranks the {name}s of validation with an AUC of {area:.4f}: is it "
                    f"known before the {name}? A feature derived from the label makes the model useless"
                )


class _Rows:
    """At most MOST_ROWS rows of a split, in row groups that are spread over the file."""

    def __init__(self, file: Path) -> None:
        self.file = pq.ParquetFile(file)
        groups = self.file.num_row_groups
        taken = max(1, groups * MOST_ROWS // max(1, self.file.metadata.num_rows))
        self.groups = sorted({number * groups // taken for number in range(taken)}) if taken < groups else range(groups)

    def column(self, name: str) -> pa.Array:
        return self.file.read_row_groups(list(self.groups), columns=[name])[name].combine_chunks()

    def label(self, name: str) -> Flags:
        labels: Flags = np.asarray(self.column(name)) != 0
        return labels


def _scores(feature: Feature, train: pa.Array, valid: pa.Array, label: Flags) -> list[Floats]:
    """Scores of the validation rows, higher for more events. label: [training rows]."""
    if feature.kind != "numeric":
        return [_log_odds(_bags(train), _bags(valid), label, feature.size)]
    numbers, others = (np.asarray(column, np.float64) for column in (train, valid))
    direction = np.sign(numbers[label].mean() - numbers[~label].mean()) if 0 < label.sum() < len(label) else 0.0
    size = len(feature.edges) + 2
    return [direction * others, _log_odds(_bins(numbers, feature), _bins(others, feature), label, size)]


def _bags(column: pa.Array) -> RowIds:
    if pa.types.is_list(column.type):
        return np.asarray(column.flatten()), np.diff(np.asarray(column.offsets))
    return np.asarray(column), np.ones(len(column), np.int64)


def _bins(values: Floats, feature: Feature) -> RowIds:
    """Bins of numbers as ids; the value that replaces missing ones has a bin of its own."""
    bins = np.searchsorted(np.array(feature.edges), values, "right")
    if feature.fill is not None:
        bins[values == np.float64(np.float32(feature.fill))] = len(feature.edges) + 1
    return bins, np.ones(len(values), np.int64)


def _log_odds(train: RowIds, valid: RowIds, label: Flags, size: int) -> Floats:
    """Sum over a row's ids of their log odds of the event, relative to those of all rows (naive Bayes).

    An id that training rows do not have adds nothing. Every id has one more row with the mean rate.
    """
    (ids, lengths), (others, sizes) = train, valid
    rate = np.clip(label.mean(), 1e-9, 1 - 1e-9)
    counts = np.bincount(ids, minlength=size)
    events = np.bincount(ids, weights=np.repeat(label, lengths), minlength=size)
    rates = (events + rate) / (counts + 1)
    odds = np.log(rates / (1 - rates)) - np.log(rate / (1 - rate))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(owners, weights=odds[others], minlength=len(sizes)).astype(np.float64)
