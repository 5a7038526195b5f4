"""Ownership of a run's folder: only one process at a time may write it.

Ownership is a file lock, which the kernel releases when the process dies. filelock closes the lock file in forked
children (data loader workers), which would otherwise keep the lock. If a network file system does not share locks
between hosts, ownership is checked in the tracking store: see `pipeline.tracking.run_opening`.

Words used here and in `pipeline.tracking`:

- owner: the process that may write the run's folder: a trainer, or `sync`. It holds `owner.lock` and is named in
  `owner.json`.
- owner number: counts the owners of a folder, from 1. Each new owner writes its number to `owner.json`; processes that
  work for an earlier owner compare it with theirs and stop.
- claim: a unique text that each start of a run writes to the run's tag `owner` in the tracking store. It does across
  hosts what the owner number does in a folder.
- writer lock: `writer.lock` in the folder, held by the writer process that delivers the journal. A new owner's writer
  waits for it.
- taken over: a run is taken over when another process becomes its owner; the previous owner and its writer then stop.
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
LOCK_SECONDS = 2.0  # a killed process may take this long to release the lock
ASK_SECONDS = 2.0  # processes in `live_owner` hold the lock for a moment


@dataclass(frozen=True)
class Owner:
    """The current or last owner of a folder."""

    host: str
    pid: int
    number: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Ownership:
    """This process's ownership of a run's folder."""

    def __init__(self, folder: Path) -> None:
        """Create the folder if necessary, and lock it; `take` makes this process its owner.

        Raises:
            UserError: another process has the lock (after 2 s), or the folder cannot be written or locked.
        """
        self.folder, self.number, self._pid = folder, 0, os.getpid()
        # may be released by another thread; raises an error if the file system does not support locks
        self._lock = FileLock(folder / LOCK_FILE, LOCK_SECONDS, thread_local=False, fallback_to_soft=False)
        with os_errors(f"run folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise alive_error(folder.name, str(_read_owner(folder) or "another process")) from None

    def take(self) -> "Ownership":
        """Write this process as the folder's owner; processes that work for an earlier owner then stop.

        Raises:
            UserError: the folder cannot be written.
        """
        owner = Owner(socket.gethostname(), self._pid, owner_number(self.folder) + 1)
        with os_errors(f"run folder {self.folder}"), replacing(self.folder / OWNER_FILE, durable=True) as work:
            work.write_text(json.dumps(asdict(owner)), encoding="utf-8", newline="\n")
        self.number = owner.number
        return self

    def check(self) -> None:
        """Raise a TrainingError if the run was taken over, according to the owner file."""
        owner = _read_owner(self.folder)
        if owner and (owner.number, owner.host, owner.pid) > (self.number, socket.gethostname(), self._pid):
            raise TrainingError(f"run {self.folder.name} was taken over by {owner}; process {self._pid} ends here")

    def release(self) -> None:
        """Release the lock. A second call, or one in a forked child, does nothing."""
        if os.getpid() == self._pid:
            self._lock.release()


def owner_number(folder: Path) -> int:
    """The folder's current owner number; 0 if it never had an owner."""
    owner = _read_owner(folder)
    return owner.number if owner else 0


def live_owner(folder: Path) -> str | None:
    """The process that has locked the folder, as `process 12 on host`; None if there is none."""
    return str(_read_owner(folder) or "another process") if _is_locked(folder / LOCK_FILE) else None


def alive_error(run: str, owner: str) -> UserError:
    """The error raised on starting a run that another process is writing."""
    return UserError(f"run {run} is in use by {owner}; wait until it ends, or stop it")


def _is_locked(file: Path) -> bool:
    """Whether a process has the lock; does not create the file, unlike `FileLock`."""
    try:
        # NFS can lock only files that are open for writing; another user's folder may be read-only
        descriptor = os.open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
    except FileNotFoundError:
        return False
    end = time.monotonic() + ASK_SECONDS
    try:
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() > end:
                return True
            time.sleep(0.02)
        unlock_descriptor(descriptor)  # closing alone would leave the lock with a child forked just now
        return False
    finally:
        os.close(descriptor)


def _read_owner(folder: Path) -> Owner | None:
    try:
        check_file(folder / OWNER_FILE)
        owner = Owner(**json.loads((folder / OWNER_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return owner if (type(owner.host), type(owner.pid), type(owner.number)) == (str, int, int) else None
