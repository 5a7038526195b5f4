"""A run's place in the tracking store: made, found again, or made later for one that began without the store."""

import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError
from pipeline.journal import JOURNAL_FILE, JournalWriter, Record
from pipeline.names import FORKED_FROM, LAUNCHED, ORIGINAL
from pipeline.tracking.client import connect, find_by_id, search, set_tags, stored_points, stored_run
from pipeline.tracking.messages import FindRuns, OpenedRun, RunRequest, StoredRun
from pipeline.tracking.store import check_artifacts, context_tags, is_random, tracking_uri

STALE_TAGS = {"failure", "pruned"}  # of an earlier start: gone when a run goes on


def open_run(request: RunRequest, output_dir: Path, last_steps: Mapping[str, int]) -> OpenedRun:
    """Make or find the run that a trainer asks for; the answer is what its journal says of it.

    last_steps: of each metric in the journal of a resumed run; what the store has beyond is read into the journal.
    """
    client = connect()
    launcher, wanted, resumed = request.launcher, request.experiment, request.resume
    run = _of_id(client, request.run_id, resumed) if request.run_id else None
    if run and not resumed and wanted and client.get_experiment(run.info.experiment_id).name != wanted:
        launcher, run = run.info.run_id, None  # `mlflow run` opened it elsewhere: it only started ours
    tags = context_tags() | dict(request.tags)
    if run is None:
        run = client.create_run(experiment_of(client, wanted), run_name=request.name, tags=tags)  # known from birth
    run_id = run.info.run_id
    known_as = str(request.run_id) if resumed else run_id  # of a run that began elsewhere: its id there
    folder = Path(request.folder) if request.folder else output_dir / known_as
    if resumed:
        delete_stale(client, run, request.tags)
    if resumed or is_random(run.info.run_name or ""):
        name = request.name if is_random(run.info.run_name or "") else None
        client.update_run(run_id, status="RUNNING" if resumed else None, name=name)
    set_tags(client, run_id, {**request.tags, "run_dir": str(folder.resolve()), "host": socket.gethostname()})
    if launcher:
        _settle_launchers(client, launcher, run_id, resumed)
    try:
        check_artifacts(run.info.artifact_uri)
        ahead = resumed and _read_back(client, run, folder, last_steps)
    except (OSError, TrainingError):
        client.set_terminated(run_id, "FAILED")
        raise
    return OpenedRun(known_as, client.get_run(run_id).info.run_name,
                     client.get_experiment(run.info.experiment_id).name, tags, tracking_uri(), online=True,
                     ahead=ahead)  # fmt: skip


def open_without_store(request: RunRequest, reason: str) -> OpenedRun:
    """The answer where the store is away: the run gets an id all the same, and is made there later."""
    experiment = request.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    tags = context_tags() | dict(request.tags)
    return OpenedRun(request.run_id or uuid.uuid4().hex, request.name, experiment, tags, tracking_uri(), online=False,
                     reason=reason)  # fmt: skip


def experiment_of(client: Any, name: str | None) -> str:
    """The id of the experiment with this name, made where there is none; without a name, of MLflow's own choice."""
    from mlflow.exceptions import MlflowException

    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name is None:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was first
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment {name} is deleted; restore it, or name another")
    return str(found.experiment_id)


def _of_id(client: Any, run_id: str, resumed: bool) -> Any:
    """The run with this id, or the one that was made for it."""
    found = find_by_id(client, run_id) if resumed else None
    return found or client.get_run(run_id)  # which says that there is none


def make_for(client: Any, opened: Record, folder: Path) -> Any:
    """A run here for one that began elsewhere, or without the store."""
    tags = opened["tags"] | {ORIGINAL: opened["id"], "run_dir": str(folder), "host": opened["host"]}
    experiment_id = experiment_of(client, opened["experiment"])
    return client.create_run(experiment_id, start_time=opened["time"], run_name=opened["name"], tags=tags)


def find(request: FindRuns) -> tuple[StoredRun, ...]:
    """The runs that `Writer.find` asks for."""
    client = connect()
    if request.run_id is not None:
        runs = [run for run in [find_by_id(client, request.run_id)] if run]
    else:
        found = search(client, f"tags.run_key = '{request.run_key}'")
        runs = [run for run in found if run.data.tags.get(FORKED_FROM) == request.fork]
    return tuple(stored_run(run) for run in runs if run.info.lifecycle_stage == "active")


def delete_stale(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    """Take away what an earlier start said of its end, but for the tags that this one sets."""
    for tag in STALE_TAGS & run.data.tags.keys() - tags.keys():
        client.delete_tag(run.info.run_id, tag)


def _settle_launchers(client: Any, launcher: str, run_id: str, resumed: bool) -> None:
    """Tag the run that only started this one; end those of earlier starts that were killed."""
    set_tags(client, launcher, {"role": "launcher", LAUNCHED: run_id})
    for run in search(client, f"tags.{LAUNCHED} = '{run_id}'") if resumed else ():
        if run.info.status == "RUNNING" and run.info.run_id != launcher:
            client.set_terminated(run.info.run_id, "KILLED")


def _read_back(client: Any, run: Any, folder: Path, last_steps: Mapping[str, int]) -> bool:
    """Put into the journal what the store has beyond its last steps. True if there was something."""
    newest = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    lost = [key for key, step in newest.items() if step > last_steps.get(key, -1)]
    if not lost:
        return False
    journal = JournalWriter(folder / JOURNAL_FILE)
    for key in lost:
        steps = set[int]()
        for point in stored_points(client, run.info.run_id, key):
            if point.step > last_steps.get(key, -1) and point.step not in steps:
                steps.add(point.step)
                journal.append({"op": "known", "step": point.step, "time": point.timestamp,
                                "values": {key: point.value}})  # fmt: skip
    journal.close()
    return True
