"""Decide when to save a checkpoint, and save it."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.run_config import CheckpointConfig
from pipeline.errors import TrainingError
from pipeline.names import CHECKPOINT_MEGABYTES, CHECKPOINT_SECONDS
from pipeline.runtime.interrupts import deferred
from pipeline.storage.checkpoints import Checkpoints
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.mlflow_run import MlflowRun

SHARE = 0.05  # largest part of the training time that saving takes by default
SHORTEST_SECONDS = 10  # minimum time between two saves by default
FIRST_SECONDS = 0.5  # expected duration of the first save


class Saver:
    """Saves checkpoints according to the config section `checkpoint`."""

    def __init__(
        self,
        run: MlflowRun | None,
        config: CheckpointConfig | None = None,
        facts: Mapping[str, Any] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """run: None to save nothing. facts: stored in each checkpoint. files: data files, which must not change."""
        self.run, self.config, self.facts = run, config or CheckpointConfig(), dict(facts or {})
        self.data = {file: _signature(file) for file in files}
        self.checkpoints: Checkpoints | None = None
        if run is not None and self.config.enabled:
            limit = None if self.config.max_gb is None else int(self.config.max_gb * 1e9)
            self.checkpoints = RunFolder(run.folder).checkpoints(self.config.keep_steps, limit)
        self.saved_at, self.seconds, self.last = 0, FIRST_SECONDS, time.monotonic()

    def is_due(self, step: int, best: int | None) -> bool:
        """Whether to save after `step` completed steps; best: the step of the best weights."""
        if self.checkpoints is None or step == self.saved_at:
            return False
        passed, config = time.monotonic() - self.last, self.config
        if step in config.keep_steps or (config.every_steps and step % config.every_steps == 0):
            return True
        if config.every_seconds and passed >= config.every_seconds:
            return True
        affordable = passed >= self.seconds / SHARE
        by_default = config.every_steps is None and config.every_seconds is None
        return affordable and (best == step or (by_default and passed >= SHORTEST_SECONDS))

    def save(
        self,
        step: int,
        best: int | None,
        state: Callable[[], Mapping[str, Any]],
        files: Callable[[], Mapping[str, Path]],
    ) -> float:
        """Save a checkpoint, unless this step has one; returns the duration in seconds.

        best: the step of the best weights. state, files: return the state and the linked files of the checkpoint.

        Raises:
            TrainingError: the checkpoint does not fit, the disk fails, a data file changed, or another process has
                taken the run over. The newest intact checkpoint is kept.
        """
        if self.checkpoints is None or self.run is None or step == self.saved_at:
            return 0.0
        self.check_data()
        with deferred():
            values = state()  # before `position`, since it logs the buffered steps
            facts = self.facts | {"position": self.run.position(), "threads": torch.get_num_threads()}
            saved = self.checkpoints.save(step, values, facts, files(), best)
            self.saved_at, self.seconds, self.last = step, saved.seconds, time.monotonic()
            measured = {CHECKPOINT_SECONDS: saved.seconds, CHECKPOINT_MEGABYTES: saved.bytes / 1e6}
            self.run.log_metrics(step, measured)
        return saved.seconds

    def check_data(self) -> None:
        """Check that the data files have not changed since they were read.

        Raises:
            TrainingError: a file was changed or removed; the message names it.
        """
        for file, before in self.data.items():
            if (now := _signature(file)) != before:
                what = "is gone" if now is None else "was changed"
                raise TrainingError(f"{file}: {what} while the run was training on it; later steps would use "
                                    "different data")  # fmt: skip


def _signature(file: Path) -> tuple[int, int] | None:
    """Size and modification time; None if the file cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
