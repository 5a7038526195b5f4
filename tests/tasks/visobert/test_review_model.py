"""Encoders, pooling and heads, against naive ones."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED, EmbeddedModelConfig, ModelConfig
from pipeline.tasks.visobert.encoders.embedded_encoder import ChannelDropout, Convolution, EmbeddedEncoder, Recurrence
from pipeline.tasks.visobert.model import AspectSentimentModel, build_model, layers_from_the_top
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN
from pipeline.tasks.visobert.tokenizer import Tokens

torch.set_num_threads(1)
pytestmark = pytest.mark.xdist_group("review model")  # one process imports transformers and makes the models

P, N, U = 0, 1, 2
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)
POOLINGS = ("pooler", "cls", "aspect_attention")
VOCABULARY = 40

Floats = npt.NDArray[np.float64]


class Ids(NamedTuple):
    """As much of a tokenizer as a model asks for."""

    size: int = VOCABULARY
    pad_id: int = 0
    mask_id: int = 3
    digest: str = ""

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 24, "type_vocab_size": 2, "pad_token_id": 0},
    "roberta": {"max_position_embeddings": 26, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"max_position_embeddings": 24, "pad_token_id": 0},
}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 20}  # fmt: skip
DISTILLED = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 20}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small pretrained models of three kinds, with random weights."""
    from transformers import AutoConfig, AutoModel

    folders_by_kind = {}
    for kind, options in ARCHITECTURES.items():
        sizes = DISTILLED if kind == "distilbert" else SIZES
        torch.manual_seed(len(kind))
        model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **options))
        scrambled(model)
        folders_by_kind[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders_by_kind[kind])
    return folders_by_kind


def scrambled(model: nn.Module, std: float = 0.3) -> Any:
    """Every weight random: what starts at 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=std, generator=generator)
    return model.eval()


def model_config(name: object, **options: Any) -> ModelConfig:
    small = EmbeddedModelConfig(width=16, layers=2)
    return ModelConfig(**({"name": str(name), "hidden": 12, "max_tokens": 24, "embedded": small} | options))


def built(name: object, aspects: int = 3, weights: bool = True, **options: Any) -> AspectSentimentModel:
    return build_model(model_config(name, **options), aspects, Ids(), weights=weights)


def batch_of(lengths: Sequence[int], longest: int | None = None, pad: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), longest or max(lengths)), pad, dtype=torch.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, VOCABULARY, (length,), generator=generator)
    return ids, torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)


def weights_of(model: nn.Module) -> dict[str, Floats]:
    return {name: weight.detach().double().numpy() for name, weight in model.state_dict().items()}


# ---------------------------------------------------------------- the small encoder


def sigmoid(x: Floats) -> Floats:
    values: Floats = 1 / (1 + np.exp(-x))
    return values


def normalised(weights: Mapping[str, Floats], x: Floats) -> Floats:
    values: Floats = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    return values


def linear_of_window(weights: Mapping[str, Floats], x: Floats, place: int) -> Floats:
    """The normalised vectors before, at and after a place, zeros beyond the review, through the linear layer."""
    width = x.shape[1]
    around = range(place - 1, place + 2)
    parts = [normalised(weights, x[index]) if 0 <= index < len(x) else np.zeros(width) for index in around]
    values: Floats = weights["linear.weight"] @ np.concatenate(parts) + weights["linear.bias"]
    return values


def naive_convolution(weights: Mapping[str, Floats], x: Floats) -> Floats:
    return np.stack([x[place] + np.maximum(0, linear_of_window(weights, x, place)) for place in range(len(x))])


def naive_recurrence(weights: Mapping[str, Floats], x: Floats) -> Floats:
    """Channel by channel; the second half of them reads from the last token to the first."""
    length, width = x.shape
    outputs = x.copy()
    for channel in range(width):
        places = range(length) if channel < width // 2 else range(length - 1, -1, -1)
        state = 0.0
        for place in places:
            every = linear_of_window(weights, x, place)
            candidate, update, output = (every[part * width + channel] for part in range(3))
            gate = sigmoid(update)
            state = (1 - gate) * state + gate * math.tanh(candidate)
            outputs[place, channel] += sigmoid(output) * state
    return outputs


@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize(("kind", "naive"), [(Convolution, naive_convolution), (Recurrence, naive_recurrence)])
def test_blocks(kind: type[nn.Module], naive: Callable[..., Floats], width: int) -> None:
    block = scrambled(kind(width, 0.5)).double()
    weights = weights_of(block)
    lengths = [7, 3, 1]
    _, mask = batch_of(lengths)
    x = torch.randn(3, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(-1)
    with torch.no_grad():
        outputs = block(x, mask.unsqueeze(-1).double())
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            outputs[row, :length], naive(weights, x[row, :length].numpy()), rtol=1e-9, atol=1e-12
        )


def test_the_small_encoder_is_its_blocks_one_after_the_other() -> None:
    encoder = scrambled(EmbeddedEncoder(EmbeddedModelConfig(width=4, layers=2), VOCABULARY, 0, 3)).double()
    ids, mask = batch_of([5, 2])
    with torch.no_grad():
        encoded = encoder(ids, mask)
    assert encoded.pooled is None
    weights = weights_of(encoder)
    for row, length in enumerate([5, 2]):
        x = weights["embedding.weight"][ids[row, :length].long().numpy()]
        for number, naive in enumerate((naive_convolution, naive_recurrence) * 2):
            prefix = f"layers.{number}."
            own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            x = naive(own, x)
        expected = np.stack([normalised(weights, values) for values in x])
        np.testing.assert_allclose(encoded.hidden[row, :length], expected, rtol=1e-8, atol=1e-10)


def test_channels_are_dropped_along_a_whole_review() -> None:
    torch.manual_seed(0)
    dropout = ChannelDropout(0.25)
    x = torch.ones(400, 5, 20)
    dropped = dropout(x)
    assert (dropped == dropped[:, :1]).all()
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert (dropped[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(ChannelDropout(0.0).train()(x), x)


def test_hidden_tokens_become_the_mask() -> None:
    """All channels of an embedding of one token are that token's number, so that the input can be read off."""
    encoder = EmbeddedEncoder(EmbeddedModelConfig(width=2, dropout=0, token_dropout=0.3), VOCABULARY, 0, 3)
    seen: list[Tensor] = []
    encoder.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    ids, mask = batch_of([30, 12] * 100)
    encoder.train()(ids, mask)
    changed = seen[0] != ids
    assert set(seen[0][changed].tolist()) == {3}
    assert not (changed & ~mask).any()
    assert changed[mask].float().mean().item() == pytest.approx(0.3, abs=0.03)
    encoder.eval()(ids, mask)
    assert torch.equal(seen[1], ids)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_the_small_encoder_under_mixed_precision(kind: torch.dtype) -> None:
    """training.amp is the user's to choose for it too."""
    model = scrambled(built(EMBEDDED))
    ids, mask = batch_of([9, 4, 1])
    with torch.no_grad():
        exact = model(ids, mask)
        with torch.autocast("cpu", dtype=kind):
            rounded = model(ids, mask)
    # bf16 rounds by 2^-8, twice in each of four blocks and of two layers of the heads
    size = float(exact.sentiment.abs().max())
    torch.testing.assert_close(rounded.sentiment.float(), exact.sentiment, rtol=0, atol=12 * 2**-8 * size)


# ---------------------------------------------------------------- pooling and heads


ENCODERS = [(kind, pooling) for kind in (EMBEDDED, "bert", "roberta", "distilbert") for pooling in POOLINGS
            if pooling != "pooler" or kind in ("bert", "roberta")]  # fmt: skip


@pytest.mark.parametrize(("kind", "pooling"), ENCODERS)
def test_padding_and_neighbours_change_nothing(folders: dict[str, Path], kind: str, pooling: str) -> None:
    model = scrambled(built(folders.get(kind, EMBEDDED), pooling=pooling))
    lengths = [11, 1, 6, 20]
    ids, mask = batch_of(lengths, 24, pad=1 if kind == "roberta" else 0)
    with torch.no_grad():
        together = model(ids, mask)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
            # another shape may have another kernel: some 300 roundings of 6e-8, on logits of size 5
            torch.testing.assert_close(together.sentiment[row], alone.sentiment[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(together.aspect[row], alone.aspect[0], rtol=0, atol=1e-4)
        junk = torch.where(mask, ids, 5)  # what lies under the padding
        if kind != "roberta":  # its positions follow from the ids
            torch.testing.assert_close(model(junk, mask).sentiment, together.sentiment, rtol=0, atol=1e-4)
    assert together.sentiment.std() > 0.05  # not all the same


def naive_heads(model: AspectSentimentModel, hidden: Floats, pooled: Floats | None, pooling: str) -> tuple[Any, Any]:
    """Logits of one review, aspect by aspect. hidden [L, H]"""
    weights = weights_of(model)
    sentiment, aspect = [], []
    for index in range(model.aspects):
        if pooling == "pooler":
            assert pooled is not None
            seen = pooled
        elif pooling == "cls":
            seen = hidden[0]
        else:
            scores = hidden @ weights["queries"][index]
            shares = np.exp(scores - scores.max())
            seen = (shares / shares.sum()) @ hidden
        if "dense.weight" in weights:
            seen = np.maximum(0, weights["dense.weight"] @ seen + weights["dense.bias"])
        for name, outputs, logits in (("sentiment", 3, sentiment), ("aspect", 1, aspect)):
            if pooling == "aspect_attention":
                matrix, bias = weights[f"heads.{name}.weight"][index].T, weights[f"heads.{name}.bias"][index]
            else:
                rows = slice(outputs * index, outputs * (index + 1))
                matrix = weights[f"heads.{name}.linear.weight"][rows]
                bias = weights[f"heads.{name}.linear.bias"][rows]
            logits.append(matrix @ seen + bias)
    return np.array(sentiment), np.array(aspect)[:, 0]


@pytest.mark.parametrize("hidden", [None, 12])
@pytest.mark.parametrize(("kind", "pooling"), [one for one in ENCODERS if one[0] in (EMBEDDED, "bert")])
def test_pooling_and_heads(folders: dict[str, Path], kind: str, pooling: str, hidden: int | None) -> None:
    model = scrambled(built(folders.get(kind, EMBEDDED), pooling=pooling, hidden=hidden)).double()
    lengths = [6, 2]
    ids, mask = batch_of(lengths)
    with torch.no_grad():
        encoded, output = model.encoder(ids, mask), model(ids, mask)
    for row, length in enumerate(lengths):
        states = encoded.hidden[row, :length].numpy()
        pooled = None
        if pooling == "pooler":
            weights = weights_of(model)
            matrix, bias = (weights[f"encoder.model.pooler.dense.{part}"] for part in ("weight", "bias"))
            pooled = np.tanh(matrix @ states[0] + bias)
        sentiment, aspect = naive_heads(model, states, pooled, pooling)
        # attention is made in single precision throughout
        np.testing.assert_allclose(output.sentiment[row], sentiment, rtol=0, atol=1e-4)
        np.testing.assert_allclose(output.aspect[row], aspect, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "aspect_attention"])
def test_a_review_without_tokens_has_finite_logits(pooling: str) -> None:
    """Not every tokenizer marks the start: an empty text may have no token at all. Its neighbours do not notice."""
    model = scrambled(built(EMBEDDED, pooling=pooling))
    ids, mask = batch_of([4, 3])
    mask[1] = False
    with torch.no_grad():
        together, alone = model(ids, mask), model(ids[:1], mask[:1])
    torch.testing.assert_close(together.sentiment[0], alone.sentiment[0], rtol=0, atol=1e-4)
    assert together.sentiment.isfinite().all()
    assert together.aspect.isfinite().all()


def test_the_encoder_is_that_of_transformers(folders: dict[str, Path]) -> None:
    from transformers import AutoModel

    ids, mask = batch_of([9, 4])
    for kind in ("bert", "roberta", "distilbert"):
        pooling = "cls" if kind == "distilbert" else "pooler"
        ours = built(folders[kind], pooling=pooling).eval()
        theirs = AutoModel.from_pretrained(folders[kind]).eval()
        with torch.no_grad():
            encoded = ours.encoder(ids, mask)
            expected = theirs(input_ids=ids.long(), attention_mask=mask.long())
        torch.testing.assert_close(encoded.hidden[mask], expected.last_hidden_state[mask], rtol=0, atol=1e-4)
        if kind != "distilbert":
            torch.testing.assert_close(encoded.pooled, expected.pooler_output, rtol=0, atol=1e-4)


def test_without_detection_there_is_no_second_head() -> None:
    model = built(EMBEDDED, aspect_detection=False)
    output = model(*batch_of([4]))
    assert output.aspect is None
    assert not model.detects
    assert not [name for name in model.state_dict() if "aspect" in name]
    model.start_from(torch.tensor([0.1, 0.2, 0.3]))


# ---------------------------------------------------------------- parameters


def count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_the_published_size(tmp_path: Path) -> None:
    """ViSoBERT with its pooler, 768 -> 512 and 512 -> 33: 97,976,609; 590,592 fewer without the pooler."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    tree = {"model_type": "xlm-roberta", "vocab_size": 15005, "max_position_embeddings": 514, "type_vocab_size": 1,
            "pad_token_id": 1, **sizes}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(tree))
    options: dict[str, Any] = {"hidden": 512, "aspect_detection": False, "init": "random", "max_tokens": 512}
    with torch.device("meta"):
        assert count(built(tmp_path, 11, pooling="pooler", **options)) == 97_976_609
        assert count(built(tmp_path, 11, pooling="cls", **options)) == 97_386_017


@pytest.mark.parametrize(("kind", "layers"), [(EMBEDDED, 4), ("bert", 3), ("roberta", 3), ("distilbert", 3)])
def test_layers_are_numbered_from_the_last_one(folders: dict[str, Path], kind: str, layers: int) -> None:
    encoder = built(folders.get(kind, EMBEDDED), pooling="cls" if kind != "bert" else "pooler").encoder
    by_steps = layers_from_the_top(encoder)
    assert list(by_steps) == list(range(layers + 1))
    place = {name: steps for steps, parameters in by_steps.items() for name, _ in parameters}
    assert sorted(place) == sorted(name for name, _ in encoder.named_parameters())
    for name, steps in place.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            assert steps == layers - 1 - number, name
        else:
            assert steps == (layers if "embedding" in name else 0), name
    assert len({id(weight) for parameters in by_steps.values() for _, weight in parameters}) == len(place)


# ---------------------------------------------------------------- pretrained weights


@pytest.mark.parametrize("options", [{"weights": False}, {"init": "random"}])
def test_random_weights(folders: dict[str, Path], options: dict[str, Any]) -> None:
    saved = load_file(folders["bert"] / "model.safetensors")
    torch.manual_seed(0)
    weights = built(folders["bert"], **options).encoder.state_dict()
    assert not [name for name, weight in weights.items() if weight.ndim > 1
                and torch.equal(weight, saved[name.removeprefix("model.")])]  # fmt: skip


@pytest.mark.parametrize("damage", ["bytes that are no tensors", "a config of another size"])
def test_weights_that_cannot_be_loaded(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    tree = json.loads((folders["bert"] / "config.json").read_text())
    content = (folders["bert"] / "model.safetensors").read_bytes()
    if damage == "bytes that are no tensors":
        content = bytes(40)
    else:
        tree["intermediate_size"] = 28
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "model.safetensors").write_bytes(content)
    assert str(tmp_path) in user_error(lambda: built(tmp_path))


def test_half_precision_files_are_loaded_in_single(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folders["bert"] / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    saved = {name: tensor.bfloat16() for name, tensor in load_file(folders["bert"] / "model.safetensors").items()}
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    weights = built(tmp_path).encoder.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(weights[f"model.{name}"], saved[name].float())


def without(folder: Path, target: Path, lost: str) -> Path:
    """A copy of a model whose weights lack the tensors of that name."""
    (target / "config.json").write_text((folder / "config.json").read_text())
    kept = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not name.startswith(lost)
    }
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def user_error(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_incomplete_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = without(folders["bert"], tmp_path, "encoder.layer.1.output.dense")
    message = user_error(lambda: built(folder))
    assert "lack 2 of the encoder's tensors (encoder.layer.1.output.dense.bias" in message
    assert "model.init: random" in message
    assert count(built(folder, init="random")) == count(built(folders["bert"]))


def test_a_missing_pooler_starts_anew_and_is_reported(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without(folders["bert"], tmp_path, "pooler")
    built(folder, pooling="cls")
    assert "model.pooling" not in capsys.readouterr().out
    built(folder, pooling="pooler")
    assert f"model.pooling: the weights of {folder} have no pooler: it starts from new ones" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_no_more_tokens_than_positions(folders: dict[str, Path], kind: str) -> None:
    """RoBERTa counts positions from the id after its padding's: 26 of them are 24 tokens."""
    model = built(folders[kind], pooling="cls", max_tokens=24)
    model(*batch_of([24, 3], pad=ARCHITECTURES[kind]["pad_token_id"]))
    message = user_error(lambda: built(folders[kind], pooling="cls", max_tokens=25))
    assert "model.max_tokens: found 25" in message
    assert message.endswith("at most 24")


def test_a_tokenizer_that_is_larger_than_the_model(folders: dict[str, Path]) -> None:
    config = model_config(folders["bert"])
    assert "41 entries" in user_error(lambda: build_model(config, 3, Ids(size=41), weights=True))


@pytest.mark.parametrize("kind", [EMBEDDED, "distilbert"])
def test_a_missing_pooler_is_refused(folders: dict[str, Path], kind: str) -> None:
    name = folders.get(kind, EMBEDDED)
    assert "allowed: cls, aspect_attention" in user_error(lambda: built(name, pooling="pooler"))
