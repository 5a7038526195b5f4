"""MLflow's client on a store that is there, and what it finds."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.names import ORIGINAL
from pipeline.tracking.creation import ensure_store
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.store import settle, tracking_uri

PAGE_ROWS = 1000
OLDEST_FIRST = ["attributes.start_time ASC"]


@dataclass(frozen=True)
class Point:
    """One logged value; `timestamp` in milliseconds since the epoch."""

    step: int
    value: float
    timestamp: int


def connect() -> Any:
    """MLflow's client, on a store that is there."""
    import mlflow

    settle()
    ensure_store(str(mlflow.get_tracking_uri()))
    return mlflow.MlflowClient()


def experiments(client: Any) -> list[Any]:
    """All of them."""
    return _pages(client.search_experiments)


def find_experiment(client: Any, text: str) -> Any | None:
    """The experiment with this name, else the one with this id; None where there is neither.

    Raises:
        ValueError: it is deleted.
    """
    from mlflow.entities import ViewType

    found = client.get_experiment_by_name(text)
    if found is None:  # of an id that is none, each kind of store says something else: all are looked through
        listed = _pages(client.search_experiments, view_type=ViewType.ALL)
        found = next((each for each in listed if each.experiment_id == text), None)
    if found is not None and found.lifecycle_stage != "active":
        raise ValueError(f"experiment {text} is deleted; restore it, or name another")
    return found


def search(
    client: Any, filter_string: str, experiment_ids: Sequence[str] | None = None, deleted: bool = False
) -> list[Any]:
    """Every run that the filter finds, oldest first, in these experiments; None = in all of them.

    deleted: those in MLflow's trash too.
    """
    from mlflow.entities import ViewType

    if experiment_ids is None:
        experiment_ids = [found.experiment_id for found in experiments(client)]
    return _pages(client.search_runs, experiment_ids=experiment_ids, filter_string=filter_string, order_by=OLDEST_FIRST,
                  run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY)  # fmt: skip


def _pages(ask: Any, **arguments: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = ask(max_results=PAGE_ROWS, page_token=token, **arguments)
        found += page
        token = page.token
        if not token:
            return found


def find_by_id(client: Any, run_id: str) -> Any | None:
    """The run with this id, a deleted one too, or the one that was made on this server for it; None = neither."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    made = search(client, f"tags.{ORIGINAL} = '{run_id}'", deleted=True) if run_id.isalnum() else []
    return next(iter(sorted(made, key=is_deleted)), None)


def is_deleted(run: Any) -> bool:
    """The run is in MLflow's trash."""
    return bool(run.info.lifecycle_stage != "active")


def told_deleted(run_id: str) -> str:
    """That the run is in MLflow's trash, and how it comes back."""
    return f"run {run_id} was deleted in {tracking_uri()}; restore it there (`mlflow runs restore --run-id {run_id}`)"


def stored_run(run: Any) -> StoredRun:
    """MLflow's run as ours."""
    return StoredRun(
        run.info.run_id,
        run.info.run_name or "",
        run.info.status,
        run.info.start_time,
        run.info.artifact_uri or "",
        dict(run.data.params),
        {name: _value(value) for name, value in run.data.metrics.items()},
        dict(run.data.tags),
        is_deleted(run),
    )


def stored_points(client: Any, run_id: str, metric: str) -> list[Point]:
    """All points of a run's metric."""
    return [Point(point.step, _value(point.value), point.timestamp)
            for point in client.get_metric_history(run_id, metric)]  # fmt: skip


def _value(stored: float) -> float:
    """A database keeps the largest float for infinity; no loss is ever that."""
    largest = sys.float_info.max
    return {largest: float("inf"), -largest: float("-inf")}.get(stored, stored)


def download(client: Any, run_id: str, file: str, folder: Path) -> Path | None:
    """Copy a run's artifact below the folder; None = it has none of that name."""
    parent = Path(file).parent.as_posix()
    if file not in [found.path for found in client.list_artifacts(run_id, None if parent == "." else parent)]:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return Path(client.download_artifacts(run_id, file, str(folder)))


def set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
