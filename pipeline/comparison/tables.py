"""Tables of a comparison: a data frame, Markdown, and text for a terminal."""

import re
import sys
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import pandas as pd

from pipeline.comparison import wording
from pipeline.comparison.answer import answer
from pipeline.comparison.results import ArmResult, Comparison
from pipeline.comparison.selection import unique_leaves
from pipeline.maths.statistics import Paired
from pipeline.runtime.console import aligned
from pipeline.runtime.text import visible

# Limits in a terminal: numbers of side metrics and settings shown; characters of an arm's name and a line.
SIDE_SHOWN, SETTINGS_SHOWN, LABEL_LENGTH, ANSWER_WIDTH = 6, 8, 30, 100
NEW_ROWS = ("low", "high", "seeds_variance", "interaction_variance", "rows_variance", "degrees", "deciding_rows",
            "rows_name")  # fmt: skip
IN_TEXT = (wording.MEAN, wording.DIFFERENCE, wording.INTERVAL, wording.P, wording.DETECTABLE, wording.VERDICT)
CUT = "\n\nThe whole table is in comparison.md.\n"


def to_frame(comparison: Comparison) -> pd.DataFrame:
    """A data frame with one row per arm. Numbers are not rounded.

    Columns: arm, role, control_of, verdict, seeds; mean, spread, best_valid, best_valid_spread of the primary metric;
    difference, low, high (over seeds, at the two-sided `level`), p, p_adjusted, minimum_detectable; look_<seeds>.low
    and .high of a sequential design. Prefixes: `control.` for the difference to the control, `new_rows.` for the
    interval on new rows and what it is made of (see `NewRows`), `side.<metric>.` for differences of side metrics, and
    `params.` for settings that differ. The intervals of `control.` and `side.` are 95% intervals, unadjusted.
    """
    return pd.DataFrame([_record(arm, comparison) for arm in comparison.arms])


def to_markdown(comparison: Comparison, longest: int = sys.maxsize) -> str:
    """Markdown of at most `longest` characters. If needed, leaves out the settings first and then the tables."""
    facts = [plain(fact) for fact in wording.facts(comparison)]
    verdicts = [f"- **{plain(arm.name)}**: {plain(wording.sentence(arm, comparison))}" for arm in comparison.arms]
    columns = wording.columns(comparison)
    table = [[heading.replace("\n", " ") for heading in columns], *zip(*columns.values(), strict=True)]
    settings = _markdown_table(_setting_cells(comparison))
    brief = [
        f"## {plain(comparison.title)}",
        ", ".join(facts),
        plain(answer(comparison)),
        f"{wording.tally(comparison)}.",
        "\n".join(verdicts),
    ]
    whole = [
        *brief,
        _markdown_table(table),
        "\n".join(f"- {plain(note)}" for note in comparison.notes),
        *(plain(line) for line in wording.legend(comparison).split("\n")),
    ]
    for parts in ([*whole, f"### Settings that differ\n\n{settings}" if settings else ""], whole):
        text = "\n\n".join(part for part in parts if part) + "\n"
        if len(text) <= longest:
            return text
    text, room = "\n\n".join(brief), longest - len(CUT)
    return (text if len(text) <= room else text[:room].rsplit("\n", 1)[0]) + CUT


def to_text(comparison: Comparison) -> str:
    """Aligned text for a terminal. Each arm's line ends with its verdict."""
    columns, facts = wording.columns(comparison), ", ".join(wording.facts(comparison))
    shown = [heading for heading in IN_TEXT if heading in columns]
    rows = [[wording.ARM, *shown]]
    for at, arm in enumerate(comparison.arms):
        rows.append([_label(arm), *(columns[heading][at].split("\n")[0] for heading in shown)])
        if arm.against_control and arm.against_control.n:
            against = columns[wording.CONTROL][at].split("\n")
            rows.append(["  against its control", "", *against, *[""] * (len(shown) - 1 - len(against))])
    parts = [
        f"{comparison.title}\n{facts}\n{wording.tally(comparison)}",
        fill(visible(answer(comparison)), ANSWER_WIDTH, break_long_words=False, break_on_hyphens=False),
        aligned(rows, left=(0, len(shown))),
        wording.method(comparison),
    ]
    if wording.NEW_ROWS in columns:
        cells = [["", wording.NEW_ROWS, ""]]
        for at, arm in enumerate(comparison.arms):
            if arm.new_rows:
                estimate, deciding, shares, more = columns[wording.NEW_ROWS][at].split("\n")
                cells += [[_label(arm), estimate, deciding], ["", shares, more]]
        parts.append(f"{aligned(cells, left=(0, 1, 2))}\n{wording.NEW_ROWS_METHOD}")
    sides = [metric for metric in comparison.side_metrics if any(metric in arm.side for arm in comparison.arms)]
    if sides:
        cells = [["", *(metric.removeprefix("test/") for metric in sides[:SIDE_SHOWN])]]
        for at, arm in enumerate(comparison.arms[1:], start=1):
            differences = (columns[wording.side_heading(metric)][at].split("\n")[0] for metric in sides[:SIDE_SHOWN])
            cells.append([_label(arm), *differences])
        parts.append(f"{aligned(cells)}\n{wording.SIDES}")
    settings = _setting_cells(comparison, short=True)
    if settings:
        parts.append("settings that differ\n" + aligned(settings, left=range(len(settings[0]))))
    if comparison.notes:
        parts.append("\n".join(f"note: {note}" for note in comparison.notes))
    return visible("\n\n".join(parts))


def _record(arm: ArmResult, comparison: Comparison) -> dict[str, Any]:
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
        "level": arm.level,
        "p_adjusted": arm.p_adjusted,
        "minimum_detectable": arm.minimum_detectable,
    }
    if any(other.against_control for other in comparison.arms):
        record |= _paired("control.", arm.against_control)
    for seeds in sorted({look.seeds for other in comparison.arms for look in other.looks}):
        look = next((look for look in arm.looks if look.seeds == seeds), None)
        record |= {f"look_{seeds}.low": look and look.low, f"look_{seeds}.high": look and look.high}
    if any(other.new_rows for other in comparison.arms):
        record |= {f"new_rows.{name}": getattr(arm.new_rows, name, None) for name in NEW_ROWS}
    for metric in comparison.side_metrics:
        record |= _paired(f"side.{metric}.", arm.side.get(metric))
    return record | {f"params.{key}": value for key, value in arm.differing.items()}


def _paired(prefix: str, paired: Paired | None) -> dict[str, float | int | None]:
    fields = {"difference": "mean", "low": "low", "high": "high", "p": "p", "seeds_shared": "n"}
    return {prefix + name: getattr(paired, field) if paired else None for name, field in fields.items()}


def _label(arm: ArmResult) -> str:
    name = visible(" ".join(arm.name.split()))
    name = name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"
    return f"  {name}" if arm.role == "control" else name


def _setting_cells(comparison: Comparison, short: bool = False) -> list[list[str]]:
    """A row per arm, a column per dotted key. `short`: the first columns only, headed by the last part of each key."""
    head = keys = list(comparison.arms[0].differing)
    if not keys:
        return []
    if short:
        head = unique_leaves(keys)[:SETTINGS_SHOWN]
        more = len(keys) - len(head)
        keys = keys[:SETTINGS_SHOWN]
        head += [f"and {more} more"] if more else []
    rows = [[_label(arm) if short else arm.name, *(arm.differing[key] for key in keys)] for arm in comparison.arms]
    return [["", *head], *([*row, *[""] * (len(head) - len(keys))] for row in rows)]


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _markdown_cell(cell: str) -> str:
    return "; ".join(plain(line).replace("|", "\\|") for line in cell.split("\n"))


def plain(text: str) -> str:
    """Escape Markdown and HTML, and collapse whitespace.

    `<` followed by a space cannot start a tag and is not escaped.
    """
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]" else letter for letter in text)
    return visible(" ".join(re.sub("<(?! )", "&lt;", escaped.replace("&", "&amp;")).split()))
