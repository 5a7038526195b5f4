"""What training tells the world: a `Run`, in MLflow or in memory.

`MlflowRun` appends every call to the run's journal, and a writer process (`pipeline.tracking`) delivers the journal to
the tracking store in order, whole steps at a time. So training never waits for the store and never imports mlflow; a
store that goes away, or a writer that dies, delays the delivery and nothing else.
`MemoryRun` keeps the calls in lists: tracking switched off, and tests.
"""

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.config.run_config import TrackingSwitch
from pipeline.errors import TrainingError, Undelivered, UserError, os_errors
from pipeline.names import OWNER
from pipeline.runtime.console import say, warn
from pipeline.runtime.interrupts import next_of
from pipeline.runtime.process_rank import leads
from pipeline.runtime.processes import ChildProcess, Ended
from pipeline.storage.journal import (
    JOURNAL_FILE,
    JournalWriter,
    Known,
    is_measured,
    points,
    same_value,
)
from pipeline.storage.ownership import Ownership
from pipeline.storage.run_files import LOGGED, leaves, take_in
from pipeline.tracking.messages import (
    WRITER_REPLIES,
    AbandonRun,
    Away,
    DeliveryReport,
    FetchArtifact,
    FetchedArtifact,
    FindRuns,
    FinishRun,
    FollowRun,
    FoundRuns,
    OpenedRun,
    OpenRun,
    Progress,
    Refused,
    RunRequest,
    StoredRun,
    TakenOver,
    WriterReply,
    WriterRequest,
)
from pipeline.tracking.store import CLIENT_SETTINGS, check_uri

PATIENCE_SECONDS = 30.0  # how long the end of a run waits for a store that takes nothing
STOPPED_SECONDS = 4.0  # in all, that the store gets when a run is stopped by a signal
FAILED_SECONDS = 15.0  # without progress, that the store gets when a run failed
LONGEST_TAG = 5000  # characters that MLflow takes
TELL_SECONDS = 2.0  # between two lines of progress
HURRY_SECONDS = 2.0  # that a writer in a hurry gets to say how the run ended
Points = Mapping[str, float]
R = TypeVar("R", OpenedRun, FoundRuns, FetchedArtifact)


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow's timestamps."""
    return time.time_ns() // 1_000_000


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

    def position(self) -> int:
        """How long the journal is, in bytes: what was logged before this call survives a power cut."""
        ...

    def go_on(self, position: int) -> None:
        """The run goes on from a state that was saved at the position: what it logs a second time is not kept twice."""
        ...

    def history(self) -> Iterable[tuple[int, Points]]:
        """(step, metrics) of every call of `log_metrics` so far; can be gone through more than once."""
        ...

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:
        """End the run as FINISHED, FAILED or KILLED once all is delivered.

        patience: seconds without any progress after which the rest stays in the journal; in a `hurry`, seconds in all.

        Raises:
            Undelivered: the store is away; the message says how the rest is delivered later.
            TrainingError: the store refused something, or the journal could not be written.
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

    def position(self) -> int:
        return 0

    def go_on(self, position: int) -> None:
        """Nothing is there from before."""

    def history(self) -> Iterable[tuple[int, Points]]:
        return self.points

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:  # noqa: ARG002
        self.status = status

    def discard(self) -> None:
        """Remove its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Writer:
    """The process that delivers to MLflow; it serves one run after the other.

    Starting it returns at once: mlflow is imported there while this process loads its data.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the process, in place of one that has ended.

        Raises:
            UserError: MLFLOW_TRACKING_URI is no URI.
        """
        check_uri()
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        environment |= CLIENT_SETTINGS | {"OMP_NUM_THREADS": "1"}
        self.inbox = queue.Queue[tuple[ChildProcess[WriterReply], WriterReply | Ended]]()
        # in a session of its own: Ctrl-C is for the trainer, which then ends the run in order
        self.process = ChildProcess("pipeline.tracking", WRITER_REPLIES, self.inbox, environment=environment,
                                    own_session=True)  # fmt: skip

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(STOPPED_SECONDS if kind and issubclass(kind, KeyboardInterrupt) else None)

    def close(self, seconds: float | None = None) -> None:
        """Let it deliver what is left, for as long as the store takes it or at most so long, and end."""
        self.process.close(seconds)

    def send(self, request: WriterRequest) -> None:
        """Send a request; one to a process that is gone has no reply."""
        self.process.send(request)

    def ask(self, request: WriterRequest, expected: type[R]) -> R:
        """Send a request; returns its reply.

        Raises:
            UserError: the store refused it, or does not answer.
            TrainingError: the process is gone.
        """
        if self.process.poll() is not None:  # ended because the store hung, or by itself
            self.start()
        self.send(request)
        _, reply = next_of(self.inbox)
        if isinstance(reply, Ended):
            raise TrainingError(f"the tracking writer ended with code {reply.code}")
        if isinstance(reply, Refused):
            raise UserError(reply.error)
        assert isinstance(reply, expected)
        return reply

    def find(
        self, *, run_id: str | None = None, run_key: str | None = None, fork: str | None = None
    ) -> list[StoredRun]:
        """The run with this id, or the runs tagged with this key, oldest first, that were forked from there (or not).

        A run that was made on this server for one that began elsewhere is found by the id it began with (`first_id`).

        Raises:
            UserError: the store does not answer.
        """
        return list(self.ask(FindRuns(run_id, run_key, fork), FoundRuns).runs)


def writer_for(tracking: TrackingSwitch) -> contextlib.AbstractContextManager[Writer | None]:
    """A writer, or None where tracking is switched off, or another of the processes that train together tracks."""
    return Writer() if tracking.enabled and leads() else contextlib.nullcontext()


def fetch_artifact(run_id: str, file: str, folder: Path) -> Path:
    """Copy an artifact of another run into the folder.

    Raises:
        UserError: there is no such run, it has no such artifact, or the store does not answer.
    """
    with Writer() as writer:
        request = FetchArtifact(run_id, file, str(folder.resolve()))
        return Path(writer.ask(request, FetchedArtifact).path)


@dataclass(frozen=True)
class History:
    """The points of a journal, read anew each time they are gone through."""

    file: Path

    def __iter__(self) -> Iterator[tuple[int, Points]]:
        return ((record["step"], record["values"]) for record in points(self.file))


class MlflowRun:
    """A run in MLflow, written through its journal."""

    def __init__(self, writer: Writer, request: RunRequest, output_dir: Path, offline: bool = False) -> None:
        """Open the run; it is this process' alone until it is finished.

        offline: where the store does not answer, begin all the same; the run is made there later.

        Raises:
            UserError: the store or the folder cannot be written, or another process is at the run.
            TrainingError: the journal cannot be read or written.
        """
        with os_errors(f"output_dir {output_dir}"):
            output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output_dir).close()
        self.writer, self.folder = writer, output_dir
        self.known: Known | None = None
        self.points, self.writer_cpu_seconds, self.failure = 0, 0.0, ""
        self._taken: TrainingError | None = None
        asked = OpenRun(request, str(output_dir.resolve()), offline)
        with contextlib.ExitStack() as undo:
            undo.push(self._not_begun)
            if request.resume:
                assert request.run_id
                self.folder = Path(request.folder) if request.folder else output_dir / request.run_id
                self.owner = Ownership(self.folder)
                undo.callback(self.owner.release)
                opened = self._open_again(asked)
            else:
                opened = writer.ask(asked, OpenedRun)
                self.folder = output_dir / opened.run_id
                self.owner = Ownership(self.folder)
                undo.callback(self.owner.release)
                self.found_bytes = 0
            self.owner.take()
            self._begin(opened)
            undo.pop_all()
        self._follow()

    def _not_begun(self, _: object, error: BaseException | None, __: object) -> None:
        """The run was not begun: if it was opened, it must not stay RUNNING."""
        disk = isinstance(error, OSError)
        failure = f"run folder {self.folder}: {getattr(error, 'strerror', None) or error}" if disk else str(error)
        self.writer.send(AbandonRun(failure))
        if disk:
            raise TrainingError(failure) from None

    def _begin(self, opened: OpenedRun) -> None:
        """Tell of what the writer has opened, and begin the journal with it."""
        self.id, self.name, self.tracking_uri = opened.run_id, opened.name, opened.tracking_uri
        self.claim = opened.tags[OWNER]
        if opened.ahead:
            warn(f"run {self.id}: its journal had lost points; those that the store has were read back")
        if opened.reason:
            warn(f"tracking store {self.tracking_uri}: {opened.reason}")
        self.journal = JournalWriter(self.folder / JOURNAL_FILE, self._check)
        self._append(
            "open",
            id=self.id,
            time=now_ms(),
            name=opened.name,
            experiment=opened.experiment,
            tags=dict(opened.tags),
            online=opened.online,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        try:
            self.journal.sync()
        except BaseException:
            os.close(self.journal.descriptor)
            raise

    def _check(self) -> None:
        """Called before anything is written: raises a TrainingError where the run has another owner by now."""
        if self._taken is None:
            try:
                self.owner.check()
            except TrainingError as error:
                self._taken = error
        if self._taken:
            raise TrainingError(str(self._taken)) from None

    @property
    def lost(self) -> bool:
        """Another process has taken the run over, and it was seen: nothing of ours is written any more."""
        return self._taken is not None

    def _open_again(self, asked: OpenRun) -> OpenedRun:
        """Open a run that was begun before, with what its journal holds; points that only the store has come first."""
        file = self.folder / JOURNAL_FILE
        self.known = Known()
        self.found_bytes = self.known.read(file) if file.exists() else 0
        run = replace(asked.run, folder=str(self.folder.resolve()))
        opened = self.writer.ask(replace(asked, run=run, last_steps=self.known.last_steps()), OpenedRun)
        if opened.ahead:
            self.known.read(file, self.found_bytes)
        return opened

    def _follow(self) -> None:
        """Let the writer deliver the journal from now on."""
        self.writer.send(FollowRun(str(self.folder.resolve()), self.owner.number, self.claim))

    def _revive(self) -> None:
        """Start the writer again if it died by itself: it goes on where the delivery ended."""
        if (code := self.writer.process.poll()) is not None:
            warn(f"the tracking writer ended with code {code}; another one goes on")
            self.writer.start()
            self._follow()

    def _append(self, op: str, **values: Any) -> None:
        if not self.lost:
            self.journal.append({"op": op, **values})

    def log_params(self, params: Mapping[str, str]) -> None:
        self._append("params", values=dict(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.failure = tags.get("failure", self.failure)
        self._append("tags", values=dict(tags))

    def log_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        fresh = metrics if self.known is None else self._unknown(self.known, step, metrics)
        if fresh or not metrics:
            self._append("metrics", step=step, time=time_ms or now_ms(), values=fresh)
        self.points += len(fresh)

    def _unknown(self, known: Known, step: int, metrics: Points) -> Points:
        """What is not in the journal yet. What is there must be what is computed now; it stays, in any case."""
        there = {key: was for key in metrics if (was := known.value(key, step)) is not None}
        differs = [
            key for key, was in there.items() if not is_measured(key) and not same_value(was, float(metrics[key]))
        ]
        if differs and "determinism" not in known.tags:
            key = differs[0]
            known.tags["determinism"] = f"broken@{step}"
            self.set_tags({"determinism": f"broken@{step}"})
            warn(f"{key} is {metrics[key]!r} at step {step} and was {there[key]!r} before; what was logged first "
                 f"stays, and the run is tagged determinism=broken@{step}")  # fmt: skip
        return {key: value for key, value in metrics.items() if key not in there}

    def log_artifact(self, file: Path, folder: str = "") -> None:
        """Keep a file among the run's artifacts; one from elsewhere is copied into the run's folder first.

        Raises:
            UserError: the artifact's folder would lie outside.
            TrainingError: the file cannot be copied.
        """
        if leaves(folder):
            raise UserError(f"artifact {file.name}: found folder {folder!r}, allowed: one below the run's artifacts")
        if not self.lost:
            self._append("artifact", file=self._take_in(file, f"{LOGGED}/{folder}/{file.name}"), folder=folder)

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        self._append("input", name=name, digest=digest, source=source, profile=profile)

    def log_model(self, export: Mapping[str, Any]) -> None:
        if not self.lost:
            self._append("model", **{**export, "folder": self._take_in(Path(export["folder"]), f"{LOGGED}/model")})

    def _take_in(self, path: Path, place: str) -> str:
        with os_errors(f"artifact {path}", TrainingError):
            return take_in(path, self.folder, place)

    def flush(self) -> None:
        self._listen()
        self.journal.flush()
        self._revive()

    def _listen(self) -> None:
        """What the writer says by itself: that the store names another owner."""
        with contextlib.suppress(queue.Empty):
            _, news = self.writer.inbox.get_nowait()
            if isinstance(news, TakenOver):
                self._taken = TrainingError(
                    f"run {self.id} was taken over by {news.by}; process {os.getpid()} ends here"
                )

    def position(self) -> int:
        return self.journal.sync()

    def go_on(self, position: int) -> None:
        if position > self.found_bytes:
            warn(f"journal {self.journal.file}: found {self.found_bytes} bytes where {position} were saved; of the "
                 "rest, what the store has was read back")  # fmt: skip

    def history(self) -> Iterable[tuple[int, Points]]:
        self.journal.flush()
        return History(self.journal.file)

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:
        full: TrainingError | None = None
        try:
            with contextlib.suppress(TrainingError):  # `close` says it again
                self._append("finish", status=status, time=now_ms())
            try:
                self.journal.close()
            except TrainingError as error:  # the end travels without the journal
                if self.lost:
                    self.writer.process.kill()  # the run's end is the other's to tell
                    raise
                full, status, self.failure = error, _worse(status), self.failure or str(error)
            try:
                report = self._deliver_rest(FinishRun(status, self.failure, patience, hurry))
            except KeyboardInterrupt:
                self.writer.process.kill()
                warn(f"run {self.id}: stopped while the rest of {self.journal.file} was delivered; deliver it with "
                     f"`python -m pipeline sync {self.folder}`")  # fmt: skip
                raise
        finally:
            self.owner.release()
        if full:
            raise full
        if report is None or report.waiting:
            waits = f"{report.waiting:,} records wait" if report else "part of it waits"
            why = report.reason if report else "the tracking store does not answer"
            raise Undelivered(f"run {self.id}: {waits} in {self.journal.file}: {why}; deliver it with "
                              f"`python -m pipeline sync {self.folder}`")  # fmt: skip
        self.writer_cpu_seconds = report.cpu_seconds
        if report.problems:
            raise TrainingError(f"run {self.id}: {'; '.join(report.problems)}; all of it lies in {self.journal.file}")

    def _deliver_rest(self, request: FinishRun) -> DeliveryReport | None:
        """Wait while the writer makes progress. Where it makes none it is ended: what it said last, None if nothing."""
        self._revive()
        self.writer.send(request)
        started = told = time.monotonic()
        revived, end, away = 0, started + request.patience + 1, None
        while True:
            if request.hurry:
                end = started + request.patience + HURRY_SECONDS
            try:
                _, reply = self.writer.inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.writer.process.kill()
                return away
            if isinstance(reply, Ended):
                revived += 1
                if revived > 2:
                    return away
                self._revive()
                self.writer.send(request)
                end = time.monotonic() + request.patience + 1
                continue
            if isinstance(reply, DeliveryReport):
                return reply
            if isinstance(reply, TakenOver):
                continue  # the report says it
            if isinstance(reply, Away):
                away = DeliveryReport((), max(1, reply.waiting), reply.reason, self.id, 0.0)
                continue
            assert isinstance(reply, Progress)
            end, away = time.monotonic() + max(request.patience + 1, reply.busy), None
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                say(f"delivered {reply.delivered:,} of {reply.of:,} records ({told - started:.0f} s)")


def end_early(run: Run, error: BaseException) -> str:
    """End a run that an error cut off: KILLED in a hurry where the process was asked to end, else FAILED.

    What cannot be delivered is told, but does not hide the error. Returns the status.
    """
    stopped = isinstance(error, KeyboardInterrupt)
    status = "KILLED" if stopped else "FAILED"
    with contextlib.suppress(TrainingError):  # `finish` says it again
        run.set_tags({"failure": (str(error) or type(error).__name__)[:LONGEST_TAG]})
    try:
        run.finish(status, STOPPED_SECONDS if stopped else FAILED_SECONDS, hurry=stopped)
    except UserError as undelivered:
        warn(str(undelivered))
    return status


def _worse(status: str) -> str:
    return "FAILED" if status == "FINISHED" else status
