"""A comparison as one HTML page that needs nothing but a browser: verdicts, tables and curves, offline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.comparison import wording
from pipeline.comparison.page import charts, colors, curves
from pipeline.comparison.page.charts import Effect, Panel
from pipeline.comparison.results import Arm, Comparison
from pipeline.comparison.selection import validation_metric

REFERENCES = ("_bayes", "_majority", "_tfidf")  # scores of yardsticks, not of the arms
SENTIMENTS = ("positive", "negative", "neutral")

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"wording": wording, "geometry": charts, "curves": curves, "colors": colors}
TEMPLATES.filters |= {"px": charts.pixels, "percent": charts.per_cent}


def write_page(comparison: Comparison, history: pd.DataFrame, file: Path) -> Path:
    """Write the comparison's page; returns its path.

    history: columns run, metric, step, value, as `pipeline.comparison.verdicts.load_history` gives them; may be empty.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(comparison, history), encoding="utf-8")
    return file


def page(comparison: Comparison, history: pd.DataFrame) -> str:
    """The page's HTML."""
    arms, runs = comparison.arms, comparison.runs
    sweeps = [sweep for sweep in runs["sweep_id"].dropna().unique() if sweep] if "sweep_id" in runs else []
    return TEMPLATES.get_template("page.html").render(
        comparison=comparison,
        title=comparison.title or f"Comparison on {comparison.metric}",
        facts=[*wording.facts(comparison), *(f"sweep {sweep}" for sweep in sweeps), comparison.tracking_uri],
        styles=colors.line_styles([arm.color for arm in arms]),
        columns=wording.columns(comparison),
        numbers=wording.metric_format(comparison),
        effects=effects(comparison),
        settings=list(dict.fromkeys(key for arm in arms for key in arm.differing)),
        **_drawn(comparison, history),
        **_alpha(comparison, history),
        rows=_runs(comparison),
    )


def effects(comparison: Comparison) -> list[Effect]:
    """The rows of the forest plot: every arm that shares a seed with the baseline."""
    base = next((arm.values for arm in comparison.arms if arm.name == comparison.baseline), {})
    rows = []
    for index, arm in enumerate(comparison.arms):
        paired = arm.difference
        if arm.name == comparison.baseline or paired is None or paired.n == 0:
            continue
        seeds = {seed: arm.values[seed] - base[seed] for seed in arm.values if seed in base}
        rows.append(Effect(index, arm, paired.mean, paired.low, paired.high, seeds, arm.minimum_detectable))
    return rows


def panel_metrics(comparison: Comparison, names: Sequence[str]) -> dict[str, list[str]]:
    """Heading -> metrics that have a panel, in order. names: every metric of the history."""
    primary = validation_metric(comparison.metric)
    sides = {validation_metric(metric) for metric in comparison.side_metrics}
    own = [name for name in names if not name.endswith(REFERENCES)]
    valid = [name for name in own if name.startswith(("valid/auc_", "valid/loss_")) or name in {primary, *sides}]
    losses = [name for name in own if name.startswith("loss_")]
    return {
        "Validation": sorted(valid, key=lambda name: (name != primary, "/loss_" in name, name)),
        "Training losses": sorted(losses, key=lambda name: (name != "loss_total", name)),
        "Influence": sorted(name for name in own if name.startswith("influence/")),
    }


def _drawn(comparison: Comparison, history: pd.DataFrame) -> Mapping[str, object]:
    """The panels under their headings, where the gates opened, and how many values are not drawn."""
    names = [str(name) for name in history["metric"].unique()] if len(history) else []
    groups = panel_metrics(comparison, names)
    wanted = [metric for metrics in groups.values() for metric in metrics]
    runs = {arm.name: list(arm.runs.values()) for arm in comparison.arms}
    drawn = curves.curves(history, wanted, runs) if wanted else {}
    index = {name: position for position, name in enumerate(runs)}
    opened = {index[name]: step for name, step in curves.gates(history, runs).items()} if drawn else {}
    every = [curve for of_arms in drawn.values() for curve in of_arms.values()]
    steps = (min((int(curve.steps[0]) for curve in every), default=0),
             max((int(curve.steps[-1]) for curve in every), default=0))  # fmt: skip

    def panel(metric: str) -> Panel:
        of_arms = {index[name]: curve for name, curve in drawn[metric].items()}
        return charts.panel(metric, of_arms, opened, steps, list(index))

    return {
        "panels": {
            heading: [panel(metric) for metric in metrics if metric in drawn] for heading, metrics in groups.items()
        },
        "gates": opened,
        "left_out": curves.left_out(history, wanted),
    }


def _alpha(comparison: Comparison, history: pd.DataFrame) -> Mapping[str, object]:
    """The weights of the classes, an arm each, and the longest bar."""
    alpha = [_last_values(comparison, arm, history, "alpha/") for arm in comparison.arms]
    known = {name for values in alpha for name in values}
    names = [name for name in SENTIMENTS if name in known] + sorted(known - set(SENTIMENTS))
    longest = max((abs(value) for values in alpha for value in values.values()), default=0.0) or 1.0
    return {"alpha": alpha, "alpha_names": names, "longest": longest}


def _last_values(comparison: Comparison, arm: Arm, history: pd.DataFrame, prefix: str) -> dict[str, float]:
    """The mean over an arm's runs of the last value of each metric with the prefix, by the name without it."""
    runs = list(arm.runs.values())
    values = comparison.runs[comparison.runs["run_id"].isin(runs)] if "run_id" in comparison.runs else comparison.runs
    columns = [column for column in values if str(column).startswith(f"metrics.{prefix}")]
    last = {str(column).removeprefix("metrics."): float(values[column].astype(float).mean()) for column in columns}
    if len(history):
        own = history[history["run"].isin(runs) & history["metric"].astype(str).str.startswith(prefix)]
        of_runs = own.sort_values("step", kind="stable").groupby(["metric", "run"], observed=True)["value"].last()
        last |= {str(name): float(value) for name, value in of_runs.groupby("metric", observed=True).mean().items()}
    return {name.removeprefix(prefix): value for name, value in last.items() if np.isfinite(value)}


class _Run(NamedTuple):
    arm: int | None  # index
    arm_name: str
    seed: str
    status: str
    value: str
    run_id: str
    name: str


def _runs(comparison: Comparison) -> list[_Run]:
    position = {arm.name: index for index, arm in enumerate(comparison.arms)}
    numbers = wording.metric_format(comparison)
    rows = []
    for _, run in comparison.runs.iterrows():
        arm, value, seed = str(run.get("arm", "")), run.get(f"metrics.{comparison.metric}"), run.get("seed")
        rows.append(_Run(
            position.get(arm),
            arm,
            wording.NOTHING if pd.isna(seed) else str(seed),
            str(run.get("status", wording.NOTHING)),
            numbers.number(None if value is None else float(value)),
            str(run.get("run_id", "")),
            str(run.get("name", "")),
        ))  # fmt: skip
    return rows
