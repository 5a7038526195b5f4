"""The gradient of the embedding lookup against torch's own."""

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.tasks.mmoe.impressions.embedding import grouped, lookup
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions

torch.set_num_threads(1)

Lengths = list[int]


def batch_of(lengths: Lengths, table_rows: int, seed: int) -> tuple[Impressions, npt.NDArray[np.int32]]:
    """Bags of these lengths with random ids and weights, and the bag of each id."""
    random = np.random.Generator(np.random.PCG64(seed))
    count = sum(lengths)
    ids = random.integers(0, table_rows, count).astype(np.int32)
    bags = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    weights = random.normal(size=count).astype(np.float32)
    zeros = torch.zeros(len(lengths))
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tensors = [torch.from_numpy(part) for part in (ids, weights)]
    return Impressions(zeros, zeros, zeros[:, None], *tensors, starts, grouped(ids, bags, weights)), bags


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 20), st.sampled_from([1, 3, 8, 10, 16]),
    st.integers(0, 1000),
)  # fmt: skip
def test_gradient_is_that_of_autograd(lengths: Lengths, table_rows: int, width: int, seed: int) -> None:
    """For the sparse and the dense form, with groups and, as on a GPU, without.

    In another order, up to 180 terms of size 1 to 10: the square root of so many roundings of 6e-8 is near 1e-5.
    """
    batch, bags = batch_of(lengths, table_rows, seed)
    start, factor = torch.randn(table_rows, width), torch.randn(len(lengths), width)
    expected = start.clone().requires_grad_()
    flat = torch.zeros(len(lengths), width).index_add(
        0, torch.from_numpy(bags).long(), expected[batch.ids.long()] * batch.weights[:, None]
    )
    (flat * factor).sum().backward()
    for sparse, taken in itertools.product((True, False), (batch, replace(batch, groups=None))):
        table = start.clone().requires_grad_()
        pooled = lookup(table, taken, sparse)
        torch.testing.assert_close(pooled, flat.detach(), rtol=1e-4, atol=1e-4)
        (pooled * factor).sum().backward()
        assert table.grad is not None
        assert table.grad.is_sparse == sparse
        torch.testing.assert_close(table.grad.to_dense(), expected.grad, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 1000))
def test_groups_are_the_places_of_each_row(lengths: Lengths, table_rows: int, seed: int) -> None:
    batch, bags = batch_of(lengths, table_rows, seed)
    groups = batch.groups
    assert groups is not None
    expected: dict[int, list[tuple[int, float]]] = {}
    for row, bag, weight in zip(batch.ids.tolist(), bags.tolist(), batch.weights.tolist(), strict=True):
        expected.setdefault(row, []).append((bag, weight))
    assert groups.rows.tolist() == sorted(expected)
    pairs = list(zip(groups.bags.tolist(), groups.weights.tolist(), strict=True))
    places = [pairs[first:last] for first, last in itertools.pairwise(groups.starts.tolist())]
    assert places == [expected[row] for row in sorted(expected)]


def test_without_gradients_no_groups_are_needed() -> None:
    batch, _ = batch_of([2, 0, 1], 5, 0)
    table = torch.randn(5, 8)
    plain = functional.embedding_bag(
        batch.ids, table, batch.starts, mode="sum", per_sample_weights=batch.weights, include_last_offset=True
    )
    torch.testing.assert_close(lookup(table, batch, sparse=True), plain)
