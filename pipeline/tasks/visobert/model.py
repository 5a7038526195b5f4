"""The model: encoder, pooling and heads, from token ids to the logits of every aspect.

Shapes: B = reviews, L = tokens of the longest review, H = width of the encoder, A = aspects.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED, ModelConfig
from pipeline.tasks.visobert.encoders.embedded_encoder import EmbeddedEncoder, Encoded
from pipeline.tasks.visobert.encoders.pretrained_encoder import PretrainedEncoder, load_encoder
from pipeline.tasks.visobert.reviews.sentiments import SENTIMENTS
from pipeline.tasks.visobert.tokenizer import Tokenizer

NamedParameters = list[tuple[str, nn.Parameter]]


class Output(NamedTuple):
    """Logits of both heads."""

    sentiment: Tensor  # [B, A, 3]
    aspect: Tensor | None = None  # [B, A], logit of a mention; None without aspect detection

    @property
    def parts(self) -> list[Tensor]:
        """The logits of the heads that the model has."""
        return [part for part in self if part is not None]


class AspectSentimentModel(nn.Module):
    """An encoder, pooling, a sentiment head and, if configured, an aspect detection head."""

    thresholds: Tensor  # [A], probability from which an aspect counts as mentioned; saved with the weights

    def __init__(self, encoder: EmbeddedEncoder | PretrainedEncoder, aspects: int, config: ModelConfig) -> None:
        super().__init__()
        width = encoder.width
        self.encoder, self.pooling, self.aspects = encoder, config.pooling, aspects
        self.dropout = nn.Dropout(config.dropout)
        if config.pooling == "aspect_attention":
            self.queries = nn.Parameter(torch.randn(aspects, width) / math.sqrt(width))
        self.dense = nn.Linear(width, config.hidden) if config.hidden else None
        heads = {"sentiment": len(SENTIMENTS)} | ({"aspect": 1} if config.aspect_detection else {})
        kind = AspectLinear if config.pooling == "aspect_attention" else SharedLinear
        self.heads = nn.ModuleDict(
            {name: kind(config.hidden or width, aspects, outputs) for name, outputs in heads.items()}
        )
        self.register_buffer("thresholds", torch.full((aspects,), 0.5))

    def forward(self, ids: Tensor, mask: Tensor) -> Output:
        """ids: [B, L]; mask: [B, L], false where padded."""
        features = self.dropout(self._pool(self.encoder(ids, mask), mask))
        if self.dense is not None:
            features = self.dropout(torch.relu(self.dense(features)))
        aspect = self.heads["aspect"](features).squeeze(-1) if self.detects else None
        return Output(self.heads["sentiment"](features), aspect)

    def start_from(self, rates: Tensor) -> None:
        """Initialise the bias of aspect detection with the share of mentions. rates: [A], above 0 and below 1"""
        if self.detects:
            bias = cast(nn.Parameter, self.heads["aspect"].bias)
            bias.data.copy_(torch.logit(rates).view_as(bias))

    @property
    def detects(self) -> bool:
        """Whether the model has an aspect detection head."""
        return "aspect" in self.heads

    def _pool(self, encoded: Encoded, mask: Tensor) -> Tensor:
        """Pool the encoder's output: [B, H] shared by the aspects, or [B, A, H] with one attention per aspect."""
        if self.pooling == "pooler":
            assert encoded.pooled is not None
            return encoded.pooled
        if self.pooling == "cls":
            return encoded.hidden[:, 0]
        scores = (encoded.hidden @ self.queries.T).float()  # [B, L, A]
        # masked with the minimum instead of -inf, because softmax of -inf alone (an empty text) would be NaN
        scores = scores.masked_fill(~mask.unsqueeze(-1), torch.finfo(scores.dtype).min)
        return softmax(scores, dim=1).to(encoded.hidden.dtype).transpose(1, 2) @ encoded.hidden


class SharedLinear(nn.Module):
    """One linear layer on features that all aspects share: [B, H] -> [B, A, outputs]."""

    def __init__(self, width: int, aspects: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.aspects = nn.Linear(width, aspects * outputs), aspects

    @property
    def bias(self) -> nn.Parameter:
        return self.linear.bias  # [A * outputs]

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.linear(features)).view(len(features), self.aspects, -1)


class AspectLinear(nn.Module):
    """One linear layer per aspect: [B, A, H] -> [B, A, outputs]."""

    def __init__(self, width: int, aspects: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(aspects, width, outputs))
        self.bias = nn.Parameter(torch.zeros(aspects, outputs))
        nn.init.normal_(self.weight, std=1 / math.sqrt(width))

    def forward(self, features: Tensor) -> Tensor:
        return torch.einsum("bah,aho->bao", features, self.weight) + self.bias


def build_model(
    config: ModelConfig, aspects: int, tokenizer: Tokenizer, *, weights: bool, warn: Callable[[str], object] = print
) -> AspectSentimentModel:
    """Build a model for the ids of the tokenizer. `weights` false: do not load pretrained weights.

    `warn` is a parameter because logged models are packaged without the console module.

    Raises:
        UserError: the model's files are missing, or do not match each other or the config.
    """
    if config.name != EMBEDDED:
        pretrained = load_encoder(config, tokenizer.size, weights=weights, warn=warn)
        return AspectSentimentModel(pretrained, aspects, config)
    if config.pooling == "pooler":
        raise UserError("model.pooling: found pooler, but the embedded model has none; allowed: cls, aspect_attention")
    encoder = EmbeddedEncoder(config.embedded, tokenizer.size, tokenizer.pad_id, tokenizer.mask_id)
    return AspectSentimentModel(encoder, aspects, config)


def layers_from_the_top(encoder: nn.Module) -> dict[int, NamedParameters]:
    """Group the encoder's parameters by their layer's distance from the last layer.

    Parameters without a layer number in their name count as below the first layer if they are embeddings, otherwise as
    part of the last layer (pooler, final normalisation).
    """
    numbers = {name: re.search(r"\.(\d+)\.", f".{name}.") for name, _ in encoder.named_parameters()}
    last = max((int(number[1]) for number in numbers.values() if number), default=-1)
    layers: dict[int, NamedParameters] = {}
    for name, parameter in encoder.named_parameters():
        number = numbers[name]
        layer = int(number[1]) if number else -1 if "embed" in name else last
        layers.setdefault(last - layer, []).append((name, parameter))
    return dict(sorted(layers.items()))
