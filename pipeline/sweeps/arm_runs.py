"""Jobs for the runs of a sweep's arms and seeds, and for the prefixes that runs share.

Runs of one seed that are identical until a gate opens start from one shared prefix (`runs/shared_prefix.py`).
"""

from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from pipeline.config.strict_config import to_yaml
from pipeline.names import COLORS, CONTROLLED, PREFIX_FILES
from pipeline.runtime.console import info, warn
from pipeline.sweeps.jobs import Job, SweepContext
from pipeline.sweeps.requests import PrefixTrained, RunTrained, TrainPrefix, TrainRun
from pipeline.sweeps.sweep_plan import Arm


class _Branch(NamedTuple):
    """The point at which a run branches from a shared prefix."""

    folder: Path  # contains the prefix's state
    step: int
    job: Job | None  # trains the prefix; None if an earlier start trained it


class ArmRuns:
    """Jobs for every arm and seed, and their results."""

    def __init__(self, context: SweepContext) -> None:
        self.context, self.plan = context, context.plan
        self.prefix_folder = context.folder / "prefixes"
        self.total = len(self.plan.sweep.seeds) * len(self.plan.arms)
        self.ended = 0
        self.failures: dict[tuple[str, int], str] = {}  # (arm, seed) -> error
        self.steps = 0  # optimizer steps of the runs that this start trained; a shared prefix counts for each run
        self.trained_steps = 0  # optimizer steps that this start computed; a shared prefix counts once
        self.saved_seconds = 0.0
        others = dict(zip((arm.name for arm in self.plan.arms[1:]), cycle(COLORS[1:]), strict=False))
        self.colors = {self.plan.baseline.name: COLORS[0]} | others  # for MLflow's charts and the report

    def jobs(self) -> list[Job]:
        """Jobs of the shared prefixes, followed by those of the unfinished runs."""
        prefixes: list[Job] = []
        self.run_jobs: list[Job] = []
        for seed in self.plan.sweep.seeds:
            missing = []
            for arm in self.plan.arms:
                run = self.context.stored.get(arm.at(seed).fingerprint(self.context.data_digest))
                if run and run.status == "FINISHED":
                    self._report_end(f"{arm.run_name(seed)}: finished before (run {run.run_id})")
                else:
                    missing.append(arm)
            branches = self._branches(missing, seed) if self.plan.sweep.share_prefix else {}
            prefixes += dict.fromkeys(branch.job for branch in branches.values() if branch.job)
            self.run_jobs += [self._run_job(arm, seed, branches.get(arm.name)) for arm in missing]
        return prefixes + self.run_jobs

    def report_cost(self, seconds: float) -> None:
        if self.steps:
            saved = max(0, self.steps - self.trained_steps)
            info(f"trained {self.trained_steps:,} optimizer steps for runs of {self.steps:,} in {seconds:.0f} s; "
                 f"shared prefixes saved {saved:,} steps, about {self.saved_seconds:.0f} s of training")  # fmt: skip

    def _branches(self, arms: list[Arm], seed: int) -> dict[str, _Branch]:
        """Map each arm that shares a prefix to its branch point."""
        groups: dict[str, list[tuple[Arm, int | None]]] = {}
        for arm in arms:
            config, step = arm.at(seed).shared_prefix()
            key = config.fingerprint(f"{self.context.data_digest} {config.tracking} {config.device}")
            groups.setdefault(key, []).append((arm, step))
        branches: dict[str, _Branch] = {}
        for key, group in groups.items():
            steps = sorted({step for _, step in group if step})
            sharing = [(arm, step) for arm, step in group if step != 0]
            folders = {step: self.prefix_folder / key[:16] / str(step) for step in steps}
            trained = all((folder / name).is_file() for folder in folders.values() for name in PREFIX_FILES)
            if not steps or (len(sharing) < 2 and not trained):
                continue
            job = None
            if not trained:
                config, _ = sharing[0][0].at(seed).shared_prefix()
                request = TrainPrefix(self.plan.sweep.task, to_yaml(config),
                                      {str(step): str(folder) for step, folder in folders.items()})  # fmt: skip
                job = Job(f"shared prefix s{seed}", request, finished=partial(self._prefix_ended, len(sharing)))
            branches |= {arm.name: _Branch(folders[step or steps[-1]], step or steps[-1], job) for arm, step in sharing}
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
        self.saved_seconds += (runs - 1) * job.reply.seconds
        info(f"{job.name}: {job.reply.steps} steps that {runs} runs share, {job.reply.seconds:.0f} s")

    def _run_job(self, arm: Arm, seed: int, branch: _Branch | None) -> Job:
        tags = {"arm_number": str(self.plan.arms.index(arm)), "role": arm.role,
                "mlflow.runColor": self.colors[arm.name]}  # fmt: skip
        if arm.control_of:
            tags["control_of"] = CONTROLLED.join(arm.control_of)
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
        steps, metric = job.reply.steps, self.plan.metric
        self.steps += steps
        self.trained_steps += steps - (min(steps, branch_step) if job.request.prefix else 0)
        value = job.reply.metrics.get(metric)
        result = f"{metric} {value:.4f}" if value is not None else f"no {metric}"
        self._report_end(f"{job.name}: {result}, {job.reply.seconds:.0f} s")

    def _report_end(self, line: str) -> None:
        self.ended += 1
        info(f"[{self.ended}/{self.total}] {line}")
