"""What changes with the step: by hand, and against torch's own learning-rate schedulers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR

from pipeline.maths.schedules import clipped_pos_weight, gate_is_open, learning_rate_factor

torch.set_num_threads(1)


def test_the_gate_opens_at_the_warm_up_step() -> None:
    assert [step for step in range(6) if gate_is_open(step, 3)] == [3, 4, 5]
    assert [gate_is_open(step, 2000) for step in (0, 1999, 2000, 2001)] == [False, False, True, True]


def test_the_gate_without_a_warm_up_is_open_at_the_first_step() -> None:
    assert gate_is_open(0, 0)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 50), st.integers(1, 60))
def test_the_gate_never_closes_again(warmup_steps: int, steps: int) -> None:
    """Of `steps` steps, the first `warmup_steps` are without the focal term."""
    opened = [gate_is_open(step, warmup_steps) for step in range(steps)]
    shut = min(warmup_steps, steps)
    assert opened == [False] * shut + [True] * (steps - shut)


@pytest.mark.parametrize(
    ("raw", "clip", "effective"),
    [(24.7, 30.0, 24.7), (4800.0, 300.0, 300.0), (30.0, 30.0, 30.0), (4800.0, None, 4800.0), (0.5, 30.0, 0.5)],
)
def test_clipped_pos_weight(raw: float, clip: float | None, effective: float) -> None:
    assert clipped_pos_weight(raw, clip) == effective


def factors(
    total: int, warmup: int, decay: str = "cosine", final: float = 0.0, steps: int | None = None
) -> list[float]:
    return [
        learning_rate_factor(step, total, warmup_steps=warmup, decay=decay, final_ratio=final)
        for step in range(steps or total)
    ]


def test_cosine_by_hand() -> None:
    """4 steps up, then 8 steps of half a cosine from 1 to 0: (1 + cos(k pi / 8)) / 2."""
    root = math.sqrt(0.5)
    near, far = math.sqrt((1 + root) / 2), math.sqrt((1 - root) / 2)  # cos(pi/8) and cos(3 pi/8) by half angles
    cosines = [1, near, root, far, 0, -far, -root, -near, -1]
    expected = [0.25, 0.5, 0.75, 1, *((1 + cosine) / 2 for cosine in cosines)]
    assert factors(12, 4, steps=13) == pytest.approx(expected, abs=1e-12)


def test_cosine_to_a_final_ratio_by_hand() -> None:
    """From 1 to 0.2 over 4 steps, the middle at 0.6, then it stays."""
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    expected = [1, quarter, 0.6, 1.2 - quarter, 0.2, 0.2, 0.2]
    assert factors(4, 0, final=0.2, steps=7) == pytest.approx(expected, abs=1e-12)


def test_constant_by_hand() -> None:
    assert factors(6, 2, "constant", final=0.3) == [0.5, 1, 1, 1, 1, 1]
    assert factors(3, 0, "constant") == [1, 1, 1]


@pytest.mark.parametrize("decay", ["cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(3, 5), (3, 3), (1, 1), (1, 0), (1, 4)])
def test_a_warm_up_as_long_as_the_training(decay: str, total: int, warmup: int) -> None:
    """The rate only rises; the step after the last has one too."""
    expected = [(step + 1) / warmup for step in range(total)] if warmup else [1.0]
    assert factors(total, warmup, decay) == pytest.approx(expected)
    assert 0 <= learning_rate_factor(total, total, warmup_steps=warmup, decay=decay, final_ratio=0.0) <= 1


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("total", [1, 2, 37])
def test_cosine_is_the_one_of_torch(total: int, final: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=total, eta_min=final)
    warmup = 5
    for step in range(warmup, warmup + total + 1):
        factor = learning_rate_factor(step, warmup + total, warmup_steps=warmup, decay="cosine", final_ratio=final)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(0, 70), st.sampled_from(["cosine", "constant"]), st.floats(0, 1))
def test_shape(total: int, warmup: int, decay: str, final: float) -> None:
    """Above 0, at most 1; rises over the warm-up, reaches 1, then never rises and stays above the final ratio."""
    found = factors(total, warmup, decay, final)
    assert all(0 < factor <= 1 for factor in found)
    rising, falling = found[:warmup], found[warmup:]
    assert all(before < after for before, after in pairwise(rising))
    assert all(before >= after for before, after in pairwise(falling))
    assert all(factor >= final - 1e-12 for factor in falling)
    if warmup < total:
        assert falling[0] == 1
    if 0 < warmup <= total:
        assert rising[-1] == 1
