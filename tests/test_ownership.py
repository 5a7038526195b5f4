"""A run's folder has one owner: processes that are killed, stopped and forked, and hosts that are only played."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import ownership
from pipeline.errors import TrainingError, UserError
from pipeline.ownership import LEASE_FILE, LOCK_FILE, NUMBER_FILE, Ownership, alive_owner, owner_number

HOST = socket.gethostname()

# Owns the folder; then a line on standard input asks for something, and its end for the release.
OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from pipeline.errors import TrainingError
from pipeline.ownership import Ownership

owner = Ownership(Path(sys.argv[1]))
print(owner.number, flush=True)
for line in sys.stdin:
    if line == "check\\n":
        try:
            owner.check()
            print("ours", flush=True)
        except TrainingError as error:
            print(error, flush=True)
    if line == "beats\\n":
        print(owner._thread.is_alive(), flush=True)
    if line == "fork\\n":
        child = os.fork()
        if not child:
            owner.release()  # it is not the child's to give up
            print(os.getpid(), flush=True)
            time.sleep(3600)
            os._exit(0)
    if line == "exec\\n":
        print(subprocess.Popen(["sleep", "3600"], close_fds=False).pid, flush=True)
owner.release()
"""


@contextmanager
def owner_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert line_of(process) == "1"
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str], request: str = "") -> str:
    assert process.stdin
    assert process.stdout
    if request:
        process.stdin.write(f"{request}\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def lease_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / LEASE_FILE).read_bytes())
    return found


def write_foreign(folder: Path, number: int, beat: int, **values: Any) -> None:
    """A lease as another host would write it."""
    lease = {"host": "elsewhere", "boot": "b007", "pid": 77, "number": number, "beat": beat, "released": False}
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "lease.new"
    work.write_text(json.dumps(lease | values))
    work.replace(folder / LEASE_FILE)


class Clock:
    """The time that passes for `pipeline.ownership`: in its pauses alone, and at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}  # what happens then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for moment in [moment for moment in self.at if moment <= self.now]:
            self.at.pop(moment)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ownership, "time", clock)
    return clock


@pytest.fixture
def quick_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.2)


@pytest.fixture
def quick_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "5eed"


def test_the_waits_make_up_what_is_promised() -> None:
    """A refusal within 5 s, and no take-over of an owner that has missed a few beats."""
    assert max(ownership.LOCK_SECONDS, ownership.WATCH_SECONDS) < 5
    assert ownership.WATCH_SECONDS >= 4 * ownership.BEAT_SECONDS


def test_a_second_process_is_refused_until_the_first_gives_up(folder: Path, quick_lock: None) -> None:
    with owner_process(folder) as process:
        for number in (signal.SIGCONT, signal.SIGSTOP):  # at work, and standing still
            os.kill(process.pid, number)
            with pytest.raises(UserError, match=rf"^run 5eed is alive: process {process.pid} on {HOST} .*$") as refused:
                Ownership(folder)
            assert type(refused.value) is UserError  # exit code 2: usage, not training
            assert alive_owner(folder) == f"process {process.pid} on {HOST}"
        assert owner_number(folder) == 1
        os.kill(process.pid, signal.SIGCONT)
        assert line_of(process, "check") == "ours"
        process.communicate()  # the end of its standard input: it releases
        owner = Ownership(folder)
        assert owner.number == 2
        owner.release()


def test_a_second_owner_in_the_same_process_is_refused_and_leaves_no_handle(folder: Path, quick_lock: None) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    owner, before = Ownership(folder), handles()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Ownership(folder)
    owner.check()  # the attempt took nothing from it
    alive_owner(folder)
    assert handles() == before
    owner.release()
    assert handles() == max(0, before - 1)


@pytest.mark.parametrize("child", ["", "fork", "exec"])
def test_a_killed_owner_leaves_the_folder_at_once(folder: Path, child: str, clock: Clock) -> None:
    """Even where it has started a process that lives on."""
    with owner_process(folder) as process:
        pid = int(line_of(process, child)) if child else 0  # a forked one has tried to release by now
        try:
            assert not lease_of(folder)["released"]
            assert alive_owner(folder) == f"process {process.pid} on {HOST}"
            process.kill()
            process.wait()
            if pid:
                os.kill(pid, 0)  # it lives
            clock.now = 0.0
            assert alive_owner(folder) is None
            owner = Ownership(folder)
        finally:
            if pid:
                os.kill(pid, signal.SIGKILL)
        assert clock.now == 0  # nothing was watched or waited for
        assert lease_of(folder) | {"beat": 0} == {
            "host": HOST, "boot": ownership._here()[1], "pid": os.getpid(), "number": 2, "beat": 0, "released": False,
        }  # fmt: skip
        owner.release()


# Asks for the owner again and again, until its standard input closes.
ASKER = """
import select, sys
from pathlib import Path
from pipeline import ownership
from pipeline.ownership import alive_owner

ownership.ASK_SECONDS = 300
print("ready", flush=True)
told = set()
while not select.select([sys.stdin], [], [], 0.003)[0]:
    told.add(alive_owner(Path(sys.argv[1])))
print(told, flush=True)
"""


def test_processes_that_only_ask_are_no_owner_to_each_other_and_keep_none_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ASK_SECONDS", "LOCK_SECONDS"):  # an asker that has the lock may have to wait for a core
        monkeypatch.setattr(ownership, name, 300)
    Ownership(folder).release()
    askers = [
        subprocess.Popen([sys.executable, "-c", ASKER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
        for _ in range(2)
    ]  # fmt: skip
    try:
        for asker in askers:
            assert line_of(asker) == "ready"
        assert {alive_owner(folder) for _ in range(200)} == {None}
        owner = Ownership(folder)
        owner.check()
        owner.release()
        for asker in askers:
            told = asker.communicate(timeout=300)[0].strip()
            assert set(told.strip("{}").replace("'", "").split(", ")) <= {"None", f"process {os.getpid()} on {HOST}"}
    finally:
        for asker in askers:
            asker.kill()


# --- other hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lease", [b"", None], ids=["garbage at first", "a lease"])
def test_an_owner_on_another_host_that_beats_is_refused(folder: Path, clock: Clock, lease: bytes | None) -> None:
    write_foreign(folder, number=4, beat=0)
    if lease is not None:
        (folder / LEASE_FILE).write_bytes(lease)
    clock.at[3.5] = lambda: write_foreign(folder, number=4, beat=1)
    with pytest.raises(UserError, match=r"^run 5eed is alive: process 77 on elsewhere "):
        Ownership(folder)
    assert clock.now < 3.7
    clock.at[7.0] = lambda: write_foreign(folder, number=4, beat=2)
    assert alive_owner(folder) == "process 77 on elsewhere"
    assert owner_number(folder) == 4


@pytest.mark.parametrize(
    ("lease", "seconds"),
    [
        ({}, ownership.WATCH_SECONDS + ownership.SETTLE_SECONDS),
        ({"host": HOST}, ownership.WATCH_SECONDS + ownership.SETTLE_SECONDS),  # the name is ours, the kernel another
        ({"released": True}, ownership.SETTLE_SECONDS),
    ],
    ids=["another host", "this host before it was started anew", "one that said good-bye"],
)
def test_a_lease_of_another_host_that_stands_still_is_taken_over(
    folder: Path, clock: Clock, lease: dict[str, Any], seconds: float
) -> None:
    write_foreign(folder, number=4, beat=9, **lease)
    assert owner_number(folder) == 4
    owner = Ownership(folder)
    assert clock.now == pytest.approx(seconds, abs=0.2)  # not before the lease had the time to beat
    assert owner.number == owner_number(folder) == 5
    owner.check()
    owner.release()


def test_a_stopped_owner_learns_that_it_was_taken_over(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owner_process(folder) as process:
        assert line_of(process, "check") == "ours"
        os.kill(process.pid, signal.SIGSTOP)
        (folder / LOCK_FILE).unlink()  # a lock that does not reach the other host
        monkeypatch.setattr(ownership, "_here", lambda: ("elsewhere", "b007"))
        owner = Ownership(folder)
        assert owner.number == 2
        os.kill(process.pid, signal.SIGCONT)
        told = line_of(process, "check")
        assert told == f"run 5eed was taken over by process {os.getpid()} on elsewhere; process {process.pid} ends here"
        wait_for(lambda: line_of(process, "beats") == "False")
        process.communicate()  # nor does its release write
        assert (lease_of(folder)["number"], lease_of(folder)["released"]) == (2, False)
        owner.check()
        owner.release()


def test_a_late_renewal_of_an_older_owner_takes_nothing(folder: Path, quick_beat: None) -> None:
    Ownership(folder).release()
    owner = Ownership(folder)
    write_foreign(folder, number=1, beat=5)  # an older owner was stopped between its look and its write
    owner.check()
    assert owner_number(folder) == 2
    wait_for(lambda: lease_of(folder)["number"] == 2)
    owner.release()


def test_an_equal_number_of_somebody_else_is_a_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 3600)
    owner = Ownership(folder)
    write_foreign(folder, number=1, beat=5)
    with pytest.raises(TrainingError, match="taken over by process 77 on elsewhere"):
        owner.check()
    owner.release()
    assert lease_of(folder)["host"] == "elsewhere"


def test_the_number_alone_tells_the_loss_where_the_lease_is_gone(folder: Path) -> None:
    owner = Ownership(folder)
    (folder / LEASE_FILE).unlink()
    owner.check()
    (folder / NUMBER_FILE).write_text("2")
    with pytest.raises(TrainingError, match="taken over by another process"):
        owner.check()
    owner.release()


def test_one_of_several_hosts_gets_a_lease_that_stands_still(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have watched it before one takes it, and all have taken it before one looks again."""
    count = 4
    together, names = threading.Barrier(count, timeout=300), threading.local()

    class InStep:
        def sleep(self, _: float) -> None:
            together.wait()

    def watched(*_: object) -> None:
        together.wait()

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # a lock that does not reach the others
    monkeypatch.setattr(ownership, "_here", lambda: getattr(names, "here", (HOST, "")))
    monkeypatch.setattr(ownership, "_beating", watched)
    monkeypatch.setattr(ownership, "time", InStep())
    write_foreign(folder, number=7, beat=1)
    owners, refusals = list[Ownership](), list[str]()

    def take(host: int) -> None:
        names.here = (f"host{host}", str(host))
        try:
            owners.append(Ownership(folder))
        except UserError as refused:
            refusals.append(str(refused))

    hosts = [threading.Thread(target=take, args=(host,)) for host in range(count)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert len(refusals) == count - 1, refusals
    assert all(text.startswith("run 5eed is alive: process ") for text in refusals)
    (owner,) = owners
    owner.check()
    assert owner.number == owner_number(folder) >= 8
    owner.release()


@pytest.mark.parametrize("garbage", [b"", b"[]", b'{"pid": 1}'])
def test_garbage_for_a_lease_is_taken_over(folder: Path, clock: Clock, garbage: bytes) -> None:
    for _ in range(3):
        Ownership(folder).release()
    (folder / LEASE_FILE).write_bytes(garbage)
    assert alive_owner(folder) is None
    assert owner_number(folder) == 3
    owner = Ownership(folder)
    assert owner.number == 4  # grows even so
    owner.release()


def some(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly of this kind."""
    return kind | kind | kind | kind | st.sampled_from([None, True, 1, 1.5, "1", []])


leases = st.binary() | st.fixed_dictionaries(
    {"host": some(st.text()), "boot": some(st.text()), "pid": some(st.integers()), "number": some(st.integers())},
    optional={"beat": some(st.integers()), "released": some(st.booleans()), "other": st.none()},
).map(lambda lease: json.dumps(lease).encode())


@given(leases)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_for_a_lease_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LEASE_FILE).write_bytes(content)
    number = owner_number(tmp_path)
    try:
        lease = json.loads(content)
    except ValueError:
        lease = None
    complete = (
        isinstance(lease, dict)
        and {"host", "boot", "pid", "number"} <= lease.keys() <= {"host", "boot", "pid", "number", "beat", "released"}
        and all(isinstance(lease[key], str) for key in ("host", "boot"))
        and all(type(lease.get(key, 0)) is int for key in ("pid", "number", "beat"))
        and isinstance(lease.get("released", False), bool)
    )
    assert number == (max(0, lease["number"]) if complete else 0)


def test_release_can_be_repeated(folder: Path) -> None:
    owner = Ownership(folder)
    owner.release()
    owner.release()
    assert lease_of(folder)["released"]
    assert alive_owner(folder) is None
    following = Ownership(folder)
    owner.release()  # the number of its lock's handle may be another's now
    assert alive_owner(folder) == f"process {os.getpid()} on {HOST}"
    assert following.number == 2
    following.release()


# --- the beat --------------------------------------------------------------------------------------------------------


def test_the_beat_goes_on_after_a_folder_that_was_away_and_a_full_disk(
    folder: Path, quick_beat: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Ownership(folder)

    def rises(before: int) -> None:
        wait_for(lambda: lease_of(folder)["beat"] > before + 1)

    rises(0)
    refused, write = list[OSError](), ownership._write

    def noted(*given: Any) -> None:
        try:
            write(*given)
        except OSError as error:
            refused.append(error)
            raise

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ownership, "_write", noted)
    away = folder.with_name("away")
    folder.rename(away)
    wait_for(lambda: len(refused) > 1)
    owner.check()  # nobody has taken it
    away.rename(folder)
    rises(lease_of(folder)["beat"])
    refused.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ownership.json, "dumps", full)
        wait_for(lambda: len(refused) > 1)
    assert list(folder.glob(".*")) == []
    rises(lease_of(folder)["beat"])
    owner.release()


def test_rest_of_a_killed_write_is_cleared(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (LEASE_FILE, NUMBER_FILE):
        (folder / f".{name}.{HOST}.{ownership._here()[1]}").write_text("{")
    owner = Ownership(folder)
    owner.release()
    assert {entry.name for entry in folder.iterdir()} == {LOCK_FILE, NUMBER_FILE, LEASE_FILE}


def test_asking_makes_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert alive_owner(missing) is None
    assert owner_number(missing) == 0
    assert list(tmp_path.iterdir()) == []
    missing.mkdir()
    assert alive_owner(missing) is None
    assert list(missing.iterdir()) == []


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run folder .*file/run: Not a directory$"):
        Ownership(tmp_path / "file" / "run")


def test_file_system_without_locks_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else 0
    with pytest.raises(UserError, match=r"^run folder .*5eed: No locks available$"):
        Ownership(folder)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_owning_needs_neither_mlflow_nor_torch() -> None:
    code = "import pipeline.ownership, sys; print({'mlflow', 'torch', 'pandas'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
