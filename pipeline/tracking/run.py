"""The interface that training logs to, and its implementation in memory."""

import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

Points = Mapping[str, float]

PATIENCE_SECONDS = 30.0  # for which the end of a run waits for a store that accepts nothing


def now_ms() -> int:
    """Milliseconds since the epoch, as in MLflow's timestamps."""
    return time.time_ns() // 1_000_000


class Run(Protocol):
    """A tracked run. Values are copied when they are logged; delivery may come later, in the same order."""

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
        """Make everything logged so far visible to the delivery."""

    def position(self) -> int:
        """Size of the journal in bytes, synced to the disk."""

    def resume_from(self, position: int) -> None:
        """Continue from a state that was saved at this position: points that were logged after it are kept once."""

    def history(self) -> Iterable[tuple[int, Points]]:
        """(step, metrics) of every call of `log_metrics` so far."""

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:
        """Deliver everything and end the run as FINISHED, FAILED or KILLED.

        patience: seconds without progress after which the rest stays in the journal; with `hurry`, seconds in total.

        Raises:
            Undelivered: the store is away; the message says how to deliver the rest later.
            TrainingError: the store refused something, or the journal could not be written.
        """


class MemoryRun:
    """A run that stays in this process: tracking is switched off, or tests."""

    def __init__(self, name: str = "untracked", folder: Path | None = None) -> None:
        self.id, self.name = "untracked", name
        self.folder = folder or Path(tempfile.mkdtemp(prefix="focal-pipeline-"))
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

    def resume_from(self, position: int) -> None:
        """Do nothing."""

    def history(self) -> Iterable[tuple[int, Points]]:
        return self.points

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:  # noqa: ARG002
        self.status = status

    def discard(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
