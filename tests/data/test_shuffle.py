"""The order of training rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shuffle import Shuffle


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 2**63), st.integers(0, 30), st.data())
def test_a_permutation_cut_into_batches(rows: int, size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    """Any batch can be taken alone; the permutation does not depend on the batch size or on global generators."""
    shuffle = Shuffle(rows, size, seed, epoch)
    batches = list(shuffle)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert len(batches) == len(shuffle) == math.ceil(rows / size)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    index = data.draw(st.integers(0, len(batches) - 1))
    np.random.seed(data.draw(st.integers(0, 10)))
    torch.manual_seed(0)
    assert Shuffle(rows, size, seed, epoch)[index].tolist() == batches[index].tolist()
    whole = Shuffle(rows, rows, seed, epoch)[0].tolist()
    assert [row for batch in batches for row in batch] == whole


def test_seeds_and_epochs_have_different_orders() -> None:
    keys = [(seed, epoch) for seed in range(5) for epoch in range(5)]
    assert len({tuple(Shuffle(50, 50, seed, epoch)[0].tolist()) for seed, epoch in keys}) == len(keys)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError):
        Shuffle(10, 3, 0, 0)[index]
