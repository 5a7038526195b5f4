"""The writer process: `pipeline.run` starts it, and asks it, a JSON line at a time, to open a run and to follow it."""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import IO

from pipeline.console import say
from pipeline.importing import uncollected
from pipeline.interrupts import SIGNALS
from pipeline.journal import Record
from pipeline.tracking.delivery import NO_WORD, Cursor, Delivery, wait_for_turn
from pipeline.tracking.inbox import Inbox
from pipeline.tracking.opening import connect, find, find_by_id, open_run, open_without_store, set_tags
from pipeline.tracking.store import (
    context_tags,
    is_temporary,
    one_line,
    probe,
    settle,
    shown_uri,
    store_key,
    tracking_uri,
)


def main() -> None:
    """Serve requests from standard input until it closes."""
    for number in SIGNALS:  # a scheduler sends them to every process of a job; the end of input ends this one
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever mlflow prints must not mix with the answers
    inbox = Inbox(sys.stdin)
    warming = threading.Thread(target=_warm, daemon=True)
    warming.start()
    opened = None  # a run that nobody follows yet
    while (request := inbox.next()) is not None:
        if "abandon" in request:
            _abandon(opened, request["abandon"])
            opened = None
            continue
        away = _absence() if "open" in request or "find" in request else ""
        if away and not request.get("offline"):
            _answer(answers, {"error": f"tracking store {shown_uri(os.environ['MLFLOW_TRACKING_URI'])}: {away}"})
            continue
        warming.join()  # two threads that import mlflow get half of it
        if "follow" in request:
            opened = None
            _follow(request["follow"], inbox, answers)
            continue
        reply = _reply(request, away)
        if "open" in request and reply.get("online"):
            opened = reply["run_id"]
        _answer(answers, reply)
    _abandon(opened, NO_WORD)
    sys.stderr.flush()
    os._exit(0)  # without what mlflow would do at its end: it could take long, and end a run of ours


def _warm() -> None:
    """Import what takes seconds, while the trainer imports torch and loads its data."""
    with uncollected():
        settle()
        context_tags()
    gc.freeze()  # what is there now stays: no search for garbage has to look at it again


def _follow(request: Record, inbox: Inbox, answers: IO[str]) -> None:
    """Deliver a run's journal to its end, and report when the trainer asks."""
    delivery = Delivery(Path(request["folder"]), request["owner"], inbox, lambda reply: _answer(answers, reply))
    report = delivery.follow()
    while not inbox.leaving:  # it has another owner: its trainer will see it, too
        inbox.wait(1)
    inbox.finish = None
    _answer(answers, report)


def _absence() -> str:
    """Why the store is away, empty where it is not: said within seconds, while mlflow is still being imported."""
    try:
        probe()
    except ConnectionError as error:
        return str(error)
    return ""


def _reply(request: Record, away: str) -> Record:
    try:
        if "open" in request:
            return _open(request, away)
        if "find" in request:
            return {"runs": find(**request["find"])}
        return _fetch(**request["fetch"])
    except Exception as error:  # whatever the store says becomes the user's one line
        return {"error": f"tracking store {tracking_uri()}: {one_line(error)}"}


def _open(request: Record, away: str) -> Record:
    asked = request["open"] | {"folder": request.get("folder") or request["open"]["folder"]}
    with contextlib.ExitStack() as turn:
        if asked["resume"]:
            turn.callback(wait_for_turn(Path(asked["folder"])).release)
            Cursor(Path(asked["folder"]), store_key()).save()  # before the journal grows: it may have lost its tail
        try:
            if away:
                raise ConnectionError(away)
            return open_run(asked, Path(request["output_dir"]), request.get("last_steps", {}))
        except Exception as error:
            if not request["offline"] or not is_temporary(error):
                raise
            return open_without_store(asked, one_line(error))


def _fetch(run_id: str, file: str, folder: str) -> Record:
    """Copy a run's artifact into the folder; the answer holds its path there, or an error."""
    client = connect()
    if file not in [found.path for found in client.list_artifacts(run_id)]:
        return {"error": f"run {run_id} in {tracking_uri()} has no artifact {file}"}
    return {"path": client.download_artifacts(run_id, file, folder)}


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


def _answer(stream: IO[str], reply: Record) -> None:
    with contextlib.suppress(BrokenPipeError):
        stream.write(json.dumps(reply) + "\n")
        stream.flush()


if __name__ == "__main__":
    main()
