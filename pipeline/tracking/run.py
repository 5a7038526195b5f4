"""The interface of a tracked run, and an implementation in memory."""

import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

Points = Mapping[str, float]

PATIENCE_SECONDS = 30.0  # without progress, after which the delivery of a run's end gives up


def now_ms() -> int:
    """Current time in milliseconds since the epoch, as in MLflow's timestamps."""
    return time.time_ns() // 1_000_000


class Run(Protocol):
    """A tracked run. Logged values are copied; they may be delivered later, in the same order."""

    id: str
    name: str
    folder: Path  # the run's own files

    def log_params(self, params: Mapping[str, str]) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_metrics(self, step: int, metrics: Points, time_ms: int | None = None) -> None: ...

    def log_artifact(self, file: Path, folder: str = "") -> None: ...

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None: ...

    def log_model(self, export: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        """Make everything logged so far available for delivery."""

    def position(self) -> int:
        """Sync the journal to the disk; returns its size in bytes."""

    def check_position(self, position: int) -> None:
        """Note that training resumes from a state saved at this journal position; warn if the journal is shorter."""

    def history(self) -> Iterable[tuple[int, Points]]:
        """Step and metrics of every `log_metrics` call so far."""

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:
        """Deliver everything and end the run as FINISHED, FAILED or KILLED.

        patience: seconds without progress after which the rest stays in the journal; with `hurry`, seconds in total.

        Raises:
            Undelivered: the store is unreachable; the message says how to deliver the rest later.
            TrainingError: the store refused something, or the journal could not be written.
        """


class MemoryRun:
    """A run kept in memory, for training without tracking and for tests."""

    def __init__(self, name: str = "untracked", folder: Path | None = None) -> None:
        self.id, self.name = "untracked", name
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="focal-pipeline-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.points: list[tuple[int, dict[str, float]]] = []
        self.times: list[int] = []
        self.artifacts: list[str] = []
        self.models: list[Mapping[str, Any]] = []
        self.inputs: list[dict[str, Any]] = []
        self.status = "RUNNING"

    def log_params(self, params: Mapping[str, str]) -> None:
        self.params |= params

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def log_metrics(self, step: int, metrics: Points, time_ms: int | None = None) -> None:
        self.points.append((step, dict(metrics)))
        self.times.append(time_ms or now_ms())

    def log_artifact(self, file: Path, folder: str = "") -> None:
        self.artifacts.append(f"{folder}/{file.name}".lstrip("/"))

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        self.inputs.append({"name": name, "digest": digest, "source": source, "profile": profile})

    def log_model(self, export: Mapping[str, Any]) -> None:
        self.models.append(export)

    def flush(self) -> None:
        """Do nothing."""

    def position(self) -> int:
        return 0

    def check_position(self, position: int) -> None:
        """Do nothing."""

    def history(self) -> Iterable[tuple[int, Points]]:
        return self.points

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:  # noqa: ARG002
        self.status = status

    def discard(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
