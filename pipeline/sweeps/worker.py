"""A process that trains run after run for a sweep: torch, mlflow and the data are loaded once.

`python -m pipeline.sweeps.worker` takes requests (`pipeline.sweeps.requests`) on its standard input, and ends when that
does: a run that it is in the middle of is ended as KILLED first.
"""

import os
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
from pipeline.runtime.importing import import_reference
from pipeline.runtime.interrupts import interruptible, next_of
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
    LoadModules,
    PrefixTrained,
    RunTrained,
    StopRun,
    TrainPrefix,
    TrainRun,
)
from pipeline.tasks.registry import TASKS

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_run import Writer

PATIENCE_SECONDS = 15  # how long a worker that is asked to end may take


class _Requests:
    """Standard input as a queue. Its end interrupts the work at hand."""

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
                os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Serve requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep, which then closes our input
    reply = take_standard_output()
    requests = _Requests()

    from pipeline.tracking.mlflow_run import Writer

    with interruptible(), Writer() as writer:
        work = Work(writer, reply, requests.stop)
        while (request := next_of(requests.queue)) is not None:
            requests.stop.clear()
            try:
                requests.busy = True
                if requests.closed:
                    break
                done = work.do(request)
            except KeyboardInterrupt:
                break
            finally:
                requests.busy = False
            leaving = writer.process.poll() is not None  # nothing can be tracked any more: another worker is needed
            reply(replace(done, leaving=leaving))
            if leaving:
                break


class Work:
    """What a worker does, with the task of the last request at hand so that data is not loaded again."""

    def __init__(self, writer: "Writer", reply: Callable[[Evaluated], None], stop: threading.Event) -> None:
        """reply: takes the evaluations of a watched run. stop: set to end it after the next one."""
        self.writer, self.reply, self.stop = writer, reply, stop
        self.task: Any = None

    def do(self, request: JobRequest) -> JobDone:
        """Do a job; an error becomes the reply, with its traceback in the log where it is not the user's."""
        started = time.perf_counter()
        try:
            done = self._do(request)
        except UserError as error:
            done = JobFailed(error=str(error))
        except Exception as error:  # one run's failure must not take the others along
            traceback.print_exc()
            done = JobFailed(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return replace(done, seconds=time.perf_counter() - started)

    def _do(self, request: JobRequest) -> JobDone:
        match request:
            case LoadModules():
                import pipeline.runs.launch  # noqa: F401

                return JobDone()
            case DigestData():
                return self.digest(request)
            case TrainPrefix():
                return self.train_prefix(request)
            case TrainRun():
                return self.train(request)

    def make_task(self, entry: str, config: Any) -> Any:
        """The task, sharing what the last one had loaded."""
        shared = self.task.with_config(config) if self.task is not None else None
        self.task = shared or import_reference(TASKS[entry].make)(config)
        return self.task

    def digest(self, request: DigestData) -> DataDigest:
        """The data's digest, and which of the metrics they leave undefined; a UserError names one that is none."""
        from pipeline.tasks.base import undefined

        task = self.make_task(request.entry, config_of(request.entry, request.config))
        reasons = {key: undefined(task, key, metric) for key, metric in request.metrics.items()}
        return DataDigest(digest=task.dataset.digest, undefined={key: why for key, why in reasons.items() if why})

    def train_prefix(self, request: TrainPrefix) -> PrefixTrained:
        """Train what runs share; leave its states in the folders."""
        from pipeline.runs.launch import prepare_torch
        from pipeline.runs.shared_prefix import grow

        config = config_of(request.entry, request.config)
        device = prepare_torch(config)
        task = self.make_task(request.entry, config)
        folders = {int(step): Path(folder) for step, folder in request.folders.items()}
        return PrefixTrained(steps=grow(task, folders, device))

    def train(self, request: TrainRun) -> RunTrained:
        """Train one run."""
        from pipeline.runs.launch import train_run
        from pipeline.tracking.messages import RunRequest

        stopped, watched = False, request.watched

        def watch(step: int, metrics: Mapping[str, float]) -> bool:
            nonlocal stopped
            if watched and watched in metrics:
                self.reply(Evaluated(step, metrics[watched]))
            stopped = self.stop.is_set()
            return stopped

        trained = train_run(
            config_of(request.entry, request.config),
            lambda validated: self.make_task(request.entry, validated),
            self.writer,
            RunRequest(name=request.name, run_id=request.run_id, tags=request.tags, resume=request.run_id is not None,
                       folder=request.folder),
            given=frozenset(request.given),
            trunk=Path(request.prefix) if request.prefix else None,
            watch=watch if watched else None,
            quiet=True,
        )  # fmt: skip
        return RunTrained(run_id=trained.id, metrics=trained.metrics, steps=trained.steps, stopped=stopped)


def config_of(entry: str, text: str) -> Any:
    """The validated config of a request."""
    from pipeline.config.strict_config import validate

    return validate(import_reference(TASKS[entry].config), yaml.safe_load(text), None)


if __name__ == "__main__":
    main()
