"""Open a run in the tracking store: a new run, an existing run, or one that began offline."""

import os
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.config.run_config import is_operational
from pipeline.errors import UserError
from pipeline.names import LAUNCHED, ORIGINAL, OWNER, THREADS
from pipeline.storage.journal import JournalWriter, Record
from pipeline.storage.ownership import alive_error, live_owner
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.client import (
    Point,
    connect,
    context_tags,
    find_by_id,
    find_experiment,
    is_random_name,
    search,
    set_tags,
    stored_points,
)
from pipeline.tracking.messages import OpenedRun, RunRequest
from pipeline.tracking.redaction import shown_uri
from pipeline.tracking.store import tracking_uri
from pipeline.tracking.store_errors import HTTP_SERVER_ERROR, http_status

LATE_SECONDS = 20.0  # how long an unanswered request may still create a run
WATCH_SECONDS = 5.0  # how long to watch a run of another machine for signs of life
PAUSE_SECONDS = 0.5  # between two queries
STALE_TAGS = {"failure", "pruned"}  # tags of an earlier start, deleted on resume


class Opening:
    """Opens the requested run. `open` may be called again after an error of the store.

    A run that it created is found by its tag `owner`, a unique claim, even if the answer to the creation was lost.
    """

    def __init__(self, request: RunRequest, output_dir: Path, last_steps: Mapping[str, int]) -> None:
        """last_steps: last step per metric in a resumed run's journal; later points are read back from the store."""
        self.request, self.output_dir, self.last_steps = request, output_dir, last_steps
        self.claim = f"{os.getppid()} {uuid.uuid4().hex[:8]}"  # the trainer is this writer's parent
        self.run_id: str | None = None  # the run that was created or claimed
        self.requested_at: float | None = None  # time of the request to create a run

    def open(self) -> OpenedRun:
        """Open the run.

        Raises:
            UserError: another process is writing the run.
            Exception: any error of the store.
        """
        client, request, resumed = connect(), self.request, self.request.resume
        launcher = request.launcher
        run = None
        if request.run_id:
            run = find_by_id(client, request.run_id) if resumed else client.get_run(request.run_id)
        if resumed and run is None:
            return self.without_store(f"found no run {request.run_id}, whose folder is here; it is created there, with "
                                      f"tag {ORIGINAL}")  # fmt: skip
        wanted = request.experiment
        if run and not resumed and wanted and run.info.experiment_id != experiment_id(client, wanted):
            launcher, run = run.info.run_id, None  # `mlflow run` opened it in another experiment
        tags = context_tags() | dict(request.tags) | {OWNER: self.claim}
        run = run or self._create(client, tags)
        run_id = run.info.run_id
        original_id = str(request.run_id) if resumed else run_id  # differs if the run began in another store
        folder = Path(request.folder) if request.folder else self.output_dir / original_id
        if run_id != self.run_id:  # neither created nor claimed by an earlier attempt
            refuse_alive(client, run, folder if resumed else None)
            self.run_id = run_id
        if resumed:
            delete_stale_tags(client, run, request.tags)
        is_unnamed = is_random_name(run.info.run_name or "")
        if resumed or is_unnamed:
            client.update_run(run_id, status="RUNNING" if resumed else None, name=request.name if is_unnamed else None)
        where = {"run_dir": str(folder.resolve()), "host": socket.gethostname(), OWNER: self.claim}
        set_tags(client, run_id, {**request.tags, **where})
        if launcher:
            _tag_launchers(client, launcher, run_id, resumed)
        _check_artifact_folder(client, run)
        if resumed and THREADS in run.data.tags:  # in case the journal was lost
            tags[THREADS] = run.data.tags[THREADS]
        ahead = resumed and _read_back(client, run, folder, self.last_steps)
        return OpenedRun(original_id, client.get_run(run_id).info.run_name,
                         client.get_experiment(run.info.experiment_id).name, tags, tracking_uri(), online=True,
                         ahead=ahead)  # fmt: skip

    def without_store(self, reason: str) -> OpenedRun:
        """Begin a run without the store; it is created there later."""
        request = self.request
        experiment = request.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        tags = context_tags() | dict(request.tags) | {OWNER: self.claim}
        return OpenedRun(request.run_id or uuid.uuid4().hex, request.name, experiment, tags, tracking_uri(),
                         online=False, reason=reason)  # fmt: skip

    def give_up(self, failure: str) -> None:
        """Mark as FAILED the run that was opened, or that an unanswered request may have created.

        Raises:
            Exception: any error of the store.
        """
        client = connect()
        ids = [self.run_id] if self.run_id else []
        if not ids and self.requested_at:
            ids = [run.info.run_id for run in self._late_runs(client)]
        for run_id in ids:
            client.set_terminated(run_id, "FAILED")  # before the tag, which the store may refuse
            set_tags(client, run_id, {"failure": failure})

    def _create(self, client: Any, tags: Mapping[str, str]) -> Any:
        """Create a run with these tags, or return the one that an earlier, unanswered request created."""
        if late := self._late_runs(client) if self.requested_at else []:
            run = late[0]
        else:
            experiment = experiment_id(client, self.request.experiment)
            self.requested_at = time.monotonic()
            try:
                run = client.create_run(experiment, run_name=self.request.name, tags=tags)
            except Exception as error:
                if (http_status(error) or HTTP_SERVER_ERROR) < HTTP_SERVER_ERROR:  # the server did not create it
                    self.requested_at = None
                raise
        self.run_id = run.info.run_id
        return run

    def _late_runs(self, client: Any) -> list[Any]:
        """Return the runs that an unanswered create request made; poll until LATE_SECONDS after the request."""
        while True:
            runs = search(client, f"tags.{OWNER} = '{self.claim}'")
            if runs or time.monotonic() > (self.requested_at or 0.0) + LATE_SECONDS:
                return runs
            time.sleep(PAUSE_SECONDS)


def refuse_alive(client: Any, run: Any, own_folder: Path | None) -> None:
    """Raise a UserError if another process is writing the run.

    For a run of this machine, check the lock of its folder; watch a run of another machine for WATCH_SECONDS.
    own_folder: the run's folder, if this process has locked it.
    """
    tags, run_id = run.data.tags, run.info.run_id
    if run.info.status != "RUNNING" or OWNER not in tags:
        return
    folder, owner = Path(tags.get("run_dir", "")), None
    if tags.get("host") == socket.gethostname() and folder.is_dir():
        is_own = own_folder and own_folder.resolve() == folder.resolve()
        owner = None if is_own else live_owner(folder)
    elif _changes(client, run):
        owner = f"process {tags[OWNER].partition(' ')[0]} on {tags.get('host')}"
    if owner:
        raise alive_error(run_id, owner)


def _changes(client: Any, run: Any) -> bool:
    """Whether the run gets points, another status or another claim within WATCH_SECONDS."""
    before, end = _state(run), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(PAUSE_SECONDS)
        if _state(client.get_run(run.info.run_id)) != before:
            return True
    return False


def _state(run: Any) -> tuple[str, str | None, dict[str, int]]:
    return run.info.status, run.data.tags.get(OWNER), _last_steps(run)


def _last_steps(run: Any) -> dict[str, int]:
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}


def experiment_id(client: Any, experiment: str | None) -> str:
    """The id of the experiment with this name or id, created if necessary. experiment: None for MLflow's default.

    Raises:
        ValueError: the experiment is deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or None
    if experiment is None:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    existing = find_experiment(client, experiment)
    if existing is None:
        try:
            return str(client.create_experiment(experiment))
        except MlflowException:
            existing = find_experiment(client, experiment)  # another process has created it
            if existing is None:
                raise
    return str(existing.experiment_id)


def create_for(client: Any, opened: Record, folder: Path, claim: str | None) -> Any:
    """Create a run for one that began offline or in another store. claim: its new claim; None: unchanged."""
    tags = opened["tags"] | {ORIGINAL: opened["id"], "run_dir": str(folder), "host": opened["host"]}
    tags |= {OWNER: claim} if claim else {}
    experiment = experiment_id(client, opened["experiment"])
    return client.create_run(experiment, start_time=opened["time"], run_name=opened["name"], tags=tags)


def delete_stale_tags(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    """Delete an earlier start's tags on its outcome and settings, except those that this start sets."""
    stale = {tag for tag in run.data.tags if tag in STALE_TAGS or is_operational(tag)}
    for tag in stale - tags.keys():
        client.delete_tag(run.info.run_id, tag)


def _tag_launchers(client: Any, launcher: str, run_id: str, resumed: bool) -> None:
    """Tag the run that launched this one, and end the launchers of earlier starts that were killed."""
    set_tags(client, launcher, {"role": "launcher", LAUNCHED: run_id})
    for run in search(client, f"tags.{LAUNCHED} = '{run_id}'") if resumed else ():
        if run.info.status == "RUNNING" and run.info.run_id != launcher:
            client.set_terminated(run.info.run_id, "KILLED")


def _check_artifact_folder(client: Any, run: Any) -> None:
    """Check before the training that artifacts can be logged after it.

    Raises:
        OSError: the artifact folder cannot be written.
        UserError: the folder is remote, and the library for its scheme is not installed.
    """
    parts = urlsplit(run.info.artifact_uri)
    if parts.scheme in ("", "file"):
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return
    try:
        client.list_artifacts(run.info.run_id)
    except ImportError as error:
        raise UserError(f"artifact folder {shown_uri(run.info.artifact_uri)}: {error}") from None


def _read_back(client: Any, run: Any, folder: Path, last_steps: Mapping[str, int]) -> bool:
    """Append to the journal the points that only the store has; returns whether there were any."""
    records: list[Record] = []
    for key, step in _last_steps(run).items():
        last = last_steps.get(key, -1)
        if step > last:
            first: dict[int, Point] = {}
            for point in stored_points(client, run.info.run_id, key):
                first.setdefault(point.step, point)
            records += [{"op": "known", "step": point.step, "time": point.timestamp, "values": {key: point.value}}
                        for point in first.values() if point.step > last]  # fmt: skip
    if not records:
        return False
    journal = JournalWriter(RunFolder(folder).journal)  # after all queries: a failed opening must change nothing
    for record in records:
        journal.append(record)
    journal.close()
    return True
