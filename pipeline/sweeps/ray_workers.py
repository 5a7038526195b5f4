"""Sweep workers as tasks on a Ray cluster. Ray places tasks and retries those whose process or node was lost."""

import os
from pathlib import Path
from typing import Any

import yaml

from pipeline.runtime.console import info, warn
from pipeline.runtime.interrupts import WATCH_SECONDS, check
from pipeline.storage.journal import Record
from pipeline.sweeps.jobs import Job, OnProgress, ready_jobs
from pipeline.sweeps.ray_cluster import LauncherEnvironment, connect, named_interrupts, refuse_local_store
from pipeline.sweeps.ray_task import Board, Started, run_job
from pipeline.sweeps.requests import DigestData, JobDone, JobFailed
from pipeline.sweeps.worker import EXIT_SECONDS

RETRIES = 3  # for a task whose process or node was lost


class RayWorkers:
    """Submits jobs as Ray tasks, a limited number at a time."""

    def __init__(self, size: int, folder: Path, address: str | None) -> None:
        """Connect to the cluster, or start one on this machine.

        Raises:
            UserError: the cluster is unreachable, or some of its machines cannot reach the tracking store.
        """
        self.ray = connect(address)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_local_store(os.environ.get("MLFLOW_TRACKING_URI", ""), self._nodes())
        except BaseException:
            self.ray.shutdown()
            raise
        self.size, self.environment = size, LauncherEnvironment.current(folder)
        this_node = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self.ray.get_runtime_context().get_node_id(), soft=False
        )
        board = self.ray.remote(Board).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=this_node
        )
        self.board = board.remote()
        self.task = self.ray.remote(max_retries=RETRIES, retry_exceptions=False)(run_job)
        self.submitted: list[Job] = []  # index = task number
        self.running: dict[Any, Job] = {}  # reference to the result -> job
        self.warned = False

    def work(self, jobs: list[Job], on_progress: OnProgress | None = None) -> None:
        """See `Workers.work`."""
        while any(job.reply is None for job in jobs):
            with named_interrupts():
                for job in ready_jobs(jobs, self.running.values())[: self.size - len(self.running)]:
                    self._submit(job)
                ended, _ = self.ray.wait(list(self.running), timeout=WATCH_SECONDS)
                check()
                self._pass_on_news(on_progress)
                for reference in ended:
                    job = self.running.pop(reference)
                    job.reply = self._reply(reference)
                    job.finished(job)

    def stop(self, job: Job) -> None:
        """See `Workers.stop`."""
        self.board.stop.remote(self.submitted.index(job))

    def close(self) -> None:
        """See `Workers.close`. Also stops a cluster that was started here."""
        if not self.ray.is_initialized():
            return
        running = list(self.running)
        for reference in running:
            self.ray.cancel(reference)
        if running:
            _, late = self.ray.wait(running, num_returns=len(running), timeout=EXIT_SECONDS)
            for reference in late:
                self.ray.cancel(reference, force=True)
        self.ray.shutdown()

    def _submit(self, job: Job) -> None:
        number = len(self.submitted)
        self.submitted.append(job)
        task = self.task.options(name=job.name, **self._resources(job))
        self.running[task.remote(number, job.request, self.environment, self.board)] = job

    def _resources(self, job: Job) -> dict[str, float]:
        """Ray resources of a job: one CPU per training thread, and one GPU if it trains on a GPU."""
        if isinstance(job.request, DigestData):
            return {"num_cpus": 1}
        config, nodes = yaml.safe_load(job.request.config), self._nodes()
        on_gpu = config["device"] == "cuda" or (config["device"] == "auto" and _largest(nodes, "GPU") > 0)
        resources = {"CPU": config["training"]["threads"] or 1, "GPU": 1 if on_gpu else 0}
        for name, number in resources.items():
            if _largest(nodes, name) < number and not self.warned:
                self.warned = True
                warn(f"no node of the Ray cluster has {number} {name}; Ray waits for one that has")
        return {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"]}

    def _nodes(self) -> list[Record]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _pass_on_news(self, on_progress: OnProgress | None) -> None:
        for number, news in self.ray.get(self.board.take.remote()):
            job = self.submitted[number]
            if not isinstance(news, Started):
                if on_progress:
                    on_progress(job, news)
            elif not isinstance(job.request, DigestData):
                again = " again: its process or node was lost" if news.again else ""
                info(f"{job.name}: begins on {news.host}{again}")

    def _reply(self, reference: Any) -> JobDone:
        """Reply of a finished task. A Ray error becomes a `JobFailed`."""
        try:
            reply: JobDone = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # the task's own exception; None if the task was lost
            message = " ".join(str(cause or error).split())[:300]
            if cause is not None:
                return JobFailed(error=f"{type(cause).__name__}: {message}")
            return JobFailed(error=f"its process or node was lost {RETRIES + 1} times; see Ray's logs: {message}")
        return reply


def _largest(nodes: list[Record], resource: str) -> float:
    return max((node["Resources"].get(resource, 0.0) for node in nodes), default=0.0)
