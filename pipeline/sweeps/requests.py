"""Requests that a sweep sends to its workers (local processes or Ray tasks), and the workers' replies."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

# ---------------------------------------------------------------- requests: each is a job, except `StopRun`


@dataclass(frozen=True)
class DigestData:
    """Compute the digest of the config's data and check which metrics the data define. Reply: `DataDigest`."""

    entry: str  # the task's entry point
    config: str  # YAML
    metrics: Mapping[str, str] = field(default_factory=dict)  # config key that names a metric -> metric
    count: bool = False  # count the optimizer steps too


@dataclass(frozen=True)
class TrainPrefix:
    """Train a shared prefix and save its state at the given steps. Reply: `PrefixTrained`."""

    entry: str
    config: str
    folders: Mapping[str, str]  # optimizer step -> folder of the state at that step


@dataclass(frozen=True)
class TrainRun:
    """Train one run. Replies: `Evaluated` after each evaluation if `watched`, and `RunTrained`."""

    entry: str
    config: str
    name: str
    tags: Mapping[str, str]
    overridden: tuple[str, ...]  # dotted keys that the sweep file overrides
    run_id: str | None = None  # the run to resume
    folder: str | None = None  # folder of the run to resume
    prefix: str | None = None  # folder with the shared prefix's state from which the run starts
    watched: str | None = None  # validation metric to report after each evaluation

    def without_prefix(self) -> "TrainRun":
        tags = {name: value for name, value in self.tags.items() if name not in ("branched_from", "branch_step")}
        return replace(self, prefix=None, tags=tags)


@dataclass(frozen=True)
class StopRun:
    """End the current run after its next evaluation. There is no separate reply."""


# ---------------------------------------------------------------- replies


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a watched run that is still training."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class JobDone:
    seconds: float = 0.0  # duration of the job


@dataclass(frozen=True, kw_only=True)
class JobFailed(JobDone):
    error: str


@dataclass(frozen=True, kw_only=True)
class DataDigest(JobDone):
    digest: str
    metric: str  # evaluation.metric, with the default for these data
    undefined: Mapping[str, str]  # key -> why its metric is undefined on these data
    steps: int = 0  # optimizer steps of a run, if they were to be counted


@dataclass(frozen=True, kw_only=True)
class PrefixTrained(JobDone):
    steps: int


@dataclass(frozen=True, kw_only=True)
class RunTrained(JobDone):
    run_id: str
    metrics: Mapping[str, float]
    steps: int
    weights_digest: str = ""  # of the last weights
    stopped: bool = False  # ended early by `StopRun`


JobRequest = DigestData | TrainPrefix | TrainRun
WorkerRequest = JobRequest | StopRun
WorkerReply = Evaluated | JobFailed | DataDigest | PrefixTrained | RunTrained
WORKER_REQUESTS: tuple[type[WorkerRequest], ...] = get_args(WorkerRequest)
WORKER_REPLIES: tuple[type[WorkerReply], ...] = get_args(WorkerReply)
