"""Files that are hashed while they are written, and on the disk when they are done."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple


class Entry(NamedTuple):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


class HashedStream:
    """A stream that hashes what is written to it.

    The first error is kept for `write_hashed` to raise: `torch.save` would put an error of its own in its place.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.size = stream, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self.digest.update(data)
                self.stream.write(data)
                self.size += len(data)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: `write_hashed` flushes once, at the end."""


def write_hashed(file: Path, write: Callable[[HashedStream], object]) -> Entry:
    """Create the file, let `write` fill it, and sync it to the disk.

    Raises:
        OSError: the disk does not take it.
    """
    with file.open("wb") as stream:
        hashed = HashedStream(stream)
        write(hashed)
        if hashed.error is not None:
            raise hashed.error
        stream.flush()
        os.fsync(stream.fileno())
    return Entry(hashed.size, hashed.digest.hexdigest())


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
