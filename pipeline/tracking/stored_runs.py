"""Runs, their points and their artifacts, read from the tracking store for the rest of the project.

Every function raises a UserError, one line, if the store does not answer or refuses.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.config.strict_config import nearest
from pipeline.errors import UserError
from pipeline.tracking.client import (
    Point,
    connect,
    download,
    experiments,
    find_experiment,
    search,
    set_tags,
    stored_points,
    stored_run,
)
from pipeline.tracking.messages import StoredRun
from pipeline.tracking.store import tracking_uri
from pipeline.tracking.store_errors import refusal

PAGE_IDS = 100  # ids in one filter


def runs_of_sweep(sweep_id: str) -> list[StoredRun]:
    """Every run tagged with the sweep, whatever its role, oldest first, from all experiments."""
    if "'" in sweep_id:  # cannot be written in a filter, and no sweep is called so
        return []
    return runs_of_tag("sweep_id", sweep_id)


def runs_of_tag(name: str, value: str) -> list[StoredRun]:
    """Every run with the tag, oldest first, from all experiments. `value`: without quotes."""
    return runs_of_filter(None, f"tags.{name} = '{value}'")


def runs_of_filter(experiment: str | None, filter_string: str | None) -> list[StoredRun]:
    """The runs of an experiment (name or id; None: of all) that MLflow's filter matches, oldest first."""
    with _user_errors() as client:
        ids = None
        if experiment is not None:
            match = find_experiment(client, experiment)
            if match is None:
                names = [each.name for each in experiments(client)]
                raise UserError(f"no experiment {experiment} in {tracking_uri()}{nearest(experiment, names[:12])}")
            ids = [match.experiment_id]
        return [stored_run(run) for run in search(client, filter_string or "", ids)]


def runs_of_ids(run_ids: Sequence[str]) -> list[StoredRun]:
    """The runs with these ids, in this order; a missing or deleted one is an error."""
    runs: dict[str, StoredRun] = {}
    ids = [run_id for run_id in dict.fromkeys(run_ids) if run_id.isalnum()]
    for start in range(0, len(ids), PAGE_IDS):
        listed = ", ".join(f"'{run_id}'" for run_id in ids[start : start + PAGE_IDS])
        runs |= {run.run_id: run for run in runs_of_filter(None, f"attributes.run_id IN ({listed})")}
    missing = [run_id for run_id in run_ids if run_id not in runs]
    if missing:
        raise UserError(f"no run {', '.join(missing[:5])} in {tracking_uri()}")
    return [runs[run_id] for run_id in dict.fromkeys(run_ids)]


def points_of(run_id: str, metrics: Sequence[str] | None) -> dict[str, list[Point]]:
    """All points of a run's metrics (None: of every metric)."""
    with _user_errors() as client:
        names = list(client.get_run(run_id).data.metrics) if metrics is None else metrics
        return {name: stored_points(client, run_id, name) for name in names}


def artifact(run_id: str, artifact_uri: str, file: str, folder: Path) -> Path | None:
    """A run's artifact: its own path on this machine, else a copy below `folder`. None if the run does not have it."""
    if urlsplit(artifact_uri).scheme in ("", "file"):
        local = Path(url2pathname(artifact_uri.removeprefix("file://").removeprefix("file:"))) / file
        return local if local.is_file() else None
    with _user_errors() as client:
        return download(client, run_id, file, folder / run_id)


def tag_run(run_id: str, tags: Mapping[str, str]) -> None:
    """Tag a run that no process writes."""
    with _user_errors() as client:
        set_tags(client, run_id, tags)


def end_run(run_id: str, status: str) -> None:
    """End a run whose process is gone."""
    with _user_errors() as client:
        client.set_terminated(run_id, status)


def store_exists() -> bool:
    """False if the store is a database file that does not exist yet."""
    uri = tracking_uri()
    file = uri.removeprefix("sqlite:///").split("?")[0]
    return not uri.startswith("sqlite:///") or not file or Path(file).exists()


@contextmanager
def _user_errors() -> Iterator[Any]:
    """Yield MLflow's client; errors become UserErrors."""
    if not store_exists():  # MLflow would create an empty one
        raise UserError(f"tracking store {tracking_uri()}: there is no such file; "
                        "name the store by MLFLOW_TRACKING_URI")  # fmt: skip
    try:
        yield connect()
    except UserError:
        raise
    except Exception as error:
        raise UserError(refusal(error)) from None
