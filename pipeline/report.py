"""A comparison as one HTML page that needs nothing but a browser: verdicts, tables and curves, offline."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipeline.page.charts import FITTED_FROM, Effect, forest, panel
from pipeline.page.curves import MOST_POINTS, SMOOTH_ABOVE, SMOOTHED_SHARE, Curve, curves, gates, left_out
from pipeline.page.markup import (
    NOTHING,
    Html,
    interval,
    join,
    number,
    plus_minus,
    probability,
    signed,
    table,
    tag,
    text,
)
from pipeline.page.style import SCRIPT, style

if TYPE_CHECKING:
    from pipeline.compare import Arm, Comparison
    from pipeline.stats import Paired

# The browser itself refuses to fetch anything for this page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
REFERENCES = ("_bayes", "_majority", "_tfidf")  # scores of yardsticks, not of the arms


def write_page(comparison: "Comparison", history: pd.DataFrame, file: Path) -> Path:
    """Write the comparison's page; returns its path.

    history: columns run, metric, step, value, as `pipeline.compare.load_history` gives them; may be empty.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(comparison, history), encoding="utf-8")
    return file


def page(comparison: "Comparison", history: pd.DataFrame) -> str:
    """The page's HTML."""
    arms = comparison.arms
    title = comparison.title or f"Comparison on {comparison.metric}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Html(style([arm.color for arm in arms]))),
    )
    body = tag(
        "body",
        _header(comparison, arms, title),
        _table(comparison, arms),
        _forest(comparison, arms),
        _differences(comparison, arms),
        _curves(comparison, arms, history),
        _runs(comparison, arms),
        _notes(comparison),
        tag("div", id="tip", hidden=True),
        tag("script", Html(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def finding(arm: "Arm", comparison: "Comparison") -> str:
    """What was found for an arm, in words that follow its name."""
    if arm.name == comparison.baseline:
        seeds = _seeds(len(arm.values))
        return f"what the others are held against: {comparison.metric} {plus_minus(arm.mean, arm.spread)} over {seeds}."
    found = arm.difference
    if found is None or found.n == 0:
        return "control without a seed in common with the baseline." if arm.role == "control" else f"{arm.verdict}."
    if arm.role == "control":
        of = f" of {arm.control_of}" if arm.control_of else ""
        words = f"control{of}, not judged: {_amount(found)} to the baseline with {_seeds(found.n)}"
    elif found.n < 2:
        return f"{arm.verdict}; {signed(found.mean)} to the baseline, and one seed gives no interval."
    else:
        than = {"better": "than", "worse": "than"}.get(arm.verdict, "from")
        words = f"{arm.verdict} {than} the baseline with {_seeds(found.n)}: {_amount(found)}"
    if arm.p_adjusted is not None and arm.verdict in ("better", "worse"):
        words += f", p {probability(arm.p_adjusted)} after Holm"
    if arm.minimum_detectable and found.sd:
        words += f", could have found ±{number(arm.minimum_detectable)}"
    if arm.against_control is not None and arm.against_control.n:
        control = next((other.name for other in comparison.arms if other.controls(arm.name)), "its control")
        words += f". Against its control {control}: {_amount(arm.against_control)}"
    return words + "."


def _amount(found: "Paired") -> str:
    if found.mean == 0 and found.sd == 0:
        return "exactly 0 at every seed"
    if found.low is None:
        return f"{signed(found.mean)} (one seed: no interval)"
    return f"{signed(found.mean)} (95% interval {interval(found.low, found.high)}, unadjusted)"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _name(arm: "Arm", index: int) -> Html:
    """An arm's name behind a sample of its line."""
    return tag("span", _key(index), tag("span", arm.name), class_="name control" if arm.role == "control" else "name")


def _key(index: int) -> Html:
    line = tag("line", x1="0", x2="24", y1="4", y2="4")
    return tag("svg", line, viewBox="0 0 24 8", class_=f"key a{index}", aria_hidden="true")


def _goal(comparison: "Comparison") -> str:
    return "more is better" if comparison.mode == "max" else "less is better"


def _header(comparison: "Comparison", arms: Sequence["Arm"], title: str) -> Html:
    judged = [arm for arm in arms if arm.name != comparison.baseline and arm.role != "control"]
    verdicts = sorted({arm.verdict for arm in judged}, key=lambda v: (v != "better", v != "worse", v))
    counts = {v.replace(":", ","): sum(arm.verdict == v for arm in judged) for v in verdicts}
    total = (
        "; ".join(
            f"{count} with {verdict}" if "," in verdict else f"{count} {verdict}" for verdict, count in counts.items()
        )
        or "no arm beside the baseline"
    )
    sweeps = [s for s in comparison.runs["sweep_id"].dropna().unique() if s] if "sweep_id" in comparison.runs else []
    facts = [f"task {comparison.task}", f"{comparison.metric}, {_goal(comparison)}",
             f"seeds {', '.join(map(str, comparison.seeds))}", f"data {comparison.data_digest[:12]}",
             *(f"sweep {sweep}" for sweep in sweeps), comparison.tracking_uri]  # fmt: skip
    items = [
        tag("li", _key(index), tag("b", arm.name), ": ", _emphasised(finding(arm, comparison), arm.verdict),
            class_="control" if arm.role == "control" else None)
        for index, arm in enumerate(arms)
    ]  # fmt: skip
    of = f"Of {len(judged)} {'arm' if len(judged) == 1 else 'arms'}: {total}."
    count = len(comparison.notes)
    notes = tag("p", tag("a", "1 note" if count == 1 else f"{count} notes", href="#notes"), " below.") if count else ""
    return tag(
        "header", tag("h1", title), tag("p", " · ".join(facts), class_="soft"),
        tag("p", of), tag("ul", *items, class_="verdicts"), Html(notes),
    )  # fmt: skip


def _emphasised(sentence: str, verdict: str) -> Html:
    """The sentence with the verdict that it opens with set off."""
    if not verdict or not sentence.startswith(verdict):
        return text(sentence)
    class_ = verdict if verdict in ("better", "worse") else "undecided"
    return join([tag("span", verdict, class_=class_), sentence.removeprefix(verdict)])


def _cell(content: str, small: str = "") -> Html:
    return tag("td", content, tag("small", small) if small else Html(""), class_="number")


def _table(comparison: "Comparison", arms: Sequence["Arm"]) -> Html:
    tested = any(arm.rows for arm in arms)
    controlled = any(arm.against_control is not None for arm in arms)
    best = any(arm.best is not None for arm in arms)
    head = ["arm", f"{comparison.metric}\nmean ± sd over seeds"]
    head += [f"best {_twin(comparison.metric)}\nmean ± sd over seeds"] if best else []
    head += ["difference\nto baseline", "95% interval\nover seeds, unadjusted", "p\nafter Holm",
             "could have\nfound ±", "verdict"]  # fmt: skip
    head += ["bootstrap over test rows\nwithin a seed, 95%"] if tested else []
    head += ["against its control\n95% interval, unadjusted"] if controlled else []
    head += [f"{metric}\ndifference" for metric in comparison.side_metrics]
    rows = []
    for index, arm in enumerate(arms):
        found = arm.difference
        row: list[str] = [_name(arm, index), _cell(plus_minus(arm.mean, arm.spread), _seeds(len(arm.values)))]
        row += [_cell(plus_minus(arm.best, arm.best_spread))] if best else []
        row += [
            _cell(signed(found.mean) if found else NOTHING),
            _cell(interval(found.low, found.high) if found else NOTHING),
            _cell(probability(arm.p_adjusted)),
            _cell(number(arm.minimum_detectable)),
            tag("td", _emphasised(arm.verdict, arm.verdict) if arm.verdict else "baseline"),
        ]
        row += [_bootstraps(arm)] if tested else []
        row += [_paired_cell(arm.against_control)] if controlled else []
        row += [_side_cell(comparison, arm, metric) for metric in comparison.side_metrics]
        rows.append(row)
    explained = (
        "The verdict is the paired t test over seeds on the one primary metric, Holm-adjusted over the arms that are "
        "not controls. Intervals are not adjusted. The smallest true difference that this test finds with 80% "
        "probability stands under “could have found”."
    )
    if tested:
        explained += " The bootstrap over test rows knows one training each and has no part in the verdict."
    if comparison.side_metrics:
        explained += " Side effects are differences to the baseline; the baseline's row has its own values."
    return _section("Results", tag("p", explained, class_="soft"), table(head, rows, "Results by arm"))


def _twin(metric: str) -> str:
    return re.sub("^test/", "valid/", metric)


def _bootstraps(arm: "Arm") -> Html:
    lines = [f"s{seed} {signed(mean)} ({interval(low, high)})" for seed, (mean, low, high) in arm.rows.items()]
    return _cell(join(tag("div", line) for line in lines) if lines else NOTHING)


def _paired_cell(found: "Paired | None") -> Html:
    if found is None or found.n == 0:
        return _cell(NOTHING)
    return _cell(signed(found.mean), interval(found.low, found.high) if found.low is not None else "one seed")


def _side_cell(comparison: "Comparison", arm: "Arm", metric: str) -> Html:
    if arm.name != comparison.baseline:
        return _paired_cell(arm.side.get(metric))
    column = f"metrics.{metric}"
    if column not in comparison.runs:
        return _cell(NOTHING)
    own = comparison.runs["run_id"].isin(list(arm.runs.values()))
    return _cell(number(float(comparison.runs.loc[own, column].astype(float).mean())), "own value")


def _section(title: str, *content: str, id_: str | None = None) -> Html:
    return tag("section", tag("h2", title), *content, id=id_)


def effects(comparison: "Comparison", arms: Sequence["Arm"]) -> list[Effect]:
    """The rows of the forest plot: every arm that shares a seed with the baseline."""
    base = next((arm.values for arm in arms if arm.name == comparison.baseline), {})
    found = []
    for index, arm in enumerate(arms):
        paired = arm.difference
        if arm.name == comparison.baseline or paired is None or paired.n == 0:
            continue
        seeds = {seed: arm.values[seed] - base[seed] for seed in arm.values if seed in base}
        figures = signed(paired.mean)
        figures += f" ({interval(paired.low, paired.high)})" if paired.low is not None else " (one seed: no interval)"
        found.append(Effect(index, arm.name, paired.mean, paired.low, paired.high, seeds, arm.minimum_detectable,
                            _name(arm, index), figures, arm.role == "control"))  # fmt: skip
    return found


def _forest(comparison: "Comparison", arms: Sequence["Arm"]) -> Html:
    rows = effects(comparison, arms)
    title = "Differences to the baseline"
    if not rows:
        return _section(title, tag("p", "No arm shares a seed with the baseline.", class_="soft"))
    told = (
        f"{comparison.metric}, {_goal(comparison)}. Large dot and line: mean over seeds and its 95% interval, "
        "unadjusted; small dots: one seed each; grey band: differences too small to be found with 80% probability "
        "(left out where it is far wider than all else). Hollow: a control."
    )
    drawn = forest(rows, comparison.mode == "max")
    return _section(title, tag("p", told, class_="soft"), drawn)


def _differences(comparison: "Comparison", arms: Sequence["Arm"]) -> Html:
    keys = list(dict.fromkeys(key for arm in arms for key in arm.differing))
    if not keys:
        return _section("Configuration", tag("p", "No setting differs between the arms.", class_="soft"))
    base = next((arm.differing for arm in arms if arm.name == comparison.baseline), {})
    head = ["setting", *(arm.name for arm in arms)]
    rows = []
    for key in keys:
        usual = base.get(key)
        cells = [
            tag("td", arm.differing.get(key, NOTHING), class_="same" if arm.differing.get(key) == usual else "differs")
            for arm in arms
        ]
        rows.append([tag("code", Html(text(key).replace(".", ".<wbr>"))), *cells])
    told = "Only what differs between the arms; bold: other than the baseline."
    return _section("Configuration", tag("p", told, class_="soft"), table(head, rows, "Settings that differ"))


def panel_metrics(comparison: "Comparison", names: Sequence[str]) -> dict[str, list[str]]:
    """Heading -> metrics that have a panel, in order. names: every metric of the history."""
    twin = _twin(comparison.metric)
    sides = {_twin(metric) for metric in comparison.side_metrics}
    own = [name for name in names if not name.endswith(REFERENCES)]
    valid = [name for name in own if name.startswith(("valid/auc_", "valid/loss_")) or name in {twin, *sides}]
    losses = [name for name in own if name.startswith("loss_")]
    return {
        "Validation": sorted(valid, key=lambda name: (name != twin, "/loss_" in name, name)),
        "Training losses": sorted(losses, key=lambda name: (name != "loss_total", name)),
        "Influence": sorted(name for name in own if name.startswith("influence/")),
    }


TOLD = {
    "Validation": "A metric of this name is the same quantity in every arm.",
    "Training losses": "A loss that holds an arm's own weights, as loss_total does, is not on one scale across arms.",
    "Influence": "How much each part of the loss has to say in the shared layers.",
}


def _curves(comparison: "Comparison", arms: Sequence["Arm"], history: pd.DataFrame) -> Html:
    names = [str(name) for name in history["metric"].unique()] if len(history) else []
    groups = panel_metrics(comparison, names)
    wanted = [metric for metrics in groups.values() for metric in metrics]
    runs = {arm.name: list(arm.runs.values()) for arm in arms}
    drawn = curves(history, wanted, runs) if wanted else {}
    alpha = _alpha(comparison, arms, history)
    if not drawn:
        return join([_section("Curves", tag("p", "No history was read: there are no curves.", class_="soft")), alpha])
    index = {arm.name: position for position, arm in enumerate(arms)}
    opened = {index[name]: step for name, step in gates(history, runs).items()}
    found = [curve for of_arms in drawn.values() for curve in of_arms.values()]
    steps = (min(int(curve.steps[0]) for curve in found), max(int(curve.steps[-1]) for curve in found))
    blocks = {
        heading: [_panel(metric, drawn[metric], index, opened, steps) for metric in metrics if metric in drawn]
        for heading, metrics in groups.items()
    }
    told = (
        f"Line: mean over seeds; band: lowest to highest seed. A run's curve of more than {SMOOTH_ABOVE} points is "
        f"smoothed (each point the average of the last {100 // SMOOTHED_SHARE}% of the run's points), and every curve "
        f"is thinned to at most {MOST_POINTS} points. Axes are fitted to the last {round(100 * (1 - FITTED_FROM))}% of "
        "the steps: what comes before may lie outside. Dashed verticals: the step at which an arm's gate opens."
    )
    missing = left_out(history, wanted)
    if missing:
        told += f" {missing:,} values were NaN or infinite and are not drawn."
    sections = []
    for heading, panels in blocks.items():
        if panels:
            sections += [
                tag("h3", heading),
                tag("p", TOLD[heading], class_="soft"),
                tag("div", *panels, class_="panels"),
            ]
            sections += [alpha] if heading == "Training losses" else []
    if not blocks["Training losses"]:
        sections.append(alpha)
    return _section("Curves", tag("p", told, class_="soft"), _legend(arms, opened), *sections)


def _panel(
    metric: str, of_arms: Mapping[str, Curve], index: Mapping[str, int], opened: Mapping[int, int],
    steps: tuple[int, int],
) -> Html:  # fmt: skip
    return panel(metric, {index[name]: curve for name, curve in of_arms.items()}, opened, steps, list(index))


def _legend(arms: Sequence["Arm"], opened: Mapping[int, int]) -> Html:
    """A box an arm that shows and hides it in every panel."""
    labels = []
    for index, arm in enumerate(arms):
        gate = tag("small", f"gate {opened[index]}") if index in opened else Html("")
        box = tag("input", type="checkbox", checked=True, id=f"show-{index}")
        labels.append(tag("label", box, _key(index), tag("span", arm.name), gate, class_=f"a{index}",
                          data_key=str(index), data_name=arm.name))  # fmt: skip
    return tag("div", *labels, class_="legend", role="group", aria_label="Arms to show")


def _alpha(comparison: "Comparison", arms: Sequence["Arm"], history: pd.DataFrame) -> Html:
    """The weights of the classes, as bars on one scale."""
    of_arms = {arm.name: _last_values(comparison, arm, history, "alpha/") for arm in arms}
    usual = [f"alpha/{name}" for name in ("positive", "negative", "neutral")]
    known = {name for values in of_arms.values() for name in values}
    names = [name for name in usual if name in known] + sorted(known - set(usual))
    if not names:
        return Html("")
    longest = max(abs(value) for values in of_arms.values() for value in values.values()) or 1.0
    rows = [
        [_name(arm, index), *(_bar(of_arms[arm.name].get(name), longest, index) for name in names)]
        for index, arm in enumerate(arms)
    ]
    head = ["arm", *(name.removeprefix("alpha/") for name in names)]
    return join([tag("h3", "Alpha"), table(head, rows, "Alpha of each class by arm")])


def _bar(value: float | None, longest: float, index: int) -> Html:
    if value is None:
        return tag("td", NOTHING)
    bar = tag("i", style=f"width:{110 * abs(value) / longest:.1f}px", class_=f"a{index}", aria_hidden="true")
    return tag("td", tag("div", bar, tag("span", number(value)), class_="bar"))


def _last_values(comparison: "Comparison", arm: "Arm", history: pd.DataFrame, prefix: str) -> dict[str, float]:
    """The mean over an arm's runs of the last value of each metric with the prefix."""
    runs = list(arm.runs.values())
    values = comparison.runs[comparison.runs["run_id"].isin(runs)] if "run_id" in comparison.runs else comparison.runs
    columns = [column for column in values if str(column).startswith(f"metrics.{prefix}")]
    found = {str(column).removeprefix("metrics."): float(values[column].astype(float).mean()) for column in columns}
    if len(history):
        own = history[history["run"].isin(runs) & history["metric"].astype(str).str.startswith(prefix)]
        last = own.sort_values("step", kind="stable").groupby(["metric", "run"], observed=True)["value"].last()
        found |= {str(name): float(value) for name, value in last.groupby("metric", observed=True).mean().items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _runs(comparison: "Comparison", arms: Sequence["Arm"]) -> Html:
    position = {arm.name: index for index, arm in enumerate(arms)}
    rows = []
    for _, run in comparison.runs.iterrows():
        arm = str(run.get("arm", ""))
        name = _name(arms[position[arm]], position[arm]) if arm in position else text(arm)
        value = run.get(f"metrics.{comparison.metric}")
        rows.append([
            name,
            _cell(NOTHING if pd.isna(run.get("seed")) else str(run["seed"])),
            tag("td", str(run.get("status", NOTHING))),
            _cell(number(None if value is None else float(value))),
            tag("td", tag("code", str(run.get("run_id", "")))),
            tag("td", str(run.get("name", ""))),
        ])  # fmt: skip
    head = ["arm", "seed", "status", comparison.metric, "run id", "name"]
    return _section("Runs", table(head, rows, "Runs"))


def _notes(comparison: "Comparison") -> Html:
    if not comparison.notes:
        return Html("")
    return _section("Notes", tag("ul", *(tag("li", note) for note in comparison.notes)), id_="notes")
