"""Encoder, pooling and heads: from token ids to the logits of every aspect.

Shapes: B = reviews, L = tokens of the longest, H = width of the encoder, A = aspects.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import softmax

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED, ModelConfig
from pipeline.tasks.visobert.encoders.embedded_encoder import EmbeddedEncoder, Encoded
from pipeline.tasks.visobert.encoders.model_folder import model_folder
from pipeline.tasks.visobert.encoders.tokenizer import Tokenizer
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS


class Encoder(Protocol):
    width: int  # H

    def __call__(self, ids: Tensor, mask: Tensor) -> Encoded: ...


class Output(NamedTuple):
    sentiment: Tensor  # [B, A, 3] logits
    aspect: Tensor | None = None  # [B, A] logits of being mentioned; None without aspect detection

    @property
    def parts(self) -> "list[Tensor]":
        """Those that there are."""
        return [part for part in self if part is not None]


class AspectSentimentModel(nn.Module):
    """An encoder, what a head sees of it, and a head for sentiments and one for mentions."""

    thresholds: Tensor  # [A], probability from which on an aspect counts as mentioned; travels with the weights

    def __init__(self, encoder: nn.Module, aspects: int, config: ModelConfig) -> None:
        super().__init__()
        width = cast(Encoder, encoder).width
        self.encoder, self.pooling, self.aspects = encoder, config.pooling, aspects
        self.dropout = nn.Dropout(config.dropout)
        if config.pooling == "aspect_attention":
            self.queries = nn.Parameter(torch.randn(aspects, width) / math.sqrt(width))
        self.dense = nn.Linear(width, config.hidden) if config.hidden else None
        each = config.hidden or width
        heads = {"sentiment": len(SENTIMENTS)} | ({"aspect": 1} if config.aspect_detection else {})
        kind = AspectLinear if config.pooling == "aspect_attention" else SharedLinear
        self.heads = nn.ModuleDict({name: kind(each, aspects, outputs) for name, outputs in heads.items()})
        self.register_buffer("thresholds", torch.full((aspects,), 0.5))

    def forward(self, ids: Tensor, mask: Tensor) -> Output:
        """ids: [B, L]; mask: [B, L], true where there is a token."""
        seen = self.dropout(self._pool(self.encoder(ids, mask), mask))
        if self.dense is not None:
            seen = self.dropout(torch.relu(self.dense(seen)))
        aspect = self.heads["aspect"](seen).squeeze(-1) if self.detects else None
        return Output(self.heads["sentiment"](seen), aspect)

    def start_at(self, rates: Tensor) -> None:
        """Detection starts from how often each aspect is mentioned. rates: [A], between 0 and 1, both excluded."""
        if self.detects:
            bias = cast(nn.Parameter, self.heads["aspect"].bias)
            bias.data.copy_(torch.logit(rates).view_as(bias))

    @property
    def detects(self) -> bool:
        """Has a head for mentions."""
        return "aspect" in self.heads

    def _pool(self, encoded: Encoded, mask: Tensor) -> Tensor:
        """[B, H] for all aspects together, or [B, A, H] with an attention an aspect."""
        if self.pooling == "pooler":
            assert encoded.pooled is not None
            return encoded.pooled
        if self.pooling == "cls":
            return encoded.hidden[:, 0]
        scores = (encoded.hidden @ self.queries.T).float()  # [B, L, A]
        scores = scores.masked_fill(~mask.unsqueeze(-1), torch.finfo(scores.dtype).min)  # finite: a text may be empty
        return softmax(scores, dim=1).to(encoded.hidden.dtype).transpose(1, 2) @ encoded.hidden


class SharedLinear(nn.Module):
    """[B, H] -> [B, A, outputs]: every aspect sees the same."""

    def __init__(self, width: int, aspects: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.aspects = nn.Linear(width, aspects * outputs), aspects

    @property
    def bias(self) -> nn.Parameter:
        return self.linear.bias  # [A * outputs]

    def forward(self, seen: Tensor) -> Tensor:
        return cast(Tensor, self.linear(seen)).view(len(seen), self.aspects, -1)


class AspectLinear(nn.Module):
    """[B, A, H] -> [B, A, outputs]: a linear layer of each aspect's own."""

    def __init__(self, width: int, aspects: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(aspects, width, outputs))
        self.bias = nn.Parameter(torch.zeros(aspects, outputs))
        nn.init.normal_(self.weight, std=1 / math.sqrt(width))

    def forward(self, seen: Tensor) -> Tensor:
        return torch.einsum("bah,aho->bao", seen, self.weight) + self.bias


class PretrainedEncoder(nn.Module):
    """An encoder of transformers, as AutoModel knows it."""

    def __init__(self, model: nn.Module, keep_pooler: bool) -> None:
        super().__init__()
        self.model = model
        self.width: int = cast(Any, model).config.hidden_size
        if not keep_pooler and getattr(model, "pooler", None) is not None:
            cast(Any, model).pooler = None

    def forward(self, ids: Tensor, mask: Tensor) -> Encoded:
        found = self.model(input_ids=ids.long(), attention_mask=mask.long())
        return Encoded(found.last_hidden_state, getattr(found, "pooler_output", None))


def build_model(
    config: ModelConfig, aspects: int, tokenizer: Tokenizer, *, weights: bool, warn: Callable[[str], object] = print
) -> AspectSentimentModel:
    """The model for the tokenizer's ids; with `weights` false an encoder from elsewhere gets new ones in any case.

    Raises:
        UserError: the model's files are missing, or do not fit each other or what is asked for.
    """
    if config.name == EMBEDDED:
        if config.pooling == "pooler":
            raise UserError(
                "model.pooling: found pooler, but the embedded model has none; allowed: cls, aspect_attention"
            )
        small = EmbeddedEncoder(config.embedded, tokenizer.size, tokenizer.pad_id, tokenizer.mask_id)
        return AspectSentimentModel(small, aspects, config)
    pretrained = weights and config.init == "pretrained"
    folder = model_folder(config.name, config.revision, weights=pretrained)
    encoder = PretrainedEncoder(_load(folder, config, pretrained, warn), config.pooling == "pooler")
    _check_fit(cast(Any, encoder.model), config, tokenizer.size)
    if config.pooling == "pooler" and getattr(encoder.model, "pooler", None) is None:
        raise UserError(f"model.pooling: found pooler, but {config.name} has none; allowed: cls, aspect_attention")
    return AspectSentimentModel(encoder, aspects, config)


def _load(folder: Path, config: ModelConfig, pretrained: bool, warn: Callable[[str], object]) -> nn.Module:
    """The encoder in a folder, in fp32."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        architecture = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if not pretrained:
            return cast(nn.Module, AutoModel.from_config(architecture, dtype=torch.float32, trust_remote_code=False))  # type: ignore[no-untyped-call]
        model, report = AutoModel.from_pretrained(
            str(folder),
            config=architecture,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.name {config.name}: transformers cannot load {folder}: {error}") from None
    new = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if new:
        raise UserError(
            f"model.name {config.name}: the weights in {folder} lack {len(new)} of the encoder's tensors ({new[0]}, "
            "...); allowed: all of them, or model.init: random"
        )
    if config.pooling == "pooler" and report["missing_keys"]:
        warn(f"model.pooling: the weights of {config.name} have no pooler: it starts from new ones")
    return cast(nn.Module, model)


def _check_fit(model: Any, config: ModelConfig, vocabulary: int) -> None:
    if vocabulary > model.config.vocab_size:
        raise UserError(
            f"model.name {config.name}: its tokenizer has {vocabulary} entries, allowed: at most the "
            f"{model.config.vocab_size} that the model embeds"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if positions is not None and getattr(table, "padding_idx", None) is not None:
        positions -= cast(Any, table).padding_idx + 1  # RoBERTa and its kind count positions from the padding's id on
    if positions is not None and config.max_tokens > positions:
        raise UserError(f"model.max_tokens: found {config.max_tokens}, allowed for {config.name}: at most {positions}")


class Depth(NamedTuple):
    """Parameters at one distance from the top of the encoder."""

    steps: int  # 0 = the last layer
    parameters: list[tuple[str, nn.Parameter]]


def by_depth(encoder: nn.Module) -> list[Depth]:
    """The encoder's parameters by layer, the last layer first; what has no number in its name is either below all
    layers (embeddings) or with the last one (a pooler, a final normalisation).
    """
    numbers = {name: re.search(r"\.(\d+)\.", f".{name}.") for name, _ in encoder.named_parameters()}
    last = max((int(found[1]) for found in numbers.values() if found), default=-1)
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in encoder.named_parameters():
        found = numbers[name]
        layer = int(found[1]) if found else -1 if "embed" in name else last
        layers.setdefault(last - layer, []).append((name, parameter))
    return [Depth(steps, layers[steps]) for steps in sorted(layers)]
