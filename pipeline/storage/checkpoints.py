"""Save, find and remove the checkpoints of a run."""

import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError, UserError, os_errors
from pipeline.runtime.console import warn
from pipeline.runtime.platform_support import sync_path
from pipeline.storage.checkpoint_format import Checkpoint, read_checkpoint, read_manifest, verify, write_checkpoint
from pipeline.storage.files import Damaged
from pipeline.storage.state_file import state_bytes

SPARE_BYTES = 1 << 14  # allowance for the manifest, the folder and rounding of file sizes
NEW, OLD = ".new", ".old"  # suffixes of hidden folders that are being written or deleted
STEP_FOLDER = re.compile(r"\d{9,}")


@dataclass(frozen=True)
class Saved:
    """Size of a saved checkpoint, including linked files, and the duration of the save."""

    bytes: int
    seconds: float


class Checkpoints:
    """The checkpoints in `<run folder>/checkpoints/<step, 9 digits>/`. Only the run's owner may save."""

    def __init__(
        self, run_folder: Path, keep_steps: Collection[int] = (), max_bytes: int | None = None, last: int = 2
    ) -> None:
        """last: number of newest checkpoints to keep, beside `keep_steps`. max_bytes: limit on their total size."""
        self.folder = run_folder / "checkpoints"
        self.keep_steps, self.max_bytes, self.last = keep_steps, max_bytes, last

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        links: Mapping[str, Path],
        best: int | None,
    ) -> Saved:
        """Write the checkpoint of a step unless an intact one exists, then remove those that are no longer needed.

        The newest checkpoints, those of `keep_steps` and that of step `best` are kept.

        Raises:
            TrainingError: the checkpoint does not fit, or the disk fails; the newest intact one is kept.
        """
        started = time.perf_counter()
        with os_errors(f"checkpoint of step {step} in {self.folder}", TrainingError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.*"):  # left by a killed process
                if leftover.suffix in (NEW, OLD):
                    shutil.rmtree(leftover, ignore_errors=True)
            size = self._intact_size(step)
            if size is None:
                self._make_room(step, state, links, best)
                size = self._write(step, state, facts, links)
            self._prune(step, best)
        return Saved(size, time.perf_counter() - started)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, intact or not, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if STEP_FOLDER.fullmatch(entry.name))

    def latest(self) -> Checkpoint | None:
        """Read the newest intact checkpoint, and warn about newer damaged ones.

        Raises:
            UserError: the checkpoint has the format of another version; skipping it would silently restart the run.
        """
        checkpoint, damages = None, list[Damaged]()
        for step in reversed(self.steps()):
            try:
                checkpoint = self._read(step)
                break
            except Damaged as damage:
                damages.append(damage)
        instead = f"that of step {checkpoint.step} is used instead" if checkpoint else "no whole one is left"
        for each in damages:
            warn(f"damaged checkpoint: {each}; {instead}")
        return checkpoint

    def at(self, step: int) -> Checkpoint:
        """Read the checkpoint of this step.

        Raises:
            UserError: there is none (the message lists the steps that were kept), or it has the format of another
                version.
            Damaged: a file is missing or differs from the manifest.
        """
        steps = self.steps()
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder}: found no checkpoint of step {step}; kept: {kept}")
        return self._read(step)

    def check_format(self) -> None:
        """Check the format of every checkpoint, reading only the manifests.

        Raises:
            UserError: a checkpoint has the format of another version.
        """
        for step in self.steps():
            with suppress(Damaged):
                read_manifest(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:09d}"

    def _read(self, step: int) -> Checkpoint:
        checkpoint = read_checkpoint(self._path(step))
        if checkpoint.step != step:
            raise Damaged(f"{checkpoint.folder}: found step {checkpoint.step} in it")
        return checkpoint

    def _intact_size(self, step: int) -> int | None:
        """Size in bytes of the step's checkpoint; None if there is none, or it was damaged and is now removed."""
        if not self._path(step).exists():
            return None
        try:
            return verify(self._path(step)).size
        except Damaged as damage:
            warn(f"damaged checkpoint: {damage}; it is removed")
            self._remove(step)
            return None

    def _write(self, step: int, state: Mapping[str, Any], facts: Mapping[str, Any], links: Mapping[str, Path]) -> int:
        """Write to a hidden folder, then rename it once everything is on disk; returns the size in bytes."""
        work = self.folder / f".{step:09d}{NEW}"
        try:
            work.mkdir()
            size = write_checkpoint(work, state, step, facts, links)
            work.rename(self._path(step))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        sync_path(self.folder)
        return size

    def _make_room(self, step: int, state: Mapping[str, Any], links: Mapping[str, Path], best: int | None) -> None:
        """Remove earlier checkpoints, oldest first, until the new one fits.

        The newest intact one, the best one and those of `keep_steps` are never removed.

        Raises:
            TrainingError: the new checkpoint would not fit without them either; none is removed.
        """
        if self._shortage(step, state, links) is None:
            return
        earlier = [kept for kept in self.steps() if kept < step]
        while earlier and self._intact_size(earlier[-1]) is None:
            earlier.pop()
        removable = [kept for kept in earlier[:-1] if kept not in self.keep_steps and kept != best]
        if shortage := self._shortage(step, state, links, removable):
            raise TrainingError(shortage)
        while removable and self._shortage(step, state, links):
            self._remove(removable.pop(0))

    def _shortage(
        self, step: int, state: Mapping[str, Any], links: Mapping[str, Path], without: Collection[int] = ()
    ) -> str | None:
        """Return an error message if the checkpoint does not fit, even `without` these steps, otherwise None."""
        size = state_bytes(state) + SPARE_BYTES
        sources = [source.stat() for source in links.values()]
        copied = sum(stat.st_size for stat in sources if stat.st_dev != self.folder.stat().st_dev)
        gone = [self._path(each) for each in without]
        removed = Counter((stat.st_dev, stat.st_ino, stat.st_nlink, stat.st_size)
                          for folder in gone for stat in map(Path.stat, folder.iterdir()))  # fmt: skip
        freed = sum(length for (*_, names, length), count in removed.items() if names == count)  # no other link is left
        limits = {"the disk": (size + copied, shutil.disk_usage(self.folder).free + freed)}
        if self.max_bytes is not None:
            stats = [file.stat() for file in self.folder.glob("*/*") if file.parent not in gone]
            used = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}  # a file with several links counts once
            linked = sum(stat.st_size for stat in sources if (stat.st_dev, stat.st_ino) not in used)
            limits["checkpoint.max_gb"] = (size + linked, max(0, self.max_bytes - sum(used.values())))
        for limit, (needed, available) in limits.items():
            if needed > available:
                return (f"checkpoint of step {step} in {self.folder}: needs {needed:,} bytes, "
                        f"{limit} has {available:,} left")  # fmt: skip
        return None

    def _prune(self, step: int, best: int | None) -> None:
        """Remove checkpoints that are no longer needed.

        Those after `step` are removed too: they are damaged, or the run would have resumed from them.
        """
        steps = self.steps()
        needed = {*[kept for kept in steps if kept <= step][-self.last :], *self.keep_steps, best}
        for kept in steps:
            if kept not in needed:
                self._remove(kept)

    def _remove(self, step: int) -> None:
        """Delete a checkpoint; renamed first, so that a partly deleted folder is not taken for a checkpoint."""
        hidden = self.folder / f".{step:09d}{OLD}"
        self._path(step).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
