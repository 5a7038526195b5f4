"""Evaluation metrics against counting by hand, independent formulas and sklearn."""

import math
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from pipeline.maths.metrics import auc, binary_metrics, calibration_bins

Array = npt.NDArray[np.float64]


def metrics_of(label: Array | list[float], probability: Array | list[float]) -> dict[str, float]:
    p = np.asarray(probability, dtype=np.float64)
    return binary_metrics(np.asarray(label, dtype=np.float64), np.log(p), np.log1p(-p))


def expected_calibration_error(label: Array, probability: Array, bins: int = 10) -> float:
    predicted, observed, rows = calibration_bins(label, probability, bins)
    return float(np.average(np.abs(predicted - observed), weights=rows))


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


# Of one sign, of both, with zeros of both signs, next to each other, denormal, and huge.
scores = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0]),
        st.one_of(
            st.sampled_from([-0.0, 0.0, -1.0, math.nextafter(-1, 0), 5e-324, -5e-324, 1e300, -1e300, 0.1, 0.3]),
            st.floats(-800, 0),
            st.floats(allow_nan=False, allow_infinity=False, width=32),
        ),
    ),
    min_size=2,
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(scores, st.sampled_from(["as they are", "all below 0", "all above 0"]))
def test_auc_is_exact_for_any_scores(rows: list[tuple[float, float]], signs: str) -> None:
    """The share of pairs, to the last bit: it is a quotient of integers. Precision too is of the same thresholds."""
    label, score = np.array(rows).T
    score = {"as they are": score, "all below 0": -np.abs(score), "all above 0": np.abs(score)}[signs]
    if not 0 < label.sum() < len(label):
        with pytest.raises(ValueError, match="allowed: both classes"):
            auc(label, score)
        return
    twice = sum(int(high > low) * 2 + int(high == low) for high in score[label > 0] for low in score[label == 0])
    assert auc(label, score) == twice / (2 * int(label.sum()) * int((1 - label).sum()))
    found = binary_metrics(label, score, np.zeros(len(label))) if signs == "all below 0" else None
    if found:
        assert found["auc"] == auc(label, score)
        assert found["pr_auc"] == pytest.approx(average_precision_by_thresholds(label, score), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 3000), st.sampled_from([0.001, 0.1, 0.5, 0.999]), st.integers(0, 6))
def test_auc_against_sklearn(seed: int, rows: int, rate: float, digits: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    label = (random.random(rows) < rate).astype(float)
    label[:2] = 0, 1
    score = np.round(random.normal(label - 3, 1), digits)  # of both signs, in ever more groups
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    log_p = -np.logaddexp(0, -score)
    found = binary_metrics(label, log_p, -np.logaddexp(0, score))
    assert found["auc"] == pytest.approx(roc_auc_score(label, log_p), abs=1e-12)
    assert found["pr_auc"] == pytest.approx(average_precision_score(label, log_p), abs=1e-12)


def test_auc_by_hand() -> None:
    """Of 2 x 3 pairs: 0.8 is over all three; 0.5 is over one, tied with one, under one: (3 + 1.5) / 6."""
    label, score = np.array([1, 1, 0, 0, 0]), np.array([0.8, 0.5, 0.7, 0.5, -0.2])
    assert auc(label, score) == 0.75
    assert auc(label > 0, score) == 0.75
    assert auc(1 - label, score) == 0.25


@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
def test_scores_that_cannot_be_ranked_are_refused(wrong: float) -> None:
    label, log_p = np.array([0.0, 1.0, 0.0]), np.array([-1.0, -2.0, wrong])
    for score in (log_p, log_p[::-1], -log_p):
        with pytest.raises(ValueError, match="found NaN or infinity, allowed: finite numbers"):
            auc(label, score)
    with pytest.raises(ValueError, match="found NaN or infinity"):
        binary_metrics(label, log_p, np.full(3, -0.1))


def test_scores_that_are_one_probability_share_its_bins() -> None:
    """Two neighbours, log p of the same p = 0.9: as scores they are apart, as predictions they share half an event."""
    log_p = np.array([math.nextafter(-0.1, -1), -0.1])
    assert log_p[0] < log_p[1]
    assert np.exp(log_p[0]) == np.exp(log_p[1])
    found = binary_metrics(np.array([0.0, 1.0]), log_p, log_p)
    assert found["auc"] == 1.0
    assert found["ece"] == pytest.approx(math.exp(-0.1) - 0.5)  # apart: 0.9 - 0 and 1 - 0.9, or 1/2 on average
    assert binary_metrics(np.array([1.0, 0.0]), log_p, log_p)["auc"] == 0.0


def test_calibration_does_not_need_an_exponential_that_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Library functions are right to a unit in the last place: where neighbours change places, they are put back."""
    exact, random = np.exp, np.random.Generator(np.random.PCG64(0))
    monkeypatch.setattr(np, "exp", lambda values: exact(values) * np.where(np.arange(len(values)) % 2, 0.9, 1.1))
    log_p = np.sort(random.uniform(-1.0, -0.2, 501))
    label = (random.random(501) < exact(log_p)).astype(float)
    assert (np.diff(np.exp(log_p)) < 0).any()
    found = binary_metrics(label, log_p, np.zeros(501))
    assert found["ece"] == pytest.approx(expected_calibration_error(label, np.exp(log_p)), abs=1e-12)
    assert found["auc"] == pytest.approx(roc_auc_score(label, log_p), abs=1e-12)


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
