"""A run's place in the tracking store: made, found again, or made later for one that began without the store."""

import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.run_config import is_operational
from pipeline.errors import UserError
from pipeline.names import FORKED_FROM, LAUNCHED, ORIGINAL, OWNER, THREADS
from pipeline.storage.journal import JOURNAL_FILE, JournalWriter, Record
from pipeline.storage.ownership import alive_owner
from pipeline.tracking.client import (
    connect,
    find_by_id,
    find_experiment,
    search,
    set_tags,
    stored_points,
    stored_run,
)
from pipeline.tracking.messages import FindRuns, OpenedRun, RunRequest, StoredRun
from pipeline.tracking.store import (
    HTTP_SERVER_ERROR,
    check_artifacts,
    context_tags,
    http_status,
    is_random,
    tracking_uri,
)

LATE_SECONDS = 20.0  # after which a run that was asked for and not answered is not being made any more
WATCH_SECONDS = 5.0  # that a run of another machine is watched
PAUSE_SECONDS = 0.5  # between two looks
STALE_TAGS = {"failure", "pruned"}  # of an earlier start: gone when a run goes on


class Opening:
    """Makes or finds the run that a trainer asks for; may be tried again where the store did not answer as it should.

    What it has made is known by its claim, a tag: also a run whose making was never answered.
    """

    def __init__(self, request: RunRequest, output_dir: Path, last_steps: Mapping[str, int]) -> None:
        """last_steps: of each metric in the journal of a resumed run; what the store has beyond is read into it."""
        self.request, self.output_dir, self.last_steps = request, output_dir, last_steps
        self.claim = f"{os.getppid()} {uuid.uuid4().hex[:8]}"  # the trainer's, which is this writer's parent
        self.run_id: str | None = None  # of the run that we have made, or that goes on by our word
        self.asked_at: float | None = None  # when the store was asked to make one

    def open(self) -> OpenedRun:
        """The answer is what the journal says of the run.

        Raises:
            UserError: another process writes the run.
            Whatever the store's kind raises.
        """
        client, request, resumed = connect(), self.request, self.request.resume
        launcher, wanted = request.launcher, request.experiment
        run = self._of_id(client) if request.run_id else None
        if resumed and run is None:
            return self._lost()
        if run and not resumed and wanted and run.info.experiment_id != experiment_of(client, wanted):
            launcher, run = run.info.run_id, None  # `mlflow run` opened it elsewhere: it only started ours
        tags = context_tags() | dict(request.tags) | {OWNER: self.claim}
        run = run or self._made(client, tags)
        run_id = run.info.run_id
        known_as = str(request.run_id) if resumed else run_id  # of a run that began elsewhere: its id there
        folder = Path(request.folder) if request.folder else self.output_dir / known_as
        if run_id != self.run_id:  # not made, nor claimed before
            refuse_alive(client, run, folder if resumed else None)
            self.run_id = run_id
        if resumed:
            delete_stale(client, run, request.tags)
        if resumed or is_random(run.info.run_name or ""):
            name = request.name if is_random(run.info.run_name or "") else None
            client.update_run(run_id, status="RUNNING" if resumed else None, name=name)
        where = {"run_dir": str(folder.resolve()), "host": socket.gethostname(), OWNER: self.claim}
        set_tags(client, run_id, {**request.tags, **where})
        if launcher:
            _settle_launchers(client, launcher, run_id, resumed)
        check_artifacts(client, run)
        if resumed and THREADS in run.data.tags:  # for a journal that was lost
            tags[THREADS] = run.data.tags[THREADS]
        ahead = resumed and _read_back(client, run, folder, self.last_steps)
        return OpenedRun(known_as, client.get_run(run_id).info.run_name,
                         client.get_experiment(run.info.experiment_id).name, tags, tracking_uri(), online=True,
                         ahead=ahead)  # fmt: skip

    def without_store(self, reason: str) -> OpenedRun:
        """The answer where the store is away: the run gets an id all the same, and is made there later."""
        request = self.request
        experiment = request.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        tags = context_tags() | dict(request.tags) | {OWNER: self.claim}
        return OpenedRun(request.run_id or uuid.uuid4().hex, request.name, experiment, tags, tracking_uri(),
                         online=False, reason=reason)  # fmt: skip

    def give_up(self, failure: str) -> None:
        """End what was opened, or may have been: no run of ours stays RUNNING.

        Raises:
            Whatever the store's kind raises.
        """
        client = connect()
        ids = [self.run_id] if self.run_id else []
        if not ids and self.asked_at:
            ids = [run.info.run_id for run in self._answered_late(client)]
        for run_id in ids:  # first the end, which may be all that the store takes
            client.set_terminated(run_id, "FAILED")
            set_tags(client, run_id, {"failure": failure})

    def _of_id(self, client: Any) -> Any | None:
        """The run that is asked for by its id; of one that began elsewhere, what was made for it here."""
        run_id = str(self.request.run_id)
        return find_by_id(client, run_id) if self.request.resume else client.get_run(run_id)

    def _lost(self) -> OpenedRun:
        """The answer for a run that the store does not have (any more): its whole journal is delivered to a new one."""
        reason = f"found no run {self.request.run_id}, whose folder is here; it is made there, with tag {ORIGINAL}"
        return self.without_store(reason)

    def _made(self, client: Any, tags: Mapping[str, str]) -> Any:
        """A new run, known by its tags from birth; one of an earlier try, where its answer was lost."""
        if late := self._answered_late(client) if self.asked_at else []:
            run = late[0]
        else:
            experiment = experiment_of(client, self.request.experiment)
            self.asked_at = time.monotonic()
            try:
                run = client.create_run(experiment, run_name=self.request.name, tags=tags)
            except Exception as error:
                if (http_status(error) or HTTP_SERVER_ERROR) < HTTP_SERVER_ERROR:  # the server says that it made none
                    self.asked_at = None
                raise
        self.run_id = run.info.run_id
        return run

    def _answered_late(self, client: Any) -> list[Any]:
        """Runs that the store has made for us without an answer, maybe long after it was asked."""
        while True:
            found = search(client, f"tags.{OWNER} = '{self.claim}'")
            if found or time.monotonic() > (self.asked_at or 0.0) + LATE_SECONDS:
                return found
            time.sleep(PAUSE_SECONDS)


def refuse_alive(client: Any, run: Any, ours: Path | None) -> None:
    """Raise a UserError where another process writes the run.

    ours: a folder of the run that this process owns. The owner of a folder on this machine can be asked; of another,
    the run is watched for some seconds.
    """
    tags, run_id = run.data.tags, run.info.run_id
    if run.info.status != "RUNNING" or OWNER not in tags:
        return
    there, owner = Path(tags.get("run_dir", "")), None
    if tags.get("host") == socket.gethostname() and there.is_dir():
        owner = None if ours and ours.resolve() == there.resolve() else alive_owner(there)
    elif _moves(client, run):
        owner = f"process {tags[OWNER].partition(' ')[0]} on {tags.get('host')}"
    if owner:
        raise UserError(f"run {run_id} is alive: {owner} writes it; wait for its end, or end it first")


def _moves(client: Any, run: Any) -> bool:
    """Whether the store gets points of the run, or another owner, meanwhile."""
    before = _state(run)
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(PAUSE_SECONDS)
        if _state(client.get_run(run.info.run_id)) != before:
            return True
    return False


def _state(run: Any) -> Any:
    return (
        run.info.status,
        run.data.tags.get(OWNER),
        {metric.key: metric.step for metric in run.data.to_proto().metrics},
    )


def experiment_of(client: Any, asked: str | None) -> str:
    """The id of the experiment with this name or id, made where there is none; of MLflow's own choice without either.

    Raises:
        ValueError: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    asked = asked or os.environ.get("MLFLOW_EXPERIMENT_NAME") or None
    if asked is None:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    found = find_experiment(client, asked)
    if found is None:
        try:
            return str(client.create_experiment(asked))
        except MlflowException:
            found = find_experiment(client, asked)  # another process was first
            if found is None:
                raise
    return str(found.experiment_id)


def make_for(client: Any, opened: Record, folder: Path, claim: str | None) -> Any:
    """A run here for one that began elsewhere, or without the store. claim: who writes it now; None = who began it."""
    tags = opened["tags"] | {ORIGINAL: opened["id"], "run_dir": str(folder), "host": opened["host"]}
    tags |= {OWNER: claim} if claim else {}
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
    return tuple(map(stored_run, runs))


def delete_stale(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    """Take away what an earlier start said of its end and of how it was made, but for the tags that this one sets."""
    stale = {tag for tag in run.data.tags if tag in STALE_TAGS or is_operational(tag)}
    for tag in stale - tags.keys():
        client.delete_tag(run.info.run_id, tag)


def _settle_launchers(client: Any, launcher: str, run_id: str, resumed: bool) -> None:
    """Tag the run that only started this one; end those of earlier starts that were killed."""
    set_tags(client, launcher, {"role": "launcher", LAUNCHED: run_id})
    for run in search(client, f"tags.{LAUNCHED} = '{run_id}'") if resumed else ():
        if run.info.status == "RUNNING" and run.info.run_id != launcher:
            client.set_terminated(run.info.run_id, "KILLED")


def _read_back(client: Any, run: Any, folder: Path, last_steps: Mapping[str, int]) -> bool:
    """Put into the journal what the store has beyond its last steps. True if there was something."""
    newest = _state(run)[2]
    lost = [key for key, step in newest.items() if step > last_steps.get(key, -1)]
    found: list[Record] = []
    for key in lost:
        steps = set[int]()
        for point in stored_points(client, run.info.run_id, key):
            if point.step > last_steps.get(key, -1) and point.step not in steps:
                steps.add(point.step)
                found.append({"op": "known", "step": point.step, "time": point.timestamp,
                              "values": {key: point.value}})  # fmt: skip
    if not found:
        return False
    journal = JournalWriter(folder / JOURNAL_FILE)  # once the store has said all: it may be asked again
    for record in found:
        journal.append(record)
    journal.close()
    return True
