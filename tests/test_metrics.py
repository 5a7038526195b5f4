"""Evaluation metrics against counting by hand, independent formulas and sklearn."""

import math
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from pipeline.metrics import binary_metrics, calibration_bins, expected_calibration_error

Array = npt.NDArray[np.float64]


def metrics_of(label: Array | list[float], probability: Array | list[float]) -> dict[str, float]:
    p = np.asarray(probability, dtype=np.float64)
    return binary_metrics(np.asarray(label, dtype=np.float64), np.log(p), np.log1p(-p))


def auc_by_pairs(label: Array, score: Array) -> float:
    """Share of (positive, negative) pairs in the right order; ties count half."""
    pairs = list(product(score[label > 0], score[label == 0]))
    return sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs) / len(pairs)


def average_precision_by_thresholds(label: Array, score: Array) -> float:
    """Sum over thresholds, from the highest, of precision times the recall gained."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        chosen = score >= threshold
        gained = label[chosen].sum() / label.sum()
        total += (gained - recall) * label[chosen].mean()
        recall = gained
    return total


@pytest.mark.parametrize("seed", range(5))
def test_against_sklearn(seed: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    probability = random.beta(1, 20, 3000)
    if seed % 2:
        probability = np.round(probability, 2).clip(0.001, 0.999)  # ties
    label = (random.random(3000) < probability).astype(float)
    found = metrics_of(label, probability)
    assert set(found) == {"auc", "pr_auc", "logloss", "ece", "calibration"}
    assert found["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-12)
    assert found["pr_auc"] == pytest.approx(average_precision_score(label, probability), abs=1e-12)
    assert found["logloss"] == pytest.approx(log_loss(label, probability), rel=1e-10)
    assert found["calibration"] == pytest.approx(probability.mean() / label.mean(), rel=1e-12)


tied_rows = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.75, 0.9])), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=150)
@given(tied_rows)
def test_against_counting(rows: list[tuple[float, float]]) -> None:
    label, probability = np.array(rows).T
    found = metrics_of(label, probability)
    both = 0 < label.sum() < len(label)
    assert ("auc" in found) == ("pr_auc" in found) == both
    assert ("calibration" in found) == bool(label.sum())
    if both:
        assert found["auc"] == pytest.approx(auc_by_pairs(label, probability), abs=1e-12)
        assert found["pr_auc"] == pytest.approx(average_precision_by_thresholds(label, probability), abs=1e-12)
    expected = [-math.log(p if one else 1 - p) for one, p in rows]
    assert found["logloss"] == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_by_hand() -> None:
    """Pairs of (0.8, 0.4) over (0.6, 0.2): 3 of 4 in order. Thresholds: precision 1 at recall 1/2, 2/3 at recall 1.
    Predicted 2 events, 2 observed. One row a bin: errors 0.2, 0.6, 0.6, 0.2."""
    found = metrics_of([1, 1, 0, 0], [0.8, 0.4, 0.6, 0.2])
    assert found["auc"] == pytest.approx(0.75)
    assert found["pr_auc"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["logloss"] == pytest.approx(-(2 * math.log(0.8) + 2 * math.log(0.4)) / 4)
    assert found["calibration"] == pytest.approx(1.0)
    assert found["ece"] == pytest.approx((0.2 + 0.6 + 0.6 + 0.2) / 4)


def test_calibration_is_predicted_over_observed() -> None:
    assert metrics_of([1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5])["calibration"] == pytest.approx(2.0)


def test_empty_and_one_class() -> None:
    assert metrics_of([], []) == {}
    assert metrics_of([0, 0], [0.25, 0.5]) == pytest.approx(
        {"logloss": -(math.log(0.75) + math.log(0.5)) / 2, "ece": 0.375}
    )
    assert metrics_of([1, 1], [0.25, 0.5]) == pytest.approx(
        {"logloss": -(math.log(0.25) + math.log(0.5)) / 2, "ece": (0.75 + 0.5) / 2, "calibration": 0.375}
    )
    assert set(metrics_of([1], [0.5])) == {"logloss", "ece", "calibration"}


@pytest.mark.parametrize(
    ("lower", "higher"),
    [(math.log(1e-50), math.log(1e-40)), (-900.0, -800.0)],
    ids=["zero in single precision", "zero in double precision"],
)
def test_tiny_probabilities_keep_their_rank(lower: float, higher: float) -> None:
    log_p = np.array([lower, higher, lower, higher])
    label = np.array([0.0, 1.0, 0.0, 1.0])
    found = binary_metrics(label, log_p, np.zeros(4))
    assert found["auc"] == 1.0
    assert found["pr_auc"] == 1.0
    assert found["logloss"] == pytest.approx(-higher / 2)
    assert found["ece"] == pytest.approx(0.5)
    assert binary_metrics(1 - label, log_p, np.zeros(4))["auc"] == 0.0


def test_log_loss_near_certainty_is_not_clipped() -> None:
    """log(1 - p) is taken as it comes: a wrong certainty costs what its logit says."""
    found = binary_metrics(np.array([0.0, 1.0]), np.array([-1e-40, -1e-40]), np.array([-92.0, -92.0]))
    assert found["logloss"] == pytest.approx(46.0)


def test_ece_with_ties_by_hand() -> None:
    """Two rows a bin. 0.1: half are events. 0.2: three rows with one event, two in the second bin; the third shares
    its bin with 0.3, an event. Whichever of the three came first, each counts for a third of an event."""
    probability = [0.1, 0.1, 0.2, 0.2, 0.2, 0.3]
    expected = (abs(0.1 - 1 / 2) + abs(0.2 - 1 / 3) + abs(0.25 - (1 / 3 + 1) / 2)) / 3
    for event in (2, 3, 4):
        label = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
        label[event] = 1
        assert expected_calibration_error(label, np.array(probability), bins=3) == pytest.approx(expected)


def test_ece_of_one_prediction_is_its_distance_from_the_rate() -> None:
    """All tied: every bin has the mean label, so no bin can be off by its luck."""
    label = np.array([1.0, 1.0, 0.0, 0.0])
    assert expected_calibration_error(label, np.full(4, 0.5), bins=2) == pytest.approx(0.0)
    assert expected_calibration_error(label, np.full(4, 0.2), bins=2) == pytest.approx(0.3)


def test_ece_weighs_bins_by_their_rows() -> None:
    """Three rows in two bins, two and one: off by 0.1 and by 0.6."""
    label, probability = np.array([0.0, 0.0, 1.0]), np.array([0.05, 0.15, 0.4])
    assert expected_calibration_error(label, probability, bins=2) == pytest.approx((2 * 0.1 + 0.6) / 3)


def test_a_rare_event_is_not_in_one_bin() -> None:
    """Bins hold equally many rows: predictions of 0.001 and 0.009, both off, do not cancel within one wide bin."""
    probability = np.repeat([0.001, 0.009], 1000)
    label = np.zeros(2000)
    label[:5] = label[1000:1005] = 1
    assert expected_calibration_error(label, probability) == pytest.approx(0.004)


@settings(deadline=None, max_examples=100)
@given(tied_rows, st.integers(1, 12), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(rows: list[tuple[float, float]], bins: int, random: object) -> None:
    label, probability = np.array(rows).T
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other_label, other_probability = np.array(shuffled).T
    assert metrics_of(label, probability) == pytest.approx(metrics_of(other_label, other_probability), abs=1e-12)
    assert expected_calibration_error(label, probability, bins) == pytest.approx(
        expected_calibration_error(other_label, other_probability, bins), abs=1e-12
    )


@settings(deadline=None, max_examples=150)
@given(tied_rows, st.integers(1, 12))
def test_calibration_bins(rows: list[tuple[float, float]], bins: int) -> None:
    """Bins differ by one row at most, rise, lose nothing, and give what a plain loop over sorted rows gives."""
    label, probability = np.array(rows).T
    predicted, observed, counts = calibration_bins(label, probability, bins)
    assert len(predicted) == len(observed) == len(counts) == min(bins, len(rows))
    assert counts.sum() == len(rows)
    assert counts.max() - counts.min() <= 1
    assert (counts * predicted).sum() == pytest.approx(probability.sum())
    assert (counts * observed).sum() == pytest.approx(label.sum())
    assert (np.diff(predicted) >= -1e-12).all()
    shared = [(p, np.mean([one for one, other in rows if other == p])) for p in sorted(probability.tolist())]
    start = 0
    for number, count in enumerate(counts.astype(int)):
        members = shared[start : start + count]
        assert predicted[number] == pytest.approx(np.mean([p for p, _ in members]))
        assert observed[number] == pytest.approx(np.mean([share for _, share in members]))
        start += count
