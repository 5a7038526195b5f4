"""A run's folder has one owner: processes that are killed, stopped and forked, and hosts that are only played."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
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
    if line == "fork\\n":
        child = os.fork()
        if not child:
            owner.release()  # it is not the child's to give up
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
    if line == "exec\\n":
        print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
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


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 0.6)


@pytest.fixture
def quick_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.2)


@pytest.fixture
def quick_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "5eed"


def test_second_process_is_refused_within_five_seconds(folder: Path) -> None:
    with owner_process(folder) as process:
        started = time.monotonic()
        with pytest.raises(UserError, match=rf"^run 5eed is alive: process {process.pid} on {HOST} ") as refused:
            Ownership(folder)
        assert time.monotonic() - started < 5
        assert "\n" not in str(refused.value)
        assert type(refused.value) is UserError  # exit code 2: usage, not training
        assert alive_owner(folder) == f"process {process.pid} on {HOST}"
        assert owner_number(folder) == 1
        process.communicate()  # the end of its standard input: it releases
        owner = Ownership(folder)
        assert owner.number == 2
        owner.release()


def test_second_owner_in_the_same_process_is_refused(folder: Path, quick_lock: None) -> None:
    owner = Ownership(folder)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Ownership(folder)
    owner.check()  # the attempt took nothing from it
    owner.release()


def test_killed_owner_leaves_the_folder_at_once(folder: Path) -> None:
    with owner_process(folder) as process:
        process.kill()
        process.wait()
        started = time.monotonic()
        assert alive_owner(folder) is None
        owner = Ownership(folder)
        assert time.monotonic() - started < 3
        assert owner.number == 2
        assert lease_of(folder) | {"beat": 0} == {
            "host": HOST, "boot": ownership._here()[1], "pid": os.getpid(), "number": 2, "beat": 0, "released": False,
        }  # fmt: skip
        owner.release()


@pytest.mark.parametrize("kind", ["fork", "exec"])
def test_children_do_not_keep_the_folder_of_a_killed_owner(folder: Path, kind: str) -> None:
    with owner_process(folder) as process:
        child = int(line_of(process, kind))
        time.sleep(0.3)  # the forked one has tried to release by now
        try:
            assert not lease_of(folder)["released"]
            assert alive_owner(folder) == f"process {process.pid} on {HOST}"
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            started = time.monotonic()
            owner = Ownership(folder)
            assert time.monotonic() - started < 3
            owner.release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_stopped_owner_keeps_the_folder(folder: Path, quick_lock: None) -> None:
    with owner_process(folder) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match=rf"^run 5eed is alive: process {process.pid} on {HOST} "):
            Ownership(folder)
        assert alive_owner(folder) == f"process {process.pid} on {HOST}"
        os.kill(process.pid, signal.SIGCONT)
        assert line_of(process, "check") == "ours"


# Asks for the owner again and again, until its standard input closes.
ASKER = """
import select, sys
from pathlib import Path
from pipeline.ownership import alive_owner

print("ready", flush=True)
told = set()
while not select.select([sys.stdin], [], [], 0.003)[0]:
    told.add(alive_owner(Path(sys.argv[1])))
print(told, flush=True)
"""


def test_processes_that_only_ask_are_no_owner_to_each_other_and_keep_none_away(folder: Path) -> None:
    Ownership(folder).release()
    askers = [
        subprocess.Popen([sys.executable, "-c", ASKER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
        for _ in range(3)
    ]  # fmt: skip
    try:
        for asker in askers:
            assert line_of(asker) == "ready"
        assert {alive_owner(folder) for _ in range(200)} == {None}
        owner = Ownership(folder)
        owner.check()
        owner.release()
        for asker in askers:
            told = asker.communicate(timeout=60)[0].strip()
            assert set(told.strip("{}").replace("'", "").split(", ")) <= {"None", f"process {os.getpid()} on {HOST}"}
    finally:
        for asker in askers:
            asker.kill()


def test_owner_on_another_host_that_beats_is_refused(folder: Path) -> None:
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(1.0):
            count += 1
            write_foreign(folder, number=4, beat=count)

    write_foreign(folder, number=4, beat=0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        started = time.monotonic()
        with pytest.raises(UserError, match="run 5eed is alive: process 77 on elsewhere "):
            Ownership(folder)
        assert time.monotonic() - started < 5
        assert alive_owner(folder) == "process 77 on elsewhere"
        assert owner_number(folder) == 4
    finally:
        ended.set()
        thread.join()


def test_lease_of_another_host_that_stands_still_is_taken_over(folder: Path) -> None:
    write_foreign(folder, number=4, beat=9)
    assert owner_number(folder) == 4
    started = time.monotonic()
    owner = Ownership(folder)
    assert 4 <= time.monotonic() - started < 8  # not before the lease had the time to beat
    assert owner.number == owner_number(folder) == 5
    owner.check()
    owner.release()


def test_lease_of_this_host_before_it_was_started_anew_is_watched(folder: Path, short_watch: None) -> None:
    write_foreign(folder, number=4, beat=9, host=HOST)  # the name is ours, the kernel another
    started = time.monotonic()
    owner = Ownership(folder)
    assert time.monotonic() - started >= 0.6
    assert owner.number == 5
    owner.release()


def test_lease_of_another_host_that_said_good_bye_needs_no_watch(folder: Path) -> None:
    write_foreign(folder, number=4, beat=9, released=True)
    started = time.monotonic()
    assert alive_owner(folder) is None
    owner = Ownership(folder)
    assert time.monotonic() - started < 2
    assert owner.number == 5
    owner.release()


def test_stopped_owner_learns_that_it_was_taken_over(
    folder: Path, short_watch: None, monkeypatch: pytest.MonkeyPatch
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
        time.sleep(2.5)  # it does not beat, nor does its release write
        process.communicate()
        assert (lease_of(folder)["number"], lease_of(folder)["released"]) == (2, False)
        owner.check()
        owner.release()


def test_late_renewal_of_an_older_owner_takes_nothing(folder: Path, quick_beat: None) -> None:
    Ownership(folder).release()
    owner = Ownership(folder)
    write_foreign(folder, number=1, beat=5)  # an older owner was stopped between its look and its write
    owner.check()
    assert owner_number(folder) == 2
    time.sleep(0.5)
    assert lease_of(folder)["number"] == 2
    owner.release()


def test_equal_number_of_somebody_else_is_a_loss(folder: Path, quick_beat: None) -> None:
    owner = Ownership(folder)
    write_foreign(folder, number=1, beat=5)
    with pytest.raises(TrainingError, match="taken over by process 77 on elsewhere"):
        owner.check()
    time.sleep(0.5)
    assert lease_of(folder)["host"] == "elsewhere"
    owner.release()
    assert lease_of(folder)["host"] == "elsewhere"


def test_number_alone_tells_the_loss_where_the_lease_is_gone(folder: Path) -> None:
    owner = Ownership(folder)
    (folder / LEASE_FILE).unlink()
    owner.check()
    (folder / NUMBER_FILE).write_text("2")
    with pytest.raises(TrainingError, match="taken over by another process"):
        owner.check()
    owner.release()


# Takes a lease that stands still, on a host of its own, where the lock does not reach.
CONTENDER = """
import fcntl, sys, time
from pathlib import Path
from pipeline import ownership
from pipeline.errors import UserError

fcntl.flock = lambda *_: None
ownership._here = lambda: (f"host{sys.argv[2]}", sys.argv[2])
ownership.SETTLE_SECONDS = 2.0
print("ready", flush=True)
end = float(sys.stdin.readline())
ownership._beating = lambda *_: time.sleep(max(0, end - time.monotonic()))  # all have watched, and see nothing
try:
    owner = ownership.Ownership(Path(sys.argv[1]))
    print("owner", owner.number, flush=True)
    time.sleep(2)
    owner.check()
except UserError as error:
    print("refused", error, flush=True)
"""


def test_one_of_several_hosts_gets_a_lease_that_stands_still(folder: Path) -> None:
    write_foreign(folder, number=7, beat=1)
    hosts = [
        subprocess.Popen([sys.executable, "-c", CONTENDER, str(folder), str(number)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]  # fmt: skip
    for host in hosts:
        assert line_of(host) == "ready"
    end = time.monotonic() + 0.5
    for host in hosts:
        assert host.stdin
        host.stdin.write(f"{end}\n")
        host.stdin.flush()
    told = [host.communicate(timeout=30)[0].strip() for host in hosts]
    assert sum(text.startswith("refused run 5eed is alive: process ") for text in told) == 3, told
    [winner] = [text for text in told if not text.startswith("refused")]
    assert winner == f"owner {owner_number(folder)}"
    assert owner_number(folder) >= 8


@pytest.mark.parametrize("garbage", [b"", b"[]", b'{"pid": 1}'])
def test_garbage_for_a_lease_is_taken_over(folder: Path, short_watch: None, garbage: bytes) -> None:
    for _ in range(3):
        Ownership(folder).release()
    (folder / LEASE_FILE).write_bytes(garbage)
    assert alive_owner(folder) is None
    assert owner_number(folder) == 3
    owner = Ownership(folder)
    assert owner.number == 4  # grows even so
    owner.release()


def test_garbage_that_turns_into_a_beating_lease_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / LEASE_FILE).write_bytes(b"")
    timer = threading.Timer(1.0, write_foreign, (folder, 3, 1))
    timer.start()
    with pytest.raises(UserError, match="process 77 on elsewhere"):
        Ownership(folder)
    timer.join()


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


def test_beat_goes_on_after_a_folder_that_was_away(folder: Path, quick_beat: None) -> None:
    owner = Ownership(folder)
    away = folder.with_name("away")
    folder.rename(away)
    time.sleep(0.7)
    owner.check()  # nobody has taken it
    away.rename(folder)
    before = lease_of(folder)["beat"]
    time.sleep(0.7)
    assert lease_of(folder)["beat"] > before
    owner.release()


def test_beat_goes_on_after_a_full_disk(folder: Path, quick_beat: None, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Ownership(folder)
    calls = []

    def full(*_: object) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ownership.json, "dumps", full)
        time.sleep(0.7)
    assert len(calls) >= 2
    before = lease_of(folder)["beat"]
    assert [entry.name for entry in folder.glob(".*")] == []
    time.sleep(2.2)
    assert lease_of(folder)["beat"] > before
    owner.release()


def test_beat_rises_every_second(folder: Path) -> None:
    owner = Ownership(folder)
    time.sleep(3.5)
    assert 2 <= lease_of(folder)["beat"] <= 4
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


def test_a_refusal_leaves_no_handle(folder: Path, quick_lock: None) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    owner = Ownership(folder)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError):
        Ownership(folder)
    alive_owner(folder)
    assert len(os.listdir("/proc/self/fd")) == before
    owner.release()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    shutil.rmtree(folder)


def test_owning_needs_neither_mlflow_nor_torch() -> None:
    code = "import pipeline.ownership, sys; print({'mlflow', 'torch', 'pandas'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
