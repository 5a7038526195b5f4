"""Layout of the first picture: each arm's interval against the number of seeds. `looks.html` draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.comparison.decisions import OPEN, UNDECIDED
from pipeline.comparison.number_format import estimate
from pipeline.comparison.page.charts import Scale, Tick, axis_ticks
from pipeline.comparison.results import ArmResult, Comparison

WIDTH, HEIGHT = 240, 140  # size of an arm's chart in pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 6, 8, 20  # margins around the plot
INSET = 14  # between the plot's sides and the first and last look
WIDEST = 2  # the axis reaches this multiple of the arms' median interval: a far worse arm must not flatten the others
MOST_COLUMNS, FEWEST_COLUMNS = 6, 4
ORDER = ("better", "better, by less than the margin", OPEN, UNDECIDED, "equal within the margin",
         "identical", "worse, by less than the margin", "worse")  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """A look: positions in pixels, clipped to the plot."""

    seeds: int
    x: float
    mean: float
    outside: str  # arrow to a mean that lies outside the plot, else ""
    ends: tuple[float, float] | None  # low and high; None without an interval
    caps: Sequence[float]  # ends that lie inside the plot
    last: bool
    text: str


@dataclass(frozen=True)
class LookChart:
    """An arm's looks so far, and the scheduled ones as ticks of its axis."""

    index: int
    arm: ArmResult
    marks: Sequence[Mark]
    new_rows: tuple[float, float] | None  # ends of the interval on new rows, at the last look
    x: Sequence[Tick]
    y: Sequence[Tick]
    zero: float
    margin: tuple[float, float] | None  # top and bottom of the band

    @property
    def summary(self) -> str:
        return "; ".join(mark.text for mark in self.marks) or "no look yet"


def look_charts(comparison: Comparison) -> list[LookChart]:
    """A chart per arm of a sequential design, those to act on first; none for a fixed design, or without looks."""
    schedules = {arm: family.looks for family in comparison.families for arm in family.arms}
    arms = [(index, arm) for index, arm in enumerate(comparison.arms)
            if arm.role == "arm" and arm.name in schedules and arm.verdict in ORDER]  # fmt: skip
    if comparison.design == "fixed" or not arms:
        return []
    low, high = value_range([arm for _, arm in arms], comparison.margin)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    ordered = sorted(arms, key=lambda item: ORDER.index(item[1].verdict))
    return [_chart(index, arm, schedules[arm.name], y, comparison.margin) for index, arm in ordered]


def columns(charts: int) -> int:
    """Charts beside each other on a wide screen: rows of equal length."""
    return max(FEWEST_COLUMNS, math.ceil(charts / math.ceil(charts / MOST_COLUMNS)))


def value_range(arms: Sequence[ArmResult], margin: float | None) -> tuple[float, float]:
    """Range of the value axis that all arms share: 0, the margin, and the last intervals, up to a limit.

    The arms to choose from are shown whole.
    """
    ends = [(new.low, new.high) if (new := arm.new_rows) else (result.low, result.high)
            for arm in arms if (result := arm.difference) and result.low is not None]  # fmt: skip
    known = [(low, high) for low, high in ends if low is not None and high is not None]
    reaches = sorted(max(abs(low), abs(high)) for low, high in known)
    limit = WIDEST * reaches[len(reaches) // 2] if reaches else 0.0
    chosen = [arm.difference for arm in arms if arm.verdict == "better" and arm.difference]
    limit = max([limit, *(abs(end) for result in chosen for end in (result.low, result.high) if end is not None)])
    band = margin or 0.0
    low = min(-band, *(max(low, -limit) for low, _ in known), 0.0)
    high = max(band, *(min(high, limit) for _, high in known), 0.0)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _chart(index: int, arm: ArmResult, schedule: Sequence[int], y: Scale, margin: float | None) -> LookChart:
    x = Scale(0, max(1, len(schedule) - 1), LEFT + INSET, WIDTH - RIGHT - INSET)
    at = {seeds: x.at(place) for place, seeds in enumerate(schedule)}
    marks = []
    for look in arm.looks:
        ends = None if look.low is None or look.high is None else (look.low, look.high)
        marks.append(Mark(
            look.seeds,
            at[look.seeds],
            _inside(y, look.mean),
            "▼" if look.mean < y.low else "▲" if look.mean > y.high else "",
            (_inside(y, ends[0]), _inside(y, ends[1])) if ends else None,
            [y.at(end) for end in ends or () if y.low <= end <= y.high],
            look is arm.looks[-1],
            f"{look.seeds} seeds: {estimate(look.mean, look.low, look.high, arm.mean)}",
        ))  # fmt: skip
    new = arm.new_rows if marks else None
    return LookChart(
        index,
        arm,
        marks,
        (_inside(y, new.low), _inside(y, new.high)) if new else None,
        [Tick(place, str(seeds)) for seeds, place in at.items()],
        axis_ticks(y, 5, sign=True),
        y.at(0.0),
        (y.at(margin), y.at(-margin)) if margin else None,
    )


def _inside(y: Scale, value: float) -> float:
    return y.at(min(max(value, y.low), y.high))
