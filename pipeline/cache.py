"""Folders that are made once and kept."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import UserError


def made_once(folder: Path, files: Sequence[str], make: Callable[[Path], object], key: str) -> Path:
    """`folder`, filled by `make` (which gets an empty one) unless all `files` are there: whole or not at all.

    Several processes may ask at once, if `make` writes the same for all of them. `key` is the config key that names
    the parent folder.

    Raises:
        UserError: the parent folder cannot be written.
    """

    def whole() -> bool:
        return all((folder / file).exists() for file in files)

    if whole():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{key} {folder.parent}: {error.strerror or error}") from None
    try:
        make(work)
        work.chmod(0o755)  # temporary folders are closed to others
        if folder.exists() and not whole():
            shutil.rmtree(folder)  # what is left of a damaged one
        try:
            work.rename(folder)
        except OSError:
            if not whole():  # else another process was first, with the same data
                raise
    except OSError as error:
        raise UserError(f"{key} {folder.parent}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
