"""What only some operating systems have: signals, process groups, reads and writes at a position, synced folders.

Each function does the same on Linux and macOS. Where the system lacks something, as Windows does, it uses a portable
equivalent or does nothing (docs/systems.md). Except for `sys.platform`, the presence of a name decides.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# Flags of `os.open` for files of bytes: not inherited by other programs, not through a symbolic link.
BYTE_FILE = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"))
ATOMIC_BYTES: int = getattr(select, "PIPE_BUF", 512)  # bytes that a pipe accepts at once when it accepts any
REPLACE_SECONDS = 2.0  # how long to retry replacing a file that another process reads


def known_signals(*names: str) -> tuple[signal.Signals, ...]:
    """The signals of these names, without SIG, that the system has."""
    return tuple(getattr(signal, f"SIG{name}") for name in names if hasattr(signal, f"SIG{name}"))


def terminate_self() -> None:
    """Send this process SIGTERM, as from another process."""
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGTERM)  # os.kill would end the process at once
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_process_tree(process: "subprocess.Popen[Any]", seconds: float) -> None:
    """End a process that leads its own session, and the processes that it started; kill them after some seconds."""
    with suppress(ProcessLookupError):
        _signal_tree(process, "TERM")
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        _signal_tree(process, "KILL")
    process.wait()


def _signal_tree(process: "subprocess.Popen[Any]", name: str) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, getattr(signal, f"SIG{name}"))
    elif sys.platform == "win32":  # ends the processes at once
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    elif process.poll() is None:
        process.terminate() if name == "TERM" else process.kill()


def wait_writable(descriptor: int, seconds: float) -> bool:
    """Wait until a write does not block; False after `seconds`. Windows waits for sockets only: there, always True."""
    return sys.platform == "win32" or bool(select.select([], [descriptor], [], seconds)[1])


def read_at(descriptor: int, size: int, position: int) -> bytes:
    """Read at most `size` bytes from a position in a file."""
    if hasattr(os, "pread"):
        return bytes(os.pread(descriptor, size, position))
    os.lseek(descriptor, position, os.SEEK_SET)
    return os.read(descriptor, size)


def write_at(descriptor: int, data: bytes, position: int) -> int:
    """Write at a position in a file; returns the number of bytes written."""
    if hasattr(os, "pwrite"):
        return int(os.pwrite(descriptor, data, position))
    os.lseek(descriptor, position, os.SEEK_SET)
    return os.write(descriptor, data)


def sync_path(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk. Windows syncs no folders, and files open for writing."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(source: Path, target: Path) -> None:
    """Replace a file atomically. Windows refuses that while a process has the target open: there, retry for a while."""
    end = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > end:
                raise
            time.sleep(0.02)


def allow_closed_port(listener: socket.socket) -> None:
    """Let a socket bind to a port that was just closed. On Windows, where it always can, the option means any port."""
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
