"""A process that trains run after run for a sweep: torch, mlflow and the data are loaded once.

`Worker` starts it (`python -m pipeline.worker`) and asks it, a JSON line at a time; it answers each with a line. It
ends when its standard input does: in the middle of a run that run is ended as KILLED first.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.interrupts import interruptible, next_of
from pipeline.journal import Record

PATIENCE_SECONDS = 15  # how long a worker that is told to end may take


class Worker:
    """The sweep's side of it."""

    def __init__(self, number: int, log: Path) -> None:
        self.number, self.log = number, log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"},
            )

    def send(self, request: Record) -> None:
        """Hand over a request; the answers come with `answers`."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is gone: `answers` tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def answers(self, handle: Callable[[Record], None]) -> None:
        """Read answers until the process ends; its end is the answer {"ended": code}."""
        assert self.process.stdout
        try:
            for line in self.process.stdout:
                if line.endswith("\n"):  # else it died while it wrote
                    handle(json.loads(line))
        finally:
            handle({"ended": self.process.wait()})

    def close(self) -> None:
        """Tell it to end."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self, until: float) -> None:
        """Until it has ended; one that has not by then (of `time.monotonic`) is killed."""
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def without_trunk(request: Record) -> None:
    """Of a request to train: without the trunk, which could not be made."""
    request["trunk"] = None
    for tag in ("branched_from", "branch_step"):
        request["tags"].pop(tag, None)


class _Requests:
    """Standard input as a queue. Its end interrupts the work at hand."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Record | None] = queue.Queue()
        self.busy, self.closed, self.stop = False, False, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if "stop" in request:
                self.stop.set()  # the run at hand ends after its next evaluation
            else:
                self.queue.put(request)
        self.closed = True
        self.queue.put(None)
        if self.busy:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Serve requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep, which then closes our input
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to the log
    requests = _Requests()

    def answer(reply: Record) -> None:
        with contextlib.suppress(BrokenPipeError):  # the sweep is gone, and with it our input
            answers.write(json.dumps(reply) + "\n")
            answers.flush()

    from pipeline.run import Writer

    with interruptible(), Writer() as writer:
        work = Work(writer, answer, requests.stop)
        while (request := next_of(requests.queue)) is not None:
            requests.stop.clear()
            try:
                requests.busy = True
                if requests.closed:
                    break
                reply = work.do(request)
            except KeyboardInterrupt:
                break
            finally:
                requests.busy = False
            leaving = writer.process.poll() is not None  # nothing can be tracked any more: another worker is needed
            answer(reply | {"leaving": leaving})
            if leaving:
                break


class Work:
    """What a worker does, with the task of the last request at hand so that data is not loaded again."""

    def __init__(self, writer: Any, answer: Callable[[Record], None], stop: threading.Event) -> None:
        self.writer, self.answer, self.stop = writer, answer, stop
        self.task: Any = None

    def do(self, request: Record) -> Record:
        """Do what is asked; an error becomes the answer, with its traceback in the log where it is not the user's."""
        started = time.perf_counter()
        kind = request.pop("do")
        try:
            reply: Record = getattr(self, kind)(**request)
        except UserError as error:
            reply = {"error": str(error)}
        except Exception as error:  # one run's failure must not take the others along
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return reply | {"seconds": time.perf_counter() - started}

    def make_task(self, entry: str, config: Any) -> Any:
        """The task, sharing what the last one had loaded."""
        from pipeline.__main__ import ENTRIES, resolve

        shared = self.task.with_config(config) if self.task is not None else None
        self.task = shared or resolve(ENTRIES[entry].target)(config)
        return self.task

    def warm(self) -> Record:
        """Load what takes seconds, while another process loads the data."""
        import pipeline.launch  # noqa: F401

        return {}

    def digest(self, entry: str, config: str) -> Record:
        """The digest of the data that the config names."""
        return {"digest": self.make_task(entry, config_of(entry, config)).dataset.digest}

    def grow(self, entry: str, config: str, folders: Mapping[str, str]) -> Record:
        """Train a trunk; leave its states in the folders."""
        from pipeline.branching import grow
        from pipeline.launch import prepare_torch

        validated = config_of(entry, config)
        device = prepare_torch(validated)
        task = self.make_task(entry, validated)
        return {"steps": grow(task, {int(step): Path(folder) for step, folder in folders.items()}, device)}

    def train(
        self,
        *,
        entry: str,
        config: str,
        name: str,
        tags: Mapping[str, str],
        run_id: str | None,
        folder: str | None,
        trunk: str | None,
        given: list[str],
        watched: str | None = None,
    ) -> Record:
        """Train one run. `watched`: a validation metric that is told after every evaluation."""
        from pipeline.launch import train_run
        from pipeline.run import RunRequest

        stopped = False

        def watch(step: int, metrics: Mapping[str, float]) -> bool:
            nonlocal stopped
            if watched and watched in metrics:
                self.answer({"evaluated": step, "value": metrics[watched]})
            stopped = self.stop.is_set()
            return stopped

        trained = train_run(
            config_of(entry, config),
            lambda validated: self.make_task(entry, validated),
            self.writer,
            RunRequest(name=name, run_id=run_id, tags=tags, resume=run_id is not None, folder=folder),
            given=frozenset(given),
            trunk=Path(trunk) if trunk else None,
            watch=watch if watched else None,
            quiet=True,
        )
        return {"run_id": trained.id, "metrics": trained.metrics, "steps": trained.steps, "stopped": stopped}


def config_of(entry: str, text: str) -> Any:
    """The validated config of a request."""
    from pipeline.__main__ import ENTRIES, resolve
    from pipeline.config import validate

    return validate(resolve(ENTRIES[entry].config), yaml.safe_load(text), None)


if __name__ == "__main__":
    main()
