"""Worker process of a sweep: trains one run after another, and loads torch and the data only once.

`python -m pipeline.sweeps.worker` reads requests (`pipeline.sweeps.requests`) from standard input and writes replies to
standard output. It exits when its input closes; a run that is still training first gets the status KILLED.
"""

import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UserError
from pipeline.runtime.interrupts import interruptible, next_item
from pipeline.runtime.platform_support import terminate_self
from pipeline.runtime.processes import take_standard_output
from pipeline.runtime.protocol import read_messages
from pipeline.sweeps.requests import (
    WORKER_REQUESTS,
    DataDigest,
    DigestData,
    Evaluated,
    JobDone,
    JobFailed,
    JobRequest,
    PrefixTrained,
    RunTrained,
    StopRun,
    TrainPrefix,
    TrainRun,
)
from pipeline.tasks.registry import config_class, task_factory

if TYPE_CHECKING:
    from pipeline.tracking.writer_client import Writer

EXIT_SECONDS = 15  # time limit for a worker to exit


def main() -> None:
    """Serve requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep handles Ctrl-C and then closes this process's input
    send_reply = take_standard_output()
    requests = _Requests()

    import pipeline.runs.launch  # noqa: F401 (takes seconds, best while another worker loads the data)
    from pipeline.tracking.writer_client import Writer

    with interruptible(), Writer() as writer:
        work = Work(writer, send_reply, requests.stop)
        while (request := next_item(requests.queue)) is not None:
            requests.stop.clear()
            try:
                requests.busy = True
                if requests.closed:
                    break
                reply = work.do(request)
            except KeyboardInterrupt:
                break
            finally:
                requests.busy = False
            send_reply(reply)


class _Requests:
    """Queue of the requests on standard input. Closing the input interrupts the current job."""

    def __init__(self) -> None:
        self.queue: queue.Queue[JobRequest | None] = queue.Queue()
        self.busy, self.closed, self.stop = False, False, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for request in read_messages(sys.stdin, WORKER_REQUESTS):
                if isinstance(request, StopRun):
                    self.stop.set()
                else:
                    self.queue.put(request)
        finally:
            self.closed = True
            self.queue.put(None)
            if self.busy:
                terminate_self()


class Work:
    """Runs jobs one after another. Keeps the last task, so that its data need not be loaded again."""

    def __init__(self, writer: "Writer", report: Callable[[Evaluated], None], stop: threading.Event) -> None:
        """report: called with each evaluation of a watched run. stop: set to end that run after its next evaluation."""
        self.writer, self.report, self.stop = writer, report, stop
        self.task: Any = None

    def do(self, request: JobRequest) -> JobDone:
        """Run a job. An exception becomes a `JobFailed`; unless it is a UserError, its traceback is logged."""
        start = time.perf_counter()
        reply: JobDone
        try:
            match request:
                case DigestData():
                    reply = self.digest(request)
                case TrainPrefix():
                    reply = self.train_prefix(request)
                case TrainRun():
                    reply = self.train(request)
        except UserError as error:
            reply = JobFailed(error=str(error))
        except Exception as error:  # the failure of one run must not end the others
            traceback.print_exc()
            reply = JobFailed(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return replace(reply, seconds=time.perf_counter() - start)

    def digest(self, request: DigestData) -> DataDigest:
        """Load the data; compute their digest, and the reasons why metrics are undefined on them.

        Raises:
            UserError: one of the metrics does not exist.
        """
        from pipeline.tasks.base import undefined
        from pipeline.training.loop import count_steps

        task = self.make_task(request.entry, parse_config(request))
        reasons = {key: undefined(task, key, metric) for key, metric in request.metrics.items()}
        return DataDigest(digest=task.dataset.digest, metric=task.config.evaluation.metric,
                          undefined={key: why for key, why in reasons.items() if why},
                          steps=count_steps(task) if request.count else 0)  # fmt: skip

    def train_prefix(self, request: TrainPrefix) -> PrefixTrained:
        from pipeline.runs.launch import prepare_torch
        from pipeline.runs.shared_prefix import train_prefix

        config = parse_config(request)
        device = prepare_torch(config)
        folders = {int(step): Path(folder) for step, folder in request.folders.items()}
        return PrefixTrained(steps=train_prefix(self.make_task(request.entry, config), folders, device))

    def train(self, request: TrainRun) -> RunTrained:
        from pipeline.runs.launch import train_run
        from pipeline.tracking.messages import RunRequest

        stopped = False

        def watch(step: int, metrics: Mapping[str, float]) -> bool:
            nonlocal stopped
            if request.watched and request.watched in metrics:
                self.report(Evaluated(step, metrics[request.watched]))
            stopped = self.stop.is_set()
            return stopped

        run = train_run(
            parse_config(request),
            lambda config: self.make_task(request.entry, config),
            self.writer,
            RunRequest(name=request.name, run_id=request.run_id, tags=request.tags, resume=request.run_id is not None,
                       folder=request.folder),
            given=frozenset(request.overridden),
            prefix=Path(request.prefix) if request.prefix else None,
            watch=watch if request.watched else None,
            quiet=True,
        )  # fmt: skip
        return RunTrained(run_id=run.id, metrics=run.metrics, steps=run.steps, weights_digest=run.weights_digest,
                          stopped=stopped)  # fmt: skip

    def make_task(self, entry: str, config: Any) -> Any:
        """Create the task of a config, reusing the previous task's data if possible."""
        same_kind = self.task is not None and type(self.task.config) is type(config)
        shared = self.task.with_config(config) if same_kind else None
        self.task = shared or task_factory(entry)(config)
        return self.task


def parse_config(request: JobRequest) -> Any:
    """Parse and validate the config of a request."""
    from pipeline.config.strict_config import validate

    return validate(config_class(request.entry), yaml.safe_load(request.config), None)


if __name__ == "__main__":
    main()
