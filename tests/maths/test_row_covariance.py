"""Intervals on new rows against the definitions in O(rows^2), hand derivations, resampling and simulation."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t
from sklearn.metrics import f1_score, roc_auc_score

from bench.coverage import CASES, any_look_misses, simulate
from pipeline.maths.row_covariance import NewRows, RowCovariance, auc_influence, new_rows_interval, ratio_influence

Array = npt.NDArray[np.float64]
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def wins(positive: Array, negative: Array) -> Array:
    """[positives, negatives]: 1 where the positive stands above, 1/2 where they tie."""
    return np.asarray(np.sign(positive[:, None] - negative[None, :]) / 2 + 0.5)


def delong(differences: list[Array]) -> Array:
    """Covariance matrix of several differences of AUCs, each given by its matrix of wins gained [P, N].

    DeLong, DeLong and Clarke-Pearson (1988): S10 / P + S01 / N, from means over rows and over columns.
    """
    over_positives = np.atleast_2d(np.cov([gained.mean(1) for gained in differences]))
    over_negatives = np.atleast_2d(np.cov([gained.mean(0) for gained in differences]))
    rows, columns = differences[0].shape
    return np.asarray(over_positives / rows + over_negatives / columns)


def added(groups: tuple[int, ...], influences: list[Array]) -> RowCovariance:
    rows = RowCovariance(groups)
    for influence in influences:
        rows.add(influence)
    return rows


def off_diagonal_mean(matrix: Array) -> float:
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(2, 40), st.integers(2, 5), st.integers(1, 30))
@settings(deadline=None)
def test_variances_and_covariances_of_aucs_are_delongs(
    seed: int, positives: int, negatives: int, seeds: int, values: int
) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, values, (seeds, 2, positives + negatives)) / 7 - 1.0  # few values: many ties
    gained, influences = [], []
    for arm, base in scores:
        pairs = [(own[:positives], own[positives:]) for own in (arm, base)]
        gained.append(wins(*pairs[0]) - wins(*pairs[1]))
        influences.append(auc_influence(*pairs[0]) - auc_influence(*pairs[1]))
        label = np.arange(positives + negatives) < positives
        area = roc_auc_score(label, arm)
        assert auc_influence(*pairs[0])[:positives].mean() == pytest.approx(area)
        assert auc_influence(*pairs[0])[positives:].mean() == pytest.approx(area)
    rows, expected = added((positives, negatives), influences), delong(gained)
    assert rows.variance == pytest.approx(np.trace(expected) / seeds, abs=1e-12)
    assert rows.covariance == pytest.approx(off_diagonal_mean(expected), abs=1e-12)
    assert rows.deciding_rows == min(positives, negatives)


def test_placements_by_hand() -> None:
    """Scores 1, 3 against 0, 2, 2: 1 is above one of three, 3 above all; 0 is below both, 2 below one of two."""
    influence = auc_influence(np.array([1.0, 3.0]), np.array([0.0, 2.0, 2.0]))
    assert influence == pytest.approx([1 / 3, 1, 1, 1 / 2, 1 / 2])
    # variances: (2/3)^2 / 2 = 2/9 of the positives; mean 2/3, squares 1/9 + 1/36 + 1/36 = 1/6, over 2: 1/12
    assert added((2, 3), [influence]).variance == pytest.approx(2 / 9 / 2 + 1 / 12 / 3)
    assert auc_influence(np.array([-math.inf, 1.0]), np.array([-math.inf])) == pytest.approx([1 / 2, 1, 3 / 4])


def test_a_model_differs_from_itself_on_no_row() -> None:
    random = np.random.default_rng(0)
    positive, negative = random.normal(size=50), random.normal(size=5000)
    hits, counts = random.integers(0, 3, 999), random.integers(3, 6, 999)
    for groups, own in (((50, 5000), auc_influence(positive, negative)), ((999,), ratio_influence(hits, counts))):
        rows = added(groups, [own - own] * 3)
        assert (rows.variance, rows.covariance) == (0, 0)
        assert new_rows_interval([0.0, 0.0, 0.0], rows, 0.05) is None  # and no interval


def test_equal_seeds_covary_as_each_varies_and_opposite_ones_against() -> None:
    influence = np.random.default_rng(0).normal(size=300)
    same = added((300,), [influence] * 4)
    assert same.covariance == pytest.approx(same.variance)
    assert same.variance == pytest.approx(influence.var(ddof=1) / 300)
    opposite = added((300,), [influence, -influence])
    assert opposite.covariance == pytest.approx(-opposite.variance)


def test_a_mean_varies_by_its_standard_error() -> None:
    losses = np.random.default_rng(9).exponential(size=2000)
    rows = added((2000,), [ratio_influence(losses, np.ones(2000))])
    assert rows.variance == pytest.approx(losses.var(ddof=1) / 2000)
    assert rows.deciding_rows == pytest.approx(np.square(losses - losses.mean()).sum() ** 2
                                               / ((losses - losses.mean()) ** 4).sum())  # fmt: skip


def test_rows_on_which_the_models_agree_do_not_decide() -> None:
    """Two models of equal F1 differ on 40 of 1000 rows, by the same amount: (40 u^2)^2 / (40 u^4) = 40."""
    hits, counts = np.full(1000, 2.0), np.full(1000, 4.0)
    other = hits.copy()
    other[:40] += np.tile([1.0, -1.0], 20)
    rows = added((1000,), [ratio_influence(other, counts) - ratio_influence(hits, counts)])
    assert rows.deciding_rows == pytest.approx(40)


def test_ratios_vary_as_in_resamples_of_the_rows() -> None:
    """Micro F1 of two arms over three seeds, on the same 4000 resamples of 400 rows for all of them.

    A covariance from R resamples of Gaussian estimates has the variance (v_i v_j + c_ij^2) / R.
    """
    random, resamples = np.random.default_rng(5), 4000
    truth = random.random((400, 6)) < 0.3
    shared = random.random((2, 400, 6))  # an arm's own mistakes, alike at all seeds
    guesses = truth ^ (0.8 * shared + 0.2 * random.random((3, 2, 400, 6)) < 0.15)  # [seeds, arms, rows, aspects]
    hits, counts = 2.0 * (truth & guesses).sum(-1), truth.sum(-1) + guesses.sum(-1) + 0.0
    assert hits[0, 0].sum() / counts[0, 0].sum() == pytest.approx(f1_score(truth, guesses[0, 0], average="micro"))
    influences = [ratio_influence(hits[seed, 0], counts[seed, 0]) - ratio_influence(hits[seed, 1], counts[seed, 1])
                  for seed in range(3)]  # fmt: skip
    expected = np.cov(influences) / 400
    drawn = np.array([np.bincount(random.integers(400, size=400), minlength=400) for _ in range(resamples)])
    ratios = (hits @ drawn.T) / (counts @ drawn.T)
    found = np.cov(ratios[:, 0] - ratios[:, 1])
    variance = np.diag(expected)
    error = np.sqrt((np.outer(variance, variance) + expected**2) / resamples)
    assert (np.abs(found - expected) < 4 * error + 0.02 * np.sqrt(np.outer(variance, variance))).all()
    rows = added((400,), influences)
    assert rows.covariance == pytest.approx(off_diagonal_mean(expected))
    assert rows.covariance > 0.3 * rows.variance  # the seeds share most of their luck with rows


def test_aucs_vary_as_in_resamples_of_the_rows() -> None:
    random, resamples = np.random.default_rng(8), 2000
    positive, negative = random.normal(1.2, size=(2, 100)), random.normal(size=(2, 400))
    positive[1], negative[1] = positive[0] + 0.7 * positive[1], negative[0] + 0.7 * negative[1]
    gained = wins(positive[0], negative[0]) - wins(positive[1], negative[1])
    areas = [gained[np.ix_(random.integers(100, size=100), random.integers(400, size=400))].mean()
             for _ in range(resamples)]  # fmt: skip
    influences = [auc_influence(*pair) for pair in zip(positive, negative, strict=True)]
    expected = math.sqrt(added((100, 400), [influences[0] - influences[1]]).variance)
    assert np.std(areas) == pytest.approx(expected, rel=4 / math.sqrt(2 * resamples) + 0.02)


def alternating(size: float, seeds: int) -> RowCovariance:
    """Four rows with the influences -size, size, -size, size at each seed: c = size^2 / 3, and 4 deciding rows."""
    return added((4,), [size * np.array([-1.0, 1.0, -1.0, 1.0])] * seeds)


def test_the_interval_by_hand() -> None:
    """Differences 1, 2, 3: s^2 / n = 1/3. Influences of 3: c = 3, V = 10/3, and (16 x 81)^2 / ... = 4 deciding rows."""
    found = new_rows_interval([1.0, 2.0, 3.0], alternating(3, 3), 0.05, "conversions")
    assert found is not None
    degrees = (100 / 9) / ((1 / 9) / 2 + 9 / 3)
    half = t.ppf(0.975, degrees) * math.sqrt(10 / 3)
    assert found == NewRows(
        mean=2.0, low=pytest.approx(2 - half), high=pytest.approx(2 + half), level=0.05, seeds=3,
        seeds_variance=pytest.approx(1 / 3), interaction_variance=pytest.approx(0), rows_variance=pytest.approx(3),
        degrees=pytest.approx(degrees), deciding_rows=4, rows_name="conversions",
    )  # fmt: skip
    assert found.rows_share == pytest.approx(0.9)
    assert found.half_width() == pytest.approx(half)
    assert found.half_width(6) == pytest.approx(
        t.ppf(0.975, (19 / 6) ** 2 / ((1 / 36) / 5 + 9 / 3)) * math.sqrt(1 / 6 + 3)
    )
    assert found.half_width(rows=10) == pytest.approx(  # 40 deciding rows, c = 0.3, and seeds as before
        max(t.ppf(0.975, (1 / 3 + 0.3) ** 2 / ((1 / 9) / 2 + 0.09 / 39)) * math.sqrt(1 / 3 + 0.3),
            t.ppf(0.975, 2) * math.sqrt(1 / 3)))  # fmt: skip
    assert found.half_width(10**9) == pytest.approx(t.ppf(0.975, 3) * math.sqrt(3))


def test_what_rows_do_to_each_seed_apart_falls_with_more_rows() -> None:
    """Influences of 1 on other rows at each seed: no covariance, and 1/3 of the variance is the interaction."""
    rows = added((12,), [np.roll([0.0, 1, -1, *[0] * 9], 4 * seed) for seed in range(3)])
    assert rows.variance == pytest.approx(2 / 11 / 12)
    found = new_rows_interval([0.1, 0.4, 0.7], rows, 0.05)
    assert found is not None
    assert found.rows_variance == pytest.approx(0, abs=1e-15)
    assert (found.seeds_variance, found.interaction_variance) == (pytest.approx(0.03), pytest.approx(1 / 66 / 3))
    over_seeds = t.ppf(0.975, 2) * math.sqrt(0.03)
    assert (found.degrees, found.half_width()) == (pytest.approx(2), pytest.approx(over_seeds))
    assert found.half_width(rows=1e9) == pytest.approx(t.ppf(0.975, 2) * math.sqrt(0.03 - 1 / 66 / 3))


@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=8).filter(lambda values: len(set(values)) > 1),
    st.integers(0, 2**32),
    st.sampled_from([0.05, 0.0084, 0.0007]),
    st.sampled_from([0.25, -3.0, 1e-9]),
)
@settings(deadline=None)
def test_never_narrower_than_over_seeds_alone_and_in_any_unit(
    values: list[int], seed: int, level: float, unit: float
) -> None:
    n, random = len(values), np.random.default_rng(seed)
    influences = random.normal(scale=30, size=50) + random.normal(scale=30, size=(n, 50))
    found = new_rows_interval([float(value) for value in values], added((20, 30), list(influences)), level)
    assert found is not None
    half = float(t.isf(level / 2, n - 1)) * np.std(values, ddof=1) / math.sqrt(n)
    assert found.high - found.low >= 2 * half * (1 - 1e-12)
    assert found.mean == pytest.approx((found.low + found.high) / 2, abs=1e-9)
    assert found.interaction_variance <= found.seeds_variance
    least = min(n - 1, found.deciding_rows - 1)
    assert least * (1 - 1e-12) <= found.degrees <= (n - 1 + found.deciding_rows - 1) * (1 + 1e-12)
    other = new_rows_interval([unit * value for value in values], added((20, 30), list(unit * influences)), level)
    assert other is not None
    ends = sorted((unit * found.low, unit * found.high))
    assert (other.low, other.high) == (pytest.approx(ends[0], rel=1e-6), pytest.approx(ends[1], rel=1e-6))


def test_no_interval_without_seeds_that_differ_and_two_rows_of_each_class() -> None:
    assert new_rows_interval([0.1], added((4,), [np.arange(4.0)]), 0.05) is None
    assert new_rows_interval([0.1, 0.1], alternating(1, 2), 0.05) is None
    assert new_rows_interval([0.1, 0.2], added((1, 3), [np.arange(4.0)] * 2), 0.05) is None
    assert new_rows_interval([0.1, 0.2], added((2, 2), [np.arange(4.0)] * 2), 0.05) is not None


@pytest.mark.parametrize(
    ("metric", "case", "seeds_alone", "rows_alone"),
    [("auc", "rows", False, True), ("auc", "seeds", True, False), ("auc", "interaction", True, True),
     ("logloss", "rows", False, True)],
)  # fmt: skip
def test_both_intervals_together_cover_what_one_alone_does_not(
    metric: str, case: str, seeds_alone: bool, rows_alone: bool
) -> None:
    """A share of 95% in 200 worlds has a standard deviation of 1.5%; the bound is four of them."""
    found = simulate(metric, CASES[case], seeds=3, worlds=200, random=np.random.default_rng(1))
    assert found.both > 0.89
    assert (found.seeds_alone > 0.89, found.rows_alone > 0.89) == (seeds_alone, rows_alone)
    assert (found.rows_share > 0.9) == (case == "rows")


def test_looks_keep_the_promise_of_their_level() -> None:
    """5% in 2000 sweeps has a standard deviation of 0.5%; rows that all looks share add few chances to miss."""
    random = np.random.default_rng(0)
    assert 0.03 < any_look_misses(0.02, 2000, random) < 0.07
    assert any_look_misses(2.0, 2000, random) < 0.03
