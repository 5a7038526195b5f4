"""Labels and splits of raw impressions, as declared by a source schema."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.canonical_text import respelt
from pipeline.data.cells import Cells, cell_error, no_column
from pipeline.data.digests import split_positions, text_hashes
from pipeline.data.raw_schema import Where
from pipeline.data.raw_table import Batch, RawTable
from pipeline.data.schema import LABELS, SAMPLE_WEIGHT, SPLITS
from pipeline.errors import UserError
from pipeline.tasks.mmoe.prepare.conditions import BatchColumns, Condition, parse
from pipeline.tasks.mmoe.prepare.source_schema import SourceSchema

CLICK, CONVERSION = LABELS
WEIGHT = "a finite number above 0 as the row's weight"


class LabelsAndSplits:
    """Determines the columns to read, the labels, and the split of each row.

    Raises:
        UserError: a column is missing, a label is neither a column nor a condition, or a feature leaks the label.
    """

    def __init__(self, declared: SourceSchema, schema_file: Path, source: RawTable) -> None:
        self.declared, self.schema_file, self.file = declared, schema_file, source.files[0].path
        self.names = source.names(source.files[0])
        dialect = declared.csv
        self.cells = Cells(declared.missing_values, dialect.strip, dialect.decimal, dialect.thousands)
        self.label_cells = replace(self.cells, strip=True)
        self.click = self._label(CLICK, declared.labels.click)
        conversion = declared.labels.conversion
        self.conversion = None if conversion is None else self._label(CONVERSION, conversion)
        if CLICK in _columns(self.conversion) and CLICK in self.names and declared.labels.click != CLICK:
            raise self._error(
                "labels.conversion",
                f"{CLICK} is both a column of {self.file} and the label labels.click ({declared.labels.click}); "
                "allowed: one of both, so rename the column",
            )
        self.own_splits = {file.split for file in source.files if file.split}
        self.conditions = {
            split: self._condition(f"split.{split}.where", share.where)
            for split, share in (("validation", declared.split.validation), ("test", declared.split.test))
            if isinstance(share, Where)
        }
        for split in self.own_splits & self.conditions.keys():
            raise self._error(
                f"split.{split}", f"found a condition, and data.{split} names files; allowed: one of both"
            )
        label_columns = [*_columns(self.click), *(name for name in _columns(self.conversion) if name != CLICK)]
        self._check_columns("labels.click", _columns(self.click))
        self._check_columns("labels.conversion", label_columns)
        weight_columns = [] if declared.sample_weight is None else [declared.sample_weight]
        self._check_columns("sample_weight", weight_columns)
        self._check_features(label_columns)
        split_columns = [] if declared.split.by is None else [declared.split.by]
        self._check_columns("split.by", split_columns)
        for split, condition in self.conditions.items():
            self._check_columns(f"split.{split}.where", condition.columns)
            split_columns += condition.columns
        weights = [feature.weights for feature in declared.features.values() if feature.weights]
        self.columns = list(
            dict.fromkeys([*label_columns, *weight_columns, *declared.features, *weights, *split_columns])
        )

    def row_columns(self, batch: Batch) -> dict[str, pa.Array]:
        """Compute the columns `click` and `conversion` (int8), and `sample_weight` (float32) if rows have weights.

        Raises:
            UserError: a label is not 0 or 1, a weight is not above 0, or there is a conversion without a click.
        """
        click = _evaluated(self.click, BatchColumns(self.label_cells, batch, None))
        if self.conversion is None:
            conversion = pa.array(np.zeros(batch.rows, bool))
        else:
            conversion = _evaluated(self.conversion, BatchColumns(self.label_cells, batch, click))
        clicks, conversions = (values.to_numpy(zero_copy_only=False) for values in (click, conversion))
        orphans = np.flatnonzero(conversions & ~clicks)
        if len(orphans):
            labels = self.declared.labels
            raise UserError(
                f"{batch.place(int(orphans[0]))}: a conversion ({labels.conversion}) without a click ({labels.click}), "
                "allowed: conversions of clicked rows"
            )
        return {CLICK: click.cast(pa.int8()), CONVERSION: conversion.cast(pa.int8())} | self._weight(batch)

    def _weight(self, batch: Batch) -> dict[str, pa.Array]:
        name = self.declared.sample_weight
        if name is None:
            return {}
        with np.errstate(over="ignore"):
            weights = self.label_cells.numbers(batch.columns[name], name, batch.place, WEIGHT).astype(np.float32)
        wrong = np.flatnonzero(~((weights > 0) & np.isfinite(weights)))
        if len(wrong):
            row = int(wrong[0])
            raise cell_error(batch.place, row, name, batch.columns[name][row].as_py(), WEIGHT)
        return {SAMPLE_WEIGHT: pa.array(weights)}

    def split(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Return the index in SPLITS of each row's split.

        The split is given by the row's file, or else by the first condition that holds (test, then validation), or else
        by a hash of (seed, key), which does not depend on batches or files. The key is the text of the column
        `split.by` if it has a value, or else the number of the row among all rows.
        """
        if batch.file.split:
            return np.full(batch.rows, SPLITS.index(batch.file.split))
        declared = self.declared.split
        keys = np.arange(batch.start, batch.start + batch.rows, dtype=np.uint64)
        if declared.by is not None:
            texts = self.cells.texts(batch.columns[declared.by], declared.by, batch.place)
            valid = texts.values.is_valid().to_numpy(zero_copy_only=False)
            hashes = text_hashes(respelt(texts.values, "whole", "truth").fill_null(""))
            keys = np.where(valid[texts.codes], hashes[texts.codes], keys)
        divided = [split for split in SPLITS if split not in self.own_splits and split not in self.conditions]
        shares = [float(getattr(declared, split)) for split in divided]
        numbers = np.array([SPLITS.index(split) for split in divided])
        positions = numbers[split_positions(keys, declared.seed, shares)]
        columns = BatchColumns(self.label_cells, batch, None)
        for split, condition in self.conditions.items():  # the last one, test, takes precedence
            holds = condition.evaluate(columns).to_numpy(zero_copy_only=False)
            positions = np.where(holds, SPLITS.index(split), positions)
        return positions

    def _label(self, label: str, text: str) -> str | Condition:
        """Return the text if it is a column's name, else the condition."""
        return text if text in self.names else self._condition(f"labels.{label}", text)

    def _condition(self, key: str, text: str) -> Condition:
        try:
            condition = parse(text)
        except UserError as error:
            raise self._error(key, f"neither a column of {self.file} nor a condition: {error}") from None
        texts = pa.array([*condition.texts], pa.string())
        values, codes = self.label_cells.texts(texts, key, lambda _: str(self.schema_file))
        for constant, missing in zip(condition.texts, values.is_null().take(pa.array(codes)).to_pylist(), strict=True):
            if constant and missing:
                raise self._error(
                    key,
                    f"compares with {constant!r}, which missing_values reads as no value, and that is equal to "
                    "nothing; allowed: `is missing`, `is not missing`, or another text",
                )
        return condition

    def _check_features(self, label_columns: list[str]) -> None:
        written = {*LABELS, *([SAMPLE_WEIGHT] if self.declared.sample_weight else [])}
        for name, feature in self.declared.features.items():
            key, weights = f"features.{name}", [feature.weights] if feature.weights else []
            for column in (name, *weights):
                if column in label_columns:
                    raise self._error(key, f"a label reads column {column}; as a feature it would leak the label")
            for column in (name, f"{name}.weights") if feature.weighted else (name,):
                if column in written:
                    raise self._error(key, f"the prepared files have a column {column} already; rename this one")
                written.add(column)
            self._check_columns(key, [name])
            self._check_columns(f"{key}.weights", weights)
            if isinstance(feature.missing, float) and abs(feature.missing) > float(np.finfo(np.float32).max):
                raise self._error(f"{key}.missing", f"found {feature.missing}, allowed: numbers up to 3.4e38")

    def _check_columns(self, key: str, columns: Iterable[str]) -> None:
        for column in columns:
            if column not in self.names:
                raise self._error(key, f"{no_column(column, self.names)} ({self.file})")

    def _error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.schema_file}: {key}: {problem}")


def _evaluated(label: str | Condition, columns: BatchColumns) -> pa.Array:
    return columns.label(label) if isinstance(label, str) else label.evaluate(columns)


def _columns(label: str | Condition | None) -> list[str]:
    return [label] if isinstance(label, str) else list(label.columns) if label else []
