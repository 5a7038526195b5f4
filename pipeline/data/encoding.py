"""Encode raw columns as the columns of a prepared folder; `prepare_ctr` and logged models share this encoder."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.canonical_text import number_text, respelt
from pipeline.data.cells import Cells, Floats, Place, Texts, cell_error, no_column
from pipeline.data.digests import text_hashes
from pipeline.data.schema import FIRST_ID, MISSING, OUT_OF_VOCABULARY, VOCABULARY_FILE, DataSchema, Feature
from pipeline.errors import UserError, os_errors
from pipeline.storage.files import file_sha256

Ids = npt.NDArray[np.int32]


class Encoder:
    """Encode raw columns as ids, lists of ids and numbers."""

    def __init__(self, features: Sequence[Feature], cells: Cells, vocabularies: Mapping[str, Sequence[str]]) -> None:
        """vocabularies: for each id feature, its values in the order of their ids."""
        self.features, self.cells = features, cells
        self.vocabularies = {
            feature.name: Vocabulary(vocabularies[feature.name], feature)
            for feature in features if feature.kind != "numeric"
        }  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read `schema.json` and `vocabulary.parquet`.

        Raises:
            UserError: a file is missing or damaged, or the two files do not belong together.
        """
        schema = DataSchema.read(folder)
        file = folder / VOCABULARY_FILE
        with os_errors(file):
            if file_sha256(file) != schema.vocabulary_sha256:
                raise UserError(f"{file}: not the vocabulary that schema.json was written with; run prepare_ctr again")
            table = pq.ParquetFile(file).read()
        cells = Cells(schema.missing_values, schema.strip, schema.decimal, schema.thousands)
        return cls(schema.features, cells, {
            feature.name: table.filter(pc.equal(table["feature"], feature.name))["value"].to_pylist()
            for feature in schema.features if feature.kind != "numeric"
        })  # fmt: skip

    def encode(self, frame: pd.DataFrame) -> dict[str, pa.Array]:
        """Encode a raw frame as read by pandas. Labels are not needed.

        Raises:
            UserError: a column is missing or ambiguous, or contains an invalid value.
        """
        columns, typed = {}, set()
        for feature in self.features:
            for name in filter(None, (feature.name, feature.weights)):
                if name not in frame.columns:
                    raise UserError(f"input: {no_column(name, [str(column) for column in frame.columns])}")
                if not isinstance(frame[name], pd.Series):
                    raise UserError(f"input: column {name} appears twice")
                try:
                    array = pa.Array.from_pandas(frame[name])
                    lost = not _holds_text(array.type)
                except (pa.ArrowException, TypeError, ValueError, OverflowError):
                    # pandas may read parts of a column as different types; this is rare, so convert cell by cell
                    is_number = feature.kind == "numeric" or name == feature.weights
                    decimal = self.cells.decimal if is_number else "."
                    texts = [_cell_text(cell, feature.separator, decimal) for cell in frame[name]]
                    array, lost = pa.array(texts, pa.string()), True
                if lost:
                    typed.add(name)
                columns[name] = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        return self.encode_columns(columns, lambda row: f"input: row {row + 1}", typed)

    def encode_columns(
        self, raw: Mapping[str, pa.Array], place: Place, typed: Collection[str] = ()
    ) -> dict[str, pa.Array]:
        """Encode raw Arrow columns. typed: columns of numbers or booleans, whose spelling in a file is lost."""
        encoded: dict[str, pa.Array] = {}
        for feature in self.features:
            name, column = feature.name, raw[feature.name]
            if feature.kind == "numeric":
                values = self.cells.numbers(column, name, place)
                encoded[name] = pa.array(filled(values, feature.fill, name, place))
            elif feature.kind == "categorical":
                texts = self.cells.texts(column, name, place)
                encoded[name] = pa.array(self.vocabularies[name].encode(texts, typed=name in typed))
            else:
                weights = raw[feature.weights] if feature.weights else None
                bags = self.cells.bags(name, column, weights, feature, place)
                offsets = pa.array(np.concatenate([[0], np.cumsum(bags.lengths)]).astype(np.int32))
                ids = self.vocabularies[name].encode(bags.texts, typed=name in typed)
                encoded[name] = pa.ListArray.from_arrays(offsets, pa.array(ids))
                if bags.weights is not None:
                    flat = pa.array(bags.weights.astype(np.float32))
                    encoded[f"{name}.weights"] = pa.ListArray.from_arrays(offsets, flat)
        return encoded


class Vocabulary:
    """Ids of one feature. The first value has id 2; the last `hash_buckets` ids are shared by all other values."""

    def __init__(self, values: Sequence[str], feature: Feature) -> None:
        self.ids = {value: number for number, value in enumerate(values, FIRST_ID)}
        self.hash_buckets, self.spelling = feature.hash_buckets, feature.spelling

    def encode(self, texts: Texts, *, typed: bool) -> Ids:
        """Return the id of each row.

        typed: the texts come from numbers or booleans, whose spelling in the file is lost. For example, pandas reads
        `07` in a CSV file as 7. If 7 is not in the vocabulary, the only entry with the value 7 is used.
        """
        values = respelt(texts.values, self.spelling)
        ids = np.array([
            MISSING if text is None else self.ids.get(text, OUT_OF_VOCABULARY) for text in values.to_pylist()
        ], dtype=np.int32)  # fmt: skip
        if typed:
            for position in np.flatnonzero(ids == OUT_OF_VOCABULARY):
                canonical = number_text(values[position].as_py()) or ""
                ids[position] = self.ids.get(canonical) or self._ids_by_value.get(canonical, OUT_OF_VOCABULARY)
        if self.hash_buckets:
            unknown = np.flatnonzero(ids == OUT_OF_VOCABULARY)
            buckets = text_hashes(values.take(pa.array(unknown))) % np.uint64(self.hash_buckets)
            ids[unknown] = FIRST_ID + len(self.ids) + buckets.astype(np.int32)
        return ids[texts.codes]

    @cached_property
    def _ids_by_value(self) -> dict[str, int]:
        """Map the canonical text of a number or boolean to the id of the only entry that spells it differently."""
        ids: dict[str, list[int]] = {}
        for text, number in self.ids.items():
            if not (text.isdecimal() and text[0] != "0"):  # most are canonical already
                canonical = number_text(text)
                if canonical is not None:
                    ids.setdefault(canonical, []).append(number)
        return {text: numbers[0] for text, numbers in ids.items() if len(numbers) == 1}


def filled(values: Floats, fill: float | None, column: str, place: Place) -> npt.NDArray[np.float32]:
    """Replace missing values (NaN) with `fill`, and convert to float32.

    Raises:
        UserError: a value is missing and `fill` is None, or a number is infinite as float32.
    """
    missing = np.flatnonzero(np.isnan(values))
    if fill is None and len(missing):
        raise cell_error(place, missing[0], column, None, "a number (its feature has no rule for missing values)")
    if fill is not None:
        values = np.where(np.isnan(values), fill, values)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    infinite = np.flatnonzero(np.isinf(narrow))
    if len(infinite):
        row = int(infinite[0])
        raise cell_error(place, row, column, float(values[row]), "finite numbers up to 3.4e38")
    return narrow


def _holds_text(kind: pa.DataType) -> bool:
    while hasattr(kind, "value_type"):  # dictionaries and lists
        kind = kind.value_type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return not (numeric or pa.types.is_boolean(kind))


def _cell_text(cell: Any, separator: str, decimal: str) -> str | None:
    """Text of a cell as in a file; decimal: the mark of its numbers."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | tuple | np.ndarray):
        return separator.join(_cell_text(part, separator, decimal) or "" for part in cell)
    if cell is None or pd.isna(cell):
        return None
    return (number_text(str(cell)) or str(cell)).replace(".", decimal)
