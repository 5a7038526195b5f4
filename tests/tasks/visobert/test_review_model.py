"""Encoders, pooling and heads against naive ones, and the aspect sentiment task: losses, optimizers, predictions."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config.strict_config import load
from pipeline.errors import UserError
from pipeline.runtime.console import Console
from pipeline.tasks.base import evaluate, evaluating, undefined
from pipeline.tasks.visobert import evaluation, predict
from pipeline.tasks.visobert.config import EMBEDDED, EmbeddedModelConfig, ModelConfig, VisobertConfig
from pipeline.tasks.visobert.encoders.embedded_encoder import ChannelDropout, Convolution, EmbeddedEncoder, Recurrence
from pipeline.tasks.visobert.encoders.tokenizer import Tokens
from pipeline.tasks.visobert.model import AspectSentimentModel, Output, build_model, layers_from_the_top
from pipeline.tasks.visobert.reviews.review_table import ReviewBatch
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN
from pipeline.tasks.visobert.scoring import baselines, report
from pipeline.tasks.visobert.scoring.scores import tuned_thresholds
from pipeline.tasks.visobert.task import VisobertTask
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training, Window

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


def scrambled(model: nn.Module, seed: int = 0, std: float = 0.3) -> Any:
    """Every weight random: what starts at 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=std, generator=generator)
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
    assert "model.pooling" not in capsys.readouterr().err
    built(folder, pooling="pooler")
    assert f"model.pooling: the weights of {folder} have no pooler: it starts from new ones" in capsys.readouterr().err


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


# ---------------------------------------------------------------- the task

ASPECTS = ("Pin", "Camera", "Khác")
WORD = {P: "Positive", N: "Negative", U: "Neutral", O: "", M: "Neutral", X: "?"}


def reviews_file(file: Path, count: int, seed: int) -> str:
    """Reviews of very different lengths and label densities; some cells are bad labels, which are dropped."""
    random = np.random.Generator(np.random.PCG64(seed))
    words = ("pin", "trâu", "camera", "đẹp", "máy", "lag", "quá", "tệ", "bình", "thường", "giao", "nhanh", "nhé", "ok")
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["data", *ASPECTS])
        for row in range(count):
            text = " ".join(random.choice(words, int(random.integers(2, 25)))) + f" {row} {seed}"
            sparse = row % 3 == 0
            codes = random.choice([P, P, P, N, U, O, X], 2, p=[0.02, 0.02, 0.02, 0.02, 0.01, 0.9, 0.01] if sparse
                                  else [0.2, 0.1, 0.1, 0.15, 0.1, 0.3, 0.05]).tolist()  # fmt: skip
            writer.writerow([text, *(WORD[code] for code in codes), WORD[M if random.random() < 0.4 else O]])
    return str(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reviews")
    sizes = {"train": 90, "validation": 40, "test": 30}
    paths = {f"data.{name}": reviews_file(folder / f"{name}.csv", size, seed)
             for seed, (name, size) in enumerate(sizes.items())}  # fmt: skip
    return paths | {"data.cache": str(folder / "cache")}


STILL = {
    "model.name": EMBEDDED,
    "model.dropout": "0",
    "model.embedded.width": "16",
    "model.embedded.vocabulary": "300",
    "model.embedded.dropout": "0",
    "model.embedded.token_dropout": "0",
    "data.on_bad_label": "drop",
    "data.detection_only": "[Khác]",
    "training.max_steps": "6",
    "training.batch_size": "8",
    "baselines": "false",
}
Make = Callable[..., VisobertTask]


@pytest.fixture
def make(files: dict[str, str]) -> Make:
    """`make(key=value, ...)`: a task on a small model without dropout, with dotted overrides on top."""

    def task(**overrides: Any) -> VisobertTask:
        return VisobertTask(load(VisobertConfig, None, files | STILL | {k: str(v) for k, v in overrides.items()}))

    return task


def hand_losses(task: VisobertTask, output: Output, labels: Tensor) -> dict[str, float]:
    """Cell by cell in double precision."""
    config = task.config.multi_label
    z, d = output.sentiment.detach().double().numpy(), output.aspect
    sums = {"sentiment": 0.0, "aspect": 0.0}
    counts = {"sentiment": 0, "aspect": 0}
    for row, codes in enumerate(labels.tolist()):
        for aspect, code in enumerate(codes):
            if code in (P, N, U):
                shares = np.exp(z[row, aspect] - z[row, aspect].max())
                p = (shares / shares.sum())[code]
                weight = task.alpha.vector[code] * (1 - p) ** config.focal_gamma if config.use_focal_loss else 1.0
                sums["sentiment"] -= weight * math.log(p)
                counts["sentiment"] += 1
            if code != X and d is not None:
                p = 1 / (1 + math.exp(-d[row, aspect].item()))
                right = p if code != O else 1 - p
                weight = 1.0
                if config.aspect.loss == "focal":
                    weight = (1 - right) ** config.aspect.gamma
                    if config.aspect.alpha is not None:
                        weight *= config.aspect.alpha if code != O else 1 - config.aspect.alpha
                sums["aspect"] -= weight * math.log(right)
                counts["aspect"] += 1
    losses = {f"loss_{name}": total / max(1, counts[name]) for name, total in sums.items()}
    if d is None:
        del losses["loss_aspect"]
    total = config.lambda_sentiment * losses["loss_sentiment"] + config.lambda_aspect * losses.get("loss_aspect", 0)
    return losses | {"loss_total": total}


LOSSES: list[dict[str, Any]] = [
    {},
    {"multi_label.focal_gamma": 0.5, "multi_label.focal_alpha": "[0.5, 1.0, 2.0]", "multi_label.lambda_aspect": 0.3},
    {"multi_label.use_focal_loss": "false", "multi_label.lambda_sentiment": 0.7},
    {"multi_label.focal_alpha": "null", "multi_label.aspect.loss": "focal", "multi_label.aspect.gamma": 1.5},
    {"multi_label.aspect.loss": "focal", "multi_label.aspect.alpha": 0.75, "multi_label.lambda_aspect": 3},
    {"model.aspect_detection": "false", "multi_label.lambda_sentiment": 2},
    {"model.pooling": "cls", "model.hidden": 8},
]


@pytest.mark.parametrize("options", LOSSES, ids=" ".join)
def test_losses_are_those_of_a_formula(make: Make, options: dict[str, Any]) -> None:
    task = make(**options)
    torch.manual_seed(0)
    model = scrambled(task.model())
    batch = task.batch(np.arange(40))
    assert {P, N, U, O, M, X} == set(batch.labels.flatten().tolist())
    losses = task.losses(
        task.forward(model, batch), batch, task.counts(batch), 1
    )  # at step 0 influence is measured beside them
    expected = hand_losses(task, model(batch.ids, batch.mask), batch.labels)
    assert list(losses) == [*[name for name in ("loss_sentiment", "loss_aspect") if name in expected], "loss_total"]
    # some twenty operations of fp32 a cell, from logits that may be rounded otherwise beside the influence
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_counts_by_hand(make: Make) -> None:
    task = make()
    labels = torch.tensor([[P, O, M], [X, X, O], [U, N, M]], dtype=torch.int8)
    counts = task.counts(ReviewBatch(torch.zeros(3, 1), torch.ones(3, 1), labels))
    assert {name: int(value) for name, value in counts.items()} == {
        "positive": 1, "negative": 1, "neutral": 1, "labelled": 3, "known": 7,
    }  # fmt: skip


def test_unknown_cells_take_no_part(make: Make) -> None:
    """No gradient reaches their logits; a mention has one for detection alone, an absent aspect none for sentiment.

    Where nothing is labelled, nothing is lost.
    """
    task = make(**{"multi_label.aspect.loss": "focal", "multi_label.aspect.alpha": 0.25})

    def losses_and_slopes(codes: list[list[int]]) -> tuple[dict[str, float], Tensor, Tensor]:
        labels = torch.tensor(codes, dtype=torch.int8)
        output = Output(torch.randn(2, 3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True))
        losses = task.objective.terms(output, labels, task.counts(ReviewBatch(labels, labels, labels)))
        losses["loss_total"].backward()
        values = {name: loss.item() for name, loss in losses.items()}
        return values, *((part.grad != 0) for part in output.parts if part.grad is not None)

    _, sentiment, aspect = losses_and_slopes([[P, O, M], [X, U, X]])
    assert sentiment.any(-1).tolist() == [[True, False, False], [False, True, False]]
    assert aspect.tolist() == [[True, True, True], [False, True, False]]
    nothing, sentiment, aspect = losses_and_slopes([[X] * 3] * 2)
    assert nothing == {"loss_sentiment": 0, "loss_aspect": 0, "loss_total": 0}
    assert not sentiment.any()
    assert not aspect.any()


def training_of(task: VisobertTask) -> Training:
    return Training(task, MemoryRun(), Console(0, quiet=True), "cpu")


# the same rows in one piece, in pieces of other sizes, and in pieces of one kind: without any label, with few, with all
def parts_of(task: VisobertTask) -> list[list[npt.NDArray[np.int64]]]:
    rows = np.arange(30)
    labelled = ((task.data.splits.train.labels[:30] >= 0) & (task.data.splits.train.labels[:30] < 3)).sum(1)
    by_density = rows[np.argsort(labelled, kind="stable")]
    return [[rows], [rows[:1], rows[1:9], rows[9:]], np.split(by_density, [8, 20, 21]), np.split(rows, 30)]


@pytest.mark.parametrize("options", [LOSSES[0], LOSSES[4], LOSSES[5]], ids=" ".join)
def test_a_window_may_be_cut_anywhere(make: Make, options: dict[str, Any]) -> None:
    """Losses, gradients and the update are the same, however dense the labels of a micro-batch are.

    But for rounding: batches of other shapes, whose sums over 30 reviews of up to 24 tokens are added up otherwise. It
    is some 700 times 6e-8 of a gradient at the most; Adam's first step divides it by eps or more, here 1e-3. A mean of
    means would be off by tens of percents.
    """
    task = make(**options, **{"optim.encoder.eps": 1e-3, "optim.head.eps": 1e-3, "optim.encoder.lr": 1e-3,
                              "optim.head.lr": 1e-3})  # fmt: skip
    results = []
    for parts in parts_of(task):
        training = training_of(task)
        training.model.train()
        losses, _ = training._backward(Window(parts, False), [task.batch(part) for part in parts], 0)
        gradients = {name: weight.grad.clone() for name, weight in training.model.named_parameters()
                     if weight.grad is not None}  # fmt: skip
        for optimizer in training.optimizers.values():
            optimizer.zero_grad()
        training._step(Window(parts, False), [task.batch(part) for part in parts])
        results.append((losses, gradients, training.model.state_dict()))
    densities = [int(task.counts(task.batch(rows))["labelled"]) for rows in parts_of(task)[2]]
    assert densities[0] == 0
    assert max(densities) > 10
    torch.manual_seed(task.config.seed)
    started = task.model().state_dict()
    moved = [name for name, weight in started.items() if (weight - results[0][2][name]).abs().max() > 1e-5]
    assert len(moved) >= len(started) - 1  # all but the thresholds
    for losses, gradients, weights in results[1:]:
        for name, loss in losses.items():
            torch.testing.assert_close(loss, results[0][0][name], rtol=1e-4, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-5, msg=name)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][2][name], rtol=0, atol=1e-3 * 1e-5 / 1e-3, msg=name)


@pytest.mark.parametrize("pooling", ["cls", "aspect_attention"])
def test_detection_starts_from_how_often_aspects_are_mentioned(make: Make, pooling: str) -> None:
    task = make(**{"model.pooling": pooling})
    labels = task.data.splits.train.labels
    rates = [(np.isin(column, [P, N, U, M]).sum() + 1) / ((column != X).sum() + 2) for column in labels.T]
    bias = task.model().heads["aspect"].bias
    assert torch.sigmoid(bias).flatten().tolist() == pytest.approx(rates, rel=1e-5)


# ---------------------------------------------------------------- optimizers


def rates_of(task: VisobertTask) -> dict[str, tuple[str, float, float]]:
    """Parameter -> (optimizer, learning rate, weight decay)."""
    model = task.model()
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates: dict[str, tuple[str, float, float]] = {}
    for kind, optimizer in task.optimizers(model).items():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                assert names[id(weight)] not in rates
                rates[names[id(weight)]] = (kind, group["lr"], group["weight_decay"])
    assert set(rates) == set(names.values())
    return rates


def test_a_layers_rate_is_that_of_the_one_above_times_the_decay(make: Make) -> None:
    task = make(**{"model.embedded.layers": 2, "optim.encoder.lr": 0.01, "optim.encoder.layer_decay": 0.5,
                   "optim.head.lr": 0.3})  # fmt: skip
    steps = {"embedding": 4, "layers.0": 3, "layers.1": 2, "layers.2": 1, "layers.3": 0, "norm": 0}
    for name, (kind, rate, _) in rates_of(task).items():
        assert kind == ("encoder" if name.startswith("encoder.") else "head")
        if kind == "head":
            assert rate == 0.3
        else:
            prefix = next(name_part for name_part in steps if name.removeprefix("encoder.").startswith(name_part))
            assert rate == pytest.approx(0.01 * 0.5 ** steps[prefix]), name
    optimizers = task.optimizers(task.model())
    assert list(optimizers) == ["encoder", "head"]
    assert optimizers["encoder"].param_groups[0]["lr"] == 0.01  # the one that is logged as lr/encoder
    assert optimizers["encoder"].param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("pooling", ["cls", "aspect_attention"])
def test_biases_and_norms_do_not_decay(make: Make, pooling: str) -> None:
    task = make(**{"model.pooling": pooling, "model.hidden": 8, "optim.encoder.weight_decay": 0.1,
                   "optim.head.weight_decay": 0.2})  # fmt: skip
    for name, (kind, _, decay) in rates_of(task).items():
        free = name.endswith("bias") or "norm" in name
        assert decay == (0.0 if free else {"encoder": 0.1, "head": 0.2}[kind]), name


# ---------------------------------------------------------------- alpha, plans and warnings


def test_alpha_of_oversampled_data_is_that_of_what_an_epoch_draws(make: Make) -> None:
    task = make(**{"data.oversampling": "capped", "data.oversampling_ratio": 1.4,
                   "multi_label.alpha_from": "oversampled"})  # fmt: skip
    labels = task.data.splits.train.labels
    drawn = np.zeros(3)
    for epoch in range(60):
        rows = np.concatenate(list(task.plan(epoch)))
        drawn += [(labels[rows] == code).sum() for code in (P, N, U)]
    expected = drawn.sum() / (3 * drawn)
    assert task.alpha.vector == pytest.approx(expected.tolist(), rel=0.02)


def test_an_epochs_plan(make: Make) -> None:
    task, again, other = make(seed=3), make(seed=3), make(seed=4)
    drawn = [task.plan(0), again.plan(0), task.plan(1), other.plan(0)]
    plans = [[rows.tolist() for rows in plan] for plan in drawn]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]
    assert all(sorted(sum(plan, [])) == list(range(90)) for plan in plans)  # noqa: RUF017
    assert max(map(len, plans[0])) <= 8


def test_a_note_of_the_file_is_reported_once(make: Make, tmp_path: Path, files: dict[str, str]) -> None:
    """Also where one file is cut into training and validation split."""
    frame = pd.read_csv(files["data.train"], keep_default_na=False)
    frame["Sạc"] = ""
    frame.to_csv(tmp_path / "train.csv", index=False)
    values = {"data.train": tmp_path / "train.csv", "data.validation": "null", "data.test": "null"}
    warnings = list(make(**values, **{"data.validation_share": 0.3}).warnings(10))
    assert [note for note in warnings if "Sạc" in note] == [f"{tmp_path / 'train.csv'}: no review mentions Sạc"]


def test_truncated_texts_are_reported(make: Make) -> None:
    warnings = make(**{"model.max_tokens": 8}).warnings(10)
    assert [note for note in warnings if "model.max_tokens 8" in note]
    assert not [note for note in make().warnings(10) if "max_tokens" in note]


def test_copies_unknown_tokens_and_missing_texts_are_reported(
    make: Make, tmp_path: Path, files: dict[str, str]
) -> None:
    """Copies, tokens that nobody knows, and reviews without a text, which take no part in the training."""
    train = pd.read_csv(files["data.train"], keep_default_na=False)
    assert len(make().data.splits.train) == len(train)
    train.loc[:4, "data"] = ""
    train.to_csv(tmp_path / "train.csv", index=False)
    train[5:25].assign(data=lambda frame: frame["data"].str.upper() + " ").to_csv(tmp_path / "copies.csv", index=False)
    train[:6].assign(data="中").to_csv(tmp_path / "unknown.csv", index=False)  # <s>, the mark of a word, <unk>
    values = {"data.train": tmp_path / "train.csv", "data.validation": "null", "data.validation_share": 0.3}
    task = make(**values, **{"data.test": tmp_path / "copies.csv"})
    sizes = [len(reviews) for reviews in (task.data.splits.train, task.data.splits.valid)]
    assert sum(sizes) == len(train) - 5
    assert all(task.data.splits.train.texts)
    warnings = list(task.warnings(10))
    assert "20 of 20 test reviews are in train" in warnings  # or in the share of it that validates
    assert [note for note in warnings if note.startswith(f"{tmp_path / 'train.csv'}: 5 labelled reviews have no text")]
    warnings = list(make(**values, **{"data.test": tmp_path / "unknown.csv"}).warnings(10))
    assert "33.3% of the tokens of test are unknown to the tokenizer" in warnings
    assert not [note for note in warnings if "reviews are in train" in note]
    warnings = list(make(**{"data.validation": files["data.train"]}).warnings(10))
    assert f"{len(train)} of {len(train)} valid reviews are in train" in warnings


# ---------------------------------------------------------------- evaluation and predictions


def trained(task: VisobertTask) -> AspectSentimentModel:
    torch.manual_seed(task.config.seed)
    model = scrambled(task.model(), std=1.0)
    evaluate(task, model, "valid", "cpu")
    return model  # type: ignore[no-any-return]


def test_evaluation_scores_the_split_in_its_own_order(make: Make) -> None:
    task = make(**{"evaluation.batch_size": 7})
    model = scrambled(task.model(), std=0.5)
    before = model.training
    metrics = evaluate(task, model, "valid", "cpu")
    assert model.training is before
    table, reviews = task.data.table("valid"), task.data.splits.valid
    assert table is not None
    with torch.no_grad():
        alone = [model(batch.ids, batch.mask) for row in range(len(table)) for batch in [table.batch(np.array([row]))]]
    output = Output(torch.cat([batch.sentiment for batch in alone]), torch.cat([batch.aspect for batch in alone]))
    assert output.aspect is not None
    probability = torch.sigmoid(output.aspect.double()).numpy()
    np.testing.assert_allclose(model.thresholds, tuned_thresholds(reviews.labels, probability), rtol=0, atol=1e-4)
    expected = hand_losses(task, output, torch.from_numpy(reviews.labels))
    assert {name: metrics[f"valid/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    cells = np.isin(reviews.labels, [P, N, U])
    guess = output.sentiment.argmax(-1).numpy()
    assert metrics["valid/sentiment_accuracy"] == pytest.approx((guess == reviews.labels)[cells].mean())
    mentioned = probability >= model.thresholds.double().numpy()
    known, truth = reviews.labels != X, reviews.labels > O
    for index, aspect in enumerate(ASPECTS):
        hits = (mentioned & truth & known)[:, index].sum()
        both = (mentioned & known)[:, index].sum() + (truth & known)[:, index].sum()
        assert metrics[f"valid/aspect_f1/{aspect}"] == pytest.approx(2 * hits / both)
    contract = {"aspect_f1_macro", "sentiment_f1_macro", "pair_f1_micro", "f1/Pin", "f1/Camera"}
    assert {f"valid/{name}" for name in contract} <= set(metrics)
    assert "valid/f1/Khác" not in metrics


def test_optional_parts_may_fail(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A baseline, a picture, the rows of a metric, the calibration: each costs a line, and nothing else."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken\nfor good")

    for module, name in (
        (baselines, "TfidfBaseline"),
        (evaluation, "write_pair_rows"),
        (evaluation, "fit_temperature"),
    ):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(report.plots, "confusion", fail)
    task = make(baselines="true")
    model = trained(task)
    names = set(evaluate(task, model, "test", "cpu"))
    assert {name.rpartition("_")[2] for name in names if name.startswith("test/pair_f1_micro_")} == {"majority"}
    with evaluating(model):
        assert task.calibrate(model, "cpu") == {}
    with evaluating(model):
        task.report(model, tmp_path, "cpu")
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {
        f"test_{name}.csv" for name in ("aspects", "confusion", "predictions", "errors")
    }
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" (test_review_model.py, line ")[0] for line in lines] == [
        f"warning: {what} is left out: RuntimeError: broken for good"
        for what in ("the TF-IDF baseline", "the calibration of sentiment", "the calibration of aspect",
                     "plots/test_confusion.png", "evaluation/test_rows.parquet")
    ]  # fmt: skip
    monkeypatch.setattr(evaluation, "write_report", fail)
    with evaluating(model):
        task.report(model, tmp_path / "no", "cpu")
    assert "warning: the report of test is left out: RuntimeError: broken for good" in capsys.readouterr().err


def test_the_test_split_does_not_move_the_thresholds(make: Make) -> None:
    task = make()
    model = trained(task)
    before = model.thresholds.clone()
    metrics = evaluate(task, model, "test", "cpu")
    assert torch.equal(model.thresholds, before)
    assert {name.split("/")[0] for name in metrics} == {"test"}
    assert evaluate(make(**{"data.test": "null"}), model, "test", "cpu") == {}


@pytest.mark.parametrize(
    "options", [{"baselines": "true"}, {"model.aspect_detection": "false"}, {"model.calibrate": "false"}]
)
def test_known_metrics_are_those_of_an_evaluation(make: Make, options: dict[str, str]) -> None:
    task = make(**options)
    model = task.model()
    with evaluating(model):
        task.calibrate(model, "cpu")
    for split in ("valid", "test"):
        assert set(evaluate(task, model, split, "cpu")) == set(task.known_metrics(split))
        assert not any(task.known_metrics(split).values())


def test_undefined_metrics_name_the_missing_labels(make: Make) -> None:
    task = make(**{"data.test": "null"})
    assert set(task.known_metrics("test").values()) == {"needs a test split: there is none"}
    camera = task.evaluation.names.index("Camera")
    task.data.splits.valid.labels[:, camera] = X
    lacks = task.known_metrics("valid")
    assert set(evaluate(task, task.model(), "valid", "cpu")) == {name for name, why in lacks.items() if not why}
    assert {name: why for name, why in lacks.items() if why} == {
        f"valid/{kind}/Camera": "needs labels of Camera: validation has none in 40 reviews"
        for kind in ("f1", "aspect_f1")
    }
    with pytest.raises(UserError, match=r"^evaluation.metric: found valid/f1/Pni, .* did you mean valid/f1/Pin\?$"):
        undefined(task, "evaluation.metric", "valid/f1/Pni")


def assert_same_predictions(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(frame.columns) == list(expected.columns)
    for name in frame.columns:
        if "/" in name:
            # batches of other shapes: logits of size 50 are off by up to 1e-4, probabilities by a quarter of that
            np.testing.assert_allclose(frame[name], expected[name], rtol=0, atol=1e-4)
        else:
            assert frame[name].fillna("-").tolist() == expected[name].fillna("-").tolist()


@pytest.mark.parametrize("options", [{}, {"model.aspect_detection": "false"}, {"model.pooling": "cls"}], ids=str)
def test_an_exported_model_predicts_as_the_task_does(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    task = make(**options)
    model = trained(task)
    with evaluating(model):
        assert set(task.calibrate(model, "cpu")) == {"sentiment", *(["aspect"] if model.detects else [])}
    export = task.export(model, tmp_path / "model")
    table, reviews = task.data.table("test"), task.data.splits.test
    assert table is not None
    assert reviews is not None
    expected = task.evaluation.predictions(model, task.evaluation.predict(model, "test", "cpu")).frame()
    frame = predict.load(tmp_path / "model")(list(reviews.texts))
    assert_same_predictions(frame, expected)
    task.evaluation.calibration = {}
    plain = task.evaluation.predictions(model, task.evaluation.predict(model, "test", "cpu")).frame()
    assert_same_predictions(predict.load(tmp_path / "model")(list(reviews.texts), raw=True), plain)
    assert (frame.filter(like="/") - plain.filter(like="/")).abs().max().max() > 1e-3
    assert list(frame.columns) == list(export.outputs)
    assert frame.filter(like="/").std().max() > 0.01  # not all the same
    assert (export.task, export.inputs) == ("visobert", None)
    assert all(isinstance(text, str) and text for text in export.example)


@pytest.fixture
def answer(make: Make, tmp_path: Path) -> Callable[[Any], pd.DataFrame]:
    task = make()
    task.export(trained(task), tmp_path / "model")
    return predict.load(tmp_path / "model")


def test_texts_in_any_form(answer: Callable[[Any], pd.DataFrame]) -> None:
    texts = ["pin trâu", "camera tệ lắm nhé shop ơi", "ok", "pin trâu"]
    expected = answer(texts)
    assert expected.index.tolist() == [0, 1, 2, 3]
    forms = [np.array(texts, dtype=object), np.array(texts), pd.Series(texts), tuple(texts), pd.DataFrame(texts),
             pd.DataFrame({"data": texts}), pd.DataFrame({"stars": [1, 2, 3, 4], "data": texts}), {"data": texts},
             [{"id": str(row), "data": text} for row, text in enumerate(texts)], np.array(texts)[:, None]]  # fmt: skip
    for form in forms:
        pd.testing.assert_frame_equal(answer(form), expected)
    for form in (texts[0], {"data": texts[0], "id": "r1"}):
        assert_same_predictions(answer(form), expected[:1])
    index = pd.Index(["a", "b", "c", "d"])
    for form in (pd.Series(texts, index=index), pd.DataFrame({"data": texts}, index=index)):
        assert answer(form).index.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (pd.DataFrame({"id": ["r1"]}), "texts: found column 'id'; allowed: column 'data', or a list"),
        (pd.DataFrame({"id": ["r1"], "text": ["ok"]}), "texts: found column 'id', 'text'; allowed: column 'data'"),
        (pd.DataFrame([["ok", "tốt"]], columns=["data", "data"]), "texts: found column 'data', 'data'; allowed"),
        ({"id": ["r1"]}, "texts: found column 'id'; allowed"),
        ([["r1", "ok"]], "texts: found 2 columns without names; allowed"),
        (["ok", ["tốt"]], "texts: row 2: found list \"['tốt']\", allowed: text"),
        ({"data": ["ok", 5]}, "texts: row 2: found int '5', allowed: text"),
        (pd.Series([b"ok"]), "texts: row 1: found bytes"),
    ],
)
def test_input_without_texts_is_refused(answer: Callable[[Any], pd.DataFrame], form: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        answer(form)
    assert str(caught.value).startswith(message)


def test_no_text_and_empty_texts(answer: Callable[[Any], pd.DataFrame]) -> None:
    columns = list(answer(["ok"]).columns)
    for nothing in ([], pd.Series([], dtype=object), pd.DataFrame({"data": []})):
        frame = answer(nothing)
        assert (len(frame), list(frame.columns)) == (0, columns)
    blank = answer(["", None, float("nan"), " "])
    probabilities = blank[[name for name in columns if "/" in name]].to_numpy()
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities, probabilities[[0] * 4], rtol=0, atol=1e-4)


def test_a_pretrained_model_there_and_back(make: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    """From a folder with BERT's files to an exported model that no longer needs it."""
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((folders["bert"] / file).read_bytes())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pin", "trau", "camera", "may", "lag", "qua", "te", "shop"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    options = {"model.name": folder, "model.max_tokens": 24, "model.hidden": 8, "training.amp": "no"}
    task = make(**options)
    model = trained(task)
    assert task.parameters == count(model)
    task.export(model, tmp_path / "model")
    reviews, table = task.data.splits.test, task.data.table("test")
    assert reviews is not None
    assert table is not None
    expected = task.evaluation.predictions(model, task.evaluation.predict(model, "test", "cpu")).frame()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    answer = predict.load(tmp_path / "model")
    assert_same_predictions(answer(list(reviews.texts)), expected)
    assert len(answer([])) == 0
