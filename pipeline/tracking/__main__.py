"""The writer process: `pipeline.tracking.mlflow_run` starts it, and asks it to open a run and to follow its journal."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.runtime.console import say
from pipeline.runtime.importing import uncollected
from pipeline.runtime.interrupts import SIGNALS
from pipeline.runtime.processes import take_standard_output
from pipeline.tracking.client import connect, download
from pipeline.tracking.delivery import NO_WORD, PAUSE_SECONDS, Cursor, Delivery, wait_for_turn
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.messages import (
    AbandonRun,
    DeliveryNews,
    DeliveryReport,
    FetchArtifact,
    FetchedArtifact,
    FindRuns,
    FollowRun,
    FoundRuns,
    OpenedRun,
    OpenRun,
    Refused,
    WriterReply,
)
from pipeline.tracking.opening import Opening, find
from pipeline.tracking.store import (
    Answer,
    answer_of,
    context_tags,
    one_line,
    probe,
    refusal,
    settle,
    shown_uri,
    store_key,
    tracking_uri,
)

OPEN_SECONDS = 30.0  # that a store may take to open a run, once it has answered at all
ABANDON_SECONDS = 1.0  # between two tries to end a run that could not be opened


def main() -> None:
    """Serve requests from standard input until it closes."""
    for number in SIGNALS:  # a scheduler sends them to every process of a job; the end of input ends this one
        signal.signal(number, signal.SIG_IGN)
    answer = take_standard_output()
    inbox = Inbox(sys.stdin)
    warming = threading.Thread(target=_warm, daemon=True)
    warming.start()
    opening: Opening | None = None  # of a run that nobody follows yet
    while (request := inbox.next()) is not None:
        match request:
            case AbandonRun(failure):
                _abandon(opening, failure)
                opening = None
            case FollowRun():
                warming.join()  # two threads that import mlflow get half of it
                opening = None
                answer(_follow(request, inbox, answer))
            case OpenRun():
                opening = Opening(request.run, Path(request.output_dir), request.last_steps)
                answer(_open(request, opening, inbox, warming))
            case FindRuns() | FetchArtifact():
                answer(_reply(request, warming))
    _abandon(opening, NO_WORD)
    sys.stderr.flush()
    os._exit(0)  # without what mlflow would do at its end: it could take long, and end a run of ours


def _warm() -> None:
    """Import what takes seconds, while the trainer imports torch and loads its data."""
    with uncollected():
        settle()
        context_tags()
    gc.freeze()  # what is there now stays: no search for garbage has to look at it again


def _follow(request: FollowRun, inbox: Inbox, tell: Callable[[DeliveryNews], None]) -> DeliveryReport:
    """Deliver a run's journal to its end; returns the report once the trainer asks for it."""
    delivery = Delivery(Path(request.folder), request.owner, inbox, tell, request.claim)
    delivery.follow()
    while not inbox.leaving:  # the run has another owner, as its trainer will see, or was deleted
        inbox.wait(1)
    report = delivery.report()
    inbox.finish = None
    return report


def _absence() -> str:
    """Why the store is away, empty where it is not: said within seconds, while mlflow is still being imported."""
    try:
        probe()
    except ConnectionError as error:
        return str(error)
    return ""


def _refused(reason: str) -> Refused:
    return Refused(f"tracking store {shown_uri(os.environ['MLFLOW_TRACKING_URI'])}: {reason}")


def _reply(request: FindRuns | FetchArtifact, warming: threading.Thread) -> WriterReply:
    if isinstance(request, FindRuns) and (away := _absence()):
        return _refused(away)
    warming.join()
    try:
        match request:
            case FindRuns():
                return FoundRuns(find(request))
            case FetchArtifact(run_id, file, folder):
                return _fetch(run_id, file, folder)
    except Exception as error:  # whatever the store says becomes the user's one line
        return Refused(refusal(error))


def _open(request: OpenRun, opening: Opening, inbox: Inbox, warming: threading.Thread) -> WriterReply:
    """Open the run. A store that answers, but not as it should, is asked again for a while."""
    away = _absence()
    if away and not request.offline:
        return _refused(away)
    warming.join()
    run = request.run
    with contextlib.ExitStack() as turn:
        try:
            if run.resume:
                assert run.folder
                turn.callback(wait_for_turn(Path(run.folder)).release)
                Cursor(Path(run.folder), store_key()).save()  # before the journal grows: it may have lost its tail
            if away:
                raise ConnectionError(away)
            return _opened(opening, inbox)
        except Exception as error:
            if not away:
                _abandon(opening, one_line(error))
            if request.offline and answer_of(error) is not Answer.REFUSED:
                return opening.without_store(f"{one_line(error)}; the run begins without it")
            return Refused(refusal(error))


def _opened(opening: Opening, inbox: Inbox) -> OpenedRun:
    end, (pause, longest) = time.monotonic() + OPEN_SECONDS, PAUSE_SECONDS
    while True:
        try:
            return opening.open()
        except Exception as error:
            if answer_of(error) not in (Answer.AWAY, Answer.FAILED) or inbox.gone or time.monotonic() + pause > end:
                raise
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _fetch(run_id: str, file: str, folder: str) -> FetchedArtifact | Refused:
    """Copy a run's artifact into the folder."""
    path = download(connect(), run_id, file, Path(folder))
    return FetchedArtifact(str(path)) if path else Refused(f"run {run_id} in {tracking_uri()} has no artifact {file}")


def _abandon(opening: Opening | None, failure: str) -> None:
    """End a run that could not be opened, or whose trainer ended before its journal was begun."""
    for last in (False, False, True):
        try:
            if opening:
                opening.give_up(failure)
            return
        except Exception as error:  # whatever the store says becomes one line
            if last:
                which = (opening and opening.run_id) or "that was asked for"
                say(f"warning: run {which} could not be ended: {one_line(error)}")
            time.sleep(ABANDON_SECONDS)


if __name__ == "__main__":
    main()
