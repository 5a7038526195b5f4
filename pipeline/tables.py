"""A comparison as tables: a frame, Markdown, and text for a terminal."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from pipeline.compare import Arm, Comparison
    from pipeline.stats import Paired

SIDE_SHOWN, SETTINGS_SHOWN, LABEL_LENGTH = 6, 8, 30  # in a terminal: columns of side metrics, of settings; characters
NOTHING = "–"
INTERVALS = "95% intervals are over seeds, of each arm for itself: not adjusted for the number of arms."
HOW = ("Verdict: paired t test over seeds, p adjusted by Holm for {arms}. Detectable: the smallest true difference\n"
       "that would be found with 80% probability.")  # fmt: skip
STARS = "* of a side effect: its own 95% interval over seeds excludes 0."
ROWS = "Over test rows: one trained model against another; it says nothing about other seeds and makes no verdict."


def to_frame(comparison: "Comparison") -> pd.DataFrame:
    """One row an arm, numbers as they are.

    Columns: arm, role, control_of, verdict, seeds; mean, spread, best_valid, best_valid_spread of the primary metric;
    difference, low, high (95% over seeds, unadjusted), p, p_adjusted, minimum_detectable; the same difference to the
    control under `control.`; over test rows under `rows.s<seed>`; of side metrics under `side.<metric>`; the settings
    that differ under `params.<key>`.
    """
    return pd.DataFrame([_record(arm, comparison) for arm in comparison.arms])


def to_markdown(comparison: "Comparison", longest: int | None = None) -> str:
    """The comparison as Markdown, at most `longest` characters: first the settings go, then rows of the table."""
    head = [f"## {plain(comparison.title)}", _facts(comparison)]
    sentences = [f"- **{plain(arm.name)}**: {_sentence(arm, comparison)}" for arm in comparison.arms[1:]]
    table = _markdown_table(_markdown_cells(comparison))
    notes = [f"- {plain(note)}" for note in comparison.notes]
    foot = [INTERVALS, HOW.format(arms=_tested(comparison))]
    foot += [ROWS] if any(arm.rows for arm in comparison.arms) else []
    foot += [STARS] if comparison.side_metrics else []
    settings = _markdown_table(_setting_cells(comparison))
    parts = ["\n\n".join(head), "\n".join(sentences), table, "\n".join(notes), "\n\n".join(foot)]
    if settings:
        parts.append("### Settings that differ\n\n" + settings)
    text = "\n\n".join(part for part in parts if part) + "\n"
    if longest is None or len(text) <= longest:
        return text
    cut = "\n\nThe whole table lies in comparison.md.\n"
    brief = "\n".join([*head, "", *sentences])
    return brief[: longest - len(cut)].rsplit("\n", 1)[0] + cut


def to_text(comparison: "Comparison") -> str:
    """Aligned text for a terminal, the verdict at the end of an arm's line."""
    number = _formats(comparison)
    metric = f"{comparison.metric} ({'more' if comparison.mode == 'max' else 'less'} is better)"
    rows = [["", "mean ± sd", "difference", "95% (unadjusted)", "p (Holm)", "detectable", "verdict"]]
    for arm in comparison.arms:
        found = arm.difference
        rows.append([
            _label(arm),
            number.spread(arm.mean, arm.spread),
            number.signed(found.mean if found else None),
            number.interval(found),
            _p(arm.p_adjusted),
            number.plain(arm.minimum_detectable),
            arm.verdict or "baseline",
        ])  # fmt: skip
        if arm.against_control:
            against = arm.against_control
            rows.append(
                ["  against its control", "", number.signed(against.mean), number.interval(against), "", "", ""]
            )
    parts = [f"{comparison.title}\n{metric}, {_seeds(comparison)}", _aligned(rows)]
    parts.append(f"{INTERVALS}\n{HOW.format(arms=_tested(comparison))}")
    of_rows = _row_cells(comparison, number)
    if of_rows:
        parts.append("difference over test rows within a seed, 95% bootstrap interval\n" + _aligned(of_rows))
    sides = _side_cells(comparison)
    if sides:
        parts.append(f"side effects: difference to the baseline\n{_aligned(sides)}\n{STARS}")
    settings = _setting_cells(comparison, short=True)
    if settings:
        parts.append("settings that differ\n" + _aligned(settings, left=True))
    if comparison.notes:
        parts.append("\n".join(f"note: {note}" for note in comparison.notes))
    return "\n\n".join(parts)


def _record(arm: "Arm", comparison: "Comparison") -> dict[str, Any]:
    record: dict[str, Any] = {
        "arm": arm.name,
        "role": arm.role,
        "control_of": arm.control_of,
        "verdict": arm.verdict or None,
        "seeds": len(arm.values),
        "metric": comparison.metric,
        "mean": arm.mean,
        "spread": arm.spread,
        "best_valid": arm.best,
        "best_valid_spread": arm.best_spread,
        **_paired("", arm.difference),
        "p_adjusted": arm.p_adjusted,
        "minimum_detectable": arm.minimum_detectable,
    }
    if any(other.against_control for other in comparison.arms):
        record |= _paired("control.", arm.against_control)
    for seed in sorted({seed for other in comparison.arms for seed in other.rows}):
        names = [f"rows.s{seed}.{name}" for name in ("difference", "low", "high")]
        record |= dict(zip(names, arm.rows.get(seed, (None, None, None)), strict=True))
    for metric in comparison.side_metrics:
        record |= _paired(f"side.{metric}.", arm.side.get(metric))
    return record | {f"params.{key}": value for key, value in arm.differing.items()}


def _paired(prefix: str, found: "Paired | None") -> dict[str, float | int | None]:
    names = {"difference": "mean", "low": "low", "high": "high", "p": "p", "seeds_shared": "n"}
    return {prefix + name: getattr(found, of) if found else None for name, of in names.items()}


class _Formats:
    """Numbers of one table: as many decimals as the differences need."""

    def __init__(self, scales: Sequence[float]) -> None:
        sizes = sorted(abs(scale) for scale in scales if scale and math.isfinite(scale))
        small = sizes[len(sizes) // 2] if sizes else 1.0
        self.decimals = min(8, max(4, 1 - math.floor(math.log10(small))))

    def plain(self, value: float | None) -> str:
        return NOTHING if value is None or math.isnan(value) else f"{value:.{self.decimals}f}"

    def signed(self, value: float | None) -> str:
        if value is None or math.isnan(value):
            return NOTHING
        return f"{value:+.{self.decimals}f}" if value else "0"

    def spread(self, mean: float, sd: float | None) -> str:
        return self.plain(mean) + ("" if sd is None else f" ± {self.plain(sd)}")

    def interval(self, found: "Paired | None") -> str:
        if found is None or found.low is None or found.high is None:
            return NOTHING
        return f"{self.signed(found.low)} to {self.signed(found.high)}"


def _formats(comparison: "Comparison", side: str | None = None) -> _Formats:
    found = [arm.side.get(side) if side else arm.difference for arm in comparison.arms]
    return _Formats([number for paired in found if paired for number in (paired.mean, paired.sd or 0.0)])


def _p(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "< 0.001" if 0 <= value < 0.001 else f"{value:.3f}"


def _label(arm: "Arm") -> str:
    name = arm.name if len(arm.name) <= LABEL_LENGTH else arm.name[: LABEL_LENGTH - 1] + "…"
    return f"  {name}" if arm.role == "control" else name


def _seeds(comparison: "Comparison") -> str:
    count = len(comparison.seeds)
    listed = ", ".join(str(seed) for seed in comparison.seeds[:8]) + (", ..." if count > 8 else "")
    return f"{count} seed{'s' * (count > 1)} ({listed})"


def _tested(comparison: "Comparison") -> str:
    count = sum(arm.role == "arm" for arm in comparison.arms)
    return f"{count} arm{'s' * (count != 1)}"


def _facts(comparison: "Comparison") -> str:
    better = "more" if comparison.mode == "max" else "less"
    task = f"{plain(comparison.task)}, " if comparison.task else ""
    data = f", data {comparison.data_digest[:12]}" if comparison.data_digest else ""
    return (f"{task}`{comparison.metric}` ({better} is better), {_seeds(comparison)}, against "
            f"**{plain(comparison.baseline)}**{data}")  # fmt: skip


def _sentence(arm: "Arm", comparison: "Comparison") -> str:
    """The verdict with what it rests on."""
    number, found = _formats(comparison), arm.difference
    words = f"control of {plain(arm.control_of)}" if arm.role == "control" and arm.control_of else arm.verdict
    if found is None or found.n == 0:
        return words
    text = f"{words}{_with_seeds(arm)}; difference {number.signed(found.mean)}"
    if found.low is not None:
        text += f", 95% interval {number.interval(found)} (unadjusted)"
    if arm.role == "arm" and arm.p_adjusted is not None:
        text += f", p {_p(arm.p_adjusted)} (Holm)"
    if arm.role == "arm" and arm.minimum_detectable:
        text += f"; detectable with these seeds: {number.plain(arm.minimum_detectable)}"
    if arm.against_control:
        text += f"; against its control {number.signed(arm.against_control.mean)}"
        if arm.against_control.low is not None:
            text += f" ({number.interval(arm.against_control)})"
    return text


def _with_seeds(arm: "Arm") -> str:
    if arm.difference is None or arm.difference.n < 2:
        return ""
    return f" with {arm.difference.n} seeds"


def _markdown_cells(comparison: "Comparison") -> list[list[str]]:
    number = _formats(comparison)
    best = any(arm.best is not None for arm in comparison.arms)
    control = any(arm.against_control for arm in comparison.arms)
    seeds = sorted({seed for arm in comparison.arms for seed in arm.rows})
    sides = {metric: _formats(comparison, metric) for metric in comparison.side_metrics}
    head = ["arm", "verdict", "mean ± sd", *(["best on valid"] if best else []), "difference",
            "95% interval (unadjusted)", "p (Holm)", "detectable", *(["against its control"] if control else []),
            *([f"over test rows, 95%: seeds {', '.join(map(str, seeds))}"] if seeds else []),
            *(f"{metric} (difference)" for metric in sides)]  # fmt: skip
    rows = [head]
    for arm in comparison.arms:
        found, against = arm.difference, arm.against_control
        verdict = f"control of {plain(arm.control_of)}" if arm.role == "control" else arm.verdict or "baseline"
        row = [plain(arm.name), verdict, number.spread(arm.mean, arm.spread)]
        if best:
            row.append(NOTHING if arm.best is None else number.spread(arm.best, arm.best_spread))
        row += [number.signed(found.mean if found else None), number.interval(found), _p(arm.p_adjusted),
                number.plain(arm.minimum_detectable)]  # fmt: skip
        if control:
            row.append(f"{number.signed(against.mean)} ({number.interval(against)})" if against else NOTHING)
        if seeds:
            row.append("<br>".join(_row_interval(arm, seed, number) for seed in seeds if seed in arm.rows) or NOTHING)
        row += [_side_difference(arm, metric, of) for metric, of in sides.items()]
        rows.append(row)
    return rows


def _row_cells(comparison: "Comparison", number: _Formats) -> list[list[str]]:
    seeds = sorted({seed for arm in comparison.arms for seed in arm.rows})[:3]  # as many as a terminal is wide
    if not seeds:
        return []
    rows = [["", *(f"seed {seed}" for seed in seeds)]]
    return rows + [[_label(arm), *(_row_interval(arm, seed, number) for seed in seeds)] for arm in comparison.arms[1:]]


def _row_interval(arm: "Arm", seed: int, number: _Formats) -> str:
    if seed not in arm.rows:
        return NOTHING
    difference, low, high = arm.rows[seed]
    return f"{number.signed(difference)} ({number.signed(low)} to {number.signed(high)})"


def _side_cells(comparison: "Comparison") -> list[list[str]]:
    metrics = [metric for metric in comparison.side_metrics if any(metric in arm.side for arm in comparison.arms)]
    sides = {metric: _formats(comparison, metric) for metric in metrics[:SIDE_SHOWN]}
    if not sides or len(comparison.arms) < 2:
        return []
    rows = [["", *(metric.removeprefix("test/") for metric in sides)]]
    return rows + [[_label(arm), *(_side_difference(arm, metric, of) for metric, of in sides.items())]
                   for arm in comparison.arms[1:]]  # fmt: skip


def _side_difference(arm: "Arm", metric: str, number: _Formats) -> str:
    """With a star where the unadjusted interval excludes 0."""
    found = arm.side.get(metric)
    if found is None:
        return NOTHING
    apart = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    return number.signed(found.mean) + ("*" if apart else "")


def _setting_cells(comparison: "Comparison", short: bool = False) -> list[list[str]]:
    """A row an arm, a column a dotted key; `short`: its last part where that is plain, and no more than fit."""
    keys = list(comparison.arms[0].differing)
    if not keys:
        return []
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    if short:
        head = [leaf if leaves.count(leaf) == 1 else key for leaf, key in zip(leaves, keys, strict=True)]
        keys, more = keys[:SETTINGS_SHOWN], len(keys) - SETTINGS_SHOWN
        head = head[:SETTINGS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    else:
        head, more = [f"`{key}`" for key in keys], 0
    names = [_label(arm) if short else plain(arm.name) for arm in comparison.arms]
    cell = str if short else plain
    return [["", *head], *([name, *(cell(arm.differing[key]) for key in keys), *([""] if more > 0 else [])]
                           for name, arm in zip(names, comparison.arms, strict=True))]  # fmt: skip


def _aligned(rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Columns of text: the first to the left, the others to the right unless `left`; the last as it is."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left or at in (0, last) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plain(text: str | None) -> str:
    """Names as they are, not as Markdown or HTML."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]" else letter for letter in text or "")
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").split())
