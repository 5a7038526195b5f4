"""Layout of the page's charts: scales, ticks, paths. `charts.html` draws them as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.comparison import number_format as shown
from pipeline.comparison.number_format import MINUS
from pipeline.comparison.page.curves import Curve
from pipeline.comparison.results import ArmResult
from pipeline.maths.arrays import Floats
from pipeline.maths.statistics import Paired

WIDTH, HEIGHT = 360, 216  # size of a panel in pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 24  # margins around a panel's plot
FINE = 10  # units per pixel: integer tenths of a pixel make paths half as long as decimals
FITTED_FROM = 0.1  # share of the steps that value axes ignore: the initial fall would flatten later differences
FEWEST_FITTED = 10  # if the longest curve has fewer points after the ignored steps, the axis is fitted to all steps
LOG_ABOVE = 50  # a panel whose values span more than this factor has a logarithmic axis
FOREST_MARGIN = 9  # margin on each side of the forest plot, in per cent of its width, for the axis labels
WIDEST_BAND = 3  # a grey band wider than this multiple of the other values is not drawn


@dataclass(frozen=True)
class Scale:
    """Maps values to positions: `low` to `start` and `high` to `end`; logarithmically if `log`."""

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
        if self.log:  # values <= 0 are placed far below the plot
            numbers, low, high = np.log(np.maximum(numbers, low / 1e6)), math.log(low), math.log(high)
        positions: Floats = self.start + (numbers - low) / (high - low) * (self.end - self.start)
        return positions


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from low to high, spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most six powers of ten from low to high, evenly spaced."""
    powers = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    return [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 6))]]


def tick_text(value: float, step: float, sign: bool = False) -> str:
    """A tick's label with as many decimals as the step needs; 20000 becomes 20k."""
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
    """Range (low, high, log) of a panel's value axis, from step `since` on and without the outer 1% of long curves."""
    kept = [values[curve.steps >= since] for curve in curves for values in (curve.low, curve.high)]
    if max(map(len, kept)) < FEWEST_FITTED:
        kept = [values for curve in curves for values in (curve.low, curve.high)]
    drawn = np.concatenate(kept)
    beyond = 0.005 if max(len(curve.steps) for curve in curves) > 100 else 0.0
    low, high = (float(value) for value in np.quantile(drawn, [beyond, 1 - beyond]))
    # the ends of curves are always shown
    ends = np.array([[curve.low[-1], curve.high[-1]] for curve in curves])
    low, high = min(low, float(ends.min())), max(high, float(ends.max()))
    if low > 0 and high / low > LOG_ABOVE:
        room = (high / low) ** 0.04
        return low / room, high * room, True
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room, False


def line_path(x: Floats, y: Floats) -> str:
    """SVG path through points [N] in pixels. Coordinates are integer tenths, relative to the previous point."""
    points = np.rint(FINE * np.stack([x, y], 1)).astype(np.int64)
    moves = "".join(f"{dx if dx < 0 or not i else f' {dx}'}{dy if dy < 0 else f' {dy}'}"
                    for i, (dx, dy) in enumerate(np.diff(points, axis=0).tolist()))  # fmt: skip
    first_x, first_y = points[0].tolist()
    return f"M{first_x} {first_y}" + (f"l{moves}" if moves else "h0")  # a line of zero length is drawn as a dot


class Tick(NamedTuple):
    """A tick mark of an axis."""

    at: float
    label: str
    anchor: str = "middle"


class Gate(NamedTuple):
    """A dashed line where an arm's gate opens."""

    arm: int
    step: int
    name: str
    at: float
    gap: int  # dashes of arms that share the step alternate, so that each is visible
    offset: int


class Line(NamedTuple):
    """An arm's curve as SVG paths: the mean and, with several seeds, a band from the lowest to the highest value."""

    arm: int
    mean: str
    band: str
    dot: bool  # the curve has a single point


@dataclass(frozen=True)
class Panel:
    """A metric's curves over the global step."""

    metric: str
    steps: tuple[float, float]  # range of the x axis
    values: tuple[float, float]
    log: bool
    x: Sequence[Tick]
    y: Sequence[Tick]
    gates: Sequence[Gate]
    lines: Sequence[Line]
    zero: float | None  # height of the line at zero, for differences to the baseline
    last: str  # the last value of each curve, as text


def panel(  # noqa: PLR0917
    name: str,
    curves: Mapping[int, Curve],
    gates: Mapping[int, int],
    steps: tuple[int, int],
    names: Sequence[str],
    difference: bool = False,
) -> Panel:
    """Lay out a metric's curves, or those of its differences to the baseline.

    curves: index of an arm -> its curve. gates: index of an arm -> step at which its gate opens. steps: first and last
    step of the x axis. names: the arms' names.
    """
    low, high, log = value_range(list(curves.values()), steps[0] + FITTED_FROM * (steps[1] - steps[0]))
    if difference:
        low, high, log = min(low, 0.0), max(high, 0.0), False
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    x, y = Scale(steps[0], max(steps[1], steps[0] + 1), LEFT, right), Scale(low, high, bottom, TOP, log)
    inner_x, inner_y = Scale(x.low, x.high, 0, right - LEFT), Scale(low, high, bottom - TOP, 0, log)
    return Panel(
        name,
        (x.low, x.high),
        (low, high),
        log,
        [tick._replace(anchor="end") if tick.at > WIDTH - 20 else tick for tick in axis_ticks(x, 5)],
        axis_ticks(y, sign=difference),
        [_gate(index, gates, x, names) for index in curves if index in gates],
        [_line(index, curve, inner_x, inner_y) for index, curve in curves.items()],
        y.at(0.0) if difference else None,
        ", ".join(f"{names[index]} {_last_value(curve, difference)}" for index, curve in curves.items()),
    )


def _last_value(curve: Curve, difference: bool) -> str:
    mean, low, high = (float(values[-1]) for values in (curve.mean, curve.low, curve.high))
    if difference:
        return shown.estimate(mean, low, high) if curve.seeds > 1 else shown.signed(mean, shown.decimals(None, mean))
    return shown.number(mean, shown.decimals((high - low) / 2, mean))


def axis_ticks(scale: Scale, most: int = 6, sign: bool = False) -> list[Tick]:
    if scale.log:
        marks = log_ticks(scale.low, scale.high)
        if len(marks) < 2:
            few = [10.0 ** math.floor(math.log10(scale.low)) * times for times in (1, 2, 5, 10, 20, 50)]
            marks = [mark for mark in few if scale.low <= mark <= scale.high]
        return [Tick(scale.at(mark), f"{mark:g}") for mark in marks]
    marks = ticks(scale.low, scale.high, most)
    step = marks[1] - marks[0] if len(marks) > 1 else 1
    return [Tick(scale.at(mark), tick_text(mark, step, sign)) for mark in marks]


def _gate(index: int, gates: Mapping[int, int], x: Scale, names: Sequence[str]) -> Gate:
    step = gates[index]
    sharing = [other for other, other_step in gates.items() if other_step == step]
    return Gate(index, step, names[index], x.at(step), 5 * len(sharing) - 2, -5 * sharing.index(index))


def _line(index: int, curve: Curve, x: Scale, y: Scale) -> Line:
    across = x.all(curve.steps)
    height = y.start  # the plot is clipped, so coordinates far outside it can be limited
    mean, low, high = (np.clip(y.all(part), -height, 2 * height) for part in (curve.mean, curve.low, curve.high))
    band = ""
    if curve.seeds > 1 and len(across) > 1:
        band = line_path(np.concatenate([across, across[::-1]]), np.concatenate([high, low[::-1]])) + "z"
    return Line(index, line_path(across, mean), band, dot=len(across) == 1)


@dataclass(frozen=True)
class Effect:
    """A row of the forest plot: an arm and its differences to the baseline."""

    index: int
    arm: ArmResult
    paired: Paired
    seeds: Mapping[int, float]  # seed -> difference


def forest_scale(effects: Sequence[Effect], margin: float | None = None) -> Scale:
    """Scale in per cent of the width, covering 0, all intervals and seeds, and the grey bands."""
    numbers = [v for e in effects for v in (e.paired.mean, e.paired.low, e.paired.high, *e.seeds.values())]
    numbers += [end for e in effects if (new := e.arm.new_rows) for end in (new.low, new.high)]
    drawn = [0.0, *(number for number in numbers if number is not None)]
    low, high = min(drawn), max(drawn)
    reach = WIDEST_BAND * max(high, -low)
    wide = [width for e in effects if (width := e.arm.minimum_detectable or margin) and width <= reach]
    low, high = min([low, *(-w for w in wide)]), max([high, *wide])
    if low == high:
        low, high = -1.0, 1.0
    return Scale(low, high, FOREST_MARGIN, 100 - FOREST_MARGIN)


def pixels(value: float) -> str:
    """Format a length with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def per_cent(position: float) -> str:
    return f"{position:.2f}%"
