"""Selection of the runs to compare: one per arm and seed, all with the same task, data set and metric."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.comparison.run_loading import count_by
from pipeline.config.run_config import is_operational
from pipeline.config.strict_config import nearest
from pipeline.errors import UserError
from pipeline.names import CALIBRATED, CALIBRATION, WEIGHTS_DIGEST
from pipeline.runtime.text import listed

REFERENCES = ("_bayes", "_majority", "_tfidf")  # name suffixes of reference scores, which are not the model's
NOT_SET = "not set"
LOWER_IS_BETTER = re.compile(r"(^|[/_])(loss|logloss|ece|error)")


def usable_runs(runs: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Select the finished runs that have a seed.

    Raises:
        UserError: no run is finished and has a seed.
    """
    unfinished, usable = runs[runs["status"] != "FINISHED"], runs[runs["status"] == "FINISHED"]
    left_out = runs.attrs.get("left_out", {}) | dict(zip(_labels(unfinished), unfinished["status"], strict=True))
    if left_out:
        notes.append(f"not finished and left out: {count_by(left_out.values())}: {listed(left_out)}")
    without_seed, usable = usable[usable["seed"].isna()], usable[usable["seed"].notna()]
    if len(without_seed):
        notes.append(f"without a seed and left out: {listed(_labels(without_seed))}")
    if usable.empty:
        raise UserError(f"nothing to compare: none of {len(runs) or 'the'} runs is finished and has a seed")
    commits = set(_texts(usable, "tags.mlflow.source.git.commit")) - {""}
    if len(commits) > 1:
        notes.append(f"the runs were made by {len(commits)} versions of the code (git commits)")
    return usable


def single_value(runs: pd.DataFrame, fact: str, unknown_matches: bool = False) -> str:
    """The only value of a column. A missing value counts as "", or matches any value if `unknown_matches`.

    Raises:
        UserError: the column has several values.
    """
    texts = _texts(runs, fact)
    values = [value for value in dict.fromkeys(texts) if value or not unknown_matches]
    if len(values) > 1:
        examples = [f"{value[:16] or 'unknown'} (run {runs['run_id'].iloc[texts.index(value)]})" for value in values]
        raise UserError(f"runs of different {fact} cannot be compared: found {listed(examples, 3)}; allowed: one")
    return values[0] if values else ""


def name_arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Fill in missing values of `arm` with names made of the settings in which the runs differ."""
    missing = runs["arm"].isna()
    if not missing.any():
        return runs
    columns = {key: _texts(runs, f"params.{key}") for key in _setting_keys(runs)}
    columns = {key: values for key, values in columns.items() if len(set(values)) > 1}
    labels = unique_leaves(list(columns))
    names = [
        " ".join(f"{label} {value or NOT_SET}" for label, value in zip(labels, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ] or ["run"] * len(runs)
    return runs.assign(arm=runs["arm"].where(~missing, pd.Series(names, index=runs.index)))


def unique_leaves(keys: list[str]) -> list[str]:
    """The last part of each dotted key, or the whole key if another key ends in the same part."""
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    return [leaf if leaves.count(leaf) == 1 else key for leaf, key in zip(leaves, keys, strict=True)]


def choose_metric(
    runs: pd.DataFrame, attrs: Mapping[Any, Any], metric: str | None, mode: str | None
) -> tuple[str, str]:
    """Choose the primary metric and its mode (max or min): as given, else the sweep's, else those of `evaluation`.

    Raises:
        UserError: no run has the metric, the runs have different evaluation metrics, or the mode is invalid.
    """
    logged = _finite_metrics(runs)
    evaluated = set(zip(_texts(runs, "params.evaluation.metric"), _texts(runs, "params.evaluation.mode"), strict=True))
    metric = attrs.get("metric") if metric is None else metric
    if metric is None:
        chosen = {name for name, _ in evaluated} - {""}
        if len(chosen) != 1:
            raise UserError(f"the runs were evaluated by {listed(sorted(chosen)) or 'an unknown metric'}; "
                            "name the metric to compare by metric=")  # fmt: skip
        on_validation = chosen.pop()
        on_test = on_validation.replace("valid/", "test/", 1)
        metric = on_test if on_test in logged else on_validation
    if metric not in logged:
        candidates = [name for name in logged if name.startswith("test/") and _is_plain(name)] or logged
        raise UserError(f"metric {metric}: in none of {len(runs)} runs{nearest(metric, candidates[:12])}")
    if mode is None and attrs.get("metric") == metric:
        mode = attrs.get("mode") or None
    mode = mode or default_mode(metric, evaluated)
    if mode not in ("max", "min"):
        raise UserError(f"mode: found {mode}, allowed: max, min")
    return metric, mode


def default_mode(metric: str, evaluated: Collection[tuple[str, str]]) -> str:
    """The mode (max or min) of a metric: that of `evaluation` if the runs were evaluated by it, else by its name.

    evaluated: evaluation.metric and evaluation.mode of the runs.
    """
    modes = {how for name, how in evaluated if name == validation_metric(metric) and how}
    return modes.pop() if len(modes) == 1 else "min" if LOWER_IS_BETTER.search(metric) else "max"


def baseline_arm(runs: pd.DataFrame, baseline: str | None) -> str:
    """Name of the baseline arm.

    baseline: an arm, or the id of one of its runs; None for the arm with the role baseline.

    Raises:
        UserError: the arm does not exist, or not exactly one arm has the role baseline.
    """
    arms = list(dict.fromkeys(runs["arm"]))
    if baseline is not None:
        arm_of_run = list(runs.loc[runs["run_id"] == baseline, "arm"])
        if baseline not in arms and not arm_of_run:
            raise UserError(f"baseline {baseline}: no such arm; allowed: {listed(arms, 12)}, or the id of a run")
        return baseline if baseline in arms else str(arm_of_run[0])
    candidates = list(dict.fromkeys(runs.loc[runs["role"] == "baseline", "arm"]))
    if len(candidates) != 1:
        problem = "no run has the role baseline"
        if candidates:
            problem = f"several arms have the role baseline: {listed(candidates)}"
        raise UserError(f"no baseline: {problem}; name one by baseline=, allowed: {listed(arms, 12)}")
    return str(candidates[0])


def with_metric(runs: pd.DataFrame, metric: str, notes: list[str]) -> pd.DataFrame:
    """Select the runs whose metric is finite."""
    finite = _is_finite(runs, metric)
    if not finite.all():
        notes.append(f"without a number for {metric} and left out: {listed(_labels(runs[~finite]))}")
    lost = [arm for arm in dict.fromkeys(runs["arm"]) if arm not in set(runs.loc[finite, "arm"])]
    if lost:
        notes.append(f"arms without any run left: {listed(lost)}")
    return runs[finite]


def newest_runs(runs: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Select the newest run of each arm and seed."""
    newest = runs.sort_values("start_time", kind="stable").drop_duplicates(["arm", "seed"], keep="last").index
    older = runs[~runs.index.isin(newest)]
    if len(older):
        notes.append(f"another run of the same arm and seed is newer and counts instead of: {listed(_labels(older))}")
    return runs[runs.index.isin(newest)]


def differing_settings(groups: Mapping[str, pd.DataFrame], notes: list[str]) -> dict[str, dict[str, str]]:
    """Settings in which arms differ: arm -> dotted key -> value, or `not set` if the arm's runs lack the key."""
    keys = _setting_keys(next(iter(groups.values())))
    values = {arm: {key: _texts(group, f"params.{key}") for key in keys} for arm, group in groups.items()}
    for arm, own in values.items():
        mixed = [key for key, texts in own.items() if len(set(texts)) > 1]
        if mixed:
            notes.append(f"{arm}: its runs differ among themselves in {listed(mixed)}")
    differing = [key for key in keys if len({tuple(sorted(set(own[key]))) for own in values.values()}) > 1]
    return {arm: {key: " | ".join(dict.fromkeys(value or NOT_SET for value in own[key])) for key in differing}
            for arm, own in values.items()}  # fmt: skip


def _setting_keys(runs: pd.DataFrame) -> list[str]:
    """Dotted config keys that affect the result."""
    return sorted(key for key in _names(runs, "params.")
                  if "." in key and not is_operational(key) and not key.startswith(CALIBRATION))  # fmt: skip


def side_metrics(runs: pd.DataFrame, metric: str, kinds: Sequence[str]) -> tuple[str, ...]:
    """Other test metrics to show: the first two kinds, then metrics of the primary metric's event, then the others.

    In each group, metrics of calibrated probabilities come last. kinds: see `RunConfig.side_metrics`.
    """
    event = _event(metric)

    def rank(name: str) -> tuple[int, bool, int, str]:
        kind, calibrated = _side_kind(name, kinds), name.endswith(CALIBRATED)
        return (0 if kind < 2 and not calibrated else 1 if _event(name) == event else 2), calibrated, kind, name

    plain = [name for name in _finite_metrics(runs) if name.startswith("test/") and _is_plain(name)]
    names = [name for name in plain if _side_kind(name, kinds) >= 0 and name != metric]
    return tuple(sorted(names, key=rank))


def _event(metric: str) -> str:
    return metric.removesuffix(CALIBRATED).rsplit("_", 1)[-1]


def _side_kind(name: str, kinds: Sequence[str]) -> int:
    """Index of the metric's kind; -1 if it is not a side effect. Means of several F1 scores, `..._f1_...`, are F1."""
    leaf = name.rsplit("/", maxsplit=1)[-1]
    return next((at for at, kind in enumerate(kinds)
                 if leaf.startswith(kind) or (kind == "f1_" and "_f1_" in leaf)), -1)  # fmt: skip


def _is_plain(name: str) -> bool:
    return name.count("/") == 1 and not name.endswith(REFERENCES)


def validation_metric(metric: str) -> str:
    """The same metric on the validation split."""
    return metric.replace("test/", "valid/", 1) if metric.startswith("test/") else metric


def runs_by_seed(group: pd.DataFrame) -> dict[int, str]:
    """Map each seed to its run id."""
    return dict(sorted((int(seed), str(run)) for seed, run in zip(group["seed"], group["run_id"], strict=True)))


def values_by_seed(group: pd.DataFrame, metric: str) -> dict[int, float]:
    """Map each seed to the metric's last value, if it is finite."""
    pairs = zip(group["seed"], group[f"metrics.{metric}"].astype(float), strict=True)
    return dict(sorted((int(seed), float(value)) for seed, value in pairs if math.isfinite(value)))


def weights_by_seed(group: pd.DataFrame) -> dict[int, str]:
    """Map each seed to the digest of the run's last weights, where it is known."""
    pairs = zip(group["seed"], _texts(group, f"tags.{WEIGHTS_DIGEST}"), strict=True)
    return {int(seed): digest for seed, digest in pairs if digest}


def _is_finite(runs: pd.DataFrame, metric: str) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_] = np.isfinite(runs[f"metrics.{metric}"].to_numpy(dtype=float, na_value=np.nan))
    return finite


def _finite_metrics(runs: pd.DataFrame) -> list[str]:
    return [name for name in _names(runs, "metrics.") if _is_finite(runs, name).any()]


def _names(runs: pd.DataFrame, prefix: str) -> list[str]:
    """Names of the columns that start with the prefix, with the prefix removed."""
    return [name.removeprefix(prefix) for name in map(str, runs) if name.startswith(prefix)]


def first_text(group: pd.DataFrame, column: str) -> str:
    return _texts(group, column)[0]


def _texts(runs: pd.DataFrame, column: str) -> list[str]:
    """Values of a column as text; "" for missing values or a missing column."""
    return [str(value) for value in runs[column].fillna("")] if column in runs else [""] * len(runs)


def _labels(runs: pd.DataFrame) -> list[str]:
    return [f"{name} ({run})" for name, run in zip(runs["name"], runs["run_id"], strict=True)]
