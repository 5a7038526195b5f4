"""Lookup in the fused embedding table, and its gradient.

B = rows of a batch, F = id features, W = width of the table, n = ids of the batch, u = distinct ids.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Array = npt.NDArray[Any]


class Groups(NamedTuple):
    """The ids of a batch sorted by table row."""

    rows: Tensor  # [u] int64, distinct and increasing
    starts: Tensor  # [u + 1] int32: position of each row's first id
    bags: Tensor  # [n] int32: bag of each id
    weights: Tensor  # [n] float32


def grouped(ids: Array, bags: Array, weights: Array) -> Groups:
    """Sort ids by table row, outside the training thread. ids, bags: [n] int32; weights: [n] float32."""
    keys = np.sort((ids.astype(np.int64) << 32) | np.arange(len(ids)))  # three times as fast as a stable argsort
    rows, order = keys >> 32, keys & 0xFFFFFFFF
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    starts = np.append(firsts, len(ids)).astype(np.int32)
    return Groups(*map(torch.from_numpy, (rows[firsts], starts, bags[order], weights[order])))


def lookup(table: Tensor, batch: Any, sparse: bool) -> Tensor:
    """The weighted sum of each bag's rows: [B * F, W].

    If the batch has groups, the table's gradient is computed with them: sparse and coalesced if `sparse`, else dense.
    """
    if batch.groups is None or not torch.is_grad_enabled():
        return _pooled(table, batch.ids, batch.starts, batch.weights, sparse)
    return _Lookup.apply(table, batch, sparse)  # type: ignore[no-any-return, no-untyped-call]


class _Lookup(torch.autograd.Function):
    """Lookup with a coalesced gradient. torch's gradient has one row per id, and coalescing it takes longer."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, batch: Any, sparse: bool) -> Tensor:
        ctx.groups, ctx.size, ctx.sparse = batch.groups, table.shape, sparse
        return _pooled(table, batch.ids, batch.starts, batch.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """A row's gradient is the weighted sum of its bags' gradients, which is another lookup."""
        groups: Groups = ctx.groups
        values = _pooled(gradient.contiguous(), groups.bags, groups.starts, groups.weights)
        total = torch.sparse_coo_tensor(groups.rows[None], values, ctx.size, is_coalesced=True, check_invariants=False)
        return total if ctx.sparse else total.to_dense(), None, None


def _pooled(table: Tensor, ids: Tensor, starts: Tensor, weights: Tensor, sparse: bool = False) -> Tensor:
    return functional.embedding_bag(
        ids, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True, sparse=sparse
    )
