"""Optimizers: AdamW over dense parameters, and three that touch only those rows of a table that a step has used.

Their surface is that of `torch.optim`, whose own classes import torch's compiler (2 s of every start) at first use.
A table's gradient is a coalesced sparse tensor of rows [u] and values [u, W]; R = rows of the table.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.compiled import AHEAD, compiled, fetch
from pipeline.parallel import divide, spread

Array = npt.NDArray[Any]
Group = dict[str, Any]  # "params" and "lr", and what else the rule takes

BLOCK = 1024  # rows of a table that are moved at a time
TAIL_STEPS = 16_384  # the powers of skipped steps that are looked up; after so many, nothing is left of a moment


class Optimizer(Protocol):
    param_groups: list[Group]

    def step(self) -> None:
        """Move the parameters by their gradients, at the groups' learning rates."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse gradient with each row once. Autograd forgets that it was given it so, and torch would sort again."""
    rows = gradient._indices()[0]
    if gradient.is_cpu and _increase(rows.numpy()):
        return gradient._coalesced_(True)
    return gradient.coalesce()


def merged(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [u] and values [u, W], parts of increasing rows one after the other, with each row once, on the CPU.

    Timsort merges such parts; to sort them anew takes ten times as long.
    """
    order = np.argsort(rows.numpy(), kind="stable")
    found, total = _merged(rows.numpy(), values.numpy(), order)
    return torch.from_numpy(found), torch.from_numpy(total)


class _Base:
    """`param_groups`, and of each parameter its state: by name, a tensor or a number."""

    def __init__(self, groups: Sequence[Group], **defaults: Any) -> None:
        self.param_groups: list[Group] = [defaults | group for group in groups]
        self.state: list[dict[str, Any]] = [{} for _ in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The groups' settings, and the state of each parameter in their order."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"groups": groups, "state": [dict(state) for state in self.state]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is of other groups or parameters."""
        parameters = self._parameters()
        if len(state.get("groups", ())) != len(self.param_groups) or len(state["state"]) != len(parameters):
            raise ValueError("the state of another optimizer")
        for group, settings in zip(self.param_groups, state["groups"], strict=True):
            group.update(settings)
        self.state = [
            {name: self._own(value, parameter) for name, value in found.items()}
            for found, parameter in zip(state["state"], parameters, strict=True)
        ]

    @staticmethod
    def _own(value: Any, parameter: Tensor) -> Any:
        """A copy of a state's tensor on the parameter's device, in its memory order where it has its shape."""
        if not isinstance(value, Tensor):
            return value
        own = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        return own.to(parameter.device, value.dtype).copy_(value)


class AdamW(_Base):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), all parameters in one fused call.

    The moments are running means of the gradient and its square, corrected for starting at 0 (Kingma & Ba 2015).
    Without weight decay it is Adam.
    """

    def __init__(
        self, groups: Sequence[Group], *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(groups, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        states = iter(self.state)
        for group in self.param_groups:
            found = [(weight, state) for weight, state in zip(group["params"], states, strict=False)
                     if weight.grad is not None]  # fmt: skip
            for weight, state in found:
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
            if not found:
                continue
            weights, own = zip(*found, strict=True)
            steps = [state["step"] for state in own]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                list(weights), [weight.grad for weight in weights], [state["mean"] for state in own],
                [state["square"] for state in own], [], steps, amsgrad=False, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip


class _RowOptimizer(_Base, ABC):
    """One table, of which a step moves the rows in its sparse gradient."""

    def __init__(self, table: Tensor, **settings: Any) -> None:
        super().__init__([{"params": [table]}], **settings)

    def step(self) -> None:
        group, state = self.param_groups[0], self.state[0]
        table: Tensor = group["params"][0]
        if table.grad is None:
            return
        gradient = coalesced(table.grad)
        if not state:
            state |= {"steps": 0} | self._zeros(table)
        state["steps"] += 1
        self._update(table.detach(), gradient.indices()[0], gradient.values(), group, state)

    @abstractmethod
    def _zeros(self, table: Tensor) -> dict[str, Tensor]:
        """The state before the first step."""

    @abstractmethod
    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: Group, state: dict[str, Any]) -> None:
        """Move the rows by their gradients, in place."""


class RowAdagrad(_RowOptimizer):
    """Adagrad (Duchi et al. 2011) with one accumulator a row, of the mean square of its gradient.

    As recommendation models use it (Naumov et al. 2019, DLRM): G += mean(g^2), w -= lr g / (sqrt(G) + eps).
    """

    def __init__(self, table: Tensor, *, lr: float = 0.05, eps: float = 1e-8) -> None:
        super().__init__(table, lr=lr, eps=eps)

    def _zeros(self, table: Tensor) -> dict[str, Tensor]:
        return {"square": table.new_zeros(len(table))}

    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: Group, state: dict[str, Any]) -> None:
        move = _row_adagrad_all if table.is_cpu else row_adagrad
        _run(move, [table, state["square"], rows, values], [group["lr"], group["eps"]])


class SparseAdam(_RowOptimizer):
    """Adam on the rows of a step alone, as `torch.optim.SparseAdam`: the moments of other rows stay as they are."""

    def __init__(
        self, table: Tensor, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(table, lr=lr, betas=tuple(betas), eps=eps)

    def _zeros(self, table: Tensor) -> dict[str, Tensor]:
        return {"moments": table.new_zeros(len(table), 2, table.shape[1])}  # side by side: one place in memory

    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: Group, state: dict[str, Any]) -> None:
        (first, second), steps = group["betas"], state["steps"]
        rate = group["lr"] * math.sqrt(1 - second**steps) / (1 - first**steps)
        move = _adam_all if table.is_cpu else adam
        _run(move, [table, state["moments"], rows, values], [1 - first, 1 - second, rate, 1.0, group["eps"]])


class LazyAdam(SparseAdam):
    """Dense Adam put off: what a row's moments would have done while no step used it is made up when one does.

    Of k skipped steps, dense Adam's j-th moves a row by lr m b1^j / sqrt(v b2^j): a geometric series, summed in one
    go at the present learning rate and bias correction, with eps left as it was; then the moments decay by b1^k and
    b2^k. The rows of a step are made up after its look-up.
    """

    def _zeros(self, table: Tensor) -> dict[str, Tensor]:
        return super()._zeros(table) | {"last": torch.zeros(len(table), dtype=torch.int32, device=table.device)}

    def _update(self, table: Tensor, rows: Tensor, values: Tensor, group: Group, state: dict[str, Any]) -> None:
        (first, second), steps = group["betas"], state["steps"]
        numbers = [group["lr"] / (1 - first**steps), 1 / math.sqrt(1 - second**steps), group["eps"]]
        tails = [torch.from_numpy(part).to(table.device) for part in _tails(first, second)]
        move = _lazy_adam_all if table.is_cpu else lazy_adam
        _run(move, [table, state["moments"], rows, values, state["last"], *tails],
             [steps, 1 - first, 1 - second, *numbers])  # fmt: skip


def row_adagrad(table: Tensor, square: Tensor, rows: Tensor, values: Tensor, rate: float, eps: float) -> None:
    square[rows] += values.square().mean(1)
    table[rows] -= rate * values / (square[rows].sqrt() + eps)[:, None]


def adam(
    table: Tensor, moments: Tensor, rows: Tensor, values: Tensor, mean_share: float, square_share: float,
    rate: float, scale: float, eps: float,
) -> None:  # fmt: skip
    """Shares: 1 - beta. w -= rate m / (scale sqrt(v) + eps)."""
    mean, square = moments[rows].unbind(1)
    mean = mean + mean_share * (values - mean)
    square = square + square_share * (values.square() - square)
    moments[rows] = torch.stack([mean, square], 1)
    table[rows] -= rate * mean / (scale * square.sqrt() + eps)


def make_up_for(
    table: Tensor, moments: Tensor, rows: Tensor, last: Tensor, tails: Tensor, decays: Tensor, square_decays: Tensor,
    steps: int, rate: float, scale: float, eps: float,
) -> None:  # fmt: skip
    """`last`: the step that last used each row, from 1; 0 = none did."""
    skipped = torch.where(last[rows] > 0, steps - 1 - last[rows], 0).clamp_max(TAIL_STEPS - 1).long()
    mean, square = moments[rows].unbind(1)
    table[rows] -= tails[skipped, None] * rate * mean / (scale * square.sqrt() + eps)
    moments[rows] = torch.stack([mean * decays[skipped, None], square * square_decays[skipped, None]], 1)
    last[rows] = steps


def lazy_adam(
    table: Tensor, moments: Tensor, rows: Tensor, values: Tensor, last: Tensor, tails: Tensor, decays: Tensor,
    square_decays: Tensor, steps: int, mean_share: float, square_share: float, rate: float, scale: float, eps: float,
) -> None:  # fmt: skip
    make_up_for(table, moments, rows, last, tails, decays, square_decays, steps, rate, scale, eps)
    adam(table, moments, rows, values, mean_share, square_share, rate, scale, eps)


def _run(move: Any, tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """One of the functions above; or, on the CPU, of the compiled ones below, on all of torch's threads."""
    if not tensors[0].is_cpu:
        move(*tensors, *numbers)
        return
    arrays = [tensor.numpy() for tensor in tensors]
    narrow = [number if isinstance(number, int) else np.float32(number) for number in numbers]
    spread(move, len(tensors[2]), (*arrays, *narrow))


@cache
def _tails(first: float, second: float) -> tuple[Array, Array, Array]:
    """By skipped steps: the sum of the moves they would have made, and what is left of either moment."""
    skipped, ratio = np.arange(TAIL_STEPS, dtype=np.float64), first / math.sqrt(second)
    found = ratio * (1 - ratio**skipped) / (1 - ratio), first**skipped, second**skipped
    return tuple(part.astype(np.float32) for part in found)  # type: ignore[return-value]


@compiled
def _increase(rows: Array) -> bool:
    falls = 0
    for position in range(1, len(rows)):
        falls += rows[position] <= rows[position - 1]
    return falls == 0


@compiled
def _merged(rows: Array, values: Array, order: Array) -> tuple[Array, Array]:
    """The sums of the values of each distinct row, in the parts' order."""
    width, count, before = values.shape[1], 0, np.int64(-1)
    found, total = np.empty(len(rows), np.int64), np.zeros((len(rows), width), np.float32)
    for position in range(len(order)):
        place = order[position]
        row = rows[place]
        count += row != before
        before = row
        found[count - 1] = row
        for column in range(width):
            total[count - 1, column] += values[place, column]
    return found[:count], total[:count]


@compiled
def _row_adagrad(
    table: Array, square: Array, rows: Array, values: Array, rate: float, eps: float, first: int, last: int
) -> None:
    width = table.shape[1]
    for position in range(first, last):
        ahead = rows[min(position + AHEAD, last - 1)]
        fetch(table, ahead)
        fetch(square, ahead)
        row, total = rows[position], np.float32(0)
        for column in range(width):
            total += values[position, column] * values[position, column]
        square[row] += total / np.float32(width)
        step = rate / (np.sqrt(square[row]) + eps)
        for column in range(width):
            table[row, column] -= step * values[position, column]


@compiled
def _adam(
    table: Array, moments: Array, rows: Array, values: Array, mean_share: float, square_share: float,
    rate: float, scale: float, eps: float, first: int, last: int,
) -> None:  # fmt: skip
    for position in range(first, last):
        ahead = rows[min(position + AHEAD, last - 1)]
        fetch(table, ahead)
        fetch(moments, ahead)
        row = rows[position]
        for column in range(table.shape[1]):
            value = values[position, column]
            mean, square = moments[row, 0, column], moments[row, 1, column]
            mean += mean_share * (value - mean)
            square += square_share * (value * value - square)
            moments[row, 0, column], moments[row, 1, column] = mean, square
            table[row, column] -= rate * mean / (scale * np.sqrt(square) + eps)


@compiled
def _make_up(
    table: Array, moments: Array, rows: Array, last_used: Array, tails: Array, decays: Array, square_decays: Array,
    steps: int, rate: float, scale: float, eps: float, first: int, last: int,
) -> None:  # fmt: skip
    for position in range(first, last):
        ahead = rows[min(position + AHEAD, last - 1)]
        fetch(last_used, ahead)
        fetch(moments, ahead)
        fetch(table, ahead)
        row, before = rows[position], last_used[rows[position]]
        skipped = min(steps - 1 - before, len(tails) - 1) if before else 0
        last_used[row] = np.int32(steps)
        if skipped:
            tail, decay, square_decay = tails[skipped] * rate, decays[skipped], square_decays[skipped]
            for column in range(table.shape[1]):
                mean, square = moments[row, 0, column], moments[row, 1, column]
                table[row, column] -= tail * mean / (scale * np.sqrt(square) + eps)
                moments[row, 0, column], moments[row, 1, column] = mean * decay, square * square_decay


@compiled
def _lazy_adam(
    table: Array, moments: Array, rows: Array, values: Array, last_used: Array, tails: Array, decays: Array,
    square_decays: Array, steps: int, mean_share: float, square_share: float, rate: float, scale: float, eps: float,
    first: int, last: int,
) -> None:  # fmt: skip
    """A block of rows at a time: they are still in the cache when they are moved."""
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        _make_up(table, moments, rows, last_used, tails, decays, square_decays, steps, rate, scale, eps, start, end)
        _adam(table, moments, rows, values, mean_share, square_share, rate, scale, eps, start, end)


@compiled
def _row_adagrad_all(how: Any, given: Any) -> None:
    divide(how, _row_adagrad, given)


@compiled
def _adam_all(how: Any, given: Any) -> None:
    divide(how, _adam, given)


@compiled
def _lazy_adam_all(how: Any, given: Any) -> None:
    divide(how, _lazy_adam, given)
