"""Read raw columns of files and data frames as texts, numbers or bags of ids."""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.strict_config import nearest
from pipeline.data.canonical_text import NUMBER, TRUTH, canonical_texts, canonical_times, number_text, respelt
from pipeline.data.json_cells import listed_items
from pipeline.data.raw_schema import FeatureSource
from pipeline.data.schema import Feature
from pipeline.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Place = Callable[[int], str]  # row of a batch, from 0 -> its location for error messages

_SEVERAL = r"""^(\[\s*(['"].*['"])?\s*\]|\{\s*".*\})$"""  # a list of quoted texts, or a JSON object
# arrays of PostgreSQL, objects, sets and tuples
_NO_LIST = r"""^(\{[^{}]*\}|\(\s*['"].*\)|\([-\d.]+(, ?[-\d.]+)*,?\)|set\(\))$"""
_SPACES = "[ \u00a0\u2009\u202f]"  # plain, no-break, thin and narrow no-break, as numbers are printed with


class Texts(NamedTuple):
    """A column as distinct texts and, for each row, the index of its text."""

    values: pa.Array  # strings; null if missing; the last element is always null
    codes: Ints  # [rows]


class Bags(NamedTuple):
    """A multi-valued column without its missing ids."""

    texts: Texts  # the ids of all rows, concatenated
    lengths: Ints  # [rows] number of ids
    owners: Ints  # [ids] row of each id
    weights: Floats | None  # [ids]


@dataclass(frozen=True)
class Cells:
    """Reader of cells.

    missing: texts that mean a missing value; `-1` also means `-1.0`, and `false` `False`. strip: whether to strip
    whitespace around text. decimal, thousands: marks of numbers written as text; None = groups of digits have no mark.
    """

    missing: tuple[str, ...]
    strip: bool = True
    decimal: str = "."
    thousands: str | None = None

    def texts(self, raw: pa.Array, column: str, place: Place) -> Texts:
        """Read a column with one value per row as texts.

        Raises:
            UserError: the column holds lists, also as text, or values of an unsupported type.
        """
        raw = plain(raw, column, place)
        if is_list(raw.type):
            raise UserError(f"{place(0)}, column {column}: found lists, allowed: one value a row")
        encoded = raw.dictionary_encode()
        values = canonical_texts(encoded.dictionary)
        values = pc.utf8_trim_whitespace(values) if self.strip else values
        if pc.all(pc.string_is_ascii(values)).as_py() is False:
            values = pa.array([text and unicodedata.normalize("NFC", text) for text in values.to_pylist()], pa.string())
        if pc.any(several := pc.match_substring_regex(values, _SEVERAL)).as_py():
            codes = encoded.indices.to_numpy(zero_copy_only=False)
            row = int(np.flatnonzero(np.isin(codes, np.flatnonzero(several.fill_null(False))))[0])
            raise cell_error(place, row, column, raw[row].as_py(), "one value a row; kind: multi reads lists")
        values = self._without_missing(canonical_times(values))
        codes = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
        return Texts(pa.concat_arrays([values, pa.nulls(1, pa.string())]), codes)

    def numbers(self, raw: pa.Array, column: str, place: Place, allowed: str = "a number") -> Floats:
        """Read a column as numbers; NaN if missing. Truth values are 1 and 0; a number in `missing` has any spelling.

        Raises:
            UserError: the column holds lists, or a text that is not a number.
        """
        raw = plain(raw, column, place)
        if is_list(raw.type):
            raise UserError(f"{place(0)}, column {column}: found lists, allowed: {allowed} a row")
        text = raw
        if pa.types.is_string(raw.type):
            text = self._with_points(self._without_missing(pc.utf8_trim_whitespace(raw)))
        try:
            values: Floats = _doubles(text).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            row = _first_invalid(_doubles, text)
            if self.decimal != "." or self.thousands:
                example = f"1{self.thousands or ''}234{self.decimal}5"
                allowed += f", written like {example}, as csv.decimal and csv.thousands say"
            raise cell_error(place, row, column, raw[row].as_py(), allowed) from None
        missing = [float(each) for each in self.missing if NUMBER.fullmatch(each.strip())]
        return np.where(np.isin(values, missing), np.nan, values) if missing else values

    def bags(
        self, name: str, raw: pa.Array, weights: pa.Array | None, source: Feature | FeatureSource, place: Place
    ) -> Bags:
        """Read a multi-valued column of texts with separators, lists or single values, and its weights if it has any.

        Raises:
            UserError: an id has no weight, or a weight is not a finite number.
        """
        ids, lengths = self._elements(raw, name, source.separator, place)
        owners = np.repeat(np.arange(len(raw)), lengths)
        weights_name = source.weights or name
        if weights is not None:
            weights, counts = self._elements(weights, weights_name, source.separator, place)
            lone = (lengths == 0) & (counts == 1)  # the weight of one missing id, which as text is a missing cell
            weights, counts = weights.filter(pa.array(np.repeat(~lone, counts))), counts - lone
            different = np.flatnonzero(lengths != counts)
            if len(different):
                row = int(different[0])
                raise UserError(
                    f"{place(row)}, column {weights_name}: found {counts[row]} weights for the {lengths[row]} ids of "
                    f"{name}, allowed: one weight an id"
                )
        elif source.weight_separator:
            ids, weights = _ids_and_weights(ids, source.weight_separator)

        def place_of(element: int) -> str:
            return place(int(owners[element]))

        texts = self.texts(ids, name, place_of)
        # an empty id (`a||b`) is always missing
        missing = pc.equal(texts.values, "").fill_null(True).to_numpy(zero_copy_only=False)
        present = np.flatnonzero(~missing[texts.codes])
        owners, texts = owners[present], Texts(texts.values, texts.codes[present])
        numbers = None
        if weights is not None:
            allowed = "a finite number as the weight of each id"
            numbers = self.numbers(weights.take(pa.array(present)), weights_name, place_of, allowed)
            infinite = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
            if len(infinite):
                raise cell_error(place_of, infinite[0], weights_name, float(numbers[infinite[0]]), allowed)
        return Bags(texts, np.bincount(owners, minlength=len(raw)), owners, numbers)

    def _elements(self, raw: pa.Array, column: str, separator: str, place: Place) -> tuple[pa.Array, Ints]:
        """Elements of all rows, concatenated, and the number of elements in each row."""
        raw = plain(raw, column, place)
        if pa.types.is_string(raw.type):
            cells = pc.utf8_trim_whitespace(raw) if self.strip else raw
            raw = _split(self._without_missing(cells), separator, column, place)
        elif not is_list(raw.type):
            valid = pc.invert(pc.is_null(raw, nan_is_null=pa.types.is_floating(raw.type)))
            return raw.filter(valid), valid.to_numpy(zero_copy_only=False).astype(np.int64)
        lengths = pc.list_value_length(raw).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        owners = np.repeat(np.arange(len(raw)), lengths)
        return plain(raw.flatten(), column, lambda element: place(int(owners[element]) if len(owners) else 0)), lengths

    def _with_points(self, texts: pa.Array) -> pa.Array:
        """Rewrite numbers with `decimal` and `thousands` as Arrow parses them; other texts become unparsable."""
        if self.decimal == "." and self.thousands is None:
            return texts
        mark = _SPACES if self.thousands == " " else re.escape(self.thousands or "")
        groups = f"[0-9]{{1,3}}({mark}[0-9]{{3}})+|" if mark else ""
        number = rf"^([+-]?({groups}[0-9]*)({re.escape(self.decimal)}[0-9]*)?([eE][+-]?[0-9]+)?|{TRUTH})$"
        plain_texts = pc.replace_substring_regex(texts, mark, "") if mark else texts
        plain_texts = pc.replace_substring(plain_texts, self.decimal, ".")
        return pc.if_else(pc.match_substring_regex(texts, number), plain_texts, "not a number")

    def _without_missing(self, texts: pa.Array) -> pa.Array:
        spelt, missing = texts, pa.array(["", *self.missing], pa.string())
        if any(map(number_text, self.missing)):
            spelt, missing = (respelt(each, "whole", "truth") for each in (texts, missing))
        return pc.if_else(pc.is_in(spelt, value_set=missing), pa.scalar(None, pa.string()), texts)


def cell_error(place: Place, row: int, column: str, value: Any, allowed: str) -> UserError:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    shown = "no value" if missing else repr(value) if isinstance(value, str | bytes) else str(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return UserError(f"{place(int(row))}, column {column}: found {shown}, allowed: {allowed}")


def no_column(name: str, names: Sequence[str]) -> str:
    """Error text `no column X`, with the most similar name or a list of the columns."""
    hint = nearest(name, list(names))
    if "did you mean" not in hint and len(names) > 12:
        hint = f"; there are {len(names)}: {', '.join(names[:12])}, ..."
    return f"no column {name}{hint}"


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def plain(raw: pa.Array, column: str, place: Place) -> pa.Array:
    """Convert a column to string, integer, float, decimal, null, or a list.

    Raises:
        UserError: its type is not supported, or bytes are not UTF-8.
    """
    kind, types = raw.type, pa.types
    if types.is_dictionary(kind):
        return plain(raw.dictionary_decode(), column, place)
    if types.is_float16(kind):  # the shortest decimals again: 0.1, not 0.09998
        raw = pa.array(raw.to_numpy(zero_copy_only=False).astype(str).astype(np.float32))
    elif types.is_decimal32(kind) or types.is_decimal64(kind):
        raw = raw.cast(pa.decimal128(kind.precision, kind.scale))
    elif types.is_boolean(kind):
        raw = pc.if_else(raw, "True", "False")
    elif is_binary(kind):
        raw = decoded(raw, column, place)
    elif types.is_time(kind):
        raw = pc.replace_substring_regex(raw.cast(pa.string()), r"^([\d:]+)(\.\d*?[1-9])?\.?0*$", r"\1\2")
    elif types.is_timestamp(kind) and kind.tz == "UTC":
        raw = raw.cast(pa.timestamp(kind.unit)).cast(pa.string())
    elif types.is_timestamp(kind):  # an offset as pandas writes it: +07:00
        raw = pc.replace_substring_regex(raw.cast(pa.string()), r"([+-]\d\d)(\d\d)$", r"\1:\2")
    elif types.is_large_string(kind) or types.is_string_view(kind) or types.is_date(kind):
        raw = raw.cast(pa.string())
    plain_types = (types.is_string, types.is_integer, types.is_floating, types.is_decimal, types.is_null, is_list)
    if any(is_(raw.type) for is_ in plain_types):
        return raw
    allowed = "text, numbers, truth values, dates, times, or lists of them"
    raise UserError(f"{place(0)}, column {column}: found values of type {kind}, allowed: {allowed}")


def decoded(raw: pa.Array, column: str, place: Place) -> pa.Array:
    """Decode bytes as UTF-8.

    Raises:
        UserError: they are not UTF-8.
    """
    raw = raw.cast(pa.binary())
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        row = _first_invalid(lambda cells: cells.cast(pa.string()), raw)
        raise cell_error(place, row, column, raw[row].as_py(), "UTF-8 text") from None


def _doubles(column: pa.Array) -> pa.Array:
    """Doubles of the decimals that a column is written with: 0.1 in 32 bits is 0.1, not 0.10000000149."""
    if pa.types.is_float32(column.type) or pa.types.is_decimal(column.type):
        column = column.cast(pa.string())
    if not pa.types.is_string(column.type):
        return column.cast(pa.float64(), safe=False)
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        for truth, number in (("true", "1"), ("false", "0")):
            column = pc.replace_substring_regex(column, rf"^(?i:{truth})$", number)
        return column.cast(pa.float64())


def _first_invalid(convert: Callable[[pa.Array], pa.Array], cells: pa.Array) -> int:
    for row in range(len(cells)):
        try:
            convert(cells[row : row + 1])
        except pa.ArrowInvalid:
            return row
    raise ValueError("every row is valid")


def _split(cells: pa.Array, separator: str, column: str, place: Place) -> pa.Array:
    """Split text cells into lists of texts. A cell may also be a list as JSON or Python writes it: `["a", "b"]`.

    Raises:
        UserError: a cell in brackets is not a valid list, or is a set, a tuple or an object.
    """
    brackets = pc.and_(pc.starts_with(cells, "["), pc.ends_with(cells, "]"))
    brackets = pc.or_(brackets, pc.match_substring_regex(cells, _NO_LIST)).fill_null(False)
    lists = pc.split_pattern(cells, separator)
    if not pc.any(brackets).as_py():
        return lists
    split = lists.to_pylist()
    for row in np.flatnonzero(brackets.to_numpy(zero_copy_only=False)).tolist():
        split[row] = listed_items(cells[row].as_py())
        if split[row] is None:
            allowed = "ids with the separator between them, or a list as JSON or Python writes it"
            raise cell_error(place, row, column, cells[row].as_py(), allowed)
    return pa.array(split, pa.list_(pa.string()))


def _ids_and_weights(elements: pa.Array, separator: str) -> tuple[pa.Array, pa.Array]:
    """Split ids from their weights (`sports:0.5`); the weight is null if there is none."""
    if not pa.types.is_string(elements.type):
        return elements, pa.nulls(len(elements), pa.string())
    parts = pc.split_pattern(elements, separator, max_splits=1, reverse=True)
    parts = pc.list_slice(parts, 0, 2, return_fixed_size_list=True)  # pads with null
    return pc.list_element(parts, 0), pc.list_element(parts, 1)
