"""A run in MLflow, logged through its journal.

`MlflowRun` appends every call to the journal in the run's folder; the writer process delivers it to the tracking store
in order, whole steps at a time. Training itself neither waits for the store nor imports mlflow; an unreachable store or
a dead writer only delays the delivery.
"""

import contextlib
import os
import queue
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError, Undelivered, UserError, os_errors
from pipeline.names import OWNER
from pipeline.runtime.console import info, warn
from pipeline.runtime.processes import Ended
from pipeline.storage.journal import JournalWriter, LoggedPoints, is_measured, read_points, same_value
from pipeline.storage.run_folder import RunFolder, leaves_folder
from pipeline.tracking import messages
from pipeline.tracking.run import PATIENCE_SECONDS, Points, Run, now_ms
from pipeline.tracking.writer_client import STOPPED_SECONDS, Writer

FAILED_SECONDS = 15.0  # time without progress after which delivery of a failed run gives up
HURRY_SECONDS = 2.0  # added to the patience, for a hurried writer to end the run
PROGRESS_SECONDS = 2.0  # between two progress messages
MAX_RESTARTS = 2  # of the writer during the delivery at the run's end
LONGEST_TAG = 5000  # characters that MLflow accepts in a tag


class MlflowRun:
    """A run in MLflow, written through its journal."""

    def __init__(self, writer: Writer, request: messages.RunRequest, output_dir: Path, offline: bool = False) -> None:
        """Open the run and own it until it is finished.

        offline: begin the run even if the store does not answer; it is created there later.

        Raises:
            UserError: the store or the folder cannot be written, or another process owns the run.
            TrainingError: the journal cannot be read or written.
        """
        with os_errors(f"output_dir {output_dir}"):
            output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output_dir).close()
        self.writer, self.folder = writer, output_dir
        self.logged: LoggedPoints | None = None  # points of earlier starts, if resumed
        self.logged_bytes = 0  # size of the journal before this start
        self.writer_cpu_seconds, self.failure = 0.0, ""
        self._taken_over: TrainingError | None = None
        opening = messages.OpenRun(request, str(output_dir.resolve()), offline)
        with contextlib.ExitStack() as cleanup:
            cleanup.push(self._abandon)
            opened = None if request.resume else writer.ask(opening, messages.OpenedRun)
            run_id = opened.run_id if opened else str(request.run_id)
            self.folder = Path(request.folder) if request.folder else output_dir / run_id
            self.owner = self.run_folder.lock()
            cleanup.callback(self.owner.release)
            opened = opened or self._reopen(opening)
            self.owner.take()
            self._begin(opened)
            cleanup.pop_all()
        self._follow()

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def lost(self) -> bool:
        """Whether the run was taken over, so that nothing more is written."""
        return self._taken_over is not None

    def log_params(self, params: Mapping[str, str]) -> None:
        self._append("params", values=dict(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.failure = tags.get("failure", self.failure)
        self._append("tags", values=dict(tags))

    def log_metrics(self, step: int, metrics: Points, time_ms: int | None = None) -> None:
        new = metrics if self.logged is None else self._new_points(self.logged, step, metrics)
        if new or not metrics:
            self._append("metrics", step=step, time=time_ms or now_ms(), values=new)

    def log_artifact(self, file: Path, folder: str = "") -> None:
        """Log a file as an artifact of the run; a file outside the run's folder is copied into it first.

        Raises:
            UserError: `folder` leaves the run's artifacts.
            TrainingError: the file cannot be copied.
        """
        if leaves_folder(folder):
            raise UserError(f"artifact {file.name}: found folder {folder!r}, allowed: one below the run's artifacts")
        if not self.lost:
            self._append("artifact", file=self._copy_in(file, f"{folder}/{file.name}"), folder=folder)

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        self._append("input", name=name, digest=digest, source=source, profile=profile)

    def log_model(self, export: Mapping[str, Any]) -> None:
        if not self.lost:
            self._append("model", **{**export, "folder": self._copy_in(Path(export["folder"]), "model")})

    def flush(self) -> None:
        self._check_news()
        self.journal.flush()
        self._restart_writer()

    def position(self) -> int:
        return self.journal.sync()

    def check_position(self, position: int) -> None:
        if position > self.logged_bytes:
            warn(f"journal {self.journal.file}: has {self.logged_bytes} bytes, {position} expected; missing points "
                 "were read back from the store")  # fmt: skip

    def history(self) -> Iterator[tuple[int, Points]]:
        self.journal.flush()
        return ((record["step"], record["values"]) for record in read_points(self.journal.file))

    def finish(self, status: str, patience: float = PATIENCE_SECONDS, hurry: bool = False) -> None:
        journal_error: TrainingError | None = None
        try:
            with contextlib.suppress(TrainingError):  # `close` raises it again
                self._append("finish", status=status, time=now_ms())
            try:
                self.journal.close()
            except TrainingError as error:
                if self.lost:
                    self.writer.process.kill()  # the new owner ends the run
                    raise
                journal_error, self.failure = error, self.failure or str(error)
                status = "FAILED" if status == "FINISHED" else status  # sent to the writer without the journal
            try:
                report = self._deliver_rest(messages.FinishRun(status, self.failure, patience, hurry))
            except KeyboardInterrupt:
                self.writer.process.kill()
                warn(f"run {self.id}: stopped while the rest of {self.journal.file} was delivered; deliver it with "
                     f"`python -m pipeline sync {self.folder}`")  # fmt: skip
                raise
        finally:
            self.owner.release()
        if journal_error:
            raise journal_error
        if report is None or report.waiting:
            rest = f"{report.waiting:,} records wait" if report else "undelivered records wait"
            reason = report.reason if report else "the tracking store does not answer"
            raise Undelivered(f"run {self.id}: {rest} in {self.journal.file}: {reason}; deliver it with "
                              f"`python -m pipeline sync {self.folder}`")  # fmt: skip
        self.writer_cpu_seconds = report.cpu_seconds
        if report.problems:
            problems = "; ".join(report.problems)
            raise TrainingError(f"run {self.id}: {problems}; {self.journal.file} contains the whole run")

    def _abandon(self, _: object, error: BaseException | None, __: object) -> None:
        """Exit callback after an error: let the writer end the run, and raise disk errors as TrainingErrors."""
        is_disk_error = isinstance(error, OSError)
        failure = str(error)
        if is_disk_error:
            failure = f"run folder {self.folder}: {getattr(error, 'strerror', None) or error}"
        self.writer.send(messages.AbandonRun(failure))
        if is_disk_error:
            raise TrainingError(failure) from None

    def _reopen(self, opening: messages.OpenRun) -> messages.OpenedRun:
        """Open an existing run, and load its logged points, including those that only the store has."""
        journal = self.run_folder.journal
        self.logged = LoggedPoints()
        self.logged_bytes = self.logged.read(journal) if journal.exists() else 0
        run = replace(opening.run, folder=str(self.folder.resolve()))
        opened = self.writer.ask(replace(opening, run=run, last_steps=self.logged.last_steps()), messages.OpenedRun)
        if opened.ahead:
            self.logged.read(journal, self.logged_bytes)
        return opened

    def _begin(self, opened: messages.OpenedRun) -> None:
        """Write the journal's record `open` for this start."""
        self.id, self.name, self.tracking_uri = opened.run_id, opened.name, opened.tracking_uri
        self.claim = opened.tags[OWNER]
        if opened.ahead:
            warn(f"run {self.id}: its journal had lost points; those that the store has were read back")
        if opened.reason:
            warn(f"tracking store {self.tracking_uri}: {opened.reason}")
        self.journal = JournalWriter(self.run_folder.journal, self._check_owner)
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

    def _check_owner(self) -> None:
        """Raise a TrainingError if the run was taken over."""
        if self._taken_over is None:
            try:
                self.owner.check()
            except TrainingError as error:
                self._taken_over = error
        if self._taken_over:
            raise TrainingError(str(self._taken_over)) from None

    def _check_news(self) -> None:
        """Check whether the writer has reported that the run was taken over."""
        with contextlib.suppress(queue.Empty):
            _, news = self.writer.inbox.get_nowait()
            if isinstance(news, messages.TakenOver):
                self._taken_over = TrainingError(
                    f"run {self.id} was taken over by {news.by}; process {os.getpid()} ends here"
                )

    def _append(self, op: str, **values: Any) -> None:
        if not self.lost:
            self.journal.append({"op": op, **values})

    def _new_points(self, logged: LoggedPoints, step: int, metrics: Points) -> Points:
        """The points that earlier starts have not logged.

        Repeated points must equal the logged ones, which are kept; if one differs, warn and tag the run.
        """
        before = {key: value for key in metrics if (value := logged.value(key, step)) is not None}
        differing = [key for key, value in before.items()
                     if not is_measured(key) and not same_value(value, float(metrics[key]))]  # fmt: skip
        if differing and "determinism" not in logged.tags:
            key, tags = differing[0], {"determinism": f"broken@{step}"}
            logged.tags |= tags
            self.set_tags(tags)
            warn(f"{key} is {metrics[key]!r} at step {step} and was {before[key]!r} before; what was logged first "
                 f"stays, and the run is tagged determinism=broken@{step}")  # fmt: skip
        return {key: value for key, value in metrics.items() if key not in before}

    def _copy_in(self, path: Path, destination: str) -> str:
        with os_errors(f"artifact {path}", TrainingError):
            return self.run_folder.copy_in(path, destination)

    def _follow(self) -> None:
        """Make the writer deliver the journal from now on."""
        self.writer.send(messages.FollowRun(str(self.folder.resolve()), self.owner.number, self.claim))

    def _restart_writer(self) -> None:
        """If the writer process has ended, start a new one, which continues the delivery."""
        if (code := self.writer.process.poll()) is not None:
            warn(f"the tracking writer ended with code {code}; a new one continues")
            self.writer.start()
            self._follow()

    def _deliver_rest(self, request: messages.FinishRun) -> messages.DeliveryReport | None:
        """Wait for the end of delivery; kill a writer that makes no progress. Returns the last report, if any."""
        self._restart_writer()
        self.writer.send(request)
        started = progress_at = time.monotonic()
        restarts, end, last_report = 0, started + request.patience + 1, None
        while True:
            if request.hurry:
                end = started + request.patience + HURRY_SECONDS
            try:
                _, reply = self.writer.inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.writer.process.kill()
                return last_report
            match reply:
                case messages.DeliveryReport():
                    return reply
                case Ended():
                    restarts += 1
                    if restarts > MAX_RESTARTS:
                        return last_report
                    self._restart_writer()
                    self.writer.send(request)
                    end = time.monotonic() + request.patience + 1
                case messages.StoreUnavailable(waiting, reason):
                    last_report = messages.DeliveryReport((), max(1, waiting), reason, self.id, 0.0)
                case messages.Progress(delivered, total, busy):
                    end, last_report = time.monotonic() + max(request.patience + 1, busy), None
                    if time.monotonic() - progress_at > PROGRESS_SECONDS:
                        progress_at = time.monotonic()
                        info(f"delivered {delivered:,} of {total:,} records ({progress_at - started:.0f} s)")


def end_early(run: Run, error: BaseException) -> str:
    """End a run after an error: as KILLED and in a hurry if the process was interrupted, otherwise as FAILED.

    An incomplete delivery only causes a warning, so that it does not hide the error. Returns the status.
    """
    is_stopped = isinstance(error, KeyboardInterrupt)
    status = "KILLED" if is_stopped else "FAILED"
    with contextlib.suppress(TrainingError):  # `finish` raises it again
        run.set_tags({"failure": (str(error) or type(error).__name__)[:LONGEST_TAG]})
    try:
        run.finish(status, STOPPED_SECONDS if is_stopped else FAILED_SECONDS, hurry=is_stopped)
    except UserError as undelivered:
        warn(str(undelivered))
    return status
