"""A run's folder has one owner, among killed, stopped and forked processes and (simulated) other hosts."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import TrainingError, UserError
from pipeline.storage import ownership
from pipeline.storage.ownership import LOCK_FILE, OWNER_FILE, Ownership, live_owner, owner_number

HOST = socket.gethostname()

# Owns the folder; executes commands from standard input, and releases the folder at its end.
OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from pipeline.errors import TrainingError
from pipeline.storage.ownership import Ownership

owner = Ownership(Path(sys.argv[1])).take()
print(owner.number, flush=True)
for line in sys.stdin:
    if line == "check\\n":
        try:
            owner.check()
            print("ours", flush=True)
        except TrainingError as error:
            print(error, flush=True)
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


@pytest.fixture
def quick_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "5eed"


def test_a_second_process_is_refused_until_the_first_gives_up(folder: Path, quick_lock: None) -> None:
    with owner_process(folder) as process:
        for number in (signal.SIGCONT, signal.SIGSTOP):  # at work, and standing still
            os.kill(process.pid, number)
            with pytest.raises(UserError, match=rf"^run 5eed is in use by process {process.pid} on {HOST};") as refused:
                Ownership(folder)
            assert type(refused.value) is UserError  # exit code 2: usage, not training
            assert live_owner(folder) == f"process {process.pid} on {HOST}"
        assert owner_number(folder) == 1
        os.kill(process.pid, signal.SIGCONT)
        assert line_of(process, "check") == "ours"
        process.communicate()  # the end of its standard input: it releases
        owner = Ownership(folder).take()
        assert owner.number == 2
        owner.release()


def test_a_second_owner_in_the_same_process_is_refused_and_leaves_no_handle(folder: Path, quick_lock: None) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    owner, before = Ownership(folder).take(), handles()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Ownership(folder)
    owner.check()  # the attempt took nothing from it
    live_owner(folder)
    assert handles() == before
    owner.release()
    assert handles() == max(0, before - 1)


@pytest.mark.parametrize("child", ["", "fork", "exec"])
def test_a_killed_owner_leaves_the_folder_at_once(folder: Path, child: str) -> None:
    """Even if a child of it lives on."""
    with owner_process(folder) as process:
        pid = int(line_of(process, child)) if child else 0  # a forked one has tried to release by now
        try:
            assert live_owner(folder) == f"process {process.pid} on {HOST}"
            process.kill()
            process.wait()
            if pid:
                os.kill(pid, 0)  # it lives
            assert live_owner(folder) is None
            owner = Ownership(folder).take()
        finally:
            if pid:
                os.kill(pid, signal.SIGKILL)
        assert json.loads((folder / OWNER_FILE).read_text()) == {"host": HOST, "pid": os.getpid(), "number": 2}
        owner.release()


# Calls live_owner again and again, until its standard input closes.
ASKER = """
import select, sys
from pathlib import Path
from pipeline.storage import ownership
from pipeline.storage.ownership import live_owner

ownership.ASK_SECONDS = 300
owners = {live_owner(Path(sys.argv[1]))}  # at least once, however busy the machine is
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.003)[0]:
    owners.add(live_owner(Path(sys.argv[1])))
print(owners, flush=True)
"""


def test_live_owner_calls_do_not_disturb_each_other_or_an_owner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASK_SECONDS", "LOCK_SECONDS"):  # an asker that has the lock may have to wait for a core
        monkeypatch.setattr(ownership, name, 300)
    Ownership(folder).take().release()
    askers = [
        subprocess.Popen([sys.executable, "-c", ASKER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
        for _ in range(2)
    ]  # fmt: skip
    try:
        for asker in askers:
            assert line_of(asker) == "ready"
        assert {live_owner(folder) for _ in range(200)} == {None}
        owner = Ownership(folder).take()
        owner.check()
        owner.release()
        for asker in askers:
            output = asker.communicate()[0].strip()
            assert set(output.strip("{}").replace("'", "").split(", ")) <= {"None", f"process {os.getpid()} on {HOST}"}
    finally:
        for asker in askers:
            asker.kill()


# --- other hosts -----------------------------------------------------------------------------------------------------


def test_a_stopped_owner_learns_that_it_was_taken_over(folder: Path) -> None:
    with owner_process(folder) as process:
        assert line_of(process, "check") == "ours"
        os.kill(process.pid, signal.SIGSTOP)
        (folder / LOCK_FILE).unlink()  # a lock that does not reach the other host
        owner = Ownership(folder)
        os.kill(process.pid, signal.SIGCONT)
        assert line_of(process, "check") == "ours"  # to have the lock takes nothing yet: the store is asked first
        assert owner.take().number == 2
        output = f"run 5eed was taken over by process {os.getpid()} on {HOST}; process {process.pid} ends here"
        assert line_of(process, "check") == output
        owner.check()
        owner.release()


@given(numbers=st.tuples(st.integers(1, 3), st.integers(1, 3)), hosts=st.permutations([HOST, "elsewhere", "a"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_of_two_owners_one_goes_on(
    tmp_path: Path,
    numbers: tuple[int, int],
    hosts: list[str],
) -> None:
    """The one with the higher number; with equal numbers, both agree on one."""
    owners = []
    for number, host in zip(numbers, hosts, strict=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ownership.socket, "gethostname", lambda host=host: host)
            owner = Ownership(tmp_path / host)
            owner.take()
            owner.number = number
            owners.append((owner, host, json.dumps({"host": host, "pid": os.getpid(), "number": number})))
    ended = []
    for (owner, host, _), (_, _, other) in zip(owners, reversed(owners), strict=True):
        (owner.folder / OWNER_FILE).write_text(other)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ownership.socket, "gethostname", lambda host=host: host)
            try:
                owner.check()
            except TrainingError:
                ended.append(owner.number)
        owner.release()
    assert ended == [min(numbers)]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"host": 1, "pid": 2, "number": 3}', b'{"number": 7}', b"\xff"]
)
def test_garbage_for_an_owner_is_none(folder: Path, content: bytes) -> None:
    owner = Ownership(folder).take()
    (folder / OWNER_FILE).write_bytes(content)
    owner.check()
    assert owner_number(folder) == 0
    owner.release()


def test_release_can_be_repeated(folder: Path) -> None:
    owner = Ownership(folder).take()
    owner.release()
    owner.release()
    assert live_owner(folder) is None
    following = Ownership(folder).take()
    owner.release()  # the number of its lock's handle may be another's now
    assert live_owner(folder) == f"process {os.getpid()} on {HOST}"
    assert following.number == 2
    following.release()


def test_asking_makes_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert live_owner(missing) is None
    assert owner_number(missing) == 0
    assert list(tmp_path.iterdir()) == []
    missing.mkdir()
    assert live_owner(missing) is None
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
