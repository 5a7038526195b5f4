"""The answer of a comparison in a few plain sentences: which arm to use, and what to do about the others."""

import math
from collections.abc import Sequence

from pipeline.comparison import wording
from pipeline.comparison.decisions import OPEN, UNDECIDED
from pipeline.comparison.results import ArmResult, Comparison
from pipeline.maths import sequential
from pipeline.names import TRAIN_SECONDS
from pipeline.runtime.text import listed

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
BETTER, SLIGHTLY_BETTER = "better", "better, by less than the margin"
NAMES_SHOWN = 3


def answer(comparison: Comparison) -> str:
    """Which arm to use, what is still open and what would settle it, in one line."""
    return " ".join(sentences(comparison))


def sentences(comparison: Comparison) -> list[str]:
    """The sentences of the answer; the first says which arm to use. Only what the data say."""
    arms = wording.tested(comparison)
    if not arms:
        return ["There is no arm to compare with the baseline."]
    if all("no verdict" in arm.verdict for arm in arms):
        return _without_verdicts(arms)
    return [_choice(arms, comparison), *_doubts(arms), *_undecided(arms, comparison)]


def _without_verdicts(arms: Sequence[ArmResult]) -> list[str]:
    if all(arm.difference is None or arm.difference.n < 2 for arm in arms):
        return [wording.ONE_SEED, "Train at least three seeds of every arm."]
    return [f"There is {arms[0].verdict}."]


def _choice(arms: Sequence[ArmResult], comparison: Comparison) -> str:
    """The arms that are better, or the baseline."""
    better = [arm for arm in arms if arm.verdict == BETTER]
    undecided = [arm for arm in arms if arm.verdict in (OPEN, UNDECIDED)]
    if len(better) == 1:
        return f"Use {better[0].name}: it is better, {comparison.metric} {wording.estimate(better[0])}."
    if better:
        ordered = sorted(better, key=lambda arm: arm.difference.mean if arm.difference else 0.0,
                         reverse=comparison.mode == "max")  # fmt: skip
        names = [f"{arm.name} ({wording.difference(arm)})" for arm in ordered]
        return f"Use one of these, each is better than the baseline: {listed(names, NAMES_SHOWN)}."
    slightly = [arm for arm in arms if arm.verdict == SLIGHTLY_BETTER]
    if slightly:
        who = f"{_names(slightly)} {'is' if len(slightly) == 1 else 'are'}"
        return f"Keep the baseline: {who} better, but by less than the margin of {comparison.margin:g}."
    if len(undecided) == len(arms):
        return "Keep the baseline for now: no arm is decided yet." if _waiting(undecided, comparison) else (
            f"Keep the baseline: {'the arm is' if len(arms) == 1 else 'no arm is'} "
            f"{'not ' if len(arms) == 1 else ''}shown to be better.")  # fmt: skip
    return f"Keep the baseline{' for now' if undecided else ''}: no arm is better."


def _doubts(arms: Sequence[ArmResult]) -> list[str]:
    """Why an arm that is better may be no better with other seeds or on other rows."""
    better = [arm for arm in arms if arm.verdict == BETTER]
    dependent = [arm for arm in better if arm.deciding_seeds]
    nothing = [arm for arm in better if arm.new_rows and arm.new_rows.low <= 0 <= arm.new_rows.high]
    sentences = []
    if dependent:
        which = f"the verdict on {_names(dependent)} depends on a single seed"
        sentences.append(f"But {wording.one_seed_decides(dependent[0]) if len(better) == 1 else which}.")
    if nothing and nothing[0].new_rows:
        who = "it" if len(better) == 1 else _names(nothing)
        few = wording.deciding(nothing[0].new_rows)
        sentences.append(f"On new test rows {who} may be nothing: {few}, so test on more rows.")
    return sentences


def _waiting(arms: Sequence[ArmResult], comparison: Comparison) -> list[ArmResult]:
    """The open arms for which more seeds are scheduled."""
    return [arm for arm in arms if comparison.design == "sequential" and arm.verdict == OPEN]


def _undecided(arms: Sequence[ArmResult], comparison: Comparison) -> list[str]:
    """What to do about the arms that are not decided."""
    if comparison.design == "fixed":
        return _after_a_list(arms, comparison)
    sentences = []
    waiting = _waiting(arms, comparison)
    if waiting:
        again = f"start the sweep again, with {'it' if len(waiting) == 1 else 'them'} in its file, for more seeds"
        sentences.append(f"{_number(waiting)} still open: {again}.")
    same = [arm for arm in arms if arm.verdict == UNDECIDED and arm.difference
            and arm.difference.sd == arm.difference.mean == 0]  # fmt: skip
    ended = [arm for arm in arms if arm.verdict == UNDECIDED and arm not in same]
    if same:
        why = "the best weights may be from before the gate, where more seeds decide nothing"
        sentences.append(f"{_number(same)} equal to the baseline at every seed: {why}.")
    enough = {arm.name: seeds for arm in ended if (seeds := _enough_seeds(arm, comparison.margin))}
    settled, others = ([arm for arm in ended if (arm.name in enough) == known] for known in (True, False))
    if settled:
        most = max(enough.values())
        cost = _cost(settled, most, comparison)
        stay = "difference stays as it is" if len(settled) == 1 else "differences stay as they are"
        sentences.append(
            f"{_number(settled)} not distinguishable: raise seeds.most to {most} ({cost}), which decides if the {stay}."
        )
    if others:
        remedy = "" if comparison.margin else "; set a margin if so small a difference does not matter"
        sentences.append(
            f"{_number(others)} too close to the baseline for {sequential.LOOKS[-1]} seeds to tell{remedy}."
        )
    return sentences


def _after_a_list(arms: Sequence[ArmResult], comparison: Comparison) -> list[str]:
    undecided = [arm for arm in arms if arm.verdict == UNDECIDED]
    if not undecided:
        return []
    seeds = len(comparison.seeds)
    most = next((look for look in sequential.LOOKS if look > max(seeds, 12)), sequential.LOOKS[-1])
    return [
        f"{_number(undecided)} not distinguishable with {wording.count(seeds, 'seed')}: a sweep with "
        f"seeds: {{first: 3, most: {most}}} trains more until they are decided."
    ]


def _names(arms: Sequence[ArmResult]) -> str:
    return listed([arm.name for arm in arms], NAMES_SHOWN)


def _number(arms: Sequence[ArmResult]) -> str:
    """The arm's name, or the number of arms, with the verb."""
    if len(arms) == 1:
        return f"{arms[0].name} is"
    number = NUMBERS[len(arms)] if len(arms) < len(NUMBERS) else str(len(arms))
    return f"{number.capitalize()} arms are"


def _enough_seeds(arm: ArmResult, margin: float | None) -> int | None:
    """The first look that would decide the arm if mean and spread of its differences stayed as they are."""
    result = arm.difference
    if result is None or not result.sd or arm.level is None:
        return None
    for seeds in (look for look in sequential.LOOKS if look > result.n):
        half = sequential.half_width(result.sd, seeds, arm.level)
        if abs(result.mean) > half or (margin and abs(result.mean) + half < margin):
            return seeds
    return None


def _cost(arms: Sequence[ArmResult], most: int, comparison: Comparison) -> str:
    """Hours of training until `most` seeds, from the mean time of the runs that are there."""
    column, names = f"metrics.{TRAIN_SECONDS}", {arm.name for arm in arms}
    controls = [arm for arm in comparison.arms if any(arm.controls(name) for name in names)]
    missing = sum(max(0, most - len(arm.values)) for arm in (comparison.arms[0], *arms, *controls))
    seconds = comparison.runs[column].astype(float).mean() if column in comparison.runs else math.nan
    return f"{missing} runs" + ("" if math.isnan(seconds) else f", {duration(missing * seconds)} of training")


def duration(seconds: float) -> str:
    """A rounded time, in the largest unit that fits at least twice."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {round(seconds / size)} {unit}"
    return f"about {wording.count(max(1, round(seconds)), 'second')}"
