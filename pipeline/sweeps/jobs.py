"""What a sweep asks to be trained, and who trains it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.config.strict_config import to_yaml
from pipeline.sweeps.requests import Evaluated, JobDone, JobFailed, JobRequest, TrainRun
from pipeline.sweeps.sweep_plan import Arm, Plan

if TYPE_CHECKING:
    from pipeline.tracking.messages import StoredRun


@dataclass
class Job:
    """What a worker is asked, and what came of it."""

    name: str
    request: JobRequest
    needs: "Job | None" = None
    finished: Callable[["Job"], None] = lambda job: None  # noqa: ARG005
    reply: JobDone | None = None

    @property
    def failed(self) -> str | None:
        return self.reply.error if isinstance(self.reply, JobFailed) else None


class Workers(Protocol):
    """Processes that do jobs: on this machine or on a Ray cluster."""

    def work(self, jobs: list[Job], on_progress: Callable[[Job, Evaluated], None] = ...) -> None:
        """Do the jobs, in their order as far as what they need allows. `on_progress` gets a watched run's evaluations.

        `jobs` may grow meanwhile, by a job's `finished`.
        """

    def stop(self, job: Job) -> None:
        """Let the run of this job end after its next evaluation."""

    def close(self) -> None:
        """End every worker; what they are at is ended as KILLED."""


@dataclass(frozen=True)
class SweepContext:
    """What every part of a running sweep needs to know."""

    id: str
    digest: str  # of the data
    entry: str  # the entry point that trains
    plan: Plan
    folder: Path
    workers: Workers


def train_request(
    entry: str, arm: Arm, seed: int, tags: Mapping[str, str], begun: "StoredRun | None", *, watched: str | None = None
) -> TrainRun:
    """The request to train an arm with a seed. begun: the run of it that is in the store, which goes on."""
    return TrainRun(
        entry, to_yaml(arm.at(seed)), arm.run_name(seed), tags, tuple(sorted(arm.overridden)),
        run_id=begun.run_id if begun else None, folder=begun.tags.get("run_dir") if begun else None, watched=watched,
    )  # fmt: skip
