"""The rows of raw CSV, JSON Lines or Parquet files as a stream of batches."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.cells import no_column, plain
from pipeline.data.csv_reader import CsvReader, check_dialect
from pipeline.data.digests import combined_sha256
from pipeline.data.json_reader import JsonReader
from pipeline.data.raw_files import RawFile, file_format, list_files, read_errors
from pipeline.data.raw_schema import CsvSource
from pipeline.data.recut import Recut
from pipeline.errors import UserError
from pipeline.storage.files import file_sha256


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file."""

    file: RawFile
    first: int  # number of the first row within its file, from 1, without the header
    start: int  # number of the first row among the rows of all files, from 0
    rows: int
    columns: dict[str, pa.Array]

    def place(self, row: int) -> str:
        return f"{self.file.path}: row {self.first + row}"


class ParquetReader:
    """Reader of one Parquet file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def names(self) -> list[str]:
        return list(pq.ParquetFile(self.file).schema_arrow.names)

    def batches(self, positions: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:
        names = self.names
        yield from pq.ParquetFile(self.file).iter_batches(rows, columns=[names[position] for position in positions])


class RawTable:
    """The rows of all files (see `list_files`). All files have the same format.

    Raises:
        UserError: files are missing or unreadable, of several formats, or the CSV dialect is invalid.
    """

    def __init__(
        self,
        data: Path,
        own: Mapping[str, Path],
        columns: Sequence[str] | None = None,
        dialect: CsvSource | None = None,
    ) -> None:
        """columns: the column names of CSV files without a header."""
        self.files = list_files(data, own)
        dialect = dialect or CsvSource()
        self._strip = dialect.strip
        formats = sorted({file_format(file.path) for file in self.files})
        if len(formats) > 1:
            raise UserError(f"{data}: found {' and '.join(formats)} files, allowed: one format")
        if columns and formats[0] != "CSV":
            raise UserError(
                f"{self.files[0].path}: columns names a headerless CSV's columns; a {formats[0]} file has its own"
            )
        if formats[0] == "JSON Lines" and (dialect.decimal != "." or dialect.thousands):
            raise UserError(f"{self.files[0].path}: csv.decimal or csv.thousands is given, but numbers of JSON have "
                            "a decimal point; allowed: neither of the two")  # fmt: skip
        check_dialect(dialect)

        readers: dict[str, Callable[[Path], CsvReader | JsonReader | ParquetReader]] = {
            "CSV": lambda file: CsvReader(file, dialect, columns), "JSON Lines": JsonReader, "Parquet": ParquetReader
        }  # fmt: skip
        self._readers = {file.path: readers[formats[0]](file.path) for file in self.files}

    def names(self, file: RawFile) -> list[str]:
        """Names of a file's columns, including partition columns, in Unicode NFC, stripped as cells are."""
        with read_errors(file.path):
            names = self._readers[file.path].names
        names = [unicodedata.normalize("NFC", name) for name in names]
        return [*(name.strip() if self._strip else name for name in names), *file.partition]

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[Batch]:
        """Yield these columns of all rows in order, at most `rows` rows at a time.

        Raises:
            UserError: a column is missing or duplicated, or a file is damaged. The message names the file and, where
                possible, the row.
        """
        start = 0
        for file in self.files:
            names, first = self.names(file), 1
            for name in columns:
                if names.count(name) != 1:
                    problem = f"column {name} appears twice" if name in names else no_column(name, names)
                    raise UserError(f"{file.path}: {problem}")
            with read_errors(file.path):
                for table in self._tables(file, names, columns, rows):
                    batch = Batch(file, first, start, table.num_rows, {})
                    for name in columns:
                        batch.columns[name] = plain(table[name].combine_chunks(), name, batch.place)
                    yield batch
                    first, start = first + table.num_rows, start + table.num_rows

    def description(self) -> str:
        """Names of the files, and the SHA-256 of the only file or of all files' digests."""
        files = [file.path for file in self.files]
        names = [file.name for file in files]
        if len(names) > 4:
            names = [f"{names[0]} to {names[-1]} ({len(names)} files)"]
        return f"{', '.join(names)}, SHA-256 {file_sha256(files[0]) if len(files) == 1 else combined_sha256(files)}"

    def _tables(self, file: RawFile, names: list[str], columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        recut, inside = Recut(rows), [name for name in columns if name not in file.partition]
        positions = [names.index(name) for name in inside]
        for batch in self._readers[file.path].batches(positions, rows):
            arrays = dict(zip(inside, batch.columns, strict=False))
            for name in columns:
                if name in file.partition:
                    arrays[name] = pa.repeat(pa.scalar(file.partition[name], pa.string()), batch.num_rows)
            yield from recut.add(pa.table({name: arrays[name] for name in columns}))
        yield from recut.rest()
