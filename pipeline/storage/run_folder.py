"""A run's folder: the paths of its files, and the objects that read and write them."""

import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.storage.files import check_file, copy_contents, replacing
from pipeline.storage.journal import JOURNAL_FILE, Record, parse_record, read_opening
from pipeline.storage.ownership import Ownership

if TYPE_CHECKING:
    from pipeline.storage.checkpoints import Checkpoints

HISTORY_FILE = "history.parquet"
COPIES = "logged"  # subfolder for copies of files that were logged from elsewhere
TAIL_BYTES = 1 << 16  # end of a journal that is read to find its last record


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which may not exist yet.

    A journal names files by paths relative to the folder. Since a journal may come from an untrusted source, `file` and
    `folder` refuse paths that leave the folder.
    """

    path: Path

    @staticmethod
    def below(parent: Path) -> "Iterator[RunFolder]":
        """All run folders in `parent` that have a journal."""
        return (RunFolder(file.parent) for file in parent.glob(f"*/{JOURNAL_FILE}"))

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL_FILE

    @property
    def delivered(self) -> Path:
        """File with the delivery position of the journal in each store."""
        return self.path / "delivered.json"

    @property
    def writer_lock(self) -> Path:
        """Lock file of the writer process that delivers the journal."""
        return self.path / "writer.lock"

    @property
    def history(self) -> Path:
        return self.path / HISTORY_FILE

    def opening(self) -> Record | None:
        """The journal's first record `open`; None if there is none."""
        return read_opening(self.journal)

    def final_status(self) -> str | None:
        """The status in the journal's final record.

        None if that is not `finish` (the run goes on or was killed), or if the journal cannot be read.
        """
        try:
            check_file(self.journal)
            with self.journal.open("rb") as stream:
                stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
                last = parse_record(stream.read().rstrip(b"\n").rpartition(b"\n")[2])
        except OSError:
            return None
        return last["status"] if last and last["op"] == "finish" else None

    def checkpoints(self, keep_steps: Collection[int] = (), max_bytes: int | None = None) -> "Checkpoints":
        from pipeline.storage.checkpoints import Checkpoints  # imports torch, which takes seconds

        return Checkpoints(self.path, keep_steps, max_bytes)

    def lock(self) -> Ownership:
        """Lock the folder for this process; see `Ownership`."""
        return Ownership(self.path)

    def copy_in(self, source: Path, destination: str) -> str:
        """Relative path of a file or folder within the run's folder; if it lies elsewhere, it is copied in first.

        Raises:
            OSError: it cannot be copied, or is neither a file nor a folder.
        """
        root, resolved = self.path.resolve(), source.resolve()
        if resolved.is_relative_to(root) and resolved.name == source.name:
            return resolved.relative_to(root).as_posix()
        relative = f"{COPIES}/{destination}"
        copy = root / relative
        if resolved.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            copy_contents(resolved, copy)
        else:
            check_file(resolved)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as work:
                shutil.copyfile(resolved, work)
        return PurePosixPath(relative).as_posix()

    def file(self, name: str) -> Path:
        """The file with this relative path.

        Raises:
            ValueError: the path leaves the folder or follows a link, or it is not a file.
            OSError: it does not exist, or cannot be read.
        """
        return self._resolve(name, stat.S_ISREG, "not a file")

    def folder(self, name: str) -> Path:
        """The subfolder with this relative path, after checking that it contains only files and folders.

        Raises:
            ValueError: the path leaves the run's folder or follows a link, or the subfolder contains something else.
            OSError: it does not exist, or cannot be read.
        """
        folder = self._resolve(name, stat.S_ISDIR, "not a folder")
        for path in folder.rglob("*"):
            self._resolve(path.relative_to(self.path).as_posix(),
                          lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode), "not a file")  # fmt: skip
        return folder

    def _resolve(self, name: str, is_allowed: Callable[[int], bool], otherwise: str) -> Path:
        relative, path, mode = PurePosixPath(name), self.path, 0
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise ValueError(f"{name}: its path leaves the run's folder")
        for part in relative.parts:
            path /= part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ValueError(f"{name}: {part} is a symbolic link")
        if not is_allowed(mode):
            raise ValueError(f"{name}: {otherwise}")
        return path


def leaves_folder(name: str) -> bool:
    """Whether a path is absolute, leads out of its folder, or contains a backslash."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name
