"""Raise `Interrupted` when the process is asked to end: by Ctrl-C, a signal, or the exit of `mlflow run`.

Kubernetes sends SIGTERM; Slurm SIGTERM or the signal of `--signal` (SIGUSR1, SIGUSR2); a closed terminal SIGHUP;
Ctrl-Break on Windows SIGBREAK. `mlflow run` forwards none of them, so a process that it started watches its parent.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from types import FrameType
from typing import TypeVar

from pipeline.runtime.platform_support import known_signals, terminate_self

T = TypeVar("T")

SIGNALS = known_signals("INT", "TERM", "HUP", "USR1", "USR2", "XCPU", "BREAK")
WATCH_SECONDS = 0.5  # between two checks of the parent

_deferrals = 0  # number of active `deferred` blocks
_received: list[int] = []
_raised = False


class Interrupted(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, the first signal raises `Interrupted` in the main thread; later ones have no effect.

    Signals that the caller ignores (nohup: SIGHUP) stay ignored.
    """
    global _raised  # noqa: PLW0603 (signals belong to the process)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    _raised = False
    handlers = {number: signal.signal(number, _receive) for number in SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN}  # fmt: skip
    over = threading.Event()
    if "MLFLOW_RUN_ID" in os.environ:  # `mlflow run` is the parent
        threading.Thread(target=_watch_parent, args=(os.getppid(), over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _received.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """Defer interrupts to the end of the block."""
    global _deferrals  # noqa: PLW0603
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    _raise_once()


def raise_or_disable() -> None:
    """Raise `Interrupted` for a signal received so far; ignore later ones, since the process ends anyway."""
    global _raised
    first, _raised = not _raised, True
    if _received and first:
        raise Interrupted(_received[0])


def check() -> None:
    """Raise `Interrupted` again if a signal was received: Python drops exceptions raised in a finalizer."""
    if _received:
        raise Interrupted(_received[0])


def next_item(queue: "Queue[T]") -> T:
    """Wait for the next item of a queue; a signal ends the wait, even if another thread received it."""
    while True:
        check()
        try:
            return queue.get(timeout=WATCH_SECONDS)
        except Empty:
            continue


def _receive(number: int, _: FrameType | None) -> None:
    _received.append(number)
    _raise_once()


def _raise_once() -> None:
    global _raised  # noqa: PLW0603
    if _received and not _raised and not _deferrals:
        _raised = True
        raise Interrupted(_received[0])


def _watch_parent(parent: int, over: threading.Event) -> None:
    while not over.wait(WATCH_SECONDS):
        if os.getppid() != parent:
            terminate_self()
            return
