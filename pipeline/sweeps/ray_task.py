"""The Ray task that runs a job of a sweep, and the actor that connects tasks to the launcher.

The task looks up its run in the tracking store. So when Ray retries a task whose process or node was lost, the run
resumes from its last checkpoint in the shared output folder.
"""

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.names import WEIGHTS_DIGEST
from pipeline.runtime.interrupts import Interrupted, interruptible
from pipeline.storage.ownership import live_owner
from pipeline.sweeps.ray_cluster import LauncherEnvironment, named_interrupts
from pipeline.sweeps.requests import Evaluated, JobDone, JobFailed, JobRequest, RunTrained, TrainRun
from pipeline.sweeps.worker import Work, parse_config
from pipeline.tracking.messages import StoredRun

SETTLE_SECONDS = 2.0  # time for the writer process of a lost task to exit
LOST_SECONDS = 60.0  # time for a process on a disconnected node to notice and exit

_work: "_RayWork | None" = None  # shared by all tasks of this process: torch and the data are loaded once


@dataclass(frozen=True)
class Started:
    """Message to the launcher: a task has started."""

    host: str
    again: bool  # retried after its process or node was lost


class Board:
    """Actor on the launcher's node: collects messages from tasks, and passes stop requests to them."""

    def __init__(self) -> None:
        self.news: list[tuple[int, Started | Evaluated]] = []
        self.started: set[int] = set()
        self.stopping: set[int] = set()

    def start(self, number: int, host: str) -> bool:
        """Record the start of a task. Returns whether it had started before."""
        again = number in self.started
        self.started.add(number)
        self.news.append((number, Started(host, again)))
        return again

    def report(self, number: int, evaluated: Evaluated) -> bool:
        """Queue an evaluation for the launcher. Returns whether the task should stop."""
        self.news.append((number, evaluated))
        return number in self.stopping

    def stop(self, number: int) -> None:
        self.stopping.add(number)

    def take(self) -> list[tuple[int, Started | Evaluated]]:
        """Return the messages received since the last call."""
        news, self.news = self.news, []
        return news


def run_job(number: int, request: JobRequest, environment: LauncherEnvironment, board: Any) -> JobDone:
    """Run a job.

    number: the task's number on the board.
    """
    import ray

    from pipeline.tracking.writer_client import STOPPED_SECONDS, Writer

    global _work  # noqa: PLW0603
    try:
        environment.apply()
        with interruptible(), named_interrupts():
            if ray.get(board.start.remote(number, socket.gethostname())):
                time.sleep(SETTLE_SECONDS)
            _work = work = _work or _RayWork(Writer(), lambda _: None, threading.Event())

            def report(evaluated: Evaluated) -> None:
                if ray.get(board.report.remote(number, evaluated)):
                    work.stop.set()

            work.stop.clear()
            work.report = report
            return work.do(request)
    except UserError as error:
        return JobFailed(error=str(error))
    except Interrupted as error:
        if _work:
            _work.writer.close(STOPPED_SECONDS)  # deliver the queued data
        if error.exit_code != 128 + signal.SIGINT:  # the node is shutting down (Ray cancels tasks with SIGINT)
            sys.stderr.flush()
            os._exit(error.exit_code)  # Ray then retries the task on another node
        raise


class _RayWork(Work):
    """Work that resumes runs started by an earlier attempt."""

    def train(self, request: TrainRun) -> RunTrained:
        config = parse_config(request)
        run_key = config.fingerprint(self.make_task(request.entry, config).dataset.digest)
        runs = [run for run in self.writer.find(run_key=run_key)
                if run.tags.get("sweep_id") == request.tags["sweep_id"]]  # fmt: skip
        if runs:
            run = max(runs, key=lambda run: (run.status == "FINISHED", run.start_time))
            if run.status == "FINISHED" and not request.watched:
                digest = run.tags.get(WEIGHTS_DIGEST, "")
                return RunTrained(run_id=run.first_id, metrics=run.metrics, steps=0, weights_digest=digest)
            request = replace(request, run_id=run.first_id, folder=run.tags.get("run_dir"))
            _wait_for_owner(run)
        return super().train(request)


def _wait_for_owner(run: StoredRun) -> None:
    """Wait for the run's previous owner to exit. If it does not, opening the run fails and names the owner."""
    deadline = time.monotonic() + LOST_SECONDS
    folder = Path(run.tags["run_dir"]) if "run_dir" in run.tags else None
    while folder and folder.is_dir() and live_owner(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
