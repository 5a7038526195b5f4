"""Experts mixed by gates, and towers summed up to logits: one pass over memory where torch's operators take several.

What a layer gives here is its product, before ReLU. B = rows, E = experts, T = tasks, H = width of the layer.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.compiled import array_of, fast, narrowed, widened
from pipeline.parallel import divide, spread

Array = npt.NDArray[Any]

ZERO = np.float32(0)
CHUNK = 256  # rows whose gradients of a weight are added up in one go, whatever the number of threads


def mixed(products: Tensor, gates: Tensor) -> Tensor:
    """The experts' ReLU, summed with the gates' weights (Ma et al. 2018, equation 6): [T, B, H].

    products: [E, B, H]; gates: [B, T, E] float32.
    """
    if _fits(products, gates):
        return _Mixed.apply(products, gates)  # type: ignore[no-any-return, no-untyped-call]
    found = torch.bmm(gates.to(products.dtype), functional.relu(products).transpose(0, 1))
    return found.transpose(0, 1).contiguous()  # in strides, the towers' products are four times slower


def logits_of(products: Tensor, weights: Tensor) -> Tensor:
    """The towers' ReLU, summed with the weights of their last layer, in float32 at least: [T, B].

    products: [T, B, H]; weights: [T, H] float32. A logit of -5 in bfloat16 would have steps of 0.03.
    """
    if _fits(products, weights):
        return _Summed.apply(products, weights)  # type: ignore[no-any-return, no-untyped-call]
    with torch.autocast(products.device.type, enabled=False):
        return torch.bmm(functional.relu(products).to(weights.dtype), weights.unsqueeze(-1)).squeeze(-1)


def _fits(products: Tensor, factors: Tensor) -> bool:
    kinds = products.dtype in (torch.float32, torch.bfloat16) and factors.dtype == torch.float32
    return products.is_cpu and kinds


class _Layout(NamedTuple):
    """Where in its memory a dense tensor has the width H of (expert, row)."""

    expert: int
    row: int

    @staticmethod
    def of(products: Tensor) -> "_Layout":
        return _Layout(products.stride(0), products.stride(1))


def _dense(products: Tensor) -> Tensor:
    """With all of it side by side in memory: experts first, or rows."""
    return products if products.transpose(0, 1).is_contiguous() else products.contiguous()


def _memory(products: Tensor) -> Array:
    """Of a dense tensor, its numbers in their order in memory: [E * B * H]."""
    return array_of(products.as_strided((products.numel(),), (1,)))


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Tensor, gates: Tensor) -> Tensor:
        products, gates = _dense(products), gates.permute(1, 2, 0).contiguous()  # [T, E, B]
        out = products.new_empty(len(gates), *products.shape[1:])
        given = _memory(products), *_Layout.of(products), array_of(gates), array_of(out)
        spread(_mix_all, out.shape[1], given, products.numel())
        ctx.save_for_backward(products, gates)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        products, gates = ctx.saved_tensors
        of_products, of_gates = torch.empty_like(products), torch.empty_like(gates)
        given = (_memory(products), *_Layout.of(products), array_of(gates), array_of(gradient.contiguous()),
                 _memory(of_products), array_of(of_gates))  # fmt: skip
        spread(_mix_backward_all, products.shape[1], given, products.numel())
        return of_products, of_gates.permute(2, 0, 1)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Tensor, weights: Tensor) -> Tensor:
        products = products.contiguous()
        out = weights.new_empty(products.shape[:2])
        given = array_of(products), array_of(weights), array_of(out)
        spread(_sum_up_all, products.shape[1], given, products.numel())
        ctx.save_for_backward(products, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        products, weights = ctx.saved_tensors
        chunks = -(-products.shape[1] // CHUNK)
        of_products, of_weights = torch.empty_like(products), weights.new_zeros(chunks, *weights.shape)
        given = tuple(map(array_of, (products, weights, gradient.contiguous(), of_products, of_weights)))
        spread(_sum_up_backward_all, chunks, given, products.numel())
        return of_products, of_weights.sum(0)


@fast
def mix(products: Array, of_expert: int, of_row: int, gates: Array, out: Array, first: int, last: int) -> None:
    tasks, experts = gates.shape[:2]
    width = out.shape[2]
    total = np.empty((tasks, width), np.float32)
    for row in range(first, last):
        total[:] = ZERO
        for expert in range(experts):
            place = expert * of_expert + row * of_row
            product = products[place : place + width]
            for task in range(tasks):
                share = gates[task, expert, row]
                for column in range(width):
                    value = widened(product[column])
                    total[task, column] += share * (ZERO if value < ZERO else value)
        for task in range(tasks):
            for column in range(width):
                out[task, row, column] = narrowed(total[task, column], out)


@fast
def mix_backward(
    products: Array, of_expert: int, of_row: int, gates: Array, gradient: Array, of_products: Array, of_gates: Array,
    first: int, last: int,
) -> None:  # fmt: skip
    tasks, experts = gates.shape[:2]
    width = gradient.shape[2]
    given, total = np.empty((tasks, width), np.float32), np.empty(width, np.float32)
    for row in range(first, last):
        for task in range(tasks):
            for column in range(width):
                given[task, column] = widened(gradient[task, row, column])
        for expert in range(experts):
            place = expert * of_expert + row * of_row
            product, of_product = products[place : place + width], of_products[place : place + width]
            total[:] = ZERO
            for task in range(tasks):
                share, found = gates[task, expert, row], ZERO
                for column in range(width):
                    value = widened(product[column])
                    found += given[task, column] * (ZERO if value < ZERO else value)
                    total[column] += share * given[task, column]
                of_gates[task, expert, row] = found
            for column in range(width):
                fires = widened(product[column]) > ZERO
                of_product[column] = narrowed(total[column] if fires else ZERO, of_product)


@fast
def sum_up(products: Array, weights: Array, out: Array, first: int, last: int) -> None:
    for task in range(len(weights)):
        for row in range(first, last):
            found = ZERO
            for column in range(weights.shape[1]):
                value = widened(products[task, row, column])
                found += weights[task, column] * (ZERO if value < ZERO else value)
            out[task, row] = found


@fast
def sum_up_backward(
    products: Array, weights: Array, gradient: Array, of_products: Array, of_weights: Array, first: int, last: int
) -> None:
    """of_weights: [chunks, T, H], added up later; first, last: of the chunks."""
    tasks, rows, width = products.shape
    total = np.empty(width, np.float32)
    for chunk in range(first, last):
        for task in range(tasks):
            total[:] = ZERO
            for row in range(chunk * CHUNK, min(rows, (chunk + 1) * CHUNK)):
                given = gradient[task, row]
                for column in range(width):
                    value = widened(products[task, row, column])
                    fires = value > ZERO
                    total[column] += given * value if fires else ZERO
                    product = given * weights[task, column] if fires else ZERO
                    of_products[task, row, column] = narrowed(product, of_products)
            of_weights[chunk, task] = total


@fast
def _mix_all(how: Any, given: Any) -> None:
    divide(how, mix, given)


@fast
def _mix_backward_all(how: Any, given: Any) -> None:
    divide(how, mix_backward, given)


@fast
def _sum_up_all(how: Any, given: Any) -> None:
    divide(how, sum_up, given)


@fast
def _sum_up_backward_all(how: Any, given: Any) -> None:
    divide(how, sum_up_backward, given)
