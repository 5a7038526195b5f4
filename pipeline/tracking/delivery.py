"""One run's journal on its way to the tracking store.

What was delivered, and to where, is in `delivered.json`, replaced after every batch: a writer that is killed goes on
there. A batch that is delivered twice changes nothing, since every point has its time from the journal.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.names import CANONICAL, DELIVERED_FILE, OWNER
from pipeline.runtime.console import say
from pipeline.storage.files import replacing
from pipeline.storage.journal import JOURNAL_FILE, JournalReader, Record, read_all
from pipeline.storage.ownership import owner_number
from pipeline.storage.run_files import leaves, own_file, own_folder, read_delivered
from pipeline.tracking.client import connect, find_by_id, is_deleted, set_tags, told_deleted
from pipeline.tracking.history import write_history
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import Away, DeliveryNews, DeliveryReport, Progress, TakenOver
from pipeline.tracking.opening import delete_stale, make_for
from pipeline.tracking.store import (
    Answer,
    answer_of,
    is_random,
    one_line,
    probe,
    store_key,
    tracking_uri,
    was_just_made,
)

HISTORY_FILE = "history.parquet"
LOCK_FILE = "writer.lock"
POLL_SECONDS = 0.5  # how long a point may wait in the journal before it is delivered
BATCH_POINTS = 1000  # MLflow's limit for one log_batch
BATCH_PARAMS = 100
PAUSE_SECONDS = (0.25, 4.0)  # between two tries: the first, the longest
LOCK_SECONDS = 10.0  # how long the writer of an earlier owner is waited for; it stops after the call it is at
PROGRESS_SECONDS = 0.5
CLAIM_SECONDS = 5.0  # between two looks at who owns the run
LONG_SECONDS = 600.0  # how long a model or a file may take on its way to a store that has just answered
LARGE_BYTES = 1 << 20
DIGEST_LENGTH = 32  # of a data set's hash: MLflow takes 36 characters at most; the whole is in a tag
ORIGIN_TAGS = ("mlflow.source.", "mlflow.user")  # of a run that its model has too: by whom and from which code
TOLD_PROBLEMS = 20
FAILING_SECONDS = 20.0  # after which a call that the server fails to answer, while it takes others, is refused
NO_WORD = "the process ended without a word"


class GaveUpError(Exception):
    """The store has taken nothing for too long, or the run has another owner: the rest stays in the journal."""


class Cursor:
    """How far a journal came, in each store that it was delivered to."""

    def __init__(self, folder: Path, store: str) -> None:
        self.file, self.store = folder / DELIVERED_FILE, store
        size = _size(folder / JOURNAL_FILE)
        # of a journal that was lost, or its tail, all is delivered again
        self.stores = {name: saved for name, saved in read_delivered(folder).items() if saved["offset"] <= size}
        saved = self.stores.get(store, {})
        self.run_id: str | None = saved.get("run_id")
        self.offset, self.ended = int(saved.get("offset", 0)), saved.get("ended")
        self.problems: list[str] = list(saved.get("problems", ()))
        self.more_problems = int(saved.get("more_problems", 0))

    def rewind(self) -> None:
        """Deliver all of it again."""
        self.offset, self.ended, self.problems, self.more_problems = 0, None, [], 0

    def add_problem(self, problem: str) -> bool:
        """Keep it among the first; returns whether it is one of them."""
        if len(self.problems) < TOLD_PROBLEMS:
            self.problems.append(problem)
            return True
        self.more_problems += 1
        return False

    def save(self) -> None:
        """Remember; where that cannot be written, an older one stays, and what came after it is delivered again."""
        saved = {"run_id": self.run_id, "offset": self.offset, "ended": self.ended, "problems": self.problems,
                 "more_problems": self.more_problems}  # fmt: skip
        self.stores[self.store] = saved
        try:
            with replacing(self.file) as work:
                work.write_text(json.dumps(self.stores, indent=1), encoding="utf-8")
        except OSError as error:
            say(f"warning: {self.file}: {error.strerror or error}; what was delivered may be delivered once more")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def wait_for_turn(folder: Path, check: Callable[[], None] = lambda: None) -> FileLock:
    """Wait for the writer of an earlier owner, which may still be in a call; the caller releases the lock returned.

    After `LOCK_SECONDS` it comes unlocked: that writer hangs, and cannot do harm, since both deliver the same.

    Raises:
        OSError: the folder cannot be written.
        Whatever `check` raises; it is called while waiting.
    """

    def cancelled() -> bool:
        check()
        return False

    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.1, cancel_check=cancelled)
    return lock


class Delivery:
    """Brings one run's journal to the tracking store."""

    def __init__(
        self, folder: Path, owner: int, inbox: Inbox, tell: Callable[[DeliveryNews], None], claim: str | None = None
    ) -> None:
        """owner: the fencing number that this writer works for. tell: takes the progress once the end was asked for.

        claim: the run's tag `owner` as long as it is ours; None = it is not looked at.
        """
        self.folder, self.owner, self.inbox, self.tell, self.claim = folder, owner, inbox, tell, claim
        self.claim_seen = -CLAIM_SECONDS  # when it was looked at
        self.journal = folder / JOURNAL_FILE
        self.cursor = Cursor(folder, store_key())
        self.client: Any = None
        self.run_id = ""
        self.params: dict[str, str] = {}  # what is there: `mlflow run` writes params as typed, and they cannot change
        self.opened: Record = {}  # the journal's first such record, and where it ends
        self.end_of_opened = 0
        self.status: str | None = None  # the journal's last word, when it was said (ms) and where it ends
        self.ended_at: int | None = None
        self.end_of_status = 0
        self.ended_there: str | None = None  # how the store says that the run ended
        self.reason, self.away, self.superseded, self.is_told = "", False, False, False
        self.delivered = self.total = 0
        self.told = time.monotonic()
        self.reader = JournalReader(self.journal)

    def follow(self) -> DeliveryReport:
        """Deliver until the run is finished, its trainer is gone, or there is nothing to be done; the report."""
        lock = None
        try:
            lock = wait_for_turn(self.folder, self._check)
            self._find_run()
            while True:
                leaving = self.inbox.leaving  # asked before reading: what was logged before is read then
                if not self._deliver():
                    if leaving:
                        break
                    self.inbox.wait(POLL_SECONDS)
            self._end()
        except GaveUpError:
            if self.inbox.hurried and self.run_id and not self.superseded and not self.is_told:
                self._end_early()
        finally:
            self.reader.close()
            if lock:
                lock.release()
        return self.report()

    @property
    def is_done(self) -> bool:
        """All of the journal is in the store, the run's end too."""
        return self.cursor.ended is not None and not self.waiting()

    def report(self) -> DeliveryReport:
        used = os.times()
        more = [f"and {self.cursor.more_problems} more"] if self.cursor.more_problems else []
        return DeliveryReport(
            (*self.cursor.problems, *more), self.waiting(), self.reason, self.run_id, used.user + used.system
        )

    def waiting(self) -> int:
        """Whole records that the store does not have yet; a run that was not ended there counts as one."""
        count = 0
        with self.journal.open("rb") as stream:
            stream.seek(self.cursor.offset)
            while chunk := stream.read(1 << 20):
                count += chunk.count(b"\n")
        return count or int(self.inbox.leaving and self.cursor.ended is None)

    def _find_run(self) -> None:
        """The run in this store: the one that was opened, or the one made for it, or a new one for it."""
        while not self.opened:
            records = ((record, end) for end, record in self.reader.read() if record["op"] == "open")
            self.opened, self.end_of_opened = next(records, ({}, 0))
            if not self.opened:
                if self.inbox.leaving:
                    raise GaveUpError
                self.inbox.wait(POLL_SECONDS)
        while self.client is None or not self.run_id:
            self._attempt("run", self._locate, patient=True)
        self.reader.close()
        self.reader = JournalReader(self.journal, self.cursor.offset)

    def _locate(self) -> None:
        probe()
        self.client = self.client or connect()
        ids = [run_id for run_id in (self.cursor.run_id, self.opened["id"]) if run_id]
        run = next((found for run_id in ids if (found := find_by_id(self.client, run_id))), None)
        if run is None or run.info.run_id != self.cursor.run_id:
            self.cursor.rewind()
        if run is None:
            run = make_for(self.client, self.opened, self.folder, self.claim)
        self.run_id = self.cursor.run_id = run.info.run_id
        self.params = dict(run.data.params)
        self.ended_there = run.info.status if run.info.status != "RUNNING" else None
        self.cursor.save()

    def _deliver(self) -> bool:
        """Bring the next records to the store; False when there were none."""
        records = self.reader.read()
        steps: list[tuple[int, Record]] = []
        points = 0
        for end, record in records:
            count = len(record["values"]) if record["op"] == "metrics" else BATCH_POINTS
            if points + count > BATCH_POINTS:
                self._log_steps(steps)
                steps, points = [], 0
            if record["op"] == "metrics":
                steps.append((end, record))
                points += count
            else:
                self._log_other(end, record)
        self._log_steps(steps)
        return bool(records)

    def _log_steps(self, steps: Sequence[tuple[int, Record]]) -> None:
        from mlflow.entities import Metric

        if not steps:
            return
        points = [
            Metric(key, float(value), step["time"], step["step"])
            for _, step in steps
            for key, value in step["values"].items()
        ]
        self._check_claim()
        for start in range(0, len(points), BATCH_POINTS):
            self._log_points(points[start : start + BATCH_POINTS])
        self._passed(steps[-1][0], len(steps))

    def _log_points(self, points: Sequence[Any]) -> None:
        """A batch that is refused goes metric by metric: one bad name must not cost the others."""
        refused = self._attempt("points", self.client.log_batch, self.run_id, metrics=points)
        keys = list(dict.fromkeys(point.key for point in points))
        if refused and len(keys) > 1:
            for key in keys:
                self._log_points([point for point in points if point.key == key])
        elif refused:
            self._problem(f"{len(points)} points of {keys[0]}", refused)

    def _log_other(self, end: int, record: Record) -> None:
        op = record["op"]
        if op == "finish":  # passed once the run is ended in the store, too
            self.status, self.ended_at, self.end_of_status = record["status"], record["time"], end
            return
        if op == "open":
            self.status = self.ended_at = None
            if end != self.end_of_opened:  # what waited of an earlier start came after this one was opened
                self._require("tags", self._delete_stale, record)
            if not (record["online"] and self.run_id == record["id"]):  # else it was said when the run was opened
                self._require("tags", self._open_later, record)
        elif op == "params":
            self._log_params(record["values"])
        elif op == "tags":
            self._require("tags", set_tags, self.client, self.run_id, record["values"])
        elif op == "artifact":
            self._log_artifact(record)
        elif op == "input":
            self._require("input", self._log_input, record)
        elif op == "model":
            self._long()
            self._require("model", self._log_model, record)
        self._passed(end)

    def _delete_stale(self, record: Record) -> None:
        delete_stale(self.client, self.client.get_run(self.run_id), record["tags"])

    def _open_later(self, record: Record) -> None:
        """What is said of a run when it is opened, for one that was opened elsewhere or without the store."""
        name = self.client.get_run(self.run_id).info.run_name or ""
        self.client.update_run(self.run_id, status="RUNNING", name=record["name"] if is_random(name) else None)
        where = {"run_dir": str(self.folder), "host": record["host"]} | ({OWNER: self.claim} if self.claim else {})
        set_tags(self.client, self.run_id, record["tags"] | where)

    def _log_params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in values.items() if key not in self.params]
        # a dotted key typed as `-P optim.dense.lr=3e-4` stays as it was typed: its canonical text is a tag
        typed = {CANONICAL + key: value for key, value in values.items()
                 if "." in key and self.params.get(key, value) != value}  # fmt: skip
        if typed:
            self._require("tags", set_tags, self.client, self.run_id, typed)
        for start in range(0, len(new), BATCH_PARAMS):
            batch = new[start : start + BATCH_PARAMS]
            self._require("params", self.client.log_batch, self.run_id, params=batch)
        self.params |= {param.key: param.value for param in new}

    def _log_artifact(self, record: Record) -> None:
        name, place = record["file"], record["folder"]
        try:
            if leaves(place):
                raise ValueError(f"{name}: its folder {place} leaves the run's artifacts")
            file = own_file(self.folder, name)
        except (OSError, ValueError) as error:
            self._problem("artifact", error)
            return
        if _size(file) > LARGE_BYTES:
            self._long()
        self._require(name, self.client.log_artifact, self.run_id, str(file), place or None)

    def _log_input(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        inputs = [DatasetInput(dataset, tags)]
        try:
            self.client.log_inputs(self.run_id, inputs)
        except Exception as error:  # whatever the store's kind raises
            if not was_just_made(error):
                raise
            self.client.log_inputs(self.run_id, inputs)  # MLflow now finds the data set that another run has made

    def _log_model(self, record: Record) -> None:
        """Log the run's model unless it is there; an incomplete one, which a kill left, is deleted first.

        We create the model ourselves: MLflow, logging one to an active run, would read back every point of the run.
        """
        from pipeline.tracking.model_export import MODEL_NAME, log_model

        run = self.client.get_run(self.run_id)
        experiment = run.info.experiment_id
        for found in self.client.search_logged_models([experiment], f"source_run_id = '{self.run_id}'"):
            if found.status == "READY":
                self._log_model_metrics(run, found.model_id)
                return
            self.client.delete_logged_model(found.model_id)
        folder = own_folder(self.folder, record["folder"])
        origin = {name: value for name, value in run.data.tags.items() if name.startswith(ORIGIN_TAGS)}

        def make() -> str:
            made = self.client.create_logged_model(experiment, MODEL_NAME, self.run_id, origin, run.data.params)
            return str(made.model_id)

        model_id = log_model(record | {"folder": str(folder)}, make)
        self._log_model_metrics(run, model_id)

    def _log_model_metrics(self, run: Any, model_id: str) -> None:
        """Make the model an output of the run, and log the test metrics as the model's, for MLflow's pages of models.

        The store keeps a point once per key, step, time and value, so the run's own history does not change.
        """
        from mlflow.entities import LoggedModelOutput, Metric

        data: dict[str, str] = {}
        metrics = []
        for record in read_all(self.journal):
            if record["op"] == "input":
                data = {"dataset_name": record["name"], "dataset_digest": record["digest"][:DIGEST_LENGTH]}
            elif record["op"] in ("metrics", "known"):
                metrics += [Metric(key, float(value), record["time"], record["step"], model_id, **data)
                            for key, value in record["values"].items()
                            if key.startswith("test/") and math.isfinite(value)]  # fmt: skip
        for start in range(0, len(metrics), BATCH_POINTS):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH_POINTS])
        outputs = run.outputs.model_outputs if run.outputs else []
        if model_id not in [output.model_id for output in outputs]:
            step = max((metric.step for metric in metrics), default=0)
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])

    def _end(self) -> None:
        """Write the whole history beside the run, and end it: in a hurry first, for the history may take too long."""
        told = self.inbox.finish.status if self.inbox.finish else None
        if self.ended_there and not (self.status or told):  # the folder was copied before the run ended
            self.cursor.ended = self.ended_there
            self.cursor.save()
            return
        status = self.status or told or "FAILED"
        failure = self.inbox.finish.failure if self.inbox.finish else ""
        failure = "" if self.status else failure or ("" if told else NO_WORD)
        if failure:
            self._require("tags", set_tags, self.client, self.run_id, {"failure": failure})
        hurried = self.inbox.hurried
        if not hurried:
            self._log_history()
        if self.cursor.problems and status == "FINISHED":
            status = "FAILED"
        self._require(f"status {status}", self.client.set_terminated, self.run_id, status, self.ended_at)
        self.is_told = True
        if hurried:
            self._log_history()
        self.cursor.offset = max(self.cursor.offset, self.end_of_status)
        self.cursor.ended = status
        self.cursor.save()

    def _log_history(self) -> None:
        try:
            write_history(self.journal, self.folder / HISTORY_FILE, self._written)
        except OSError as error:
            self._problem(HISTORY_FILE, error)
        else:
            self._long()
            self._require(HISTORY_FILE, self.client.log_artifact, self.run_id, str(self.folder / HISTORY_FILE))
            self._moved()

    def _written(self) -> None:
        self._check()
        self._moved()

    def _end_early(self) -> None:
        """Say how the run ended, with the rest of its journal still waiting; one try."""
        assert self.inbox.finish
        with contextlib.suppress(Exception):  # what waits is reported, and this is a part of it
            set_tags(self.client, self.run_id, {"failure": self.inbox.finish.failure})
            self.client.set_terminated(self.run_id, self.inbox.finish.status)

    def _passed(self, end: int, records: int = 1) -> None:
        """Everything up to there is in the store."""
        self.cursor.offset, self.cursor.ended = end, None
        self.cursor.save()
        self.delivered += records
        self._moved()

    def _moved(self) -> None:
        self.inbox.progress()
        if self.inbox.finish and time.monotonic() - self.told > PROGRESS_SECONDS:
            self.told = time.monotonic()
            self.tell(self._progress())

    def _progress(self, busy: float = 0.0) -> Progress:
        self.total = self.total or self.delivered + self.waiting()  # counted once, when the end was asked for
        return Progress(self.delivered, self.total, busy)

    def _long(self) -> None:
        """What comes may take longer than the trainer's patience: ask for it, of a store that answers just now."""
        self._require("run", self.client.get_run, self.run_id)
        self._moved()
        if self.inbox.finish and (self.status or self.inbox.finish.status) == "FINISHED":
            self.tell(self._progress(LONG_SECONDS))
            self.told = 0.0  # the next progress is told at once: then the patience is as before

    def _problem(self, what: str, error: Exception) -> None:
        """Something is refused for good. It is told at once: a training may take hours to its end."""
        problem = f"{what} not delivered: {one_line(error)}"
        if self.cursor.add_problem(problem) and not self.inbox.leaving:
            say(f"warning: run {self.run_id}: {problem}")

    def _require(self, what: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Call the store; what it refuses is a problem that `report` tells."""
        refused = self._attempt(what, call, *arguments, **named)
        if refused:
            self._problem(what, refused)

    def _attempt(self, what: str, call: Callable[..., Any], *arguments: Any, patient: bool = False, **named: Any) -> (
        Exception | None
    ):  # fmt: skip
        """Call the store, again and again while it is away. Returns its refusal, which counts as away to the patient.

        Raises:
            GaveUpError: nobody waits for it any more, or the run was deleted.
        """
        pause, longest = PAUSE_SECONDS
        failing_since: float | None = None
        while True:
            self._check()
            try:
                call(*arguments, **named)
            except Exception as error:
                answer = answer_of(error)
                if answer is Answer.FAILED:
                    failing_since = failing_since or time.monotonic()
                    if time.monotonic() - failing_since > FAILING_SECONDS and self._takes_others():
                        answer = Answer.REFUSED
                if answer is Answer.REFUSED and not patient:
                    self._check_deleted()
                    return error
                self.reason = f"{what}: {one_line(error)}"
                self._tell_away()
            else:
                self._tell_back()
                self.inbox.progress()
                return None
            if self.inbox.impatient:
                raise GaveUpError
            self.inbox.wait(min(pause, self.inbox.seconds_left))
            pause = min(2 * pause, longest)

    def _takes_others(self) -> bool:
        """Whether the store takes a tag that is there already: then it is the one call that cannot be delivered."""
        try:
            set_tags(self.client, self.run_id, {"host": self.opened["host"]})
        except Exception:  # whatever the store's kind raises
            return False
        return True

    def _check_deleted(self) -> None:
        """Give up where the run itself is gone, as somebody deletes it in MLflow's pages: told once, for all of it."""
        try:
            deleted = self.run_id and is_deleted(self.client.get_run(self.run_id))
        except Exception:  # whatever the store's kind raises: then the refusal stands
            return
        if self.run_id and deleted:
            self.reason = told_deleted(self.run_id)
            if not self.inbox.leaving:
                say(f"warning: {self.reason}; what it logs from now on waits in {self.journal}")
            raise GaveUpError

    def _check(self) -> None:
        if owner_number(self.folder) > self.owner:
            self.superseded = True
            raise GaveUpError
        if self.inbox.hurried and self.inbox.impatient:
            self.reason = self.reason or "there was no time for it"
            raise GaveUpError

    def _check_claim(self) -> None:
        """Stop where another process has taken the run over, seconds ago at the most."""
        if self.claim is None or time.monotonic() - self.claim_seen < CLAIM_SECONDS:
            return
        try:
            tags = self.client.get_run(self.run_id).data.tags
        except Exception:  # whatever the store's kind raises: what is delivered next says it
            return
        self.claim_seen = time.monotonic()
        if tags.get(OWNER, self.claim) != self.claim:
            by = f"process {tags[OWNER].partition(' ')[0]} on {tags.get('host')}"
            self.superseded, self.reason = True, f"run {self.run_id} was taken over by {by}"
            self.tell(TakenOver(by))
            raise GaveUpError

    def _tell_away(self) -> None:
        if self.inbox.finish:
            self.tell(Away(self.waiting(), self.reason))
        elif not self.away and not self.inbox.leaving:
            say(f"warning: tracking store {tracking_uri()} takes nothing ({self.reason}); the run goes on, and all of "
                f"it waits in {self.journal}")  # fmt: skip
            self.away = True

    def _tell_back(self) -> None:
        if self.away:
            say(f"tracking store {tracking_uri()} is back")
            self.away = False
        self.reason = ""
