"""Raw CSV, JSON Lines and Parquet files as a stream of batches; what CSV and JSON hold is all text."""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.runtime.console import say, warn
from pipeline.tasks.mmoe.cells import no_column, plain
from pipeline.tasks.mmoe.schema import SPLITS, CsvSource, sha256_of, sha256_of_parts

FORMATS = {".csv": "CSV", ".csv.gz": "CSV", ".jsonl": "JSON Lines", ".jsonl.gz": "JSON Lines", ".parquet": "Parquet"}
SUFFIXES = tuple(FORMATS)
BLOCK_BYTES = 16 << 20  # what is parsed at once; a CSV row must fit into it
HEADER_BYTES = 1 << 20  # of the line that names the columns
# files and folders of these names are the splits, where all that lies in a folder is called so
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
               "val": "validation", "dev": "validation", "test": "test"}  # fmt: skip
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
MAGIC = {b"\x1f\x8b": "gzip; call it .csv.gz", b"PAR1": "Parquet; call it .parquet",
         b"PK\x03\x04": "a ZIP archive; unpack it", b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV",
         b"\x28\xb5\x2f\xfd": "zstd; unpack it"}  # fmt: skip
_LINE_END = re.compile(r"\r\n|\r|\n")
_WRONG_ROW = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")  # in Arrow's words


@dataclass(frozen=True)
class RawFile:
    path: Path
    split: str | None = None
    """the split that all its rows belong to; None = `split` of the schema divides them"""
    partition: Mapping[str, str | None] = field(default_factory=dict)
    """columns that stand in the names of its folders (`day=7`)"""


@dataclass(frozen=True)
class Batch:
    """Rows of one file."""

    file: Path
    first: int  # number of the first row within its file, from 1, the header not counted
    start: int  # number of the first row among all rows of all files, from 0
    rows: int
    columns: dict[str, pa.Array]
    split: str | None = None
    """as in RawFile"""

    def place(self, row: int) -> str:
        return f"{self.file}: row {self.first + row}"


class Recut:
    """Cuts a stream of tables into tables of `rows` rows each, whatever came in."""

    def __init__(self, rows: int) -> None:
        self.rows, self._held, self._count = rows, list[pa.Table](), 0

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        self._held.append(table)
        self._count += table.num_rows
        if self._count < self.rows:
            return
        whole = pa.concat_tables(self._held)
        cut = self._count - self._count % self.rows
        self._held, self._count = [whole.slice(cut)], self._count - cut
        for start in range(0, cut, self.rows):
            yield whole.slice(start, self.rows).combine_chunks()

    def rest(self) -> Iterator[pa.Table]:
        if self._count:
            yield pa.concat_tables(self._held).combine_chunks()
        self._held, self._count = [], 0


class Source:
    """The rows of a file or folder, which the schema divides, then those of files that are a split of their own.

    own: split -> file or folder. The files of a folder are read in the order of their names.

    Raises:
        UserError: nothing is there, it cannot be read, or the files are of more than one format.
    """

    def __init__(
        self,
        data: Path,
        columns: Sequence[str] | None = None,
        csv: CsvSource | None = None,
        own: Mapping[str, Path] | None = None,
    ) -> None:
        try:
            self.files = [
                RawFile(file, split, _partition(file, path))
                for split, path in _divided(data, own or {}) for file in _find(path)
            ]  # fmt: skip
            for file in self.files:
                with file.path.open("rb") as stream:
                    if not stream.read(1):
                        raise UserError(f"{file.path}: the file is empty")
        except OSError as error:
            raise UserError(f"{getattr(error, 'filename', None) or data}: {error.strerror or error}") from None
        formats = sorted({_format(file.path) for file in self.files})
        if len(formats) > 1:
            raise UserError(f"{data}: found {' and '.join(formats)} files, allowed: one format")
        self.format = formats[0]
        self.given, self.csv = columns, csv or CsvSource()
        self._checked, self._known_keys = set[Path](), dict[Path, list[str]]()
        if columns and self.format != "CSV":
            raise UserError(
                f"{self.files[0].path}: columns names a headerless CSV's columns; a {self.format} file has its own"
            )
        for key in ("delimiter", "escape"):
            character = getattr(self.csv, key)
            if character is not None and not (len(character) == 1 and character.isascii() and character not in '\r\n"'):
                raise UserError(f"csv.{key}: found {character!r}, allowed: an ASCII character, no quote or line end")
        if self.csv.escape == self.csv.delimiter:
            raise UserError(f"csv.escape: found {self.csv.escape!r}, which is csv.delimiter, allowed: another one")

    def names(self, file: RawFile) -> list[str]:
        """The names of a file's columns, those of its folders included, in Unicode's form NFC."""
        with _told(file.path):
            if self.format == "Parquet":
                names = list(pq.ParquetFile(file.path).schema_arrow.names)
            elif self.format == "JSON Lines":
                names = self._keys(file.path)
            else:
                names = self._stripped(self.given or self._header(file.path)[0])
        return [unicodedata.normalize("NFC", name) for name in [*names, *file.partition]]

    def batches(self, wanted: Sequence[str], rows: int) -> Iterator[Batch]:
        """The wanted columns of all rows, at most `rows` at a time, in order.

        Raises:
            UserError: a wanted column is absent, or a file is damaged; names the file and, where it can, the row.
        """
        start = 0
        for file in self.files:
            names, first = self.names(file), 1
            for name in wanted:
                if names.count(name) != 1:
                    problem = f"column {name} is there twice" if name in names else no_column(name, names)
                    raise UserError(f"{file.path}: {problem}")
            with _told(file.path):
                for table in self._tables(file, names, list(wanted), rows):
                    batch = Batch(file.path, first, start, table.num_rows, {}, file.split)
                    for name in wanted:
                        batch.columns[name] = plain(table[name].combine_chunks(), name, batch.place)
                    yield batch
                    first, start = first + table.num_rows, start + table.num_rows

    def description(self) -> str:
        """File names and the SHA-256 of the file, or of the files' digests one after another."""
        digests = [sha256_of(file.path) for file in self.files]
        names = [file.path.name for file in self.files]
        if len(names) > 4:
            names = [f"{names[0]} to {names[-1]} ({len(names)} files)"]
        whole = digests[0] if len(digests) == 1 else sha256_of_parts(digests)
        return f"{', '.join(names)}, SHA-256 {whole}"

    def _tables(self, file: RawFile, names: list[str], wanted: list[str], rows: int) -> Iterator[pa.Table]:
        recut, inside = Recut(rows), [name for name in wanted if name not in file.partition]
        if self.format == "Parquet":
            reader = pq.ParquetFile(file.path)
            original = dict(zip(names, reader.schema_arrow.names, strict=False))
            batches = reader.iter_batches(rows, columns=[original[name] for name in inside])
        elif self.format == "JSON Lines":
            batches = self._json(file.path, inside, rows)
        else:
            batches = self._csv(file.path, names[: len(names) - len(file.partition)], inside)
        for batch in batches:
            table = pa.table(dict(zip(inside, batch.columns, strict=False)))
            columns = {
                name: pa.repeat(pa.scalar(file.partition[name], pa.string()), batch.num_rows)
                if name in file.partition else table[name]
                for name in wanted
            }  # fmt: skip
            yield from recut.add(pa.table(columns))
        yield from recut.rest()

    def _keys(self, file: Path) -> list[str]:
        """The keys of all objects, in the order of their first appearance."""
        if file not in self._known_keys:
            self._known_keys[file] = list(dict.fromkeys(key for _, row in _objects(file) for key in row))
        return self._known_keys[file]

    def _json(self, file: Path, wanted: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """A key that an object has not is a missing value."""
        original = {unicodedata.normalize("NFC", key): key for key in self._keys(file)}
        objects = _objects(file)
        while part := list(itertools.islice(objects, rows)):
            columns = []
            for name in wanted:
                cells = [row.get(original[name]) for _, row in part]
                lists = [isinstance(cell, list) for cell in cells if cell is not None]
                for (number, _), cell in zip(part, cells, strict=True):
                    if isinstance(cell, dict) or (cell is not None and isinstance(cell, list) != lists[0]):
                        allowed = "texts, numbers and truth values, or lists of them in every row"
                        raise UserError(f"{file}: row {number}, column {name}: found {cell!r:.80}, allowed: {allowed}")
                columns.append(pa.array(
                    [[_text(part) for part in cell] if isinstance(cell, list) else _text(cell) for cell in cells],
                    pa.list_(pa.string()) if any(lists) else pa.string(),
                ))  # fmt: skip
            yield pa.record_batch(columns, wanted)

    def _stripped(self, names: Sequence[str]) -> list[str]:
        return [name.strip() for name in names] if self.csv.strip else list(names)

    def _header(self, file: Path) -> tuple[list[str], int]:
        """The names that the first line that is not empty holds, and how many lines come before it.

        Read without Arrow: it would call us back for rows that do not fit, from a thread of its own that may outlive
        the interpreter, and the process would end by SIGABRT.
        """
        with _opened(file) as stream:
            start = bytes(stream.read(HEADER_BYTES))
        if problem := _foreign(start):
            raise UserError(f"{file}: found {problem}")
        text = start.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        rows = self._rows(io.StringIO(text, newline=""))
        try:
            names = next(filter(None, rows), None)
        except csv.Error as error:
            raise UserError(f"{file}: the header: {_quote_problem(error)}") from None
        if names is None:
            raise UserError(f"{file}: no rows")
        for name in names:
            name.encode()
        return names, len(_LINE_END.findall(text[: len(text) - len(text.lstrip("\r\n"))]))

    def _rows(self, text: io.TextIOBase) -> Iterator[list[str]]:
        csv.field_size_limit(BLOCK_BYTES)
        return csv.reader(text, delimiter=self.csv.delimiter, escapechar=self.csv.escape, strict=True)

    def _check_quotes(self, file: Path, header: bool) -> None:
        """Refuse what Arrow would mend: text after a closing quote, or a quote that is never closed."""
        with _opened(file) as stream:
            if not any(b'"' in chunk for chunk in iter(lambda: stream.read(BLOCK_BYTES), b"")):
                return
        number, to_text = 0, gzip.open if _is_gzip(file) else open
        with to_text(file, "rt", encoding="latin-1", newline="") as text:
            try:
                for number, _ in enumerate(filter(None, self._rows(text)), 1 - header):  # noqa: B007 (for the error)
                    pass
            except csv.Error as error:
                raise UserError(f"{file}: row {number + 1}: {_quote_problem(error)}") from None

    def _csv(self, file: Path, names: list[str], wanted: list[str]) -> Iterator[pa.RecordBatch]:
        first, empty_lines = self._header(file)
        header = not self.given or self._stripped(first) == self._stripped(self.given)
        if file not in self._checked:  # once: there are two passes
            self._check_quotes(file, header)
            self._checked.add(file)
        original = [str(number) for number in range(len(names))]  # whatever the header calls them
        read = [original[names.index(name)] for name in wanted]
        with _opened(file) as stream:
            try:
                batches = pa.csv.open_csv(
                    stream,
                    pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, column_names=original,
                                       skip_rows_after_names=header * (empty_lines + 1)),
                    pa.csv.ParseOptions(delimiter=self.csv.delimiter, escape_char=self.csv.escape or False,
                                        newlines_in_values=True),
                    pa.csv.ConvertOptions(
                        column_types=dict.fromkeys(original, pa.binary()), include_columns=read or original[:1],
                        strings_can_be_null=False, check_utf8=False,
                    ),
                )  # fmt: skip
                yield from (batch for batch in batches if batch.num_rows)
            except pa.ArrowInvalid as error:
                if wrong := _WRONG_ROW.search(str(error)):
                    row, allowed, count = (int(number) for number in wrong.groups())
                    raise UserError(f"{file}: row {row - header}: found {count} columns, allowed: {allowed}") from None
                raise


def _divided(data: Path, own: Mapping[str, Path]) -> list[tuple[str | None, Path]]:
    """(split or None, file or folder) in the order in which they are read."""
    if data.is_dir() and not own:
        entries = [
            path for path in sorted(data.iterdir()) if path.name[0] not in "._" and (path.is_dir() or _is_data(path))
        ]
        named = {SPLIT_NAMES.get(path.name.split(".")[0].lower()): path for path in entries}
        if "train" in named and len(named) > 1:
            if None not in named and len(named) == len(entries):
                own = {split: named[split] for split in SPLITS[1:] if split in named}
                for split, path in own.items():
                    say(f"{split}: {path}, by its name")
                data = named["train"]
            else:
                names = ", ".join(path.name for split, path in named.items() if split)
                warn(
                    f"{data}: {names} are read as one with the others; data.train, data.validation and data.test "
                    "name files of their own"
                )
    return [(None, data), *own.items()]


def _partition(file: Path, data: Path) -> dict[str, str | None]:
    folders = [part.split("=", 1) for part in file.relative_to(data).parts[:-1] if "=" in part]
    return {unquote(key): None if value == NO_PARTITION else unquote(value) for key, value in folders}


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.name[0] not in "._" and path.is_file()


def _find(data: Path) -> list[Path]:
    if not data.is_dir():
        if data.exists() and not data.is_file():
            raise UserError(f"{data}: neither a file nor a folder")
        return [data]
    partitioned = any("=" in path.name for path in data.iterdir() if path.is_dir())
    files = sorted(filter(_is_data, data.rglob("*") if partitioned else data.iterdir()))
    if not files:
        raise UserError(f"{data}: no data file in this folder, allowed: {', '.join(SUFFIXES)}")
    return files


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line that is not empty; numbers are text as they stand there."""
    with gzip.open(file) if _is_gzip(file) else file.open("rb") as lines:
        number = 0
        for line in lines:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8), parse_int=str, parse_float=str, parse_constant=str,
                                 object_pairs_hook=_once)  # fmt: skip
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}: row {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}: row {number}: found {line[:40]!r}, allowed: an object of columns")
            yield number, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is there twice")
    return row


def _text(value: Any) -> str | None:
    return str(value) if value is not None else None


def _foreign(start: bytes) -> str:
    """What a file is that is no text in UTF-8, by its first bytes; empty = it may be."""
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            return f"{kind}, allowed: UTF-8 text"
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:64].count(0) > len(start[:64]) // 4
    return "UTF-16, allowed: UTF-8 text" if utf16 else ""


def _quote_problem(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "found a quote that is never closed"
    if "expected after" in str(error):
        allowed = "quotes within quotes are doubled, or csv.escape names what escapes them"
        return f"found text after a closing quote, allowed: {allowed}"
    return f"a value over {BLOCK_BYTES >> 20} MiB" if "field limit" in str(error) else str(error)


def _format(file: Path) -> str:
    return next((kind for suffix, kind in FORMATS.items() if file.name.lower().endswith(suffix)), "CSV")


def _is_gzip(file: Path) -> bool:
    return file.name.lower().endswith(".gz")


def _opened(file: Path) -> Any:
    return pa.input_stream(str(file), compression="gzip" if _is_gzip(file) else None)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """What Arrow says of a damaged file, in one line."""
    try:
        yield
    except UnicodeError:
        raise UserError(f"{file}: the header is not UTF-8 text") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        if "straddling" in reason or "out of sync" in reason:
            reason = f"a row over {BLOCK_BYTES >> 20} MiB, or a quote that is never closed"
        elif "gzip" in reason or "zlib" in reason or "compressed stream" in reason:
            reason = f"not a whole gzip file ({reason})"
        elif _format(file) == "Parquet":
            reason = f"not a {'whole' if 'magic bytes' in reason else 'readable'} Parquet file ({reason})"
        raise UserError(f"{file}: {reason[:300]}") from None
