"""Sweep workers as processes on this machine."""

import os
import queue
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from pipeline.runtime.gpus import VARIABLE
from pipeline.runtime.interrupts import next_item
from pipeline.runtime.processes import ChildProcess, Ended
from pipeline.sweeps.jobs import Job, OnProgress, ready_jobs
from pipeline.sweeps.requests import WORKER_REPLIES, Evaluated, JobFailed, StopRun, WorkerReply
from pipeline.sweeps.worker import EXIT_SECONDS

Worker = ChildProcess[WorkerReply]


class LocalWorkers:
    """A pool of worker processes; each runs one job at a time."""

    def __init__(self, size: int, folder: Path, gpus: Sequence[str] = ()) -> None:
        """folder: where each worker writes its log. gpus: names of GPUs; each worker uses the one with fewest workers.

        Without names, workers find their device themselves.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.inbox = folder, queue.Queue[tuple[Worker, WorkerReply | Ended]]()
        self.workers: dict[Worker, Job | None] = {}
        self.gpus, self.gpu_of = gpus, dict[Worker, str | None]()
        self.numbers = count()
        for _ in range(size):
            self._start_worker()

    def work(self, jobs: list[Job], on_progress: OnProgress | None = None) -> None:
        """See `Workers.work`."""
        while any(job.reply is None for job in jobs):
            ready = ready_jobs(jobs, [job for job in self.workers.values() if job])
            idle = [worker for worker, job in self.workers.items() if job is None]
            for worker, job in zip(idle, ready, strict=False):
                self.workers[worker] = job
                worker.send(job.request)
            self._handle(*next_item(self.inbox), on_progress)

    def stop(self, job: Job) -> None:
        """See `Workers.stop`."""
        for worker, current in self.workers.items():
            if current is job:
                worker.send(StopRun())

    def close(self) -> None:
        """See `Workers.close`."""
        for worker in self.workers:
            worker.end_input()
        deadline = time.monotonic() + EXIT_SECONDS
        for worker in self.workers:
            worker.close(max(0.0, deadline - time.monotonic()))

    def _start_worker(self) -> None:
        log = self.folder / f"worker-{next(self.numbers)}.log"
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        gpu = min(self.gpus, key=list(self.gpu_of.values()).count, default=None)
        if gpu is not None:
            environment[VARIABLE] = gpu
        worker = ChildProcess("pipeline.sweeps.worker", WORKER_REPLIES, self.inbox, environment=environment, log=log)
        self.workers[worker], self.gpu_of[worker] = None, gpu

    def _handle(self, worker: Worker, reply: WorkerReply | Ended, on_progress: OnProgress | None) -> None:
        job = self.workers[worker]
        if isinstance(reply, Evaluated):
            if job and on_progress:
                on_progress(job, reply)
            return
        self.workers[worker] = None
        if isinstance(reply, Ended):
            del self.workers[worker], self.gpu_of[worker]
            self._start_worker()
            reply = JobFailed(error=f"its process ended with code {reply.code}; see {worker.log}")
        if job:
            job.reply = reply
            job.finished(job)
