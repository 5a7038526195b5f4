"""Bin edges, and the sample and means of numeric columns."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_tables import scalar_splitmix

from pipeline.data.feature_statistics import Numbers, bin_edges


def test_edges_by_hand() -> None:
    assert bin_edges([3.0] * 5, 4) == (3.0, 4.0)
    assert bin_edges([1e9], 4) == (1e9, 1000000060.0)  # 1e9 + 1 is 1e9 in float32
    top = float(np.finfo(np.float32).max)
    low, high = bin_edges([top], 4)
    assert low < high == float(str(np.float32(top)))
    assert bin_edges([2, 1, 1, 0.1], 4) == (0.1, 1.0, 2.0)  # few distinct values: all of them
    assert bin_edges(np.arange(101.0), 4) == (0.0, 25.0, 50.0, 75.0, 100.0)


def test_edges_of_a_spiky_column() -> None:
    gains = np.concatenate([np.zeros(9_600), np.arange(1.0, 401.0)])  # 96% are 0
    edges = bin_edges(gains, 8)
    # quantiles of all give 0 and 400 only; the others give eight shares of 1..400
    assert edges[:2] == (0.0, 1.0)
    assert edges[-1] == 400.0
    assert len(edges) == 9
    assert np.diff(edges[1:]) == pytest.approx([57.0] * 7, abs=1)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    st.integers(1, 40),
)
def test_edges_increase_within_the_budget(values: list[float], bins: int) -> None:
    edges = bin_edges(values, bins)
    assert 2 <= len(edges) <= bins + 1
    assert (np.diff(np.array(edges, dtype=np.float32)) > 0).all()
    if len(set(values)) > 1:
        assert (np.float32(edges[0]), np.float32(edges[-1])) == (min(values), max(values))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(1, 50))
def test_sample_and_mean_do_not_depend_on_batches(sizes: list[int], kept: int) -> None:
    rows = sum(sizes)
    values = np.random.default_rng(rows).lognormal(size=(rows, 2))
    values[3::7, 1] = np.nan
    whole, cut = Numbers(2, kept), Numbers(2, kept)
    whole.add(np.arange(rows), values)
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        cut.add(np.arange(start, start + size), values[start : start + size])
    smallest = sorted(range(rows), key=scalar_splitmix)[:kept]
    for numbers in (whole, cut):
        assert sorted(numbers.sample()[:, 0]) == sorted(values[smallest, 0])
        assert numbers.means() == pytest.approx(np.nanmean(values, axis=0), rel=1e-11)  # 8,000 roundings
    assert whole.means().tolist() == cut.means().tolist()
