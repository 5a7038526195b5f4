"""Jobs of a sweep, and the interface of the workers that run them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config.strict_config import to_yaml
from pipeline.sweeps.adoption import EqualRuns
from pipeline.sweeps.requests import Evaluated, JobDone, JobFailed, JobRequest, TrainRun
from pipeline.sweeps.sweep_plan import Arm, Plan
from pipeline.tracking.messages import StoredRun


@dataclass(eq=False)
class Job:
    """A request to a worker, and its reply."""

    name: str
    request: JobRequest
    needs: "Job | None" = None  # job that must have ended first, successfully or not
    finished: Callable[["Job"], None] = lambda job: None  # noqa: ARG005
    reply: JobDone | None = None

    @property
    def error(self) -> str | None:
        return self.reply.error if isinstance(self.reply, JobFailed) else None


OnProgress = Callable[[Job, Evaluated], None]


def ready_jobs(jobs: Sequence[Job], running: Collection[Job]) -> list[Job]:
    """The jobs that can be started now."""
    return [job for job in jobs if job.reply is None and job not in running
            and (job.needs is None or job.needs.reply is not None)]  # fmt: skip


class Workers(Protocol):
    """Processes that run jobs, on this machine or on a Ray cluster."""

    def work(self, jobs: list[Job], on_progress: OnProgress | None = None) -> None:
        """Run all jobs, in order where dependencies allow it. A job's `finished` callback may append to the list.

        on_progress: called with each evaluation of a watched run.
        """

    def stop(self, job: Job) -> None:
        """End the run of this job after its next evaluation."""

    def close(self) -> None:
        """Stop every worker; runs that are still training get the status KILLED."""


@dataclass(frozen=True)
class SweepContext:
    """Data shared by all parts of a running sweep."""

    id: str
    data_digest: str
    plan: Plan
    folder: Path
    workers: Workers
    stored: Mapping[str, StoredRun]  # run key -> run of this sweep in the tracking store when this start began
    equal_runs: EqualRuns | None = None  # of other sweeps

    def train_request(
        self, arm: Arm, seed: int, tags: Mapping[str, str], *, prefix: Path | None = None, watched: str | None = None
    ) -> TrainRun:
        """Request to train an arm with a seed, or to resume its run if the tracking store has one."""
        config = arm.at(seed)
        run = self.stored.get(config.fingerprint(self.data_digest))
        return TrainRun(
            self.plan.sweep.task,
            to_yaml(config),
            arm.run_name(seed),
            {"sweep_id": self.id, "arm": arm.name, **tags},
            tuple(sorted(arm.overridden)),
            run_id=run.run_id if run else None,
            folder=run.tags.get("run_dir") if run else None,
            prefix=str(prefix) if prefix else None,
            watched=watched,
        )
