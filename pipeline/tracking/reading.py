"""Runs, their points and their artifacts, back from the tracking store."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.config import nearest
from pipeline.errors import UserError
from pipeline.tracking.creation import ensure_store
from pipeline.tracking.store import one_line, settle, tracking_uri

PAGE_RUNS = 1000
PAGE_IDS = 100  # ids in one filter


@dataclass(frozen=True)
class StoredRun:
    """What the store says of a run in one answer: no points but the last of each metric."""

    run_id: str
    name: str
    status: str
    start_time: int  # milliseconds since the epoch
    artifact_uri: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


@dataclass(frozen=True)
class Point:
    """One logged value; `timestamp` in milliseconds since the epoch."""

    step: int
    value: float
    timestamp: int


def runs_of_sweep(sweep_id: str) -> list[StoredRun]:
    """Every run tagged with the sweep, of whatever role, oldest first, from all experiments."""
    if "'" in sweep_id:  # cannot be written in a filter, and no sweep is called so
        return []
    return runs_of_tag("sweep_id", sweep_id)


def runs_of_filter(experiment: str | None, filter_string: str | None) -> list[StoredRun]:
    """The runs of an experiment (name or id; None = all of them) that MLflow's filter finds, oldest first.

    Raises:
        UserError: no such experiment, or a filter that MLflow refuses.
    """
    return _search(filter_string or "", experiment)


def runs_of_ids(run_ids: Sequence[str]) -> list[StoredRun]:
    """The runs with these ids, in this order.

    Raises:
        UserError: there is no run, or only a deleted one, with an id.
    """
    found: dict[str, StoredRun] = {}
    plain = [run_id for run_id in dict.fromkeys(run_ids) if run_id.isalnum()]
    for start in range(0, len(plain), PAGE_IDS):
        listed = ", ".join(f"'{run_id}'" for run_id in plain[start : start + PAGE_IDS])
        found |= {run.run_id: run for run in _search(f"attributes.run_id IN ({listed})")}
    missing = [run_id for run_id in run_ids if run_id not in found]
    if missing:
        raise UserError(f"no run {', '.join(missing[:5])} in {tracking_uri()}")
    return [found[run_id] for run_id in dict.fromkeys(run_ids)]


def points_of(run_id: str, metrics: Sequence[str] | None) -> dict[str, list[Point]]:
    """All points of a run's metrics from the store; of every metric where none are named."""
    with _one_line_errors() as client:
        names = list(client.get_run(run_id).data.metrics) if metrics is None else metrics
        return {
            name: [Point(point.step, _value(point.value), point.timestamp)
                   for point in client.get_metric_history(run_id, name)]
            for name in names
        }  # fmt: skip


def artifact(run_id: str, artifact_uri: str, file: str, folder: Path) -> Path | None:
    """A run's artifact: where it lies if that is on this machine, else a copy below `folder`. None = it has none."""
    if urlsplit(artifact_uri).scheme in ("", "file"):
        local = Path(url2pathname(artifact_uri.removeprefix("file://").removeprefix("file:"))) / file
        return local if local.is_file() else None
    with _one_line_errors() as client:
        parent = Path(file).parent.as_posix()
        listed = client.list_artifacts(run_id, None if parent == "." else parent)
        if file not in [found.path for found in listed]:
            return None
        own = folder / run_id
        own.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, file, str(own)))


def runs_of_tag(name: str, value: str) -> list[StoredRun]:
    """Every run with the tag, oldest first, from all experiments. `value`: without quotes."""
    return _search(f"tags.{name} = '{value}'")


def set_tags(run_id: str, tags: Mapping[str, str]) -> None:
    """Tag a run that no writer is at."""
    with _one_line_errors() as client:
        for name, value in tags.items():
            client.set_tag(run_id, name, value)


def end_run(run_id: str, status: str) -> None:
    """End a run whose process is gone."""
    with _one_line_errors() as client:
        client.set_terminated(run_id, status)


def store_exists() -> bool:
    """False: the store is a database file that nothing was written to yet."""
    uri = tracking_uri()
    file = uri.removeprefix("sqlite:///").split("?")[0]
    return not uri.startswith("sqlite:///") or not file or Path(file).exists()


@contextmanager
def _one_line_errors() -> Iterator[Any]:
    """MLflow's client; whatever the store says against us becomes the user's one line."""
    import mlflow

    settle()
    uri = tracking_uri()
    if not store_exists():  # MLflow would make an empty one
        raise UserError(f"tracking store {uri}: there is no such file; name the store by MLFLOW_TRACKING_URI")
    ensure_store(str(mlflow.get_tracking_uri()))
    try:
        yield mlflow.MlflowClient()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"tracking store {uri}: {one_line(error)}") from None


def _search(filter_string: str, experiment: str | None = None) -> list[StoredRun]:
    with _one_line_errors() as client:
        experiments = _pages(client.search_experiments)
        names = {found.name: found.experiment_id for found in experiments}
        if experiment is not None and experiment not in [*names, *names.values()]:
            raise UserError(f"no experiment {experiment} in {tracking_uri()}{_near(experiment, list(names))}")
        ids = list(names.values()) if experiment is None else [names.get(experiment, experiment)]
        order = ["attributes.start_time ASC"]
        found = _pages(client.search_runs, experiment_ids=ids, filter_string=filter_string, order_by=order)
        return [
            StoredRun(
                run.info.run_id,
                run.info.run_name or "",
                run.info.status,
                run.info.start_time,
                run.info.artifact_uri or "",
                dict(run.data.params),
                {name: _value(value) for name, value in run.data.metrics.items()},
                dict(run.data.tags),
            )
            for run in found
        ]


def _pages(search: Any, **arguments: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = search(max_results=PAGE_RUNS, page_token=token, **arguments)
        found += page
        token = page.token
        if not token:
            return found


def _near(name: str, names: list[str]) -> str:
    return nearest(name, names if len(names) <= 12 else names[:12])


def _value(stored: float) -> float:
    """A database keeps the largest float for infinity; no loss is ever that."""
    return float("inf") if stored == sys.float_info.max else float("-inf") if stored == -sys.float_info.max else stored
