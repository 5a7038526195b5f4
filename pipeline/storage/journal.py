"""The journal: an append-only file of JSON lines that queues a run's calls to MLflow.

Training appends records; the writer process reads and delivers them. A record is complete once its line ends, so that
readers never see a partial record. Every start of a run writes a record `open`; the record `finish` ends the run.
"""

import json
import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError, os_errors
from pipeline.names import MEASURED
from pipeline.runtime.platform_support import BYTE_FILE, read_at, write_at
from pipeline.storage.files import check_file

JOURNAL_FILE = "journal.jsonl"
CHUNK_BYTES = 1 << 20  # size of one read
BUFFER_BYTES = 1 << 16  # buffered before a flush
LARGEST = 2**63 - 1  # largest step, time in milliseconds, or integer among the values

Record = dict[str, Any]


class JournalWriter:
    """Appends records; `flush` makes them visible to readers, `sync` makes them survive a power cut."""

    def __init__(self, file: Path, check: Callable[[], None] = lambda: None) -> None:
        """Open the journal, and cut off an incomplete last record left by a killed process.

        check: called before every write; raises if the run was taken over.
        """
        self.file, self.check = file, check
        if os.path.lexists(file):  # only a regular file may be truncated
            check_file(file)
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | BYTE_FILE, 0o666)
        self.size = _whole_size(self.descriptor)
        os.ftruncate(self.descriptor, self.size)
        self.buffer, self.failed = bytearray(), False

    def append(self, record: Record) -> None:
        self.buffer += json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if len(self.buffer) >= BUFFER_BYTES and not self.failed:
            self.flush()

    def flush(self) -> None:
        """Write the buffer to the file.

        Raises:
            TrainingError: the disk is full or fails; records not written completely stay in the buffer.
        """
        self.check()
        count = 0
        try:
            while count < len(self.buffer):
                count += write_at(self.descriptor, bytes(self.buffer[count:]), self.size + count)
        except OSError as error:
            self.failed = True
            self._drop(self.buffer.rfind(b"\n", 0, count) + 1)
            os.ftruncate(self.descriptor, self.size)
            raise TrainingError(f"journal {self.file}: {error.strerror or error}") from None
        self._drop(count)
        self.failed = False

    def sync(self) -> int:
        """Flush, and sync the file to the disk; returns the journal's size in bytes."""
        self.flush()
        with os_errors(f"journal {self.file}", TrainingError):
            os.fsync(self.descriptor)
        return self.size

    def close(self) -> None:
        """Sync and close; the file is closed even if that raises."""
        try:
            self.sync()
        finally:
            os.close(self.descriptor)

    def _drop(self, count: int) -> None:
        """Remove the first `count` bytes, now written to the file, from the buffer."""
        self.size += count
        del self.buffer[:count]


def _whole_size(descriptor: int) -> int:
    """Size of the file up to the end of its last complete line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - CHUNK_BYTES)
        newline = read_at(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class JournalReader:
    """Reads complete records; each read continues where the last one ended."""

    def __init__(self, file: Path, start: int = 0) -> None:
        check_file(file)
        self.stream = file.open("rb")
        self.stream.seek(start)
        self.damaged = 0  # number of invalid lines, left by a power cut or another program

    def read(self) -> list[tuple[int, Record]]:
        """Read the next records, each with its end position in the file; empty if there are no new ones."""
        records: list[tuple[int, Record]] = []
        while not records:
            position = self.stream.tell()
            lines = self.stream.readlines(CHUNK_BYTES)
            if not lines:
                break
            for line in lines:
                if not line.endswith(b"\n"):  # still being written
                    self.stream.seek(position)
                    return records
                position += len(line)
                record = parse_record(line)
                if record is None:
                    self.damaged += 1
                else:
                    records.append((position, record))
        return records

    def close(self) -> None:
        self.stream.close()


def read_with_ends(file: Path, start: int = 0) -> Iterator[tuple[int, Record]]:
    """All complete records of a journal from a position on, with their end positions."""
    reader = JournalReader(file, start)
    try:
        while records := reader.read():
            yield from records
    finally:
        reader.close()


def read_records(file: Path) -> Iterator[Record]:
    """All complete records of a journal."""
    return (record for _, record in read_with_ends(file))


def read_points(file: Path) -> Iterator[Record]:
    """All records with points: `metrics` (logged) and `known` (read back from the store)."""
    return (record for record in read_records(file) if record["op"] in ("metrics", "known"))


def read_opening(file: Path) -> Record | None:
    """The first `open` record of a journal, or None.

    `known` records may precede it (points read back from the store).
    """
    if not file.exists():
        return None
    return next((record for record in read_records(file) if record["op"] == "open"), None)


def parse_record(line: bytes) -> Record | None:
    """Parse a line of a journal; None unless it is a record with the required fields of its `op`, of valid types.

    A record with an unknown `op`, which a later version may have written, is accepted.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(op := record.get("op"), str):
        return None
    fields = FIELDS.get(op, {}).items()
    return record if all(name in record and is_valid(record[name]) for name, is_valid in fields) else None


Check = Callable[[Any], bool]


def _is(*types: type) -> Check:
    return lambda value: type(value) in types


def _list_of_texts_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _integer(value: Any) -> bool:
    return type(value) is int and -LARGEST - 1 <= value <= LARGEST


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(number, float) or (isinstance(number, int) and abs(number) <= LARGEST) for number in value.values()
    )


_TEXT = _is(str)
_POINTS: dict[str, Check] = {"step": _integer, "time": _integer, "values": _numbers}
FIELDS: dict[str, dict[str, Check]] = {
    "open": {"id": _TEXT, "time": _integer, "name": _TEXT, "experiment": _is(str, type(None)), "tags": _texts,
             "online": _is(bool), "host": _TEXT},
    "params": {"values": _texts},
    "tags": {"values": _texts},
    "metrics": _POINTS,
    "known": _POINTS,
    "artifact": {"file": _TEXT, "folder": _TEXT},
    "input": {"name": _TEXT, "digest": _TEXT, "source": _TEXT, "profile": _is(dict)},
    "model": {"folder": _TEXT, "task": _TEXT, "predictor": _TEXT, "inputs": _list_of_texts_or_none, "outputs": _texts},
    "finish": {"status": lambda value: value in ("FINISHED", "FAILED", "KILLED"), "time": _integer},
}  # fmt: skip


def is_measured(metric: str) -> bool:
    """Whether the metric is a measurement, such as a speed, that a repeated run does not reproduce."""
    return metric.startswith(MEASURED)


def same_value(one: float, other: float) -> bool:
    """Whether two floats are bitwise equal; all NaNs count as equal."""
    return struct.pack("d", one) == struct.pack("d", other) or (one != one and other != other)  # noqa: PLR0124


class LoggedPoints:
    """The points of a journal, at 16 bytes each, and its tags."""

    def __init__(self) -> None:
        self.columns: dict[str, tuple[array[int], array[float]]] = {}  # metric -> steps, values
        self.tags: dict[str, str] = {}

    def read(self, file: Path, start: int = 0) -> int:
        """Add the records of a journal from a position on; returns the end position."""
        end = start
        for end, record in read_with_ends(file, start):  # noqa: B007
            self.add_record(record)
        return end

    def add_record(self, record: Mapping[str, Any]) -> None:
        if record["op"] == "tags":
            self.tags |= record["values"]
        elif record["op"] in ("metrics", "known"):
            for key, value in record["values"].items():
                self.add(key, record["step"], float(value))

    def add(self, key: str, step: int, value: float) -> None:
        """Add a point, unless the step already has a value."""
        steps, values = self.columns.setdefault(key, (array("q"), array("d")))
        index = len(steps) if not steps or step > steps[-1] else bisect_left(steps, step)
        if index == len(steps) or steps[index] != step:
            steps.insert(index, step)
            values.insert(index, value)

    def value(self, key: str, step: int) -> float | None:
        steps, values = self.columns.get(key, ((), ()))
        index = bisect_left(steps, step)
        return values[index] if index < len(steps) and steps[index] == step else None

    def last_steps(self) -> dict[str, int]:
        return {key: steps[-1] for key, (steps, _) in self.columns.items()}
