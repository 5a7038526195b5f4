"""Main program of the writer process (see `writer_client.py`): open runs and deliver their journals."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.names import FORKED_FROM
from pipeline.runtime.console import warn
from pipeline.runtime.importing import uncollected
from pipeline.runtime.interrupts import SIGNALS
from pipeline.runtime.processes import take_standard_output
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking import messages
from pipeline.tracking.client import connect, context_tags, download, find_by_id, search, stored_run
from pipeline.tracking.cursor import Cursor
from pipeline.tracking.delivery import WAS_KILLED, Delivery, wait_for_turn
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.redaction import shown_uri
from pipeline.tracking.run_opening import Opening
from pipeline.tracking.store import check_reachable, configure_mlflow, store_key, tracking_uri
from pipeline.tracking.store_calls import PAUSE_SECONDS
from pipeline.tracking.store_errors import Answer, classify, one_line, refusal

OPEN_SECONDS = 30.0  # how long to retry opening a run
ABANDON_SECONDS = 1.0  # pause between attempts to end a run that could not be opened


def main() -> None:
    """Serve requests from standard input until it closes."""
    for number in SIGNALS:  # schedulers signal every process of a job; the writer exits when its input closes
        signal.signal(number, signal.SIG_IGN)
    reply = take_standard_output()
    inbox = Inbox(sys.stdin)
    importing = threading.Thread(target=_import_mlflow, daemon=True)
    importing.start()
    opening: Opening | None = None  # pending opening, until delivery of its journal begins
    while (request := inbox.next()) is not None:
        match request:
            case messages.AbandonRun(failure):
                _abandon(opening, failure)
                opening = None
            case messages.FollowRun():
                importing.join()  # importing mlflow in two threads at once takes twice as long
                opening = None
                reply(_follow(request, inbox, reply))
            case messages.OpenRun():
                opening = Opening(request.run, Path(request.output_dir), request.last_steps)
                reply(_open(request, opening, inbox, importing))
            case messages.FindRuns() | messages.FetchArtifact():
                reply(_query(request, importing))
    _abandon(opening, WAS_KILLED)
    sys.stderr.flush()
    os._exit(0)  # skip MLflow's exit handlers, which may be slow and would end an active run


def _import_mlflow() -> None:
    """Import mlflow, which takes seconds, while the trainer imports torch and loads its data."""
    with uncollected():
        configure_mlflow()
        context_tags()
    gc.freeze()  # exclude the imported modules from garbage collection


def _follow(
    request: messages.FollowRun, inbox: Inbox, send: Callable[[messages.DeliveryNews], None]
) -> messages.DeliveryReport:
    """Deliver a run's journal to its end, and return the report once the trainer asks for it."""
    delivery = Delivery(Path(request.folder), request.owner, inbox, send, request.claim)
    delivery.follow()
    while not inbox.ending:  # the run was taken over or deleted; wait until the trainer asks for the report
        inbox.wait(1)
    report = delivery.report()
    inbox.finish = None
    return report


def _unreachable() -> str:
    """Probe the store's server, without mlflow; return the error, or "" if the server answers."""
    try:
        check_reachable()
    except ConnectionError as error:
        return str(error)
    return ""


def _refused(reason: str) -> messages.Refused:
    return messages.Refused(f"tracking store {shown_uri(os.environ['MLFLOW_TRACKING_URI'])}: {reason}")


def _query(request: messages.FindRuns | messages.FetchArtifact, importing: threading.Thread) -> messages.WriterReply:
    if isinstance(request, messages.FindRuns) and (reason := _unreachable()):
        return _refused(reason)
    importing.join()
    try:
        return _find(request) if isinstance(request, messages.FindRuns) else _fetch(request)
    except Exception as error:  # report any error of the store in one line
        return messages.Refused(refusal(error))


def _find(request: messages.FindRuns) -> messages.FoundRuns:
    client = connect()
    if request.run_id is not None:
        runs = [run for run in [find_by_id(client, request.run_id)] if run]
    else:
        runs = [run for run in search(client, f"tags.run_key = '{request.run_key}'")
                if run.data.tags.get(FORKED_FROM) == request.fork]  # fmt: skip
    return messages.FoundRuns(tuple(map(stored_run, runs)))


def _fetch(request: messages.FetchArtifact) -> messages.FetchedArtifact | messages.Refused:
    path = download(connect(), request.run_id, request.file, Path(request.folder))
    if path is None:
        return messages.Refused(f"run {request.run_id} in {tracking_uri()} has no artifact {request.file}")
    return messages.FetchedArtifact(str(path))


def _open(
    request: messages.OpenRun, opening: Opening, inbox: Inbox, importing: threading.Thread
) -> messages.WriterReply:
    """Open the run; if the store is unreachable and the request allows it, begin the run offline."""
    unreachable = _unreachable()
    if unreachable and not request.offline:
        return _refused(unreachable)
    importing.join()
    run = request.run
    with contextlib.ExitStack() as turn:
        try:
            if run.resume:
                assert run.folder
                folder = RunFolder(Path(run.folder))
                turn.callback(wait_for_turn(folder).release)
                Cursor(folder, store_key()).save()  # reset a position beyond the journal's end before it grows
            if unreachable:
                raise ConnectionError(unreachable)
            return _open_with_retries(opening, inbox)
        except Exception as error:
            if not unreachable:
                _abandon(opening, one_line(error))
            if request.offline and classify(error) is not Answer.REFUSED:
                return opening.without_store(f"{one_line(error)}; the run begins without it")
            return messages.Refused(refusal(error))


def _open_with_retries(opening: Opening, inbox: Inbox) -> messages.OpenedRun:
    end, (pause, longest) = time.monotonic() + OPEN_SECONDS, PAUSE_SECONDS
    while True:
        try:
            return opening.open()
        except Exception as error:
            if (
                classify(error) not in (Answer.UNAVAILABLE, Answer.FAILED)
                or inbox.gone
                or time.monotonic() + pause > end
            ):
                raise
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _abandon(opening: Opening | None, failure: str) -> None:
    """Mark as FAILED a run that could not be opened, or whose trainer exited before beginning its journal."""
    if opening is None:
        return
    for is_last in (False, False, True):
        try:
            opening.give_up(failure)
            return
        except Exception as error:  # report any error of the store in one line
            if is_last:
                run = f"run {opening.run_id}" if opening.run_id else "the requested run"
                warn(f"{run} could not be ended: {one_line(error)}")
            time.sleep(ABANDON_SECONDS)


if __name__ == "__main__":
    main()
