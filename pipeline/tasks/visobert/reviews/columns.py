"""Read CSV, JSONL and Parquet files of reviews as named columns of cells."""

import codecs
import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.strict_config import nearest
from pipeline.errors import UserError
from pipeline.storage.files import check_file

Columns = Mapping[str, Sequence[object]]  # cells are text or None; JSONL and Parquet may hold other values
NamesAndCells = tuple[list[str], list[Sequence[object]]]

UNNAMED = re.compile(r"|Unnamed: \d+|__index_level_\d+__")  # names that pandas gives to its index
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")  # unpaired surrogate: allowed in JSON escapes, but not in UTF-8


def read_columns(file: Path) -> tuple[str, Columns]:
    """Return the SHA-256 (hex) of the file's bytes, and its columns by name (NFC, without surrounding spaces).

    CSV cells are kept as text and never parsed as numbers or missing values. Blank lines are skipped.

    Raises:
        UserError: the file cannot be read, is damaged, not UTF-8 or in another format; names the line or row.
    """
    content = _content(file)
    names, columns = _READERS[file.suffix.lower()](file, content)
    names = [clean_name(name) for name in names]
    for name, count in Counter(names).items():
        if count > 1 and not UNNAMED.fullmatch(name):
            raise UserError(f"{file}: column {name} is there twice")
    return hashlib.sha256(content).hexdigest(), dict(zip(names, columns, strict=True))


def clean_name(name: str) -> str:
    """Normalise the name of a column or an aspect: NFC, without surrounding spaces."""
    return unicodedata.normalize("NFC", name).strip()


def cell_text(cell: object) -> str:
    """A label cell as text; empty for None and NaN."""
    if isinstance(cell, str):
        return cell
    return "" if cell is None or cell != cell else json.dumps(cell, ensure_ascii=False, default=str)  # noqa: PLR0124


def quoted(text: str) -> str:
    """Quote and shorten the text of a cell for messages."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def no_such(kind: str, name: str, names: Sequence[str]) -> str:
    """Message `no column X` (or another kind), with the nearest name or a list of names."""
    hint = nearest(name, list(names))
    if "did you mean" not in hint:
        hint = f"; there are: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    return f"no {kind} {name}{hint}"


def _content(file: Path) -> bytes:
    allowed = ", ".join(_READERS)
    try:
        if file.is_dir():
            raise UserError(f"{file}: found a folder, allowed: a file ({allowed})")
        check_file(file)
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    if file.suffix.lower() not in _READERS:
        raise UserError(f"{file}: found {file.suffix or 'no extension'}, allowed: {allowed}")
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{file}: the file is empty")
    return content


def _decode(file: Path, content: bytes) -> str:
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}, line {line})") from None
    if "\0" in text:
        raise UserError(f"{file}: not UTF-8 text (a zero at byte {content.index(0)})")
    return text


def _read_csv(file: Path, content: bytes) -> NamesAndCells:
    reader = csv.reader(io.StringIO(_decode(file, content), newline=""), strict=True)
    limit = csv.field_size_limit(len(content))  # the default limit is 131,072 characters per cell
    try:
        names, *rows = (row for row in reader if row)
    except csv.Error as error:
        reason = "a quote that is never closed" if "unexpected end" in str(error) else str(error)
        raise UserError(f"{file}: line {reader.line_num}: {reason}") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise UserError(f"{file}: row {number}: found {len(row)} columns, allowed: {len(names)}")
    return names, list(zip(*rows, strict=True)) if rows else [()] * len(names)


def _read_jsonl(file: Path, content: bytes) -> NamesAndCells:
    records = []
    for number, line in enumerate(_decode(file, content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}: line {number}: found a {type(record).__name__}, allowed: an object of columns")
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: list[Sequence[object]] = [[record.get(name) for record in records] for name in names]
    if b"\\u" in content:  # an escape may stand for an unpaired surrogate or for NUL
        _check_characters(file, names, columns)
    return names, columns


def _check_characters(file: Path, names: Sequence[str], columns: Sequence[Sequence[object]]) -> None:
    for name, cells in zip(names, columns, strict=True):
        if "\0" in name or HALF_CHARACTER.search(name):
            raise UserError(f"{file}: column {name!r}: allowed: a name of whole characters other than NUL")
        for row, cell in enumerate(cells, 1):
            if isinstance(cell, str | list | dict) and HALF_CHARACTER.search(cell_text(cell)):
                raise UserError(f"{file}: row {row}, column {name}: found half a character (an unpaired surrogate)")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object and refuse duplicate keys, of which json would keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {repeated!r} is there twice")
    return record


def _read_parquet(file: Path, content: bytes) -> NamesAndCells:
    try:
        table = pq.read_table(pa.BufferReader(content))
        return list(table.column_names), [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{file}: not a readable Parquet file ({reason})") from None


_READERS: dict[str, Callable[[Path, bytes], NamesAndCells]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
