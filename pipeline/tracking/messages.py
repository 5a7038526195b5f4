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
    experiment: str | None = None  # None: MLflow's own choice
    run_id: str | None = None  # an existing run (`mlflow run` opens one)
    launcher: str | None = None  # a run that only started this one
    tags: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False  # an earlier start began `run_id`: points that it logged are not logged again
    folder: str | None = None  # of a resumed run; None: below the output folder


@dataclass(frozen=True)
class OpenRun:
    """Open a run. Reply: `OpenedRun`."""

    run: RunRequest
    output_dir: str
    offline: bool  # begin without a store that does not answer
    last_steps: Mapping[str, int] = field(default_factory=dict)  # of each metric in a resumed run's journal


@dataclass(frozen=True)
class AbandonRun:
    """End the opened run as FAILED: its journal was never begun. No reply."""

    failure: str


@dataclass(frozen=True)
class FollowRun:
    """Deliver the run's journal as it grows. Reply: a `DeliveryReport`, after `FinishRun`."""

    folder: str
    owner: int  # number of the run's owner
    claim: str  # the run's tag `owner`, which another process replaces if it takes the run over


@dataclass(frozen=True)
class FinishRun:
    """Deliver the rest of the journal. Replies: `Progress` or `Away` now and then, then the `DeliveryReport`."""

    status: str | None  # final status, if the journal does not contain it
    failure: str = ""
    patience: float = 0.0  # seconds without progress after which the rest stays in the journal
    hurry: bool = False  # `patience` is the total time


@dataclass(frozen=True)
class FindRuns:
    """Find the run with this id, even if deleted, or the runs with this key and fork. Reply: `FoundRuns`."""

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
    """How a run was opened; the journal's record `open` is made of it."""

    run_id: str
    name: str
    experiment: str | None
    tags: Mapping[str, str]
    tracking_uri: str
    online: bool  # the store has the run
    ahead: bool = False  # the store had points that the journal had lost
    reason: str = ""  # why the run is not online


@dataclass(frozen=True)
class Progress:
    """Progress in delivering the rest."""

    delivered: int  # records
    of: int
    busy: float = 0.0  # seconds that the next call may take


@dataclass(frozen=True)
class Away:
    """The store accepts nothing at the moment."""

    waiting: int  # records that it does not have
    reason: str


@dataclass(frozen=True)
class TakenOver:
    """According to the store another process writes the run: nothing more is delivered."""

    by: str


@dataclass(frozen=True)
class DeliveryReport:
    """How the delivery of a run ended."""

    problems: tuple[str, ...]  # refused by the store
    waiting: int  # records that the store does not have
    reason: str  # why they wait
    run_id: str  # in the store
    cpu_seconds: float  # of the writer process so far


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
        """The id that the run began with, maybe in another store or before the store had it."""
        return self.tags.get(ORIGINAL, self.run_id)

    @property
    def canonical_params(self) -> dict[str, str]:
        """The params in canonical spelling, which is in a tag if the user typed another one."""
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
DeliveryNews = Progress | Away | TakenOver
WriterReply = OpenedRun | DeliveryNews | DeliveryReport | FoundRuns | FetchedArtifact | Refused
WRITER_REQUESTS: tuple[type[WriterRequest], ...] = get_args(WriterRequest)
WRITER_REPLIES: tuple[type[WriterReply], ...] = get_args(WriterReply)
