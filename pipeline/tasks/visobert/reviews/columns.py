"""Read review files of every format as named columns of cells."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.strict_config import nearest
from pipeline.data.cells import decoded, is_binary
from pipeline.data.csv_reader import foreign_format, quote_problem
from pipeline.data.json_cells import unique_keys
from pipeline.errors import UserError, os_errors
from pipeline.storage.files import check_file
from pipeline.tasks.visobert.reviews.semeval_xml import read_semeval
from pipeline.tasks.visobert.reviews.vlsp_text import read_vlsp
from pipeline.tasks.visobert.reviews.workbook import read_workbook

Columns = Mapping[str, Sequence[object]]  # cells are text or None; JSON, Parquet and Excel may hold other values

TEXT, LABELS = "text", "labels"  # columns of the layouts that do not name theirs
DELIMITERS = {".csv": ",", ".tsv": "\t"}
GZIP = ".gz"
UNNAMED = re.compile(r"|Unnamed: \d+(?:\.\d+)?|__index_level_\d+__")  # names that pandas gives to its index
OTHER_DELIMITER = re.compile(r"[,;|\t]")
NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # NUL, and unpaired surrogates: allowed in JSON escapes, but not in UTF-8


class Content(NamedTuple):
    """Content of a file: names and cells of its columns, and warnings about how it was read."""

    names: list[str]
    columns: Sequence[Sequence[object]]
    notes: Sequence[str] = ()


def read_columns(file: Path, delimiter: str | None = None) -> tuple[str, Columns, Sequence[str]]:
    """Return the SHA-256 (hex) of the file's bytes, its columns by name (NFC, without surrounding spaces), and notes.

    CSV cells are kept as text and never parsed as numbers or missing values. Blank lines are skipped.

    Raises:
        UserError: the file cannot be read, is damaged, not UTF-8 or in another format; names the line or row.
    """
    content = _content(file)
    digest, suffix = hashlib.sha256(content).hexdigest(), _suffix(file)
    if file.suffix.lower() == GZIP:
        content = _decompressed(file, content)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{file}: the file is empty")
    if suffix in DELIMITERS or (suffix == ".txt" and delimiter):
        cells = _read_delimited(file, content, delimiter or DELIMITERS[suffix])
    else:
        cells = _READERS[suffix](file, content)
        if delimiter:
            cells = cells._replace(notes=[*cells.notes, f"{file}: data.delimiter has no effect on {suffix}"])
    names = [clean_name(name) for name in cells.names]
    _check_characters(file, names, cells.columns)
    for name, count in Counter(names).items():
        if count > 1 and not UNNAMED.fullmatch(name):
            raise UserError(f"{file}: column {name} appears twice")
    return digest, dict(zip(names, cells.columns, strict=True)), cells.notes


def clean_name(name: str) -> str:
    """Normalise the name of a column or an aspect: NFC, without surrounding spaces."""
    return unicodedata.normalize("NFC", name).strip()


def cell_text(cell: object) -> str:
    """A label cell as text; empty for None and NaN."""
    if isinstance(cell, str | Decimal):
        return f"{cell:f}" if isinstance(cell, Decimal) else cell
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


def _suffix(file: Path) -> str:
    """The extension that names the format, in lower case, without `.gz`."""
    return Path(file.stem if file.suffix.lower() == GZIP else file.name).suffix.lower()


def _content(file: Path) -> bytes:
    allowed = f"{', '.join([*DELIMITERS, *_READERS])}, each also as {GZIP}"
    with os_errors(file):
        if file.is_dir():
            raise UserError(f"{file}: found a folder, allowed: a file ({allowed})")
        check_file(file)
        content = file.read_bytes()
    if _suffix(file) not in {*DELIMITERS, *_READERS}:
        raise UserError(f"{file}: found {file.suffix or 'no extension'}, allowed: {allowed}")
    return content


def _decompressed(file: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a readable gzip file ({error})") from None


def _decode(file: Path, content: bytes) -> str:
    if kind := foreign_format(content):
        if b"xl/workbook.xml" in content:
            kind = "an Excel file; call it .xlsx"
        raise UserError(f"{file}: found {kind.replace('.csv', _suffix(file))}, allowed: UTF-8 text")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}, line {line})") from None


def _read_delimited(file: Path, content: bytes, delimiter: str) -> Content:
    reader = csv.reader(io.StringIO(_decode(file, content), newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(len(content))  # the default limit is 131,072 characters per cell
    try:
        lines = (line for line in reader if line)
        names = next(lines)
        if len(names) == 1 and OTHER_DELIMITER.search(names[0]):
            found = f"found one column, {quoted(names[0])}"
            raise UserError(f"{file}: {found}; data.delimiter names what separates columns")
        rows = list(lines)
    except csv.Error as error:
        raise UserError(f"{file}: line {reader.line_num}: {quote_problem(error)}") from None
    finally:
        csv.field_size_limit(limit)
    return _from_rows(file, names, rows)


def _from_rows(file: Path, names: list[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> Content:
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise UserError(f"{file}: row {number}: found {len(row)} columns, allowed: {len(names)}")
    return Content(names, list(zip(*rows, strict=True)) if rows else [()] * len(names), notes)


def _read_workbook(file: Path, content: bytes) -> Content:
    rows, notes = read_workbook(file, content)
    if not rows:
        raise UserError(f"{file}: the file is empty")
    names, *rows = rows
    return _from_rows(file, ["" if name is None else str(name) for name in names], rows, notes)


def _read_jsonl(file: Path, content: bytes) -> Content:
    records = []
    for number, line in enumerate(_decode(file, content).split("\n"), 1):
        if line.strip():
            records.append(_record(file, f"line {number}", _parse_json(file, f"line {number}", line)))
    return _from_records(records)


def _read_json(file: Path, content: bytes) -> Content:
    """Read an array of objects, or an object in each line."""
    text = _decode(file, content)
    if not text.lstrip().startswith("["):
        return _read_jsonl(file, content)
    parsed = _parse_json(file, "array", text)
    assert isinstance(parsed, list)
    return _from_records([_record(file, f"row {row}", each) for row, each in enumerate(parsed, 1)])


def _parse_json(file: Path, where: str, text: str) -> object:
    try:
        parsed: object = json.loads(text, object_pairs_hook=unique_keys)
        return parsed
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {where}: not JSON ({error})") from None


def _record(file: Path, where: str, record: object) -> dict[str, object]:
    if not isinstance(record, dict):
        raise UserError(f"{file}: {where}: found a {type(record).__name__}, allowed: an object of columns")
    return record


def _from_records(records: Sequence[Mapping[str, object]]) -> Content:
    names = list(dict.fromkeys(name for record in records for name in record))
    return Content(names, [[record.get(name) for record in records] for name in names])


def _read_vlsp(file: Path, content: bytes) -> Content:
    return Content([TEXT, LABELS], read_vlsp(file, _decode(file, content)))


def _read_semeval(file: Path, content: bytes) -> Content:
    texts, labels, notes = read_semeval(file, content)
    return Content([TEXT, LABELS], [texts, labels], notes)


def _check_characters(file: Path, names: Sequence[str], columns: Sequence[Sequence[object]]) -> None:
    """Refuse NUL and half characters, which not every format can hold."""
    for name, cells in zip(names, columns, strict=True):
        if NO_TEXT.search(name):
            raise UserError(f"{file}: column {name!r}: allowed: a name of whole characters other than NUL")
        for row, cell in enumerate(cells, 1):
            if isinstance(cell, str | list | dict) and (found := NO_TEXT.search(cell_text(cell))):
                kind = "NUL" if found[0] == "\0" else "half a character (an unpaired surrogate)"
                raise UserError(f"{file}: row {row}, column {name}: found {kind}; remove it")


def _read_parquet(file: Path, content: bytes) -> Content:
    try:
        table = pq.read_table(pa.BufferReader(content))
        names, columns = list(table.column_names), table.columns
        for number, (name, column) in enumerate(zip(names, columns, strict=True)):
            if is_binary(column.type):
                columns[number] = decoded(column.combine_chunks(), name, lambda row: f"{file}: row {row + 1}")
        return Content(names, [column.to_pylist() for column in columns])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{file}: not a readable Parquet file ({reason})") from None


_READERS: dict[str, Callable[[Path, bytes], Content]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".xlsx": _read_workbook,
    ".xml": _read_semeval,
    ".txt": _read_vlsp,
}
