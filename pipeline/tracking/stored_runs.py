"""Read runs, their points and artifacts from the tracking store; tag and end runs.

Every function raises a one-line UserError if the store does not answer or refuses the call.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.config.strict_config import nearest
from pipeline.errors import UserError
from pipeline.names import SWEEP
from pipeline.tracking.client import (
    DEFAULT_EXPERIMENT,
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

PAGE_IDS = 100  # number of ids in one filter


def runs_of_sweep(sweep_id: str) -> list[StoredRun]:
    """All runs of a sweep, of every role and in all experiments, oldest first."""
    if {"'", "`"} & set(sweep_id):  # a filter cannot quote them, and no sweep id contains them
        return []
    own = runs_of_tag("sweep_id", sweep_id)
    joined = runs_of_filter(None, f"tags.`{SWEEP}{sweep_id}` LIKE '%'")  # among them runs that began in other sweeps
    return sorted({run.run_id: run for run in own + joined}.values(), key=lambda run: run.start_time)


def finished_runs(experiment: str | None, data_digest: str) -> list[StoredRun]:
    """Finished runs on these data in an experiment (name or id; None: MLflow's default), oldest first."""
    with _user_errors() as client:
        match = find_experiment(client, experiment or DEFAULT_EXPERIMENT)
        condition = f"attributes.status = 'FINISHED' AND tags.data_digest = '{data_digest}'"
        return [stored_run(run) for run in search(client, condition, [match.experiment_id])] if match else []


def runs_of_tag(name: str, value: str) -> list[StoredRun]:
    """All runs with this tag, in all experiments, oldest first. value: must not contain quotes."""
    return runs_of_filter(None, f"tags.{name} = '{value}'")


def runs_of_filter(experiment: str | None, filter_string: str | None) -> list[StoredRun]:
    """The runs of an experiment (name or id; None: of all) that match MLflow's filter, oldest first."""
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
    """The runs with these ids, in this order; raises a UserError if one is missing or deleted."""
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
    """Path of a run's artifact: the file itself if it is local, else a copy in `folder`. None if there is none."""
    if urlsplit(artifact_uri).scheme in ("", "file"):
        local = Path(url2pathname(artifact_uri.removeprefix("file://").removeprefix("file:"))) / file
        return local if local.is_file() else None
    with _user_errors() as client:
        return download(client, run_id, file, folder / run_id)


def tag_run(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run that no process is writing."""
    with _user_errors() as client:
        set_tags(client, run_id, tags)


def end_run(run_id: str, status: str) -> None:
    """Set the final status of a run whose process has exited."""
    with _user_errors() as client:
        client.set_terminated(run_id, status)


def store_exists() -> bool:
    """Whether the store exists: False only for a SQLite file that has not been created yet."""
    uri = tracking_uri()
    file = uri.removeprefix("sqlite:///").split("?")[0]
    return not uri.startswith("sqlite:///") or not file or Path(file).exists()


@contextmanager
def _user_errors() -> Iterator[Any]:
    """Yield MLflow's client, and convert errors within the block to UserErrors."""
    if not store_exists():  # MLflow would create an empty store
        raise UserError(f"tracking store {tracking_uri()}: there is no such file; "
                        "name the store by MLFLOW_TRACKING_URI")  # fmt: skip
    try:
        yield connect()
    except UserError:
        raise
    except Exception as error:
        raise UserError(refusal(error)) from None
