"""What a sweep asks of its workers, local processes or Ray tasks, and what they reply."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

# ---------------------------------------------------------------- requests: a job each, but for `StopRun`


@dataclass(frozen=True)
class LoadModules:
    """Import what takes seconds, while another worker loads the data. Reply: `JobDone`."""


@dataclass(frozen=True)
class DigestData:
    """Compute the digest of the data that the config names, and see which metrics they define. Reply: `DataDigest`."""

    entry: str  # the task's entry point
    config: str  # YAML
    metrics: Mapping[str, str] = field(default_factory=dict)  # key of the sweep's settings -> metric


@dataclass(frozen=True)
class TrainPrefix:
    """Train what several runs share, and leave its states in the folders. Reply: `PrefixTrained`."""

    entry: str
    config: str
    folders: Mapping[str, str]  # optimizer step -> folder of the state there


@dataclass(frozen=True)
class TrainRun:
    """Train one run. Replies: `Evaluated` after each evaluation if `watched`, and `RunTrained`."""

    entry: str
    config: str
    name: str
    tags: Mapping[str, str]
    given: tuple[str, ...]  # dotted keys that the sweep's file overrides
    run_id: str | None = None  # a run that was begun before
    folder: str | None = None  # its folder
    prefix: str | None = None  # folder of the state where it branches from a shared prefix
    watched: str | None = None  # a validation metric

    def alone(self) -> "TrainRun":
        """The same run without its prefix."""
        tags = {name: value for name, value in self.tags.items() if name not in ("branched_from", "branch_step")}
        return replace(self, prefix=None, tags=tags)


@dataclass(frozen=True)
class StopRun:
    """End the run at hand after its next evaluation. No reply of its own."""


# ---------------------------------------------------------------- replies


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a watched run, on the way."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class JobDone:
    """A job is done."""

    seconds: float = 0.0  # that it took
    leaving: bool = False  # the worker takes no further job, and ends


@dataclass(frozen=True, kw_only=True)
class JobFailed(JobDone):
    error: str


@dataclass(frozen=True, kw_only=True)
class DataDigest(JobDone):
    digest: str
    undefined: Mapping[str, str]  # key -> why its metric is undefined


@dataclass(frozen=True, kw_only=True)
class PrefixTrained(JobDone):
    steps: int


@dataclass(frozen=True, kw_only=True)
class RunTrained(JobDone):
    run_id: str
    metrics: Mapping[str, float]
    steps: int
    stopped: bool = False  # by `StopRun`


JobRequest = LoadModules | DigestData | TrainPrefix | TrainRun
WorkerRequest = JobRequest | StopRun
WorkerReply = Evaluated | JobDone | JobFailed | DataDigest | PrefixTrained | RunTrained
WORKER_REQUESTS: tuple[type[WorkerRequest], ...] = get_args(WorkerRequest)
WORKER_REPLIES: tuple[type[WorkerReply], ...] = get_args(WorkerReply)
