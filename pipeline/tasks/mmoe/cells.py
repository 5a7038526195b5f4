"""Raw columns as text, numbers and bags of ids: what a value is and what is missing, for files and frames alike.

A category is its text, and has one text in every format: strings as they are; integers and decimals in digits; floats
in the shortest decimals that give them back (`0.5`, `3.0`, `1e+22`); truth values as `True` and `False`; dates as
`2024-05-01`, times as `2024-05-01 12:00:00` with a fraction where there is one, without the time at midnight. Where
every value of a column is a whole number, `3.0` is `3`; where every one is a truth value, `true` is `True`.
"""

import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.strict_config import nearest
from pipeline.errors import UserError
from pipeline.tasks.mmoe.schema import Feature, FeatureSource

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Place = Callable[[int], str]  # row of a batch, from 0 -> what to call it in an error

_INTEGER = re.compile(r"[+-]?[0-9]+")
WHOLE = r"^[+-]?[0-9]+(\.0*)?$"
TRUTH = r"^(?i:true|false)$"
_MIDNIGHT = r"^(\d{4}-\d\d-\d\d)[ T]00:00:00(\.0+)?$"
_TIME = r"^(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d*?[1-9])?\.?0*$"
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[-+.\w]+"""
_LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})\s*(?:,\s*(?:{_ITEM})\s*)*)?\]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Texts(NamedTuple):
    """A column as its distinct texts and, for each row, the position of its text."""

    values: pa.Array  # string; null = missing; the last one is always null
    codes: Ints  # [rows]


class Bags(NamedTuple):
    """A multi-valued column; missing ids are already left out."""

    texts: Texts  # of the ids of all rows, one after another
    lengths: Ints  # [rows] ids of each row
    owners: Ints  # [ids] row of each id
    weights: Floats | None  # [ids]


def bad_cell(place: Place, row: int, column: str, found: Any, allowed: str) -> UserError:
    missing = found is None or (isinstance(found, float) and math.isnan(found))
    shown = "no value" if missing else repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return UserError(f"{place(int(row))}, column {column}: found {shown}, allowed: {allowed}")


def no_column(name: str, names: Sequence[str]) -> str:
    """`no column X`, and what may have been meant."""
    hint = nearest(name, list(names))
    if "did you mean" not in hint and len(names) > 12:
        hint = f"; there are {len(names)}: {', '.join(names[:12])}, ..."
    return f"no column {name}{hint}"


def is_lists(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def plain(raw: pa.Array, column: str, place: Place) -> pa.Array:
    """A column as one of string, integer, float, boolean, null, or a list.

    Raises:
        UserError: the type has no text, or bytes are not UTF-8.
    """
    kind, types = raw.type, pa.types
    if types.is_dictionary(kind):
        return plain(raw.dictionary_decode(), column, place)
    if any(is_(kind) for is_ in (types.is_string, types.is_integer, types.is_boolean, types.is_null, is_lists)):
        return raw
    if types.is_floating(kind):
        return raw.cast(pa.float32()) if types.is_float16(kind) else raw
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _decoded(raw, column, place)
    if types.is_timestamp(kind):
        raw = raw.cast(pa.timestamp("us"), safe=False)  # one text whatever the unit
    textual = (types.is_large_string, types.is_string_view, types.is_date, types.is_timestamp, types.is_decimal)
    if any(is_(kind) for is_ in textual):
        return raw.cast(pa.string())
    allowed = "text, numbers, truth values, dates, or lists of them"
    raise UserError(f"{place(0)}, column {column}: found values of type {kind}, allowed: {allowed}")


def _decoded(raw: pa.Array, column: str, place: Place) -> pa.Array:
    try:
        return raw.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        for row, value in enumerate(raw.to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                raise bad_cell(place, row, column, value, "UTF-8 text") from None
        raise


def number_text(text: str) -> str | None:
    """The text of a number or truth value in canonical form (`07` -> `7`, `true` -> `True`), or None."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.capitalize()
    try:
        if _INTEGER.fullmatch(text):
            return str(int(text))  # exact, however long
        return _float_text(float(text)) if _NUMBER.fullmatch(text) else None
    except (ValueError, OverflowError):
        return None


def _decimal_text(text: str) -> str | None:
    return repr(float(text)) if _NUMBER.fullmatch(text.strip()) else None


def _float_text(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _canonical(distinct: pa.Array) -> pa.Array:
    """The texts of distinct values; null where NaN."""
    kind = distinct.type
    if pa.types.is_boolean(kind):
        return pc.if_else(distinct, "True", "False")
    if pa.types.is_floating(kind):
        values = distinct.to_numpy(zero_copy_only=False)
        return pa.array(values.astype(str).astype(object), pa.string(), mask=np.isnan(values))
    return distinct.cast(pa.string())


def _times(texts: pa.Array) -> pa.Array:
    """Times among the texts as this module's head says."""
    return pc.replace_substring_regex(pc.replace_substring_regex(texts, _MIDNIGHT, r"\1"), _TIME, r"\1 \2\3")


def spelling(texts: pa.Array) -> set[str]:
    """Which of `whole` and `truth` all texts are (see `Feature.spelling`); nulls do not count."""
    return {
        name for name, pattern in (("whole", WHOLE), ("truth", TRUTH))
        if pc.all(pc.match_substring_regex(texts, pattern), min_count=0).as_py() is not False
    }  # fmt: skip


def respelt(texts: pa.Array, spelling: str) -> pa.Array:
    """The texts as a column of that spelling has them; a text that is none of its kind stays as it is."""
    if spelling == "whole" and pc.any(pc.match_substring(texts, ".")).as_py():
        return pc.replace_substring_regex(texts, r"^([+-]?[0-9]+)\.0*$", r"\1")
    return (
        pc.if_else(pc.match_substring_regex(texts, TRUTH), pc.utf8_capitalize(texts), texts)
        if spelling == "truth"
        else texts
    )


@dataclass(frozen=True)
class Cells:
    """How cells are read: what is missing, and whether blanks around text count."""

    missing: tuple[str, ...]
    strip: bool = True

    def texts(self, raw: pa.Array, column: str, place: Place) -> Texts:
        """A column with one value a row as texts."""
        raw = plain(raw, column, place)
        if is_lists(raw.type):
            raise UserError(f"{place(0)}, column {column}: found lists, allowed: one value a row")
        encoded = raw.dictionary_encode()
        values = _canonical(encoded.dictionary)
        missing = self._missing_text
        if not pa.types.is_string(raw.type):
            missing = self._missing_values
        elif self.strip:
            values = pc.utf8_trim_whitespace(values)
        if (pc.max(pc.binary_length(values)).as_py() or 0) >= len("2024-05-01 00:00:00"):
            values = _times(values)
        values = pc.if_else(pc.is_in(values, value_set=missing), pa.scalar(None, pa.string()), values)
        codes = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
        return Texts(pa.concat_arrays([values, pa.nulls(1, pa.string())]), codes)

    def numbers(self, raw: pa.Array, column: str, place: Place, allowed: str = "a number") -> Floats:
        """A column as numbers; NaN = missing. A number that a missing value names is missing in any spelling.

        Raises:
            UserError: a text is not a number.
        """
        raw = plain(raw, column, place)
        if is_lists(raw.type):
            raise UserError(f"{place(0)}, column {column}: found lists, allowed: {allowed} a row")
        if pa.types.is_string(raw.type):
            text = pc.utf8_trim_whitespace(raw)
            text = pc.if_else(pc.is_in(text, value_set=self._missing_text), pa.scalar(None, pa.string()), text)
            parsed = _parsed(text)
            if parsed is None:
                row = _first_without_number(text)
                raise bad_cell(place, row, column, raw[row].as_py(), allowed)
        else:
            parsed = raw.cast(pa.float64(), safe=False)
        values: Floats = parsed.to_numpy(zero_copy_only=False)
        return np.where(np.isin(values, self._missing_numbers), np.nan, values) if self._missing_numbers else values

    def bags(
        self, name: str, raw: pa.Array, weights: pa.Array | None, source: Feature | FeatureSource, place: Place
    ) -> Bags:
        """A multi-valued column: text cells with separators, lists, or single values; with its weights, if any.

        Raises:
            UserError: an id without a weight, or a weight that is not a finite number.
        """
        ids, lengths = self._elements(raw, name, source.separator, place)
        owners = np.repeat(np.arange(len(raw)), lengths)
        weights_name = source.weights or name

        def place_of(element: int) -> str:
            return place(int(owners[element]))

        if weights is not None:
            weights, counts = self._elements(weights, weights_name, source.separator, place)
            differ = np.flatnonzero(lengths != counts)
            if len(differ):
                row = int(differ[0])
                raise UserError(
                    f"{place(row)}, column {weights_name}: found {counts[row]} weights for the {lengths[row]} ids of "
                    f"{name}, allowed: one weight an id"
                )
        elif source.weight_separator:
            ids, weights = _pairs(ids, source.weight_separator)
        texts = self.texts(ids, name, place_of)
        # an empty id (`a||b`) is no id, whatever the missing values are
        absent = pc.equal(texts.values, "").fill_null(True).to_numpy(zero_copy_only=False)
        kept = np.flatnonzero(~absent[texts.codes])
        owners = owners[kept]
        texts = Texts(texts.values, texts.codes[kept])
        numbers = None
        if weights is not None:
            allowed = "a finite number as the weight of each id"
            numbers = self.numbers(weights.take(pa.array(kept)), weights_name, place_of, allowed)
            refused = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
            if len(refused):
                row, value = int(refused[0]), numbers[refused[0]]
                raise bad_cell(place_of, row, weights_name, None if np.isnan(value) else float(value), allowed)
        return Bags(texts, np.bincount(owners, minlength=len(raw)), owners, numbers)

    def _elements(self, raw: pa.Array, column: str, separator: str, place: Place) -> tuple[pa.Array, Ints]:
        """All elements of all rows, and the number of them in each row."""
        raw = plain(raw, column, place)
        if pa.types.is_string(raw.type):
            cells = pc.utf8_trim_whitespace(raw) if self.strip else raw
            cells = pc.if_else(pc.is_in(cells, value_set=self._missing_text), pa.scalar(None, pa.string()), cells)
            raw = _split(cells, separator, column, place)
        elif not is_lists(raw.type):
            there = (
                pc.is_valid(raw) if not pa.types.is_floating(raw.type) else pc.invert(pc.is_null(raw, nan_is_null=True))
            )
            return raw.filter(there), there.to_numpy(zero_copy_only=False).astype(np.int64)
        lengths = pc.list_value_length(raw).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        owners = np.repeat(np.arange(len(raw)), lengths)
        return plain(raw.flatten(), column, lambda element: place(int(owners[element]) if len(owners) else 0)), lengths

    @cached_property
    def _missing_text(self) -> pa.Array:
        return pa.array(["", *self.missing], pa.string())

    @cached_property
    def _missing_values(self) -> pa.Array:
        """For columns that are no text: `-1`, `-1.0` and `-1.00` are one number."""
        numbers = [value for text in self.missing for value in (number_text(text), _decimal_text(text)) if value]
        return pa.array(["", *self.missing, *numbers], pa.string())

    @cached_property
    def _missing_numbers(self) -> list[float]:
        return [float(text) for text in self.missing if _NUMBER.fullmatch(text.strip())]


def _split(cells: pa.Array, separator: str, column: str, place: Place) -> pa.Array:
    """Text cells as lists of text; also lists that were written as text, as pandas and JSON do: `['a', 'b']`.

    Raises:
        UserError: a cell in brackets is no such list.
    """
    whole = pc.and_(pc.starts_with(cells, "["), pc.ends_with(cells, "]")).fill_null(False)
    lists = pc.split_pattern(cells, separator)
    if not pc.any(whole).as_py():
        return lists
    split = lists.to_pylist()
    for row in np.flatnonzero(whole.to_numpy(zero_copy_only=False)).tolist():
        text = cells[row].as_py()
        if not _LIST.fullmatch(text):
            raise bad_cell(place, row, column, text, "ids with the separator between them, or a list as JSON writes it")
        split[row] = [ast.literal_eval(item) if item[0] in "'\"" else item for item in re.findall(_ITEM, text)]
    return pa.array(split, pa.list_(pa.string()))


def _pairs(elements: pa.Array, separator: str) -> tuple[pa.Array, pa.Array]:
    """`sports:0.5` as id and weight; the weight is null where there is none."""
    if not pa.types.is_string(elements.type):
        return elements, pa.nulls(len(elements), pa.string())
    parts = pc.split_pattern(elements, separator, max_splits=1, reverse=True)
    counts = pc.list_value_length(parts).fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(counts, dtype=np.int64)
    flat = parts.flatten()
    ids = flat.take(pa.array(ends - counts, mask=counts == 0))
    return ids, flat.take(pa.array(ends - 1, mask=counts < 2))


def _parsed(text: pa.Array) -> pa.Array | None:
    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid:
        return None


def _first_without_number(text: pa.Array) -> int:
    """By halving, so that the parser that refused also says where."""
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _parsed(text[low:middle]) is not None else (low, middle)
    return low
