"""A batch of impressions, the input of the model.

B = rows of a batch, F = id features, M = numeric features, n = ids of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.layout import Layout, bag_weights, consecutive, float_values
from pipeline.tasks.mmoe.impressions.embedding import Groups


@dataclass(frozen=True)
class Impressions:
    """A batch. Each (row, id feature) is a bag of ids with weights; its embedding is their weighted sum."""

    click: Tensor  # [B] float32
    conversion: Tensor  # [B] float32
    numeric: Tensor  # [B, M] float32
    ids: Tensor  # [n] int32, rows of the fused table
    weights: Tensor  # [n] float32
    starts: Tensor  # [B * F + 1] int32: offset of each bag in `ids`, then the end
    groups: Groups | None = None  # ids sorted by table row, for the gradient on the CPU
    sample_weight: Tensor | None = None  # [B] float32; None = all rows weigh the same

    def __len__(self) -> int:
        return len(self.numeric)

    def to(self, device: str) -> "Impressions":
        if device == "cpu":
            return self
        names = ("click", "conversion", "numeric", "ids", "weights", "starts")
        moved = Impressions(*(getattr(self, name).to(device, non_blocking=True) for name in names))
        if self.sample_weight is None:
            return moved
        return replace(moved, sample_weight=self.sample_weight.to(device, non_blocking=True))


def assemble(columns: Mapping[str, pa.Array], layout: Layout) -> Impressions:
    """Convert encoded columns (as in the Parquet splits) to one batch for prediction. Its labels are 0.

    Raises:
        UserError: an id is outside its feature's table.
    """
    rows, features = len(next(iter(columns.values()))), len(layout.id_features)
    lengths = np.ones((rows, features), np.int64)
    for position, feature in enumerate(layout.id_features):
        if feature.kind == "multi":
            lengths[:, position] = np.diff(columns[feature.name].offsets.to_numpy())
    starts = np.concatenate([[0], lengths.ravel().cumsum()])
    ids, weights = np.empty(starts[-1], np.int32), np.ones(starts[-1], np.float32)
    for position, feature in enumerate(layout.id_features):
        column, length = columns[feature.name], lengths[:, position]
        places = consecutive(starts[position:-1:features], length)
        ids[places] = layout.table_ids(column.flatten() if feature.kind == "multi" else column, feature, "input")
        if feature.kind == "multi":
            weights[places] = bag_weights(columns, feature, length)
    numeric = [float_values(columns[feature.name]) for feature in layout.numeric_features]
    return Impressions(
        click=torch.zeros(rows),
        conversion=torch.zeros(rows),
        numeric=torch.from_numpy(np.stack(numeric, 1)) if numeric else torch.empty(rows, 0),
        ids=torch.from_numpy(ids),
        weights=torch.from_numpy(weights),
        starts=torch.from_numpy(starts.astype(np.int32)),
    )
