"""From a validated config to a finished, tracked run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import plots
from pipeline.blocks import RunConfig
from pipeline.branching import branch
from pipeline.config import flatten, to_yaml
from pipeline.console import Console, say, warn
from pipeline.errors import UserError
from pipeline.run import MemoryRun, MlflowRun, Run, RunRequest, Writer, writer_for
from pipeline.task import Task
from pipeline.training import Result, Training, Watch, amp_warning, count_steps, resolve_device

TORCH_THREADS = torch.get_num_threads()  # what torch would take: the cores, or OMP_NUM_THREADS

TaskFactory = Callable[[Any], Task]


def launch(config: RunConfig, make_task: TaskFactory, given: frozenset[str]) -> Result:
    """Train one run, in the MLflow run that `mlflow run` opened if there is one."""
    with writer_for(config.tracking) as writer:
        asked = RunRequest(run_id=os.environ.get("MLFLOW_RUN_ID"))
        run, result = train_run(config, make_task, writer, asked, given=given)
    say(f"\n{run.name}\n{headline(result.metrics)}")
    if isinstance(run, MlflowRun):
        say(f"run {run.id} in {run.tracking_uri}\nnext: make ui opens MLflow on it")
    return result


def train_run(
    config: RunConfig,
    make_task: TaskFactory,
    writer: Writer | None,
    asked: RunRequest | None = None,
    *,
    given: frozenset[str] = frozenset(),
    trunk: Path | None = None,
    watch: Watch | None = None,
    quiet: bool = False,
) -> tuple[Run, Result]:
    """Load the data, open the run, train, and leave everything in it. Without a writer nothing is tracked.

    asked: what the run is opened with, beside what config and data say of it. given: dotted keys that the user
    overrode. trunk: a folder of `branching.grow`, where this run starts. watch: see `Training`. quiet: no line a step.
    """
    device = prepare_torch(config)
    task = make_task(config)
    digest = task.dataset.digest
    known_by = {"task": config.task, "seed": str(config.seed), "data_digest": digest,
                "run_key": config.fingerprint(digest)}  # fmt: skip
    asked = asked or RunRequest()
    request = replace(asked, name=asked.name or config.name(), experiment=config.experiment,
                      tags=known_by | dict(asked.tags))  # fmt: skip
    run: Run = MlflowRun(writer, request, Path(config.output_dir)) if writer else MemoryRun(request.name)
    finished = False
    try:
        _describe(run, task, given)
        _tell_epochs(config, given)
        total_steps = count_steps(task)
        slow = amp_warning(config.training.amp, device)
        for warning in [*config.warnings(given), *task.warnings(total_steps), *([slow] if slow else [])]:
            warn(warning)
        say(f"{run.name}: {total_steps} steps on {device}")
        for name, value in task.summary().items():
            say(f"  {name} {value}")
        training = Training(task, run, Console(total_steps, quiet), device, watch)
        if trunk:
            branch(training, trunk)
        result = training.train()
        _leave(run, task, result.model, result.metrics, device)
        finished = True
        run.finish("FINISHED")
    except BaseException as error:
        if not finished:
            _abandon(run, error)
        raise
    return run, result


def prepare_torch(config: RunConfig) -> str:
    """Threads and device as the config says; returns the device."""
    torch.set_num_threads(config.training.threads or max(1, TORCH_THREADS - 1))
    return resolve_device(config.device)


def _abandon(run: Run, error: BaseException) -> None:
    """End a run that an error cut off; what cannot be delivered is told, but does not hide the error."""
    run.set_tags({"failure": str(error) or type(error).__name__})
    try:
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    except UserError as undelivered:
        warn(str(undelivered))


def headline(metrics: Mapping[str, float]) -> str:
    """The test metrics in a few words; validation where there is no test split."""
    split = "test" if any(name.startswith("test/") for name in metrics) else "valid"
    shown = {name: value for name, value in metrics.items() if name.startswith(f"{split}/") and name.count("/") == 1}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if "auc" in name or "f1" in name)


def _describe(run: Run, task: Task, given: frozenset[str]) -> None:
    """Params, tags, input and config of a run: what it is before it starts."""
    config, dataset = task.config, task.dataset
    flat = flatten(config)
    short = {name: flat[path] for name, path in config.short.items()}
    run.log_params(flat | short | dict(task.summary()))
    run.set_tags({"overrides": ", ".join(sorted(given))})
    run.log_input(dataset.name, dataset.digest, dataset.source, dataset.profile)
    file = run.folder / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    run.log_artifact(file)
    folder = run.folder / "description"
    folder.mkdir(parents=True, exist_ok=True)
    known = task.describe(folder)
    if known:
        run.log_metrics(0, known)
    _log_files(run, folder)
    run.flush()


def _log_files(run: Run, folder: Path) -> None:
    """Every file below the folder as an artifact, where it lies in it."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        where = file.parent.relative_to(folder).as_posix()
        run.log_artifact(file, "" if where == "." else where)


def _tell_epochs(config: RunConfig, given: frozenset[str]) -> None:
    epochs = config.training.num_train_epochs
    if "training.num_train_epochs" in given:
        warn(f"Using epochs from command line: {epochs} (overrides config)")
    else:
        say(f"Using epochs from config: {epochs}")


def _leave(run: Run, task: Task, model: nn.Module, metrics: Mapping[str, float], device: str) -> None:
    """Report, note and model of a trained run."""
    folder = run.folder / "report"
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    if task.config.tracking.log_report:
        plots.losses(run.history(), folder / "plots" / "losses.png")
    task.report(model, folder, device)
    _log_files(run, folder)
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items() if name.startswith("test/"))
    run.set_tags({"mlflow.note.content": f"| test, at the best weights | |\n|---|---|\n{rows}"})
    if task.config.tracking.log_model:
        export = asdict(task.export(model, run.folder / "model"))
        run.log_model(export | {"folder": str(export["folder"].resolve())})
