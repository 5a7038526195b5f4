"""Positions of features in the fused embedding table and in the model's input."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.schema import Feature
from pipeline.errors import UserError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Order of the features in the model: id features, each with its rows of the fused table, then numeric features."""

    features: tuple[Feature, ...]

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

    def table_ids(self, column: pa.Array, feature: Feature, file: str) -> Array:
        """Convert the ids of a feature to rows of the fused table, [ids] int32.

        Raises:
            UserError: an id is outside the feature's table. The message names `file`.
        """
        ids: Array = column.to_numpy(zero_copy_only=False)
        if len(ids) and not 0 <= ids.min() <= ids.max() < feature.size:
            allowed = f"0..{feature.size - 1}"
            raise UserError(f"{file}: column {feature.name}: id outside of {allowed}; run prepare_ctr again")
        return ids.astype(np.int32, copy=False) + np.int32(self.offsets[feature.name])


def float_values(column: pa.Array) -> Array:
    """Values of a column, [rows] float32."""
    values: Array = column.to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False)


def bag_weights(columns: Mapping[str, pa.Array], feature: Feature, lengths: Array) -> Array:
    """Weights of a multi-valued feature's ids, [ids] float32; without weights, 1 / (number of ids in the bag)."""
    if feature.weighted:
        return float_values(columns[f"{feature.name}.weights"].flatten())
    return np.float32(1) / np.repeat(lengths, lengths).astype(np.float32)


def consecutive(starts: Array, lengths: Array) -> Array:
    """For each i, the lengths[i] consecutive numbers from starts[i] on; [lengths.sum()] int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
