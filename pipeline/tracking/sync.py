"""`python -m pipeline sync <folder>`: deliver what waits in the journals of runs whose trainer is gone."""

import os
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pipeline.errors import TrainingError, Undelivered, UserError
from pipeline.runtime.console import say, warn
from pipeline.runtime.text import visible
from pipeline.storage.journal import JOURNAL_FILE, JournalWriter, beginning
from pipeline.storage.ownership import Ownership
from pipeline.tracking.client import connect, find_by_id, is_deleted, told_deleted
from pipeline.tracking.delivery import Cursor, Delivery
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import DeliveryNews, DeliveryReport, FinishRun, Progress
from pipeline.tracking.opening import refuse_alive
from pipeline.tracking.store import (
    CLIENT_SETTINGS,
    Answer,
    answer_of,
    one_line,
    probe,
    refusal,
    store_key,
    tracking_uri,
)

PATIENCE_SECONDS = 30.0  # without any progress


def sync(folder: Path, again: bool = False) -> None:
    """Deliver the run of the folder, or of each folder in it, to the store that MLFLOW_TRACKING_URI names.

    A run is ended as its journal says. One that this store never had, or has lost, is made there, with tag
    `original_run_id`. again: all of the journal once more; what the store has already stays as it is.

    Raises:
        UserError: there is no journal, or a single run that is alive.
        Undelivered: the store does not answer, or stopped to.
        TrainingError: the store refused something.
    """
    single = (folder / JOURNAL_FILE).is_file()
    folders = [folder] if single else sorted(file.parent for file in folder.glob(f"*/{JOURNAL_FILE}"))
    if not folders:
        raise UserError(f"{folder}: found no {JOURNAL_FILE}, allowed: a run's folder, or a folder of such folders")
    os.environ |= CLIENT_SETTINGS
    _check_store(folders)
    failed: list[UserError] = []
    for each in folders:
        try:
            say(f"run {each.name}: {_sync_run(each, again)}")
            continue
        except UserError as error:
            refused = error
        except Exception as error:  # whatever is wrong with one folder must not keep the others from the store
            refused = TrainingError(f"run folder {each}: {type(error).__name__}: {one_line(error)}")
            refused.__cause__ = error
        if single:
            raise refused
        say(f"error: {refused}")
        failed.append(refused)
    if failed:
        worst = max(failed, key=lambda error: error.exit_code)
        raise type(worst)(f"{len(failed)} of {len(folders)} runs of {folder} are not whole in {tracking_uri()}")


def _check_store(folders: list[Path]) -> None:
    try:
        probe()
        connect().search_experiments(max_results=1)
    except Exception as error:  # whatever the store says becomes the user's one line
        raise _told(error, folders[0].parent) from None


def _told(error: Exception, stays: Path) -> UserError:
    """What the store says against a delivery."""
    kind = UserError if answer_of(error) is Answer.REFUSED else Undelivered
    return kind(f"{refusal(error)}; everything stays in {stays}")


def _sync_run(folder: Path, again: bool) -> str:
    """Deliver one run; what became of it, in a few words."""
    folder = folder.resolve()
    owner = Ownership(folder)
    try:
        owner.take()
        JournalWriter(folder / JOURNAL_FILE).close()  # without what a kill left of its last record
        opened = beginning(folder / JOURNAL_FILE)
        if opened is None:
            raise UserError(f"{folder / JOURNAL_FILE}: found no record of the run's beginning; it cannot be delivered")
        _refuse_alive(folder, opened["id"])
        report, delivered = _deliver(folder, owner.number, again)
    except OSError as error:
        raise TrainingError(f"run folder {folder}: {error.strerror or error}") from None
    finally:
        owner.release()
    if report.waiting:
        raise Undelivered(f"run {folder.name}: {report.waiting:,} records wait: {report.reason}; deliver them "
                          f"with `python -m pipeline sync {folder}`")  # fmt: skip
    if report.problems:
        raise TrainingError(f"run {folder.name}: {'; '.join(report.problems)}")
    if not delivered:
        return f"nothing to deliver, all of it is in {tracking_uri()}"
    as_other = "" if report.run_id == opened["id"] else f" as run {report.run_id}"
    return f"{delivered:,} records delivered to {tracking_uri()}{as_other}"


def _refuse_alive(folder: Path, run_id: str) -> None:
    """Raise a UserError where the folder is a copy, and another process still writes the run."""
    try:
        client = connect()
        run = find_by_id(client, run_id)
    except Exception as error:  # whatever the store says becomes the user's one line
        raise _told(error, folder) from None
    if run:
        refuse_alive(client, run, folder)


def _deliver(folder: Path, number: int, again: bool) -> tuple[DeliveryReport, int]:
    """The report, and how many records were brought over."""
    cursor = Cursor(folder, store_key())
    if cursor.problems or again:
        cursor.rewind()  # what was refused before may be taken now
        cursor.save()
    inbox = Inbox(None, FinishRun(None, patience=PATIENCE_SECONDS))
    with tqdm(unit=" records", desc=visible(folder.name), leave=False) as bar:

        def tell(news: DeliveryNews) -> None:
            if isinstance(news, Progress):
                bar.total = news.of
                bar.update(news.delivered - bar.n)

        delivery = Delivery(folder, number, inbox, tell)
        if delivery.is_done and _is_there(delivery):
            delivery.reader.close()
            return replace(delivery.report(), run_id=cursor.run_id or ""), 0
        report = delivery.follow()
    if delivery.reader.damaged:
        warn(f"{delivery.journal}: damaged lines, which were passed over: {delivery.reader.damaged:,}")
    return report, max(1, delivery.delivered)


def _is_there(delivery: Delivery) -> bool:
    """The run that all was delivered to is still in the store."""
    run_id = delivery.cursor.run_id
    try:
        run = find_by_id(connect(), run_id) if run_id else None
        if run and is_deleted(run):
            raise UserError(told_deleted(run.info.run_id))
    except Exception as error:  # whatever the store says becomes the user's one line
        delivery.reader.close()
        raise _told(error, delivery.folder) from None
    return run is not None
