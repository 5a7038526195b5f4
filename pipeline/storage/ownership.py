"""Who may write a run's folder: one process at a time.

A file lock says it, which the kernel takes from a process that dies; filelock closes it in a forked child (a loader's
worker), which would keep it otherwise. Every owner has a number above the one before, in a file: whoever works for an
older one stops before it writes. Where a lock does not reach, between hosts of some network file systems, the tracking
store says who writes: see `pipeline.tracking.opening`.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor, unlock_descriptor

from pipeline.errors import TrainingError, UserError, os_errors
from pipeline.storage.files import check_file, replacing

LOCK_FILE = "owner.lock"
OWNER_FILE = "owner.json"
LOCK_SECONDS = 2.0  # a process that was killed just now may take so long to let go
ASK_SECONDS = 2.0  # another process that only asks has the lock for a moment


@dataclass(frozen=True)
class Owner:
    """Who owns a folder, or did last."""

    host: str
    pid: int
    number: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Ownership:
    """The right to write a run's folder: one process at a time, by a lock that a dead process cannot hold."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder, which is made if need be; `take` makes it ours.

        Raises:
            UserError: another process has it (told within 2 s), or the folder cannot be written or locked.
        """
        self.folder, self.number, self._pid = folder, 0, os.getpid()
        # of the process, whichever thread releases it; a file system without locks is an error, not a reason for less
        self._lock = FileLock(folder / LOCK_FILE, LOCK_SECONDS, thread_local=False, fallback_to_soft=False)
        with os_errors(f"run folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                told = f"run {folder.name} is alive: {_read(folder) or 'another process'} writes it"
                raise UserError(f"{told}; wait for its end, or end it first") from None

    def take(self) -> "Ownership":
        """Stop whoever works for an earlier owner.

        Raises:
            UserError: the folder cannot be written.
        """
        owner = Owner(socket.gethostname(), self._pid, owner_number(self.folder) + 1)
        with os_errors(f"run folder {self.folder}"), replacing(self.folder / OWNER_FILE, durable=True) as work:
            work.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        self.number = owner.number
        return self

    def check(self) -> None:
        """Raise a TrainingError if another process has taken the run over. Reads a small file."""
        owner = _read(self.folder)
        if owner and (owner.number, owner.host, owner.pid) > (self.number, socket.gethostname(), self._pid):
            raise TrainingError(f"run {self.folder.name} was taken over by {owner}; process {self._pid} ends here")

    def release(self) -> None:
        """Give the folder up. A second call, or one of a forked child, does nothing."""
        if os.getpid() == self._pid:
            self._lock.release()


def owner_number(folder: Path) -> int:
    """The number of the folder's newest owner; 0 = never owned."""
    owner = _read(folder)
    return owner.number if owner else 0


def alive_owner(folder: Path) -> str | None:
    """Who holds the folder now (`process 12 on host`), without taking it; None = nobody."""
    return str(_read(folder) or "another process") if _is_locked(folder / LOCK_FILE) else None


def _is_locked(file: Path) -> bool:
    """Whether a process has the lock; makes no file, as a `FileLock` would."""
    try:
        # NFS locks only what is open for writing; a folder that is another user's may still be asked about
        descriptor = os.open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
    except FileNotFoundError:
        return False
    end = time.monotonic() + ASK_SECONDS
    try:
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() > end:
                return True
            time.sleep(0.02)
        unlock_descriptor(descriptor)  # closing it would leave the lock to a child that was forked just now
        return False
    finally:
        os.close(descriptor)


def _read(folder: Path) -> Owner | None:
    """The owner that is named; None where there is none, or something else."""
    try:
        check_file(folder / OWNER_FILE)
        owner = Owner(**json.loads((folder / OWNER_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = (str, int, int)
    return owner if tuple(map(type, (owner.host, owner.pid, owner.number))) == kinds else None
