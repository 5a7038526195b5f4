"""When a run's checkpoints are saved, and what stands in them beside the training's state."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.run_config import CheckpointConfig
from pipeline.errors import TrainingError
from pipeline.names import CHECKPOINT_MEGABYTES, CHECKPOINT_SECONDS
from pipeline.runtime.interrupts import held
from pipeline.storage.checkpoints import Checkpoints
from pipeline.tracking.mlflow_run import MlflowRun

SHARE = 0.05  # of the training time that saving may cost, where the config leaves it to us
SHORTEST_SECONDS = 10  # between two saves then
FIRST_SECONDS = 0.5  # what the first save is expected to cost


class Saver:
    """Saves a training's checkpoints as its config says."""

    def __init__(
        self,
        run: MlflowRun | None,
        config: CheckpointConfig | None = None,
        facts: Mapping[str, Any] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """`run`: None = no checkpoints. `facts`: what a checkpoint is known by. `files`: the data, which must stay."""
        self.run, self.config, self.facts = run, config or CheckpointConfig(), dict(facts or {})
        self.data = {file: _signature(file) for file in files}
        self.checkpoints: Checkpoints | None = None
        if run is not None and self.config.enabled:
            limit = None if self.config.max_gb is None else int(self.config.max_gb * 1e9)
            self.checkpoints = Checkpoints(run.folder, self.config.keep_steps, limit)
        self.saved_at, self.seconds, self.last = 0, FIRST_SECONDS, time.monotonic()

    def is_due(self, step: int, best: int | None) -> bool:
        """Whether to save now that so many steps are completed; `best`: at which the best weights were found."""
        if self.checkpoints is None or step == self.saved_at:
            return False
        passed, config = time.monotonic() - self.last, self.config
        if step in config.keep_steps or (config.every_steps and step % config.every_steps == 0):
            return True
        if config.every_seconds and passed >= config.every_seconds:
            return True
        affordable = passed >= self.seconds / SHARE
        unasked = config.every_steps is None and config.every_seconds is None
        return affordable and (best == step or (unasked and passed >= SHORTEST_SECONDS))

    def save(
        self,
        step: int,
        best: int | None,
        state: Callable[[], Mapping[str, Any]],
        files: Callable[[], Mapping[str, Path]],
    ) -> float:
        """Save a training at a step, unless it was saved there; the seconds that it took.

        `best`: the step of the best weights. `state`, `files`: make what is saved; see `Checkpoints.save`.

        Raises:
            TrainingError: the disk is full, a data file changed, or another process has taken the run over; earlier
                checkpoints are as they were.
        """
        if self.checkpoints is None or self.run is None or step == self.saved_at:
            return 0.0
        self.check_data()
        with held():
            values = state()  # which logs what is in hand: the position comes after it
            facts = self.facts | {"position": self.run.position(), "threads": torch.get_num_threads()}
            saved = self.checkpoints.save(step, values, facts, files(), best)
            self.saved_at, self.seconds, self.last = step, saved.seconds, time.monotonic()
            measured = {CHECKPOINT_SECONDS: saved.seconds, CHECKPOINT_MEGABYTES: saved.bytes / 1e6}
            self.run.log_metrics(step, measured)
        return saved.seconds

    def check_data(self) -> None:
        """Refuse to go on where a data file is no longer the one that was read.

        Raises:
            TrainingError: names the file.
        """
        for file, before in self.data.items():
            if (now := _signature(file)) != before:
                what = "is gone" if now is None else "was changed"
                raise TrainingError(f"{file}: {what} while the run was training on it; what comes after would be of "
                                    "other data")  # fmt: skip


def _signature(file: Path) -> tuple[int, int] | None:
    """Size and time of change; None where it cannot be read."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
