"""Is an arm better than the baseline? Tracked runs side by side: over seeds, and a verdict in words.

The verdict is Student's paired t test over seeds on one primary metric, adjusted by Holm for the number of arms that
are not controls. The bootstrap over test rows stands beside it and never makes it: it does not know other seeds.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.comparison import wording
from pipeline.comparison.compare_config import CompareConfig, check_source
from pipeline.comparison.page.view import write_page
from pipeline.comparison.results import Arm, Comparison
from pipeline.comparison.row_intervals import row_intervals
from pipeline.comparison.run_loading import load_history, load_runs
from pipeline.comparison.selection import (
    aim,
    baseline_arm,
    by_seed,
    measured,
    newest,
    only_value,
    run_ids,
    settings_of,
    side_metrics,
    some,
    text_of,
    usable_runs,
    validation_metric,
    with_arms,
)
from pipeline.comparison.tables import to_frame, to_markdown, to_text
from pipeline.errors import UserError
from pipeline.maths.statistics import Paired, holm, minimum_detectable_difference, paired
from pipeline.names import COLORS, CONTROLLED, NOTE_LENGTH
from pipeline.runtime.console import say
from pipeline.storage.csv_table import write_csv
from pipeline.tracking.messages import RunRequest
from pipeline.tracking.mlflow_run import MlflowRun, end_early
from pipeline.tracking.store import tracking_uri
from pipeline.tracking.writer import Writer

__all__ = ["Arm", "Comparison", "compare", "load_history", "load_runs", "to_frame", "to_markdown", "to_text", "write"]

CURVES = re.compile(r"loss_.*|valid/.*|alpha/.*|influence/.*|aux_focal_on")  # what the page draws


def compare(  # noqa: PLR0917 (what a notebook gives by position is one or two)
    runs: pd.DataFrame,
    metric: str | None = None,
    mode: str | None = None,
    baseline: str | None = None,
    bootstrap: bool = True,
    title: str = "",
) -> Comparison:
    """Compare the arms of `runs` (a frame of `load_runs`) with the baseline.

    `metric`, `mode` (max or min): null = the sweep's own, else what the runs were evaluated by, on the test split.
    `baseline`: an arm, or a run id of it; None = the arm with the role baseline. Runs without a tag `arm` are grouped
    by the settings in which they differ. Of runs with the same arm and seed the newest counts.

    Raises:
        UserError: no finished runs, several tasks or data digests, no such metric, no or several baselines.
    """
    notes: list[str] = []
    usable = usable_runs(runs, notes)
    task, digest = only_value(usable, "task", unknown_fits=True), only_value(usable, "data_digest")
    usable = with_arms(usable)
    metric, mode = aim(usable, runs.attrs, metric, mode)
    name = baseline_arm(usable, baseline)
    usable = newest(measured(usable, metric, notes), notes)
    groups = {str(arm): group for arm, group in usable.groupby("arm", sort=False)}
    if name not in groups:
        raise UserError(f"baseline {name}: none of its runs has {metric}")
    groups = {arm: groups[arm] for arm in _side_by_side(name, groups)}
    settings = settings_of(groups, notes)
    sides = side_metrics(usable, metric)
    values = {arm: by_seed(group, metric) for arm, group in groups.items()}
    differences = {arm: paired(_differences(values[arm], values[name])) for arm in groups}
    roles = {arm: "baseline" if arm == name else _role(group) for arm, group in groups.items()}
    tested = [arm for arm, role in roles.items() if role == "arm"]
    adjusted = dict(zip(tested, holm([differences[arm].p for arm in tested]), strict=True))
    best = _best(usable, metric, mode)
    rows = row_intervals(groups, values, name, metric, notes) if bootstrap else {}
    colors = _colors(groups)
    controls = {of: arm for arm, group in reversed(groups.items()) if roles[arm] == "control"
                for of in text_of(group, "control_of").split(CONTROLLED)}  # fmt: skip

    def arm_of(arm: str, group: pd.DataFrame) -> Arm:
        found, is_baseline, ids = differences[arm], arm == name, run_ids(group)
        best_of = [best[run] for run in ids.values() if run in best]
        against = controls.get(arm) if roles[arm] == "arm" else None
        return Arm(
            name=arm,
            role=roles[arm],
            control_of=text_of(group, "control_of") or None,
            color=colors[arm],
            runs=ids,
            values=values[arm],
            mean=float(np.mean(list(values[arm].values()))),
            spread=_spread(list(values[arm].values())),
            best=float(np.mean(best_of)) if best_of else None,
            best_spread=_spread(best_of),
            difference=None if is_baseline else found,
            p_adjusted=adjusted.get(arm),
            minimum_detectable=minimum_detectable_difference(found.sd, found.n, len(tested)) if arm in tested else None,
            rows=rows.get(arm, {}),
            verdict=wording.verdict(roles[arm], found, adjusted.get(arm), mode),
            against_control=paired(_differences(values[arm], values[against])) if against else None,
            side={} if is_baseline else _side(group, groups[name], sides),
            differing=settings[arm],
        )

    arms = tuple(arm_of(arm, group) for arm, group in groups.items())
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
        baseline=name,
        seeds=tuple(sorted({seed for arm in arms for seed in arm.runs})),
        arms=arms,
        side_metrics=sides,
        runs=usable.reset_index(drop=True),
        notes=tuple(notes),
    )


def write(comparison: Comparison, folder: Path, history: pd.DataFrame | None = None) -> list[Path]:
    """comparison.csv, comparison.md and comparison.html in the folder; `history` of `load_history` makes the curves.

    Without it the curves that the page draws are read from the runs.

    Raises:
        UserError: the folder cannot be written, or the runs cannot be read.
    """
    files = [folder / f"comparison.{kind}" for kind in ("csv", "md", "html")]
    if history is None:
        logged = [str(name).removeprefix("metrics.") for name in comparison.runs.filter(like="metrics.")]
        history = load_history(comparison.runs, [name for name in logged if CURVES.fullmatch(name)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(to_frame(comparison), files[0])
        files[1].write_text(to_markdown(comparison), encoding="utf-8")
        write_page(comparison, history, files[2])
    except OSError as error:
        raise UserError(f"output_dir {folder}: {error.strerror or error}") from None
    return files


def compare_runs(config: CompareConfig, given: frozenset[str]) -> None:  # noqa: ARG001 (every key acts)
    """The entry point: compare, show, and write; in a run that `mlflow run` opened, leave it there too."""
    check_source(config.sweep_id, config.runs, config.experiment, config.filter)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away is told within seconds
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
    comparison = compare(runs, config.metric, config.mode, config.baseline, config.bootstrap)
    ids = hashlib.sha256(" ".join(sorted(comparison.runs["run_id"])).encode()).hexdigest()[:12]
    files = write(comparison, Path(config.output_dir) / (config.sweep_id or ids))
    say(to_text(comparison))
    say("\n" + "\n".join(str(file) for file in files))
    return comparison, files


def _side_by_side(baseline: str, groups: Mapping[str, pd.DataFrame]) -> list[str]:
    """Baseline, then each arm followed by its controls, then controls whose arm is not here."""
    controls = [arm for arm, group in groups.items() if _role(group) == "control" and arm != baseline]
    order = [baseline]
    for arm in groups:
        if arm != baseline and arm not in controls:
            own = [control for control in controls if arm in text_of(groups[control], "control_of").split(CONTROLLED)]
            order += [arm, *(control for control in own if control not in order)]
    return order + [control for control in controls if control not in order]


def _role(group: pd.DataFrame) -> str:
    """Of an arm that is not the chosen baseline."""
    return "control" if text_of(group, "role") == "control" else "arm"


def _side(group: pd.DataFrame, base: pd.DataFrame, metrics: Sequence[str]) -> dict[str, Paired]:
    found = {metric: paired(_differences(by_seed(group, metric), by_seed(base, metric))) for metric in metrics}
    return {metric: difference for metric, difference in found.items() if difference.n}


def _colors(groups: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Of the tags; arms without one, or with another arm's, take the next that is free."""
    found: dict[str, str] = {}
    for arm, group in groups.items():
        own = text_of(group, "color")
        if re.fullmatch(r"#[0-9a-fA-F]{6}", own) and own not in found.values():
            found[arm] = own
    free = [color for color in COLORS if color not in found.values()] or list(COLORS)
    without = [arm for arm in groups if arm not in found]
    return {arm: found.get(arm) or free[without.index(arm) % len(free)] for arm in groups}


def _note_unshared_seeds(arms: Sequence[Arm], notes: list[str]) -> None:
    base = arms[0]
    few = [arm.name for arm in arms[1:] if arm.difference and arm.difference.n < 2]
    if few:
        notes.append(f"fewer than two seeds shared with the baseline, so no interval and no verdict: {some(few)}")
    for arm in arms[1:]:
        alone, lacking = set(arm.runs) - set(base.runs), set(base.runs) - set(arm.runs)
        parts = [f"seeds {some(sorted(alone))} have no baseline"] if alone else []
        parts += [f"seeds {some(sorted(lacking))} of the baseline have no run here"] if lacking else []
        if parts:
            notes.append(f"{arm.name}: {' and '.join(parts)}; differences are over the shared seeds")


def _note_equal_seeds(arms: Sequence[Arm], runs: pd.DataFrame, metric: str, notes: list[str]) -> None:
    """Seeds at which nothing sets the arms apart: most often their best weights are from before the gate."""
    for seed in sorted({seed for arm in arms for seed in arm.values}):
        found = {arm.values[seed] for arm in arms if seed in arm.values}
        here = runs[runs["seed"] == seed]
        if len(here) < 2 or len(found) > 1:
            continue
        steps = set(here["metrics.best_step"].dropna()) if "metrics.best_step" in here else set()
        where = f", all at their best at step {next(iter(steps)):.0f}" if len(steps) == 1 else ""
        notes.append(f"seed {seed}: every arm has the same {metric}{where}; best weights from before the gate are the "
                     "same weights, and a difference of 0 here says nothing of what comes after it")  # fmt: skip


def _differences(arm: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    return [value - base[seed] for seed, value in arm.items() if seed in base]


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _best(runs: pd.DataFrame, metric: str, mode: str) -> dict[str, float]:
    """Run id -> the best value of the metric on the validation split, over its evaluations."""
    on_validation = validation_metric(metric)
    if not on_validation.startswith("valid/") or f"metrics.{on_validation}" not in runs:
        return {}
    history = load_history(runs, [on_validation])
    history = history[np.isfinite(history["value"])]
    grouped = history.groupby("run", observed=True)["value"]
    found = grouped.max() if mode == "max" else grouped.min()
    return {str(run): float(value) for run, value in found.items()}
