"""The small encoder that is trained from scratch: embeddings, convolution and a gated recurrence.

Shapes: B = reviews, L = tokens of the longest, H = width.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.tasks.visobert.config import EmbeddedModelConfig

KERNEL = 3  # tokens that a layer combines
EMBEDDING_STD = 0.1


class Encoded(NamedTuple):
    """An encoder's output."""

    hidden: Tensor  # [B, L, H]
    pooled: Tensor | None  # [B, H], if the encoder has a pooler


class EmbeddedEncoder(nn.Module):
    """Token embeddings and residual blocks, each a convolution and a recurrence in both directions."""

    def __init__(self, config: EmbeddedModelConfig, vocabulary: int, pad_id: int, mask_id: int) -> None:
        """`mask_id` replaces the tokens that token dropout hides."""
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
    """Dropout of whole channels, the same at every position of a review (Tompson et al. 2015)."""

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
    """x + dropout(relu(convolution(normalised x)))"""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(KERNEL * width, width)
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        return x + cast(Tensor, self.dropout(torch.relu(self.linear(_windows(self.norm(x) * present)))))


class Recurrence(nn.Module):
    """x + dropout(gate * state), with the running mix c <- c + i (z - c) as state.

    Gates and candidates come from a convolution, so that the loop has no matrix product (QRNN, Bradbury et al. 2017,
    "fo" pooling with an input gate). Half of the channels run backwards; padding leaves the state unchanged.
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
        for value, gate in zip(values, gates, strict=True):  # over positions
            state = torch.lerp(state, value, gate)
            states.append(state)
        mixed = self._both_ways(torch.stack(states, 1)) * torch.sigmoid(output)
        return x + cast(Tensor, self.dropout(mixed))

    def _both_ways(self, x: Tensor) -> Tensor:
        """Reverse the positions of the second half of the channels; applied twice it is the identity."""
        return torch.cat([x[..., : self.forwards], x[..., self.forwards :].flip(1)], -1)


def _windows(x: Tensor) -> Tensor:
    """Concatenate every position with its neighbours: [B, L, H] -> [B, L, KERNEL * H]"""
    length, around = x.shape[1], KERNEL // 2
    padded = pad(x, (0, 0, around, around))
    return torch.cat([padded[:, start : start + length] for start in range(KERNEL)], -1)
