"""Shared resources of the figures: a scratch folder with data, a tracking store and its writer process."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from bench import impressions
from bench.figures import ROOT, Timed, silence
from pipeline.config.strict_config import load
from pipeline.runtime.console import Console
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tasks.mmoe.task import MmoeTask
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.run import MemoryRun, Run
from pipeline.tracking.writer_client import Writer
from pipeline.training.loop import Training

ROWS = 1_000_000
STORE_FILE = "mlflow.db"


def reference_config(data: Path, overrides: Mapping[str, object] | None = None) -> MmoeConfig:
    """Config of bench/reference.yaml for the data, with the focal term from the first step on and no evaluation."""
    settings: dict[str, object] = {
        "data.path": data,
        "training.threads": 1,
        "training.num_train_epochs": 1000,
        "evaluation.every_steps": 10**9,
        "loss.aux_focal.warmup_steps": 0,
    }
    texts = {key: str(value) for key, value in (settings | dict(overrides or {})).items()}
    return load(MmoeConfig, ROOT / "bench/reference.yaml", texts)


class Trainer:
    """Training that advances in blocks of steps, with the loop and the output of `train_mmoe`."""

    def __init__(self, task: MmoeTask, run: Run) -> None:
        with silence():
            self.training = Training(task, run, Console(0), "cpu")
        self.batch_size = task.config.training.batch_size

    def advance(self, steps: int) -> tuple[float, float]:
        """Train further steps. Returns wall and CPU seconds of this process."""
        with silence():
            wall, cpu = time.perf_counter(), time.process_time()
            self.training.advance(until=self.training.result.steps + steps)
            self.training.recorder.drain()
            return time.perf_counter() - wall, time.process_time() - cpu

    def timed(self, steps: int) -> Timed:
        return Timed(lambda: self.advance(steps)[1], steps * self.batch_size)


class Workshop(contextlib.ExitStack):
    """Shared resources, which are released at the end. folder: keeps the generated data."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.store = f"sqlite:///{folder / STORE_FILE}"
        os.environ["MLFLOW_TRACKING_URI"] = self.store
        self.data = cache(self._data)
        self._task = cache(lambda: MmoeTask(reference_config(self.data())))
        self._writer = cache(lambda: self.enter_context(Writer()))

    def _data(self, rows: int = ROWS) -> Path:
        return impressions.prepared(self.folder, rows)

    def task(self, overrides: Mapping[str, object] | None = None) -> MmoeTask:
        """The reference task with other settings. The data are read only once."""
        return self._task().with_config(reference_config(self.data(), overrides))

    @contextlib.contextmanager
    def tracked(self, name: str) -> Iterator[MlflowRun]:
        """Open an MLflow run, which is finished at the end."""
        run = MlflowRun(self._writer(), RunRequest(name), self.folder / "runs")
        try:
            yield run
        finally:
            run.finish("FINISHED")

    def untracked(self) -> MemoryRun:
        return MemoryRun(folder=self.folder / "untracked")

    @property
    def writer_process(self) -> int:
        return self._writer().process.pid
