"""Child processes that receive requests and send replies, a line each (`pipeline.runtime.protocol`).

Requests come on the child's standard input; its end asks the child to end. Replies have the child's standard output to
themselves.
"""

import contextlib
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Generic, TypeVar

from pipeline.runtime.protocol import MessageError, encode, read_messages

R = TypeVar("R")


@dataclass(frozen=True)
class Ended:
    """Stands after a child's last reply: it has ended."""

    code: int  # negative: the signal


class ChildProcess(Generic[R]):
    """`python -m module`, started by this process."""

    def __init__(
        self,
        module: str,
        replies: tuple[type[R], ...],
        inbox: "Queue[tuple[ChildProcess[R], R | Ended]]",
        *,
        environment: Mapping[str, str],
        log: Path | None = None,
        own_session: bool = False,
    ) -> None:
        """Start it; this returns at once.

        replies: the types that it may send. inbox: gets each reply, and `Ended` once, with this object. log: takes its
        standard error, behind what is there; None = that of this process. own_session: Ctrl-C does not reach it.
        """
        self.log = log
        with log.open("ab") if log else contextlib.nullcontext() as stream:
            self._process = start(module, environment, stream, own_session)
        threading.Thread(target=self._read, args=(replies, inbox), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def send(self, request: Any) -> None:
        """Send a message; one to a process that has ended is lost, and `Ended` says so."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(encode(request))
            self._process.stdin.flush()

    def end_input(self) -> None:
        """Ask it to end."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self, seconds: float | None = None) -> None:
        """Ask it to end and wait for that; after so many seconds it is killed. None: wait for as long as it takes."""
        self.end_input()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self.end_input()

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        return self._process.wait()

    def _read(self, replies: tuple[type[R], ...], inbox: "Queue[tuple[ChildProcess[R], R | Ended]]") -> None:
        assert self._process.stdout
        try:
            with self._process.stdout as lines:
                for reply in read_messages(lines, replies):
                    inbox.put((self, reply))
        except MessageError:  # not a process of ours, or of another version
            traceback.print_exc()
            self._process.kill()
        finally:
            inbox.put((self, Ended(self._process.wait())))


def start(module: str, environment: Mapping[str, str], stderr: Any, own_session: bool) -> "subprocess.Popen[str]":
    """Start `python -m module` with pipes: the one place where the writer and workers are started."""
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
        start_new_session=own_session,
    )


def take_standard_output() -> Callable[[Any], None]:
    """In a child: keep standard output for replies. What is printed goes to standard error from now on.

    Returns the function that sends a reply; one to a parent that is gone is lost.
    """
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            stream.write(encode(message))
            stream.flush()

    return reply
