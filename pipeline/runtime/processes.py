"""Child processes that receive requests and send replies, one message per line (`pipeline.runtime.protocol`).

Requests are written to the child's standard input, and replies are read from its standard output. Closing its standard
input asks the child to exit.
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
    """Marks the end of a child's replies."""

    code: int  # exit code; negative: number of the signal


class ChildProcess(Generic[R]):
    """A child process that runs `python -m module`."""

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
        """Start the process without waiting for it.

        Args:
            replies: types of its replies.
            inbox: receives this object with each reply, and finally with `Ended`.
            log: file to which its standard error is appended; None: use this process's standard error.
            own_session: start a new session, which Ctrl-C does not reach.
        """
        self.log = log
        with log.open("ab") if log else contextlib.nullcontext() as stream:
            self._process = start(module, environment, stream, own_session)
        threading.Thread(target=self._read, args=(replies, inbox), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative: number of the signal), or None while the process runs."""
        return self._process.poll()

    def send(self, request: Any) -> None:
        """Send a message; it is lost if the process has ended."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(encode(request))
            self._process.stdin.flush()

    def end_input(self) -> None:
        """Close its standard input, which asks it to exit."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self, seconds: float | None = None) -> None:
        """Ask the process to exit and wait for it; kill it after this many seconds (None: never)."""
        self.end_input()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.end_input()

    def _read(self, replies: tuple[type[R], ...], inbox: "Queue[tuple[ChildProcess[R], R | Ended]]") -> None:
        assert self._process.stdout
        try:
            with self._process.stdout as lines:
                for reply in read_messages(lines, replies):
                    inbox.put((self, reply))
        except MessageError:  # output of another program or version
            traceback.print_exc()
            self._process.kill()
        finally:
            inbox.put((self, Ended(self._process.wait())))


def start(module: str, environment: Mapping[str, str], stderr: Any, own_session: bool) -> "subprocess.Popen[str]":
    """Start `python -m module` with pipes for its standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
        env=environment,
        start_new_session=own_session,
    )


def take_standard_output() -> Callable[[Any], None]:
    """In a child: reserve standard output for replies, and redirect prints to standard error.

    Returns the function that sends a reply; replies are lost if the parent has exited.
    """
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            stream.write(encode(message))
            stream.flush()

    return reply
