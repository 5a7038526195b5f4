"""JSON Lines files as Arrow batches of texts and lists of texts."""

import codecs
import gzip
import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.json_cells import parsed, text_of
from pipeline.data.raw_files import is_gzip
from pipeline.errors import UserError


class JsonReader:
    """Reader of one file with one object per line. A key that is absent from an object is a missing value."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @cached_property
    def names(self) -> list[str]:
        """The keys of all objects, in the order of their first appearance."""
        return list(self._are_lists)

    def batches(self, positions: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:
        objects, names = self._objects(), [self.names[position] for position in positions]
        while batch := list(itertools.islice(objects, rows)):
            columns = [self._column(name, batch) for name in names]
            yield pa.record_batch(columns, [str(position) for position in positions])

    def _column(self, name: str, batch: Sequence[tuple[int, dict[str, Any]]]) -> pa.Array:
        cells, are_lists = list[Any](), self._are_lists[name]
        for number, row in batch:
            cell = row.get(name)
            try:
                if are_lists and cell is not None and not isinstance(cell, list):
                    raise ValueError("not a list")
                cells.append(list(map(text_of, cell)) if are_lists and cell is not None else text_of(cell))
            except ValueError:
                allowed = "texts, numbers and truth values, or lists of them in every row"
                problem = f"row {number}, column {name}: found {cell!r:.80}, allowed: {allowed}"
                raise UserError(f"{self.file}: {problem}") from None
        return pa.array(cells, pa.list_(pa.string()) if are_lists else pa.string())

    @cached_property
    def _are_lists(self) -> dict[str, bool]:
        """Whether the first value of each key in the file is a list; a key may have no value in a whole batch."""
        are_lists: dict[str, bool | None] = {}
        for _, row in self._objects():
            for key, cell in row.items():
                if are_lists.get(key) is None:
                    are_lists[key] = None if cell is None else isinstance(cell, list)
        return {key: bool(is_list) for key, is_list in are_lists.items()}

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row number from 1, object) of each line that is not empty. Numbers are kept as text."""
        with gzip.open(self.file) if is_gzip(self.file) else self.file.open("rb") as lines:
            for number, line in enumerate(filter(bytes.strip, lines), 1):
                try:
                    row = parsed(line.removeprefix(codecs.BOM_UTF8))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{self.file}: row {number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{self.file}: row {number}: found {line[:40]!r}, allowed: an object of columns")
                yield number, row
