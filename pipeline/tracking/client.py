"""Connect to the tracking store through MLflow's client, and query it. MLflow's errors are raised unchanged."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.names import ORIGINAL
from pipeline.storage.journal import Record
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.store import configure_mlflow, tracking_uri
from pipeline.tracking.store_creation import ensure_store
from pipeline.tracking.store_errors import is_duplicate

PAGE_ROWS = 1000
BATCH_POINTS = 1000  # MLflow's limit for one log_batch
BATCH_PARAMS = 100
DIGEST_LENGTH = 32  # characters of a dataset's hash: MLflow accepts 36; a tag holds the full hash
DEFAULT_EXPERIMENT = "0"  # id of MLflow's default experiment
OLDEST_FIRST = ["attributes.start_time ASC"]


@dataclass(frozen=True)
class Point:
    """One logged value; `timestamp` in milliseconds since the epoch."""

    step: int
    value: float
    timestamp: int


def connect() -> Any:
    """Return MLflow's client; create a SQLite store that does not exist yet."""
    import mlflow

    configure_mlflow()
    ensure_store(str(mlflow.get_tracking_uri()))
    return mlflow.MlflowClient()


def experiments(client: Any) -> list[Any]:
    """All active experiments."""
    return _all_pages(client.search_experiments)


def find_experiment(client: Any, text: str) -> Any | None:
    """The experiment with this name, otherwise with this id; None if there is none.

    Raises:
        ValueError: the experiment is deleted.
    """
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(text)
    if experiment is None:  # the error for an unknown id depends on the type of store: search all
        every = _all_pages(client.search_experiments, view_type=ViewType.ALL)
        experiment = next((each for each in every if each.experiment_id == text), None)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise ValueError(f"experiment {text} is deleted; restore it, or name another")
    return experiment


def search(
    client: Any, filter_string: str, experiment_ids: Sequence[str] | None = None, deleted: bool = False
) -> list[Any]:
    """All runs in these experiments (None: in all) that match the filter, oldest first.

    deleted: include deleted runs.
    """
    from mlflow.entities import ViewType

    if experiment_ids is None:
        experiment_ids = [experiment.experiment_id for experiment in experiments(client)]
    return _all_pages(client.search_runs, experiment_ids=experiment_ids, filter_string=filter_string,
                      order_by=OLDEST_FIRST,
                      run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY)  # fmt: skip


def find_by_id(client: Any, run_id: str) -> Any | None:
    """The run with this id, or the one created in this store in its place (tag ORIGINAL); deleted runs are included."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    runs = search(client, f"tags.{ORIGINAL} = '{run_id}'", deleted=True) if run_id.isalnum() else []
    return next(iter(sorted(runs, key=is_deleted)), None)


def is_deleted(run: Any) -> bool:
    """Whether the run was deleted; MLflow can restore it."""
    return bool(run.info.lifecycle_stage != "active")


def deletion_message(run_id: str) -> str:
    return f"run {run_id} was deleted in {tracking_uri()}; restore it there (`mlflow runs restore --run-id {run_id}`)"


def is_random_name(name: str) -> bool:
    """Whether MLflow generated the run's name, such as `legendary-gnat-695`."""
    first, _, number = name.rpartition("-")
    return number.isdigit() and first.replace("-", "").isalpha()


def context_tags() -> dict[str, str]:
    """Tags for user, source and git commit, as `mlflow run` sets them."""
    from mlflow.tracking.context import registry

    return dict(registry.resolve_tags()) | {"mlflow.source.name": "python -m pipeline"}


def code_version() -> str:
    """Git commit of this code, as runs are tagged with it; empty if it is unknown."""
    from mlflow.utils.git_utils import get_git_commit

    return get_git_commit(str(Path(__file__).parent)) or ""


def stored_run(run: Any) -> StoredRun:
    """Convert an MLflow run to a `StoredRun`."""
    return StoredRun(
        run.info.run_id,
        run.info.run_name or "",
        run.info.status,
        run.info.start_time,
        run.info.artifact_uri or "",
        dict(run.data.params),
        {name: _number(value) for name, value in run.data.metrics.items()},
        dict(run.data.tags),
        is_deleted(run),
    )


def stored_points(client: Any, run_id: str, metric: str) -> list[Point]:
    """All logged points of a run's metric."""
    return [Point(point.step, _number(point.value), point.timestamp)
            for point in client.get_metric_history(run_id, metric)]  # fmt: skip


def download(client: Any, run_id: str, file: str, folder: Path) -> Path | None:
    """Download a run's artifact into the folder; None if the run has no such artifact."""
    parent = Path(file).parent.as_posix()
    if file not in [entry.path for entry in client.list_artifacts(run_id, None if parent == "." else parent)]:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return Path(client.download_artifacts(run_id, file, str(folder)))


def set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Log at most BATCH_PARAMS params."""
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])


def log_file(client: Any, run_id: str, file: Path, folder: str = "") -> None:
    client.log_artifact(run_id, str(file), folder or None)


def log_dataset(client: Any, run_id: str, record: Record) -> None:
    """Log the dataset that a journal record `input` describes."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": record["source"]}),
        profile=json.dumps(record["profile"]),
    )
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    try:
        client.log_inputs(run_id, inputs)
    except Exception as error:
        if not is_duplicate(error):
            raise
        client.log_inputs(run_id, inputs)  # another process has just created the dataset; this call finds it


def _all_pages(query: Any, **arguments: Any) -> list[Any]:
    entries, token = [], None
    while True:
        page = query(max_results=PAGE_ROWS, page_token=token, **arguments)
        entries += page
        token = page.token
        if not token:
            return entries


def _number(stored: float) -> float:
    """Convert the largest float to infinity, since MLflow's databases store infinity as the largest float."""
    largest = sys.float_info.max
    return {largest: float("inf"), -largest: float("-inf")}.get(stored, stored)
