"""Processes that search together, with a stand-in for the training, forked from one that has imported all of it.

All of `pipeline.search` is real, and so are processes, study, locks and the ownership of runs. A training is three
evaluations of a formula. Each event is a line of `log.jsonl`.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pipeline.search
import pipeline.study
import pipeline.summary
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.ownership import Ownership
from pipeline.summary import KnownRuns
from pipeline.sweep import Job, Sweep
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_plan import Plan, resolve
from pipeline.tasks.mmoe.config import MmoeConfig
from pipeline.tracking.reading import StoredRun
from pipeline.worker import config_of

DIGEST = "d" * 64
STEPS = (4, 8, 12)


def log(**event: Any) -> None:
    line = json.dumps({"pid": os.getpid(), "time": time.monotonic()} | event) + "\n"
    file = os.open("log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())  # whole: shorter than what is written at once
    os.close(file)


def value_of(config: Any, step: int) -> float:
    """Best at lambda 0.3, and the better the longer."""
    return 0.7 - abs(config.loss.aux_focal.lambda_ - 0.3) + step / 1000


def runs(_: str) -> KnownRuns:
    """The runs that were begun."""
    found = {}
    for folder in Path("runs").iterdir() if Path("runs").exists() else ():
        status = "FINISHED" if (folder / "finished").exists() else "RUNNING"
        found[folder.name] = StoredRun(folder.name, "", status, 0, "", {}, {}, {"run_dir": str(folder.resolve())})
    done = StoredRun("summary", "", "FINISHED", 0, "", {}, {}, {}) if Path("compared").exists() else None
    return KnownRuns(found, done)


class Crew:
    """Trains one job after the other, in this process."""

    def __init__(self, seconds: float, die: str | None) -> None:
        self.seconds, self.die, self.stopped = seconds, die, False

    def work(self, jobs: list[Job], told: Callable[[Job, Any], None]) -> None:
        while job := next((job for job in jobs if job.reply is None), None):
            job.reply = self._train(job, told)
            job.finished(job)

    def _train(self, job: Job, told: Callable[[Job, Any], None]) -> dict[str, Any]:
        config = config_of(job.request["entry"], job.request["config"])
        key = config.fingerprint(DIGEST)
        if config.loss.aux_focal.gamma == 1.5:
            return {"error": "loss_ctr is nan at step 3"}
        owner = Ownership(Path("runs") / key)
        number = int(job.request["tags"]["trial"])
        finished = owner.folder / "finished"
        log(event="begin", key=key, trial=number, resumed=job.request["run_id"])
        for step in STEPS:
            time.sleep(0 if finished.exists() else self.seconds)
            told(job, {"evaluated": step, "value": value_of(config, step)})
            if step == 8 and self.die == "training":
                log(event="killed", key=key, trial=number)
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 8 and self.die == "interrupted":
                log(event="interrupted", key=key, trial=number)
                os.kill(os.getpid(), signal.SIGINT)
            if self.die == "poison" and _is_poison(key):
                log(event="killed", key=key, trial=number)
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 8 and self.die == "stopped":
                self.die = None
                log(event="stopped", key=key, trial=number)
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.stopped:
                break
        if not finished.exists():
            log(event="trained", key=key, trial=number)
            finished.touch()
        owner.release()
        stopped, self.stopped = self.stopped, False
        return {"run_id": key, "metrics": {}, "steps": step, "stopped": stopped, "seconds": 0.0}

    def stop(self, job: Job) -> None:  # noqa: ARG002
        self.stopped = True

    def close(self) -> None:
        """Nothing is open."""


def _is_poison(key: str) -> bool:
    """The first run that is begun is."""
    with suppress(FileExistsError), open("poison", "x") as file:
        file.write(key)
    return Path("poison").read_text() == key


class Searching(Sweep):
    """A sweep whose comparison is a line in the log."""

    def _compare(self, writer: Any, runs: KnownRuns, found: Plan | None = None) -> None:  # noqa: ARG002
        assert found
        log(event="compare", arms=[arm.name for arm in found.arms])
        time.sleep(0.5)
        Path("compared").touch()


def search(file: str, seconds: float, die: str | None) -> None:
    sweep = load(SweepConfig, Path(file))
    plan = resolve(sweep, Path(file), MmoeConfig, [Path()])
    searching = Searching(plan)
    searching.folder.mkdir(parents=True, exist_ok=True)
    searching.crew, searching.digest, searching.id = Crew(seconds, die), DIGEST, plan.identity(DIGEST)
    _die_at(die)
    if die == "poison":
        pipeline.study.RETRIES = pipeline.search.RETRIES = 1  # each takes the grace
    searching._search_with_others(None, runs(""))


def _die_at(where: str | None) -> None:
    """SIGKILL where nothing but the study tells of it: within asking, and after failing the trials of the dead."""
    places = {"asked": ("ServerStorage", "keep"), "failed": (None, "try_again")}
    if where in places:
        owner, name = places[where]
        holder = getattr(pipeline.study, owner) if owner else pipeline.search
        real, calls = getattr(holder, name), iter(range(1000))

        def dying(*arguments: Any) -> Any:
            if where == "asked" and next(calls) == 2:
                log(event="killed")
                os.kill(os.getpid(), signal.SIGKILL)
            if where == "failed" and any(trial.state.name == "FAIL" for trial in arguments[0].get_trials()):
                log(event="killed")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(holder, name, dying)


def _ended(run_id: str, status: str) -> None:
    log(event="ended", key=run_id, status=status)


def together(asked: dict[str, Any]) -> None:
    """One process for each of `die`, in the folder; their exit codes go to `codes.json` once all have ended."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    os.chdir(asked["folder"])
    with open("stderr.txt", "ab") as errors:
        os.dup2(errors.fileno(), 2)
    started = []
    for die in asked["die"]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                search(asked["file"], asked["seconds"], die)
                code = 0
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                code = error.exit_code
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
    Path("codes.part").write_text(json.dumps(codes))
    Path("codes.part").rename("codes.json")


def main() -> None:
    """A line of JSON on standard input is a group of processes that is started; its id is a line of the answer."""
    for module in (pipeline.search, pipeline.summary):
        module.known_runs = runs  # type: ignore[attr-defined]
    pipeline.search.set_tags = lambda run_id, tags: None  # type: ignore[assignment]  # noqa: ARG005
    pipeline.search.end_run = _ended  # type: ignore[assignment]
    for line in sys.stdin:
        if (group := os.fork()) == 0:
            together(json.loads(line))
            os._exit(0)
        print(group, flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break


if __name__ == "__main__":
    main()
