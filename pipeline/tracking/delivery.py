"""Delivery of one run's journal to the tracking store."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.names import CANONICAL, OWNER
from pipeline.storage.journal import JournalReader, Record
from pipeline.storage.run_folder import RunFolder, leaves_folder
from pipeline.tracking.client import (
    BATCH_PARAMS,
    BATCH_POINTS,
    connect,
    find_by_id,
    is_random_name,
    log_dataset,
    log_file,
    log_params,
    set_tags,
)
from pipeline.tracking.history import write_history
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import DeliveryNews, DeliveryReport, Progress
from pipeline.tracking.run_opening import create_for, delete_stale_tags
from pipeline.tracking.store import check_reachable
from pipeline.tracking.store_calls import GaveUpError, StoreCalls

POLL_SECONDS = 0.5  # between two reads of the journal
TURN_SECONDS = 10.0  # wait for an earlier owner's writer, which stops after its current call
PROGRESS_SECONDS = 0.5  # between two progress messages
LONG_SECONDS = 600.0  # for uploading a model or a large file, if the store has just answered
LARGE_BYTES = 1 << 20
WAS_KILLED = "the process was killed"


def wait_for_turn(folder: RunFolder, check: Callable[[], None] = lambda: None) -> FileLock:
    """Wait for the previous owner's writer to stop, then acquire the writer lock; the caller releases it.

    After TURN_SECONDS return without it: that writer hangs, and delivering twice is harmless. check: called while
    waiting.
    """

    def is_cancelled() -> bool:
        check()
        return False

    lock = FileLock(folder.writer_lock, fallback_to_soft=False)
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=TURN_SECONDS, poll_interval=0.1, cancel_check=is_cancelled)
    return lock


class Delivery:
    """Delivers one run's journal."""

    def __init__(
        self, folder: Path, owner: int, inbox: Inbox, send: Callable[[DeliveryNews], None], claim: str | None = None
    ) -> None:
        """owner: owner number for which this writer delivers. send: sends progress to the trainer.

        claim: the run's expected claim; None: not checked.
        """
        self.folder, self.inbox, self.send = RunFolder(folder), inbox, send
        self.store = StoreCalls(self.folder, owner, claim, inbox, send)
        self.cursor = self.store.cursor
        self.reader = JournalReader(self.folder.journal)
        self.params: dict[str, str] = {}  # in the store; `mlflow run` logs them as typed, and they cannot change
        self.opened: Record = {}  # first record `open` of the journal, and its end position
        self.end_of_opened = 0
        self.status: str | None = None  # from the last record `finish`, with its time (ms) and end position
        self.ended_at: int | None = None
        self.end_of_status = 0
        self.ended_before: str | None = None  # final status that the run already had in the store
        self.is_ended = False
        self.delivered = self.total = 0  # numbers of records
        self.progress_at = time.monotonic()

    def follow(self) -> DeliveryReport:
        """Deliver until the run is finished, the trainer has exited, or delivery gives up."""
        lock = None
        try:
            lock = wait_for_turn(self.folder, self.store.check)
            self._find_run()
            while True:
                ending = self.inbox.ending  # checked before reading, so that no record is missed
                if not self._deliver_next():
                    if ending:
                        break
                    self.inbox.wait(POLL_SECONDS)
            self._end()
        except GaveUpError:
            if self.inbox.hurried and self.store.run_id and not self.store.superseded and not self.is_ended:
                self._end_early()
        finally:
            self.reader.close()
            if lock:
                lock.release()
        return self.report()

    @property
    def is_done(self) -> bool:
        """Whether the whole journal is delivered and the run has ended in the store."""
        return self.cursor.at.ended is not None and not self.store.waiting()

    def report(self) -> DeliveryReport:
        cursor, used = self.cursor, os.times()
        more = [f"and {cursor.at.more_problems} more"] if cursor.at.more_problems else []
        return DeliveryReport((*cursor.at.problems, *more), self.store.waiting(), self.store.reason, self.store.run_id,
                              used.user + used.system)  # fmt: skip

    def _find_run(self) -> None:
        """Find or create the run in this store, and start reading at the cursor's position."""
        while not self.opened:
            openings = ((record, end) for end, record in self.reader.read() if record["op"] == "open")
            self.opened, self.end_of_opened = next(openings, ({}, 0))
            if not self.opened:
                if self.inbox.ending:
                    raise GaveUpError
                self.inbox.wait(POLL_SECONDS)
        self.store.host = self.opened["host"]
        self.store.attempt("run", self._locate, patient=True)
        self.reader.close()
        self.reader = JournalReader(self.folder.journal, self.cursor.at.offset)

    def _locate(self) -> None:
        check_reachable()
        store, cursor = self.store, self.cursor
        store.client = store.client or connect()
        ids = [run_id for run_id in (cursor.at.run_id, self.opened["id"]) if run_id]
        run = next(filter(None, (find_by_id(store.client, run_id) for run_id in ids)), None)
        if run is None or run.info.run_id != cursor.at.run_id:
            cursor.rewind()
        if run is None:
            run = create_for(store.client, self.opened, self.folder.path, store.claim)
        store.run_id = cursor.at.run_id = run.info.run_id
        self.params = dict(run.data.params)
        self.ended_before = run.info.status if run.info.status != "RUNNING" else None
        cursor.save()

    def _deliver_next(self) -> bool:
        """Deliver the next records, points in batches; returns False if there were none."""
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
                self._deliver_record(end, record)
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
        self.store.check_claim()
        for start in range(0, len(points), BATCH_POINTS):
            self._log_points(points[start : start + BATCH_POINTS])
        self._advance(steps[-1][0], len(steps))

    def _log_points(self, points: Sequence[Any]) -> None:
        """Log points; if the store refuses them, log each metric separately, so that only invalid ones are lost."""
        store = self.store
        refusal = store.attempt("points", lambda: store.client.log_batch(store.run_id, metrics=points))
        keys = list(dict.fromkeys(point.key for point in points))
        if refusal and len(keys) > 1:
            for key in keys:
                self._log_points([point for point in points if point.key == key])
        elif refusal:
            store.add_problem(f"{len(points)} points of {keys[0]}", refusal)

    def _deliver_record(self, end: int, record: Record) -> None:
        match record["op"]:
            case "finish":  # the cursor moves past it once the run has ended in the store
                self.status, self.ended_at, self.end_of_status = record["status"], record["time"], end
                return
            case "open":
                self.status = self.ended_at = None
                if end != self.end_of_opened:  # a resumed run: the store may have tags of its earlier start
                    self.store.require("tags", self._delete_stale_tags, record["tags"])
                if not (record["online"] and self.store.run_id == record["id"]):  # otherwise set when opened
                    self.store.require("tags", self._open_later, record)
            case "params":
                self._log_params(record["values"])
            case "tags":
                self.store.require("tags", set_tags, record["values"])
            case "artifact":
                self._log_artifact(record)
            case "input":
                self.store.require("input", log_dataset, record)
            case "model":
                from pipeline.tracking.model_export import log_run_model

                self._ask_for_time()
                self.store.require("model", log_run_model, self.folder, record)
        self._advance(end)

    def _delete_stale_tags(self, client: Any, run_id: str, tags: Mapping[str, str]) -> None:
        delete_stale_tags(client, client.get_run(run_id), tags)

    def _open_later(self, client: Any, run_id: str, record: Record) -> None:
        """Set the name, status and tags of a run that was opened offline or in another store."""
        name, claim = client.get_run(run_id).info.run_name or "", self.store.claim
        client.update_run(run_id, status="RUNNING", name=record["name"] if is_random_name(name) else None)
        where = {"run_dir": str(self.folder.path), "host": record["host"]} | ({OWNER: claim} if claim else {})
        set_tags(client, run_id, record["tags"] | where)

    def _log_params(self, values: Mapping[str, str]) -> None:
        # the store keeps a param as typed, such as `-P optim.dense.lr=3e-4`; its canonical spelling becomes a tag
        typed = {CANONICAL + key: value for key, value in values.items()
                 if "." in key and self.params.get(key, value) != value}  # fmt: skip
        if typed:
            self.store.require("tags", set_tags, typed)
        new = [(key, value) for key, value in values.items() if key not in self.params]
        for start in range(0, len(new), BATCH_PARAMS):
            self.store.require("params", log_params, dict(new[start : start + BATCH_PARAMS]))
        self.params |= dict(new)

    def _log_artifact(self, record: Record) -> None:
        name, folder = record["file"], record["folder"]
        try:
            if leaves_folder(folder):
                raise ValueError(f"{name}: its folder {folder} leaves the run's artifacts")
            file = self.folder.file(name)
            size = file.stat().st_size
        except (OSError, ValueError) as error:
            self.store.add_problem("artifact", error)
            return
        if size > LARGE_BYTES:
            self._ask_for_time()
        self.store.require(name, log_file, file, folder)

    def _end(self) -> None:
        """Log the history, then end the run; in a hurry, end it first, since there may be no time for the history."""
        finish, cursor = self.inbox.finish, self.cursor
        requested = finish.status if finish else None
        if self.ended_before and not (self.status or requested):  # this folder is a copy made before the run ended
            cursor.at.ended = self.ended_before
            cursor.save()
            return
        status = self.status or requested or "FAILED"
        failure = "" if self.status else (finish.failure if finish else "") or ("" if requested else WAS_KILLED)
        if failure:
            self.store.require("tags", set_tags, {"failure": failure})
        hurried = self.inbox.hurried
        if not hurried:
            self._log_history()
        if cursor.at.problems and status == "FINISHED":
            status = "FAILED"
        self.store.require(f"status {status}",
                           lambda client, run_id: client.set_terminated(run_id, status, self.ended_at))  # fmt: skip
        self.is_ended = True
        if hurried:
            self._log_history()
        cursor.at.offset, cursor.at.ended = max(cursor.at.offset, self.end_of_status), status
        cursor.save()

    def _end_early(self) -> None:
        """Try once to end the run although part of its journal is not delivered."""
        finish = self.inbox.finish
        assert finish
        with contextlib.suppress(Exception):  # the report counts a missing end as not delivered
            set_tags(self.store.client, self.store.run_id, {"failure": finish.failure})
            self.store.client.set_terminated(self.store.run_id, finish.status)

    def _log_history(self) -> None:
        def progress() -> None:
            self.store.check()
            self._note_progress()

        try:
            write_history(self.folder.journal, self.folder.history, progress)
        except OSError as error:
            self.store.add_problem(self.folder.history.name, error)
        else:
            self._ask_for_time()
            self.store.require(self.folder.history.name, log_file, self.folder.history)
            self._note_progress()

    def _advance(self, end: int, records: int = 1) -> None:
        """Move the cursor to `end`, the end position of the last delivered record."""
        self.cursor.at.offset, self.cursor.at.ended = end, None
        self.cursor.save()
        self.delivered += records
        self._note_progress()

    def _note_progress(self) -> None:
        self.inbox.progress()
        if self.inbox.finish and time.monotonic() - self.progress_at > PROGRESS_SECONDS:
            self.progress_at = time.monotonic()
            self._send_progress()

    def _send_progress(self, busy: float = 0.0) -> None:
        self.total = self.total or self.delivered + self.store.waiting()  # counted once, at the run's end
        self.send(Progress(self.delivered, self.total, busy))

    def _ask_for_time(self) -> None:
        """Check that the store answers, and tell the trainer that the next call may take long."""
        self.store.require("run", lambda client, run_id: client.get_run(run_id))
        self._note_progress()
        if self.inbox.finish and (self.status or self.inbox.finish.status) == "FINISHED":
            self._send_progress(LONG_SECONDS)
            self.progress_at = 0.0  # send the next progress at once, which ends the longer wait
