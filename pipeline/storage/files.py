"""Write files safely: replace them atomically, hash them while writing, sync them to the disk."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.errors import UserError
from pipeline.runtime.platform_support import replace_file, sync_path


class NotAFileError(OSError):
    """The path refers to a folder, a pipe or a device instead of a regular file."""


class Damaged(UserError):  # noqa: N818 (callers read it as an adjective)
    """A file of a run is missing or not as it was written; the message names the file and the difference."""


class Entry(NamedTuple):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


class HashedStream:
    """A stream that hashes the data written to it.

    It stores the first error, which `write_hashed` raises, because `torch.save` would replace it by its own error.
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


def file_sha256(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_hashed(file: Path, write: Callable[[HashedStream], object]) -> Entry:
    """Create the file, let `write` fill it, and sync it to the disk."""
    with file.open("wb") as stream:
        hashed = HashedStream(stream)
        write(hashed)
        if hashed.error is not None:
            raise hashed.error
        stream.flush()
        os.fsync(stream.fileno())
    return Entry(hashed.size, hashed.digest.hexdigest())


@contextmanager
def replacing(file: Path, suffix: str = "", *, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden path in the same folder. At the end it replaces the file; after an error it is removed.

    Readers see either the old file or the new one, never a partial file.

    Args:
        suffix: distinguishes writers that may write the file at the same time.
        durable: sync before replacing, so that a power cut cannot leave an empty file.
    """
    work = file.with_name(f".{file.name}.{suffix}" if suffix else f".{file.name}")
    try:
        work.unlink(missing_ok=True)  # left by a killed process; a symbolic link would redirect the write
        yield work
        if durable:
            sync_path(work)
        replace_file(work, file)
    except BaseException:
        with suppress(OSError):
            work.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def check_file(file: Path) -> None:
    """Check, before opening a path, that it is a regular file, since opening a pipe would block forever.

    Raises:
        NotAFileError: it is something else.
        OSError: it does not exist, or cannot be examined.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise NotAFileError(errno.EINVAL, "not a file", str(file))


def copy_contents(source: Path, target: Path) -> None:
    """Copy a folder recursively without file permissions, so that the copies can be changed and removed."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_contents(path, target / path.name)
        else:
            check_file(path)
            shutil.copyfile(path, target / path.name)
