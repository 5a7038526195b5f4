"""The small encoder that is trained from scratch: token embeddings, convolutions and gated recurrences.

Shapes: B = reviews, L = tokens of the longest review, H = width.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.tasks.visobert.config import EmbeddedModelConfig

KERNEL = 3  # kernel size of the convolutions, in tokens
EMBEDDING_STD = 0.1


class Encoded(NamedTuple):
    """Output of an encoder."""

    hidden: Tensor  # [B, L, H]
    pooled: Tensor | None  # [B, H]; None if the encoder has no pooler


class EmbeddedEncoder(nn.Module):
    """Token embeddings, and residual blocks of a convolution and a bidirectional recurrence."""

    def __init__(self, config: EmbeddedModelConfig, vocabulary: int, pad_id: int, mask_id: int) -> None:
        """vocabulary: number of tokens; mask_id: id that replaces tokens in token dropout."""
        super().__init__()
        self.width, self.mask_id, self.token_dropout = config.width, mask_id, config.token_dropout
        self.embedding = nn.Embedding(vocabulary, config.width, padding_idx=pad_id)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.dropout = ChannelDropout(config.dropout)
        self.layers = nn.ModuleList(
            block(config.width, config.dropout) for _ in range(config.layers) for block in (Convolution, Recurrence)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, mask: Tensor) -> Encoded:
        """ids: [B, L]; mask: [B, L], false where padded."""
        if self.training and self.token_dropout:
            hidden = torch.rand(ids.shape, device=ids.device) < self.token_dropout
            ids = ids.masked_fill(hidden & mask, self.mask_id)
        present = mask.unsqueeze(-1).to(self.embedding.weight.dtype)  # [B, L, 1]
        x = self.dropout(self.embedding(ids)) * present
        for layer in self.layers:
            x = layer(x, present)
        return Encoded(self.norm(x), None)


class ChannelDropout(nn.Module):
    """Dropout of whole channels, the same ones at every position of a review (Tompson et al. 2015)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, H]"""
        if not self.training or not self.share:
            return x
        kept = torch.rand(len(x), 1, x.shape[-1], device=x.device) >= self.share
        return x * (kept / (1 - self.share)).to(x.dtype)


class Convolution(nn.Module):
    """Residual convolution: x + dropout(relu(convolution(norm(x))))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(KERNEL * width, width)
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        return x + cast(Tensor, self.dropout(torch.relu(self.linear(_windows(self.norm(x) * present)))))


class Recurrence(nn.Module):
    """Residual gated recurrence: x + dropout(o * c), with state c <- c + i (z - c) at every position.

    Candidates z, input gates i and output gates o come from a convolution, so that the loop over positions has no
    matrix products (QRNN, Bradbury et al. 2017, "fo" pooling with an input gate). Half of the channels run backwards.
    Padding leaves the state unchanged.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(KERNEL * width, 3 * width)
        self.dropout, self.forwards = ChannelDropout(dropout), width // 2

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        candidate, update, output = self.linear(_windows(self.norm(x) * present)).chunk(3, -1)
        values = self._both_ways(torch.tanh(candidate)).unbind(1)
        gates = self._both_ways(torch.sigmoid(update) * present.to(update.dtype)).unbind(1)
        state, states = torch.zeros_like(values[0]), []
        for value, gate in zip(values, gates, strict=True):  # loop over positions
            state = torch.lerp(state, value, gate)
            states.append(state)
        mixed = self._both_ways(torch.stack(states, 1)) * torch.sigmoid(output)
        return x + cast(Tensor, self.dropout(mixed))

    def _both_ways(self, x: Tensor) -> Tensor:
        """Reverse the order of positions for the second half of the channels; applying it twice restores x."""
        return torch.cat([x[..., : self.forwards], x[..., self.forwards :].flip(1)], -1)


def _windows(x: Tensor) -> Tensor:
    """Concatenate each position with its neighbours: [B, L, H] -> [B, L, KERNEL * H]."""
    length, around = x.shape[1], KERNEL // 2
    padded = pad(x, (0, 0, around, around))
    return torch.cat([padded[:, start : start + length] for start in range(KERNEL)], -1)
