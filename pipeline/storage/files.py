"""Files that are whole: replaced at once, hashed while they are written, on the disk when they are done."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple


class NotAFileError(OSError):
    """A path leads to a folder, a pipe or a device."""


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


@contextmanager
def replacing(file: Path, own: str = "", *, durable: bool = False) -> Iterator[Path]:
    """A hidden path beside the file, to write to: it gets the file's name at the end, and is gone after an error.

    Whoever opens the file finds the old one or the new one, whole. What a kill leaves, the next writer writes over.

    Args:
        own: sets a writer apart from others that may write the file at the same time.
        durable: a power cut, too, leaves the old one or the new one; else it may leave an empty one.
    """
    work = file.with_name(f".{file.name}.{own}" if own else f".{file.name}")
    try:
        work.unlink(missing_ok=True)  # a link there would lead the writer elsewhere
        yield work
        if durable:
            sync(work)
        work.replace(file)
    except BaseException:
        with suppress(OSError):
            work.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(file: Path) -> None:
    """See that a path leads to a file, before it is opened: a pipe would wait for its other end, for good.

    Raises:
        NotAFileError: it is a folder, a pipe or a device.
        OSError: there is nothing, or it cannot be asked about.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise NotAFileError(errno.EINVAL, "not a file", str(file))


def copy_contents(source: Path, target: Path) -> None:
    """Copy the files below a folder, without their modes: what is copied can be written and removed.

    Raises:
        OSError: something cannot be copied, or is no file.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_contents(path, target / path.name)
        else:
            check_file(path)
            shutil.copyfile(path, target / path.name)
