"""Wording and number formats of a comparison, shared by the terminal, Markdown, the page and MLflow's run note."""

import math
from collections import Counter
from collections.abc import Sequence

from pipeline.comparison.results import ArmResult, Comparison
from pipeline.maths import statistics as stats
from pipeline.maths.statistics import Paired

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
SEEDS_SHOWN = 8

# Column headings. Their line breaks are kept in a terminal and on the page.
ARM = "arm"
MEAN = "mean ± sd"
BEST = "best on\nvalidation"
DIFFERENCE = "difference"
INTERVAL = "95% interval\n(unadjusted)"
P = "p (Holm)"
DETECTABLE = "minimum\ndetectable\ndifference"
VERDICT = "verdict"
CONTROL = "against its control,\n95% interval (unadjusted)"
NEW_ROWS = "on new rows,\n95% interval (unadjusted)"

# Legends
METHOD = """Verdict: paired t test over seeds on {metric}, p adjusted by Holm for {arms}.
95% intervals are over seeds and not adjusted for the number of arms.
Minimum detectable difference: the smallest true difference that this test would find with 80% probability."""
ONE_SEED = "One seed cannot tell a better setting from luck."
NEW_ROWS_METHOD = "On new rows: the interval for other seeds and other test rows like these, taken as independent."
SIDES = "Side effects: untested differences to the baseline; *: the 95% interval over seeds excludes 0."


class MetricFormat:
    """Formats all numbers of a metric with as many decimals as its differences need."""

    def __init__(self, differences: Sequence[Paired | None]) -> None:
        numbers = [number for paired in differences if paired for number in (paired.mean, paired.sd or 0.0)]
        sizes = sorted(abs(number) for number in numbers if number and math.isfinite(number))
        typical = sizes[len(sizes) // 2] if sizes else 1.0
        self.decimals = min(8, max(4, 1 - math.floor(math.log10(typical))))

    def number(self, value: float | None) -> str:
        if value is None or math.isnan(value):
            return NOTHING
        return f"{value:.{self.decimals}f}".replace("-", MINUS)

    def signed(self, value: float | None) -> str:
        """Format a difference with its sign; exactly 0 has neither sign nor decimals."""
        if not value:
            return NOTHING if value is None else "0"
        return ("+" if value > 0 else "") + self.number(value)

    def spread(self, mean: float | None, sd: float | None) -> str:
        return self.number(mean) + ("" if sd is None else f" ± {self.number(sd)}")

    def interval(self, low: float | None, high: float | None) -> str:
        return NOTHING if low is None or high is None else f"{self.signed(low)} to {self.signed(high)}"

    def estimate(self, mean: float, low: float | None, high: float | None) -> str:
        """A difference with its interval in parentheses."""
        return f"{self.signed(mean)} ({'one seed' if low is None else self.interval(low, high)})"


def metric_format(comparison: Comparison, side: str | None = None) -> MetricFormat:
    """The format of the primary metric, or of a side metric."""
    return MetricFormat([arm.side.get(side) if side else arm.difference for arm in comparison.arms])


def probability(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def short(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:.4g}".replace("-", MINUS)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def verdict(role: str, difference: Paired, p_adjusted: float | None, mode: str) -> str:
    """The verdict on an arm; "" for the baseline."""
    if role != "arm":
        return "control" if role == "control" else ""
    if difference.n == 0:
        return "no shared seed: no verdict"
    return stats.verdict(difference.mean, p_adjusted, higher_is_better=mode == "max")


def shown_verdict(arm: ArmResult) -> str:
    return arm.verdict or "baseline"


def direction(comparison: Comparison) -> str:
    return f"{'higher' if comparison.mode == 'max' else 'lower'} is better"


def facts(comparison: Comparison) -> list[str]:
    """Task, metric, seeds, baseline and data."""
    seeds = comparison.seeds
    numbers = ", ".join(map(str, seeds[:SEEDS_SHOWN])) + (", ..." if len(seeds) > SEEDS_SHOWN else "")
    parts = [
        comparison.task,
        f"{comparison.metric} ({direction(comparison)})",
        f"{count(len(seeds), 'seed')} ({numbers})",
        f"against {comparison.baseline}",
        f"data {comparison.data_digest[:12]}" if comparison.data_digest else "",
    ]
    return [part for part in parts if part]


def tally(comparison: Comparison) -> str:
    """Number of arms with each verdict, as text."""
    verdicts = Counter(
        "without a verdict" if arm.verdict.endswith("no verdict") else arm.verdict
        for arm in comparison.arms if arm.role == "arm"
    )  # fmt: skip
    order = ("better", "worse", "not distinguishable", "without a verdict")
    parts = [f"{verdicts[verdict]} {verdict}" for verdict in order if verdict in verdicts]
    return f"{count(verdicts.total(), 'arm')}: {', '.join(parts)}" if parts else "no arm beside the baseline"


def method(comparison: Comparison) -> str:
    """Explanation of the verdicts and intervals, one sentence per line."""
    arms = count(sum(arm.role == "arm" for arm in comparison.arms), "arm")
    lines = METHOD.format(metric=comparison.metric, arms=arms)
    alone = any(arm.difference and arm.difference.n == 1 for arm in comparison.arms)
    return f"{lines}\n{ONE_SEED}" if alone else lines


def legend(comparison: Comparison) -> str:
    """The method, followed by explanations of the optional columns."""
    lines = [method(comparison)]
    lines += [NEW_ROWS_METHOD] if any(arm.new_rows for arm in comparison.arms) else []
    lines += [SIDES] if comparison.side_metrics else []
    return "\n".join(lines)


def sentence(arm: ArmResult, comparison: Comparison) -> str:
    """A sentence that begins with an arm's verdict (`shown_verdict`), followed by the numbers behind it."""
    numbers, difference = metric_format(comparison), arm.difference
    words = shown_verdict(arm) + (f" of {arm.control_of}" if arm.role == "control" and arm.control_of else "")
    seeds = difference.n if difference else len(arm.values)
    parts = [f"{words}, {seeds} seeds" if seeds > 1 else words, f"mean {numbers.spread(arm.mean, arm.spread)}"]
    if difference and difference.n:
        parts.append(_difference(difference, numbers))
    if arm.p_adjusted is not None:
        parts.append(f"p {probability(arm.p_adjusted)} (Holm)")
    if arm.minimum_detectable is not None:
        parts.append(f"minimum detectable difference {numbers.number(arm.minimum_detectable)}")
    if arm.against_control and arm.against_control.n:
        control = next((f" {other.name}" for other in comparison.arms if other.controls(arm.name)), "")
        parts.append(f"against its control{control}: {_difference(arm.against_control, numbers)}")
    return "; ".join(parts)


def _difference(paired: Paired, numbers: MetricFormat) -> str:
    interval = "" if paired.low is None else f", 95% interval {numbers.interval(paired.low, paired.high)} (unadjusted)"
    return f"difference {numbers.signed(paired.mean)}{interval}"


def columns(comparison: Comparison) -> dict[str, list[str]]:
    """Table columns: heading -> one cell per arm. Lines of a cell after the first hold details."""
    numbers, arms = metric_format(comparison), comparison.arms
    differences = [arm.difference if arm.difference and arm.difference.n else None for arm in arms]
    table = {
        ARM: [" ".join(arm.name.split()) for arm in arms],
        MEAN: [f"{numbers.spread(arm.mean, arm.spread)}\n{count(len(arm.values), 'seed')}" for arm in arms],
        BEST: [numbers.spread(arm.best, arm.best_spread) for arm in arms],
        DIFFERENCE: [numbers.signed(paired.mean if paired else None) for paired in differences],
        INTERVAL: [numbers.interval(paired.low, paired.high) if paired else NOTHING for paired in differences],
        P: [probability(arm.p_adjusted) for arm in arms],
        DETECTABLE: [numbers.number(arm.minimum_detectable) for arm in arms],
        VERDICT: [shown_verdict(arm) for arm in arms],
        CONTROL: [_with_interval(arm.against_control, numbers) for arm in arms],
        NEW_ROWS: [_on_new_rows(arm, numbers) for arm in arms],
    }
    optional = (BEST, CONTROL, NEW_ROWS)
    shown = {heading: cells for heading, cells in table.items() if heading not in optional or set(cells) != {NOTHING}}
    return shown | {side_heading(metric): _side(comparison, metric) for metric in comparison.side_metrics}


def side_heading(metric: str) -> str:
    return f"{metric}\n(difference)"


def _with_interval(paired: Paired | None, numbers: MetricFormat, mark: str = "") -> str:
    if paired is None or not paired.n:
        return NOTHING
    interval = "one seed" if paired.low is None else numbers.interval(paired.low, paired.high)
    return f"{numbers.signed(paired.mean)}{mark}\n{interval}"


def _on_new_rows(arm: ArmResult, numbers: MetricFormat) -> str:
    rows = arm.new_rows
    if rows is None:
        return NOTHING
    decide = f"{rows.deciding_rows} {rows.rows_name} decide"
    return f"{numbers.estimate(rows.mean, rows.low, rows.high)}\n{decide}"


def _side(comparison: Comparison, metric: str) -> list[str]:
    """Cells of a side metric: the baseline's value, and differences, with a star if the interval excludes 0."""
    numbers, runs = metric_format(comparison, metric), comparison.runs
    cells = []
    for arm in comparison.arms:
        paired, column = arm.side.get(metric), f"metrics.{metric}"
        if arm.name == comparison.baseline and column in runs:
            values = runs.loc[runs["run_id"].isin(list(arm.runs.values())), column].astype(float)
            cells.append(f"{numbers.number(float(values.mean()))}\nown value")
        else:
            cells.append(_with_interval(paired, numbers, "*" if paired and _excludes_zero(paired) else ""))
    return cells


def _excludes_zero(paired: Paired) -> bool:
    return paired.low is not None and paired.high is not None and (paired.low > 0 or paired.high < 0)
