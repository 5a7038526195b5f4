"""The journal: an append-only file of JSON lines that queues a run's calls to MLflow.

Training appends; the writer process reads on from where it was and delivers. A record is whole once its line ends, so
a reader never sees half of one. Every start of a run begins with a record `open`, and `finish` ends it.
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
from pipeline.storage.files import check_file

JOURNAL_FILE = "journal.jsonl"
CHUNK_BYTES = 1 << 20  # read at a time
BUFFER_BYTES = 1 << 16  # buffered before a flush
LARGEST = 2**63 - 1  # largest step, time in milliseconds, or whole number among the values

Record = dict[str, Any]


class JournalWriter:
    """Appends records; `flush` makes them visible to readers, `sync` makes them survive a power cut."""

    def __init__(self, file: Path, check: Callable[[], None] = lambda: None) -> None:
        """Open the journal and cut off a last record that a kill left incomplete.

        check: called before every write; raises if another process owns the journal now.
        """
        self.file, self.check = file, check
        if os.path.lexists(file):  # only a regular file may be truncated
            check_file(file)
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
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
            TrainingError: the disk is full or fails. Whole records are in the file, the others stay in the buffer.
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
        """Flush to the disk; returns the journal's size in bytes."""
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
        """Drop bytes from the buffer that are in the file."""
        self.size += count
        del self.buffer[:count]


def write_at(descriptor: int, data: bytes, position: int) -> int:
    """Write to the journal's file; returns the number of bytes written."""
    return os.pwrite(descriptor, data, position)


def _whole_size(descriptor: int) -> int:
    """Size of the file up to the end of its last complete line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - CHUNK_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class JournalReader:
    """Reads whole records from where the last read ended."""

    def __init__(self, file: Path, start: int = 0) -> None:
        check_file(file)
        self.stream = file.open("rb")
        self.stream.seek(start)
        self.damaged = 0  # lines that are no record, as a power cut or another program leaves them

    def read(self) -> list[tuple[int, Record]]:
        """The next records, each with its end position in the file; empty if there are none for now."""
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
    """Every whole record of a journal, with its end position."""
    reader = JournalReader(file, start)
    try:
        while records := reader.read():
            yield from records
    finally:
        reader.close()


def read_records(file: Path) -> Iterator[Record]:
    """Every whole record of a journal."""
    return (record for _, record in read_with_ends(file))


def read_points(file: Path) -> Iterator[Record]:
    """The records that hold points: `metrics` were logged, `known` were read back from the store."""
    return (record for record in read_records(file) if record["op"] in ("metrics", "known"))


def read_opening(file: Path) -> Record | None:
    """The first record `open` of a journal.

    Points that were read back from the store may precede it, if the run's folder was lost.
    """
    if not file.exists():
        return None
    return next((record for record in read_records(file) if record["op"] == "open"), None)


def parse_record(line: bytes) -> Record | None:
    """Parse a line of a journal; None unless it is a record with the fields of its `op`, each of its type.

    A record of an unknown `op`, as later versions may write, is accepted.
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
    "model": {"folder": _TEXT, "task": _TEXT, "inputs": _list_of_texts_or_none, "outputs": _texts},
    "finish": {"status": lambda value: value in ("FINISHED", "FAILED", "KILLED"), "time": _integer},
}  # fmt: skip


def is_measured(metric: str) -> bool:
    """Whether the metric is a time or a speed, which no second run reproduces."""
    return metric.startswith(MEASURED)


def same_value(one: float, other: float) -> bool:
    """Whether two numbers are equal in every bit; all NaN are equal."""
    return struct.pack("d", one) == struct.pack("d", other) or (one != one and other != other)  # noqa: PLR0124


class LoggedPoints:
    """The points that a journal holds, 16 bytes each, and its tags."""

    def __init__(self) -> None:
        self.columns: dict[str, tuple[array[int], array[float]]] = {}  # metric -> steps, values
        self.tags: dict[str, str] = {}

    def read(self, file: Path, start: int = 0) -> int:
        """Add the records of a journal from a position on; returns its end."""
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
        """Add a point; the first value of a step counts."""
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
