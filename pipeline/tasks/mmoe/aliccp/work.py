"""The work folder of a preparation: what is done stays there until all is done, whatever ends the process."""

import fcntl
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError, os_errors
from pipeline.interrupts import Interrupted
from pipeline.storage.files import replacing, sync

FOLDER = ".prepare_ctr"
_PROGRESS, _LOCK = "progress.npz", "lock"

Arrays = Mapping[str, npt.NDArray[Any]]


class Kept(NamedTuple):
    """Progress as an earlier process left it; no facts = none."""

    facts: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


class Work:
    """Spills, and the progress that belongs to them: facts (JSON) and arrays, replaced at once or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, identity: str) -> "Kept":
        """What an earlier process kept of the same task; nothing, and an empty folder, if there is none."""
        try:
            with np.load(self.folder / _PROGRESS, allow_pickle=False) as kept:
                arrays = {name: kept[name] for name in kept.files}
            facts: dict[str, Any] = json.loads(arrays.pop("facts").tobytes())
            if facts["identity"] == identity and all(
                (self.folder / name).stat().st_size >= size for name, size in facts["spills"].items()
            ):
                return Kept(facts, arrays)
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
        ):  # none, or one that a power cut has spoilt
            pass
        for file in self.folder.iterdir():
            if file.name != _LOCK:
                file.unlink()
        return Kept({}, {})

    def save(self, facts: dict[str, Any], arrays: Arrays) -> None:
        """Keep these. `facts["spills"]`: file name -> bytes that are valid; they are on disk before the progress is."""
        for name in facts["spills"]:
            sync(self.folder / name)
        text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        with replacing(self.folder / _PROGRESS, durable=True) as work, work.open("wb") as stream:
            np.savez(stream, facts=text, **arrays)  # type: ignore[arg-type]


@contextmanager
def work_in(output_dir: Path) -> Iterator[Work]:
    """The work folder inside of `output_dir`, for one process at a time.

    It is gone at the end, and after an error that would come again; what was interrupted, or had no space left,
    can be started again and goes on.

    Raises:
        UserError: the folder cannot be written, or another process is at work in it.
    """
    folder = output_dir / FOLDER
    made = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    if folder.exists():
        made = [output_dir]  # by an earlier process
    with os_errors(f"output_dir {output_dir}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"output_dir {output_dir}: another prepare_ctr is at work there") from None
        try:
            yield Work(folder)
        except (OSError, Interrupted, KeyboardInterrupt) as error:
            if not isinstance(error, OSError):
                raise
            kept = f"what is done is kept in {folder}: start again to go on"
            raise UserError(f"output_dir {output_dir}: {error.strerror or error}; {kept}") from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for path in made:
                with suppress(OSError):
                    path.rmdir()
            raise
        shutil.rmtree(folder, ignore_errors=True)
