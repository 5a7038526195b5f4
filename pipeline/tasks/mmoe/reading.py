"""Raw CSV and Parquet files as a stream of batches; a CSV's cells are all text."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.tasks.mmoe.cells import no_column, plain
from pipeline.tasks.mmoe.schema import CsvSource, sha256_of, sha256_of_parts

SUFFIXES = (".csv", ".csv.gz", ".parquet")
BLOCK_BYTES = 4 << 20  # what is parsed at once; a CSV row must fit into it
_WRONG_ROW = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")  # in Arrow's words


@dataclass(frozen=True)
class Batch:
    """Rows of one file."""

    file: Path
    first: int  # number of the first row within its file, from 1, the header not counted
    start: int  # number of the first row among all rows of all files, from 0
    rows: int
    columns: dict[str, pa.Array]

    def place(self, row: int) -> str:
        return f"{self.file}: row {self.first + row}"


@dataclass(frozen=True)
class Piece:
    """Rows of one file that can be read without the others."""

    file: Path
    first: int = 1  # number of its first row within the file, from 1
    start: int = 0  # number of its first row among all rows of all files, from 0
    groups: tuple[int, int] | None = None  # Parquet: its row groups, from the first to before the second; null = all


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
    """A file, or the files of a folder in sorted order.

    Raises:
        UserError: nothing is there, it cannot be read, or the files are of more than one format.
    """

    def __init__(self, data: Path, columns: Sequence[str] | None = None, csv: CsvSource | None = None) -> None:
        self.files = _find(data)
        self.given, self.csv = columns, csv or CsvSource()
        self.parquet = _is_parquet(self.files[0])
        if columns and self.parquet:
            raise UserError(f"{self.files[0]}: columns names a headerless CSV's columns; a Parquet file has its own")
        if not self.csv.delimiter.isascii() or self.csv.delimiter in '\r\n"':
            raise UserError(
                f"csv.delimiter: found {self.csv.delimiter!r}, allowed: an ASCII character, no quote or line end"
            )

    def names(self, file: Path) -> list[str]:
        """The names of a file's columns."""
        with _told(file):
            if self.parquet:
                return list(pq.ParquetFile(file).schema_arrow.names)
            names = list(self.given or self._header(file))
            return [name.strip() for name in names] if self.csv.strip else names

    def batches(self, wanted: Sequence[str], rows: int) -> Iterator[Batch]:
        """The wanted columns of all rows, at most `rows` at a time, in order.

        Raises:
            UserError: a wanted column is absent, or a file is damaged; names the file and, where it can, the row.
        """
        start = 0
        for file in self.files:
            for batch in self.read(Piece(file, start=start), wanted, rows):
                yield batch
                start += batch.rows

    def pieces(self, rows: int) -> list[Piece]:
        """Parquet: row groups in sequence, some `rows` of them together. CSV: every file, its `start` yet unknown."""
        if not self.parquet:
            return [Piece(file) for file in self.files]
        pieces, start = [], 0
        for file in self.files:
            with _told(file):
                footer = pq.ParquetFile(file).metadata
            sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            begin, before, held = 0, 0, 0
            for number, size in enumerate(sizes, 1):
                held += size
                if held >= rows or number == len(sizes):
                    pieces.append(Piece(file, before + 1, start + before, (begin, number)))
                    begin, before, held = number, before + held, 0
            start += footer.num_rows
        return pieces

    def read(self, piece: Piece, wanted: Sequence[str], rows: int) -> Iterator[Batch]:
        """The wanted columns of a piece; as `batches`."""
        file, first, start = piece.file, piece.first, piece.start
        names = self.names(file)
        for name in wanted:
            if names.count(name) != 1:
                found = f"column {name} is there twice" if name in names else no_column(name, names)
                raise UserError(f"{file}: {found}")
        with _told(file):
            for table in self._tables(piece, names, list(wanted), rows):
                batch = Batch(file, first, start, table.num_rows, {})
                for name in wanted:
                    batch.columns[name] = plain(table[name].combine_chunks(), name, batch.place)
                yield batch
                first, start = first + table.num_rows, start + table.num_rows

    def description(self, digests: Sequence[str] | None = None) -> str:
        """File names and the SHA-256 of the file, or of the files' digests (those given) one after another."""
        digests = digests or [sha256_of(file) for file in self.files]
        names = [file.name for file in self.files]
        if len(names) > 4:
            names = [f"{names[0]} to {names[-1]} ({len(names)} files)"]
        whole = digests[0] if len(digests) == 1 else sha256_of_parts(digests)
        return f"{', '.join(names)}, SHA-256 {whole}"

    def _tables(self, piece: Piece, names: list[str], wanted: list[str], rows: int) -> Iterator[pa.Table]:
        recut, groups = Recut(rows), range(*piece.groups) if piece.groups else None
        batches = (
            pq.ParquetFile(piece.file).iter_batches(rows, row_groups=groups, columns=wanted)
            if self.parquet else self._csv(piece.file, names, wanted)
        )  # fmt: skip
        for batch in batches:
            yield from recut.add(pa.Table.from_batches([batch]).select(wanted))
        yield from recut.rest()

    def _header(self, file: Path) -> list[str]:
        """The names that the first line that is not empty holds.

        Read without Arrow: it would call us back for rows that do not fit, from a thread of its own that may outlive
        the interpreter, and the process would end by SIGABRT.
        """
        with _opened(file) as stream:
            start = bytes(stream.read(BLOCK_BYTES))
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{file}: found UTF-16, allowed: UTF-8 text")
        text = start.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=self.csv.delimiter, strict=True)
        try:
            names = next(filter(None, rows), None)
        except csv.Error as error:
            reason = "a quote that is never closed" if "unexpected end" in str(error) else str(error)
            raise UserError(f"{file}: the header: {reason}") from None
        if names is None:
            raise UserError(f"{file}: no rows")
        for name in names:
            name.encode()
        return names

    def _csv(self, file: Path, names: list[str], wanted: list[str]) -> Iterator[pa.RecordBatch]:
        original = self.given or self._header(file)
        last = original[-1]  # read even if nobody wants it: that is where a quote left open ends
        header = 0 if self.given else 1
        by_name = dict(zip(names, original, strict=True))
        read = [by_name[name] for name in wanted]
        read += [last] if last not in read else []
        end = b""
        with _opened(file) as stream:
            try:
                batches = pa.csv.open_csv(
                    stream,
                    pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, column_names=self.given),
                    pa.csv.ParseOptions(delimiter=self.csv.delimiter, newlines_in_values=True),
                    pa.csv.ConvertOptions(
                        column_types=dict.fromkeys(original, pa.binary()), include_columns=read,
                        strings_can_be_null=False, check_utf8=False,
                    ),
                )  # fmt: skip
                for batch in batches:
                    if batch.num_rows:
                        end = batch.column(len(read) - 1 if last == read[-1] else read.index(last))[-1].as_py()
                        yield batch.rename_columns([*wanted, *["" for _ in read[len(wanted) :]]])
            except pa.ArrowInvalid as error:
                if wrong := _WRONG_ROW.search(str(error)):
                    row, allowed, found = (int(number) for number in wrong.groups())
                    raise UserError(f"{file}: row {row - header}: found {found} columns, allowed: {allowed}") from None
                raise
        if b"\n" in end and not _ends_with_quote(file):
            raise UserError(f"{file}: the last row has a quote that is never closed")


def _find(data: Path) -> list[Path]:
    try:
        if data.is_dir():
            files = sorted(
                file for file in data.iterdir()
                if file.name.lower().endswith(SUFFIXES) and file.name[0] not in "._" and file.is_file()
            )  # fmt: skip
            if not files:
                raise UserError(f"{data}: no data file in this folder, allowed: {', '.join(SUFFIXES)}")
        else:
            if data.exists() and not data.is_file():
                raise UserError(f"{data}: neither a file nor a folder")
            files = [data]
        for file in files:
            with file.open("rb") as stream:
                if not stream.read(1):
                    raise UserError(f"{file}: the file is empty")
    except OSError as error:
        raise UserError(f"{getattr(error, 'filename', None) or data}: {error.strerror or error}") from None
    if len({_is_parquet(file) for file in files}) > 1:
        raise UserError(f"{data}: CSV and Parquet files in one folder, allowed: one format")
    return files


def _is_parquet(file: Path) -> bool:
    return file.name.lower().endswith(".parquet")


def _opened(file: Path) -> Any:
    compressed = file.name.lower().endswith(".gz")
    return pa.input_stream(str(file), compression="gzip" if compressed else None)


def _ends_with_quote(file: Path) -> bool:
    end = b""
    with _opened(file) as stream:
        while chunk := stream.read(BLOCK_BYTES):
            end = (end + chunk)[-16:]
    return bool(end.rstrip(b"\r\n").endswith(b'"'))


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
        elif _is_parquet(file):
            reason = f"not a {'whole' if 'magic bytes' in reason else 'readable'} Parquet file ({reason})"
        raise UserError(f"{file}: {reason[:300]}") from None
