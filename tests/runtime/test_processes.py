"""A child process that exchanges messages, whatever it prints and however it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from conftest import ROOT, wait_for

from pipeline.runtime.processes import ChildProcess, Ended


@dataclass(frozen=True)
class Ask:
    what: str


@dataclass(frozen=True)
class Say:
    text: str


CHILD = """
import os, signal, subprocess, sys, time
from dataclasses import dataclass
from pipeline.runtime.processes import take_standard_output
from pipeline.runtime.protocol import read_messages

@dataclass(frozen=True)
class Ask:
    what: str

@dataclass(frozen=True)
class Say:
    text: str

@dataclass(frozen=True)
class Other:
    pass

reply = take_standard_output()
print("printed", flush=True)
os.write(1, b"written\\n")
subprocess.run(["echo", "echoed"])
for ask in read_messages(sys.stdin, (Ask,)):
    if ask.what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if ask.what == "stay":
        reply(Say("staying"))
        time.sleep(3600)
    reply(Other() if ask.what == "other" else Say(ask.what))
sys.exit(7)
"""


class Child:
    """The module above, running."""

    def __init__(self, folder: Path, own_session: bool = False) -> None:
        (folder / "talking_child.py").write_text(CHILD)
        self.inbox: Queue[tuple[ChildProcess[Say], Say | Ended]] = Queue()
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        self.process = ChildProcess("talking_child", (Say,), self.inbox, environment=environment,
                                    log=folder / "log", own_session=own_session)  # fmt: skip

    def next(self) -> Say | Ended:
        process, message = self.inbox.get(timeout=300)
        assert process is self.process
        return message

    def ask(self, what: str) -> Say | Ended:
        self.process.send(Ask(what))
        return self.next()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    (tmp_path / "log").write_text("of before\n")
    started = Child(tmp_path)
    yield started
    started.process.kill()


def test_replies_do_not_mix_with_what_it_prints(child: Child, tmp_path: Path) -> None:
    assert [child.ask(text) for text in ("one", "two\nlines")] == [Say("one"), Say("two\nlines")]
    child.process.close()
    assert child.next() == Ended(7)  # it saw the end of its input, and ended by itself
    assert child.process.poll() == 7
    assert (tmp_path / "log").read_text() == "of before\nprinted\nwritten\nechoed\n"


def test_the_end_of_a_child_is_its_last_message(child: Child) -> None:
    assert child.ask("die") == Ended(-signal.SIGKILL)
    child.process.send(Ask("nobody reads this"))
    child.process.close()
    assert child.inbox.empty()


def test_a_child_that_does_not_speak_the_protocol_is_ended(child: Child, capsys: pytest.CaptureFixture[str]) -> None:
    assert child.ask("other") == Ended(-signal.SIGKILL)
    assert "found message type 'Other', allowed: Say" in capsys.readouterr().err


def test_one_that_does_not_end_is_killed(child: Child) -> None:
    assert child.ask("stay") == Say("staying")
    child.process.close(0.1)
    assert child.next() == Ended(-signal.SIGKILL)


@pytest.mark.parametrize("own_session", [False, True])
def test_session_of_a_child(tmp_path: Path, own_session: bool) -> None:
    started = Child(tmp_path, own_session)
    assert (os.getsid(started.process.pid) == started.process.pid) == own_session
    started.process.close()


def test_a_child_ends_after_its_parent(tmp_path: Path) -> None:
    (tmp_path / "talking_child.py").write_text(CHILD)
    parent = """
import os, queue, signal
from pathlib import Path
from pipeline.runtime.processes import ChildProcess
child = ChildProcess("talking_child", (), queue.Queue(), environment=os.environ, log=Path("log"))
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", parent], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    pid = int(result.stdout)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or _state(pid) == "Z")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:  # it ended just now
        return "Z"
