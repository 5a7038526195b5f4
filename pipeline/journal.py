"""The queue between training and the tracking store: an append-only file of JSON lines in the run's folder.

Every call to MLflow is first a record here, in order. Training only ever appends; a writer process reads on from
where it was. A record is whole once its line ends, so a reader never sees half of one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"

Record = dict[str, Any]


class JournalWriter:
    """Appends records; `flush` makes them visible to readers."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stream = file.open("ab")

    def append(self, record: Record) -> None:
        self.stream.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class JournalReader:
    """Reads whole records from where the last read ended."""

    def __init__(self, file: Path) -> None:
        self.stream = file.open("rb")

    def read(self, limit_bytes: int = 1 << 20) -> list[Record]:
        """The next records, about `limit_bytes` of them; empty when there are no more for now."""
        start = self.stream.tell()
        lines = self.stream.readlines(limit_bytes)
        if lines and not lines[-1].endswith(b"\n"):  # still being written
            self.stream.seek(start + sum(map(len, lines[:-1])))
            lines.pop()
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.stream.close()


def read_all(file: Path) -> Iterator[Record]:
    """Every whole record of a journal."""
    reader = JournalReader(file)
    try:
        while records := reader.read():
            yield from records
    finally:
        reader.close()
