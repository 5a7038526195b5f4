"""The jobs of a sweep as tasks on a Ray cluster: Ray places them, resolves what they need and retries what is lost.

A task is one job; it looks for its run by key in the store, so that a retry goes on where the process or node that was
lost had come to, from the checkpoint in the shared output folder.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UserError
from pipeline.runtime.console import say, warn
from pipeline.runtime.interrupts import SIGNALS, WATCH_SECONDS, Interrupted, check, interruptible
from pipeline.storage.journal import Record
from pipeline.storage.ownership import alive_owner
from pipeline.sweeps.jobs import Job
from pipeline.sweeps.requests import (
    DigestData,
    Evaluated,
    JobDone,
    JobFailed,
    JobRequest,
    LoadModules,
    RunTrained,
    TrainPrefix,
    TrainRun,
)
from pipeline.sweeps.worker import PATIENCE_SECONDS, Work, config_of

if TYPE_CHECKING:
    from pipeline.tracking.messages import StoredRun

RETRIES = 3  # of a task whose process or node is lost
PROBE_SECONDS = 5.0  # that a cluster may take to say anything at all
SETTLE_SECONDS = 2.0  # after the loss of a process: what its tracking writer was at is done by then
LOST_SECONDS = 60.0  # that a process on a lost node may take to notice
OBJECT_STORE_BYTES = 100_000_000  # of a cluster of our own: answers are a few hundred bytes
PREFIX = "MLFLOW_"


@dataclass(frozen=True)
class Place:
    """Where the launcher stands; a task takes the same place, so that relative paths mean the same."""

    folder: str
    sweep: str  # the sweep's folder, which every node must see
    settings: Mapping[str, str] = field(repr=False)  # of MLflow, logins among them

    @classmethod
    def here(cls, sweep: Path) -> "Place":
        settings = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
        settings.pop("MLFLOW_RUN_ID", None)
        return cls(str(Path.cwd()), str(sweep.resolve()), settings)

    def enter(self) -> None:
        """Take it.

        Raises:
            UserError: this node does not have the folders.
        """
        for folder in (self.folder, self.sweep):
            if not Path(folder).is_dir():
                raise UserError(f"Ray node {socket.gethostname()} has no folder {folder}; allowed: working folder and "
                                "output_dir on storage that every node has at the same path")  # fmt: skip
        os.chdir(self.folder)
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            del os.environ[name]
        os.environ.update(self.settings)


@dataclass(frozen=True)
class Began:
    """A task begins."""

    host: str
    again: bool  # it had begun before, in a process that was lost


class Board:
    """An actor beside the launcher: what tasks say on their way, and which of them are to stop."""

    def __init__(self) -> None:
        self.news: list[tuple[int, Began | Evaluated]] = []
        self.begun: set[int] = set()
        self.stopping: set[int] = set()

    def begin(self, number: int, host: str) -> bool:
        """A task begins; returns whether it had begun before, in a process that was lost."""
        again = number in self.begun
        self.begun.add(number)
        self.news.append((number, Began(host, again)))
        return again

    def tell(self, number: int, news: Evaluated) -> bool:
        """Leave news for the launcher; returns whether the task is to stop."""
        self.news.append((number, news))
        return number in self.stopping

    def stop(self, number: int) -> None:
        self.stopping.add(number)

    def take(self) -> list[tuple[int, Began | Evaluated]]:
        """The news since the last call."""
        news, self.news = self.news, []
        return news


class RayWorkers:
    """Hands jobs to a Ray cluster, so many at a time."""

    def __init__(self, size: int, folder: Path, address: str | None) -> None:
        """Connect to the cluster, or start one on this machine.

        Raises:
            UserError: Ray is not installed, the cluster does not answer or is of another version, or the tracking
                store cannot be reached from all of its machines.
        """
        self.ray = connect(address)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_local_store(os.environ.get("MLFLOW_TRACKING_URI", ""), self._nodes())
        except BaseException:
            self.ray.shutdown()
            raise
        self.size, self.place = size, Place.here(folder)
        beside = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self.ray.get_runtime_context().get_node_id(), soft=False
        )
        board = self.ray.remote(Board).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside
        )
        self.board = board.remote()
        self.task = self.ray.remote(run_job)
        self.jobs: list[Job] = []  # by the number of their task
        self.refs: dict[int, Any] = {}  # number -> what the task will answer
        self.behind: set[int] = set()  # tasks that were given the answer of another
        self.heard: set[tuple[int, int]] = set()  # (number, step) of the evaluations that were told
        self.warned = False

    def work(
        self,
        jobs: "list[Job]",
        on_progress: "Callable[[Job, Evaluated], None]" = lambda job, evaluated: None,  # noqa: ARG005
    ) -> None:
        """Do the jobs, in their order as far as what they need allows. `on_progress` gets a watched run's evaluations.

        `jobs` may grow meanwhile, by a job's `finished`.
        """
        while any(job.reply is None for job in jobs):
            with _own_interrupts():
                self._hand_out(jobs)
                numbers = {ref: number for number, ref in self.refs.items() if self.jobs[number].reply is None}
                ended, _ = self.ray.wait(list(numbers), timeout=WATCH_SECONDS)
                check()
                self._pass_on(on_progress)
                for ref in ended:
                    self._ended(numbers[ref])

    def _hand_out(self, jobs: "list[Job]") -> None:
        """Let Ray have as many tasks as may run at once.

        One run more for each trunk at work: it waits for the trunk's answer, and takes its place.
        """
        flying = [self.jobs[number] for number in self.refs if self.jobs[number].reply is None]
        waited_for = [id(job.needs) for job in flying if _waits(job)]
        free = self.size - (len(flying) - len(waited_for))
        for job in jobs:
            if job.reply is not None or any(job is other for other in flying):
                continue
            if _waits(job):
                if id(job.needs) not in waited_for and any(job.needs is other for other in flying):
                    waited_for.append(id(job.needs))
                    self._submit(job)
            elif free > 0:
                free -= 1
                self._submit(job)

    def _submit(self, job: "Job") -> None:
        needed = None
        if job.needs and not job.needs.failed:
            needed = next((self.refs[number] for number in self.refs if self.jobs[number] is job.needs), None)
        number = len(self.jobs)
        self.jobs.append(job)
        if needed is not None:
            self.behind.add(number)
        task = self.task.options(name=job.name, max_retries=RETRIES, retry_exceptions=False, **self._demand(job))
        self.refs[number] = task.remote(number, job.request, needed, self.place, self.board)

    def _demand(self, job: "Job") -> dict[str, float]:
        """The CPUs and GPUs of a task: the threads that it trains with, and a whole GPU where it takes one."""
        if isinstance(job.request, LoadModules | DigestData):
            return {"num_cpus": 1}
        config = yaml.safe_load(job.request.config)
        threads, device = config["training"]["threads"] or 1, config["device"]
        on_gpu = device == "cuda" or (device == "auto" and _largest(self._nodes(), "GPU") > 0)
        demand = {"num_cpus": threads, "num_gpus": 1 if on_gpu else 0}
        for name, number in (("CPU", threads), ("GPU", demand["num_gpus"])):
            if _largest(self._nodes(), name) < number and not self.warned:
                self.warned = True
                warn(f"no node of the Ray cluster has {number} {name}; Ray waits for one that has")
        return demand

    def _nodes(self) -> list[Record]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _pass_on(self, on_progress: "Callable[[Job, Evaluated], None]") -> None:
        """Say what tasks have said; an evaluation that a retry repeats is told once."""
        for number, news in self.ray.get(self.board.take.remote()):
            job = self.jobs[number]
            if isinstance(news, Began):
                if isinstance(job.request, TrainPrefix | TrainRun):
                    again = " again: its process or node was lost" if news.again else ""
                    say(f"{job.name}: begins on {news.host}{again}")
            elif (number, news.step) not in self.heard:
                self.heard.add((number, news.step))
                on_progress(job, news)

    def _ended(self, number: int) -> None:
        """Take a task's answer, or what Ray says of its end."""
        job = self.jobs[number]
        try:
            reply: JobDone = self.ray.get(self.refs[number])
        except self.ray.exceptions.RayError as error:
            if job.needs and job.needs.failed and number in self.behind:  # the trunk's loss, not its own
                del self.refs[number]  # to be handed out again, to train alone
                return
            cause = getattr(error, "cause", None)
            message = " ".join(str(cause or error).split())[:300]
            if cause is not None:  # raised before our own code could answer
                reply = JobFailed(error=f"{type(cause).__name__}: {message}")
            else:
                lost = f"its process or node was lost {RETRIES + 1} times; see Ray's logs: {message}"
                reply = JobFailed(error=lost)
        job.reply = reply
        job.finished(job)

    def stop(self, job: "Job") -> None:
        """Let the run of this job end after its next evaluation."""
        number = max(number for number, other in enumerate(self.jobs) if other is job)
        self.board.stop.remote(number)

    def close(self) -> None:
        """End every task; what they are at is ended as KILLED. A cluster of our own ends, too."""
        if not self.ray.is_initialized():
            return
        flying = [ref for number, ref in self.refs.items() if self.jobs[number].reply is None]
        for ref in flying:
            self.ray.cancel(ref)
        if flying:
            _, left = self.ray.wait(flying, num_returns=len(flying), timeout=PATIENCE_SECONDS)
            for ref in left:
                self.ray.cancel(ref, force=True)
        self.ray.shutdown()


def _waits(job: "Job") -> bool:
    return job.needs is not None and job.needs.reply is None


def _largest(nodes: list[Record], resource: str) -> float:
    return max((node["Resources"].get(resource, 0.0) for node in nodes), default=0.0)


# ---------------------------------------------------------------- the cluster


def connect(address: str | None) -> Any:
    """Ray, connected to the cluster at the address, to that of RAY_ADDRESS, or to one started on this machine.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer or is of another version.
    """
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError("engine ray: Ray is not installed; install it with `pip install --editable '.[ray]'`, or use "
                        "engine local") from None  # fmt: skip
    where = f"ray_address {address}" if address else f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "/" in address:
        raise UserError(f"{where}: allowed: host:port of the cluster that this machine is in, auto or local")
    if address not in ("auto", "local"):
        _probe(address, where)
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    with _own_signals():
        for last in (False, False, True):
            try:
                ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
                break
            except Exception as error:  # a node that starts too slowly on a busy machine is a plain Exception
                ray.shutdown()
                if last or "timed out during startup" not in str(error):
                    raise UserError(f"{where if address != 'local' else 'engine ray'}: {str(error).strip()}") from None
    return ray


def _probe(address: str, where: str) -> None:
    """See within seconds whether somebody answers; Ray would insist for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: the cluster does not answer: {error}") from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; it stays ours."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """A request to end that comes while Ray waits is a bare KeyboardInterrupt; here it says again what it was."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        check()
        raise


def refuse_local_store(uri: str, nodes: list[Record]) -> None:
    """A store in a file is not for several machines: each would have its own, or break the locks of a shared one.

    uri: of the tracking store, empty = MLflow's default. nodes: what `ray.nodes()` says of those alive.

    Raises:
        UserError: the store is a file, and there are several machines.
    """
    machines = sorted({f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes})
    scheme, separator, _ = uri.partition("://")
    if len(machines) > 1 and (not separator or scheme.partition("+")[0] in ("sqlite", "file")):
        raise UserError(f"MLFLOW_TRACKING_URI is {f'a {scheme} store' if separator else 'not that of a server'}, and "
                        f"the Ray cluster has machines {', '.join(machines)}; allowed: a server that all of them reach "
                        "(http:// or https://) or its database (postgresql://, mysql://)")  # fmt: skip


# ---------------------------------------------------------------- in a process of Ray's

_work: "_RayWork | None" = None  # of this process, for one task after the other


def run_job(number: int, request: JobRequest, needed: JobDone | None, place: Place, board: Any) -> JobDone:
    """Do a job in a process of Ray's; returns its answer.

    needed: what the job that this one needs has answered.
    """
    import ray

    from pipeline.tracking.mlflow_run import STOPPED_SECONDS

    global _work  # noqa: PLW0603 (torch, mlflow and the data are loaded once a process)
    if isinstance(needed, JobFailed) and isinstance(request, TrainRun):
        request = request.alone()
    try:
        place.enter()
        with interruptible(), _own_interrupts():
            if ray.get(board.begin.remote(number, socket.gethostname())):
                time.sleep(SETTLE_SECONDS)
            if _work is None or _work.writer.process.poll() is not None:
                _work = _new_work()
            _work.listen(lambda news: ray.get(board.tell.remote(number, news)))
            return _work.do(request)
    except UserError as error:
        return JobFailed(error=str(error))
    except Interrupted as error:
        if _work:  # what it has yet to tell the store
            _work.writer.close(STOPPED_SECONDS)
        if error.exit_code != 128 + signal.SIGINT:  # not the launcher's `cancel`: this node is to go
            sys.stderr.flush()
            os._exit(error.exit_code)  # a lost process is what Ray retries, elsewhere
        raise


def _new_work() -> "_RayWork":
    from pipeline.tracking.mlflow_run import Writer

    return _RayWork(Writer(), lambda _: None, threading.Event())


class _RayWork(Work):
    """What a task does."""

    def listen(self, tell: Callable[[Evaluated], bool]) -> None:
        """Of the next job: `tell` takes news, and says whether the run is to stop."""
        self.stop.clear()
        self.reply = partial(self._tell, tell)

    def _tell(self, tell: Callable[[Evaluated], bool], news: Evaluated) -> None:
        if tell(news):
            self.stop.set()

    def train(self, request: TrainRun) -> RunTrained:
        """Train the run, or bring the one that an earlier try began to its end."""
        config = config_of(request.entry, request.config)
        key = config.fingerprint(self.make_task(request.entry, config).dataset.digest)
        begun = _begun(self.writer.find(run_key=key), request.tags["sweep_id"])
        if begun and begun.status == "FINISHED" and not request.watched:
            return RunTrained(run_id=begun.first_id, metrics=begun.metrics, steps=0)
        if begun:
            request = replace(request, run_id=begun.first_id, folder=begun.tags.get("run_dir"))
            _wait_for_end(begun)
        return super().train(request)


def _begun(found: "list[StoredRun]", sweep_id: str) -> "StoredRun | None":
    """Of the runs with a key, the one of the sweep; the finished one where there are several."""
    own = [run for run in found if run.tags.get("sweep_id") == sweep_id]
    return max(own, key=lambda run: (run.status == "FINISHED", run.start_time), default=None)


def _wait_for_end(run: "StoredRun") -> None:
    """Until the process that was at the run is gone; one that goes on is told by whoever opens the run."""
    end = time.monotonic() + LOST_SECONDS
    folder = Path(run.tags["run_dir"]) if "run_dir" in run.tags else None
    while folder and folder.is_dir() and alive_owner(folder) and time.monotonic() < end:
        time.sleep(0.5)
