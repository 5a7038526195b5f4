"""The queue between training and the tracking store: an append-only file of JSON lines in the run's folder.

Every call to MLflow is first a record here, in order. Training only ever appends; a writer process reads on from where
it was. A record is whole once its line ends, so a reader never sees half of one. Every start of a run begins with a
record `open`; `finish` ends one.
"""

import json
import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError, os_errors
from pipeline.names import MEASURED
from pipeline.storage.files import check_file

JOURNAL_FILE = "journal.jsonl"
CHUNK_BYTES = 1 << 20  # of the journal in memory at a time
BUFFER_BYTES = 1 << 16  # what waits for a flush at most
LARGEST = 2**63 - 1  # of a step, a time in milliseconds, or a whole number among the values

Record = dict[str, Any]


def write_at(descriptor: int, data: bytes, position: int) -> int:
    """The one place where the journal is written; returns how much the file system took."""
    return os.pwrite(descriptor, data, position)


class JournalWriter:
    """Appends records; `flush` makes them visible to readers, `sync` makes them survive a power cut."""

    def __init__(self, file: Path, check: Callable[[], None] = lambda: None) -> None:
        """Open the journal, without what a kill left of its last record.

        check: called before anything is written; raises where the journal is another process' by now.
        """
        self.file, self.check = file, check
        if os.path.lexists(file):  # it is cut where its last line ends: nothing else may be
            check_file(file)
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self.size = _whole(self.descriptor)
        os.ftruncate(self.descriptor, self.size)
        self.waiting, self.refused = bytearray(), False

    def append(self, record: Record) -> None:
        self.waiting += json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if len(self.waiting) >= BUFFER_BYTES and not self.refused:
            self.flush()

    def flush(self) -> None:
        """Hand what waits to the file system.

        Raises:
            TrainingError: it did not take all of it. Whole records are in the file, the others go on waiting.
        """
        self.check()
        taken = 0
        try:
            while taken < len(self.waiting):
                taken += write_at(self.descriptor, bytes(self.waiting[taken:]), self.size + taken)
        except OSError as error:
            self.refused = True
            self._keep(self.waiting.rfind(b"\n", 0, taken) + 1)
            os.ftruncate(self.descriptor, self.size)
            raise TrainingError(f"journal {self.file}: {error.strerror or error}") from None
        self._keep(taken)
        self.refused = False

    def _keep(self, count: int) -> None:
        self.size += count
        del self.waiting[:count]

    def sync(self) -> int:
        """Flush, and wait for the disk; returns the journal's length in bytes."""
        self.flush()
        with os_errors(f"journal {self.file}", TrainingError):
            os.fsync(self.descriptor)
        return self.size

    def close(self) -> None:
        """Sync and close; the file is closed even where that raises."""
        try:
            self.sync()
        finally:
            os.close(self.descriptor)


def _whole(descriptor: int) -> int:
    """The length of the file up to the end of its last whole line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - CHUNK_BYTES)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class JournalReader:
    """Reads whole records from where the last read ended."""

    def __init__(self, file: Path, start: int = 0) -> None:
        check_file(file)
        self.stream = file.open("rb")
        self.stream.seek(start)
        self.damaged = 0  # whole lines that are no record: a power cut can leave such, or another program

    def read(self, limit_bytes: int = CHUNK_BYTES) -> list[tuple[int, Record]]:
        """The next records, each with where it ends in the file; empty when there are no more for now."""
        found: list[tuple[int, Record]] = []
        while not found:
            position = self.stream.tell()
            lines = self.stream.readlines(limit_bytes)
            if not lines:
                break
            for line in lines:
                if not line.endswith(b"\n"):  # still being written
                    self.stream.seek(position)
                    return found
                position += len(line)
                record = parsed(line)
                if record is None:
                    self.damaged += 1
                else:
                    found.append((position, record))
        return found

    def close(self) -> None:
        self.stream.close()


def parsed(line: bytes) -> Record | None:
    """The record in a line of a journal; None where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if is_record(record) else None


def is_record(value: object) -> bool:
    """Whether it is a record with the fields of its `op`, each of its type; of an `op` of a later version, any are."""
    if not isinstance(value, dict) or not isinstance(op := value.get("op"), str):
        return False
    return all(name in value and fits(value[name]) for name, fits in FIELDS.get(op, {}).items())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_list_of_texts_or_none(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST - 1 <= value <= LARGEST


def _is_points(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(number, float) or (isinstance(number, int) and abs(number) <= LARGEST) for number in value.values()
    )


def _is_status(value: object) -> bool:
    return value in ("FINISHED", "FAILED", "KILLED")


_POINTS: dict[str, Callable[[object], bool]] = {"step": _is_whole, "time": _is_whole, "values": _is_points}
FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "open": {"id": _is_text, "time": _is_whole, "name": _is_text, "experiment": _is_text_or_none, "tags": _is_texts,
             "online": _is_flag, "host": _is_text},
    "params": {"values": _is_texts},
    "tags": {"values": _is_texts},
    "metrics": _POINTS,
    "known": _POINTS,
    "artifact": {"file": _is_text, "folder": _is_text},
    "input": {"name": _is_text, "digest": _is_text, "source": _is_text, "profile": _is_mapping},
    "model": {"folder": _is_text, "task": _is_text, "inputs": _is_list_of_texts_or_none, "outputs": _is_texts},
    "finish": {"status": _is_status, "time": _is_whole},
}  # fmt: skip


def read_all(file: Path, start: int = 0) -> Iterator[Record]:
    """Every whole record of a journal."""
    reader = JournalReader(file, start)
    try:
        while records := reader.read():
            for _, record in records:
                yield record
    finally:
        reader.close()


def beginning(file: Path) -> Record | None:
    """The first record `open` of a journal; None where there is none, or no journal.

    Points that were read back from the store may stand before it, where a run's folder was lost.
    """
    if not file.exists():
        return None
    return next((record for record in read_all(file) if record["op"] == "open"), None)


def points(file: Path) -> Iterator[Record]:
    """The records of a journal that hold points: those that were logged, and those read back from the store."""
    return (record for record in read_all(file) if record["op"] in ("metrics", "known"))


def is_measured(metric: str) -> bool:
    """A time or a speed: no second run repeats it."""
    return metric.startswith(MEASURED)


def same_value(one: float, other: float) -> bool:
    """Bit for bit; one NaN is like another."""
    return struct.pack("d", one) == struct.pack("d", other) or (one != one and other != other)  # noqa: PLR0124


@dataclass
class Known:
    """The points that a journal holds already; 16 bytes each."""

    columns: dict[str, tuple["array[int]", "array[float]"]] = field(default_factory=dict)  # metric -> steps, values
    tags: dict[str, str] = field(default_factory=dict)

    def read(self, file: Path, start: int = 0) -> int:
        """Take in a journal from there on; returns where it ends."""
        reader, end = JournalReader(file, start), start
        try:
            while records := reader.read():
                for end, record in records:  # noqa: B007
                    self._take(record)
        finally:
            reader.close()
        return end

    def _take(self, record: Mapping[str, Any]) -> None:
        if record["op"] == "tags":
            self.tags |= record["values"]
        elif record["op"] in ("metrics", "known"):
            for key, value in record["values"].items():
                self.add(key, record["step"], float(value))

    def add(self, key: str, step: int, value: float) -> None:
        """The first value of a step is the one that counts."""
        steps, values = self.columns.setdefault(key, (array("q"), array("d")))
        at = len(steps) if not steps or step > steps[-1] else bisect_left(steps, step)
        if at == len(steps) or steps[at] != step:
            steps.insert(at, step)
            values.insert(at, value)

    def value(self, key: str, step: int) -> float | None:
        steps, values = self.columns.get(key, ((), ()))
        at = bisect_left(steps, step)
        return values[at] if at < len(steps) and steps[at] == step else None

    def last_steps(self) -> dict[str, int]:
        return {key: steps[-1] for key, (steps, _) in self.columns.items()}
