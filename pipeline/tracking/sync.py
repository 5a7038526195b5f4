"""`python -m pipeline sync <folder>`: deliver the remaining journal records of runs that are no longer training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pipeline.errors import TrainingError, Undelivered, UserError
from pipeline.runtime.console import info, warn
from pipeline.runtime.text import visible
from pipeline.storage.journal import JOURNAL_FILE, JournalWriter
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.client import connect, deletion_message, find_by_id, is_deleted
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import DeliveryNews, DeliveryReport, FinishRun, Progress
from pipeline.tracking.run import PATIENCE_SECONDS
from pipeline.tracking.run_opening import refuse_alive
from pipeline.tracking.store import CLIENT_SETTINGS, check_reachable, store_key, tracking_uri
from pipeline.tracking.store_errors import Answer, classify, one_line, refusal


def sync(folder: Path, again: bool = False) -> None:
    """Deliver the run in a folder, or the runs in its subfolders, to the store named by MLFLOW_TRACKING_URI.

    Each run gets the final status in its journal. A run that the store does not have is created there with the tag
    `original_run_id`. again: deliver the whole journal again; the store keeps equal points only once.

    Raises:
        UserError: there is no journal, or a process is writing the only run.
        Undelivered: the store does not answer.
        TrainingError: the store refused something.
    """
    single = RunFolder(folder).journal.is_file()
    folders = [RunFolder(folder)] if single else sorted(RunFolder.below(folder), key=lambda each: each.path)
    if not folders:
        raise UserError(f"{folder}: found no {JOURNAL_FILE}, allowed: a run's folder, or a folder of such folders")
    os.environ |= CLIENT_SETTINGS
    with _delivery_errors(folders[0].path.parent):
        check_reachable()
        connect().search_experiments(max_results=1)
    failures: list[UserError] = []
    for each in folders:
        try:
            info(f"run {each.path.name}: {_sync_run(RunFolder(each.path.resolve()), again)}")
            continue
        except UserError as error:
            failure = error
        except Exception as error:  # one damaged folder must not prevent the delivery of the others
            failure = TrainingError(f"run folder {each.path}: {type(error).__name__}: {one_line(error)}")
            failure.__cause__ = error
        if single:
            raise failure
        info(f"error: {failure}")
        failures.append(failure)
    if failures:
        worst = max(failures, key=lambda failure: failure.exit_code)
        count = f"{len(failures)} of {len(folders)}"
        raise type(worst)(f"{count} runs of {folder} were not fully delivered to {tracking_uri()}")


@contextmanager
def _delivery_errors(folder: Path) -> Iterator[None]:
    """Convert any error of the store to a UserError or Undelivered with a one-line message."""
    try:
        yield
    except Exception as error:
        kind = UserError if classify(error) is Answer.REFUSED else Undelivered
        raise kind(f"{refusal(error)}; everything stays in {folder}") from None


def _sync_run(folder: RunFolder, again: bool) -> str:
    """Deliver one run; returns a short description of the outcome."""
    owner = folder.lock()
    try:
        owner.take()
        JournalWriter(folder.journal).close()  # cuts off an incomplete last record
        opened = folder.opening()
        if opened is None:
            raise UserError(f"{folder.journal}: found no record of the run's beginning; it cannot be delivered")
        with _delivery_errors(folder.path):
            client = connect()
            run = find_by_id(client, opened["id"])
        if run:  # the folder may be a copy of a run that another process is writing
            refuse_alive(client, run, folder.path)
        report, delivered = _deliver(folder, owner.number, again)
    except OSError as error:
        raise TrainingError(f"run folder {folder.path}: {error.strerror or error}") from None
    finally:
        owner.release()
    if report.waiting:
        raise Undelivered(f"run {folder.path.name}: {report.waiting:,} records wait: {report.reason}; deliver them "
                          f"with `python -m pipeline sync {folder.path}`")  # fmt: skip
    if report.problems:
        raise TrainingError(f"run {folder.path.name}: {'; '.join(report.problems)}")
    if not delivered:
        return f"nothing to deliver, all of it is in {tracking_uri()}"
    as_other_run = "" if report.run_id == opened["id"] else f" as run {report.run_id}"
    return f"{delivered:,} records delivered to {tracking_uri()}{as_other_run}"


def _deliver(folder: RunFolder, owner: int, again: bool) -> tuple[DeliveryReport, int]:
    """Deliver a run; returns the report and the number of delivered records."""
    cursor = Cursor(folder, store_key())
    if cursor.at.problems or again:
        cursor.rewind()  # the store may accept records that it refused before
        cursor.save()
    inbox = Inbox(None, FinishRun(None, patience=PATIENCE_SECONDS))
    with tqdm(unit=" records", desc=visible(folder.path.name), leave=False) as bar:

        def show(news: DeliveryNews) -> None:
            if isinstance(news, Progress):
                bar.total = news.of
                bar.update(news.delivered - bar.n)

        delivery = Delivery(folder.path, owner, inbox, show)
        if delivery.is_done and _is_stored(cursor.at.run_id, folder.path):
            delivery.reader.close()
            return replace(delivery.report(), run_id=cursor.at.run_id or ""), 0
        report = delivery.follow()
    if delivery.reader.damaged:
        warn(f"{folder.journal}: skipped damaged lines: {delivery.reader.damaged:,}")
    return report, max(1, delivery.delivered)


def _is_stored(run_id: str | None, folder: Path) -> bool:
    """Whether a run that was delivered before is still in the store; raises a UserError if it was deleted."""
    with _delivery_errors(folder):
        run = find_by_id(connect(), run_id) if run_id else None
        if run and is_deleted(run):
            raise UserError(deletion_message(run.info.run_id))
    return run is not None
