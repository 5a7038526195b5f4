"""Files of reviews as columns of cells."""

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

Columns = Mapping[str, Sequence[object]]  # cells are text or None; of JSONL and Parquet also what else they hold

UNNAMED = re.compile(r"|Unnamed: \d+|__index_level_\d+__")  # how pandas writes its index


def read_columns(file: Path) -> tuple[str, Columns]:
    """SHA-256 (hex) of the file's bytes, and its columns by name (NFC, without spaces around it).

    Every cell of a CSV is text: nothing is taken for a number or for missing. Blank lines are no rows.

    Raises:
        UserError: the file cannot be read, is damaged, not UTF-8, or of another format; names line or row.
    """
    content = _content(file)
    names, columns = _READERS[file.suffix.lower()](file, content)
    names = [tidy(name) for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1 and not UNNAMED.fullmatch(name)]
    if twice:
        raise UserError(f"{file}: column {twice[0]} is there twice")
    return hashlib.sha256(content).hexdigest(), dict(zip(names, columns, strict=True))


def tidy(name: str) -> str:
    """A column's or an aspect's name: NFC, without spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def as_text(cell: object) -> str:
    """A label cell as text: nothing (also a Parquet column's NaN) is empty."""
    if isinstance(cell, str):
        return cell
    return "" if cell is None or cell != cell else json.dumps(cell, ensure_ascii=False, default=str)  # noqa: PLR0124


def shown(text: str) -> str:
    """A cell as a message shows it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def absent(kind: str, name: str, names: Sequence[str]) -> str:
    """`no column X`, and what may have been meant."""
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


def _decoded(file: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}, line {line})") from None
    if "\0" in text:
        raise UserError(f"{file}: not UTF-8 text (a zero at byte {content.index(0)})")
    return text


def _csv(file: Path, content: bytes) -> tuple[list[str], list[Sequence[object]]]:
    reader = csv.reader(io.StringIO(_decoded(file, content), newline=""), strict=True)
    limit = csv.field_size_limit(len(content))  # its own is 131,072 characters a cell, and no other format has one
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


def _jsonl(file: Path, content: bytes) -> tuple[list[str], list[Sequence[object]]]:
    records = []
    for number, line in enumerate(_decoded(file, content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}: line {number}: found a {type(record).__name__}, allowed: an object of columns")
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: list[Sequence[object]] = [[record.get(name) for record in records] for name in names]
    if b"\\u" in content:  # an escape may stand for half a character, or for a zero
        _refuse_halves(file, names, columns)
    return names, columns


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; a key that is there twice is refused, where json takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return found


def _refuse_halves(file: Path, names: Sequence[str], columns: Sequence[Sequence[object]]) -> None:
    for name, cells in zip(names, columns, strict=True):
        if "\0" in name or half_character(name):
            raise UserError(f"{file}: column {name!r}: allowed: a name of whole characters other than zero")
        for row, cell in enumerate(cells, 1):
            if isinstance(cell, str | list | dict) and (reason := half_character(as_text(cell))):
                raise UserError(f"{file}: row {row}, column {name}: found half a character ({reason})")


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds half a character, which no file can; None where all are whole."""
    try:
        text.encode()
        return None
    except UnicodeEncodeError as error:
        return error.reason


def _parquet(file: Path, content: bytes) -> tuple[list[str], list[Sequence[object]]]:
    try:
        table = pq.read_table(pa.BufferReader(content))
        return list(table.column_names), [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{file}: not a readable Parquet file ({reason})") from None


_READERS: dict[str, Callable[[Path, bytes], tuple[list[str], list[Sequence[object]]]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
