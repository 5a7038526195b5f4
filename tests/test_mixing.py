"""The fused mixture and sums against the same in plain tensors, in double precision."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.tasks.mmoe import mixing
from pipeline.tasks.mmoe.mixing import logits_of, mixed

Found = tuple[Tensor, ...]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative: half a bit of eight, and once more of the gradient


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_mixed(products: Tensor, gates: Tensor) -> Tensor:
    return torch.einsum("bte,ebh->tbh", gates, products.clamp_min(0))


def plain_logits(products: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("tbh,th->tb", products.clamp_min(0), weights)


def both(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, given: Tensor) -> Found:
    """The value, and the gradients of the two."""
    first, second = first.detach().requires_grad_(), second.detach().requires_grad_()
    value = function(first, second)
    return value.detach(), *torch.autograd.grad(value, [first, second], given.to(value.dtype))


def assert_close(found: Found, expected: Found, rounding: float) -> None:
    """Each number to the rounding, of itself or of the largest that its sum may have had."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=4 * rounding, atol=4 * rounding * other.abs().max().item())


KINDS = st.sampled_from([torch.float32, torch.bfloat16])
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 70))  # B, T, E, H


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, shape=SHAPES, rows_first=st.booleans(), parts=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_mixture(kind: torch.dtype, shape: tuple[int, ...], rows_first: bool, parts: int, seed: int) -> None:
    """Both orders in memory that the experts' layers leave."""
    rows, tasks, experts, width = shape
    products = random(experts, rows, width, seed=seed).to(kind)
    if rows_first:
        products = products.transpose(0, 1).contiguous().transpose(0, 1)
    gates = torch.softmax(random(rows, tasks, experts, seed=seed + 1), -1)
    gradient = random(tasks, rows, width, seed=seed + 2).to(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.parallel.LEAST", 1)
        patch.setattr(torch, "get_num_threads", lambda: parts)
        found = both(mixed, products, gates, gradient)
    expected = both(plain_mixed, products.double(), gates.double(), gradient.double())
    assert found[0].dtype == found[1].dtype == kind
    assert found[2].dtype == torch.float32
    assert found[0].is_contiguous()
    assert_close(found[:2], expected[:2], ROUNDING[kind])
    assert_close(found[2:], expected[2:], ROUNDING[torch.float32])  # summed in fp32 from what was given


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, shape=SHAPES, parts=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_sums(kind: torch.dtype, shape: tuple[int, ...], parts: int, seed: int) -> None:
    rows, tasks, width = shape[0] * shape[2] * 8, shape[1], shape[3]  # several chunks of rows
    products, weights = random(tasks, rows, width, seed=seed).to(kind), random(tasks, width, seed=seed + 1)
    gradient = random(tasks, rows, seed=seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.parallel.LEAST", 1)
        patch.setattr(torch, "get_num_threads", lambda: parts)
        found = both(logits_of, products, weights, gradient)
    expected = both(plain_logits, products.double(), weights.double(), gradient.double())
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (torch.float32, kind, torch.float32)
    assert_close(found[::2], expected[::2], ROUNDING[torch.float32])
    assert_close(found[1:2], expected[1:2], ROUNDING[kind])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_the_ways_agree(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a GPU takes, on the CPU; other kinds of numbers take it here too."""
    products = random(3, 20, 8, seed=0).to(kind)
    exact = torch.float64 if kind == torch.float64 else torch.float32
    gates, weights = torch.softmax(random(20, 3, 3, seed=1), -1).to(exact), random(3, 8, seed=2).to(exact)
    found = mixed(products, gates), logits_of(products, weights)
    monkeypatch.setattr(mixing, "_fits", lambda *_: False)
    for one, other in zip(found, (mixed(products, gates), logits_of(products, weights)), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 if kind == torch.bfloat16 else 1e-3)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    products, gates = random(4, 3000, 16, seed=0), torch.softmax(random(3000, 2, 4, seed=1), -1)
    towers, weights = random(2, 3000, 16, seed=2).bfloat16(), random(2, 16, seed=3)
    given = random(2, 3000, 16, seed=4), random(2, 3000, seed=5)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((*both(mixed, products, gates, given[0]), *both(logits_of, towers, weights, given[1])))
    for other in found[1:]:
        assert all(torch.equal(one, another) for one, another in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_is_not_lost(kind: torch.dtype) -> None:
    """A loss that is not a number must be seen: no ReLU makes a zero of it."""
    products = torch.ones(2, 3, 4, dtype=kind)
    products[1, 2, 3] = float("nan")
    found = mixed(products, torch.full((3, 2, 2), 0.5))
    assert found.isnan().nonzero().tolist() == [[0, 2, 3], [1, 2, 3]]
    assert logits_of(products, torch.ones(2, 4)).isnan().nonzero().tolist() == [[1, 2]]


def test_by_hand() -> None:
    """One row, two experts (1, -2) and (3, 4), a gate of a quarter and three: (10/4, 12/4). At -2 no gradient flows."""
    products = torch.tensor([[[1.0, -2.0]], [[3.0, 4.0]]])
    value, of_products, of_gates = both(mixed, products, torch.tensor([[[0.25, 0.75]]]), torch.ones(1, 1, 2))
    assert value.tolist() == [[[2.5, 3.0]]]
    assert of_products.tolist() == [[[0.25, 0.0]], [[0.75, 0.75]]]
    assert of_gates.tolist() == [[[1.0, 7.0]]]
    value, of_products, of_weights = both(logits_of, products, torch.tensor([[2.0, 5.0], [1.0, 0.5]]), torch.ones(2, 1))
    assert value.tolist() == [[2.0], [5.0]]
    assert of_products.tolist() == [[[2.0, 0.0]], [[1.0, 0.5]]]
    assert of_weights.tolist() == [[1.0, 0.0], [3.0, 4.0]]
