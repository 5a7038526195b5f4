"""Tracked runs as data frames: one row per run, or one row per logged point."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.comparison.compare_config import check_source
from pipeline.comparison.families import families_of
from pipeline.comparison.membership import Membership
from pipeline.errors import UserError
from pipeline.maths.arrays import Floats, Ints
from pipeline.names import CANONICAL, QUESTION, SWEEP
from pipeline.runtime.console import warn
from pipeline.storage.run_folder import HISTORY_FILE
from pipeline.tracking.client import Point
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.store import tracking_uri
from pipeline.tracking.stored_runs import artifact, points_of, runs_of_filter, runs_of_ids, runs_of_sweep, runs_of_tag

# Roles that are never compared: runs that train nothing, and the trials from which a search chooses an arm.
NOT_COMPARED = ("launcher", "summary", "comparison", "trial")
ROLE_ORDER = {"baseline": 0, "arm": 1, "control": 2}
FACTS = ("run_id", "name", "status", "task", "arm", "role", "control_of", "seed", "color", "sweep_id", "data_digest",
         "start_time", "artifact_uri")  # fmt: skip
FACT_TAGS = {"task", "arm", "arm_number", "role", "control_of", "seed", "sweep_id", "data_digest", "mlflow.runColor"}
READERS = 4  # threads that read histories


def load_runs(
    sweep_id: str | None = None,
    *,
    runs: Sequence[str] | None = None,
    experiment: str | None = None,
    filter: str | None = None,  # noqa: A002 (MLflow's name for it)
    finished: bool = True,
) -> pd.DataFrame:
    """Load the runs of a sweep, of run ids, of an experiment or of an MLflow filter, one row each.

    Columns: run_id, name, status, task, arm, role, control_of, seed (Int64), color, sweep_id, data_digest, start_time
    (UTC), artifact_uri; then `params.<key>` (canonical text), `metrics.<name>` (the last value) and `tags.<name>`.
    Missing values are NaN. Rows are sorted by role (baseline, arm, control), arm and seed.

    finished: load finished runs only; `attrs["left_out"]` maps the names of the other runs to their status. For a
    sweep, `attrs` also holds its `metric` and `mode`, and unless an older version ran it, `families` (of arms, see
    `Family`), `other_families` (their number in other sweeps that ask the same question) and `margin`.

    Raises:
        UserError: no or several sources are given, no run matches, or the tracking store is unreachable.
    """
    check_source(sweep_id, runs, experiment, filter)
    if sweep_id is not None:
        stored, source = [_seen_from(run, sweep_id) for run in runs_of_sweep(sweep_id)], f"sweep_id {sweep_id}"
    elif runs is not None:
        stored, source = runs_of_ids([runs] if isinstance(runs, str) else runs), "runs"
    else:
        stored = runs_of_filter(experiment, filter)
        given = {"experiment": experiment, "filter": filter}
        source = " ".join(f"{name} {value}" for name, value in given.items() if value)
    trained = [run for run in stored if run.tags.get("role") not in NOT_COMPARED]
    if not trained:
        others = f" but {len(stored)} that trained nothing" if stored else ""
        raise UserError(f"{source}: found no run{others} in {tracking_uri()}")
    kept = [run for run in trained if run.status == "FINISHED" or not finished]
    if not kept:
        raise UserError(f"{source}: none of {len(trained)} runs is finished ({count_by(r.status for r in trained)})")
    frame = _frame(kept)
    frame.attrs["left_out"] = {f"{run.name} ({run.run_id})": run.status for run in trained if run not in kept}
    if sweep_id is not None:
        summary = next((run.tags for run in stored if run.tags.get("role") == "summary"), {})
        frame.attrs |= {name: summary[name] for name in ("metric", "mode") if name in summary}
        if QUESTION in summary:
            frame.attrs |= {
                "families": families_of(summary),
                "other_families": other_families(sweep_id, summary[QUESTION]),
                "margin": float(summary["margin"]) if summary.get("margin") else None,
            }
    return frame


def load_sweeps(experiment: str | None = None) -> pd.DataFrame:
    """Load the sweeps of an experiment (name or id; None: of all), one row each, oldest first.

    Columns: title (its first characters), sweep_id, task, metric, mode ("": by the metric's name) and margin (NaN:
    none). A sweep whose runs all began in other sweeps is among them.

    Raises:
        UserError: there is no such experiment or no sweep in it, or the tracking store is unreachable.
    """
    found = runs_of_filter(experiment, "tags.role = 'summary'")
    if not found:
        place = f"experiment {experiment}: " if experiment else ""
        raise UserError(f"{place}found no sweep in {tracking_uri()}")
    names = ("sweep_id", "task", "metric", "mode", "margin")
    rows = [(run.name.removeprefix("sweep "), *(run.tags.get(name) for name in names)) for run in found]
    frame = pd.DataFrame(rows, columns=["title", *names])
    return frame.assign(margin=pd.to_numeric(frame["margin"]))


def other_families(sweep_id: str, question: str) -> int:
    """Number of families in other sweeps that ask the same question."""
    others = [run.tags for run in runs_of_tag(QUESTION, question) if run.tags.get("sweep_id") != sweep_id]
    return sum(len(families_of(tags)) for tags in others if tags.get("role") == "summary")


def _seen_from(run: StoredRun, sweep_id: str) -> StoredRun:
    """A run with the tags of its place in this sweep: it may have begun in another one."""
    if (place := Membership.of(run.tags, sweep_id)) is None:
        return run
    tags = {name: value for name, value in run.tags.items() if name != "control_of"} | {"sweep_id": sweep_id}
    tags |= {"arm": place.arm, "role": place.role, "arm_number": str(place.arm_number)}
    return replace(run, tags=tags | ({"control_of": place.control_of} if place.control_of else {}))


def count_by(values: Iterable[str]) -> str:
    """Count equal values, as text such as `2 FAILED, 1 RUNNING`."""
    return ", ".join(f"{count} {value}" for value, count in sorted(Counter(values).items()))


def _frame(runs: Sequence[StoredRun]) -> pd.DataFrame:
    params = [run.canonical_params for run in runs]
    tags = [{name: value for name, value in run.tags.items()
             if name not in FACT_TAGS and not name.startswith((CANONICAL, SWEEP))} for run in runs]  # fmt: skip
    facts = pd.DataFrame([_facts(run, own) for run, own in zip(runs, params, strict=True)], columns=list(FACTS))
    facts["seed"] = facts["seed"].astype("Int64")
    facts["start_time"] = pd.to_datetime(facts["start_time"], unit="ms", utc=True)
    columns = [
        pd.DataFrame(params).add_prefix("params."),
        pd.DataFrame([run.metrics for run in runs]).add_prefix("metrics."),
        pd.DataFrame(tags).add_prefix("tags."),
    ]
    frame = pd.concat([facts, *columns], axis=1)
    order = pd.DataFrame({
        "role": facts["role"].map(ROLE_ORDER).fillna(ROLE_ORDER["arm"]),
        "number": [int(run.tags.get("arm_number", 0)) for run in runs],  # order in the sweep
        "arm": pd.factorize(facts["arm"].fillna(""))[0],
        "seed": facts["seed"],
    })  # fmt: skip
    order = order.sort_values(["role", "number", "arm", "seed"], kind="stable")
    return frame.loc[order.index].reset_index(drop=True)


def _facts(run: StoredRun, params: Mapping[str, str]) -> dict[str, Any]:
    tags = run.tags
    seed = tags.get("seed", params.get("seed", ""))
    return {name: tags.get(name) for name in ("task", "arm", "role", "control_of", "sweep_id", "data_digest")} | {
        "run_id": run.run_id,
        "name": run.name,
        "status": run.status,
        "seed": int(seed) if seed.isdecimal() else None,
        "color": tags.get("mlflow.runColor"),
        "start_time": run.start_time,
        "artifact_uri": run.artifact_uri,
    }


def artifact_uris(runs: pd.DataFrame | Sequence[str]) -> dict[str, str]:
    """Map each run id to its artifact URI."""
    if isinstance(runs, pd.DataFrame):
        return dict(zip(runs["run_id"], runs["artifact_uri"], strict=True))
    return {run.run_id: run.artifact_uri for run in runs_of_ids([runs] if isinstance(runs, str) else list(runs))}


class RunPoints(NamedTuple):
    """A run's points, ordered by metric and step."""

    counts: Mapping[str, int]  # metric -> number of points, in the order of the arrays
    steps: Ints
    values: Floats


def load_history(runs: pd.DataFrame | Sequence[str], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Load every logged point: columns run (id, categorical), metric (categorical), step (int64) and value (float64).

    runs: a frame of `load_runs`, or run ids. metrics: load only these. Rows are ordered by run (as given), metric,
    step and time. A run's points are read from its artifact history.parquet if it exists, else from the tracking store,
    with the same result.

    Raises:
        UserError: a run does not exist, or the tracking store is unreachable.
    """
    uris = artifact_uris(runs)
    wanted = None if metrics is None else frozenset([metrics] if isinstance(metrics, str) else metrics)
    with tempfile.TemporaryDirectory(prefix="focal-pipeline-") as folder, ThreadPoolExecutor(READERS) as pool:
        histories = list(pool.map(partial(_read_points, wanted=wanted, folder=Path(folder)), uris, uris.values()))
    names = sorted({name for points in histories for name in points.counts})
    code = {name: number for number, name in enumerate(names)}
    codes = np.array([code[name] for points in histories for name in points.counts], dtype=np.int32)
    counts = [count for points in histories for count in points.counts.values()]
    run_codes = np.repeat(np.arange(len(uris), dtype=np.int32), [len(points.steps) for points in histories])
    columns = {
        "run": pd.Categorical.from_codes(run_codes, pd.Index(list(uris), dtype=object)),
        "metric": pd.Categorical.from_codes(np.repeat(codes, counts), pd.Index(names, dtype=object)),
        "step": np.concatenate([np.empty(0, dtype=np.int64), *(points.steps for points in histories)]),
        "value": np.concatenate([np.empty(0), *(points.values for points in histories)]),
    }
    return pd.DataFrame(columns, copy=False)


def _read_points(run_id: str, uri: str, wanted: frozenset[str] | None, folder: Path) -> RunPoints:
    file = artifact(run_id, uri, HISTORY_FILE, folder)
    if file is not None:
        try:
            return points_of_file(file, wanted)
        except (OSError, KeyError, pa.ArrowException) as error:  # the store has the same points
            warn(f"{file}: {error}; read from the tracking store instead")
    points = points_of(run_id, None if wanted is None else sorted(wanted))
    return points_of_store({name: own for name, own in points.items() if own})


def points_of_file(file: Path, wanted: frozenset[str] | None) -> RunPoints:
    """Read the points of a history.parquet."""
    columns = ["metric", "step", "value", "timestamp"]
    table = pq.read_table(file, columns=columns, read_dictionary=["metric"], use_threads=False, partitioning=None)
    table = table.unify_dictionaries().combine_chunks()
    metrics = table["metric"].chunk(0) if table.num_rows else pa.array([], pa.dictionary(pa.int32(), pa.string()))
    names = metrics.dictionary.to_pylist()
    arrays = [metrics.indices.to_numpy(), *(table[name].to_numpy() for name in columns[1:])]
    if wanted is not None:
        kept = np.array([name in wanted for name in names], dtype=bool)[arrays[0]]
        arrays = [array[kept] for array in arrays]
    return _ordered(names, *arrays)


def points_of_store(points: Mapping[str, Sequence[Point]]) -> RunPoints:
    codes = np.repeat(np.arange(len(points)), [len(own) for own in points.values()])
    flat = [point for own in points.values() for point in own]
    steps = np.array([point.step for point in flat], dtype=np.int64)
    values = np.array([point.value for point in flat], dtype=np.float64)
    times = np.array([point.timestamp for point in flat], dtype=np.int64)
    return _ordered(list(points), codes, steps, values, times)


def _ordered(
    names: Sequence[str],
    codes: npt.NDArray[Any],
    steps: Ints,
    values: Floats,
    times: Ints,
) -> RunPoints:
    """Order points by metric name, step, time and value; drop duplicates, as MLflow does.

    codes: for each point, the index of its metric in `names`.
    """
    by_name = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), dtype=np.uint16 if len(names) < 2**16 else np.uint32)  # 16 bits: fast radix sort
    rank[by_name] = np.arange(len(names))
    order = np.argsort(rank[codes], kind="stable")
    codes, steps, values, times = rank[codes][order].astype(np.int64), steps[order], values[order], times[order]
    if ((np.diff(codes) == 0) & (np.diff(steps) <= 0)).any():  # steps out of order or repeated
        order = np.lexsort((values, times, steps, codes))
        codes, steps, values, times = codes[order], steps[order], values[order], times[order]
        same_point = (np.diff(codes) == 0) & (np.diff(steps) == 0) & (np.diff(times) == 0)
        same_value = (values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1]))
        kept = np.concatenate([[True], ~(same_point & same_value)])
        codes, steps, values = codes[kept], steps[kept], values[kept]
    counts = np.bincount(codes, minlength=len(names))
    return RunPoints({names[at]: int(n) for at, n in zip(by_name, counts, strict=True) if n}, steps, values)
