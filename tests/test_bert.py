"""The forward pass of BERT's kind of encoder: against transformers' own, and its parts against formulas of torch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from pipeline.compiled import narrowed
from pipeline.tasks.visobert import bert, kernels
from pipeline.tasks.visobert.bert import Dropout, encode, is_bert, product_type
from pipeline.tasks.visobert.model import PretrainedEncoder

torch.set_num_threads(1)
pytestmark = pytest.mark.xdist_group("review model")  # one process imports transformers

VOCABULARY, WIDTH = 50, 24
BOTH = (torch.float32, torch.bfloat16)
TENTH = 6554  # of 65,536
KINDS = {"bert": 0, "roberta": 1, "xlm-roberta": 1}  # and the padding's id


def their_model(kind: str, dropout: float = 0.0) -> Any:
    """A small one of transformers with random weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=30, type_vocab_size=2, pad_token_id=KINDS.get(kind, 0),
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModel.from_config(config, add_pooling_layer=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return model.train()


def batch(kind: str, lengths: tuple[int, ...] = (9, 1, 20, 13)) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    return torch.where(mask, ids, KINDS[kind]), mask


def hidden_of_theirs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
    return found


def gradients(model: nn.Module, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of the weights, of a loss in which every number of a token's state has its own weight."""
    model.zero_grad(set_to_none=True)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)) * mask.unsqueeze(-1)
    (hidden * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_transformers(kind: str) -> None:
    model = their_model(kind)
    ids, mask = batch(kind)
    theirs = hidden_of_theirs(model, ids, mask)
    expected = gradients(model, theirs, mask)
    ours = encode(model, ids, mask, torch.float32)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=2e-6)
    found = gradients(model, ours, mask)
    assert found.keys() == expected.keys()
    assert len(found) == len(list(model.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(encode(model.eval(), ids, mask, torch.float32), ours.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_further_from_the_truth_than_transformers(kind: str) -> None:
    model = their_model(kind)
    ids, mask = batch(kind)
    exact = hidden_of_theirs(model, ids, mask).detach()
    true = gradients(model, hidden_of_theirs(model, ids, mask), mask)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = hidden_of_theirs(model, ids, mask)
        assert product_type(model, ids) == torch.bfloat16
        ours = encode(model, ids, mask, torch.bfloat16)
    assert ours.dtype == torch.float32
    assert 0 < _distance(ours[mask], exact[mask]) < 1.25 * _distance(theirs[mask], exact[mask])
    expected, found = gradients(model, theirs, mask), gradients(model, ours, mask)
    missed = [sum(_distance(one[name], true[name]) for name in true) for one in (found, expected)]
    assert missed[0] < 1.25 * missed[1]


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / (other.norm() + 1e-6))


def test_a_review_without_a_token_is_no_nan_and_no_neighbour_of_others() -> None:
    model = their_model("bert")
    ids, mask = batch("bert")
    expected = encode(model, ids, mask, torch.float32)
    mask[1] = False
    found = encode(model, ids, mask, torch.float32)
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask], expected[mask])


def test_what_is_not_finite_stays_so() -> None:
    model = their_model("bert")
    ids, mask = batch("bert")
    for broken in (math.nan, math.inf):
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[ids[0, 0], 0] = broken
        for kind in BOTH:
            assert not encode(model, ids, mask, kind)[0, 0].isfinite().any()


def test_it_is_taken_where_it_can_be_and_only_there() -> None:
    model = their_model("roberta", dropout=0.1)
    ids, mask = batch("roberta")
    encoder = PretrainedEncoder(model, keep_pooler=False)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    encoder(ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(ids, mask)
    assert not calls
    with torch.autocast("cpu", torch.float16):
        assert product_type(model, ids) is None
        encoder(ids, mask)
    encoder.double()(ids, mask)
    assert len(calls) == 2
    assert product_type(model, ids.to("meta")) is None
    unusual = their_model("bert")
    unusual.config.hidden_act = "relu"
    assert not is_bert(unusual)
    assert is_bert(their_model("bert"))


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("kind", BOTH, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(share: float, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    module, count = Dropout(share), round(share * 65536)
    found = module(torch.ones(500, 999, dtype=kind)).float()
    kept = found != 0
    size = found.numel()
    assert abs(kept.float().mean().item() - (1 - count / 65536)) < 5 * math.sqrt(share * (1 - share) / size)
    expected = torch.tensor(65536 / (65536 - count)).to(kind).float()
    assert torch.equal(found[kept], expected.expand(int(kept.sum())))


def test_dropped_values_are_independent() -> None:
    """Of neighbours in a row, of rows, of places in a word and of calls: correlations as small as chance makes them."""
    torch.manual_seed(0)
    module = Dropout(0.3)
    first, second = (module(torch.ones(800, 640)) != 0 for _ in range(2))
    one, two = ((kept.double() - 0.7) / math.sqrt(0.21) for kept in (first, second))
    pairs = [(one, two)] + [(one[:, lag:], one[:, :-lag]) for lag in (1, 2, 3, 4, 8, 160)]
    pairs += [(one[lag:], one[:-lag]) for lag in (1, 2, 17)]
    for left, right in pairs:
        assert abs((left * right).mean().item()) * math.sqrt(left.numel()) < 5
    for axis, size in ((0, 800), (1, 640)):  # no row and no column is dropped more than others
        assert (one.mean(axis).abs() * math.sqrt(size)).max() < 5


def test_dropout_follows_torchs_generator() -> None:
    torch.manual_seed(7)
    module, x = Dropout(0.2), torch.randn(6, 5, 33, requires_grad=True)
    state = torch.get_rng_state()
    one, other = module(x), module(x)
    torch.set_rng_state(state)
    assert torch.equal(module(x), one)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one[one != 0], (x / 0.8)[one != 0], rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(one.sum(), x)
    assert torch.equal(gradient != 0, one != 0)
    assert torch.equal(module.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()


@pytest.mark.parametrize("kind", BOTH, ids=str)
def test_a_whole_step_follows_torchs_generator(kind: torch.dtype) -> None:
    """What a checkpoint keeps of the random state is enough for the same bits again."""
    model = their_model("roberta", dropout=0.3)
    ids, mask = batch("roberta")
    state = torch.get_rng_state()
    one = gradients(model, encode(model, ids, mask, kind), mask)
    other = gradients(model, encode(model, ids, mask, kind), mask)
    torch.set_rng_state(state)
    again = gradients(model, encode(model, ids, mask, kind), mask)
    assert all(torch.equal(again[name], gradient) for name, gradient in one.items())
    last = "encoder.layer.1.output.LayerNorm.bias"  # what it gets depends on no state
    same = [name for name, gradient in one.items() if torch.equal(other[name], gradient) and gradient.any()]
    assert same == [last]
    still = [encode(model.eval(), ids, mask, kind) for _ in range(2)]
    assert torch.equal(still[0], still[1])


def test_every_dropout_of_the_model_acts() -> None:
    """Switched on one by one: each changes the states, on average to what they are without."""
    ids, mask = batch("bert")
    model = their_model("bert")
    calm = encode(model, ids, mask, torch.float32).detach()
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(modules) == 1 + 3 * 2
    for module in modules:
        module.p = 0.2
        changed = encode(model, ids, mask, torch.float32)
        assert (changed - calm)[mask].abs().mean() > 0.01
        module.p = 0.0
    torch.testing.assert_close(encode(model, ids, mask, torch.float32), calm)


# ---------------------------------------------------------------- parts, with dropout, against formulas


def mask_of(rows: int, width: int, count: int, key: int) -> Tensor:
    """0 where a value is dropped, else what it is multiplied by."""
    return bert._drop(torch.ones(rows, width), count, key)


def same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    found, expected = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 50), st.sampled_from([0, TENTH, 40_000]), st.integers(0, 2**62))
def test_normalised_sums(rows: int, width: int, count: int, key: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, residual = (torch.randn(rows, width, generator=generator).requires_grad_() for _ in range(2))
    weight, shift = (torch.randn(width, generator=generator).requires_grad_() for _ in range(2))
    inputs = [x, residual, weight, shift]
    ours = bert._Normed.apply(*inputs, 1e-3, count, key)
    theirs = layer_norm(residual + x * mask_of(rows, width, count, key), (width,), weight, shift, 1e-3)
    same_gradients(ours, theirs, inputs)


def test_both_precisions_of_a_normalised_sum_share_their_gradient() -> None:
    x = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    residual, weight, shift = torch.randn(5, 16), torch.randn(16, requires_grad=True), torch.randn(16)
    out, low = bert._Normed.apply(x, residual, weight, shift, 1e-5, TENTH, 9)
    assert torch.equal(low, out.bfloat16())
    together = torch.autograd.grad(out.sum() + 2 * low.float().sum(), weight, retain_graph=True)[0]
    once = torch.autograd.grad(out.sum(), weight, retain_graph=True)[0]
    of_low = torch.autograd.grad(low.float().sum(), weight)[0]
    torch.testing.assert_close(once, of_low)
    torch.testing.assert_close(together, 3 * once)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 11), min_size=1, max_size=4), st.sampled_from([1, 3]), st.integers(1, 9),
    st.sampled_from([0, TENTH, 40_000]), st.integers(0, 2**62),
)  # fmt: skip
def test_attention(lengths: list[int], heads: int, width: int, count: int, key: int) -> None:
    reviews, longest, size = len(lengths), max(lengths), heads * width
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    mixed = torch.randn(reviews * longest, 3 * size, generator=torch.Generator().manual_seed(5)).requires_grad_()
    ours = bert._Attention.apply(mixed, mask, heads, count, key)
    query, keys, values = mixed.view(reviews, longest, 3, heads, width).permute(2, 0, 3, 1, 4)
    scores = (query @ keys.mT / math.sqrt(width)).masked_fill(~mask[:, None, None], -math.inf)
    thinning = mask_of(reviews * heads * longest, longest, count, key).view_as(scores)
    theirs = ((scores.softmax(-1) * thinning) @ values).transpose(1, 2).reshape(-1, size)
    same_gradients(ours, theirs, [mixed])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70))
def test_transposed(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(6)).bfloat16()
    found = bert._transposed(matrix)
    assert found.is_contiguous()
    assert torch.equal(found, matrix.T)


# ---------------------------------------------------------------- numbers


@njit
def _narrow(values: Any, out: Any) -> None:
    for place in range(len(values)):
        out[place] = narrowed(values[place], out)


@njit
def _exponentials(values: Any, out: Any) -> None:
    for place in range(len(values)):
        out[place] = kernels.exponential(values[place])


def test_rounding_is_torchs() -> None:
    """To the nearest, ties to even: 1 + 2^-8 lies between two numbers of bfloat16, as does 1 + 3 * 2^-8."""
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, -3.4e38, math.inf, -math.inf, 1e-40]
    values = torch.cat([torch.tensor(special), torch.randn(10_000), torch.randn(1000) * 1e-38])
    out = np.empty(len(values), np.uint16)
    _narrow(values.numpy(), out)
    assert np.array_equal(out, values.bfloat16().view(torch.uint16).numpy())
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    out = np.empty(4, np.uint16)
    _narrow(nan.numpy(), out)
    assert torch.from_numpy(out).view(torch.bfloat16).isnan().all()


def test_exponentials() -> None:
    values = -np.concatenate([np.linspace(0, 87, 200_001), [1e-30]]).astype(np.float32)
    out = np.empty_like(values)
    _exponentials(values, out)
    np.testing.assert_allclose(out, np.exp(values.astype(np.float64)), rtol=3e-7)
    _exponentials(np.array([-1e30, -np.inf, np.nan], np.float32), out[:3])
    assert (out[:2] < 2e-38).all()
    assert np.isnan(out[2])


def test_random_bits_are_splitmix64s() -> None:
    """Its first outputs from seed 0, as published with it; the state after n steps is n times the golden ratio."""
    words = np.empty(4, np.uint64)
    kernels.random_bits(words, np.uint64(0), 0)
    assert words.tolist() == [0, 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    kernels.random_bits(words[:2], np.uint64(0), 1)  # the second row of two words
    assert words[:2].tolist() == [0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_threads_change_no_state(with_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is divided among threads comes out the same; sums over tokens differ by rounding."""
    monkeypatch.setattr("pipeline.parallel.LEAST", 7)
    model = their_model("xlm-roberta", dropout=0.1)
    ids, mask = batch("xlm-roberta")
    state = torch.get_rng_state()
    alone = encode(model, ids, mask, torch.float32)
    expected = gradients(model, alone, mask)
    with_threads(3)
    torch.set_rng_state(state)
    together = encode(model, ids, mask, torch.float32)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, together, mask).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
