"""Comparison of tracked runs over seeds, with a verdict on whether each arm is better than the baseline.

The verdict is about one primary metric and comes from intervals of the differences over seeds, paired by seed, at a
level adjusted for the number of arms that are not controls and, where seeds are added, for the looks (`decisions.py`).
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.comparison.answer import answer
from pipeline.comparison.compare_config import CompareConfig
from pipeline.comparison.decisions import Decided, Design, decide, design_of, differences
from pipeline.comparison.new_rows import new_rows as on_new_rows
from pipeline.comparison.number_format import estimate
from pipeline.comparison.page.view import write_page
from pipeline.comparison.results import ArmResult, Comparison
from pipeline.comparison.run_loading import load_history, load_runs, load_sweeps
from pipeline.comparison.selection import (
    baseline_arm,
    choose_metric,
    differing_settings,
    first_text,
    name_arms,
    newest_runs,
    runs_by_seed,
    side_metrics,
    single_value,
    usable_runs,
    validation_metric,
    values_by_seed,
    weights_by_seed,
    with_metric,
)
from pipeline.comparison.tables import to_frame, to_markdown, to_text
from pipeline.comparison.wording import sentence
from pipeline.errors import UserError, os_errors
from pipeline.maths.sequential import LEVEL
from pipeline.names import COLORS, CONTROLLED, NOTE_LENGTH
from pipeline.runtime.console import info
from pipeline.runtime.text import listed
from pipeline.storage.csv_table import write_csv
from pipeline.tasks.registry import declarations
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun, end_early
from pipeline.tracking.store import tracking_uri
from pipeline.tracking.writer_client import Writer

__all__ = [
    "ArmResult",
    "Comparison",
    "answer",
    "compare",
    "estimate",
    "load_history",
    "load_runs",
    "load_sweeps",
    "sentence",
    "to_frame",
    "to_markdown",
    "to_text",
    "write",
]

CURVES = ("loss_", "valid/", "alpha/", "influence/")  # prefixes of the metrics that the page draws


def compare(  # noqa: PLR0917 (notebooks pass one or two by position)
    runs: pd.DataFrame,
    metric: str | None = None,
    mode: str | None = None,
    baseline: str | None = None,
    new_rows: bool = True,
    title: str = "",
) -> Comparison:
    """Compare the arms of `runs` (a frame of `load_runs`) with the baseline.

    metric, mode (max or min): None for the sweep's, else the runs' evaluation metric, on the test split if possible.
    baseline: an arm, or the id of one of its runs; None for the arm with role baseline. Runs without a tag `arm` are
    grouped by the settings in which they differ. Only the newest run of an arm and seed counts.

    Raises:
        UserError: no finished run, several tasks or data digests, an unknown metric, or not exactly one baseline.
    """
    notes: list[str] = []
    usable = usable_runs(runs, notes)
    task, digest = single_value(usable, "task", unknown_matches=True), single_value(usable, "data_digest")
    usable = name_arms(usable)
    metric, mode = choose_metric(usable, runs.attrs, metric, mode)
    base = baseline_arm(usable, baseline)
    usable = newest_runs(with_metric(usable, metric, notes), notes)
    groups = {str(arm): group for arm, group in usable.groupby("arm", sort=False)}
    if base not in groups:
        raise UserError(f"baseline {base}: none of its runs has {metric}")
    groups = {arm: groups[arm] for arm in _display_order(base, groups)}
    settings = differing_settings(groups, notes)
    sides = side_metrics(usable, metric, declarations(task).side_metrics)
    roles = {arm: "baseline" if arm == base else _role(group) for arm, group in groups.items()}
    colors = _colors(groups)
    design = design_of(runs, metric, base)
    decided = _decide(groups, roles, base, design, metric, mode)
    groups = {arm: _counted(group, decided.get(arm), notes) for arm, group in groups.items()}
    usable = usable[usable["run_id"].isin([run for group in groups.values() for run in group["run_id"]])]
    values = {arm: values_by_seed(group, metric) for arm, group in groups.items()}
    best = _best_on_validation(usable, metric, mode)
    levels = {arm: decision.level for arm, decision in decided.items()}
    rows = on_new_rows(groups, values, base, metric, levels, notes) if new_rows else {}
    controls = {arm: control for control, group in reversed(groups.items()) if roles[control] == "control"
                for arm in first_text(group, "control_of").split(CONTROLLED)}  # fmt: skip

    def make_arm(name: str, group: pd.DataFrame) -> ArmResult:
        own, run_ids, decision = list(values[name].values()), runs_by_seed(group), decided.get(name)
        own_best = [best[run] for run in run_ids.values() if run in best]
        control = controls.get(name) if decision else None
        side = {side: differences(values_by_seed(group, side), values_by_seed(groups[base], side)) for side in sides}
        if decision is None:  # the baseline, or a control, whose interval is drawn at its arm's level
            level = next((decided[arm].level for arm in controls if controls[arm] == name and arm in decided), LEVEL)
            verdict = "" if name == base else "control"
            decision = Decided(verdict, differences(values[name], values[base], level), level)
        return ArmResult(
            name=name,
            role=roles[name],
            control_of=first_text(group, "control_of") or None,
            color=colors[name],
            runs=run_ids,
            values=values[name],
            mean=float(np.mean(own)),
            spread=_spread(own),
            best=float(np.mean(own_best)) if own_best else None,
            best_spread=_spread(own_best),
            difference=None if name == base else decision.difference,
            level=None if name == base else decision.level,
            looks=decision.looks,
            deciding_seeds=decision.deciding_seeds,
            p_adjusted=decision.p_adjusted,
            minimum_detectable=decision.minimum_detectable,
            new_rows=rows.get(name),
            verdict=decision.verdict,
            against_control=differences(values[name], values[control]) if control else None,
            side={} if name == base else {side: paired for side, paired in side.items() if paired.n},
            differing=settings[name],
        )  # fmt: skip

    arms = tuple(make_arm(name, group) for name, group in groups.items())
    if design.kind == "fixed":
        _note_unshared_seeds(arms, notes)
    _note_equal_seeds(arms, usable, metric, notes)
    sweeps = [sweep for sweep in usable["sweep_id"].unique() if isinstance(sweep, str)]
    return Comparison(
        title=title or (f"sweep {sweeps[0]}" if len(sweeps) == 1 else f"{len(arms)} arms, {len(usable)} runs"),
        task=task,
        metric=metric,
        mode=mode,
        data_digest=digest,
        tracking_uri=tracking_uri(),
        baseline=base,
        seeds=tuple(sorted({seed for arm in arms for seed in arm.runs})),
        arms=arms,
        design=design.kind,
        families=design.families,
        other_families=design.other_families,
        margin=design.margin,
        side_metrics=sides,
        runs=usable.reset_index(drop=True),
        notes=tuple(notes),
    )


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.csv, comparison.md and comparison.html into the folder.

    Raises:
        UserError: the folder cannot be written, or the runs cannot be read.
    """
    table, markdown, page = files = [folder / f"comparison.{kind}" for kind in ("csv", "md", "html")]
    logged = [str(name).removeprefix("metrics.") for name in comparison.runs.filter(like="metrics.")]
    gates = declarations(comparison.task).gates
    history = load_history(comparison.runs, [name for name in logged if name.startswith(CURVES) or name in gates])
    with os_errors(f"output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(to_frame(comparison), table)
        markdown.write_text(to_markdown(comparison), encoding="utf-8", newline="\n")
        write_page(comparison, history, page)
    return files


def compare_runs(config: CompareConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (every key acts)
    """Entry point: compare runs, print and write the results, and log them in the run that `mlflow run` opened."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # report an unreachable server within seconds
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        _compare_and_write(config)
        return
    with Writer() as writer:
        request = RunRequest("compare", run_id=run_id, tags={"role": "comparison"})
        run = MlflowRun(writer, request, Path(config.output_dir))
        try:
            comparison, files = _compare_and_write(config)
        except BaseException as error:
            end_early(run, error)
            raise
        for file in files:
            run.log_artifact(file)
        run.set_tags({"mlflow.note.content": to_markdown(comparison, NOTE_LENGTH)})
        run.finish("FINISHED")


def _compare_and_write(config: CompareConfig) -> tuple[Comparison, list[Path]]:
    runs = load_runs(config.sweep_id, runs=config.runs, experiment=config.experiment, filter=config.filter)
    comparison = compare(runs, config.metric, config.mode, config.baseline, config.new_rows)
    ids = hashlib.sha256(" ".join(sorted(comparison.runs["run_id"])).encode()).hexdigest()[:12]
    files = write(comparison, Path(config.output_dir) / (config.sweep_id or ids))
    info(to_text(comparison))
    info("\n" + "\n".join(str(file) for file in files))
    return comparison, files


def _decide(  # noqa: PLR0917
    groups: Mapping[str, pd.DataFrame], roles: Mapping[str, str], base: str, design: Design, metric: str, mode: str
) -> dict[str, Decided]:
    """Decide on the arms that are not controls."""
    tested = {arm: group for arm, group in groups.items() if roles[arm] == "arm"}
    digests = {arm: weights_by_seed(group) for arm, group in tested.items()}
    values = {arm: values_by_seed(group, metric) for arm, group in tested.items()}
    baseline = groups[base]
    return decide(values, values_by_seed(baseline, metric), design, mode, digests, weights_by_seed(baseline))


def _counted(group: pd.DataFrame, decision: Decided | None, notes: list[str]) -> pd.DataFrame:
    """The arm's runs that its last look counts: `most` may have been raised for others, or the next look not made."""
    if decision is None or not decision.looks:
        return group
    counted = group["seed"] < decision.looks[-1].seeds
    later = sorted(group.loc[~counted, "seed"])
    if later:
        arm = first_text(group, "arm")
        notes.append(f"{arm}: seeds {listed(later)} do not count, because only the scheduled looks do")
    return group[counted]


def _display_order(baseline: str, groups: Mapping[str, pd.DataFrame]) -> list[str]:
    """Order the arms: the baseline, then each arm followed by its controls, then the other controls."""
    control_of = {arm: first_text(group, "control_of").split(CONTROLLED)
                  for arm, group in groups.items() if _role(group) == "control" and arm != baseline}  # fmt: skip
    order = [baseline]
    for arm in groups:
        if arm not in control_of:
            order += [arm, *(control for control, arms in control_of.items() if arm in arms and arm != baseline)]
    return list(dict.fromkeys([*order, *control_of]))


def _role(group: pd.DataFrame) -> str:
    """The role of an arm that is not the chosen baseline."""
    return "control" if first_text(group, "role") == "control" else "arm"


def _colors(groups: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Colour of each arm: its tagged colour, or the next free one if the tag is missing or already used."""
    colors: dict[str, str] = {}
    for arm, group in groups.items():
        tagged = first_text(group, "color")
        if re.fullmatch(r"#[0-9a-fA-F]{6}", tagged) and tagged not in colors.values():
            colors[arm] = tagged
    free = cycle([color for color in COLORS if color not in colors.values()] or list(COLORS))
    return {arm: colors.get(arm) or next(free) for arm in groups}


def _note_unshared_seeds(arms: Sequence[ArmResult], notes: list[str]) -> None:
    base, *others = arms
    few = [arm.name for arm in others if arm.difference and arm.difference.n < 2]
    if few:
        notes.append(f"fewer than two seeds shared with the baseline, so no interval and no verdict: {listed(few)}")
    for arm in others:
        extra, missing = sorted(set(arm.runs) - set(base.runs)), sorted(set(base.runs) - set(arm.runs))
        parts = [f"seeds {listed(extra)} have no baseline"] if extra else []
        parts += [f"seeds {listed(missing)} of the baseline have no run here"] if missing else []
        if parts:
            notes.append(f"{arm.name}: {' and '.join(parts)}; differences are over the shared seeds")


def _note_equal_seeds(arms: Sequence[ArmResult], runs: pd.DataFrame, metric: str, notes: list[str]) -> None:
    """Note seeds at which all arms are equal, usually because their best weights are from before the gate opened."""
    equal: dict[str, set[float]] = {}  # seed -> steps of the best weights
    for seed in sorted({seed for arm in arms for seed in arm.values}):
        values, seed_runs = {arm.values.get(seed) for arm in arms} - {None}, runs[runs["seed"] == seed]
        if len(seed_runs) < 2 or len(values) > 1:
            continue
        equal[str(seed)] = set(seed_runs["metrics.best_step"].dropna()) if "metrics.best_step" in seed_runs else set()
    if equal:
        steps = sorted({f"{step:.0f}" for own in equal.values() for step in own}, key=int)
        where = f", at their best at {'step' if len(steps) == 1 else 'steps'} {listed(steps)}" if steps else ""
        seeds = f"{'seed' if len(equal) == 1 else 'seeds'} {listed(equal)}"
        notes.append(f"{seeds}: every arm has the same {metric}{where}; best weights from before the gate are the "
                     "same weights, and a difference of 0 here says nothing about what comes after it")  # fmt: skip


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _best_on_validation(runs: pd.DataFrame, metric: str, mode: str) -> dict[str, float]:
    """Map each run id to the best value of the metric over the run's evaluations on the validation split."""
    on_validation = validation_metric(metric)
    if not on_validation.startswith("valid/") or f"metrics.{on_validation}" not in runs:
        return {}
    history = load_history(runs, [on_validation])
    values = history[np.isfinite(history["value"])].groupby("run", observed=True)["value"]
    return {str(run): float(value) for run, value in (values.max() if mode == "max" else values.min()).items()}
