"""In-place updates of the rows of an embedding table that a step used.

Each update rule is implemented twice: with torch operators for CUDA, and as a compiled loop over the rows for the CPU,
where operators take several times as long. R = rows of the table, W = its width, u = distinct rows of the step.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.compute.compiled import compiled

Array = npt.NDArray[Any]


def coalesced(gradient: Tensor) -> Tensor:
    """Coalesce a sparse gradient, without sorting if its rows are already in increasing order."""
    if gradient.is_coalesced() or not gradient.is_cpu:
        return gradient.coalesce()
    rows, values = gradient._indices(), gradient._values()
    if (rows[0, 1:] <= rows[0, :-1]).any():
        return gradient.coalesce()
    return torch.sparse_coo_tensor(rows, values, gradient.shape, is_coalesced=True, check_invariants=False)


def adam(
    table: Tensor, moments: Tensor, rows: Tensor, values: Tensor, betas: tuple[float, float], rate: float, eps: float
) -> None:
    """One step of Adam (Kingma & Ba 2015, algorithm 1) on the given rows, like `torch.optim.SparseAdam`.

    Args:
        table: [R, W] float32.
        moments: [R, 2, W] float32, running means of the gradient and of its square.
        rows: [u] int64, distinct.
        values: [u, W] float32, gradients of the rows.
        rate: the learning rate times the bias correction, lr sqrt(1 - b2^t) / (1 - b1^t).
    """
    if table.is_cpu:
        numbers = (np.float32(number) for number in (1 - betas[0], 1 - betas[1], rate, eps))
        _adam(table.numpy(), moments.numpy(), rows.numpy(), values.numpy(), *numbers)
    else:
        adam_by_operators(table, moments, rows, values, betas, rate, eps)


def adam_by_operators(
    table: Tensor, moments: Tensor, rows: Tensor, values: Tensor, betas: tuple[float, float], rate: float, eps: float
) -> None:
    """`adam` with torch operators, on any device."""
    mean, square = moments[rows].unbind(1)
    mean = mean + (1 - betas[0]) * (values - mean)
    square = square + (1 - betas[1]) * (values.square() - square)
    moments[rows, 0], moments[rows, 1] = mean, square
    table[rows] -= rate * mean / (square.sqrt() + eps)


@compiled
def _adam(
    table: Array, moments: Array, rows: Array, values: Array, mean_share: float, square_share: float, rate: float,
    eps: float,
) -> None:  # fmt: skip
    for position in range(len(rows)):
        row = rows[position]
        weight, mean, square, value = table[row], moments[row, 0], moments[row, 1], values[position]
        for column in range(len(weight)):
            mean[column] += mean_share * (value[column] - mean[column])
            square[column] += square_share * (value[column] * value[column] - square[column])
            weight[column] -= rate * mean[column] / (np.sqrt(square[column]) + eps)


def adagrad(table: Tensor, sums: Tensor, rows: Tensor, values: Tensor, rate: float, eps: float) -> None:
    """One step of row-wise Adagrad (Naumov et al. 2019, DLRM): G += mean(g^2), w -= lr g / (sqrt(G) + eps).

    Args:
        table: [R, W] float32.
        sums: [R] float32, sums of mean squared gradients.
        rows: [u] int64, distinct.
        values: [u, W] float32, gradients of the rows.
    """
    if table.is_cpu:
        _adagrad(table.numpy(), sums.numpy(), rows.numpy(), values.numpy(), np.float32(rate), np.float32(eps))
    else:
        adagrad_by_operators(table, sums, rows, values, rate, eps)


def adagrad_by_operators(table: Tensor, sums: Tensor, rows: Tensor, values: Tensor, rate: float, eps: float) -> None:
    """`adagrad` with torch operators, on any device."""
    total = sums[rows] + values.square().mean(1)
    sums[rows] = total
    table[rows] -= rate * values / (total.sqrt() + eps).unsqueeze(1)


@compiled
def _adagrad(table: Array, sums: Array, rows: Array, values: Array, rate: float, eps: float) -> None:
    for position in range(len(rows)):
        row = rows[position]
        weight, value, squares = table[row], values[position], np.float32(0)
        for column in range(len(weight)):
            squares += value[column] * value[column]
        sums[row] += squares / np.float32(len(weight))
        step = rate / (np.sqrt(sums[row]) + eps)
        for column in range(len(weight)):
            weight[column] -= step * value[column]
