"""Starts of the pipeline that die where a test says, quickly: forked from a process that has loaded all of it."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
# the last of them is what an optimizer imports
CONTEXT.set_forkserver_preload(["pipeline.runs.launch", "pipeline.tasks.mmoe.task",
                                "pipeline.tasks.visobert.prepare.data_prep", "pipeline.tasks.visobert.task",
                                "pipeline.tasks.mmoe.predict", "pandas",
                                "torch._dynamo"])  # fmt: skip
WHO = ("trainer", "group", "all")


@dataclass(frozen=True)
class Kill:
    """SIGKILL at a call of a method of the training while so many optimizer steps are completed.

    where: `<class>.<method>`, killed before (`<`) or after (`>`) it. who: the trainer alone, its process group, or the
    writer process too.
    """

    step: int
    where: str = "<Training._step"
    who: str = "trainer"

    def __str__(self) -> str:
        return f"{self.where} at step {self.step}, {self.who}"


def start(arguments: Sequence[str], folder: Path, kill: Kill | None = None, **environment: str) -> tuple[int, str]:
    """`python -m pipeline ...` in the folder; its exit code (negative: a signal) and what it said on standard error."""
    log = folder / "stderr.txt"
    environment = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")} | environment
    process = CONTEXT.Process(target=_run, args=(list(arguments), str(folder), kill, dict(environment), str(log)))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{kill}: did not end in 300 s: {log.read_text()}")
    code = process.exitcode
    assert code is not None
    return code, log.read_text(encoding="utf-8")


def _run(arguments: list[str], folder: str, kill: Kill | None, environment: dict[str, str], log: str) -> None:
    os.setsid()
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]  # of the test that was first
    os.environ.update(environment)
    for descriptor, file in ((1, f"{log}.out"), (2, log)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    if kill:
        _arm(kill)
    from pipeline.__main__ import main

    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _arm(kill: Kill) -> None:
    from pipeline.storage import checkpoints as checkpoint
    from pipeline.training import loop as training
    from pipeline.training import saver as saving

    holder, _, method = kill.where[1:].rpartition(".")
    modules: dict[str, Any] = {"Training": training.Training, "BestWeights": training.BestWeights,
                               "Saver": saving.Saver, "Checkpoints": checkpoint.Checkpoints}  # fmt: skip
    target = modules[holder]
    original: Callable[..., Any] = getattr(target, method)
    trainings: list[training.Training] = []
    begin = training.Training.__init__

    def begun(self: training.Training, *values: Any, **named: Any) -> None:
        begin(self, *values, **named)
        trainings.append(self)

    def deadly(*values: Any, **named: Any) -> Any:
        now = bool(trainings) and trainings[-1].result.steps == kill.step
        if now and kill.where[0] == "<":
            _die(trainings[-1], kill.who)
        found = original(*values, **named)
        if now and kill.where[0] == ">":
            _die(trainings[-1], kill.who)
        return found

    training.Training.__init__ = begun  # type: ignore[method-assign]
    setattr(target, method, deadly)


def _die(training: Any, who: str) -> None:
    if who == "all":
        os.kill(training.run.writer.process.pid, signal.SIGKILL)
    if who == "group":
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
