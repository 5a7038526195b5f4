"""Decisions on the arms: from all seeds of a fixed design, or from the last look of a sequential one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from pipeline.comparison.families import Family, arm_looks
from pipeline.maths.sequential import LEVEL, Look, decided_by_one_seed, decision_of, minimum_detectable_difference
from pipeline.maths.statistics import Paired, paired

Values = Mapping[int, float]  # seed -> metric
NO_SEED, ONE_SEED = "no shared seed: no verdict", "one seed: no verdict"
OPEN, UNDECIDED = "open", "not distinguishable"  # before and after the last scheduled look


@dataclass(frozen=True)
class Decided:
    """What the seeds say about an arm."""

    verdict: str
    difference: Paired
    level: float
    looks: tuple[Look, ...] = ()
    p_adjusted: float | None = None
    minimum_detectable: float | None = None
    deciding_seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Design:
    """How the seeds of a comparison were chosen, and what its verdicts hold for."""

    families: tuple[Family, ...] = ()
    other_families: int = 0
    margin: float | None = None
    chosen_by: str = ""  # what the seeds were chosen by, if something else is compared now

    @property
    def kind(self) -> Literal["fixed", "sequential"]:
        lists = [math.isclose(family.level, LEVEL / len(family.arms)) for family in self.families]
        return "fixed" if all(lists) else "sequential"

    def family_of(self, arm: str) -> Family | None:
        return next((family for family in self.families if arm in family.arms), None)


def design_of(runs: pd.DataFrame, metric: str, baseline: str) -> Design:
    """The design in the `attrs` of a frame of `load_runs`. Runs of other sources have a fixed design without family."""
    attrs = runs.attrs
    design = Design(attrs.get("families", ()), attrs.get("other_families", 0), attrs.get("margin"))
    own = runs.loc[runs["role"] == "baseline", "arm"]
    chosen_by = attrs.get("metric") if attrs.get("metric") != metric else ""
    if not design.families or (not chosen_by and set(own) == {baseline}):
        return design
    if design.kind == "sequential":
        return replace(design, chosen_by=chosen_by or "another baseline")
    return design if set(own) == {baseline} else Design()  # the family's arms were others


def decide(  # noqa: PLR0917
    values: Mapping[str, Values], baseline: Values, design: Design, mode: str,
    digests: Mapping[str, Mapping[int, str]], baseline_digests: Mapping[int, str],
) -> dict[str, Decided]:  # fmt: skip
    """Decide on every arm that is not a control.

    values: arm -> seed -> metric of a finished run. digests: arm -> seed -> digest of the run's last weights.
    """
    decided = {}
    for arm, own in values.items():
        family = design.family_of(arm)
        level = family.level if family else LEVEL / len(values)
        if design.kind == "fixed":
            decided[arm] = _fixed(own, baseline, level, mode)
        elif design.chosen_by or family is None:
            why = f"the seeds were chosen by {design.chosen_by}" if design.chosen_by else "the arm is in no family"
            decided[arm] = Decided(f"no verdict: {why}", differences(own, baseline, level), level)
        else:
            both = {seed: (digest, baseline_digests[seed]) for seed, digest in digests[arm].items()
                    if seed in baseline_digests}  # fmt: skip
            looks = arm_looks(own, baseline, family, "min" if mode == "min" else "max", design.margin, both)
            decided[arm] = _at_last_look(own, baseline, family, looks, mode, design.margin)
    return decided


def _fixed(own: Values, baseline: Values, level: float, mode: str) -> Decided:
    """Student's interval at the arm's level, over all shared seeds: better or worse if it excludes 0."""
    result = differences(own, baseline, level)
    if not result.n:
        return Decided(NO_SEED, result, level)
    if result.p is None or result.sd is None or result.low is None or result.high is None:
        return Decided(ONE_SEED, result, level)
    adjusted = min(1.0, result.p * LEVEL / level)
    verdict = decision_of(result.low, result.high, higher_is_better=mode == "max") or UNDECIDED
    minimum = minimum_detectable_difference(result.sd, (result.n,), level)
    return Decided(verdict, result, level, (), adjusted, minimum, _deciding_seeds(own, baseline, level, mode, None))


def _at_last_look(  # noqa: PLR0917
    own: Values, baseline: Values, family: Family, looks: Sequence[Look], mode: str, margin: float | None
) -> Decided:
    """The decision of the last look, over the first seeds that it counts; before the first look there is none."""
    last = looks[-1] if looks else None
    counted = own if last is None else {seed: own[seed] for seed in range(last.seeds)}
    result = differences(counted, baseline, family.level)
    if last is None or last.low is None:  # differences without variance have no interval
        result = replace(result, low=None, high=None)
    final = last is not None and last.seeds == family.looks[-1]
    verdict = (last and last.decision) or (UNDECIDED if final else OPEN)
    deciding = _deciding_seeds(counted, baseline, family.level, mode, margin) if last else ()
    return Decided(verdict, replace(result, p=None), family.level, tuple(looks), deciding_seeds=deciding)


def _deciding_seeds(own: Values, baseline: Values, level: float, mode: str, margin: float | None) -> tuple[int, ...]:
    """The seeds each of which alone brought about the decision."""
    shared = sorted(own.keys() & baseline.keys())
    if len(shared) < 2:
        return ()
    by_seed = [own[seed] - baseline[seed] for seed in shared]
    deciding = decided_by_one_seed(by_seed, level, higher_is_better=mode == "max", margin=margin)
    return tuple(shared[index] for index in deciding)


def differences(own: Values, baseline: Values, level: float = LEVEL) -> Paired:
    """Paired differences to the baseline over the shared seeds, with an interval at this two-sided level."""
    return paired([value - baseline[seed] for seed, value in own.items() if seed in baseline], 1 - level)
