"""What training tells the world: a `Run`, in MLflow or in memory.

`MlflowRun` appends every call to the run's journal, and a writer process (`pipeline.tracking`) delivers the journal to
the tracking store in order, whole steps at a time. So training never waits for the store and never imports mlflow.
`MemoryRun` keeps the calls in lists: tracking switched off, and tests.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.blocks import TrackingSwitch
from pipeline.errors import TrainingError, UserError
from pipeline.journal import JOURNAL_FILE, JournalWriter, Record, read_all


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow's timestamps."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class RunRequest:
    """What a run is opened with."""

    name: str = ""
    experiment: str | None = None  # None = MLflow's own choice
    run_id: str | None = None  # a run that is there already (`mlflow run` opens one)
    launcher: str | None = None  # a run that only started this one
    tags: Mapping[str, str] = field(default_factory=dict)
    restart: bool = False  # `run_id` was begun before and starts over: points that are there are not written again


class Run(Protocol):
    """One tracked run. Values are fixed when they are given; delivery may come later, in the same order."""

    id: str
    name: str
    folder: Path  # the run's own files

    def log_params(self, params: Mapping[str, str]) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None: ...

    def log_artifact(self, file: Path, folder: str = "") -> None: ...

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None: ...

    def log_model(self, export: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        """Make what was logged visible to the delivery."""
        ...

    def history(self) -> Sequence[tuple[int, Mapping[str, float]]]:
        """(step, metrics) of every call of `log_metrics` so far."""
        ...

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED once all is delivered.

        Raises:
            TrainingError: something could not be delivered; the message says what, and where it lies.
        """
        ...


class MemoryRun:
    """A run that stays in this process."""

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

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        self.points.append((step, dict(metrics)))
        self.times.append(time_ms or now_ms())

    def log_artifact(self, file: Path, folder: str = "") -> None:
        self.artifacts.append(f"{folder}/{file.name}".lstrip("/"))

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        self.inputs.append({"name": name, "digest": digest, "source": source, "profile": profile})

    def log_model(self, export: Mapping[str, Any]) -> None:
        self.models.append(export)

    def flush(self) -> None:
        """Nothing waits."""

    def history(self) -> Sequence[tuple[int, Mapping[str, float]]]:
        return self.points

    def finish(self, status: str) -> None:
        self.status = status

    def discard(self) -> None:
        """Remove its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Writer:
    """The process that delivers to MLflow; it serves one run after the other.

    Starting it returns at once: mlflow is imported there while this process loads its data.
    """

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        environment |= {
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # we retry ourselves, without losing the order
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "GIT_PYTHON_REFRESH": "quiet",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer, which then ends the run in order
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it deliver what is left and end."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def ask(self, request: Record) -> Record:
        """Send a request, wait for its answer.

        Raises:
            UserError: the store refused it, or the process is gone.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise TrainingError(f"the tracking writer ended with code {self.process.wait()}")
        reply: Record = json.loads(answer)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply


def writer_for(tracking: TrackingSwitch) -> contextlib.AbstractContextManager[Writer | None]:
    """A writer, or None where tracking is switched off."""
    return Writer() if tracking.enabled else contextlib.nullcontext()


def fetch_artifact(run_id: str, file: str, folder: Path) -> Path:
    """Copy an artifact of another run into the folder.

    Raises:
        UserError: there is no such run, it has no such artifact, or the store does not answer.
    """
    with Writer() as writer:
        request = {"run_id": run_id, "file": file, "folder": str(folder.resolve())}
        return Path(writer.ask({"fetch": request})["path"])


class MlflowRun:
    """A run in MLflow, written through its journal."""

    def __init__(self, writer: Writer, request: RunRequest, output_dir: Path) -> None:
        """Open the run.

        Raises:
            UserError: the store or the folder cannot be written.
        """
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output_dir).close()
        except OSError as error:
            raise UserError(f"output_dir {output_dir}: {error.strerror or error}") from None
        self.writer = writer
        reply = writer.ask({"open": asdict(request), "output_dir": str(output_dir.resolve())})
        self.id: str = reply["run_id"]
        self.name: str = reply["name"]
        self.tracking_uri: str = reply["tracking_uri"]
        self.folder = output_dir / self.id
        self.journal = JournalWriter(self.folder / JOURNAL_FILE)
        self.points, self.writer_cpu_seconds = 0, 0.0

    def _append(self, op: str, **values: Any) -> None:
        self.journal.append({"op": op, **values})

    def log_params(self, params: Mapping[str, str]) -> None:
        self._append("params", values=dict(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", values=dict(tags))

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        self._append("metrics", step=step, time=time_ms or now_ms(), values=metrics)
        self.points += len(metrics)

    def log_artifact(self, file: Path, folder: str = "") -> None:
        self._append("artifact", file=str(file.resolve()), folder=folder)

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        self._append("input", name=name, digest=digest, source=source, profile=profile)

    def log_model(self, export: Mapping[str, Any]) -> None:
        self._append("model", **export)

    def flush(self) -> None:
        self.journal.flush()

    def history(self) -> Sequence[tuple[int, Mapping[str, float]]]:
        self.flush()
        return [
            (record["step"], record["values"]) for record in read_all(self.journal.file) if record["op"] == "metrics"
        ]

    def finish(self, status: str) -> None:
        self._append("finish", status=status)
        self.journal.close()
        reply = self.writer.ask({"finish": True})
        self.writer_cpu_seconds = reply["cpu_seconds"]
        problems = reply["problems"]
        if reply["points"] != self.points:
            problems.append(f"{reply['points']} of {self.points} points were delivered")
        if problems:
            raise TrainingError(f"run {self.id}: {'; '.join(problems)}; all of it lies in {self.journal.file}")
