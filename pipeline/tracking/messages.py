"""Messages between a trainer and its writer process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from pipeline.names import CANONICAL, ORIGINAL

# ---------------------------------------------------------------- requests of the trainer


@dataclass(frozen=True)
class RunRequest:
    """How to open a run."""

    name: str = ""
    experiment: str | None = None  # None: MLflow's default
    run_id: str | None = None  # an existing run, such as the one that `mlflow run` opened
    launcher: str | None = None  # a run that only launched this one
    tags: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False  # continue `run_id`; points that it has are not logged again
    folder: str | None = None  # folder of a resumed run; None: a subfolder of the output folder


@dataclass(frozen=True)
class OpenRun:
    """Open a run. Reply: `OpenedRun`."""

    run: RunRequest
    output_dir: str
    offline: bool  # begin the run even if the store does not answer
    last_steps: Mapping[str, int] = field(default_factory=dict)  # last step of each metric in a resumed journal


@dataclass(frozen=True)
class AbandonRun:
    """Mark the opened run as FAILED, since its journal was never begun. No reply."""

    failure: str


@dataclass(frozen=True)
class FollowRun:
    """Deliver the run's journal as it grows. Reply: a `DeliveryReport`, after `FinishRun`."""

    folder: str
    owner: int  # owner number
    claim: str  # a process that takes the run over replaces it in the run's tag `owner`


@dataclass(frozen=True)
class FinishRun:
    """Deliver the rest of the journal. Replies: any of `Progress` and `StoreUnavailable`, then a `DeliveryReport`."""

    status: str | None  # final status, if the journal does not contain it
    failure: str = ""
    patience: float = 0.0  # seconds without progress after which the rest stays in the journal
    hurry: bool = False  # `patience` limits the total time


@dataclass(frozen=True)
class FindRuns:
    """Find the run with this id, including a deleted one, or runs by run key and fork. Reply: `FoundRuns`."""

    run_id: str | None = None
    run_key: str | None = None
    fork: str | None = None


@dataclass(frozen=True)
class FetchArtifact:
    """Copy a run's artifact into the folder. Reply: `FetchedArtifact`."""

    run_id: str
    file: str
    folder: str


# ---------------------------------------------------------------- replies of the writer


@dataclass(frozen=True)
class OpenedRun:
    """Reply to `OpenRun`: the opened run, from which the trainer writes the journal's `open` record."""

    run_id: str
    name: str
    experiment: str | None
    tags: Mapping[str, str]
    tracking_uri: str
    online: bool  # the run exists in the store
    ahead: bool = False  # the store had points that the journal had lost
    reason: str = ""  # why the run is not online


@dataclass(frozen=True)
class Progress:
    """Progress of the delivery at a run's end."""

    delivered: int  # number of records
    of: int
    busy: float = 0.0  # seconds that the next call may take


@dataclass(frozen=True)
class StoreUnavailable:
    """The store is unreachable or accepts no calls at the moment."""

    waiting: int  # number of records not delivered yet
    reason: str


@dataclass(frozen=True)
class TakenOver:
    """The run's claim in the store shows that the run was taken over; delivery has ended."""

    by: str


@dataclass(frozen=True)
class DeliveryReport:
    """Outcome of a run's delivery."""

    problems: tuple[str, ...]  # messages about records that the store refused
    waiting: int  # number of records that are not delivered
    reason: str  # why they are not delivered
    run_id: str  # id of the run in the store
    cpu_seconds: float  # CPU time of the writer process so far


@dataclass(frozen=True)
class StoredRun:
    """A run in the store, with the last value of each metric."""

    run_id: str
    name: str
    status: str
    start_time: int  # milliseconds since the epoch
    artifact_uri: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    deleted: bool = False

    @property
    def first_id(self) -> str:
        """The run's original id, which differs from `run_id` if the run began offline or in another store."""
        return self.tags.get(ORIGINAL, self.run_id)

    @property
    def canonical_params(self) -> dict[str, str]:
        """The params in canonical spelling, taken from tags where the user typed another spelling."""
        typed = {key.removeprefix(CANONICAL): text for key, text in self.tags.items() if key.startswith(CANONICAL)}
        return {**self.params, **typed}


@dataclass(frozen=True)
class FoundRuns:
    runs: tuple[StoredRun, ...]  # oldest first


@dataclass(frozen=True)
class FetchedArtifact:
    path: str


@dataclass(frozen=True)
class Refused:
    """The store refused a request, or does not answer."""

    error: str


WriterRequest = OpenRun | AbandonRun | FollowRun | FinishRun | FindRuns | FetchArtifact
DeliveryNews = Progress | StoreUnavailable | TakenOver
WriterReply = OpenedRun | DeliveryNews | DeliveryReport | FoundRuns | FetchedArtifact | Refused
WRITER_REQUESTS: tuple[type[WriterRequest], ...] = get_args(WriterRequest)
WRITER_REPLIES: tuple[type[WriterReply], ...] = get_args(WriterReply)
