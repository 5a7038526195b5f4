"""Evaluation metrics of binary events, as pure functions of NumPy arrays.

N = rows, G = distinct scores.
"""

from typing import NamedTuple

import numpy as np

from pipeline.maths.arrays import Flags, Floats, Ints

BINS = 10


def binary_metrics(label: Floats, log_p: Floats, log_1mp: Floats) -> dict[str, float]:
    """auc, pr_auc, logloss (nats), ece and calibration of one event.

    `ece` is the mean |predicted - observed| over the bins of `calibration_bins`, weighted by their numbers of rows.
    `calibration` is the number of predicted events divided by that of observed events. Undefined metrics are left out.
    label (0 or 1), log_p, log_1mp: [N].

    Raises:
        ValueError: both classes are present and log_p is NaN or infinite somewhere.
    """
    if not len(label):
        return {}
    event = label > 0
    events = int(np.count_nonzero(event))
    groups = _grouped(event, log_p)  # log p distinguishes probabilities that round to 0
    probability = np.exp(groups.score)
    predicted, observed, rows = _bins(_merged(groups, probability), BINS)
    metrics = {
        "logloss": float(-np.mean(np.where(event, log_p, log_1mp))),
        "ece": float(np.sum(rows * np.abs(predicted - observed)) / np.sum(rows)),
    }
    if events:
        metrics["calibration"] = float(np.repeat(probability, groups.rows).sum() / events)
    if 0 < events < len(label):
        _check_finite(groups)
        metrics["auc"] = _area_under_roc(groups)
        metrics["pr_auc"] = _average_precision(groups)
    return metrics


def auc(label: Floats, score: Floats) -> float:
    """Area under the ROC curve: share of pairs in which the row of class 1 has the higher score; ties count half.

    This is the Mann-Whitney U divided by the number of pairs (Hanley and McNeil 1982). It is computed in integers, so
    that only the final division rounds. label (0 or 1), score: [N].

    Raises:
        ValueError: a class is missing, or a score is NaN or infinite.
    """
    event = label > 0
    if event.all() or not event.any():
        raise ValueError(f"auc: found {np.count_nonzero(event)} rows of {len(event)} of class 1, allowed: both classes")
    groups = _grouped(event, score)
    _check_finite(groups)
    return _area_under_roc(groups)


def calibration_bins(label: Floats, probability: Floats, bins: int = BINS) -> tuple[Floats, Floats, Floats]:
    """Mean prediction, mean observation and number of rows of each quantile bin of the predicted probability.

    With bins of equal width (Guo et al. 2017, equation 3), nearly all rows of a rare event would be in one bin. The
    labels of rows with equal predictions are replaced with their mean, so that the order of rows does not matter.
    """
    return _bins(_grouped(label > 0, probability), bins)


class _Groups(NamedTuple):
    """Rows with the same score, by ascending score. [G]"""

    score: Floats
    rows: Ints
    events: Ints


def _grouped(event: Flags, score: Floats) -> _Groups:
    distinct, group, rows = np.unique(score, return_inverse=True, return_counts=True)
    return _Groups(distinct, rows, np.bincount(group[event], minlength=len(distinct)))


def _merged(groups: _Groups, score: Floats) -> _Groups:
    """The groups by another score of each, [G], which several may share."""
    distinct, group = np.unique(score, return_inverse=True)
    rows, events = (np.bincount(group, weights=counts).astype(np.int64) for counts in (groups.rows, groups.events))
    return _Groups(distinct, rows, events)


def _check_finite(groups: _Groups) -> None:
    if not np.isfinite(groups.score).all():
        raise ValueError("scores: found NaN or infinity, allowed: finite numbers")


def _area_under_roc(groups: _Groups) -> float:
    events, others = groups.events, groups.rows - groups.events
    twice = int(np.sum(events * (2 * np.cumsum(others) - others)))  # twice U; fits into 64 bits up to 4e9 rows
    return twice / (2 * int(events.sum()) * int(others.sum()))


def _average_precision(groups: _Groups) -> float:
    """Sum over thresholds of precision times the increase in recall."""
    true_positives, predicted_positives = (  # with this score or a higher one
        counts.sum() - np.append(0, np.cumsum(counts)[:-1]) for counts in (groups.events, groups.rows)
    )
    return float(np.sum(groups.events * (true_positives / predicted_positives)) / true_positives[0])


def _bins(groups: _Groups, bins: int) -> tuple[Floats, Floats, Floats]:
    shared = np.repeat(groups.events / groups.rows, groups.rows)  # mean label of rows with equal scores
    predicted = [part for part in np.array_split(np.repeat(groups.score, groups.rows), bins) if len(part)]
    observed = np.array_split(shared, bins)[: len(predicted)]  # with fewer rows than bins the last bins are empty
    return _means(predicted), _means(observed), np.array([len(part) for part in predicted], dtype=np.float64)


def _means(parts: list[Floats]) -> Floats:
    return np.array([part.mean() for part in parts])
