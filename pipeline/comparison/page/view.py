"""The HTML page of a comparison: verdicts, tables and curves in one file that opens offline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.comparison import number_format, wording
from pipeline.comparison.answer import sentences
from pipeline.comparison.page import charts, colors, curves, looks
from pipeline.comparison.page.charts import Effect
from pipeline.comparison.results import Comparison
from pipeline.comparison.selection import REFERENCES, validation_metric
from pipeline.tasks.registry import declarations

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {
    "wording": wording,
    "shown": number_format,
    "geometry": charts,
    "looks": looks,
    "curves": curves,
    "colors": colors,
}
TEMPLATES.filters |= {"px": charts.pixels, "percent": charts.per_cent}


def write_page(comparison: Comparison, history: pd.DataFrame, file: Path) -> None:
    """Write the page. history: columns run, metric, step, value, as `load_history` returns them; may be empty."""
    file.write_text(page(comparison, history), encoding="utf-8", newline="\n")


def page(comparison: Comparison, history: pd.DataFrame) -> str:
    """Render the page as HTML."""
    sweeps = comparison.runs["sweep_id"].dropna().unique()
    return TEMPLATES.get_template("page.html").render(
        comparison=comparison,
        source=[
            *([f"data {comparison.data_digest[:12]}"] if comparison.data_digest else []),
            *(f"sweep {sweep}" for sweep in sweeps),
            comparison.tracking_uri,
        ],
        styles=colors.line_styles([arm.color for arm in comparison.arms]),
        sentences=sentences(comparison),
        columns=wording.columns(comparison),
        effects=effects(comparison),
        look_charts=looks.look_charts(comparison),
        settings=list(dict.fromkeys(key for arm in comparison.arms for key in arm.differing)),
        **_curves(comparison, history),
        **_alpha(comparison),
        rows=_run_rows(comparison),
    )


def effects(comparison: Comparison) -> list[Effect]:
    """The rows of the forest plot: every arm that shares a seed with the baseline."""
    base, rows = comparison.arms[0].values, []
    for index, arm in enumerate(comparison.arms):
        paired = arm.difference
        if paired and paired.n:
            seeds = {seed: arm.values[seed] - base[seed] for seed in arm.values if seed in base}
            rows.append(Effect(index, arm, paired, seeds))
    return rows


def panel_metrics(comparison: Comparison, names: Sequence[str]) -> dict[str, list[str]]:
    """Map each heading to the metrics that get a panel, in order. names: all metrics of the history."""
    primary = validation_metric(comparison.metric)
    sides = {validation_metric(metric) for metric in comparison.side_metrics}
    shown = ("valid/loss_", *(f"valid/{kind}" for kind in declarations(comparison.task).side_metrics[:1]))
    own = [name for name in names if not name.endswith(REFERENCES)]
    valid = [name for name in own if name.startswith(shown) or name in {primary, *sides}]
    losses = [name for name in own if name.startswith("loss_")]
    return {
        "Validation": sorted(valid, key=lambda name: (name != primary, "/loss_" in name, name)),
        "Training losses": sorted(losses, key=lambda name: (name != "loss_total", name)),
        "Influence": sorted(name for name in own if name.startswith("influence/")),
    }


def _curves(comparison: Comparison, history: pd.DataFrame) -> Mapping[str, object]:
    """Template variables: panels by heading, steps at which gates open, and the number of values that are not drawn.

    A panel has the panel of the differences to the baseline beside it, unless the baseline lacks the metric.
    """
    groups = panel_metrics(comparison, list(map(str, history["metric"].unique())))
    wanted = [metric for metrics in groups.values() for metric in metrics]
    paired = [metric for heading, metrics in groups.items() if heading != "Influence" for metric in metrics]
    runs = {arm.name: arm.runs for arm in comparison.arms}
    names, index = list(runs), {name: position for position, name in enumerate(runs)}
    points = curves.points_by_run(history, wanted)
    drawn = {metric: {index[name]: curve for name, curve in by_arm.items()}
             for metric, by_arm in curves.curves(points, wanted, runs).items()}  # fmt: skip
    apart = {metric: {index[name]: curve for name, curve in by_arm.items()}
             for metric, by_arm in curves.differences(points, paired, runs, comparison.baseline).items()}  # fmt: skip
    opened = curves.gates(history, runs, declarations(comparison.task).gates) if drawn else {}
    gates = {index[name]: step for name, step in opened.items()}
    steps = [int(curve.steps[end]) for by_arm in drawn.values() for curve in by_arm.values() for end in (0, -1)]
    axis = min(steps, default=0), max(steps, default=0)

    def beside(metric: str) -> list[charts.Panel]:
        own = charts.panel(metric, drawn[metric], gates, axis, names)
        if metric not in apart:
            return [own]
        return [own, charts.panel(metric, apart[metric], gates, axis, names, difference=True)]

    panels = {heading: [beside(metric) for metric in metrics if metric in drawn] for heading, metrics in groups.items()}
    return {"panels": panels, "gates": gates, "left_out": curves.left_out(history, wanted)}


def _alpha(comparison: Comparison) -> Mapping[str, object]:
    """Template variables: class weights of each arm (mean over runs), class names, and the largest weight."""
    runs = comparison.runs
    names = [str(column).removeprefix("metrics.alpha/") for column in runs
             if str(column).startswith("metrics.alpha/")]  # fmt: skip
    alpha = []
    for arm in comparison.arms:
        own = runs[runs["run_id"].isin(list(arm.runs.values()))]
        means = {name: float(own[f"metrics.alpha/{name}"].astype(float).mean()) for name in names}
        alpha.append({name: mean for name, mean in means.items() if np.isfinite(mean)})
    known = {name for values in alpha for name in values}
    names = sorted(known)
    longest = max((abs(value) for values in alpha for value in values.values()), default=0.0) or 1.0
    return {"alpha": alpha, "alpha_names": names, "longest": longest}


class _RunRow(NamedTuple):
    arm: int  # index of the arm
    seed: int
    status: str
    value: str
    run_id: str
    name: str


def _run_rows(comparison: Comparison) -> list[_RunRow]:
    index = {arm.name: position for position, arm in enumerate(comparison.arms)}
    columns = ["arm", "seed", "status", f"metrics.{comparison.metric}", "run_id", "name"]
    return [
        _RunRow(index[arm], seed, status, wording.value(comparison.arms[index[arm]], value), run_id, name)
        for arm, seed, status, value, run_id, name in comparison.runs[columns].itertuples(index=False, name=None)
    ]
