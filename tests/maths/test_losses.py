"""The losses in log space against mpmath with 150 digits, by hand, and by properties."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pipeline.maths.losses import (
    binary_cross_entropy,
    binary_focal,
    clicked_cross_entropy,
    gate_entropy_deficit,
    gate_imbalance,
    log_probability,
    product_log_probability,
)

torch.set_num_threads(1)

DIGITS = 150  # 1 - p is 4e-35 at (80, 80) and p is 3e-70 at (-80, -80): plenty is left of either
GRID = (-80.0, -50.0, -30.0, -17.0, -8.5, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 8.5, 17.0, 20.0, 30.0, 50.0, 80.0)
HALF = math.log(math.sqrt(0.5) / (1 - math.sqrt(0.5)))  # p = 1/2 where both logits are this
AWKWARD = (
    *((HALF + near, HALF + near) for near in (-1e-2, -1e-3, -1e-5, -1e-7, 0.0, 1e-7, 1e-5, 1e-3, 1e-2)),
    *((0.0, large) for large in (9.0, 15.0, 16.5, 40.0)),  # p goes to 1/2 from below
    *((large, near) for large in (15.0, 40.0) for near in (-1e-6, 1e-6)),
    (16.6, 16.7),  # 1 - sigmoid is about to vanish in single precision
    (-103.0, 3.0),
    (88.0, -88.0),
    (3.0, -103.0),
)
POINTS = (*itertools.product(GRID, GRID), *AWKWARD)
LINE = torch.arange(-80, 81, dtype=torch.float32) + 0.3  # of a single logit
LABELS = (0.0, 1.0)
ROUNDINGS = 1e-5  # of fp32: some twenty operations and library functions, each right to one or two units of 1.2e-7
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


class Truth(NamedTuple):
    """Of one pair of logits: p = sigmoid(a) sigmoid(b), 1 - p, sigmoid(-a), sigmoid(-b)."""

    p: mp.mpf
    q: mp.mpf
    not_a: mp.mpf
    not_b: mp.mpf


class Expected(NamedTuple):
    value: mp.mpf
    gradient: tuple[mp.mpf, mp.mpf]  # by z_ctr and by z_cvr


Loss = Callable[[Truth, float], Expected]


def truth(a: float, b: float) -> Truth:
    """From the definition; `mp.mpf` takes a float as it is."""
    with mp.workdps(DIGITS):
        p = 1 / ((1 + mp.exp(-mp.mpf(a))) * (1 + mp.exp(-mp.mpf(b))))
        return Truth(p, 1 - p, 1 / (1 + mp.exp(mp.mpf(a))), 1 / (1 + mp.exp(mp.mpf(b))))


@cache
def single_precision(points: tuple[tuple[float, float], ...]) -> tuple[Tensor, tuple[Truth, ...]]:
    """The points as single precision holds them, and the truth there."""
    logits = torch.tensor(points, dtype=torch.float32)
    return logits, tuple(truth(a, b) for a, b in logits.double().tolist())


def focal_by_hand(gamma: float, alpha: float | None, detach: bool) -> Loss:
    """(1 - p_t)^gamma * -log p_t, and its derivative by p_t times that of p_t by a logit: +-p sigmoid(-logit)."""

    def loss(true: Truth, label: float) -> Expected:
        with mp.workdps(DIGITS):
            right, wrong, sign = (true.p, true.q, 1) if label else (true.q, true.p, -1)
            weight = mp.mpf(1) if alpha is None else (mp.mpf(alpha) if label else 1 - mp.mpf(alpha))
            value = -(wrong ** mp.mpf(gamma)) * mp.log(right)
            slope = -(wrong ** mp.mpf(gamma)) / right
            if not detach and gamma:
                slope += gamma * wrong ** mp.mpf(gamma - 1) * mp.log(right)
            slope *= sign * true.p * weight
            return Expected(weight * value, (slope * true.not_a, slope * true.not_b))

    return loss


def cross_entropy_by_hand(pos_weight: float) -> Loss:
    def loss(true: Truth, label: float) -> Expected:
        with mp.workdps(DIGITS):
            if label:  # d log p / da = sigmoid(-a)
                weight = mp.mpf(pos_weight)
                return Expected(-weight * mp.log(true.p), (-weight * true.not_a, -weight * true.not_b))
            return Expected(-mp.log(true.q), (true.p * true.not_a / true.q, true.p * true.not_b / true.q))

    return loss


def assert_close(found: Tensor, expected: Sequence[mp.mpf], points: Sequence[object]) -> None:
    """Within 1e-5 relative where the truth exceeds 1e-6, within 1e-6 elsewhere."""
    assert found.isfinite().all()
    true = np.array([float(value) for value in expected])
    allowed = np.where(np.abs(true) > 1e-6, 1e-5 * np.abs(true), 1e-6)
    excess = np.abs(found.detach().double().numpy() - true) / allowed
    worst = int(excess.argmax())
    assert excess[worst] <= 1, f"{found[worst].item()} for {true[worst]} at {points[worst]}"


def check(loss: Callable[[Tensor, Tensor], Tensor], by_hand: Loss, points: tuple[tuple[float, float], ...]) -> None:
    """Values and gradients of both logits, for both labels at every point."""
    logits, truths = single_precision(points)
    for label in LABELS:
        leaf = logits.clone().requires_grad_()
        values = loss(leaf, torch.full((len(leaf),), label))
        assert values.shape == (len(leaf),)
        values.sum().backward()
        expected = [by_hand(true, label) for true in truths]
        assert leaf.grad is not None
        places = [(label, *point) for point in points]
        assert_close(values, [one.value for one in expected], places)
        for logit in range(2):
            assert_close(leaf.grad[:, logit], [one.gradient[logit] for one in expected], places)


def focal(
    logits: Tensor, label: Tensor, gamma: float, alpha: float | None = None, detach_weight: bool = True
) -> Tensor:
    return binary_focal(product_log_probability(logits[:, 0], logits[:, 1]), label, gamma, alpha, detach_weight)


def test_the_derivatives_by_hand_are_those_of_mpmath() -> None:
    """The reference itself, against numerical differentiation at 150 digits."""
    with mp.workdps(DIGITS):
        for (a, b), label, gamma in itertools.product([(0.3, -1.2), (-4.0, 2.0), (5.0, 6.0)], LABELS, (0.5, 2.0)):

            def value(a: mp.mpf, b: mp.mpf, label: float = label, gamma: float = gamma) -> mp.mpf:
                p = 1 / (1 + mp.exp(-a)) / (1 + mp.exp(-b))
                right = p if label else 1 - p
                return -((1 - right) ** gamma) * mp.log(right)

            for order, found in zip(((1, 0), (0, 1)), focal_by_hand(gamma, None, False)(truth(a, b), label).gradient,
                                    strict=True):  # fmt: skip
                assert abs(mp.diff(value, (mp.mpf(a), mp.mpf(b)), order) / found - 1) < 1e-12


def test_log_probabilities() -> None:
    logits, truths = single_precision(POINTS)
    log_p, log_1mp = product_log_probability(logits[:, 0], logits[:, 1])
    with mp.workdps(DIGITS):
        assert_close(log_p, [mp.log(true.p) for true in truths], POINTS)
        assert_close(log_1mp, [mp.log(true.q) for true in truths], POINTS)
    assert (log_p <= 0).all()
    assert (log_1mp <= 0).all()


@pytest.mark.parametrize("pos_weight", [1.0, 24.7, 300.0, 0.5])
def test_cross_entropy_of_the_product(pos_weight: float) -> None:
    check(
        lambda logits, label: binary_cross_entropy(
            product_log_probability(logits[:, 0], logits[:, 1]), label, pos_weight
        ),
        cross_entropy_by_hand(pos_weight),
        POINTS,
    )


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal(gamma: float, alpha: float | None, detach: bool) -> None:
    check(lambda logits, label: focal(logits, label, gamma, alpha, detach), focal_by_hand(gamma, alpha, detach), POINTS)


logit = st.floats(-80, 80, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(logit, logit), min_size=1, max_size=20).map(tuple), st.floats(0, 6), st.booleans())
def test_any_point_of_the_square(points: tuple[tuple[float, float], ...], gamma: float, detach: bool) -> None:
    check(
        lambda logits, label: binary_cross_entropy(product_log_probability(logits[:, 0], logits[:, 1]), label),
        cross_entropy_by_hand(1.0),
        points,
    )
    check(lambda logits, label: focal(logits, label, gamma, None, detach), focal_by_hand(gamma, None, detach), points)


def test_two_numbers_that_the_usual_forms_get_wrong() -> None:
    """The slope of -log(1 - p) is p sigmoid(-20) / (1 - p), near 1/2 at (20, 20): a clamp gives 0. And an easy
    negative at (0, -17) costs -log(1 - sigmoid(-17) / 2), near 2.07e-8: log-add-exp alone is about 188% off."""
    leaf = torch.tensor([[20.0, 20.0]], requires_grad=True)
    binary_cross_entropy(product_log_probability(leaf[:, 0], leaf[:, 1]), torch.zeros(1)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist()[0] == pytest.approx([0.5, 0.5], rel=ROUNDINGS)
    easy = product_log_probability(torch.tensor([0.0]), torch.tensor([-17.0])).log_1mp
    assert -easy.item() == pytest.approx(0.5 * math.exp(-17) / (1 + math.exp(-17)), rel=1e-5)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("detach", [True, False])
def test_focal_of_gamma_zero_is_cross_entropy(label: float, detach: bool) -> None:
    """Values and gradients, exactly."""
    gradients, values = [], []
    for gamma in (0.0, None):
        leaf = torch.tensor(POINTS, dtype=torch.float32, requires_grad=True)
        labels = torch.full((len(leaf),), label)
        probability = product_log_probability(leaf[:, 0], leaf[:, 1])
        if gamma is None:
            loss = binary_cross_entropy(probability, labels)
        else:
            loss = binary_focal(probability, labels, gamma, None, detach)
        loss.sum().backward()
        values.append(loss.detach())
        gradients.append(leaf.grad)
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])


def test_focal_by_hand_at_one_half() -> None:
    """z_ctr = z_cvr = 0: p = 1/4. gamma 2: a positive costs (3/4)^2 log 4, a negative (1/4)^2 log(4/3)."""
    logits = torch.zeros(2, 2)
    label = torch.tensor([1.0, 0.0])
    expected = [0.5625 * math.log(4), 0.0625 * math.log(4 / 3)]
    assert focal(logits, label, 2.0).tolist() == pytest.approx(expected, rel=ROUNDINGS)
    weighted = [0.25 * expected[0], 0.75 * expected[1]]
    assert focal(logits, label, 2.0, alpha=0.25).tolist() == pytest.approx(weighted, rel=ROUNDINGS)


def test_detaching_changes_the_gradient_and_not_the_value() -> None:
    values, gradients = [], []
    for detach in (True, False):
        leaf = torch.zeros(1, 2, requires_grad=True)
        loss = focal(leaf, torch.ones(1), 1.0, detach_weight=detach)
        loss.sum().backward()
        values.append(loss.item())
        assert leaf.grad is not None
        gradients.append(leaf.grad[0, 0].item())
    assert values[0] == values[1]
    # p = 1/4, dp/da = 1/8: detached -(3/4)/p /8, else also log(p)/8
    assert gradients == pytest.approx([-3 / 8, -3 / 8 + math.log(0.25) / 8], rel=ROUNDINGS)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(logit, logit), min_size=1, max_size=8), st.floats(0, 1e6), st.booleans(), st.booleans())
@example([(80.0, 80.0), (-80.0, -80.0), (20.0, 20.0), (0.0, -17.0), (-17.0, 0.0)], 0.5, False, False)
@example([(80.0, 80.0), (-80.0, -80.0), (80.0, -80.0), (-80.0, 80.0)], 1e6, False, True)
@example([(80.0, 80.0), (-80.0, -80.0), (0.0, 0.0)], 0.0, False, False)
def test_focal_is_finite_in_single_precision(
    points: list[tuple[float, float]], gamma: float, detach: bool, use_alpha: bool
) -> None:
    assert_finite(points, torch.float32, gamma, detach, 0.25 if use_alpha else None)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@settings(deadline=None, max_examples=100)
@given(points=st.lists(st.tuples(logit, logit), min_size=1, max_size=8), gamma=st.floats(0, 100), detach=st.booleans())
@example(points=list(itertools.product(GRID, GRID)), gamma=0.5, detach=False)
@example(points=list(itertools.product(GRID, GRID)), gamma=0.0, detach=False)
@example(points=list(itertools.product(GRID, GRID)), gamma=5.0, detach=False)
def test_focal_is_finite_under_autocast(
    kind: torch.dtype, points: list[tuple[float, float]], gamma: float, detach: bool
) -> None:
    with torch.autocast("cpu", dtype=kind):
        assert_finite(points, kind, gamma, detach, None)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("kind", "gamma"),
    [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 100.0)],
    ids=str,
)
def test_focal_is_finite_at_an_absurd_gamma(kind: torch.dtype, gamma: float, detach: bool) -> None:
    assert_finite(list(POINTS), kind, gamma, detach, None)


def assert_finite(
    points: Sequence[tuple[float, float]], kind: torch.dtype, gamma: float, detach: bool, alpha: float | None
) -> None:
    for label in LABELS:
        leaf = torch.tensor(points).to(kind).requires_grad_()
        values = focal(leaf, torch.full((len(leaf),), label), gamma, alpha, detach)
        values.float().sum().backward()
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_near_the_truth(kind: torch.dtype) -> None:
    """Finite is not enough: cross-entropy within 5% where it exceeds 0.05, for logits that the type holds exactly."""
    grid = (-8.0, -4.0, -1.0, 0.0, 1.0, 4.0, 8.0)
    points = tuple(itertools.product(grid, grid))
    logits, truths = single_precision(points)
    for label in LABELS:
        labels = torch.full((len(points),), label)
        with torch.autocast("cpu", dtype=kind):
            found = focal(logits.to(kind), labels, 0.0).double().numpy()
        true = np.array([float(cross_entropy_by_hand(1.0)(one, label).value) for one in truths])
        np.testing.assert_allclose(found[true > 0.05], true[true > 0.05], rtol=0.05)
        np.testing.assert_allclose(found[true <= 0.05], true[true <= 0.05], atol=0.01)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(logit, logit), min_size=1, max_size=20))
def test_the_product_does_not_mind_the_order_of_its_factors(points: list[tuple[float, float]]) -> None:
    """p is symmetric in its logits; the form of log(1 - p) is not."""
    logits = torch.tensor(points)
    one = product_log_probability(logits[:, 0], logits[:, 1])
    other = product_log_probability(logits[:, 1], logits[:, 0])
    torch.testing.assert_close(one.log_p, other.log_p, rtol=0, atol=0)
    torch.testing.assert_close(one.log_1mp, other.log_1mp, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(one.log_p.exp() + one.log_1mp.exp(), torch.ones(len(points)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("pos_weight", [1.0, 4.0, 24.7])
def test_a_certain_conversion_leaves_the_click(pos_weight: float) -> None:
    """z_cvr = 1000: p_ctcvr = p_ctr, so the loss and its gradient are those of torch from the click's logit alone
    (in double precision: torch's own is off by 0.2% at -8.5 in single precision)."""
    for label in LABELS:
        ours = torch.tensor(GRID, requires_grad=True)
        theirs = torch.tensor(GRID, dtype=torch.float64, requires_grad=True)
        certain, labels = torch.full((len(GRID),), 1000.0), torch.full((len(GRID),), label)
        found = binary_cross_entropy(product_log_probability(ours, certain), labels, pos_weight)
        expected = binary_cross_entropy_with_logits(
            theirs, labels.double(), pos_weight=torch.tensor(pos_weight, dtype=torch.float64), reduction="none"
        )
        found.sum().backward()
        expected.sum().backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def one_logit(label: float, pos_weight: float) -> tuple[list[mp.mpf], list[mp.mpf]]:
    """w y log(1 + exp(-z)) + (1 - y) log(1 + exp(z)) over the grid; slopes -w y sigmoid(-z), (1 - y) sigmoid(z)."""
    with mp.workdps(DIGITS):
        logits, weight = [mp.mpf(z) for z in LINE.tolist()], mp.mpf(pos_weight)
        if label:
            return [weight * mp.log(1 + mp.exp(-z)) for z in logits], [-weight / (1 + mp.exp(z)) for z in logits]
        return [mp.log(1 + mp.exp(z)) for z in logits], [1 / (1 + mp.exp(-z)) for z in logits]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("pos_weight", [1.0, 24.7])
def test_click_cross_entropy(pos_weight: float, label: float) -> None:
    logits = LINE.clone().requires_grad_()
    values = binary_cross_entropy(log_probability(logits), torch.full((len(logits),), label), pos_weight)
    values.sum().backward()
    assert logits.grad is not None
    expected, slopes = one_logit(label, pos_weight)
    assert_close(logits.grad, slopes, LINE.tolist())
    assert_close(values, expected, LINE.tolist())


@pytest.mark.parametrize("label", LABELS)
def test_clicked_cross_entropy(label: float) -> None:
    logits = LINE.clone().requires_grad_()
    values = clicked_cross_entropy(log_probability(logits), torch.ones(len(logits)), torch.full((len(logits),), label))
    values.sum().backward()
    assert logits.grad is not None
    expected, slopes = one_logit(label, 1.0)
    assert_close(logits.grad, slopes, LINE.tolist())
    assert_close(values, expected, LINE.tolist())


def test_clicked_cross_entropy_is_nothing_without_a_click() -> None:
    """Value and gradient exactly 0, at any logit, whatever the conversion column says."""
    logits = torch.tensor(GRID, requires_grad=True)
    values = clicked_cross_entropy(log_probability(logits), torch.zeros(len(GRID)), torch.ones(len(GRID)))
    values.sum().backward()
    assert torch.equal(values, torch.zeros(len(GRID)))
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(len(GRID)))


def test_clicked_cross_entropy_on_clicks() -> None:
    """sigmoid(log 3) = 3/4: a conversion costs log(4/3) with slope -1/4, none costs log 4 with slope 3/4."""
    logits = torch.full((4,), math.log(3), requires_grad=True)
    click, conversion = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    values = clicked_cross_entropy(log_probability(logits), click, conversion)
    values.sum().backward()
    assert values.tolist() == pytest.approx([math.log(4 / 3), math.log(4), 0, 0], rel=ROUNDINGS)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-0.25, 0.75, 0, 0], rel=ROUNDINGS)


def test_gate_entropy_deficit_by_hand() -> None:
    """(1/2, 1/4, 1/4) has entropy 1.5 log 2, (1, 0, 0) has 0, thirds have log 3; the mean is over tasks alone."""
    third = 1 / 3
    gates = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [[third, third, third], [0.25, 0.5, 0.25]]])
    deficit = math.log(3) - 1.5 * math.log(2)
    expected = [(deficit + math.log(3)) / 2, deficit / 2]
    found = gate_entropy_deficit(gates)
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx(expected, rel=ROUNDINGS)


def test_gate_entropy_deficit_pulls_towards_equal_shares() -> None:
    """Its gradient by the gate's logits: g_e (log g_e + H), here against (0.7, 0.2, 0.1), one task."""
    shares = np.array([0.7, 0.2, 0.1])
    logits = torch.tensor(np.log(shares), dtype=torch.float32).view(1, 1, 3).requires_grad_()
    gate_entropy_deficit(torch.softmax(logits, -1)).sum().backward()
    entropy = -(shares * np.log(shares)).sum()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.flatten().numpy(), shares * (np.log(shares) + entropy), rtol=1e-5)


def test_gate_entropy_deficit_of_a_dead_expert_has_a_finite_gradient() -> None:
    logits = torch.tensor([[[0.0, -200.0], [300.0, -300.0]]], requires_grad=True)  # shares underflow to exactly 0
    gate_entropy_deficit(torch.softmax(logits, -1)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gate_imbalance_by_hand() -> None:
    """Shares over the batch, then the mean over tasks. Task 0: rows (1, 0) and (0, 1) share alike: 0. Task 1: (1, 0)
    twice: 2 * 1 - 1 = 1. Task 2: (3/4, 1/4) and (1/2, 1/2) share 5/8 and 3/8: 2 * 34/64 - 1 = 1/16."""
    gates = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.75, 0.25]], [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]])
    assert gate_imbalance(gates).item() == pytest.approx((0 + 1 + 1 / 16) / 3, rel=ROUNDINGS)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_gate_imbalance_is_a_squared_coefficient_of_variation(rows: int, tasks: int, experts: int, seed: int) -> None:
    gates = np.random.Generator(np.random.PCG64(seed)).dirichlet(np.ones(experts), (rows, tasks))
    shares = gates.mean(0)
    expected = np.mean([np.var(one) / np.mean(one) ** 2 for one in shares])
    assert gate_imbalance(torch.tensor(gates)).item() == pytest.approx(expected, abs=1e-12)
    entropies = [[-(gate * np.log(gate)).sum() for gate in row] for row in gates]
    np.testing.assert_allclose(
        gate_entropy_deficit(torch.tensor(gates)).numpy(), np.log(experts) - np.mean(entropies, 1), atol=1e-12
    )
