"""Wording of a comparison, shared by the terminal, Markdown, the page and MLflow's run note."""

from collections import Counter

from pipeline.comparison import number_format as shown
from pipeline.comparison.decisions import OPEN, UNDECIDED
from pipeline.comparison.number_format import NOTHING
from pipeline.comparison.results import ArmResult, Comparison
from pipeline.maths.row_covariance import NewRows
from pipeline.maths.sequential import LEVEL, LOOKS
from pipeline.maths.statistics import Paired

SEEDS_SHOWN, DECIDING_SHOWN = 8, 3

# Column headings. Their line breaks are kept in a terminal and on the page.
ARM = "arm"
MEAN = "mean ± sd"
BEST = "best on\nvalidation"
DIFFERENCE = "difference"
INTERVAL = "interval"
P = "p (Bonferroni)"
DETECTABLE = "minimum\ndetectable\ndifference"
VERDICT = "verdict"
NEW_ROWS = "on new rows"
CONTROL = "against its control,\n95% interval (unadjusted)"

# Legends
FIXED = """Verdict: paired t test over seeds on {metric}, p times {arms} (Bonferroni).
An arm is better or worse if its interval excludes 0. The chance that any arm's interval is wrong is at most 5%.
Minimum detectable difference: the smallest true difference that this test would find with 80% probability."""
SEQUENTIAL = """Verdict: repeated confidence intervals over seeds on {metric} (Jennison and Turnbull 1989).
Looked at after {looks} seeds; an arm that is decided gets no more.
Better or worse: the interval excludes 0. The chance that any look at any arm of a family is wrong is at most 5%."""
MARGIN = "Differences below {margin:g} do not matter: equal within the margin if the interval lies inside it."
ONE_SEED = "One seed cannot tell a better setting from luck."
NEW_ROWS_METHOD = """On new rows: the difference with other seeds and other test rows like these, taken as independent.
Its uncertainty is split by variance into that of seeds and that of rows; ± is the interval's half-width."""
SIDES = "Side effects: untested differences to the baseline; *: the 95% interval over seeds excludes 0."

VERDICTS = ("better", "better, by less than the margin", "equal within the margin", "identical",
            "worse, by less than the margin", "worse", OPEN, UNDECIDED, "without a verdict")  # fmt: skip


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown_verdict(arm: ArmResult) -> str:
    return arm.verdict or "baseline"


def tested(comparison: Comparison) -> list[ArmResult]:
    """The arms that are not controls, without the baseline."""
    return [arm for arm in comparison.arms if arm.role == "arm"]


def direction(comparison: Comparison) -> str:
    return f"{'higher' if comparison.mode == 'max' else 'lower'} is better"


def facts(comparison: Comparison) -> list[str]:
    """Task, metric, seeds, baseline and data."""
    return [*question(comparison), f"data {comparison.data_digest[:12]}"][: None if comparison.data_digest else -1]


def question(comparison: Comparison) -> list[str]:
    """Task, metric, seeds and baseline."""
    seeds = comparison.seeds
    numbers = ", ".join(map(str, seeds[:SEEDS_SHOWN])) + (", ..." if len(seeds) > SEEDS_SHOWN else "")
    parts = [
        comparison.task,
        f"{comparison.metric} ({direction(comparison)})",
        f"{count(len(seeds), 'seed')} ({numbers})",
        f"against {comparison.baseline}",
    ]
    return [part for part in parts if part]


def tally(comparison: Comparison) -> str:
    """Number of arms with each verdict, as text."""
    verdicts = Counter("without a verdict" if "no verdict" in arm.verdict else arm.verdict
                       for arm in tested(comparison))  # fmt: skip
    parts = [f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdict in verdicts]
    return f"{count(verdicts.total(), 'arm')}: {', '.join(parts)}" if parts else "no arm beside the baseline"


def families(comparison: Comparison) -> str:
    """How often several families may be wrong; "" for one."""
    number = len(comparison.families) + comparison.other_families
    return f"{number} families, each at most 5%, together at most {5 * number}%" if number > 1 else ""


def method(comparison: Comparison) -> str:
    """Explanation of the verdicts and intervals, one sentence per line."""
    arms = tested(comparison)
    if comparison.design == "sequential":
        looks = sorted({look for family in comparison.families for look in family.looks})
        lines = [SEQUENTIAL.format(metric=comparison.metric, looks=", ".join(map(str, looks)))]
    else:
        compared = round(LEVEL / arms[0].level) if arms and arms[0].level else 0
        lines = [FIXED.format(metric=comparison.metric, arms=count(compared, "arm"))]
    lines += [MARGIN.format(margin=comparison.margin)] if comparison.margin else []
    lines += [f"{text}."] if (text := families(comparison)) else []
    lines += [ONE_SEED] if any(arm.difference and arm.difference.n == 1 for arm in comparison.arms) else []
    return "\n".join(lines)


def legend(comparison: Comparison) -> str:
    """The method, followed by explanations of the optional columns."""
    lines = [method(comparison)]
    lines += [NEW_ROWS_METHOD] if any(arm.new_rows for arm in comparison.arms) else []
    lines += [SIDES] if comparison.side_metrics else []
    return "\n".join(lines)


def sentence(arm: ArmResult, comparison: Comparison) -> str:
    """A sentence that begins with an arm's verdict (`shown_verdict`), followed by the numbers behind it."""
    result = arm.difference
    number = count(result.n if result and result.n else len(arm.values), "seed")
    parts = [in_full(arm, comparison), f"{number}: {estimate(arm)}" if result and result.n else number]
    parts += [one_seed_decides(arm)] if arm.deciding_seeds else []
    parts.append(f"mean {shown.spread(arm.mean, arm.spread)}")
    if arm.p_adjusted is not None:
        parts.append(f"p {shown.probability(arm.p_adjusted)} (Bonferroni)")
    if arm.minimum_detectable is not None:
        parts.append(f"minimum detectable difference {shown.two_digits(arm.minimum_detectable)}")
    if arm.against_control and arm.against_control.n:
        control = next((f" {other.name}" for other in comparison.arms if other.controls(arm.name)), "")
        against = shown.estimate(arm.against_control.mean, arm.against_control.low, arm.against_control.high, arm.mean)
        parts.append(f"against its control{control}: {against}")
    return "; ".join(parts)


def one_seed_decides(arm: ArmResult) -> str:
    """A warning, for an arm whose verdict depends on a single seed."""
    seeds = [*map(str, arm.deciding_seeds[:DECIDING_SHOWN]), *["another"][: len(arm.deciding_seeds) - DECIDING_SHOWN]]
    alternatives = " or ".join(part for part in (", ".join(seeds[:-1]), seeds[-1]) if part)
    return f"one seed decides: without seed {alternatives} it would not be {arm.verdict}"


def in_full(arm: ArmResult, comparison: Comparison) -> str:
    """The verdict on these rows and on new ones, or what could still be true of an arm that is not decided."""
    words, new = shown_verdict(arm), arm.new_rows
    if arm.role == "control" and arm.control_of:
        return f"{words} of {arm.control_of}"
    if words in (OPEN, UNDECIDED) and arm.difference:
        low, high, places = arm.difference.low, arm.difference.high, _places(arm)
        if arm.difference.sd == 0:
            words += f": all differences are {difference(arm)} so far, which decides nothing"
        elif low is not None:
            ends = " and ".join(shown.signed(end, places) for end in (low, high))
            words += f": the true difference may lie between {ends}"
    if new is None:
        return words
    on_these = only_on_these_rows(arm, comparison)
    if not on_these:
        return f"{words}; on new rows like these {shown.estimate(new.mean, new.low, new.high)}"
    doubt = "more" if words.startswith("equal") else "nothing"
    return f"{words}{on_these}; on new ones it may be {doubt}: {deciding(new)}"


def only_on_these_rows(arm: ArmResult, comparison: Comparison) -> str:
    """What is added to the verdict of an arm that may be another on new rows; else ""."""
    words, new, margin = arm.verdict, arm.new_rows, comparison.margin
    if new is None or not words.startswith(("better", "worse", "equal")):
        return ""
    holds = new.low > 0 or new.high < 0
    if words.startswith("equal") and margin:
        holds = -margin < new.low and new.high < margin
    return "" if holds else ", on these rows" if "," in words else " on these rows"


def deciding(new: NewRows) -> str:
    """The rows that the interval on new rows rests on."""
    return f"{new.deciding_rows} {new.rows_name} decide"


def _places(arm: ArmResult) -> int:
    """Decimals of an arm's difference."""
    result = arm.difference
    return shown.decimals(shown.half_width(result.low, result.high) if result else None, arm.mean)


def difference(arm: ArmResult) -> str:
    """An arm's difference, with the digits that its interval allows."""
    return shown.signed(arm.difference.mean, _places(arm)) if arm.difference and arm.difference.n else NOTHING


def estimate(arm: ArmResult) -> str:
    """An arm's difference with its interval in parentheses."""
    result = arm.difference
    if result is None or not result.n:
        return NOTHING
    return shown.estimate(result.mean, result.low, result.high, arm.mean)


def value(arm: ArmResult, metric: float | None) -> str:
    """A single value of an arm's runs."""
    return shown.number(metric, shown.decimals(arm.spread, arm.mean))


def seed_difference(arm: ArmResult, difference: float) -> str:
    """The difference at one seed, with the digits that the spread over seeds allows."""
    return shown.signed(difference, shown.decimals(arm.difference.sd if arm.difference else None, arm.mean))


def columns(comparison: Comparison) -> dict[str, list[str]]:
    """Table columns: heading -> one cell per arm. Lines of a cell after the first hold details."""
    arms = comparison.arms
    results = [arm.difference if arm.difference and arm.difference.n else None for arm in arms]
    table = {
        ARM: [" ".join(arm.name.split()) for arm in arms],
        MEAN: [f"{shown.spread(arm.mean, arm.spread)}\n{count(len(arm.values), 'seed')}" for arm in arms],
        BEST: [shown.spread(arm.best, arm.best_spread) for arm in arms],
        DIFFERENCE: [difference(arm) for arm in arms],
        INTERVAL: [shown.interval(result.low, result.high) if result else NOTHING for result in results],
        P: [shown.probability(arm.p_adjusted) for arm in arms],
        DETECTABLE: [shown.two_digits(arm.minimum_detectable) for arm in arms],
        VERDICT: [shown_verdict(arm) for arm in arms],
        NEW_ROWS: [_on_new_rows(arm.new_rows) for arm in arms],
        CONTROL: [_with_interval(arm.against_control, arm.mean) for arm in arms],
    }  # fmt: skip
    optional = (BEST, P, DETECTABLE, NEW_ROWS, CONTROL)
    kept = {heading: cells for heading, cells in table.items() if heading not in optional or set(cells) != {NOTHING}}
    return kept | {side_heading(metric): _side(comparison, metric) for metric in comparison.side_metrics}


def side_heading(metric: str) -> str:
    return f"{metric}\n(difference)"


def _with_interval(paired: Paired | None, size: float, mark: str = "") -> str:
    if paired is None or not paired.n:
        return NOTHING
    interval = "one seed" if paired.low is None else shown.interval(paired.low, paired.high)
    return f"{shown.difference(paired.mean, paired.low, paired.high, size)}{mark}\n{interval}"


def _on_new_rows(new: NewRows | None) -> str:
    if new is None:
        return NOTHING
    return "\n".join([shown.estimate(new.mean, new.low, new.high), deciding(new), *_uncertainty(new)])


def _uncertainty(new: NewRows) -> list[str]:
    """How much of the uncertainty is seeds and how much rows, and what more of either would do."""
    rows = round(100 * new.rows_share)
    more = next((seeds for seeds in LOOKS if seeds > new.seeds), 2 * new.seeds)
    now, seeds, twice = (shown.two_digits(new.half_width(*more)) for more in ((), (more,), (None, 2.0)))
    return [
        f"uncertainty: {100 - rows}% seeds, {rows}% rows",
        f"±{now}; ±{seeds} with {more} seeds; ±{twice} with twice the rows",
    ]


def _side(comparison: Comparison, metric: str) -> list[str]:
    """Cells of a side metric: the baseline's value, and differences, with a star if the interval excludes 0."""
    runs, column = comparison.runs, f"metrics.{metric}"
    cells = []
    for arm in comparison.arms:
        paired, own = arm.side.get(metric), None
        if column in runs:
            own = runs.loc[runs["run_id"].isin(list(arm.runs.values())), column].astype(float)
        if arm.name == comparison.baseline and own is not None:
            cells.append(f"{shown.spread(float(own.mean()), _sd(own.std()))}\nown value")
        else:
            size = float(own.mean()) if own is not None else 1.0
            cells.append(_with_interval(paired, size, "*" if paired and _excludes_zero(paired) else ""))
    return cells


def _sd(value: float) -> float | None:
    return float(value) if value == value else None  # noqa: PLR0124 (NaN with one seed)


def _excludes_zero(paired: Paired) -> bool:
    return paired.low is not None and paired.high is not None and (paired.low > 0 or paired.high < 0)
