"""Train the shared prefix of several runs once, and start each run from its end.

Such a run is bitwise identical to the same run trained alone; its history includes the points of the prefix.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.names import PREFIX_FILES
from pipeline.runtime.console import Console
from pipeline.storage.checkpoint_format import read_checkpoint, write_checkpoint
from pipeline.storage.folders import made_once
from pipeline.tasks.base import Task
from pipeline.tracking.run import MemoryRun
from pipeline.training.loop import Training

POINTS_FILE = PREFIX_FILES[0]


def train_prefix(task: Task[Any], folders: Mapping[int, Path], device: str) -> int:
    """Train the shared prefix, and save its state at the given steps; returns the number of trained steps.

    folders: number of completed steps -> folder for the state at that step.

    Raises:
        NonFiniteError: a loss became NaN or infinite.
        UserError: a folder cannot be written.
    """
    run = MemoryRun()
    try:
        training = Training(task, run, Console(0, quiet=True), device)
        for step, folder in sorted(folders.items()):
            training.advance(step)
            made_once(folder, PREFIX_FILES, lambda empty: _save(training, run, empty), "output_dir")
        return training.result.steps
    finally:
        run.discard()


def start_from_prefix(training: Training, folder: Path) -> None:
    """Load the state of a shared prefix into a new training, and log the prefix's points in its run.

    `Task.scheduled_values`, such as the weight of a loss that is not active yet, are replaced by this run's own.
    """
    with (folder / POINTS_FILE).open(encoding="utf-8") as lines:
        for line in lines:
            step, time_ms, values = json.loads(line)
            if "global_step" in values:
                values |= {
                    name: value for name, value in training.task.scheduled_values(step).items() if name in values
                }
            training.run.log_metrics(step, values, time_ms)
    training.restore(read_checkpoint(folder))


def _save(training: Training, run: MemoryRun, folder: Path) -> None:
    state = training.state()  # logs the buffered steps
    with (folder / POINTS_FILE).open("w", encoding="utf-8", newline="\n") as lines:
        for (step, values), time_ms in zip(run.points, run.times, strict=True):
            lines.write(json.dumps([step, time_ms, values]) + "\n")
    write_checkpoint(folder, state, training.result.steps, links=training.files())
