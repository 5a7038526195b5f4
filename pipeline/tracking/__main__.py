"""The writer process: `pipeline.run` starts it, and asks it to open a run and to follow its journal."""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.console import say
from pipeline.importing import uncollected
from pipeline.interrupts import SIGNALS
from pipeline.runtime.processes import take_standard_output
from pipeline.tracking.client import connect, download, find_by_id, set_tags
from pipeline.tracking.delivery import NO_WORD, Cursor, Delivery, wait_for_turn
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import (
    AbandonRun,
    DeliveryReport,
    FetchArtifact,
    FetchedArtifact,
    FindRuns,
    FollowRun,
    FoundRuns,
    OpenedRun,
    OpenRun,
    Progress,
    Refused,
    WriterReply,
)
from pipeline.tracking.opening import find, open_run, open_without_store
from pipeline.tracking.store import (
    context_tags,
    is_temporary,
    one_line,
    probe,
    refusal,
    settle,
    shown_uri,
    store_key,
    tracking_uri,
)


def main() -> None:
    """Serve requests from standard input until it closes."""
    for number in SIGNALS:  # a scheduler sends them to every process of a job; the end of input ends this one
        signal.signal(number, signal.SIG_IGN)
    answer = take_standard_output()
    inbox = Inbox(sys.stdin)
    warming = threading.Thread(target=_warm, daemon=True)
    warming.start()
    opened = None  # a run that nobody follows yet
    while (request := inbox.next()) is not None:
        match request:
            case AbandonRun(failure):
                _abandon(opened, failure)
                opened = None
            case FollowRun():
                warming.join()  # two threads that import mlflow get half of it
                opened = None
                answer(_follow(request, inbox, answer))
            case OpenRun() | FindRuns() | FetchArtifact():
                reply = _reply(request, warming)
                if isinstance(reply, OpenedRun) and reply.online:
                    opened = reply.run_id
                answer(reply)
    _abandon(opened, NO_WORD)
    sys.stderr.flush()
    os._exit(0)  # without what mlflow would do at its end: it could take long, and end a run of ours


def _warm() -> None:
    """Import what takes seconds, while the trainer imports torch and loads its data."""
    with uncollected():
        settle()
        context_tags()
    gc.freeze()  # what is there now stays: no search for garbage has to look at it again


def _follow(request: FollowRun, inbox: Inbox, tell: Callable[[Progress], None]) -> DeliveryReport:
    """Deliver a run's journal to its end; returns the report once the trainer asks for it."""
    report = Delivery(Path(request.folder), request.owner, inbox, tell).follow()
    while not inbox.leaving:  # it has another owner: its trainer will see it, too
        inbox.wait(1)
    inbox.finish = None
    return report


def _absence() -> str:
    """Why the store is away, empty where it is not: said within seconds, while mlflow is still being imported."""
    try:
        probe()
    except ConnectionError as error:
        return str(error)
    return ""


def _reply(request: OpenRun | FindRuns | FetchArtifact, warming: threading.Thread) -> WriterReply:
    away = "" if isinstance(request, FetchArtifact) else _absence()
    if away and not (isinstance(request, OpenRun) and request.offline):
        return Refused(f"tracking store {shown_uri(os.environ['MLFLOW_TRACKING_URI'])}: {away}")
    warming.join()
    try:
        match request:
            case OpenRun():
                return _open(request, away)
            case FindRuns():
                return FoundRuns(find(request))
            case FetchArtifact(run_id, file, folder):
                return _fetch(run_id, file, folder)
    except Exception as error:  # whatever the store says becomes the user's one line
        return Refused(refusal(error))


def _open(request: OpenRun, away: str) -> OpenedRun:
    run = request.run
    with contextlib.ExitStack() as turn:
        if run.resume:
            assert run.folder
            turn.callback(wait_for_turn(Path(run.folder)).release)
            Cursor(Path(run.folder), store_key()).save()  # before the journal grows: it may have lost its tail
        try:
            if away:
                raise ConnectionError(away)
            return open_run(run, Path(request.output_dir), request.last_steps)
        except Exception as error:
            if not request.offline or not is_temporary(error):
                raise
            return open_without_store(run, one_line(error))


def _fetch(run_id: str, file: str, folder: str) -> FetchedArtifact | Refused:
    """Copy a run's artifact into the folder."""
    path = download(connect(), run_id, file, Path(folder))
    return FetchedArtifact(str(path)) if path else Refused(f"run {run_id} in {tracking_uri()} has no artifact {file}")


def _abandon(run_id: str | None, failure: str) -> None:
    """End a run whose trainer failed, or died, between opening the run and beginning its journal."""
    if run_id is None:
        return
    try:
        client = connect()
        if run := find_by_id(client, run_id):
            set_tags(client, run.info.run_id, {"failure": failure})
            client.set_terminated(run.info.run_id, "FAILED")
    except Exception as error:  # whatever the store says becomes one line
        say(f"warning: run {run_id} could not be ended: {one_line(error)}")


if __name__ == "__main__":
    main()
