"""Messages between a trainer and its writer process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from pipeline.names import CANONICAL, ORIGINAL

# ---------------------------------------------------------------- requests of the trainer


@dataclass(frozen=True)
class RunRequest:
    """How a run is to be opened."""

    name: str = ""
    experiment: str | None = None  # None = MLflow's own choice
    run_id: str | None = None  # a run that is there already (`mlflow run` opens one)
    launcher: str | None = None  # a run that only started this one
    tags: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False  # `run_id` was begun before and goes on: points that are there are not written again
    folder: str | None = None  # of a resumed run; None = below the output folder


@dataclass(frozen=True)
class OpenRun:
    """Open a run. Reply: `OpenedRun`."""

    run: RunRequest
    output_dir: str
    offline: bool  # begin without a store that does not answer
    last_steps: Mapping[str, int] = field(default_factory=dict)  # of each metric in a resumed run's journal


@dataclass(frozen=True)
class AbandonRun:
    """End the run that was opened as FAILED: its journal was never begun. No reply."""

    failure: str


@dataclass(frozen=True)
class FollowRun:
    """Deliver the run's journal as it grows. Reply: a `DeliveryReport`, after `FinishRun`."""

    folder: str
    owner: int  # the fencing number of the run's owner
    claim: str  # its tag `owner`: who has another one has taken the run over


@dataclass(frozen=True)
class FinishRun:
    """Deliver the rest of the journal. Replies: `Progress` or `Away` now and then, and the `DeliveryReport`."""

    status: str | None  # the run's end, where the journal does not hold it
    failure: str = ""
    patience: float = 0.0  # seconds without any progress after which the rest stays in the journal
    hurry: bool = False  # `patience` is all the time there is


@dataclass(frozen=True)
class FindRuns:
    """Find the run with this id, a deleted one too, or those with this key that were forked from there (or not).

    Reply: `FoundRuns`.
    """

    run_id: str | None = None
    run_key: str | None = None
    fork: str | None = None


@dataclass(frozen=True)
class FetchArtifact:
    """Copy an artifact of a run into the folder. Reply: `FetchedArtifact`."""

    run_id: str
    file: str
    folder: str


# ---------------------------------------------------------------- replies of the writer


@dataclass(frozen=True)
class OpenedRun:
    """What the journal says of the run, and how it was opened."""

    run_id: str
    name: str
    experiment: str | None
    tags: Mapping[str, str]
    tracking_uri: str
    online: bool  # the store has it
    ahead: bool = False  # the store had points that the journal had lost
    reason: str = ""  # why it is not online


@dataclass(frozen=True)
class Progress:
    """How far the delivery of the rest is."""

    delivered: int  # records
    of: int
    busy: float = 0.0  # seconds that the next call may take


@dataclass(frozen=True)
class Away:
    """The store takes nothing just now, and the end of the run was asked for."""

    waiting: int  # records that it does not have
    reason: str


@dataclass(frozen=True)
class TakenOver:
    """The store says that another process writes the run: nothing more is delivered."""

    by: str


@dataclass(frozen=True)
class DeliveryReport:
    """How the delivery of a run ended."""

    problems: tuple[str, ...]  # what the store refused
    waiting: int  # records that the store does not have
    reason: str  # why they wait
    run_id: str  # in the store
    cpu_seconds: float  # of the writer process so far


@dataclass(frozen=True)
class StoredRun:
    """A run as the store has it: no points but the last of each metric."""

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
        """The id that it began with, maybe elsewhere or before the store had it."""
        return self.tags.get(ORIGINAL, self.run_id)

    @property
    def canonical_params(self) -> dict[str, str]:
        """The params; a key that was typed in another spelling has its canonical text in a tag."""
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
