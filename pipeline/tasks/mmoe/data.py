"""Prepared impressions in memory, gathered into batches without Python per row or per feature.

The ids of all rows and all id features lie in one flat stream, already shifted into the fused table; `lengths` says
how many belong to each (row, feature) bag. N = rows, F = id features, M = numeric features.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.task import Rows
from pipeline.tasks.mmoe.schema import LABELS, DataSchema, Feature


@dataclass(frozen=True)
class Layout:
    """Where each feature lies in the fused table and in the model's [B, F + M] features."""

    id_features: tuple[Feature, ...]
    numeric_features: tuple[Feature, ...]

    @classmethod
    def of(cls, schema: DataSchema) -> "Layout":
        return cls(
            tuple(feature for feature in schema.features if feature.kind != "numeric"),
            tuple(feature for feature in schema.features if feature.kind == "numeric"),
        )

    @property
    def offsets(self) -> list[int]:
        """First row of each id feature in the fused table."""
        return [0, *np.cumsum([feature.size for feature in self.id_features]).tolist()][:-1]

    @property
    def table_rows(self) -> int:
        return sum(feature.size for feature in self.id_features)

    @property
    def pooled(self) -> bool:
        """Some bag may hold another number of ids than one."""
        return any(feature.kind == "multi" for feature in self.id_features)


@dataclass(frozen=True)
class Impressions:
    """A batch, or a whole split. Multi-valued features carry weights; a bag's embedding is their weighted sum."""

    click: Tensor  # [B] float32
    conversion: Tensor  # [B] float32
    numeric: Tensor  # [B, M] float32
    ids: Tensor  # [sum of lengths] int32, rows of the fused table
    lengths: Tensor  # [B, F] int32, ids of each bag
    weights: Tensor | None  # [sum of lengths] float32; None where every bag holds one id of weight 1

    def __len__(self) -> int:
        return len(self.numeric)

    def to(self, device: str) -> "Impressions":
        if device == "cpu":
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if value is not None}
        return Impressions(**({"weights": None} | moved))


class ImpressionTable:
    """A split in memory: `batch(rows)` gathers any rows."""

    def __init__(self, columns: Impressions, truth: Mapping[str, npt.NDArray[np.float64]] | None) -> None:
        self.columns, self.truth = columns, truth
        row_lengths = columns.lengths.sum(1, dtype=torch.int64)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), row_lengths.cumsum(0)])  # [N + 1]

    def __len__(self) -> int:
        return len(self.columns)

    def batch(self, rows: Rows | Tensor) -> Impressions:
        """The rows, in their order."""
        source = self.columns
        index = torch.as_tensor(rows)
        if source.weights is None:  # one id a bag: a plain gather
            ids = source.ids.view(len(source), -1)[index].flatten()
            weights = None
        else:
            starts, ends = self.starts[index], self.starts[index + 1]
            sizes = ends - starts
            before = sizes.cumsum(0) - sizes
            flat = torch.repeat_interleave(starts - before, sizes) + torch.arange(int(sizes.sum()))
            ids, weights = source.ids[flat], source.weights[flat]
        return Impressions(
            source.click[index], source.conversion[index], source.numeric[index], ids, source.lengths[index], weights
        )

    def batches(self, size: int) -> Sequence[Rows]:
        """All rows in their order."""
        return np.array_split(np.arange(len(self)), max(1, -(-len(self) // size)))


class Shuffle(Sequence[Rows]):
    """The micro-batches of one epoch: a permutation from (seed, epoch) alone, cut into batches."""

    def __init__(self, rows: int, batch_size: int, seed: int, epoch: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, [seed, epoch]

    @cached_property
    def order(self) -> Rows:
        return np.random.Generator(np.random.PCG64(self.seed)).permutation(self.rows)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]


def read_split(folder: Path, schema: DataSchema, split: str) -> ImpressionTable:
    """A split of a prepared folder.

    Raises:
        UserError: the Parquet is missing, cut, or not what the schema says.
    """
    if split not in schema.splits:
        raise UserError(f"{folder}: no split {split}; the schema has {', '.join(schema.splits)}")
    file = folder / schema.splits[split].file
    wanted = [*LABELS, *(["p_ctr", "p_cvr"] if schema.truth else [])]
    for feature in schema.features:
        wanted += [feature.name] + ([f"{feature.name}.weights"] if feature.weighted else [])
    try:
        table = pq.ParquetFile(file).read(columns=wanted)  # of the file alone: its folder names no partitions
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; run prepare_ctr again") from None
    except OSError as error:
        raise UserError(f"{file}: {os.strerror(error.errno) if error.errno else error}") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not a whole Parquet file: {error}") from None
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise UserError(f"{file}: no column {missing[0]}, which schema.json names")
    if table.num_rows != schema.splits[split].rows:
        raise UserError(f"{file}: {table.num_rows} rows, but schema.json says {schema.splits[split].rows}")
    for feature in schema.features:
        _check_kind(table, feature, file)
    for name in LABELS:
        _check(pa.types.is_integer(table[name].type) and not table[name].null_count, file, name, "0 or 1 in every row")
    truth = {name: table[name].to_numpy() for name in ("p_ctr", "p_cvr")} if schema.truth else None
    features = {name: _whole(table[name]) for name in wanted}
    return ImpressionTable(impressions(features, Layout.of(schema), file), truth)


def impressions(columns: Mapping[str, pa.Array], layout: Layout, file: Path | None = None) -> Impressions:
    """Encoded columns (as in the Parquet splits) as one ragged stream. Labels may be absent (predicting).

    Raises:
        UserError: an id outside of its feature's table.
    """
    rows = len(next(iter(columns.values())))
    lengths = np.ones((rows, len(layout.id_features)), dtype=np.int32)
    for position, feature in enumerate(layout.id_features):
        if feature.kind == "multi":
            lengths[:, position] = np.diff(columns[feature.name].offsets.to_numpy())
    bags = lengths.reshape(-1).cumsum(dtype=np.int64).reshape(lengths.shape) - lengths  # where each bag starts
    ids = np.empty(int(lengths.sum(dtype=np.int64)), dtype=np.int32)
    weights = np.ones(len(ids), dtype=np.float32) if layout.pooled else None
    for position, (feature, offset) in enumerate(zip(layout.id_features, layout.offsets, strict=True)):
        column = columns[feature.name]
        values = (column.flatten() if feature.kind == "multi" else column).to_numpy(zero_copy_only=False)
        if len(values) and not 0 <= values.min() <= values.max() < feature.size:
            raise UserError(
                f"{file or 'input'}: column {feature.name}: id outside of 0..{feature.size - 1}; run prepare_ctr again"
            )
        size = lengths[:, position]
        first = np.repeat(bags[:, position], size)
        within = np.arange(len(values)) - np.repeat(np.cumsum(size, dtype=np.int64) - size, size)
        ids[first + within] = values + offset
        if weights is not None and feature.weighted:
            weights[first + within] = columns[f"{feature.name}.weights"].flatten().to_numpy(zero_copy_only=False)
        elif weights is not None and feature.kind == "multi":
            weights[first + within] = np.repeat(1 / np.maximum(size, 1), size)  # without weights: the mean
    numeric = np.empty((rows, len(layout.numeric_features)), dtype=np.float32)
    for position, feature in enumerate(layout.numeric_features):
        numeric[:, position] = columns[feature.name].to_numpy(zero_copy_only=False)
    labels = [
        torch.from_numpy(columns[name].to_numpy(zero_copy_only=False).astype(np.float32))
        if name in columns else torch.zeros(rows)
        for name in LABELS
    ]  # fmt: skip
    return Impressions(
        labels[0],
        labels[1],
        torch.from_numpy(numeric),
        torch.from_numpy(ids),
        torch.from_numpy(lengths),
        None if weights is None else torch.from_numpy(weights),
    )


def _check_kind(table: pa.Table, feature: Feature, file: Path) -> None:
    """A column holds what schema.json says of its feature, without gaps."""
    column = table[feature.name]
    if feature.kind == "numeric":
        _check(pa.types.is_floating(column.type) and not column.null_count, file, feature.name, "a number in every row")
    elif feature.kind == "categorical":
        _check(pa.types.is_integer(column.type) and not column.null_count, file, feature.name, "an id in every row")
    else:
        _check(_holds(column, pa.types.is_integer), file, feature.name, "a list of ids in every row")
        if feature.weighted:
            name = f"{feature.name}.weights"
            _check(_holds(table[name], pa.types.is_floating), file, name, "a list of weights in every row")
            same = pc.all(pc.equal(pc.list_value_length(column), pc.list_value_length(table[name]))).as_py()
            _check(same is not False, file, name, f"as many weights as {feature.name} has ids")


def _holds(column: pa.ChunkedArray, kind: Callable[[pa.DataType], bool]) -> bool:
    """Lists of the kind, none missing, with none missing in them."""
    if not pa.types.is_list(column.type) or not kind(column.type.value_type):
        return False
    return not column.null_count and not pc.list_flatten(column).null_count


def _check(holds: bool, file: Path, column: str, allowed: str) -> None:
    if not holds:
        raise UserError(
            f"{file}: column {column} is not as schema.json says, allowed: {allowed}; run prepare_ctr again"
        )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
