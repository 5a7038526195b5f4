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

from pipeline.compiled import AHEAD, compiled, fetch
from pipeline.parallel import at_once, parts_of

Array = npt.NDArray[Any]

SAMPLED = 64  # one id in so many tells where to divide them


class Groups(NamedTuple):
    """The ids of a batch sorted by the row of the table that they name."""

    rows: Tensor  # [u] int64, distinct and increasing
    starts: Tensor  # [u + 1] int32: where each row's places begin
    bags: Tensor  # [n] int32: of each place, the bag
    weights: Tensor  # [n] float32


def grouped(ids: Array, bags: Array, weights: Array) -> Groups:
    """ids, bags: [n] int32; weights: [n] float32. Each thread sorts the ids of one range of the table."""
    count, parts = len(ids), parts_of(len(ids))
    some = np.sort(ids[::SAMPLED])
    borders = [0, *(int(some[len(some) * part // parts]) for part in range(1, parts)), 2**31]
    keys: list[Array] = [np.empty(0, np.uint64)] * parts

    def sort(part: int) -> None:
        # NumPy's sort has the vector instructions that numba's lacks
        keys[part] = np.sort(_packed(ids, borders[part], borders[part + 1]))

    at_once(sort, parts)
    ends = np.cumsum([len(found) for found in keys])
    sorted_bags, sorted_weights = np.empty_like(bags), np.empty_like(weights)
    rows: list[Array] = [np.empty(0, np.int64)] * parts
    starts: list[Array] = [np.empty(0, np.int32)] * parts

    def unpack(part: int) -> None:
        first, last = ends[part] - len(keys[part]), ends[part]
        rows[part], starts[part] = np.empty(last - first, np.int64), np.empty(last - first + 1, np.int32)
        found = _unpacked(keys[part], bags, weights, first, rows[part], starts[part], sorted_bags, sorted_weights)
        rows[part], starts[part] = rows[part][:found], starts[part][:found]

    at_once(unpack, parts)
    whole = np.concatenate(rows), np.concatenate([*starts, [np.int32(count)]])
    return Groups(*map(torch.from_numpy, (*whole, sorted_bags, sorted_weights)))


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
def _packed(ids: Array, low: int, high: int) -> Array:
    """Numbers that sort by id, then by place, of the ids from `low` to below `high`."""
    keys, count = np.empty(len(ids), np.uint64), 0
    for place in range(len(ids)):
        keys[count] = (np.uint64(ids[place]) << np.uint64(32)) | np.uint64(place)
        count += low <= ids[place] < high
    return keys[:count]


@compiled
def _unpacked(
    keys: Array, bags: Array, weights: Array, first: int, rows: Array, starts: Array, sorted_bags: Array,
    sorted_weights: Array,
) -> int:  # fmt: skip
    """Their number of distinct rows. Without a branch: whether the next id is another one cannot be foreseen."""
    count, before = 0, np.int64(-1)
    starts[0] = first
    for position in range(len(keys)):
        ahead = np.int64(keys[min(position + AHEAD, len(keys) - 1)] & np.uint64(0xFFFFFFFF))
        fetch(bags, ahead)
        fetch(weights, ahead)
        row, place = np.int64(keys[position] >> np.uint64(32)), np.int64(keys[position] & np.uint64(0xFFFFFFFF))
        sorted_bags[first + position], sorted_weights[first + position] = bags[place], weights[place]
        count += row != before
        before = row
        rows[count - 1], starts[count] = row, first + position + 1
    return count
