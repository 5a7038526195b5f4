"""Folders whose files appear all at once or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import UserError, os_errors


def made_once(folder: Path, files: Sequence[str], make: Callable[[Path], object], key: str) -> Path:
    """Create `folder` unless it is complete, and return it. Safe in parallel if `make` is deterministic.

    Args:
        files: names of the files that a complete folder has.
        make: writes the files into an empty folder.
        key: config key of the parent folder, for error messages.

    Raises:
        UserError: the parent folder cannot be written.
    """

    def is_complete() -> bool:
        return all((folder / file).exists() for file in files)

    if is_complete():
        return folder
    with os_errors(f"{key} {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(work)
            work.chmod(0o755)  # other users cannot read folders of `mkdtemp`
            if folder.exists() and not is_complete():
                shutil.rmtree(folder)
            try:
                work.rename(folder)
            except OSError:
                if not is_complete():  # otherwise another process has written the same files
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


@contextmanager
def published(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """Yield a work folder inside `folder`; at the end, move its `files` up in this order. An error changes nothing.

    Raises:
        UserError: the folder (config key output_dir) cannot be written, or another process is writing there.
    """
    with os_errors(f"output_dir {folder}"):
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        work, lock = folder / ".work", FileLock(folder / ".work.lock", blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"output_dir {folder}: another process is writing there") from None
        try:
            shutil.rmtree(work, ignore_errors=True)  # left by a killed process
            work.mkdir()
            yield work
            _move_up(work, folder, files)
            created = []
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # fails on Windows
                Path(lock.lock_file).unlink()
            lock.release()
            for path in created:
                with suppress(OSError):
                    path.rmdir()


def _move_up(work: Path, folder: Path, files: Sequence[str]) -> None:
    """Move the old files away in reverse order, then the new ones into place; on an error, restore the old files."""
    old = work / "old"
    old.mkdir()
    try:
        for name in reversed(files):
            if (folder / name).exists():
                os.replace(folder / name, old / name)
        for name in files:
            os.replace(work / name, folder / name)
    except BaseException:
        for name in files:
            if not (work / name).exists():
                os.replace(folder / name, work / name)
            if (old / name).exists():
                os.replace(old / name, folder / name)
        raise
