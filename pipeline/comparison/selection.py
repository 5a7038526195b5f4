"""Which tracked runs are compared: one an arm and seed, of one task and data, with one metric."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.comparison.run_loading import count_by
from pipeline.config.run_config import is_operational
from pipeline.config.strict_config import nearest
from pipeline.errors import UserError
from pipeline.names import CALIBRATED, CALIBRATION

REFERENCE = re.compile(r"_(bayes|majority|tfidf)$")  # scores that are not the model's
NOT_SET = "not set"
SIDE_KINDS = ("auc_", "f1_", "ece_", "logloss_", "calibration_")  # in the order in which they are shown
LOWER_IS_BETTER = re.compile(r"(^|[/_])(loss|logloss|ece|error)")


def usable_runs(runs: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The finished runs that have a seed.

    Raises:
        UserError: there is none.
    """
    open_ends = runs[runs["status"] != "FINISHED"]
    listed = zip(open_ends["name"], open_ends["run_id"], open_ends["status"], strict=True)
    left_out = dict(runs.attrs.get("left_out", {})) | {f"{name} ({run})": status for name, run, status in listed}
    if left_out:
        notes.append(f"not finished and left out: {count_by(left_out.values())}: {some(left_out)}")
    usable = runs[runs["status"] == "FINISHED"]
    without = usable[usable["seed"].isna()]
    if len(without):
        notes.append(f"without a seed and left out: {some(_labels(without))}")
    usable = usable[usable["seed"].notna()]
    if usable.empty:
        raise UserError(f"nothing to compare: none of {len(runs) or 'the'} runs is finished and has a seed")
    commits = _column(usable, "tags.mlflow.source.git.commit")
    if len(set(commits) - {""}) > 1:
        notes.append(f"the runs were made by {len(set(commits) - {''})} versions of the code (git commits)")
    return usable


def only_value(runs: pd.DataFrame, fact: str, unknown_fits: bool = False) -> str:
    """The one value of a column; "" (runs that do not say) is a value too, unless `unknown_fits` any other.

    Raises:
        UserError: there are several.
    """
    found = _column(runs, fact)
    values = [value for value in dict.fromkeys(found) if value or not unknown_fits]
    if len(values) > 1:
        examples = [f"{value[:16] or 'unknown'} (run {runs['run_id'].iloc[found.index(value)]})" for value in values]
        raise UserError(f"runs of different {fact} cannot be compared: found {some(examples, 3)}; allowed: one")
    return values[0] if values else ""


def with_arms(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a name in `arm`: where no tag has it, from the settings in which such runs differ."""
    missing = runs["arm"].isna()
    if not missing.any():
        return runs
    keys = _setting_keys(runs)
    rows = list(zip(*(_column(runs, f"params.{key}") for key in keys), strict=True)) if keys else [()] * len(runs)
    differing = [at for at in range(len(keys)) if len({row[at] for row in rows}) > 1]
    leaves = [keys[at].rsplit(".", 1)[-1] for at in differing]
    shown = [leaf if leaves.count(leaf) == 1 else keys[at] for leaf, at in zip(leaves, differing, strict=True)]
    names = [
        " ".join(f"{leaf} {row[at] or NOT_SET}" for leaf, at in zip(shown, differing, strict=True)) or "run"
        for row in rows
    ]
    return runs.assign(arm=runs["arm"].where(~missing, pd.Series(names, index=runs.index)))


def aim(runs: pd.DataFrame, attrs: Mapping[Any, Any], metric: str | None, mode: str | None) -> tuple[str, str]:
    """The primary metric and whether more (max) or less (min) of it is better.

    Raises:
        UserError: it is in no run, or the runs do not agree on one.
    """
    logged = _finite_metrics(runs)
    evaluated = dict.fromkeys(zip(_column(runs, "params.evaluation.metric"), _column(runs, "params.evaluation.mode"),
                                  strict=True))  # fmt: skip
    if metric is None:
        metric = attrs.get("metric")
    if metric is None:
        chosen = {name for name, _ in evaluated} - {""}
        if len(chosen) != 1:
            raise UserError(f"the runs were evaluated by {some(sorted(chosen)) or 'nothing they tell'}; "
                            "name the metric to compare by metric=")  # fmt: skip
        on_validation = chosen.pop()
        on_test = on_validation.replace("valid/", "test/", 1)
        metric = on_test if on_test in logged else on_validation
    if metric not in logged:
        plain = [name for name in logged if name.startswith("test/") and _is_plain(name)] or logged
        raise UserError(f"metric {metric}: in none of {len(runs)} runs{nearest(metric, plain[:12])}")
    if mode is None and attrs.get("metric") == metric:
        mode = attrs.get("mode") or None
    if mode is None:
        modes = {how for name, how in evaluated if name == validation_metric(metric) and how}
        mode = modes.pop() if len(modes) == 1 else "min" if LOWER_IS_BETTER.search(metric) else "max"
    if mode not in ("max", "min"):
        raise UserError(f"mode: found {mode}, allowed: max, min")
    return metric, mode


def baseline_arm(runs: pd.DataFrame, asked: str | None) -> str:
    """The arm that others are compared with: `asked` (an arm or a run id), else the one with the role baseline.

    Raises:
        UserError: there is no such arm, or not exactly one with that role.
    """
    arms = list(dict.fromkeys(runs["arm"]))
    if asked is not None:
        of_run = list(runs.loc[runs["run_id"] == asked, "arm"])
        if asked not in arms and not of_run:
            raise UserError(f"baseline {asked}: no such arm; allowed: {some(arms, 12)}, or the id of a run")
        return asked if asked in arms else str(of_run[0])
    found = list(dict.fromkeys(runs.loc[runs["role"] == "baseline", "arm"]))
    if len(found) != 1:
        problem = f"several arms have the role baseline: {some(found)}" if found else "no run has the role baseline"
        raise UserError(f"no baseline: {problem}; name one by baseline=, allowed: {some(arms, 12)}")
    return str(found[0])


def measured(runs: pd.DataFrame, metric: str, notes: list[str]) -> pd.DataFrame:
    """The runs whose metric is a number."""
    finite = np.isfinite(runs[f"metrics.{metric}"].astype(float))
    if not finite.all():
        notes.append(f"without a number for {metric} and left out: {some(_labels(runs[~finite]))}")
    lost = [arm for arm in dict.fromkeys(runs["arm"]) if arm not in set(runs.loc[finite, "arm"])]
    if lost:
        notes.append(f"arms without any run left: {some(lost)}")
    return runs[finite]


def newest(runs: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """One run an arm and seed."""
    ordered = runs.sort_values("start_time", kind="stable")
    kept = runs.loc[runs.index.isin(ordered.drop_duplicates(["arm", "seed"], keep="last").index)]
    if len(kept) < len(runs):
        older = runs.loc[~runs.index.isin(kept.index)]
        notes.append(f"another run of the same arm and seed is newer and counts instead of: {some(_labels(older))}")
    return kept


def settings_of(groups: Mapping[str, pd.DataFrame], notes: list[str]) -> dict[str, dict[str, str]]:
    """Arm -> the settings in which arms differ. `not set`: a key that the arm's runs do not know."""
    keys = _setting_keys(next(iter(groups.values())))
    values = {arm: {key: _column(group, f"params.{key}") for key in keys} for arm, group in groups.items()}
    for arm, of in values.items():
        mixed = [key for key, found in of.items() if len(set(found)) > 1]
        if mixed:
            notes.append(f"{arm}: its runs differ among themselves in {some(mixed)}")
    differing = [key for key in keys if len({tuple(sorted(set(of[key]))) for of in values.values()}) > 1]
    return {arm: {key: " | ".join(dict.fromkeys(value or NOT_SET for value in of[key])) for key in differing}
            for arm, of in values.items()}  # fmt: skip


def _setting_keys(runs: pd.DataFrame) -> list[str]:
    """The dotted keys of the config that say what was trained."""
    return sorted(key for key in _names(runs, "params.")
                  if "." in key and not is_operational(key) and not key.startswith(CALIBRATION))  # fmt: skip


def side_metrics(runs: pd.DataFrame, metric: str) -> tuple[str, ...]:
    """Other test metrics worth a look, by their names; errors and calibration of the primary's event first.

    Those of calibrated probabilities follow the same ones of the model's own.
    """
    event = _event(metric)

    def rank(name: str) -> tuple[int, bool, int, str]:
        kind, calibrated = _side_kind(name), name.endswith(CALIBRATED)
        return (0 if kind < 2 and not calibrated else 1 if _event(name) == event else 2), calibrated, kind, name

    found = [name for name in _finite_metrics(runs)
             if name.startswith("test/") and _is_plain(name) and _side_kind(name) >= 0 and name != metric]  # fmt: skip
    return tuple(sorted(found, key=rank))


def _event(metric: str) -> str:
    return metric.removesuffix(CALIBRATED).rsplit("_", 1)[-1]


def _side_kind(name: str) -> int:
    leaf = name.rsplit("/", maxsplit=1)[-1]
    return next((at for at, kind in enumerate(SIDE_KINDS)
                 if leaf.startswith(kind) or (kind == "f1_" and "_f1_" in leaf)), -1)  # fmt: skip


def _is_plain(name: str) -> bool:
    return name.count("/") == 1 and not REFERENCE.search(name)


def validation_metric(metric: str) -> str:
    """The same metric on the validation split."""
    return metric.replace("test/", "valid/", 1) if metric.startswith("test/") else metric


def run_ids(group: pd.DataFrame) -> dict[int, str]:
    """Seed -> run id."""
    return dict(sorted((int(seed), str(run)) for seed, run in zip(group["seed"], group["run_id"], strict=True)))


def by_seed(group: pd.DataFrame, metric: str) -> dict[int, float]:
    """Seed -> last value, where it is a number."""
    pairs = zip(group["seed"], group[f"metrics.{metric}"].astype(float), strict=True)
    return dict(sorted((int(seed), float(value)) for seed, value in pairs if math.isfinite(value)))


def _finite_metrics(runs: pd.DataFrame) -> list[str]:
    return [name for name in _names(runs, "metrics.") if np.isfinite(runs[f"metrics.{name}"].astype(float)).any()]


def _names(runs: pd.DataFrame, prefix: str) -> list[str]:
    """What the columns with this prefix are called without it."""
    return [name.removeprefix(prefix) for name in map(str, runs) if name.startswith(prefix)]


def text_of(group: pd.DataFrame, column: str) -> str:
    """What the first run has there; "" for nothing."""
    return _column(group, column)[0]


def _column(runs: pd.DataFrame, column: str) -> list[str]:
    """A column of texts, "" where there is none."""
    return [str(value) for value in runs[column].fillna("")] if column in runs else [""] * len(runs)


def _labels(runs: pd.DataFrame) -> list[str]:
    return [f"{name} ({run})" for name, run in zip(runs["name"], runs["run_id"], strict=True)]


def some(names: Iterable[object], most: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
