"""Evaluation metrics of binary events, as pure functions of NumPy arrays.

Rank metrics are computed from a single sort of the scores with their labels. N = rows, G = distinct scores.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
BINS = 10


def binary_metrics(label: Array, log_p: Array, log_1mp: Array) -> dict[str, float]:
    """auc, pr_auc, logloss (nats), ece and calibration of one event.

    `calibration` is the number of predicted events divided by that of observed events. Undefined metrics are left out.
    label (0 or 1), log_p, log_1mp: [N].

    Raises:
        ValueError: both classes are present and log_p is NaN or infinite somewhere.
    """
    if not len(label):
        return {}
    event = label > 0
    events = int(np.count_nonzero(event))
    ranked = _ranked(event, log_p)  # log p distinguishes probabilities that round to 0
    probability = np.exp(ranked.score)
    metrics = {
        "logloss": float(-np.mean(np.where(event, log_p, log_1mp))),
        "ece": _calibration_error(*_bins(_ascending(ranked.event, probability), BINS)),
    }
    if events:
        metrics["calibration"] = float(probability.sum() / events)
    if 0 < events < len(label):
        groups = _groups(_finite(ranked))
        metrics["auc"] = _area_under_roc(groups)
        metrics["pr_auc"] = _average_precision(groups)
    return metrics


def auc(label: Array, score: Array) -> float:
    """Area under the ROC curve: share of pairs in which the row of class 1 has the higher score; ties count half.

    This is the Mann-Whitney U divided by the number of pairs (Hanley and McNeil 1982). It is computed in integers, so
    that only the final division rounds. label (0 or 1), score: [N].

    Raises:
        ValueError: a class is missing, or a score is NaN or infinite.
    """
    event = label > 0
    if event.all() or not event.any():
        raise ValueError(f"auc: found {np.count_nonzero(event)} rows of {len(event)} of class 1, allowed: both classes")
    return _area_under_roc(_groups(_finite(_ranked(event, score))))


def expected_calibration_error(label: Array, probability: Array, bins: int = BINS) -> float:
    """Mean |predicted - observed| over quantile bins of the predicted probability, weighted by their numbers of rows.

    With bins of equal width (Guo et al. 2017, equation 3), nearly all rows of a rare event would be in one bin.
    """
    return _calibration_error(*calibration_bins(label, probability, bins))


def calibration_bins(label: Array, probability: Array, bins: int = BINS) -> tuple[Array, Array, Array]:
    """Mean prediction, mean observation and number of rows of each quantile bin of the predicted probability.

    The labels of rows with equal predictions are replaced with their mean, so that the order of rows does not matter.
    """
    return _bins(_ranked(label > 0, probability), bins)


class _Ranked(NamedTuple):
    """Rows by ascending score."""

    event: npt.NDArray[np.bool_]  # [N]
    score: Array  # [N]


class _Groups(NamedTuple):
    """Rows with the same score, by ascending score."""

    end: Counts  # [G], cumulative number of rows, including the group's
    events: Counts  # [G], cumulative number of events, including the group's


def _ranked(event: npt.NDArray[np.bool_], score: Array) -> _Ranked:
    """Sort the rows by ascending score.

    If all scores have the same sign, as probabilities and log probabilities do, their bits sort like the scores. The
    sign bit is then dropped and the label becomes the lowest bit, so that scores and labels are sorted together as
    integers, in a quarter of the time of `argsort`.
    """
    score = np.asarray(score, np.float64)
    bits = score.view(np.uint64)
    signs = np.count_nonzero(np.signbit(score))
    if 0 < signs < len(score):
        order = np.argsort(score)
        return _Ranked(event[order], score[order])
    key = np.sort((bits << np.uint64(1)) | event)
    if signs:
        key = key[::-1]
    sign = np.uint64(1 << 63) if signs else np.uint64(0)
    return _Ranked((key & np.uint64(1)).astype(np.bool_), ((key >> np.uint64(1)) | sign).view(np.float64))


def _ascending(event: npt.NDArray[np.bool_], score: Array) -> _Ranked:
    """Sort rows whose scores are ascending apart from rounding errors."""
    return _ranked(event, score) if (score[1:] < score[:-1]).any() else _Ranked(event, score)


def _finite(ranked: _Ranked) -> _Ranked:
    if not np.isfinite(ranked.score).all():
        raise ValueError("scores: found NaN or infinity, allowed: finite numbers")
    return ranked


def _groups(ranked: _Ranked) -> _Groups:
    score = ranked.score
    end = np.append(np.flatnonzero(score[1:] != score[:-1]) + 1, len(score))
    return _Groups(end, np.cumsum(ranked.event, dtype=np.int64)[end - 1])


def _area_under_roc(groups: _Groups) -> float:
    events = np.diff(groups.events, prepend=0)
    others_below = groups.end - groups.events
    others = np.diff(others_below, prepend=0)
    twice = int(np.sum(events * (2 * others_below - others)))  # twice U; fits into 64 bits up to 4e9 rows
    return twice / (2 * int(groups.events[-1]) * int(others_below[-1]))


def _average_precision(groups: _Groups) -> float:
    """Sum over thresholds of precision times the increase in recall."""
    all_events, rows = groups.events[-1], groups.end[-1]
    true_positives = all_events - np.append(0, groups.events[:-1])  # with this score or a higher one
    predicted_positives = rows - np.append(0, groups.end[:-1])
    return float(np.sum(np.diff(groups.events, prepend=0) * (true_positives / predicted_positives)) / all_events)


def _bins(ranked: _Ranked, bins: int) -> tuple[Array, Array, Array]:
    end, events = _groups(ranked)
    size = np.diff(end, prepend=0)
    shared = np.repeat(np.diff(events, prepend=0) / size, size)  # mean label of rows with equal scores
    predicted = [part for part in np.array_split(ranked.score, bins) if len(part)]
    observed = np.array_split(shared, bins)[: len(predicted)]  # with fewer rows than bins the last bins are empty
    return _means(predicted), _means(observed), np.array([len(part) for part in predicted], dtype=np.float64)


def _means(parts: list[Array]) -> Array:
    return np.array([part.mean() for part in parts])


def _calibration_error(predicted: Array, observed: Array, rows: Array) -> float:
    return float(np.sum(rows * np.abs(predicted - observed)) / np.sum(rows))
