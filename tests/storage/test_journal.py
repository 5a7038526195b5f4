"""The journal keeps whole records in order, even if it is cut, damaged, or the disk is full."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import TrainingError
from pipeline.storage import journal as journals
from pipeline.storage.journal import (
    JOURNAL_FILE,
    JournalReader,
    JournalWriter,
    LoggedPoints,
    parse_record,
    read_records,
    same_value,
)
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking import doctor


def test_journal_reader_sees_whole_records_only(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    writer = JournalWriter(file)
    reader = JournalReader(file)
    assert reader.read() == []
    writer.append({"op": "one"})
    assert reader.read() == []  # not flushed
    writer.flush()
    assert reader.read() == [(13, {"op": "one"})]
    with file.open("ab") as stream:
        stream.write(b'{"op":"tw')
        stream.flush()
        assert reader.read() == []
        stream.write(b'o"}\n{"op":"three"}\n')
        stream.flush()
    assert reader.read() == [(26, {"op": "two"}), (41, {"op": "three"})]
    assert [record["op"] for record in read_records(file)] == ["one", "two", "three"]


@given(st.floats(), st.floats())
def test_values_are_the_same_bit_for_bit(one: float, other: float) -> None:
    assert same_value(one, other) == (one.hex() == other.hex())  # every NaN is "nan" there
    assert same_value(one, one)
    assert not same_value(0.0, -0.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.floats(allow_nan=False))))
def test_known_points_are_the_first_of_each_step(logged: list[tuple[str, int, float]]) -> None:
    known, first = LoggedPoints(), dict[tuple[str, int], float]()
    for key, step, value in logged:
        known.add(key, step, value)
        first.setdefault((key, step), value)
    for key in "abc":
        for step in range(31):
            assert known.value(key, step) == first.get((key, step))
    assert known.last_steps() == {key: max(step for other, step in first if other == key) for key, _ in first}


def test_a_full_buffer_checks_the_owner_too(tmp_path: Path) -> None:
    def taken() -> None:
        raise TrainingError("taken over")

    journal = JournalWriter(tmp_path / JOURNAL_FILE, taken)
    with pytest.raises(TrainingError, match="taken over"):
        journal.append({"op": "tags", "values": {"long": "x" * 70_000}})
    assert journal.file.read_bytes() == b""
    os.close(journal.descriptor)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.data())
def test_wherever_a_journal_is_cut_its_whole_records_stay(texts: list[str], data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "journal.jsonl"
        writer = JournalWriter(file)
        for text in texts:
            writer.append({"op": "tags", "values": {"a": text}})
        writer.close()
        ends = [end for end, _ in JournalReader(file).read()]
        cut = data.draw(st.integers(0, ends[-1]))
        os.truncate(file, cut)
        writer = JournalWriter(file)
        assert writer.size == max([end for end in ends if end <= cut], default=0)
        writer.append({"op": "end"})
        writer.close()
        whole = sum(end <= cut for end in ends)
        assert [record.get("values", {}).get("a") for record in read_records(file)] == [*texts[:whole], None]


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL_FILE
    file.write_bytes(b'{"op":"one"}\n\0\0\0\0\n[1]\n{"op":"two"}\n')
    assert [record["op"] for record in read_records(file)] == ["one", "two"]


RECORDS = [
    {"op": "open", "id": "a", "time": 1, "name": "n", "experiment": None, "tags": {"k": "v"}, "online": True,
     "host": "h"},
    {"op": "params", "values": {"a": "1"}},
    {"op": "metrics", "step": 3, "time": 5, "values": {"loss": 0.5, "count": 2, "nan": float("nan")}},
    {"op": "known", "step": 3, "time": 5, "values": {}},
    {"op": "artifact", "file": "a.txt", "folder": ""},
    {"op": "input", "name": "d", "digest": "ab", "source": "s", "profile": {"rows": 3}},
    {"op": "model", "folder": "model", "task": "mmoe", "predictor": "mmoe.predict", "inputs": None, "example": ["a"],
     "outputs": {"p": "double"}},
    {"op": "finish", "status": "KILLED", "time": 1},
]  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(record=st.sampled_from(RECORDS), data=st.data())
def test_records_are_complete(record: dict[str, Any], data: st.DataObject) -> None:
    """A record without a field, or with a wrong value, is skipped; readers accept every other one."""
    assert parse_record(json.dumps(record).encode())
    field = data.draw(st.sampled_from([name for name in record if name not in ("op", "example")]))
    rest = {name: value for name, value in record.items() if name != field}
    assert parse_record(json.dumps(rest).encode()) is None
    odd = parse_record(json.dumps(rest | {field: data.draw(JSON)}).encode())
    if odd is not None:
        LoggedPoints().add_record(odd)
        doctor.Journal(RunFolder(Path())).add(odd)
        assert all(map(math.isfinite, (odd.get("step", 0), odd.get("time", 0))))
    if field in ("values", "tags", "outputs", "profile"):
        assert parse_record(json.dumps(rest | {field: ["a"]}).encode()) is None


@given(text=st.text(max_size=30) | st.sampled_from(["[" * 100_000, '{"op":["metrics"]}', '{"op":"new"}', "1e999"]))
def test_no_line_of_a_journal_is_an_error(text: str) -> None:
    record = parse_record(text.encode())
    assert record is None or isinstance(record["op"], str)


class Disk:
    """A disk with room for some bytes of journals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.write = room, journals.write_at
        monkeypatch.setattr(journals, "write_at", self)

    def __call__(self, descriptor: int, data: bytes, position: int) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(descriptor, data[: self.room], position)
        self.room -= written
        return written


@given(room=st.integers(0, 200), count=st.integers(1, 10))
def test_a_full_disk_leaves_whole_records(room: int, count: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        writer = JournalWriter(Path(folder) / "journal.jsonl")
        disk = Disk(patch, room)
        for number in range(count):
            writer.append({"op": "one", "number": number})
        size = len(b'{"op":"one","number":0}\n')
        if room < count * size:
            with pytest.raises(TrainingError, match="No space left on device"):
                writer.flush()
        else:
            writer.flush()
        assert [record["number"] for record in read_records(writer.file)] == list(range(min(count, room // size)))
        assert writer.file.stat().st_size == writer.size == min(count, room // size) * size
        disk.room = 10_000  # somebody made room
        writer.append({"op": "one", "number": count})
        writer.close()
        assert [record["number"] for record in read_records(writer.file)] == list(range(count + 1))
