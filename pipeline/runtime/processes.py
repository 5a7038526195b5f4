"""Child processes that receive requests and send replies, one message per line (`pipeline.runtime.protocol`).

Requests go to the child's standard input, whose end asks it to exit; replies come from its standard output.
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
    """Follows a child's last reply."""

    code: int  # exit code; negative: the signal


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
        """Start it without waiting.

        Args:
            replies: types of its replies.
            inbox: gets this object with each reply, and with `Ended` once.
            log: its standard error is appended there; None: that of this process.
            own_session: Ctrl-C does not reach it.
        """
        self.log = log
        with log.open("ab") if log else contextlib.nullcontext() as stream:
            self._process = start(module, environment, stream, own_session)
        threading.Thread(target=self._read, args=(replies, inbox), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    def send(self, request: Any) -> None:
        """Send a message; it is lost if the process has ended."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(encode(request))
            self._process.stdin.flush()

    def end_input(self) -> None:
        """Ask it to exit."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self, seconds: float | None = None) -> None:
        """Ask it to exit and wait; kill it after these seconds, if any."""
        self.end_input()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
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
        except MessageError:  # another program, or another version
            traceback.print_exc()
            self._process.kill()
        finally:
            inbox.put((self, Ended(self._process.wait())))


def start(module: str, environment: Mapping[str, str], stderr: Any, own_session: bool) -> "subprocess.Popen[str]":
    """Start `python -m module` with pipes."""
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
    """In a child: reserve standard output for replies, and redirect prints to standard error.

    Returns the function that sends a reply; replies to a parent that is gone are lost.
    """
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            stream.write(encode(message))
            stream.flush()

    return reply
