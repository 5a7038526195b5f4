"""Embeddings and a multilayer perceptron."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .data import NUMERIC, Transactions


class FraudModel(nn.Module):
    def __init__(self, config: ModelConfig, vocabularies: Sequence[int], fraud_rate: float = 0.5) -> None:
        """vocabularies: number of values of each categorical column. fraud_rate: where the probability begins."""
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(values + 1, config.embedding_dim) for values in vocabularies)
        width, layers = len(NUMERIC) + len(vocabularies) * config.embedding_dim, list[nn.Module]()
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(width, 1)
        nn.init.constant_(self.last.bias, math.log(fraud_rate / (1 - fraud_rate)))

    def forward(self, batch: Transactions) -> Tensor:
        """Logits [B], in fp32."""
        embedded = [embedding(ids) for embedding, ids in zip(self.embeddings, batch.ids.unbind(1), strict=True)]
        logits: Tensor = self.last(self.layers(torch.cat([batch.numeric, *embedded], 1)))
        return logits.squeeze(1).float()
