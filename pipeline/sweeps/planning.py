"""`plan: true`: what a sweep would train and what it could find. Trains nothing and opens no run."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pipeline.comparison.answer import duration
from pipeline.comparison.decisions import differences
from pipeline.comparison.families import Family
from pipeline.config.strict_config import to_yaml
from pipeline.errors import UserError
from pipeline.maths.sequential import minimum_detectable_difference
from pipeline.names import CHECKPOINT_MEGABYTES, TRAIN_SECONDS
from pipeline.runtime.console import info
from pipeline.runtime.text import listed
from pipeline.sweeps.arm_runs import ArmRuns, RunResult
from pipeline.sweeps.data_check import check_data
from pipeline.sweeps.growth import grown
from pipeline.sweeps.jobs import Job, SweepContext, Workers
from pipeline.sweeps.local_workers import LocalWorkers
from pipeline.sweeps.prefix_sharing import prefix_groups
from pipeline.sweeps.requests import DataDigest, DigestData
from pipeline.sweeps.rounds import looks_at
from pipeline.sweeps.summary_run import equal_runs, stored_sweep
from pipeline.sweeps.sweep_plan import Arm, Plan, controls_of, with_overrides
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.stored_runs import tag_run

KEPT = 3  # checkpoints of a run: the last two and the best one


class Cost(NamedTuple):
    """What the missing runs of a sweep cost."""

    runs: int
    steps: int  # optimizer steps, those of a shared prefix once
    steps_alone: int  # optimizer steps if every run were trained alone
    checkpoints: int  # that the runs keep


def print_plan(plan: Plan, folder: Path) -> None:
    """Load the data, look into the tracking store, and print runs, steps, hours, disk space and what can be found."""
    if launcher := os.environ.get("MLFLOW_RUN_ID"):  # `mlflow run` has opened it
        tag_run(launcher, {"role": "launcher"})
    workers = LocalWorkers(1, folder / "plan")
    try:
        plan, data_digest = check_data(plan, workers)
        sweep_id, plan = plan.identity(data_digest), _with_searched_arm(plan)
        steps = _count_steps(plan, workers)
    finally:
        workers.close()
    stored, equal = stored_sweep(sweep_id), equal_runs(plan, data_digest)
    families = grown(() if plan.sweep.search else stored.families, plan)
    runs = ArmRuns(SweepContext(sweep_id, data_digest, plan, folder, workers, stored.by_key, equal))
    for arm in plan.arms[:1] if plan.sweep.search else plan.arms:
        for seed in plan.sweep.all_seeds:
            if run := runs.find(arm, seed)[0]:
                runs.results[arm.name, seed] = RunResult.of(run)
    info(f"plan of sweep {sweep_id}, of which nothing is trained now:")
    for line in describe(plan, families, runs, steps, equal.finished):
        info(f"- {line}")
    if remark := equal.note():
        info(f"- {remark}")


def describe(
    plan: Plan, families: Sequence[Family], runs: ArmRuns, steps: Mapping[str, int], finished: Sequence[StoredRun]
) -> Iterator[str]:
    """The plan in lines. steps: optimizer steps of each arm's run. finished: all runs on these data, oldest first."""
    looks = {name: looks_at(plan, name, family, runs) if plan.sweep.is_sequential else ()
             for family in families for name in family.arms}  # fmt: skip
    decided = {name: own[-1] for name, own in looks.items() if own and own[-1].decision}
    for name, look in decided.items():
        yield f"{name}: {look.decision} already, after {look.seeds} seeds"
    arms = [arm for arm in plan.arms if arm.role == "arm" and arm.name not in decided]
    costs = {seeds: cost(runs, arms, plan.sweep.all_seeds[:seeds], steps) for seeds in plan.sweep.looks}
    most = plan.sweep.looks[-1]
    first = next((seeds for seeds, own in costs.items() if own.runs), most)
    names = {first: f"up to the look at {first} seeds", most: f"at most, with {most} seeds"}
    names = names if first != most else {most: f"with {most} seeds"}

    def each(text: Callable[[Cost], str]) -> str:
        return ", ".join(f"{text(costs[seeds])} {name}" for seeds, name in names.items())

    if search := plan.sweep.search:
        trial_steps = steps[plan.baseline.name]
        yield f"search: up to {search.trials} trials of {trial_steps:,} steps each, before the runs that follow here"
    yield f"runs to train: {each(lambda own: f'{own.runs:,}')}; finished: {len(runs.results):,}"
    alone = " and ".join(f"{costs[seeds].steps_alone:,}" for seeds in names)
    yield f"optimizer steps: {each(lambda own: f'{own.steps:,}')}; without shared prefixes {alone}"
    if speed := _speed(finished):
        rate, run, jobs = *speed, plan.sweep.jobs
        times = each(lambda own: duration(own.steps / rate / jobs))
        yield f"time: {times}; {jobs} at a time, each with the {rate:.3g} steps a second of {run.name} ({run.run_id})"
    else:
        yield "time: unknown, since no finished run on these data has its speed logged"
    saved = [run for run in finished if CHECKPOINT_MEGABYTES in run.metrics]
    if saved:
        size, run = saved[-1].metrics[CHECKPOINT_MEGABYTES], saved[-1]
        disk = each(lambda own: f"{own.checkpoints * size / 1000:.2g}")
        yield f"GB of checkpoints: {disk}; each has the {size:.3g} MB of {run.name} ({run.run_id})"
    else:
        yield "GB of checkpoints: unknown, since no finished run on these data has saved one"
    yield from _detectable(plan, families, arms, runs, finished)


def cost(runs: ArmRuns, open_arms: Sequence[Arm], seeds: Sequence[int], steps: Mapping[str, int]) -> Cost:
    """Cost of the missing runs of the baseline, the open arms and their controls with these seeds.

    steps: optimizer steps of each arm's run.
    """
    plan = runs.plan
    names = {arm.name for arm in open_arms}
    arms = [arm for arm in plan.arms if arm.name in names or names & set(arm.control_of)]
    arms = [plan.baseline, *arms] if arms else []
    number, computed, alone, checkpoints = 0, 0, 0, 0
    for seed in seeds:
        missing = [arm for arm in arms if (arm.name, seed) not in runs.results]
        own = sum(steps[arm.name] for arm in missing)
        number, alone, computed = number + len(missing), alone + own, computed + own
        checkpoints += sum(
            KEPT + len(arm.config.checkpoint.keep_steps) for arm in missing if arm.config.checkpoint.enabled
        )
        for group in prefix_groups(missing, seed, runs.context.data_digest) if plan.sweep.share_prefix else ():
            if len(group.branch_steps) > 1:
                run_steps = steps[next(iter(group.branch_steps))]
                computed += group.computed_steps(run_steps) - run_steps * len(group.branch_steps)
    return Cost(number, computed, alone, checkpoints)


def _with_searched_arm(plan: Plan) -> Plan:
    """Add an arm in place of the one that the search will choose."""
    if not plan.sweep.search:
        return plan
    arm = replace(with_overrides(plan.baseline, plan.sweep.search.settings), name="the best trial")
    controls = controls_of([arm]) if plan.sweep.controls == "reweight" else []
    return replace(plan, arms=(plan.baseline, arm, *controls))


def _count_steps(plan: Plan, workers: Workers) -> dict[str, int]:
    """Optimizer steps of a run of each arm, if it does not stop early."""
    jobs: dict[str, Job] = {}  # key: settings that may decide the number
    names: dict[str, str] = {}  # arm -> key
    for arm in plan.arms:
        deciding = (*arm.config.data_keys, "training.", "model.")
        key = str({path: value for path, value in arm.config.decisive().items() if path.startswith(deciding)})
        request = DigestData(plan.sweep.task, to_yaml(arm.config), count=True)
        jobs.setdefault(key, Job(f"steps of {arm.name}", request))
        names[arm.name] = key
    workers.work(list(jobs.values()))
    for job in jobs.values():
        if not isinstance(job.reply, DataDigest):
            raise UserError(str(job.error))
    return {name: job.reply.steps for name, key in names.items() if isinstance((job := jobs[key]).reply, DataDigest)}


def _speed(finished: Sequence[StoredRun]) -> tuple[float, StoredRun] | None:
    """Optimizer steps a second of the newest run that has logged them, with its evaluations; None if there is none."""
    for run in reversed(finished):
        before = max(int(run.tags.get(tag, 0)) for tag in ("branch_step", "resumed_at"))  # steps of another process
        steps = run.metrics.get("global_step", -1.0) + 1 - before
        seconds = run.metrics.get(TRAIN_SECONDS, 0.0)
        if steps > 0 and seconds > 0:
            return steps / seconds, run
    return None


def _detectable(
    plan: Plan, families: Sequence[Family], arms: Sequence[Arm], runs: ArmRuns, finished: Sequence[StoredRun]
) -> Iterator[str]:
    """Minimum detectable difference of each arm, from the spread of its own differences or of other arms'."""
    metric, baseline = plan.metric, runs.values(plan.baseline.name, plan.metric)
    family_of = {name: family for family in families for name in family.arms}
    others = _spreads(finished, baseline, metric)
    lines: dict[str, list[str]] = {}
    for arm in arms:
        own, family = differences(runs.values(arm.name, metric), baseline).sd, family_of[arm.name]
        sd = own or (median(others) if others else None)
        if family.looks[-1] < 2:
            lines.setdefault("unknown, since one seed has no interval", []).append(arm.name)
            continue
        if not sd:
            lines.setdefault("unknown, since no arm has run with two seeds of this baseline", []).append(arm.name)
            continue
        smallest = minimum_detectable_difference(sd, family.looks, family.level)
        source = "its own seeds" if own else "other arms"
        lines.setdefault(f"{smallest:.2g}, from the spread of {source}", []).append(arm.name)
    for text, names in lines.items():
        yield f"minimum detectable difference in {metric} (80% power) of {listed(names)}: {text}"


def _spreads(finished: Sequence[StoredRun], baseline: Mapping[int, float], metric: str) -> list[float]:
    """Standard deviations of the differences to the baseline of all arms that have run on these data."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for run in finished:
        tags = run.tags
        known = tags.get("role") == "arm" and tags.get("seed", "").isdecimal()
        if known and math.isfinite(run.metrics.get(metric, math.nan)):
            arm = values.setdefault((tags.get("sweep_id", ""), tags.get("arm", "")), {})
            arm[int(tags["seed"])] = run.metrics[metric]
    return [sd for own in values.values() if (sd := differences(own, baseline).sd)]
