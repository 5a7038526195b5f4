"""CSV files as Arrow batches of binary columns, with strict checks of quotes."""

import codecs
import csv
import gzip
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
UTF16 = "UTF-16"
_ESCAPE = ", or csv.escape names what escapes them"
_LINE_END = re.compile(r"\r\n|\r|\n")
_WRONG_ROW = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")  # Arrow's error message


def check_dialect(dialect: CsvSource) -> None:
    """Refuse characters that cannot be part of a dialect, and unknown encodings."""
    seen: dict[str, str] = {}  # character -> key
    for key in ("delimiter", "quote", "escape"):
        character = getattr(dialect, key)
        if character is None:
            continue
        if not (len(character) == 1 and character.isascii() and character not in "\r\n"):
            raise UserError(f"csv.{key}: found {character!r}, allowed: an ASCII character, no line end")
        if character in seen:
            other = f"csv.{seen[character]}"
            raise UserError(f"csv.{key}: found {character!r}, which is {other}, allowed: a different character")
        seen[character] = key
    try:
        "".encode(dialect.encoding)
    except (LookupError, ValueError):
        allowed = "a text encoding of Python, such as utf-8, cp1252 or utf-16"
        raise UserError(f"csv.encoding: found {dialect.encoding!r}, allowed: {allowed}") from None


class CsvReader:
    """Reader of one CSV file. columns: the column names, if the file has no header."""

    def __init__(self, file: Path, dialect: CsvSource, columns: Sequence[str] | None) -> None:
        self.file, self.dialect, self.columns = file, dialect, columns
        self._checked = False

    @cached_property
    def names(self) -> list[str]:
        with self._decoding():
            return list(self.columns or self._first_line[0])

    def batches(self, positions: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:  # noqa: ARG002 (by bytes)
        """Yield the columns at these positions, in blocks of `BLOCK_BYTES`."""
        first, empty_lines = self._first_line
        header = not self.columns or _folded(first) == _folded(self.columns)
        if not self._checked:  # only once, although the file is read twice
            with self._decoding():
                self._check_quotes(header)
                self._check_nulls()
            self._checked = True
        # use positions as names, because the header may contain duplicates
        names = [str(number) for number in range(len(self.names))]
        with self._open() as stream, self._decoding():
            try:
                batches = pa.csv.open_csv(
                    stream,
                    pa.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, column_names=names,
                                       skip_rows_after_names=header * (empty_lines + 1)),
                    pa.csv.ParseOptions(delimiter=self.dialect.delimiter, quote_char=self.dialect.quote or False,
                                        escape_char=self.dialect.escape or False, newlines_in_values=True),
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
        with self._open_bytes() as stream:
            kind = foreign_format(bytes(stream.read(HEADER_BYTES)))
        if kind and (kind != UTF16 or self._is_utf8):
            other = ", or csv.encoding: utf-16" if kind == UTF16 else ""
            raise UserError(f"{self.file}: found {kind}, allowed: UTF-8 text{other}")
        with self._open() as stream:
            start = bytes(stream.read(HEADER_BYTES))
        text = start.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        try:
            names = next(filter(None, self._rows(io.StringIO(text, newline=""))), None)
        except csv.Error as error:
            raise UserError(f"{self.file}: the header: {quote_problem(error, _ESCAPE)}") from None
        if names is None:
            raise UserError(f"{self.file}: no rows")
        for name in names:
            name.encode()
        return names, len(_LINE_END.findall(text[: len(text) - len(text.lstrip("\r\n"))]))

    def _check_quotes(self, header: bool) -> None:
        """Refuse errors that Arrow accepts: text after a closing quote, or a quote that is never closed."""
        if self.dialect.quote is None:
            return
        quote = self.dialect.quote.encode()
        with self._open() as stream:
            if not any(quote in chunk for chunk in iter(lambda: stream.read(BLOCK_BYTES), b"")):
                return
        number, open_text = 0, gzip.open if is_gzip(self.file) else open
        encoding = "latin-1" if self._is_utf8 else self.dialect.encoding  # invalid UTF-8 is reported with its column
        with open_text(self.file, "rt", encoding=encoding, newline="") as text:
            try:
                for number, _ in enumerate(filter(None, self._rows(text)), 1 - header):  # noqa: B007 (for the error)
                    pass
            except csv.Error as error:
                raise UserError(f"{self.file}: row {number + 1}: {quote_problem(error, _ESCAPE)}") from None

    def _check_nulls(self) -> None:
        """Refuse `\\N`, a missing value of MySQL and Hive, where the backslash escapes: Arrow reads it as `N`."""
        if self.dialect.escape != "\\":
            return
        around = re.escape(self.dialect.delimiter) + "\r\n"
        null = re.compile(rf"(^|[{around}])\\N([{around}]|$)".encode())
        with self._open() as stream:
            if any(null.search(chunk) for chunk in iter(lambda: stream.read(BLOCK_BYTES), b"")):
                allowed = "empty cells, or csv.escape: null, with which missing_values may name it"
                raise UserError(f"{self.file}: found \\N, which csv.escape reads as N, allowed: {allowed}")

    def _rows(self, text: io.TextIOBase) -> Iterator[list[str]]:
        csv.field_size_limit(BLOCK_BYTES)
        dialect, quote = self.dialect, self.dialect.quote
        return csv.reader(text, delimiter=dialect.delimiter, escapechar=dialect.escape, strict=True, quotechar=quote,
                          quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE)  # fmt: skip

    @cached_property
    def _is_utf8(self) -> bool:
        return codecs.lookup(self.dialect.encoding).name == "utf-8"

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Report text in another encoding than `csv.encoding`; invalid UTF-8 is reported with its row and column."""
        try:
            yield
        except UnicodeError as error:
            if self._is_utf8:
                raise
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.file}: not {self.dialect.encoding} text, as csv.encoding says: {reason}") from None

    def _open(self) -> Any:
        """Open the file as UTF-8 text."""
        stream = self._open_bytes()
        return stream if self._is_utf8 else pa.transcoding_input_stream(stream, self.dialect.encoding, "utf-8")

    def _open_bytes(self) -> Any:
        return pa.input_stream(str(self.file), compression="gzip" if is_gzip(self.file) else None)


def _folded(names: Sequence[str]) -> list[str]:
    """Names without differences in case, outer spaces and Unicode form."""
    return [unicodedata.normalize("NFC", name.strip().casefold()) for name in names]


def foreign_format(start: bytes) -> str:
    """Recognise a file that is not text, or UTF-16, by its first bytes. Returns its format; "" if it may be UTF-8."""
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            return kind
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:64].count(0) > len(start[:64]) // 4
    return UTF16 if utf16 else ""


def quote_problem(error: csv.Error, other: str = "") -> str:
    """Describe an error of Python's CSV reader. other: what else is allowed for quotes within quotes."""
    if "unexpected end" in str(error):
        return "found a quote that is never closed"
    if "expected after" in str(error):
        return f"found text after a closing quote, allowed: quotes within quotes are doubled{other}"
    return f"a value over {BLOCK_BYTES >> 20} MiB" if "field limit" in str(error) else str(error)
