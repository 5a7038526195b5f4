"""Raw columns to the columns of the Parquet splits: the one encoder of `prepare_ctr` and of a logged model."""

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

from pipeline.errors import UserError, os_errors
from pipeline.tasks.mmoe.cells import Cells, Floats, Place, Texts, bad_cell, no_column, number_text, respelt
from pipeline.tasks.mmoe.schema import (
    FIRST_ID,
    MISSING,
    OUT_OF_VOCABULARY,
    VOCABULARY_FILE,
    DataSchema,
    Feature,
    sha256_of,
)

Ids = npt.NDArray[np.int32]
FNV_START, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


class Vocabulary:
    """The ids of one feature: the first value has id 2; the last `hash_buckets` ids are shared by all other values."""

    def __init__(self, values: Sequence[str], hash_buckets: int = 0, spelling: str = "text") -> None:
        """spelling: as in `Feature`."""
        self.ids = {value: number for number, value in enumerate(values, FIRST_ID)}
        self.hash_buckets, self.spelling = hash_buckets, spelling

    def encode(self, texts: Texts, *, typed: bool) -> Ids:
        """The id of each row.

        `typed`: the texts were numbers or truth values, which cannot know how a file spelt them. A CSV's `07` is 7
        to pandas: where 7 is not in the vocabulary, the one entry that means 7 is taken.
        """
        values, known = respelt(texts.values, self.spelling), self.ids
        ids = np.array([
            MISSING if text is None else known.get(text, OUT_OF_VOCABULARY) for text in values.to_pylist()
        ], dtype=np.int32)  # fmt: skip
        if typed:
            for position in np.flatnonzero(ids == OUT_OF_VOCABULARY):
                canonical = number_text(values[position].as_py()) or ""
                ids[position] = known.get(canonical) or self._by_value.get(canonical, OUT_OF_VOCABULARY)
        if self.hash_buckets:
            unknown = np.flatnonzero(ids == OUT_OF_VOCABULARY)
            buckets = text_hashes(values.take(pa.array(unknown))) % np.uint64(self.hash_buckets)
            ids[unknown] = FIRST_ID + len(known) + buckets.astype(np.int32)
        return ids[texts.codes]

    @cached_property
    def _by_value(self) -> dict[str, int]:
        """Canonical text of a number or truth value -> id of the only entry that spells it in another way."""
        spellings: dict[str, list[int]] = {}
        for text, number in self.ids.items():
            if not (text.isdecimal() and text[0] != "0"):  # canonical already; the many
                canonical = number_text(text)
                if canonical is not None:
                    spellings.setdefault(canonical, []).append(number)
        return {text: numbers[0] for text, numbers in spellings.items() if len(numbers) == 1}


class Encoder:
    """Raw columns in; ids, lists of ids and numbers out, by a schema and its vocabulary."""

    def __init__(self, schema: DataSchema, vocabularies: Mapping[str, Sequence[str]]) -> None:
        self.schema = schema
        self.cells = Cells(schema.missing_values, schema.strip)
        features = {feature.name: feature for feature in schema.features}
        self.vocabularies = {
            name: Vocabulary(values, features[name].hash_buckets, features[name].spelling)
            for name, values in vocabularies.items()
        }

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """From `schema.json` and `vocabulary.parquet`.

        Raises:
            UserError: one of them is missing, damaged, or not of the other.
        """
        schema = DataSchema.read(folder)
        file = folder / VOCABULARY_FILE
        with os_errors(file):
            if sha256_of(file) != schema.vocabulary_sha256:
                raise UserError(f"{file}: not the vocabulary that schema.json was written with; run prepare_ctr again")
            table = pq.ParquetFile(file).read()
        return cls(schema, {
            feature.name: table.filter(pc.equal(table["feature"], feature.name))["value"].to_pylist()
            for feature in schema.features if feature.kind != "numeric"
        })  # fmt: skip

    def encode(self, frame: pd.DataFrame) -> dict[str, pa.Array]:
        """A raw frame, as pandas reads it, as the columns of the splits without the labels.

        Raises:
            UserError: a column is missing, or a value is (its feature has no rule for it), or is no number.
        """
        for name in self.schema.raw_columns:
            if name not in frame.columns:
                raise UserError(f"input: {no_column(name, [str(column) for column in frame.columns])}")
            if not isinstance(frame[name], pd.Series):
                raise UserError(f"input: column {name} is there twice")
        columns, mixed = {}, set()
        for feature in self.schema.features:
            for name in filter(None, (feature.name, feature.weights)):
                columns[name], of_types = _as_array(frame[name], feature.separator)
                mixed |= {name} if of_types else set()
        return self.encode_columns(columns, lambda row: f"input: row {row + 1}", mixed)

    def encode_columns(
        self, raw: Mapping[str, pa.Array], place: Place, mixed: Collection[str] = ()
    ) -> dict[str, pa.Array]:
        """Raw Arrow columns as those of the splits; `mixed` columns are texts that were several types."""
        encoded: dict[str, pa.Array] = {}
        for feature in self.schema.features:
            name, column = feature.name, raw[feature.name]
            if feature.kind == "numeric":
                encoded[name] = pa.array(self._numeric(feature, column, place))
            elif feature.kind == "categorical":
                texts = self.cells.texts(column, name, place)
                typed = name in mixed or not _holds_text(column.type)
                encoded[name] = pa.array(self.vocabularies[name].encode(texts, typed=typed))
            else:
                weights = raw[feature.weights] if feature.weights else None
                bags = self.cells.bags(name, column, weights, feature, place)
                typed = name in mixed or not _holds_text(column.type)
                offsets = pa.array(np.concatenate([[0], np.cumsum(bags.lengths)]).astype(np.int32))
                ids = self.vocabularies[name].encode(bags.texts, typed=typed)
                encoded[name] = pa.ListArray.from_arrays(offsets, pa.array(ids))
                if bags.weights is not None:
                    values = pa.array(bags.weights.astype(np.float32))
                    encoded[f"{name}.weights"] = pa.ListArray.from_arrays(offsets, values)
        return encoded

    def _numeric(self, feature: Feature, column: pa.Array, place: Place) -> npt.NDArray[np.float32]:
        values = self.cells.numbers(column, feature.name, place)
        if feature.fill is None:
            refuse_missing(values, feature.name, place)
        else:
            values = np.where(np.isnan(values), feature.fill, values)
        return to_float32(values, feature.name, place)


def text_hashes(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """FNV-1a (64 bits) of the UTF-8 bytes of each text, finished as SplitMix64 is. No text is null."""
    whole = pa.concat_arrays([texts.cast(pa.string())])  # from its own buffers' beginning
    _, offsets, text = whole.buffers()
    starts = np.frombuffer(offsets, dtype=np.int32)[whole.offset : whole.offset + len(whole) + 1].astype(np.int64)
    letters = np.frombuffer(text, dtype=np.uint8) if text is not None else np.zeros(0, dtype=np.uint8)
    lengths = np.diff(starts)
    longest_first = np.argsort(-lengths, kind="stable")
    hashes = np.full(len(lengths), FNV_START, dtype=np.uint64)
    for position in range(lengths.max(initial=0)):
        longer = longest_first[: np.searchsorted(-lengths[longest_first], -position)]
        hashes[longer] = (hashes[longer] ^ letters[starts[longer] + position]) * FNV_PRIME
    return splitmix64(hashes)


def split_positions(keys: npt.NDArray[np.uint64], seed: int, shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Which of the shares each row is in, by a hash of its key and the seed: no batch or file border matters.

    keys: [rows]. shares: relative to their sum.
    """
    start = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    uniform = (splitmix64(keys ^ start) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    borders = np.cumsum(shares)
    return np.searchsorted(borders[:-1] / borders[-1], uniform, side="right")


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash that is a permutation (Steele, Lea & Flood 2014, the finaliser of SplitMix)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap round silently
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def refuse_missing(values: Floats, column: str, place: Place) -> None:
    missing = np.flatnonzero(np.isnan(values))
    if len(missing):
        raise bad_cell(place, missing[0], column, None, "a number (its feature has no rule for missing values)")


def to_float32(values: Floats, column: str, place: Place) -> npt.NDArray[np.float32]:
    """NaN stays; infinity, and what float32 makes infinite, is refused."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    infinite = np.flatnonzero(np.isinf(narrow))
    if len(infinite):
        row = int(infinite[0])
        raise bad_cell(place, row, column, float(values[row]), "finite numbers up to 3.4e38")
    return narrow


def _holds_text(kind: pa.DataType) -> bool:
    while hasattr(kind, "value_type"):  # dictionaries and lists
        kind = kind.value_type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return not (numeric or pa.types.is_boolean(kind))


def _as_array(series: "pd.Series[Any]", separator: str) -> tuple[pa.Array, bool]:
    """A column of a frame, and whether it mixes types, which makes it text."""
    try:
        array, mixed = pa.Array.from_pandas(series), False
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        # what pandas makes of a file whose chunks it read as different types: rare enough for a cell at a time
        array, mixed = pa.array([_cell_text(cell, separator) for cell in series], pa.string()), True
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array, mixed


def _cell_text(cell: Any, separator: str) -> str | None:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list | tuple | np.ndarray):
        return separator.join(_cell_text(part, separator) or "" for part in cell)
    if cell is None or pd.isna(cell):
        return None
    return number_text(str(cell)) or str(cell)
