"""The workers of a sweep as processes of this machine."""

import os
import queue
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from pipeline.runtime.interrupts import next_of
from pipeline.runtime.processes import ChildProcess, Ended
from pipeline.sweeps.jobs import Job
from pipeline.sweeps.requests import WORKER_REPLIES, Evaluated, JobFailed, StopRun, WorkerReply
from pipeline.sweeps.worker import PATIENCE_SECONDS

Worker = ChildProcess[WorkerReply]


class LocalWorkers:
    """The workers, and the jobs that they take one after the other."""

    def __init__(self, size: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.inbox = folder, queue.Queue[tuple[Worker, WorkerReply | Ended]]()
        self.workers: dict[Worker, Job | None] = {}
        self.numbers = count()
        for _ in range(size):
            self._hire()

    def _hire(self) -> None:
        log = self.folder / f"worker-{next(self.numbers)}.log"
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        worker = ChildProcess("pipeline.sweeps.worker", WORKER_REPLIES, self.inbox, environment=environment, log=log)
        self.workers[worker] = None

    def work(
        self,
        jobs: list[Job],
        on_progress: Callable[[Job, Evaluated], None] = lambda job, evaluated: None,  # noqa: ARG005
    ) -> None:
        """Do the jobs, in their order as far as what they need allows. `on_progress` gets a watched run's evaluations.

        `jobs` may grow meanwhile, by a job's `finished`.
        """
        while any(job.reply is None for job in jobs):
            self._hand_out(jobs)
            worker, reply = next_of(self.inbox)
            job = self.workers.get(worker)
            if isinstance(reply, Evaluated):
                if job:
                    on_progress(job, reply)
                continue
            if worker in self.workers:
                self.workers[worker] = None
                if isinstance(reply, Ended) or reply.leaving:
                    del self.workers[worker]
                    self._hire()
            if job is None:
                continue
            if isinstance(reply, Ended):
                reply = JobFailed(error=f"its process ended with code {reply.code}; see {worker.log}")
            job.reply = reply
            job.finished(job)

    def _hand_out(self, jobs: list[Job]) -> None:
        taken = [job for job in self.workers.values() if job]
        ready = [job for job in jobs if job.reply is None and job not in taken
                 and (job.needs is None or job.needs.reply is not None)]  # fmt: skip
        for worker, job in list(self.workers.items()):
            if job is None and ready:
                self.workers[worker] = ready[0]
                worker.send(ready.pop(0).request)

    def stop(self, job: Job) -> None:
        """Let the run of this job end after its next evaluation."""
        for worker, taken in self.workers.items():
            if taken is job:
                worker.send(StopRun())

    def close(self) -> None:
        """End every worker; what they are at is ended as KILLED."""
        for worker in self.workers:
            worker.end_input()
        until = time.monotonic() + PATIENCE_SECONDS
        for worker in self.workers:
            worker.close(max(0.0, until - time.monotonic()))
