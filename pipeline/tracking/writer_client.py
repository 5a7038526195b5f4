"""The trainer's side of the writer process, which delivers runs to MLflow."""

import contextlib
import os
import queue
from pathlib import Path
from typing import TypeVar

from pipeline.config.run_config import TrackingSwitch
from pipeline.errors import TrainingError, UserError
from pipeline.runtime.interrupts import next_item
from pipeline.runtime.process_rank import is_main_process
from pipeline.runtime.processes import ChildProcess, Ended
from pipeline.tracking import messages
from pipeline.tracking.store import CLIENT_SETTINGS, check_uri

STOPPED_SECONDS = 4.0  # total time for the delivery when a signal stops a run
R = TypeVar("R", messages.OpenedRun, messages.FoundRuns, messages.FetchedArtifact)


class Writer:
    """The writer process, which serves one run after another.

    Starting it does not block: it imports mlflow while this process loads its data.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start the process, or a new one after it has ended.

        Raises:
            UserError: MLFLOW_TRACKING_URI cannot be parsed.
        """
        check_uri()
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        environment |= CLIENT_SETTINGS | {"OMP_NUM_THREADS": "1"}
        self.inbox = queue.Queue[tuple[ChildProcess[messages.WriterReply], messages.WriterReply | Ended]]()
        # in its own session, so that Ctrl-C reaches only the trainer, which then ends the run
        self.process = ChildProcess("pipeline.tracking", messages.WRITER_REPLIES, self.inbox, environment=environment,
                                    own_session=True)  # fmt: skip

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(STOPPED_SECONDS if kind and issubclass(kind, KeyboardInterrupt) else None)

    def close(self, seconds: float | None = None) -> None:
        """Let the process deliver the rest and exit; kill it after this many seconds (None: never)."""
        self.process.close(seconds)

    def send(self, request: messages.WriterRequest) -> None:
        """Send a request; it is lost if the process has ended."""
        self.process.send(request)

    def ask(self, request: messages.WriterRequest, expected: type[R]) -> R:
        """Send a request and return its reply.

        Raises:
            UserError: the store refused the request, or does not answer.
            TrainingError: the process ended without a reply.
        """
        if self.process.poll() is not None:  # it was killed, or exited because the store hung
            self.start()
        self.send(request)
        _, reply = next_item(self.inbox)
        if isinstance(reply, Ended):
            raise TrainingError(f"the tracking writer ended with code {reply.code}")
        if isinstance(reply, messages.Refused):
            raise UserError(reply.error)
        assert isinstance(reply, expected)
        return reply

    def find(
        self, *, run_id: str | None = None, run_key: str | None = None, fork: str | None = None
    ) -> list[messages.StoredRun]:
        """The run with this id, or the runs with this run key and fork (None: not forked), oldest first.

        A run that began in another store is found by its original id (`first_id`).

        Raises:
            UserError: the store does not answer.
        """
        return list(self.ask(messages.FindRuns(run_id, run_key, fork), messages.FoundRuns).runs)


def writer_for(tracking: TrackingSwitch) -> contextlib.AbstractContextManager[Writer | None]:
    """Start a writer in the main process if tracking is enabled; otherwise yield None."""
    return Writer() if tracking.enabled and is_main_process() else contextlib.nullcontext()


def fetch_artifact(run_id: str, file: str, folder: Path) -> Path:
    """Copy an artifact of another run into the folder.

    Raises:
        UserError: the run or artifact does not exist, or the store does not answer.
    """
    with Writer() as writer:
        request = messages.FetchArtifact(run_id, file, str(folder.resolve()))
        return Path(writer.ask(request, messages.FetchedArtifact).path)
