"""Rows as the model takes them: where features lie in its table, and a batch of bags of ids.

B = rows of a batch, F = id features, M = numeric features, n = ids of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tasks.mmoe.embedding import Groups
from pipeline.tasks.mmoe.schema import DataSchema, Feature

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Where each feature lies in the fused table and in the model's [B, F + M] features."""

    features: tuple[Feature, ...]

    @classmethod
    def of(cls, schema: DataSchema) -> "Layout":
        return cls(schema.features)

    @cached_property
    def id_features(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind != "numeric")

    @cached_property
    def numeric_features(self) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.kind == "numeric")

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First row of each id feature in the fused table."""
        ends = accumulate((feature.size for feature in self.id_features), initial=0)
        return {feature.name: first for feature, first in zip(self.id_features, ends, strict=False)}

    @property
    def table_rows(self) -> int:
        return sum(feature.size for feature in self.id_features)


@dataclass(frozen=True)
class Impressions:
    """A batch. Each (row, id feature) is a bag of ids with weights; its embedding is their weighted sum."""

    click: Tensor  # [B] float32
    conversion: Tensor  # [B] float32
    numeric: Tensor  # [B, M] float32
    ids: Tensor  # [n] int32, rows of the fused table
    weights: Tensor  # [n] float32
    starts: Tensor  # [B * F + 1] int32: where each bag begins
    groups: Groups | None = None  # the ids by table row, for the gradient on the CPU

    def __len__(self) -> int:
        return len(self.numeric)

    def to(self, device: str) -> "Impressions":
        if device == "cpu":
            return self
        names = ("click", "conversion", "numeric", "ids", "weights", "starts")
        return Impressions(*(getattr(self, name).to(device, non_blocking=True) for name in names))


def assemble(columns: Mapping[str, pa.Array], layout: Layout) -> Impressions:
    """Encoded columns (as in the Parquet splits, without the labels, which are 0 here) as one batch, for predicting.

    Raises:
        UserError: an id outside of its feature's table.
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
        flat = column.flatten() if feature.kind == "multi" else column
        within = np.arange(len(flat)) - np.repeat(length.cumsum() - length, length)
        places = np.repeat(starts[position:-1:features], length) + within
        ids[places] = table_ids(flat, feature, "input") + np.int32(layout.offsets[feature.name])
        if feature.weighted:
            weights[places] = float_values(columns[f"{feature.name}.weights"].flatten())
        elif feature.kind == "multi":
            weights[places] = np.float32(1) / np.repeat(length, length).astype(np.float32)
    numeric = [float_values(columns[feature.name]) for feature in layout.numeric_features]
    return Impressions(
        click=torch.zeros(rows),
        conversion=torch.zeros(rows),
        numeric=torch.from_numpy(np.stack(numeric, 1)) if numeric else torch.empty(rows, 0),
        ids=torch.from_numpy(ids),
        weights=torch.from_numpy(weights),
        starts=torch.from_numpy(starts.astype(np.int32)),
    )


def float_values(column: pa.Array) -> Array:
    """The numbers of a column. [rows] float32"""
    values: Array = column.to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False)


def table_ids(column: pa.Array, feature: Feature, where: str) -> Array:
    """The ids of a column, within their feature's table. [rows] int32

    Raises:
        UserError: one is not; `where` names the file.
    """
    values: Array = column.to_numpy(zero_copy_only=False)
    if len(values) and not 0 <= values.min() <= values.max() < feature.size:
        raise UserError(f"{where}: column {feature.name}: id outside of 0..{feature.size - 1}; run prepare_ctr again")
    return values.astype(np.int32, copy=False)
