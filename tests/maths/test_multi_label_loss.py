"""The multi-label focal loss against mpmath, finite differences, torch's cross-entropy, and by properties."""

import itertools
import math
from collections.abc import Sequence

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.maths.losses import multi_label_focal

torch.set_num_threads(1)

DIGITS = 120  # at a distance of 160 between logits 1 - p is 3e-70
GRID = (-80.0, -20.0, -3.0, -0.5, 0.0, 0.7, 5.0, 30.0, 80.0)
POINTS = tuple(itertools.product(GRID, repeat=3))
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
UNLABELLED = (-1, -2, 3)

Logits = tuple[float, float, float]


def by_hand(z: Sequence[float], label: int, gamma: float, weight: float) -> tuple[float, list[float]]:
    """-w (1 - p)^g log p of p = exp z_y / sum exp z, and its derivative dp/dz_k = p (1[k = y] - p_k) times
    w (g (1 - p)^(g - 1) log p - (1 - p)^g / p)."""
    with mp.workdps(DIGITS):
        powers = [mp.exp(mp.mpf(one)) for one in z]
        shares = [power / mp.fsum(powers) for power in powers]
        p = shares[label]
        rest = mp.fsum(share for index, share in enumerate(shares) if index != label)
        g, w = mp.mpf(gamma), mp.mpf(weight)
        slope = -(rest**g) / p + (g * rest ** (g - 1) * mp.log(p) if gamma else 0)
        gradient = [float(w * slope * p * ((index == label) - share)) for index, share in enumerate(shares)]
        return float(-w * rest**g * mp.log(p)), gradient


def value_and_gradient(logits: Tensor, label: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    values = multi_label_focal(leaf, label, *options)  # type: ignore[arg-type]
    values.sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


@pytest.mark.parametrize("alpha", [None, (0.9798, 0.9945, 1.0269), (0.0, 2.5, 1.0)], ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_values_and_gradients(gamma: float, alpha: Logits | None) -> None:
    points = POINTS[:: 7 if alpha else 3]
    for label in range(3):
        truth = [by_hand(z, label, gamma, alpha[label] if alpha else 1.0) for z in points]
        values, slopes = np.array([one[0] for one in truth]), np.array([one[1] for one in truth])
        for kind, absolute in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            logits = torch.tensor(points, dtype=kind)
            found, gradient = value_and_gradient(logits, torch.full((len(points),), label), gamma, alpha)
            assert found.dtype == kind
            relative = 1e-11 if kind == torch.float64 else 1e-4  # rounding is taken to the power of gamma
            np.testing.assert_allclose(found.numpy(), values, rtol=relative, atol=absolute)
            np.testing.assert_allclose(gradient.numpy(), slopes, rtol=relative, atol=absolute)


def test_by_hand() -> None:
    """Shares 1/2, 1/4, 1/4. gamma 2: a positive costs (1/2)^2 log 2, a neutral (3/4)^2 log 4, twice that by alpha."""
    logits = torch.tensor([[[math.log(2), 0.0, 0.0]] * 3])
    found = multi_label_focal(logits, torch.tensor([[0, 2, -1]], dtype=torch.int8), 2.0)
    assert found.tolist()[0] == pytest.approx([0.25 * math.log(2), 0.5625 * math.log(4), 0.0], rel=1e-5)
    weighted = multi_label_focal(logits, torch.tensor([[0, 2, -1]], dtype=torch.int8), 2.0, (1.0, 5.0, 2.0))
    assert weighted.tolist()[0] == pytest.approx([0.25 * math.log(2), 1.125 * math.log(4), 0.0], rel=1e-5)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, (0.5, 1.0, 2.0)], ids=str)
def test_finite_differences(gamma: float, alpha: Logits | None) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator).mul(3).requires_grad_()
    label = torch.randint(-2, 4, (5, 4), generator=generator)
    assert torch.autograd.gradcheck(lambda z: multi_label_focal(z, label, gamma, alpha), (logits,))


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**31), st.sampled_from([1.0, 30.0]))
def test_without_focus_it_is_the_masked_cross_entropy(
    rows: int, aspects: int, classes: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, aspects, classes, generator=generator) * scale
    label = torch.randint(-2, classes + 1, (rows, aspects), generator=generator).to(torch.int8)
    found, gradient = value_and_gradient(logits, label, 0.0, [1.0] * classes)
    leaf = logits.clone().requires_grad_()
    target = torch.where((label >= 0) & (label < classes), label.long(), -100)
    expected = cross_entropy(leaf.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
    expected.sum().backward()
    # in fp32 a share near 1 is rounded by 1e-7, and a difference of logits up to 100 by 1e-5
    torch.testing.assert_close(found.flatten(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, multi_label_focal(logits, label), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [None, (0.5, 1.0, 2.0)], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38, 3.0])
@pytest.mark.parametrize("code", UNLABELLED)
def test_an_unlabelled_cell_is_nothing(code: int, poison: float, alpha: Logits | None, gamma: float) -> None:
    """Value and gradient exactly 0 whatever its logits are, and the other cells do not notice."""
    logits = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[2.0, 2.0, -1.0], [0.3, 0.2, 0.1]]])
    label = torch.tensor([[0, 1], [2, 0]], dtype=torch.int8)
    clean, gradient = value_and_gradient(logits, label, gamma, alpha)
    for place in ([0, 1], [1, 0]):
        bad, masked = logits.clone(), label.clone()
        bad[*place], masked[*place] = torch.tensor([poison, 0.0, poison]), code
        values, slopes = value_and_gradient(bad, masked, gamma, alpha)
        assert values[*place] == 0
        assert slopes[*place].tolist() == [0.0, 0.0, 0.0]
        others = torch.ones(2, 2, dtype=torch.bool)
        others[*place] = False
        assert torch.equal(values[others], clean[others])
        assert torch.equal(slopes[others], gradient[others])


def test_no_labelled_cell_at_all() -> None:
    logits = torch.full((2, 3, 3), math.nan)
    values, gradient = value_and_gradient(logits, torch.tensor([[-1, -2, 3]] * 2), 2.0, (1.0, 1.0, 1.0))
    assert torch.equal(values, torch.zeros(2, 3))
    assert torch.equal(gradient, torch.zeros(2, 3, 3))
    assert multi_label_focal(torch.empty(0, 4, 3), torch.empty(0, 4, dtype=torch.int8), 2.0).shape == (0, 4)


extreme = st.one_of(st.floats(-100, 100, width=32), st.floats(-(2.0**99), 2.0**99, width=32))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(extreme, extreme, extreme), min_size=1, max_size=6), st.floats(0, 100), st.booleans())
@example([(80.0, -80.0, 0.0), (1e4, 1e4, 1e4), (-1e4, 0.0, 1e4)], 100.0, True)
@example([(0.0, 0.0, 0.0), (16.6, 0.0, 0.0), (0.0, 88.0, 104.0)], 0.5, False)
@example([(2.0**99, -(2.0**99), 0.0)], 100.0, False)
def test_finite_in_single_precision(points: list[Logits], gamma: float, weighted: bool) -> None:
    for label in range(3):
        alpha = (0.25, 1.0, 4.0) if weighted else None
        values, gradient = value_and_gradient(
            torch.tensor(points, dtype=torch.float32), torch.full((len(points),), label), gamma, alpha
        )
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert gradient.isfinite().all()


logit = st.floats(-30, 30)
cells = st.lists(st.tuples(logit, logit, logit, st.integers(-2, 3)), min_size=1, max_size=12)
weights = st.tuples(*[st.floats(0, 10)] * 3)


@settings(deadline=None, max_examples=100)
@given(cells, st.floats(0, 6), weights)
def test_alpha_multiplies_each_cell(listed: list[tuple[float, float, float, int]], gamma: float, alpha: Logits) -> None:
    """As a sequence or a tensor, in any precision; a weight of 0 leaves no gradient."""
    logits = torch.tensor([cell[:3] for cell in listed], dtype=torch.float64)
    label = torch.tensor([cell[3] for cell in listed], dtype=torch.int8)
    plain, slope = value_and_gradient(logits, label, gamma)
    for given_alpha in (alpha, list(alpha), torch.tensor(alpha, dtype=torch.float64)):
        found, gradient = value_and_gradient(logits, label, gamma, given_alpha)
        each = torch.tensor([alpha[code] if 0 <= code < 3 else 0.0 for code in label.tolist()], dtype=torch.float64)
        torch.testing.assert_close(found, each * plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, each.unsqueeze(-1) * slope, rtol=1e-9, atol=1e-15)


@settings(deadline=None, max_examples=100)
@given(cells, st.floats(0, 6), st.floats(-50, 50))
def test_shift_and_order_of_the_classes_do_not_matter(
    listed: list[tuple[float, float, float, int]], gamma: float, shift: float
) -> None:
    """softmax(z + c) = softmax(z); renaming the classes renames their logits and weights; gradients sum to 0."""
    logits = torch.tensor([cell[:3] for cell in listed], dtype=torch.float64)
    label = torch.tensor([cell[3] for cell in listed])
    alpha = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    found, gradient = value_and_gradient(logits, label, gamma, alpha)
    torch.testing.assert_close(multi_label_focal(logits + shift, label, gamma, alpha), found, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(listed), dtype=torch.float64), rtol=0, atol=1e-10)
    order = torch.tensor([2, 0, 1])
    place = torch.argsort(order)
    renamed = torch.where((label >= 0) & (label < 3), place[label.clamp(0, 2)], label)
    again = multi_label_focal(logits[:, order], renamed, gamma, alpha[order])
    torch.testing.assert_close(again, found, rtol=1e-12, atol=1e-13)


def test_focus_lowers_easy_cells_more() -> None:
    """(1 - p)^2 at p = 0.9 is 0.01, at p = 0.1 it is 0.81: the ratio to cross-entropy."""
    logits = torch.log(torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.45, 0.45]], dtype=torch.float64))
    label = torch.tensor([0, 0])
    ratio = multi_label_focal(logits, label, 2.0) / multi_label_focal(logits, label)
    assert ratio.tolist() == pytest.approx([0.01, 0.81], rel=1e-9)
