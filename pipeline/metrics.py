"""Evaluation metrics of binary events, as pure functions of NumPy arrays."""

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

Array = npt.NDArray[np.float64]


def binary_metrics(label: Array, log_p: Array, log_1mp: Array) -> dict[str, float]:
    """auc, pr_auc, logloss (nats), ece and calibration of one event.

    `calibration` is predicted over observed events. Metrics that need both classes are left out where there is one.
    label, log_p, log_1mp: [N].
    """
    if not len(label):
        return {}
    probability = np.exp(log_p)
    found = {
        "logloss": float(-np.mean(np.where(label > 0, log_p, log_1mp))),
        "ece": expected_calibration_error(label, probability),
    }
    if label.any():
        found["calibration"] = float(probability.sum() / label.sum())
    if label.any() and not label.all():
        found["auc"] = float(roc_auc_score(label, log_p))  # ranks by log p: tiny probabilities stay apart
        found["pr_auc"] = float(average_precision_score(label, log_p))
    return found


def expected_calibration_error(label: Array, probability: Array, bins: int = 10) -> float:
    """Mean |predicted - observed| over bins of equally many rows, by predicted probability, weighted by their rows.

    Equal-width bins (Guo et al. 2017, equation 3) would put a rare event into one bin; quantile bins do not.
    """
    predicted, observed, rows = calibration_bins(label, probability, bins)
    return float(np.sum(rows * np.abs(predicted - observed)) / np.sum(rows))


def calibration_bins(label: Array, probability: Array, bins: int = 10) -> tuple[Array, Array, Array]:
    """(mean predicted, mean observed, rows) of each bin of equally many rows, by predicted probability.

    Rows with the same prediction share what they have: each counts with the group's mean label, so that the
    result does not depend on the order in which they came.
    """
    values, group, size = np.unique(probability, return_inverse=True, return_counts=True)
    mean_label = np.bincount(group, weights=label) / size
    order_value, order_label = np.repeat(values, size), np.repeat(mean_label, size)
    parts = [part for part in np.array_split(np.arange(len(label)), bins) if len(part)]
    predicted = np.array([order_value[part].mean() for part in parts])
    observed = np.array([order_label[part].mean() for part in parts])
    return predicted, observed, np.array([len(part) for part in parts], dtype=np.float64)
