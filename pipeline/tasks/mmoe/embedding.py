"""The fused embedding table's lookup and gradient: autograd sees the looked-up vectors, never the table.

B = rows of a batch, F = id features, W = width of the table, n = ids of the batch, u = distinct ones.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.compiled import compiled

Array = npt.NDArray[Any]


class Groups(NamedTuple):
    """The ids of a batch sorted by the row of the table that they name."""

    rows: Tensor  # [u] int64, distinct and increasing
    starts: Tensor  # [u + 1] int32: where each row's places begin
    bags: Tensor  # [n] int32: of each place, the bag
    weights: Tensor  # [n] float32


def grouped(ids: Array, bags: Array, weights: Array) -> Groups:
    """ids, bags: [n] int32; weights: [n] float32."""
    count = len(ids)
    keys = np.sort(_packed(ids))  # NumPy's sort has the vector instructions that numba's lacks
    rows, starts = np.empty(count, np.int64), np.empty(count + 1, np.int32)
    sorted_bags, sorted_weights = np.empty_like(bags), np.empty_like(weights)
    found = int(_unpacked(keys, bags, weights, rows, starts, sorted_bags, sorted_weights))
    return Groups(*map(torch.from_numpy, (rows[:found], starts[: found + 1], sorted_bags, sorted_weights)))


def lookup(table: Tensor, batch: Any, sparse: bool) -> Tensor:
    """The weighted sum of each bag's rows: [B * F, W].

    The table's gradient is sparse, and coalesced, if `sparse`.
    """
    if batch.groups is None or not torch.is_grad_enabled():
        return _pooled(table, batch.ids, batch.starts, batch.weights, sparse)
    return _Lookup.apply(table, batch, sparse)  # type: ignore[no-any-return, no-untyped-call]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, batch: Any, sparse: bool) -> Tensor:
        ctx.groups, ctx.size, ctx.sparse = batch.groups, table.shape, sparse
        return _pooled(table, batch.ids, batch.starts, batch.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """A row's gradient is the weighted sum of its bags' gradients: a look-up once more, in those."""
        groups: Groups = ctx.groups
        values = _pooled(gradient.contiguous(), groups.bags, groups.starts, groups.weights)
        total = torch.sparse_coo_tensor(groups.rows[None], values, ctx.size, is_coalesced=True, check_invariants=False)
        return total if ctx.sparse else total.to_dense(), None, None


def _pooled(table: Tensor, ids: Tensor, starts: Tensor, weights: Tensor, sparse: bool = False) -> Tensor:
    return functional.embedding_bag(
        ids, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True, sparse=sparse
    )


@compiled
def _packed(ids: Array) -> Array:
    """Numbers that sort by id, then by place."""
    keys = np.empty(len(ids), np.uint64)
    for place in range(len(ids)):
        keys[place] = (np.uint64(ids[place]) << np.uint64(32)) | np.uint64(place)
    return keys


@compiled
def _unpacked(
    keys: Array, bags: Array, weights: Array, rows: Array, starts: Array, sorted_bags: Array, sorted_weights: Array
) -> int:
    count = 0
    for position in range(len(keys)):
        row, place = np.int64(keys[position] >> np.uint64(32)), np.int64(keys[position] & np.uint64(0xFFFFFFFF))
        sorted_bags[position], sorted_weights[position] = bags[place], weights[place]
        if count == 0 or rows[count - 1] != row:
            rows[count], starts[count] = row, position
            count += 1
    starts[count] = len(keys)
    return count
