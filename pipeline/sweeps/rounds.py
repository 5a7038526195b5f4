"""Rounds of a sweep: train the seeds of a look, look at the arms, and go on with those that are open."""

from collections.abc import Sequence
from typing import Literal

from pipeline.comparison.families import Family, arm_looks
from pipeline.comparison.number_format import estimate
from pipeline.comparison.selection import default_mode
from pipeline.maths.sequential import Look
from pipeline.runtime.console import info
from pipeline.runtime.text import listed
from pipeline.sweeps.arm_runs import ArmRuns
from pipeline.sweeps.sweep_plan import Arm, Plan

SHOWN = 12  # names of open arms in a line


def train_in_rounds(plan: Plan, families: Sequence[Family], runs: ArmRuns) -> dict[str, tuple[Look, ...]]:
    """Train the runs that the answer needs; returns the looks at each arm.

    At each look, its seeds of the baseline, the open arms and their controls are trained. An arm that is decided gets
    no more seeds, and neither does one of which a seed has failed: it cannot be looked at.
    """
    family_of = {name: family for family in families for name in family.arms}
    open_arms = [arm for arm in plan.arms if arm.role == "arm"]
    looks: dict[str, tuple[Look, ...]] = {arm.name: () for arm in open_arms}
    most = plan.sweep.looks[-1]
    for seeds in sorted({look for arm in open_arms for look in family_of[arm.name].looks if look <= most}):
        due = [arm for arm in open_arms if seeds in family_of[arm.name].looks]
        if not due:
            continue
        runs.train(_with_baseline_and_controls(plan, due), range(seeds))
        for arm in due:
            looks[arm.name] = looks_at(plan, arm.name, family_of[arm.name], runs)
        unseen = [arm for arm in due if not looks[arm.name] or looks[arm.name][-1].seeds < seeds]
        decided = [arm for arm in due if arm not in unseen and looks[arm.name][-1].decision]
        open_arms = [arm for arm in open_arms if arm not in unseen and arm not in decided]
        _report(seeds, [(arm.name, looks[arm.name][-1]) for arm in decided], open_arms, unseen)
    if open_arms:
        info(f"not distinguishable with {most} seeds: {_names(open_arms)}; a larger seeds.most continues the sweep")
    return looks


def looks_at(plan: Plan, arm: str, family: Family, runs: ArmRuns) -> tuple[Look, ...]:
    """The looks at an arm so far, from the finished runs."""
    values = {name: runs.values(name, plan.metric) for name in (arm, plan.baseline.name)}
    digests = {seed: (runs.results[arm, seed].weights_digest, runs.results[plan.baseline.name, seed].weights_digest)
               for seed in values[arm].keys() & values[plan.baseline.name].keys()}  # fmt: skip
    digests = {seed: pair for seed, pair in digests.items() if all(pair)}
    return arm_looks(values[arm], values[plan.baseline.name], family, mode_of(plan), plan.sweep.margin, digests)


def mode_of(plan: Plan) -> Literal["max", "min"]:
    """Whether a higher (max) or a lower (min) value of the sweep's metric is better, as comparisons decide it."""
    evaluated = {(arm.config.evaluation.metric, arm.config.evaluation.mode) for arm in plan.arms}
    return "min" if (plan.sweep.mode or default_mode(plan.metric, evaluated)) == "min" else "max"


def _with_baseline_and_controls(plan: Plan, due: Sequence[Arm]) -> list[Arm]:
    names = {arm.name for arm in due}
    return [arm for arm in plan.arms if arm.role == "baseline" or arm.name in names or names & set(arm.control_of)]


def _report(seeds: int, decided: Sequence[tuple[str, Look]], open_arms: Sequence[Arm], unseen: Sequence[Arm]) -> None:
    parts = [f"{name} is {look.decision}" + ("" if look.low is None else f" {estimate(look.mean, look.low, look.high)}")
             for name, look in decided]  # fmt: skip
    parts += [f"open: {_names(open_arms)}"] if open_arms else []
    parts += [f"not looked at, since a seed failed: {_names(unseen)}"] if unseen else []
    info(f"look at {seeds} seeds: {'; '.join(parts)}")


def _names(arms: Sequence[Arm]) -> str:
    return listed([arm.name for arm in arms], SHOWN)
