"""Drawings as inline SVG. An arm's elements have class `a<index>`, which gives colour and dashes and can be hidden."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.page.curves import Curve
from pipeline.page.markup import MINUS, Html, join, number, signed, tag

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 360, 216  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 24  # margins around a panel's plot
FINE = 10  # a curve's coordinates are whole tenths of pixels: half the size of decimals
FITTED_FROM = 0.1  # of the steps: the fall of the first tenth would flatten what sets arms apart later
FEWEST_FITTED = 10  # points of the longest curve; of fewer none is left outside
LOG_ABOVE = 50  # a panel whose values span more than this factor is drawn by their logarithm
FOREST_MARGIN = 9  # per cent of the forest plot's width on either side, for the labels of its axis
LONGEST_MDE = 3  # times everything else on the forest plot's axis: what is longer would squeeze it


@dataclass(frozen=True)
class Scale:
    """Values onto positions: `low` lies at `start`, `high` at `end`; with `log` by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        return float(self.all(np.array([value]))[0])

    def all(self, values: npt.NDArray[np.generic]) -> Floats:
        """Positions [N] of values [N]."""
        numbers, low, high = values.astype(np.float64), self.low, self.high
        if self.log:  # what is not positive lies far below
            numbers, low, high = np.log(np.maximum(numbers, low / 1e6)), math.log(low), math.log(high)
        positions: Floats = self.start + (numbers - low) / (high - low) * (self.end - self.start)
        return positions


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from low to high, evenly spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten from low to high, every so many that at most `most` + 1 are left."""
    powers = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    return [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / (most + 1)))]]


def tick_text(value: float, step: float, sign: bool = False) -> str:
    """A tick's label with the decimals that its axis' step needs; 20000 is 20k."""
    plus = "+" if sign and value > step / 2 else ""
    if abs(value) < step / 2:
        return "0"
    if step < 1e-5 or abs(value) >= 1e7:
        written = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    elif step >= 1000 or (step >= 100 and abs(value) >= 1e4):
        written = f"{value / 1000:g}k"
    else:
        written = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return plus + written.replace("-", MINUS)


def value_range(curves: Sequence[Curve], since: float) -> tuple[float, float, bool]:
    """(low, high, by logarithm) of a panel: from step `since` on, without the utmost 1% where there are many points."""
    kept = [values[curve.steps >= since] for curve in curves for values in (curve.low, curve.high)]
    if max(map(len, kept)) < FEWEST_FITTED:
        kept = [values for curve in curves for values in (curve.low, curve.high)]
    drawn = np.concatenate(kept)
    beyond = 0.005 if max(len(curve.steps) for curve in curves) > 100 else 0.0
    low, high = (float(value) for value in np.quantile(drawn, [beyond, 1 - beyond]))
    # where a curve ends is always shown
    ends = np.array([[curve.low[-1], curve.high[-1]] for curve in curves])
    low, high = min(low, float(ends.min())), max(high, float(ends.max()))
    if low > 0 and high / low > LOG_ABOVE:
        room = (high / low) ** 0.04
        return low / room, high * room, True
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room, False


def line_path(x: Floats, y: Floats) -> str:
    """A path through points [N] in pixels, in whole tenths, each relative to the one before."""
    points = np.rint(FINE * np.stack([x, y], 1)).astype(np.int64)
    moves = "".join(f"{dx if dx < 0 or not i else f' {dx}'}{dy if dy < 0 else f' {dy}'}"
                    for i, (dx, dy) in enumerate(np.diff(points, axis=0).tolist()))  # fmt: skip
    first_x, first_y = points[0].tolist()
    return f"M{first_x} {first_y}" + (f"l{moves}" if moves else "h0")  # a line of no length is a dot


def panel(
    name: str, curves: Mapping[int, Curve], gates: Mapping[int, int], steps: tuple[int, int], names: Sequence[str]
) -> Html:
    """A metric's curves over the global step.

    curves, gates: index of an arm -> its curve, the step at which its gate opens. steps: first and last of the axis.
    names: of the arms.
    """
    low, high, log = value_range(list(curves.values()), steps[0] + FITTED_FROM * (steps[1] - steps[0]))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x = Scale(steps[0], max(steps[1], steps[0] + 1), LEFT, right)
    y = Scale(low, high, bottom, TOP, log)
    grid = [*_x_axis(x, bottom), *_y_axis(y, right)]
    marks = [_gate(index, gates, x, bottom, names) for index in curves if index in gates]
    inner_x, inner_y = Scale(x.low, x.high, 0, right - LEFT), Scale(low, high, bottom - TOP, 0, log)
    drawn = tag(
        "svg", *(_curve(index, curve, inner_x, inner_y) for index, curve in curves.items()),
        x=LEFT, y=TOP, width=right - LEFT, height=bottom - TOP,
        viewBox=f"0 0 {FINE * (right - LEFT)} {FINE * (bottom - TOP)}", class_="plot",
    )  # fmt: skip
    ends = ", ".join(f"{names[index]} {number(float(curve.mean[-1]))}" for index, curve in curves.items())
    picture = tag(
        "svg", *grid, *marks, drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart",
        aria_label=f"{name} over global steps {steps[0]} to {steps[1]}. Last values: {ends}.",
        data_steps=f"{x.low!r} {x.high!r}", data_values=f"{low!r} {high!r}", data_log=log,
    )  # fmt: skip
    scale = tag("small", " log scale") if log else Html("")
    return tag("figure", tag("figcaption", name, scale), picture, class_="panel", data_metric=name)


def _x_axis(x: Scale, bottom: float) -> list[Html]:
    marks = ticks(x.low, x.high)
    step = marks[1] - marks[0] if len(marks) > 1 else 1
    lines = [tag("line", x1=x.at(m), x2=x.at(m), y1=bottom, y2=bottom + 4, class_="axis") for m in marks]
    labels = [tag("text", tick_text(m, step), x=x.at(m), y=bottom + 16, text_anchor=_anchor(x.at(m))) for m in marks]
    return [tag("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis"), *lines, *labels]


def _anchor(position: float) -> str:
    return "end" if position > WIDTH - 20 else "middle"


def _y_axis(y: Scale, right: float) -> list[Html]:
    few = [10.0 ** math.floor(math.log10(y.low)) * times for times in (1, 2, 5, 10, 20, 50)] if y.log else []
    marks = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high, 6)
    if y.log and len(marks) < 2:
        marks = [mark for mark in few if y.low <= mark <= y.high]
    step = marks[1] - marks[0] if len(marks) > 1 else 1
    lines = [tag("line", x1=LEFT, x2=right, y1=y.at(m), y2=y.at(m), class_="grid") for m in marks]
    labels = [
        tag("text", f"{m:g}" if y.log else tick_text(m, step), x=LEFT - 6, y=y.at(m) + 4, text_anchor="end")
        for m in marks
    ]
    return [*lines, *labels]


def _gate(index: int, gates: Mapping[int, int], x: Scale, bottom: float, names: Sequence[str]) -> Html:
    """A dashed line where the arm's gate opens; arms that share the step take turns, so that each is seen."""
    sharing = [other for other, step in gates.items() if step == gates[index]]
    at = x.at(gates[index])
    return tag(
        "line", tag("title", f"{names[index]}: gate opens at step {gates[index]}"),
        x1=at, x2=at, y1=TOP, y2=bottom, class_=f"gate a{index}", stroke_dasharray=f"5 {5 * len(sharing) - 2}",
        stroke_dashoffset=-5 * sharing.index(index),
    )  # fmt: skip


def _curve(index: int, curve: Curve, x: Scale, y: Scale) -> Html:
    """The mean as a line and, of several seeds, a band from the lowest to the highest."""
    across = x.all(curve.steps)
    height = y.start  # what lies outside is cut off: no need to write how far
    mean, low, high = (np.clip(y.all(part), -height, 2 * height) for part in (curve.mean, curve.low, curve.high))
    line = tag("path", d=line_path(across, mean), class_="line" if len(across) > 1 else "line dot")
    band = ""
    if curve.seeds > 1 and len(across) > 1:
        around = line_path(np.concatenate([across, across[::-1]]), np.concatenate([high, low[::-1]]))
        band = tag("path", d=f"{around}z", class_="band")
    return tag("g", Html(band), line, class_=f"a{index}", data_arm=str(index))


@dataclass(frozen=True)
class Effect:
    """A row of the forest plot: differences to the baseline."""

    index: int  # of the arm
    name: str
    mean: float
    low: float | None
    high: float | None
    seeds: Mapping[int, float]  # seed -> difference
    minimum_detectable: float | None
    label: Html  # what stands on its left
    figures: str  # what stands on its right
    control: bool


def forest_scale(effects: Sequence[Effect]) -> Scale:
    """Differences onto per cent of the width: zero, every interval and seed; +-minimum detectable within reason."""
    shown = [0.0] + [v for e in effects for v in (e.mean, e.low, e.high, *e.seeds.values()) if v is not None]
    low, high = min(shown), max(shown)
    reach = LONGEST_MDE * max(high, -low)
    wide = [e.minimum_detectable for e in effects if e.minimum_detectable and e.minimum_detectable <= reach]
    low, high = min([low, *(-w for w in wide)]), max([high, *wide])
    if low == high:
        low, high = -1.0, 1.0
    return Scale(low, high, FOREST_MARGIN, 100 - FOREST_MARGIN)


def forest(effects: Sequence[Effect], more_is_better: bool) -> Html:
    """Differences with intervals, a dot a seed, and what could have been found, over one axis with a line at zero."""
    x = forest_scale(effects)
    rows = [_row(effect, x) for effect in effects]
    sides = ("worse", "better") if more_is_better else ("better", "worse")
    directions = tag(
        "div", tag("span", f"← {sides[0]}"), tag("span", f"{sides[1]} →"), class_="directions"
    )  # fmt: skip
    axis = tag("div", tag("div", class_="who"), tag("div", _forest_axis(x), directions), class_="row axis-row")
    return tag("div", *rows, axis, class_="forest")


def _row(effect: Effect, x: Scale) -> Html:
    return tag(
        "div", tag("div", effect.label, class_="who"), tag("div", _effect(effect, x), class_="lane"),
        tag("div", effect.figures, class_="figures"), class_="row control" if effect.control else "row",
    )  # fmt: skip


def _per_cent(position: float) -> str:
    return f"{position:.2f}%"


def _effect(effect: Effect, x: Scale) -> Html:
    places = {"zero": 0.0, "mean": effect.mean, "low": effect.low, "high": effect.high}
    where = {name: _per_cent(x.at(value)) for name, value in places.items() if value is not None}
    parts = [tag("line", x1=where["zero"], x2=where["zero"], y1="0", y2="100%", class_="zero")]
    reach = effect.minimum_detectable
    if reach and x.low <= -reach and reach <= x.high:
        left, right = x.at(-reach), x.at(reach)
        title = tag("title", f"{effect.name}: a difference of ±{number(reach)} could have been found")
        parts.append(tag("rect", title, x=_per_cent(left), width=_per_cent(right - left), y="6", height="28",
                         class_="reach"))  # fmt: skip
        parts += [
            tag("line", x1=_per_cent(side), x2=_per_cent(side), y1="6", y2="34", class_="reach")
            for side in (left, right)
        ]
    marks = []
    if "low" in where and "high" in where:
        marks.append(tag("line", x1=where["low"], x2=where["high"], y1="17", y2="17", class_="interval"))
        marks += [
            tag("line", x1=where[end], x2=where[end], y1="12", y2="22", class_="interval") for end in ("low", "high")
        ]
    marks.append(tag("circle", cx=where["mean"], cy="17", r="5", class_="mean"))
    marks += [
        tag("circle", tag("title", f"{effect.name}, seed {seed}: {signed(difference)}"),
            cx=_per_cent(x.at(difference)), cy="30", r="3", class_="seed")
        for seed, difference in effect.seeds.items()
    ]  # fmt: skip
    described = f"{effect.name}: {effect.figures}; seeds " + ", ".join(
        f"{seed} {signed(difference)}" for seed, difference in effect.seeds.items()
    )
    return tag(
        "svg", *parts, tag("g", *marks, class_=f"a{effect.index}"), role="img", aria_label=described, class_="strip"
    )


def _forest_axis(x: Scale) -> Html:
    marks = ticks(x.low, x.high, 6)
    step = marks[1] - marks[0] if len(marks) > 1 else 1
    lines = [tag("line", x1=_per_cent(x.at(m)), x2=_per_cent(x.at(m)), y1="0", y2="5", class_="axis") for m in marks]
    labels = [
        tag("text", tick_text(m, step, sign=True), x=_per_cent(x.at(m)), y="19", text_anchor="middle") for m in marks
    ]
    ends = tag("line", x1=_per_cent(x.start), x2=_per_cent(x.end), y1="0", y2="0", class_="axis")
    return tag("svg", ends, join([*lines, *labels]), aria_hidden="true")
