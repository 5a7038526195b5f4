"""The table's optimizers against torch's own and against formulas in double precision."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.compute import sparse
from pipeline.compute.optimizers import RowAdagrad, SparseAdam
from pipeline.compute.sparse import coalesced
from pipeline.config.strict_config import load
from pipeline.errors import UserError
from pipeline.tasks.mmoe.config import MmoeConfig

torch.set_num_threads(1)

ROWS = 40
EPS = 2.0**-23  # of float32
Step = tuple[Tensor, Tensor]  # rows, gradient values


def steps_of(seed: int, count: int, width: int, used: int = 9) -> list[Step]:
    """Some distinct rows with gradients of very different sizes, step by step."""
    random = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(count):
        rows = np.sort(random.choice(ROWS, random.integers(1, used + 1), replace=False))
        values = random.normal(size=(len(rows), width)) * 10 ** random.uniform(-3, 2, (len(rows), 1))
        found.append((torch.from_numpy(rows), torch.from_numpy(values).float()))
    return found


def table_of(width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width)))


def give(table: nn.Parameter, step: Step) -> None:
    rows, values = step
    table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=True)


def run(make: Callable[[nn.Parameter], Any], steps: list[Step], width: int) -> Tensor:
    table = table_of(width)
    optimizer = make(table)
    for step in steps:
        give(table, step)
        optimizer.step()
        optimizer.zero_grad()
    return table.detach()


def rounding(largest_step: float, count: int, width: int) -> float:
    """Of a weight after `count` steps: a dozen operations and a sum over the row each, on numbers up to its size.

    Adam moves a weight by at most 1.6 lr, since |m| <= 1.6 sqrt(v): (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) by
    Cauchy and Schwarz. Row-wise Adagrad by sqrt(width) lr, since |g| <= sqrt(width) sqrt(mean g^2).
    """
    return (12 + width) * count * EPS * (largest_step * count + float(table_of(width).detach().abs().max()))


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1, 3, 8, 10]))
def test_sparse_adam_is_torchs(seed: int, count: int, width: int) -> None:
    steps, settings = steps_of(seed, count, width), {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    expected = run(lambda table: torch.optim.SparseAdam([table], **settings), steps, width)
    found = run(lambda table: SparseAdam(table, **settings), steps, width)
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(0.03 * 3.2, count, width))


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1, 3, 8, 10]))
def test_row_adagrad_is_its_formula(seed: int, count: int, width: int) -> None:
    steps = steps_of(seed, count, width)
    table, total = table_of(width).detach().double().numpy(), np.zeros(ROWS)
    for rows, values in steps:
        for row, gradient in zip(rows.tolist(), values.double().numpy(), strict=True):
            total[row] += sum(gradient**2) / width
            table[row] -= 0.1 * gradient / (math.sqrt(total[row]) + 1e-6)
    found = run(lambda own: RowAdagrad(own, lr=0.1, eps=1e-6), steps, width)
    np.testing.assert_allclose(found.numpy(), table, rtol=0, atol=rounding(0.1 * math.sqrt(width), count, width))


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1, 3, 8, 10]), st.sampled_from(["adam", "adagrad"]))
def test_compiled_loops_are_the_operators(seed: int, count: int, width: int, rule: str) -> None:
    """The loop that the CPU runs, and the operators that CUDA runs, to the rounding of fp32.

    Either rounds a moment at most six times a step, at no more than the size that the largest gradient so far gives
    it.
    """
    steps = steps_of(seed, count, width)
    table, other = table_of(width).detach(), table_of(width).detach()
    shape = (ROWS, 2, width) if rule == "adam" else (ROWS,)
    state, other_state = torch.zeros(shape), torch.zeros(shape)
    largest = max(float(values.abs().max()) for _, values in steps)
    for rows, values in steps:
        if rule == "adam":
            sparse.adam(table, state, rows, values, (0.8, 0.95), 0.05, 1e-6)
            sparse.adam_by_operators(other, other_state, rows, values, (0.8, 0.95), 0.05, 1e-6)
        else:
            sparse.adagrad(table, state, rows, values, 0.05, 1e-6)
            sparse.adagrad_by_operators(other, other_state, rows, values, 0.05, 1e-6)
    size = max(largest, largest**2)
    torch.testing.assert_close(state, other_state, rtol=(6 + width) * count * EPS, atol=6 * count * EPS * size)
    torch.testing.assert_close(table, other, rtol=0, atol=rounding(0.05 * 3.2, count, width))


MAKERS: dict[str, Callable[[nn.Parameter], Any]] = {
    "row_adagrad": lambda table: RowAdagrad(table, lr=0.1),
    "sparse_adam": lambda table: SparseAdam(table, lr=0.05),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_is_loaded_goes_on_to_the_same_bits(name: str) -> None:
    steps = steps_of(5, 20, 8)
    whole = run(MAKERS[name], steps, 8)
    table = table_of(8)
    first = MAKERS[name](table)
    for step in steps[:11]:
        give(table, step)
        first.step()
    second = MAKERS[name](table)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in steps[11:]:
        give(table, step)
        second.step()
    assert torch.equal(table.detach(), whole)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_no_step_uses_stay_as_they_are(name: str) -> None:
    steps = [(torch.tensor([3, 17]), torch.ones(2, 8))] * 5
    found, start = run(MAKERS[name], steps, 8), table_of(8).detach()
    assert sorted(set((found != start).any(1).nonzero().flatten().tolist())) == [3, 17]


def test_coalesced_by_hand() -> None:
    """Increasing rows are taken as they are; others are sorted and added up."""
    values = torch.tensor([[1.0], [2.0], [4.0]])
    ordered = torch.sparse_coo_tensor(torch.tensor([[1, 4, 6]]), values, (9, 1), check_invariants=True)
    assert coalesced(ordered).is_coalesced()
    assert coalesced(ordered).values().data_ptr() == ordered._values().data_ptr()
    repeated = torch.sparse_coo_tensor(torch.tensor([[6, 1, 6]]), values, (9, 1), check_invariants=True)
    assert coalesced(repeated).indices().tolist() == [[1, 6]]
    assert coalesced(repeated).values().tolist() == [[2.0], [5.0]]
    side_by_side = torch.sparse_coo_tensor(torch.tensor([[1, 4, 4]]), values, (9, 1), check_invariants=True)
    assert coalesced(side_by_side).values().tolist() == [[1.0], [6.0]]


def embedding_config(**values: str) -> MmoeConfig:
    return load(MmoeConfig, None, {f"optim.embedding.{key}": value for key, value in values.items()})


def test_what_the_config_says_of_the_embedding() -> None:
    config = embedding_config(name="row_adagrad", lr="0.005", betas="[0.8, 0.9]")
    assert config.warnings(frozenset({"optim.embedding.betas"})) == [
        "optim.embedding.lr is 0.005 with row_adagrad; usual: 0.01-0.2",
        "optim.embedding.betas has no effect with optim.embedding.name row_adagrad",
    ]
    assert embedding_config(name="row_adagrad", lr="0.05").warnings() == []
    with pytest.raises(UserError, match="found 'lazy_adam', allowed: one of: sparse_adam, row_adagrad, adam"):
        embedding_config(name="lazy_adam")
    with pytest.raises(UserError, match="row_adagrad"):
        embedding_config(name="adagrad")
