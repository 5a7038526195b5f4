"""What a source schema asks of a file: checked against the columns that are there, then applied batch by batch."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.tasks.mmoe.cells import Cells, bad_cell, no_column, respelt
from pipeline.tasks.mmoe.conditions import Condition, parse
from pipeline.tasks.mmoe.encoding import split_positions, text_hashes
from pipeline.tasks.mmoe.raw_files import Batch, Source
from pipeline.tasks.mmoe.schema import LABELS, SPLITS, SourceSchema, Where

CLICK, CONVERSION = LABELS
_LABEL_VALUES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


class Plan:
    """Which columns are read, what the labels are, and which split a row belongs to.

    Raises:
        UserError: the schema names an absent column, a label that is no condition, or a feature that tells the label.
    """

    def __init__(self, declared: SourceSchema, schema_file: Path, source: Source) -> None:
        self.declared, self.schema_file, self.file = declared, schema_file, source.files[0].path
        self.names = source.names(source.files[0])
        self.cells = Cells(declared.missing_values, declared.csv.strip)
        self.label_cells = Cells(declared.missing_values, strip=True)
        self.click = self._label(CLICK, declared.labels.click)
        self.conversion = self._label(CONVERSION, declared.labels.conversion)
        if CLICK in _columns(self.conversion) and CLICK in self.names and declared.labels.click != CLICK:
            raise self._wrong(
                "labels.conversion",
                f"{CLICK} is both a column of {self.file} and the label labels.click ({declared.labels.click}); "
                "allowed: one of both, so rename the column",
            )
        self.given = {file.split for file in source.files if file.split}
        self.conditions = {
            split: self._condition(f"split.{split}.where", share.where)
            for split, share in (("validation", declared.split.validation), ("test", declared.split.test))
            if isinstance(share, Where)
        }
        for split in self.given & self.conditions.keys():
            raise self._wrong(
                f"split.{split}", f"found a condition, and data.{split} names files; allowed: one of both"
            )
        label_columns = [
            *self._known("labels.click", _columns(self.click)),
            *self._known("labels.conversion", [name for name in _columns(self.conversion) if name != CLICK]),
        ]
        written = set(LABELS)
        for name, feature in declared.features.items():
            key = f"features.{name}"
            for column in (name, feature.weights):
                if column in label_columns:
                    raise self._wrong(key, f"a label reads column {column}; as a feature it would leak the label")
            for column in (name, f"{name}.weights") if feature.weighted else (name,):
                if column in written:
                    raise self._wrong(key, f"the prepared files have a column {column} already; rename this one")
                written.add(column)
            self._known(key, [name])
            self._known(f"{key}.weights", [feature.weights] if feature.weights else [])
            if isinstance(feature.missing, float) and abs(feature.missing) > float(np.finfo(np.float32).max):
                raise self._wrong(f"{key}.missing", f"found {feature.missing}, allowed: numbers up to 3.4e38")
        by = self._known("split.by", [declared.split.by] if declared.split.by is not None else [])
        by += [column for split, condition in self.conditions.items()
               for column in self._known(f"split.{split}.where", _columns(condition))]  # fmt: skip
        weights = [feature.weights for feature in declared.features.values() if feature.weights]
        self.columns = list(dict.fromkeys([*label_columns, *declared.features, *weights, *by]))

    def labels(self, batch: Batch) -> dict[str, pa.Array]:
        """`click` and `conversion` (int8).

        Raises:
            UserError: a value that is not 0 or 1, or a conversion without a click.
        """
        click = _evaluated(self.click, LabelColumns(self.label_cells, batch, None))
        conversion = _evaluated(self.conversion, LabelColumns(self.label_cells, batch, click))
        clicks, conversions = (values.to_numpy(zero_copy_only=False) for values in (click, conversion))
        orphans = np.flatnonzero(conversions & ~clicks)
        if len(orphans):
            labels = self.declared.labels
            raise UserError(
                f"{batch.place(int(orphans[0]))}: a conversion ({labels.conversion}) without a click ({labels.click}), "
                "allowed: conversions of clicked rows"
            )
        return {CLICK: click.cast(pa.int8()), CONVERSION: conversion.cast(pa.int8())}

    def split(self, batch: Batch) -> npt.NDArray[np.int64]:
        """The position in SPLITS of each row: that of its file, or of the first condition that holds for it (test, then
        validation), or else by a hash of (seed, key), so that no batch or file border matters.

        The key is the row's number among all rows, or the text of the column `split.by`; a row without a value there
        is on its own.
        """
        if batch.split:
            return np.full(batch.rows, SPLITS.index(batch.split))
        declared = self.declared.split
        keys = np.arange(batch.start, batch.start + batch.rows, dtype=np.uint64)
        if declared.by is not None:
            texts = self.cells.texts(batch.columns[declared.by], declared.by, batch.place)
            there = texts.values.is_valid().to_numpy(zero_copy_only=False)
            hashes = text_hashes(respelt(respelt(texts.values, "whole"), "truth").fill_null(""))
            keys = np.where(there[texts.codes], hashes[texts.codes], keys)
        divided = [split for split in SPLITS if split not in self.given and split not in self.conditions]
        shares = [float(getattr(declared, split)) for split in divided]
        numbers = np.array([SPLITS.index(split) for split in divided])
        positions = numbers[split_positions(keys, declared.seed, shares)]
        columns = LabelColumns(self.label_cells, batch, None)
        for split, condition in self.conditions.items():  # the test split's is the last, and so the first that counts
            holds = _evaluated(condition, columns).to_numpy(zero_copy_only=False)
            positions = np.where(holds, SPLITS.index(split), positions)
        return positions

    def _label(self, label: str, text: str) -> str | Condition:
        """A column's name, or else a condition."""
        return text if text in self.names else self._condition(f"labels.{label}", text)

    def _condition(self, key: str, text: str) -> Condition:
        try:
            condition = parse(text)
        except UserError as error:
            raise self._wrong(key, f"neither a column of {self.file} nor a condition: {error}") from None
        for constant in condition.texts:
            if constant and constant in self.declared.missing_values:
                raise self._wrong(
                    key,
                    f"compares with {constant!r}, which missing_values reads as no value, and that is equal to "
                    "nothing; allowed: `is missing`, `is not missing`, or another text",
                )
        return condition

    def _known(self, key: str, columns: list[str]) -> list[str]:
        for column in columns:
            if column not in self.names:
                raise self._wrong(key, f"{no_column(column, self.names)} ({self.file})")
        return columns

    def _wrong(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.schema_file}: {key}: {problem}")


class LabelColumns:
    """A batch as label conditions read it; with `click` given, that name is the label."""

    def __init__(self, cells: Cells, batch: Batch, click: pa.Array | None) -> None:
        self.cells, self.batch, self.click = cells, batch, click

    def text(self, column: str) -> pa.Array:
        values, codes = self.cells.texts(self._raw(column), column, self.batch.place)
        return values.take(pa.array(codes))

    def number(self, column: str) -> pa.Array:
        return pa.array(self.cells.numbers(self._raw(column), column, self.batch.place))

    def label(self, column: str) -> pa.Array:
        raw = self._raw(column)
        values, codes = self.cells.texts(raw, column, self.batch.place)
        truth = [_LABEL_VALUES.get(text.lower()) if text is not None else None for text in values.to_pylist()]
        unknown = np.flatnonzero(np.array([value is None for value in truth])[codes])
        if len(unknown):
            row = int(unknown[0])
            raise bad_cell(self.batch.place, row, column, raw[row].as_py(), "0 or 1")
        return pa.array(np.array(truth, dtype=bool)[codes])

    def _raw(self, column: str) -> pa.Array:
        return self.click if self.click is not None and column == CLICK else self.batch.columns[column]


def _evaluated(label: str | Condition, columns: LabelColumns) -> pa.Array:
    return columns.label(label) if isinstance(label, str) else label.evaluate(columns)


def _columns(label: str | Condition) -> list[str]:
    return [label] if isinstance(label, str) else list(label.columns)
