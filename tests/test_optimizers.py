"""The optimizers against torch's own, against formulas in double precision, and against dense Adam."""

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

from pipeline import optimizers, parallel
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.optimizers import AdamW, LazyAdam, RowAdagrad, SparseAdam, coalesced, merged
from pipeline.tasks.mmoe.config import MmoeConfig

torch.set_num_threads(1)

ROWS = 40
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


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1, 3, 8, 10]))
def test_sparse_adam_is_torchs(seed: int, count: int, width: int) -> None:
    steps, settings = steps_of(seed, count, width), {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    expected = run(lambda table: torch.optim.SparseAdam([table], **settings), steps, width)
    torch.testing.assert_close(run(lambda table: SparseAdam(table, **settings), steps, width), expected)


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1, 3, 8, 10]))
def test_row_adagrad_is_its_formula(seed: int, count: int, width: int) -> None:
    steps = steps_of(seed, count, width)
    table, total = table_of(width).detach().double().numpy(), np.zeros(ROWS)
    for rows, values in steps:
        for row, gradient in zip(rows.tolist(), values.double().numpy(), strict=True):
            total[row] += sum(gradient**2) / width
            table[row] -= 0.1 * gradient / (math.sqrt(total[row]) + 1e-6)
    found = run(lambda own: RowAdagrad(own, lr=0.1, eps=1e-6), steps, width)
    np.testing.assert_allclose(found.numpy(), table, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1, 8, 10]))
def test_lazy_adam_is_adam_where_every_row_is_used(seed: int, count: int, width: int) -> None:
    random = torch.Generator().manual_seed(seed)
    steps = [(torch.arange(ROWS), torch.randn(ROWS, width, generator=random)) for _ in range(count)]
    dense = table_of(width)
    adam = torch.optim.Adam([dense], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    for _, values in steps:
        dense.grad = values
        adam.step()
    found = run(lambda table: LazyAdam(table, lr=0.03, betas=(0.8, 0.95), eps=1e-6), steps, width)
    torch.testing.assert_close(found, dense.detach())


@pytest.mark.parametrize("idle", [1, 2, 7, 40, 500])
def test_lazy_adam_makes_up_for_the_steps_a_row_was_not_used_in(idle: int) -> None:
    """Against dense Adam with gradients of 0 meanwhile; late enough that its bias corrections have come to rest."""
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-12}
    lazy, dense = table_of(4), table_of(4)
    ours, adam = LazyAdam(lazy, **settings), torch.optim.Adam([dense], **settings)
    random = torch.Generator().manual_seed(1)
    others = torch.arange(ROWS // 2)
    for step in range(1000 + idle + 1):
        whole = step < 1000 or step == 1000 + idle
        rows = torch.arange(ROWS) if whole else others
        values = torch.randn(len(rows), 4, generator=random) + 0.5
        give(lazy, (rows, values))
        ours.step()
        dense.grad = torch.zeros(ROWS, 4)
        dense.grad[rows] = values
        adam.step()
    moved = (dense.detach() - table_of(4).detach())[ROWS // 2 :]
    assert moved.abs().max() > 0.5
    torch.testing.assert_close(lazy.detach(), dense.detach(), rtol=2e-4, atol=2e-4)


def test_lazy_adam_by_hand() -> None:
    """b1 = 1/2, b2 = 9/16: ratio 2/3. One gradient of 1, two steps without, then a gradient of 0.

    After step 1: m = 1/2, v = 7/16, both corrected to 1: the row moves by lr. At step 4 the tail of the two skipped
    ones is 2/3 + 4/9 = 10/9 times rate m / (scale sqrt v), with the corrections of step 4.
    """
    table, other = nn.Parameter(torch.zeros(2, 1)), torch.tensor([1])
    optimizer = LazyAdam(table, lr=0.1, betas=(0.5, 9 / 16), eps=1e-30)
    for rows, value in ((torch.tensor([0]), 1.0), (other, 1.0), (other, 1.0), (torch.tensor([0]), 0.0)):
        table.grad = torch.sparse_coo_tensor(rows[None], torch.tensor([[value]]), (2, 1), check_invariants=True)
        optimizer.step()
    rate, scale = 0.1 / (1 - 0.5**4), 1 / math.sqrt(1 - (9 / 16) ** 4)
    tail = 10 / 9 * rate * (1 / 2) / (scale * math.sqrt(7 / 16))
    last = rate * (1 / 16) / (scale * math.sqrt(7 / 16 * (9 / 16) ** 3))
    assert table[0].item() == pytest.approx(-(0.1 + tail + last), rel=1e-5)


MAKERS: dict[str, Callable[[nn.Parameter], Any]] = {
    "row_adagrad": lambda table: RowAdagrad(table, lr=0.1),
    "sparse_adam": lambda table: SparseAdam(table, lr=0.05),
    "lazy_adam": lambda table: LazyAdam(table, lr=0.05),
}


@pytest.mark.parametrize("name", MAKERS)
def test_compiled_is_what_the_tensors_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that a GPU takes, on the CPU."""
    steps = steps_of(3, 30, 10)
    expected = run(MAKERS[name], steps, 10)
    for own, tensors in (("_row_adagrad_all", "row_adagrad"), ("_adam_all", "adam"), ("_lazy_adam_all", "lazy_adam")):
        monkeypatch.setattr(optimizers, own, getattr(optimizers, tensors))
    monkeypatch.setattr(optimizers, "_run", lambda move, tensors, numbers: move(*tensors, *numbers))
    torch.testing.assert_close(run(MAKERS[name], steps, 10), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(4, 20, 8)
    expected = run(MAKERS[name], steps, 8)
    monkeypatch.setattr(parallel, "LEAST", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(run(MAKERS[name], steps, 8), expected)


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


def weights_of() -> list[nn.Parameter]:
    """One of them in another order of memory, as the experts' first layer is."""
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 7, generator=random), torch.randn(6, 4, 3, generator=random).transpose(0, 1),
             torch.randn(11, generator=random)]  # fmt: skip
    return [nn.Parameter(part) for part in parts]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_to_the_bit(decay: float) -> None:
    own, theirs = weights_of(), weights_of()
    groups = [{"params": [0, 1], "lr": 0.02, "weight_decay": decay}, {"params": [2], "lr": 0.3, "weight_decay": 0.0}]
    ours = AdamW([group | {"params": [own[one] for one in group["params"]]} for group in groups], eps=1e-6)
    reference = torch.optim.AdamW(
        [group | {"params": [theirs[one] for one in group["params"]]} for group in groups], eps=1e-6, fused=True
    )
    random = torch.Generator().manual_seed(1)
    for step in range(12):
        for one, other in zip(own, theirs, strict=True):
            gradient = torch.randn(one.shape, generator=random)
            one.grad, other.grad = (torch.empty_like(one).copy_(gradient) for _ in range(2))
        if step % 3 == 1:
            own[0].grad = theirs[0].grad = None  # a part that a step does not use
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step == 6:
            again = AdamW([group | {"params": [own[one] for one in group["params"]]} for group in groups], eps=1e-6)
            again.load_state_dict(copy.deepcopy(ours.state_dict()))
            ours = again
        assert all(torch.equal(one, other) for one, other in zip(own, theirs, strict=True))
    assert not torch.equal(own[2], weights_of()[2])


def test_the_state_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="another"):
        AdamW([{"params": weights_of()}]).load_state_dict(AdamW([{"params": weights_of()[:2]}]).state_dict())


def test_coalesced_by_hand() -> None:
    """Increasing rows are taken as they are; others are sorted and added up."""
    values = torch.tensor([[1.0], [2.0], [4.0]])
    ordered = torch.sparse_coo_tensor(torch.tensor([[1, 4, 6]]), values, (9, 1), is_coalesced=False)
    assert coalesced(ordered).is_coalesced()
    assert coalesced(ordered).values().data_ptr() == ordered._values().data_ptr()
    repeated = torch.sparse_coo_tensor(torch.tensor([[6, 1, 6]]), values, (9, 1))
    assert coalesced(repeated).indices().tolist() == [[1, 6]]
    assert coalesced(repeated).values().tolist() == [[2.0], [5.0]]


def embedding_config(**values: str) -> MmoeConfig:
    return load(MmoeConfig, None, {f"optim.embedding.{key}": value for key, value in values.items()})


def test_what_the_config_says_of_the_embedding() -> None:
    config = embedding_config(name="row_adagrad", lr="0.005", betas="[0.8, 0.9]")
    assert config.warnings(frozenset({"optim.embedding.betas"})) == [
        "optim.embedding.lr is 0.005 with row_adagrad; usual: 0.01-0.2",
        "optim.embedding.betas has no effect with optim.embedding.name row_adagrad",
    ]
    assert embedding_config(name="row_adagrad", lr="0.05").warnings() == []
    assert embedding_config(name="lazy_adam", betas="[0.9, 0.82]").optim.embedding.betas == (0.9, 0.82)
    with pytest.raises(UserError, match=r"betas\[1\] over betas\[0\] squared"):
        embedding_config(name="lazy_adam", betas="[0.9, 0.81]")
    with pytest.raises(UserError, match="row_adagrad"):
        embedding_config(name="adagrad")


@given(st.lists(st.lists(st.integers(0, 30), unique=True).map(sorted), min_size=1, max_size=5), st.integers(0, 99))
def test_merged_gradients_are_their_sum(parts: list[list[int]], seed: int) -> None:
    """Against torch's own sum of duplicates, in exact numbers."""
    rows = torch.tensor([row for part in parts for row in part], dtype=torch.int64)
    values = torch.randint(-99, 99, (len(rows), 3), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.sparse_coo_tensor(rows[None], values, (31, 3)).coalesce()
    found, total = merged(rows, values)
    assert found.tolist() == expected.indices()[0].tolist()
    assert torch.equal(total, expected.values())
