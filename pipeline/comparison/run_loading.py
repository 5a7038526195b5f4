"""Tracked runs as frames: one row a run, or one row a logged point."""

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.comparison.compare_config import check_source
from pipeline.errors import UserError
from pipeline.names import CANONICAL
from pipeline.runtime.console import warn
from pipeline.tracking.client import Point
from pipeline.tracking.history import HISTORY_FILE
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.store import tracking_uri
from pipeline.tracking.stored_runs import artifact, points_of, runs_of_filter, runs_of_ids, runs_of_sweep

# Roles of runs that trained nothing, and of a search's trials: what chose an arm is no evidence for it.
NOT_COMPARED = ("launcher", "summary", "comparison", "trial")
ROLE_ORDER = {"baseline": 0, "arm": 1, "control": 2}
FACTS = ("run_id", "name", "status", "task", "arm", "role", "control_of", "seed", "color", "sweep_id", "data_digest",
         "start_time", "artifact_uri")  # fmt: skip
OWN_TAGS = {"task", "arm", "arm_number", "role", "control_of", "seed", "sweep_id", "data_digest", "mlflow.runColor"}
READERS = 4


def load_runs(
    sweep_id: str | None = None,
    *,
    runs: Sequence[str] | None = None,
    experiment: str | None = None,
    filter: str | None = None,  # noqa: A002 (MLflow's own word)
    finished: bool = True,
) -> pd.DataFrame:
    """One row a run of a sweep, of run ids, of an experiment or of what an MLflow filter finds.

    Columns: run_id, name, status, task, arm, role, control_of, seed (Int64), color, sweep_id, data_digest, start_time
    (UTC), artifact_uri; then `params.<key>` (canonical text), `metrics.<name>` (the last value) and `tags.<name>`.
    What a run lacks is missing (NaN). Baselines come first, then arms, then controls, each by seed.

    `finished`: only the runs that ended well; `attrs["left_out"]` holds the others' status by their names. For a
    sweep, `attrs` also holds the `metric` and `mode` that it was made for.

    Raises:
        UserError: no or several sources, nothing found, or a store that does not answer.
    """
    check_source(sweep_id, runs, experiment, filter)
    if sweep_id is not None:
        found, source = runs_of_sweep(sweep_id), f"sweep_id {sweep_id}"
    elif runs is not None:
        found, source = runs_of_ids([runs] if isinstance(runs, str) else runs), "runs"
    else:
        found = runs_of_filter(experiment, filter)
        given = {"experiment": experiment, "filter": filter}
        source = " ".join(f"{name} {value}" for name, value in given.items() if value)
    trained = [run for run in found if run.tags.get("role") not in NOT_COMPARED]
    if not trained:
        others = f" but {len(found)} that trained nothing" if found else ""
        raise UserError(f"{source}: found no run{others} in {tracking_uri()}")
    kept = [run for run in trained if run.status == "FINISHED" or not finished]
    if not kept:
        raise UserError(f"{source}: none of {len(trained)} runs is finished ({count_by(r.status for r in trained)})")
    frame = _frame(kept)
    frame.attrs["left_out"] = {f"{run.name} ({run.run_id})": run.status for run in trained if run not in kept}
    if sweep_id is not None:
        summary = next((run.tags for run in found if run.tags.get("role") == "summary"), {})
        frame.attrs |= {name: summary[name] for name in ("metric", "mode") if name in summary}
    return frame


def count_by(values: Any) -> str:
    """`2 FAILED, 1 RUNNING`."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return ", ".join(f"{count} {value}" for value, count in sorted(counts.items()))


def _frame(runs: Sequence[StoredRun]) -> pd.DataFrame:
    params = [run.canonical_params for run in runs]
    tags = [{name: value for name, value in run.tags.items()
             if name not in OWN_TAGS and not name.startswith(CANONICAL)} for run in runs]  # fmt: skip
    facts = pd.DataFrame([_facts(run, values) for run, values in zip(runs, params, strict=True)], columns=list(FACTS))
    facts["seed"] = facts["seed"].astype("Int64")
    facts["start_time"] = pd.to_datetime(facts["start_time"], unit="ms", utc=True)
    metrics = [run.metrics for run in runs]
    parts = [facts, _prefixed(params, "params."), _prefixed(metrics, "metrics."), _prefixed(tags, "tags.")]
    frame = pd.concat(parts, axis=1)
    numbers = [int(run.tags.get("arm_number", 0)) for run in runs]
    return frame.loc[_order(facts, numbers)].reset_index(drop=True)


def _facts(run: StoredRun, params: Mapping[str, str]) -> dict[str, Any]:
    tags = run.tags
    seed = tags.get("seed", params.get("seed", ""))
    named = {name: tags.get(name) for name in ("task", "arm", "role", "control_of", "sweep_id", "data_digest")}
    return named | {
        "run_id": run.run_id,
        "name": run.name,
        "status": run.status,
        "seed": int(seed) if seed.isdecimal() else None,
        "color": tags.get("mlflow.runColor"),
        "start_time": run.start_time,
        "artifact_uri": run.artifact_uri,
    }


def _prefixed(rows: Sequence[Mapping[str, Any]], prefix: str) -> pd.DataFrame:
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame({prefix + name: [row.get(name) for row in rows] for name in names}, index=range(len(rows)))


def _order(facts: pd.DataFrame, numbers: Sequence[int]) -> pd.Index:
    """Rows by role, then by the arm's number in its sweep, or when it first appears, then by seed.

    The store gave them by time, which is another order each time that several processes train.
    """
    role = facts["role"].map(ROLE_ORDER).fillna(ROLE_ORDER["arm"])
    arms = facts["arm"].fillna("")
    first = arms.map({arm: at for at, arm in reversed(list(enumerate(arms)))})
    keys = pd.DataFrame({"role": role, "number": numbers, "first": first, "seed": facts["seed"]})
    return keys.sort_values(["role", "number", "first", "seed"], kind="stable").index


@dataclass(frozen=True)
class _Points:
    """A run's points, ordered by metric and step."""

    counts: Mapping[str, int]  # metric -> how many points, in order
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


def load_history(runs: pd.DataFrame | Sequence[str], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Every logged point: run (id) and metric (categorical), step (int64), value (float64).

    `runs`: a frame of `load_runs`, or run ids. `metrics`: only those names. Rows are ordered by run (as given), metric
    and step; at one step, by time. A run's points come from its artifact history.parquet where it has one, else from
    the tracking store, and are the same either way.

    Raises:
        UserError: no such run, or a store that does not answer.
    """
    where = artifact_uris(runs)
    wanted = None if metrics is None else frozenset([metrics] if isinstance(metrics, str) else metrics)
    with tempfile.TemporaryDirectory(prefix="focal-pipeline-") as folder, ThreadPoolExecutor(READERS) as pool:
        read = partial(_points, wanted=wanted, folder=Path(folder))
        found = list(pool.map(read, where.keys(), where.values()))
    names = sorted({name for points in found for name in points.counts})
    code = {name: number for number, name in enumerate(names)}
    codes = [code[name] for points in found for name in points.counts]
    counts = [count for points in found for count in points.counts.values()]
    kind = np.int16 if len(names) < 2**15 else np.int32
    metric_codes = np.repeat(np.array(codes, dtype=kind), counts)
    run_codes = np.repeat(np.arange(len(where), dtype=np.int32), [len(points.steps) for points in found])
    columns = {
        "run": pd.Categorical.from_codes(run_codes, pd.Index(list(where), dtype=object)),
        "metric": pd.Categorical.from_codes(metric_codes, pd.Index(names, dtype=object)),
        "step": np.concatenate([np.empty(0, dtype=np.int64), *(points.steps for points in found)]),
        "value": np.concatenate([np.empty(0), *(points.values for points in found)]),
    }
    return pd.DataFrame(columns, copy=False)


def artifact_uris(runs: pd.DataFrame | Sequence[str]) -> dict[str, str]:
    """Run id -> where its artifacts are."""
    if isinstance(runs, pd.DataFrame):
        return dict(zip(runs["run_id"], runs["artifact_uri"], strict=True))
    return {run.run_id: run.artifact_uri for run in runs_of_ids([runs] if isinstance(runs, str) else list(runs))}


def _points(run_id: str, uri: str, wanted: frozenset[str] | None, folder: Path) -> _Points:
    file = artifact(run_id, uri, HISTORY_FILE, folder)
    if file is not None:
        try:
            return _of_file(file, wanted)
        except (OSError, KeyError, pa.ArrowException) as error:  # the store has the same points
            warn(f"{file}: {error}; read from the tracking store instead")
    points = points_of(run_id, None if wanted is None else sorted(wanted))
    return _of_store({name: listed for name, listed in points.items() if listed})


def _of_file(file: Path, wanted: frozenset[str] | None) -> _Points:
    columns = ["metric", "step", "value", "timestamp"]
    table = pq.read_table(file, columns=columns, read_dictionary=["metric"], use_threads=False, partitioning=None)
    encoded = table["metric"].unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.dictionary(pa.int32(), pa.string()))
    names = encoded.dictionary.to_pylist()
    arrays = [encoded.indices.to_numpy(), *(table[name].to_numpy() for name in columns[1:])]
    if wanted is not None:
        kept = np.array([name in wanted for name in names], dtype=bool)[arrays[0]]
        arrays = [array[kept] for array in arrays]
    return _sorted(names, *arrays)


def _of_store(points: Mapping[str, Sequence[Point]]) -> _Points:
    codes = np.repeat(np.arange(len(points)), [len(listed) for listed in points.values()])
    flat = [point for listed in points.values() for point in listed]
    steps = np.array([point.step for point in flat], dtype=np.int64)
    values = np.array([point.value for point in flat], dtype=np.float64)
    times = np.array([point.timestamp for point in flat], dtype=np.int64)
    return _sorted(list(points), codes, steps, values, times)


def _sorted(
    names: Sequence[str],
    codes: npt.NDArray[Any],
    steps: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    times: npt.NDArray[np.int64],
) -> _Points:
    """Points by metric name, step, time and value; those that agree in all four once, as MLflow keeps them."""
    ordered = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), dtype=np.uint16 if len(names) < 2**16 else np.uint32)  # 16 bits: a radix sort
    rank[ordered] = np.arange(len(names))
    codes = rank[codes]
    order = np.argsort(codes, kind="stable")
    codes, steps, values, times = codes[order], steps[order], values[order], times[order]
    if ((np.diff(codes.astype(np.int64)) == 0) & (np.diff(steps) <= 0)).any():  # steps out of order, or one twice
        order = np.lexsort((values, times, steps, codes))
        codes, steps, values, times = codes[order], steps[order], values[order], times[order]
        same = (np.diff(codes.astype(np.int64)) == 0) & (np.diff(steps) == 0) & (np.diff(times) == 0)
        equal = (values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1]))
        kept = np.concatenate([[True], ~(same & equal)])
        codes, steps, values = codes[kept], steps[kept], values[kept]
    counted = np.bincount(codes, minlength=len(names))
    counts = {names[at]: int(count) for at, count in zip(ordered, counted, strict=True) if count}
    return _Points(counts, steps, values)
