"""CSV files as Arrow batches of binary columns, with strict checks of quotes."""

import codecs
import csv
import gzip
import io
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from pipeline.data.raw_files import BLOCK_BYTES, is_gzip
from pipeline.data.raw_schema import CsvSource
from pipeline.errors import UserError

HEADER_BYTES = 1 << 20  # maximum length of the header line
MAGIC = {b"\x1f\x8b": "gzip; call it .csv.gz", b"PAR1": "Parquet; call it .parquet",
         b"PK\x03\x04": "a ZIP archive; unpack it", b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV",
         b"\x28\xb5\x2f\xfd": "zstd; unpack it"}  # fmt: skip
_LINE_END = re.compile(r"\r\n|\r|\n")
_WRONG_ROW = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")  # Arrow's error message


def check_dialect(dialect: CsvSource) -> None:
    for key in ("delimiter", "escape"):
        character = getattr(dialect, key)
        if character is not None and not (len(character) == 1 and character.isascii() and character not in '\r\n"'):
            raise UserError(f"csv.{key}: found {character!r}, allowed: an ASCII character, no quote or line end")
    if dialect.escape == dialect.delimiter:
        raise UserError(f"csv.escape: found {dialect.escape!r}, which is csv.delimiter, allowed: another one")


class CsvReader:
    """Reader of one CSV file. columns: the column names, if the file has no header."""

    def __init__(self, file: Path, dialect: CsvSource, columns: Sequence[str] | None) -> None:
        self.file, self.dialect, self.columns = file, dialect, columns
        self._checked = False

    @cached_property
    def names(self) -> list[str]:
        return self._stripped(self.columns or self._first_line[0])

    def batches(self, positions: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:  # noqa: ARG002 (by bytes)
        """Yield the columns at these positions, in blocks of `BLOCK_BYTES`."""
        first, empty_lines = self._first_line
        header = not self.columns or self._stripped(first) == self._stripped(self.columns)
        if not self._checked:  # only once, although the file is read twice
            self._check_quotes(header)
            self._checked = True
        # use positions as names, because the header may contain duplicates
        names = [str(number) for number in range(len(self.names))]
        with self._open() as stream:
            try:
                batches = pa.csv.open_csv(
                    stream,
                    pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, column_names=names,
                                       skip_rows_after_names=header * (empty_lines + 1)),
                    pa.csv.ParseOptions(delimiter=self.dialect.delimiter, escape_char=self.dialect.escape or False,
                                        newlines_in_values=True),
                    pa.csv.ConvertOptions(
                        column_types=dict.fromkeys(names, pa.binary()),
                        include_columns=[names[position] for position in positions] or names[:1],
                        strings_can_be_null=False, check_utf8=False,
                    ),
                )  # fmt: skip
                yield from (batch for batch in batches if batch.num_rows)
            except pa.ArrowInvalid as error:
                if wrong := _WRONG_ROW.search(str(error)):
                    row, allowed, count = (int(number) for number in wrong.groups())
                    problem = f"row {row - header}: found {count} columns, allowed: {allowed}"
                    raise UserError(f"{self.file}: {problem}") from None
                raise

    @cached_property
    def _first_line(self) -> tuple[list[str], int]:
        """Cells of the first line that is not empty, and the number of empty lines before it.

        Arrow is not used here: its handler for invalid rows runs in Arrow's own thread, which may outlive the
        interpreter and abort the process (SIGABRT).
        """
        with self._open() as stream:
            start = bytes(stream.read(HEADER_BYTES))
        if problem := _foreign(start):
            raise UserError(f"{self.file}: found {problem}")
        text = start.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        try:
            names = next(filter(None, self._rows(io.StringIO(text, newline=""))), None)
        except csv.Error as error:
            raise UserError(f"{self.file}: the header: {_quote_problem(error)}") from None
        if names is None:
            raise UserError(f"{self.file}: no rows")
        for name in names:
            name.encode()
        return names, len(_LINE_END.findall(text[: len(text) - len(text.lstrip("\r\n"))]))

    def _check_quotes(self, header: bool) -> None:
        """Refuse errors that Arrow accepts: text after a closing quote, or a quote that is never closed."""
        with self._open() as stream:
            if not any(b'"' in chunk for chunk in iter(lambda: stream.read(BLOCK_BYTES), b"")):
                return
        number, open_text = 0, gzip.open if is_gzip(self.file) else open
        with open_text(self.file, "rt", encoding="latin-1", newline="") as text:
            try:
                for number, _ in enumerate(filter(None, self._rows(text)), 1 - header):  # noqa: B007 (for the error)
                    pass
            except csv.Error as error:
                raise UserError(f"{self.file}: row {number + 1}: {_quote_problem(error)}") from None

    def _rows(self, text: io.TextIOBase) -> Iterator[list[str]]:
        csv.field_size_limit(BLOCK_BYTES)
        return csv.reader(text, delimiter=self.dialect.delimiter, escapechar=self.dialect.escape, strict=True)

    def _open(self) -> Any:
        return pa.input_stream(str(self.file), compression="gzip" if is_gzip(self.file) else None)

    def _stripped(self, names: Sequence[str]) -> list[str]:
        return [name.strip() for name in names] if self.dialect.strip else list(names)


def _foreign(start: bytes) -> str:
    """Recognise a file that is not UTF-8 text by its first bytes. Returns its format; "" if it may be text."""
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
