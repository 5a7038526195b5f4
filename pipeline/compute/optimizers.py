"""Optimizers of an embedding table with sparse gradients: a step updates only the rows that its batch used.

R = rows of the table, W = its width.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pipeline.compute import sparse


class RowOptimizer(torch.optim.Optimizer):
    """Base class of optimizers that update only the rows in the sparse gradient of a table."""

    def __init__(self, table: Tensor, **settings: Any) -> None:
        super().__init__([table], settings)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the table's rows in place."""
        group = self.param_groups[0]
        table: Tensor = group["params"][0]
        if table.grad is None:
            return
        gradient, state = sparse.coalesced(table.grad), self.state[table]
        if not state:
            state |= {"step": 0} | self._new_state(table)
        state["step"] += 1
        self._update(table.detach(), gradient.indices()[0], gradient.values(), group, state)

    @abstractmethod
    def _new_state(self, table: Tensor) -> dict[str, Tensor]:
        """Create the optimizer state of the table."""

    @abstractmethod
    def _update(
        self, table: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Update table and state in place at `rows` [u], whose gradients are `values` [u, W]."""


class SparseAdam(RowOptimizer):
    """Adam on the rows of a step, like `torch.optim.SparseAdam`: the moments of other rows do not change."""

    def __init__(
        self, table: Tensor, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(table, lr=lr, betas=betas, eps=eps)

    def _new_state(self, table: Tensor) -> dict[str, Tensor]:
        return {"moments": table.new_zeros(len(table), 2, table.shape[1])}  # moments of a row are adjacent in memory

    def _update(
        self, table: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        (first, second), step = group["betas"], state["step"]
        rate = group["lr"] * math.sqrt(1 - second**step) / (1 - first**step)
        sparse.adam(table, state["moments"], rows, values, (first, second), rate, group["eps"])


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad (Duchi et al. 2011): one sum of squares per row."""

    def __init__(self, table: Tensor, *, lr: float = 0.05, eps: float = 1e-8) -> None:
        super().__init__(table, lr=lr, eps=eps)

    def _new_state(self, table: Tensor) -> dict[str, Tensor]:
        return {"square": table.new_zeros(len(table))}

    def _update(
        self, table: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        sparse.adagrad(table, state["square"], rows, values, group["lr"], group["eps"])
