"""Requests to end: Ctrl-C, a scheduler's signal, the death of `mlflow run`. They come as one exception.

Kubernetes sends SIGTERM, Slurm SIGTERM or what its `--signal` names (SIGUSR1, SIGUSR2), a terminal that closes SIGHUP.
`mlflow run` passes none of them on, so a process that it started watches its parent.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

SIGNALS = tuple(signal.Signals[f"SIG{name}"] for name in ("INT", "TERM", "HUP", "USR1", "USR2", "XCPU"))
WATCH_SECONDS = 0.5  # how often the parent is looked for

_holds = 0  # blocks of `held` that are being run
_told: list[int] = []  # the signals that came
_raised = False


class Interrupted(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block the first signal raises `Interrupted` in the main thread; later ones change nothing.

    What the caller has told to ignore (nohup: SIGHUP) stays ignored.
    """
    global _raised  # noqa: PLW0603 (signals are the process')
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _told.clear()
    _raised = False
    before = {number: signal.signal(number, _note) for number in SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}  # fmt: skip
    over = threading.Event()
    if "MLFLOW_RUN_ID" in os.environ:  # `mlflow run` is the parent
        threading.Thread(target=_watch_parent, args=(os.getppid(), over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        _told.clear()


@contextmanager
def held() -> Iterator[None]:
    """A block that a request to end does not cut in two: it is raised once the block is done."""
    global _holds  # noqa: PLW0603
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
    _raise_once()


def ending() -> None:
    """Raise what was asked so far; what is asked from now on changes nothing, since the process ends of an error."""
    global _raised
    first, _raised = not _raised, True
    if _told and first:
        raise Interrupted(_told[0])


def check() -> None:
    """Raise what came and was lost: Python drops what is raised in a finalizer."""
    if _told:
        raise Interrupted(_told[0])


def next_of(waiting: "Queue[T]") -> T:
    """The next item of a queue; a request to end interrupts the wait, whichever thread has got the signal."""
    while True:
        check()
        try:
            return waiting.get(timeout=WATCH_SECONDS)
        except Empty:
            continue


def _note(number: int, _: FrameType | None) -> None:
    _told.append(number)
    _raise_once()


def _raise_once() -> None:
    global _raised  # noqa: PLW0603
    if _told and not _raised and not _holds:
        _raised = True
        raise Interrupted(_told[0])


def _watch_parent(parent: int, over: threading.Event) -> None:
    while not over.wait(WATCH_SECONDS):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return
