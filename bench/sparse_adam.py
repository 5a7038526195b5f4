"""A well-written training script: one fused table in an EmbeddingBag with sparse gradients, SparseAdam, fused AdamW.

Batches are gathered without Python loops over rows; nothing is logged. Only the config comes from `pipeline`.
"""

from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench import dense
from bench.figures import Timed
from bench.impressions import Columns, read
from pipeline.tasks.mmoe.config import MmoeConfig

ROWS = 200_000  # training rows from which batches are drawn


class Ragged:
    """Rows as contiguous ids of the fused table, with their weights and the lengths of the bags."""

    def __init__(self, columns: Columns) -> None:
        rows, features = len(columns.click), len(columns.ids)
        lengths = np.stack([np.diff(column.offsets) for column in columns.ids.values()], 1)
        bags = np.cumsum(lengths.ravel(), dtype=np.int64).reshape(rows, features) - lengths
        ids = np.empty(lengths.sum(), dtype=np.int64)
        weights = np.empty(len(ids), dtype=np.float32)
        sizes = [column.size for column in columns.ids.values()]
        for number, (column, before) in enumerate(zip(columns.ids.values(), accumulate([0, *sizes]), strict=False)):
            places = np.repeat(bags[:, number] - column.offsets[:-1], lengths[:, number]) + np.arange(len(column.ids))
            ids[places], weights[places] = column.ids + before, column.weights
        self.table_rows, self.lengths = sum(sizes), torch.from_numpy(lengths)
        self.ids, self.weights = torch.from_numpy(ids), torch.from_numpy(weights)
        self.starts = torch.from_numpy(np.append(bags[:, 0], len(ids)))
        self.click, self.conversion = torch.from_numpy(columns.click), torch.from_numpy(columns.conversion)

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        starts, lengths = self.starts[rows], self.lengths[rows]
        sizes = self.starts[rows + 1] - starts
        flat = torch.repeat_interleave(starts - (sizes.cumsum(0) - sizes), sizes) + torch.arange(int(sizes.sum()))
        flattened = lengths.flatten()
        offsets = flattened.cumsum(0) - flattened
        return self.ids[flat], offsets, self.weights[flat], self.click[rows], self.conversion[rows]


def training(data: Path, config: MmoeConfig, steps: int) -> Timed:
    """CPU seconds of `steps` training steps."""
    table, model, size = Ragged(read(data, ROWS)), config.model, config.training.batch_size
    inputs = table.lengths.shape[1] * model.embedding_dim
    embedding = nn.EmbeddingBag(table.table_rows, model.embedding_dim, mode="sum", sparse=True)
    part = dense.Dense(inputs, model.experts.count, model.experts.hidden[0])
    optimizers = [
        torch.optim.SparseAdam(embedding.parameters(), lr=config.optim.embedding.lr),
        torch.optim.AdamW(part.parameters(), lr=config.optim.dense.lr, fused=True),
    ]

    def step() -> None:
        ids, offsets, weights, click, conversion = table.batch(torch.randint(ROWS, (size,)))
        embedded = embedding(ids, offsets, weights).view(size, inputs)
        dense.loss(part(embedded), click, conversion).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return dense.timed(step, steps, size)
