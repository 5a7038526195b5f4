"""JSON Lines files as Arrow batches of texts and lists of texts."""

import codecs
import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

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
            columns = []
            for name in names:
                cells = [row.get(name) for _, row in batch]
                are_lists = self._are_lists[name]
                for (number, _), cell in zip(batch, cells, strict=True):
                    if isinstance(cell, dict) or (cell is not None and isinstance(cell, list) != are_lists):
                        allowed = "texts, numbers and truth values, or lists of them in every row"
                        problem = f"row {number}, column {name}: found {cell!r:.80}, allowed: {allowed}"
                        raise UserError(f"{self.file}: {problem}")
                columns.append(pa.array(
                    [[_text(part) for part in cell] if isinstance(cell, list) else _text(cell) for cell in cells],
                    pa.list_(pa.string()) if are_lists else pa.string(),
                ))  # fmt: skip
            yield pa.record_batch(columns, [str(position) for position in positions])

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
                    row = json.loads(line.removeprefix(codecs.BOM_UTF8), parse_int=str, parse_float=str,
                                     parse_constant=str, object_pairs_hook=_without_repeats)  # fmt: skip
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{self.file}: row {number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{self.file}: row {number}: found {line[:40]!r}, allowed: an object of columns")
                yield number, row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is there twice")
    return row


def _text(value: Any) -> str | None:
    return str(value) if value is not None else None
