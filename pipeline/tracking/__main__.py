"""The writer process: `pipeline.run` starts it, and asks it, a JSON line at a time, to open a run and to finish it."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO

from pipeline.journal import Record
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.store import one_line, settle, tracking_uri


def main() -> None:
    """Serve requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever mlflow prints must not mix with the answers
    import mlflow.pyfunc  # noqa: F401 (takes seconds, while the trainer loads its data)

    for line in sys.stdin:
        request = json.loads(line)
        if "fetch" in request:
            _answer(answers, _fetch(**request["fetch"]))
            continue
        try:
            delivery = Delivery(request["open"], Path(request["output_dir"]))
        except Exception as error:  # whatever the store says becomes the user's one line
            _answer(answers, {"error": f"tracking store {tracking_uri()}: {one_line(error)}"})
            continue
        _answer(answers, {"run_id": delivery.run_id, "name": delivery.name, "tracking_uri": tracking_uri()})
        asked = delivery.follow(sys.stdin)
        if asked:
            _answer(answers, delivery.report())


def _fetch(run_id: str, file: str, folder: str) -> Record:
    """Copy a run's artifact into the folder; the answer holds its path there, or an error."""
    import mlflow

    settle()
    try:
        client = mlflow.MlflowClient()
        if file not in [found.path for found in client.list_artifacts(run_id)]:
            return {"error": f"run {run_id} in {tracking_uri()} has no artifact {file}"}
        return {"path": client.download_artifacts(run_id, file, folder)}
    except Exception as error:  # whatever the store says becomes the user's one line
        return {"error": f"tracking store {tracking_uri()}: {one_line(error)}"}


def _answer(stream: IO[str], reply: Record) -> None:
    with contextlib.suppress(BrokenPipeError):
        stream.write(json.dumps(reply) + "\n")
        stream.flush()


if __name__ == "__main__":
    main()
