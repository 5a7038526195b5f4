"""Who may write a run's folder: one process at a time.

On one host a file lock says it, which the kernel takes from a process that dies; filelock closes it in a forked child
(a loader's worker), which would keep it otherwise. Across hosts, where such a lock may not reach, a lease does: its
owner raises a beat in it every second, and a lease that stands still may be taken over. Every owner has a number above
the one before; whoever works for an older one (its writer process) stops.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor, unlock_descriptor

from pipeline.errors import TrainingError, UserError
from pipeline.storage.files import check_file, replacing

LOCK_FILE = "owner.lock"
NUMBER_FILE = "owner.number"
LEASE_FILE = "lease.json"
BEAT_SECONDS = 1.0
WATCH_SECONDS = 4.0  # a lease that stands still for so long is nobody's
SETTLE_SECONDS = 1.0  # after a take-over: whoever else took the lease at the same moment has written it by then
LOCK_SECONDS = 2.0  # a process that was killed just now may take so long to let go
ASK_SECONDS = 2.0  # another process that only asks has the lock for a moment


@dataclass(frozen=True)
class Lease:
    """Who owns a folder; equal but for `beat` and `released` as long as the owner is the same."""

    host: str
    boot: str  # the boot id of its kernel; "" where there is none
    pid: int
    number: int
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def owner(self) -> tuple[str, str, int, int]:
        return self.host, self.boot, self.pid, self.number

    @property
    def is_foreign(self) -> bool:
        """Given by another host, or by this one before it was started anew: the lock here may not say enough."""
        return (self.host, self.boot) != _here()


class Ownership:
    """The right to write a run's folder: one process at a time, on one host by a lock that a dead process cannot
    hold, across hosts by a lease."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which is made if need be.

        Raises:
            UserError: another process has it (told within 5 s), or the folder cannot be written or locked.
        """
        self.folder = folder
        # of the process, whichever thread releases it; a file system without locks is an error, not a reason for less
        self._lock = FileLock(folder / LOCK_FILE, LOCK_SECONDS, thread_local=False, fallback_to_soft=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._lease = _take(folder)
        except Timeout:
            raise _alive(folder, _read(folder)) from None
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise UserError(f"run folder {folder}: {error.strerror or error}") from None
            raise
        self.number = self._lease.number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name=f"lease of {folder.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise a TrainingError if another process has taken the run over. Reads two small files."""
        owner = self._successor()
        if owner is not None:
            raise TrainingError(f"run {self.folder.name} was taken over by {owner}; process {os.getpid()} ends here")

    def release(self) -> None:
        """Give the folder up; the next owner need not wait. A second call, or one of a forked child, does nothing."""
        if self._ended.is_set() or os.getpid() != self._lease.pid:
            return
        self._ended.set()
        self._thread.join(2 * BEAT_SECONDS)
        with contextlib.suppress(OSError):  # the lock tells it too; only another host has to watch the lease then
            if self._successor() is None:
                _write(self.folder, replace(self._lease, released=True))
        self._lock.release()

    def _successor(self) -> str | None:
        """Who has taken the folder over; None while it is ours. A lease that is not there or garbage is no owner."""
        lease = _read(self.folder)
        if lease is not None and lease.number >= self.number and lease.owner != self._lease.owner:
            return str(lease)
        return "another process" if _number(self.folder) > self.number else None

    def _keep_beating(self) -> None:
        """Renew the lease until the end, or until it is lost. A disk that is full or away is tried again."""
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self._successor() is not None:
                    return
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
                _write(self.folder, self._lease)


def owner_number(folder: Path) -> int:
    """The number of the folder's newest owner; 0 = never owned."""
    lease = _read(folder)
    return max(_number(folder), lease.number if lease else 0)


def alive_owner(folder: Path) -> str | None:
    """Who holds the folder now (`process 12 on host`), without taking it; None = nobody.

    Takes 4 s where the last owner was another host that did not say good-bye.
    """
    if _is_locked(folder / LOCK_FILE):
        return str(_read(folder) or "another process")
    beating = _beating(folder, _read(folder))
    return str(beating) if beating else None


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


def _take(folder: Path) -> Lease:
    """Our lease, written, with the next number; the lock is held."""
    last = _read(folder)
    beating = _beating(folder, last)
    if beating is not None:
        raise _alive(folder, beating)
    lease = Lease(*_here(), pid=os.getpid(), number=owner_number(folder) + 1)
    _write(folder, lease, sync=True)
    # in a file of its own, too, which no late renewal of an older owner can write over
    _replace(folder, NUMBER_FILE, str(lease.number), sync=True)
    if last is not None and last.is_foreign:
        time.sleep(SETTLE_SECONDS)
        now = _read(folder)
        if now is not None and now.owner != lease.owner and now.number >= lease.number:
            raise _alive(folder, now)
    return lease


def _beating(folder: Path, lease: Lease | None) -> Lease | None:
    """The owner on another host, if its beat is seen to change. Clocks of two hosts are never compared."""
    if lease is None and not (folder / LEASE_FILE).exists():
        return None
    if lease is not None and (lease.released or not lease.is_foreign):
        return None
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(0.1)
        now = _read(folder)
        if now is not None and now != lease:
            return None if now.released else now
    return None


def _alive(folder: Path, owner: Lease | None) -> UserError:
    told = f"run {folder.name} is alive: {owner or 'another process'} writes it"
    return UserError(f"{told}; wait for its end, or end it first")


def _here() -> tuple[str, str]:
    """This host's name and the boot id of its kernel."""
    return socket.gethostname(), boot_id()


def boot_id() -> str:
    """Names this start of the machine; empty where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _read(folder: Path) -> Lease | None:
    """The lease that is there; None where there is none, or something else."""
    try:
        check_file(folder / LEASE_FILE)
        values = json.loads((folder / LEASE_FILE).read_bytes())
        lease = Lease(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"host": str, "boot": str, "pid": int, "number": int, "beat": int, "released": bool}
    return lease if all(type(getattr(lease, name)) is kind for name, kind in kinds.items()) else None


def _write(folder: Path, lease: Lease, sync: bool = False) -> None:
    _replace(folder, LEASE_FILE, json.dumps(asdict(lease)), sync)


def _replace(folder: Path, name: str, text: str, sync: bool) -> None:
    """Write a file of the folder; another host may write it at the same time."""
    with replacing(folder / name, ".".join(_here()), durable=sync) as work:
        work.write_text(text, encoding="utf-8")


def _number(folder: Path) -> int:
    try:
        check_file(folder / NUMBER_FILE)
        return int((folder / NUMBER_FILE).read_bytes())
    except (OSError, ValueError):
        return 0
