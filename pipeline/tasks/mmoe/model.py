"""The MMoE model: fused embeddings, experts, gates, towers and DeepFM parts.

Shapes: B = batch, F = features (ids first, then numeric), D = embedding width, W = heads with a wide part,
E = experts, T = tasks (ctr, cvr), H = width of an expert's output.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.data.layout import Layout
from pipeline.data.schema import BaseRates
from pipeline.tasks.mmoe.config import HEADS, HeadConfig, ModelConfig
from pipeline.tasks.mmoe.impressions.embedding import lookup
from pipeline.tasks.mmoe.impressions.impression_batch import Impressions


class Output(NamedTuple):
    logits: Tensor  # [B, T]: click, and conversion given a click
    gates: Tensor | None  # [B, T, E], sum to 1 over experts; None without gates


class FeatureEmbedding(nn.Module):
    """Embeds every feature as a vector of D + W numbers.

    The vector of an id feature is the weighted sum of its ids' rows in the fused table. A numeric feature is encoded
    piecewise linearly over its quantile bins, then mapped linearly (Gorishniy et al. 2022, "On embeddings for
    numerical features", equations 1 and 4). The last W columns are the weights of wide parts and start at 0.
    """

    def __init__(self, layout: Layout, width: int, wide_width: int, sparse: bool) -> None:
        super().__init__()
        total = width + wide_width
        self.id_count, self.sparse = len(layout.id_features), sparse
        self.table = nn.Parameter(torch.zeros(max(1, layout.table_rows), total))
        nn.init.normal_(self.table[:, :width], std=0.05)
        count = len(layout.numeric_features)
        bins = max((len(feature.edges) - 1 for feature in layout.numeric_features), default=1)
        low, span = torch.zeros(count, bins), torch.full((count, bins), math.inf)  # unused bins encode to 0
        for row, feature in enumerate(layout.numeric_features):
            edges = np.array(feature.edges)
            low[row, : len(edges) - 1] = torch.from_numpy(edges[:-1]).float()
            span[row, : len(edges) - 1] = torch.from_numpy(np.diff(edges)).float()
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("span", span, persistent=False)
        self.numeric_weight = nn.Parameter(torch.zeros(count, bins, total))
        nn.init.normal_(self.numeric_weight[..., :width], std=0.05)
        self.numeric_bias = nn.Parameter(torch.zeros(count, total))

    def forward(self, batch: Impressions) -> Tensor:
        """Embed the features of a batch; returns [B, F, D + W]."""
        size = len(batch)
        parts = []
        if self.id_count:
            parts.append(lookup(self.table, batch, self.sparse).view(size, self.id_count, -1))
        if len(self.numeric_bias):
            low, span = self.get_buffer("low"), self.get_buffer("span")
            encoded = ((batch.numeric.unsqueeze(-1) - low) / span).clamp(0, 1)
            parts.append(torch.einsum("bmk,mkd->bmd", encoded, self.numeric_weight) + self.numeric_bias)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class GroupedLayers(nn.Module):
    """G multi-layer perceptrons of the same shape, computed together, with ReLU and dropout after each layer."""

    def __init__(self, groups: int, widths: list[int], dropout: float) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.weights = nn.ParameterList([torch.empty(groups, inner, outer) for inner, outer in pairs])
        self.biases = nn.ParameterList([torch.zeros(groups, 1, outer) for _, outer in pairs])
        for weight in self.weights:
            nn.init.normal_(weight, std=math.sqrt(2 / weight.shape[1]))  # He et al. 2015, equation 10
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, in], shared by all groups, or [G, B, in]. Returns [G, B, out]."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if hidden.dim() == 2:  # one input for all groups: a single wide matrix product
                wide = torch.addmm(bias.flatten(), hidden, weight.transpose(0, 1).flatten(1)).relu_()
                product = wide.view(len(hidden), *weight.shape[::2]).transpose(0, 1)
            else:
                product = torch.baddbmm(bias, hidden, weight).relu_()
            hidden = functional.dropout(product, self.dropout, self.training)
        return hidden


class Mmoe(nn.Module):
    """Multi-gate mixture of experts (Ma et al. 2018, equations 3 and 6), or a shared bottom, with two heads."""

    def __init__(self, config: ModelConfig, layout: Layout, base_rates: BaseRates, sparse: bool = False) -> None:
        super().__init__()
        self.config = config
        self.heads: list[HeadConfig] = [getattr(config.heads, head) for head in HEADS]
        self.wide_heads = [index for index, head in enumerate(self.heads) if head.wide]
        self.deep_heads = [index for index, head in enumerate(self.heads) if head.deep]
        features, tasks = len(layout.id_features) + len(layout.numeric_features), len(self.deep_heads)
        self.embedding = FeatureEmbedding(layout, config.embedding_dim, len(self.wide_heads), sparse)
        width = features * config.embedding_dim
        self.experts, self.gate, self.towers = None, None, None
        if tasks:
            gated = config.kind == "mmoe"
            experts = config.experts.count if gated else 1
            self.experts = GroupedLayers(experts, [width, *config.experts.hidden], config.experts.dropout)
            if gated:
                self.gate = nn.Linear(width, tasks * experts, bias=False)
                nn.init.zeros_(self.gate.weight)  # all experts start with equal shares
            tower_widths = [config.experts.hidden[-1], *config.towers.hidden]
            self.towers = GroupedLayers(tasks, tower_widths, config.towers.dropout)
            self.last = nn.Parameter(torch.empty(tasks, tower_widths[-1]))
            nn.init.normal_(self.last, std=1 / math.sqrt(tower_widths[-1]))
        rates = [base_rates.ctr, base_rates.cvr]
        self.bias = nn.Parameter(torch.tensor([_logit(rate) for rate in rates]))

    def forward(self, batch: Impressions) -> Output:
        return self.dense(self.embedding(batch))

    def dense(self, embedded: Tensor) -> Output:
        """The model after the embeddings. embedded: [B, F, D + W]"""
        vectors = functional.dropout(
            embedded[..., : self.config.embedding_dim], self.config.embedding_dropout, self.training
        )
        terms: list[list[Tensor]] = [[] for _ in self.heads]
        gates = None
        if self.experts is not None and self.towers is not None:
            shared = vectors.flatten(1)
            if torch.is_autocast_enabled(shared.device.type):  # cast once, for experts and gates
                shared = shared.to(torch.get_autocast_dtype(shared.device.type))
            outputs = self.experts(shared)  # [E, B, H]
            gates = self._gates(shared)
            if gates is None:
                shares = outputs.expand(len(self.deep_heads), -1, -1)
            else:  # [T, B, H]; contiguous, which makes the towers' products much faster
                shares = torch.bmm(gates.to(outputs.dtype), outputs.transpose(0, 1)).transpose(0, 1).contiguous()
            towers = self.towers(shares)
            with torch.autocast(towers.device.type, enabled=False):  # bfloat16 numbers near -5 are 0.03 apart
                deep = (towers.float() * self.last.unsqueeze(1)).sum(-1)  # [T, B]
            for row, deep_head in enumerate(self.deep_heads):
                terms[deep_head].append(deep[row])
        if any(head.fm for head in self.heads):
            # sum over all pairs = (square of the sum - sum of the squares) / 2 (Rendle 2010, lemma 3.1)
            product = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)
            for index, head in enumerate(self.heads):
                if head.fm:
                    terms[index].append(product)
        for column, wide_head in enumerate(self.wide_heads):
            terms[wide_head].append(embedded[..., self.config.embedding_dim + column].sum(1))
        logits = [sum(parts[1:], parts[0]).float() + self.bias[index] for index, parts in enumerate(terms)]
        return Output(torch.stack(logits, 1), gates)

    def _gates(self, shared: Tensor) -> Tensor | None:
        if self.gate is None:
            return None
        logits = self.gate(shared).float()
        if self.training and self.config.gate.noise:
            logits = logits + self.config.gate.noise * torch.randn_like(logits)
        grouped = logits.view(len(shared), len(self.deep_heads), -1)
        return torch.softmax(grouped / self.config.gate.temperature, -1)


def _logit(rate: float) -> float:
    bounded = min(max(rate, 1e-6), 1 - 1e-6)
    return math.log(bounded / (1 - bounded))
