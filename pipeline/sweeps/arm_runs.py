"""Jobs for the runs of a sweep's arms and seeds, and for the prefixes that runs share.

Runs of one seed that are identical until a gate opens start from one shared prefix (`runs/shared_prefix.py`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from pipeline.comparison.membership import Membership
from pipeline.config.strict_config import to_yaml
from pipeline.names import COLORS, CONTROLLED, PREFIX_FILES, WEIGHTS_DIGEST
from pipeline.runtime.console import info, warn
from pipeline.sweeps.jobs import Job, SweepContext
from pipeline.sweeps.prefix_sharing import prefix_groups
from pipeline.sweeps.requests import PrefixTrained, RunTrained, TrainPrefix, TrainRun
from pipeline.sweeps.sweep_plan import Arm
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.stored_runs import tag_run


class _Branch(NamedTuple):
    """The point at which a run branches from a shared prefix."""

    folder: Path  # contains the prefix's state
    step: int
    job: Job | None  # trains the prefix; None if an earlier start trained it


class RunResult(NamedTuple):
    """What a finished run contributes to the comparison."""

    metrics: Mapping[str, float]
    weights_digest: str  # of the last weights; "" in runs of older versions

    @classmethod
    def of(cls, run: StoredRun) -> "RunResult":
        return cls(run.metrics, run.tags.get(WEIGHTS_DIGEST, ""))


class ArmRuns:
    """Jobs for runs of arms with seeds, and their results."""

    def __init__(self, context: SweepContext) -> None:
        self.context, self.plan = context, context.plan
        self.prefix_folder = context.folder / "prefixes"
        self.total, self.ended = 0, 0  # numbers of runs
        self.results: dict[tuple[str, int], RunResult] = {}  # (arm, seed) -> result of its finished run
        self.failures: dict[tuple[str, int], str] = {}  # (arm, seed) -> error
        self.steps = 0  # optimizer steps of the runs that this start trained; a shared prefix counts for each run
        self.trained_steps = 0  # optimizer steps that this start computed; a shared prefix counts once
        others = dict(zip((arm.name for arm in self.plan.arms[1:]), cycle(COLORS[1:]), strict=False))
        self.colors = {self.plan.baseline.name: COLORS[0]} | others  # for MLflow's charts and the report

    def train(self, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        """Train the missing runs of these arms with these seeds. A run that has failed is not tried again."""
        self.context.workers.work(self.jobs(arms, seeds))

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Map each seed of an arm to the metric of its finished run, where that is a finite number."""
        values = {seed: result.metrics.get(metric, math.nan) for (name, seed), result in self.results.items()
                  if name == arm}  # fmt: skip
        return {seed: value for seed, value in values.items() if math.isfinite(value)}

    def jobs(self, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
        """Jobs of the shared prefixes, followed by those of the unfinished runs."""
        prefixes: list[Job] = []
        self.run_jobs: list[Job] = []
        ended = self.results.keys() | self.failures.keys()
        due = {seed: [arm for arm in arms if (arm.name, seed) not in ended] for seed in seeds}
        self.total += sum(map(len, due.values()))
        for seed, seed_arms in due.items():
            missing = [arm for arm in seed_arms if not self._finished_before(arm, seed)]
            branches = self._branches(missing, seed) if self.plan.sweep.share_prefix else {}
            prefixes += dict.fromkeys(branch.job for branch in branches.values() if branch.job)
            self.run_jobs += [self._run_job(arm, seed, branches.get(arm.name)) for arm in missing]
        return prefixes + self.run_jobs

    def report_cost(self, seconds: float) -> None:
        if self.steps:
            saved = max(0, self.steps - self.trained_steps)
            info(f"trained {self.trained_steps:,} optimizer steps for runs of {self.steps:,} in {seconds:.0f} s; "
                 f"shared prefixes saved {saved:,} steps, {saved / self.steps:.0%}")  # fmt: skip

    def find(self, arm: Arm, seed: int) -> tuple[StoredRun | None, str]:
        """The finished run of an arm and seed, of an earlier start or of another sweep, and which of the two."""
        config, digest = arm.at(seed), self.context.data_digest
        if run := self.context.stored.get(config.fingerprint(digest)):
            return (run if run.status == "FINISHED" else None), "finished before"
        equal = self.context.equal_runs
        return equal.adopt(arm.run_name(seed), config, digest) if equal else None, "adopted"

    def _finished_before(self, arm: Arm, seed: int) -> bool:
        """Whether the run has finished already. It is tagged with its place in this sweep, unless it has that tag."""
        run, how = self.find(arm, seed)
        if run is None:
            return False
        tags = self._membership(arm).to_tags(self.context.id)
        if not tags.items() <= run.tags.items():
            tag_run(run.run_id, tags)
        self.results[arm.name, seed] = RunResult.of(run)
        self._report_end(f"{arm.run_name(seed)}: {how} (run {run.run_id})")
        return True

    def _membership(self, arm: Arm) -> Membership:
        return Membership(arm.name, arm.role, CONTROLLED.join(arm.control_of), self.plan.arms.index(arm))

    def _branches(self, arms: list[Arm], seed: int) -> dict[str, _Branch]:
        """Map each arm that shares a prefix to its branch point."""
        branches: dict[str, _Branch] = {}
        for group in prefix_groups(arms, seed, self.context.data_digest):
            folders = {step: self.prefix_folder / group.key[:16] / str(step) for step in group.saved_steps}
            trained = all((folder / name).is_file() for folder in folders.values() for name in PREFIX_FILES)
            if len(group.branch_steps) < 2 and not trained:
                continue
            job = None
            if not trained:
                request = TrainPrefix(self.plan.sweep.task, to_yaml(group.config),
                                      {str(step): str(folder) for step, folder in folders.items()})  # fmt: skip
                finished = partial(self._prefix_ended, len(group.branch_steps))
                job = Job(f"shared prefix s{seed}", request, finished=finished)
            branches |= {name: _Branch(folders[step], step, job) for name, step in group.branch_steps.items()}
        return branches

    def _prefix_ended(self, runs: int, job: Job) -> None:
        if job.error:
            warn(f"{job.name}: {job.error}; its runs are trained alone")
            for run_job in self.run_jobs:
                if run_job.needs is job and isinstance(run_job.request, TrainRun):
                    run_job.request = run_job.request.without_prefix()
            return
        assert isinstance(job.reply, PrefixTrained)
        self.trained_steps += job.reply.steps
        info(f"{job.name}: {job.reply.steps} steps that {runs} runs share, {job.reply.seconds:.0f} s")

    def _run_job(self, arm: Arm, seed: int, branch: _Branch | None) -> Job:
        place = self._membership(arm)
        tags = place.to_tags(self.context.id)
        tags |= {"arm_number": str(place.arm_number), "role": arm.role, "mlflow.runColor": self.colors[arm.name]}
        if place.control_of:
            tags["control_of"] = place.control_of
        if branch:
            tags |= {"branched_from": f"prefix {branch.folder.parent.name}", "branch_step": str(branch.step)}
        request = self.context.train_request(arm, seed, tags, prefix=branch.folder if branch else None)
        finished = partial(self._run_ended, (arm.name, seed), branch.step if branch else 0)
        return Job(request.name, request, branch.job if branch else None, finished)

    def _run_ended(self, arm_and_seed: tuple[str, int], branch_step: int, job: Job) -> None:
        if job.error:
            self.failures[arm_and_seed] = job.error
            self._report_end(f"{job.name}: failed: {job.error}")
            return
        assert isinstance(job.request, TrainRun)
        assert isinstance(job.reply, RunTrained)
        self.results[arm_and_seed] = RunResult(job.reply.metrics, job.reply.weights_digest)
        steps, metric = job.reply.steps, self.plan.metric
        self.steps += steps
        self.trained_steps += steps - (min(steps, branch_step) if job.request.prefix else 0)
        value = job.reply.metrics.get(metric)
        result = f"{metric} {value:.4f}" if value is not None else f"no {metric}"
        self._report_end(f"{job.name}: {result}, {job.reply.seconds:.0f} s")

    def _report_end(self, line: str) -> None:
        self.ended += 1
        info(f"[{self.ended}/{self.total}] {line}")
