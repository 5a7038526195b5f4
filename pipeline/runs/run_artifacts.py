"""Log params and config before training, and reports and the model after it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.strict_config import to_yaml
from pipeline.names import NOTE_LENGTH
from pipeline.runtime.console import optional
from pipeline.tasks.base import Task, evaluating, predictor_module
from pipeline.tracking import plots
from pipeline.tracking.run import Run
from pipeline.training.loop import Result, Training

CONFIG_FILE = "config.yaml"


def log_description(run: Run, task: Task[Any], overrides: frozenset[str]) -> None:
    """Log params, tags, the input dataset, the config, and the task's description of its data."""
    config, dataset = task.config, task.dataset
    flat = config.decisive()
    short = {name: flat[path] for name, path in config.short.items() if path in flat}
    run.log_params(flat | short | dict(task.summary()))
    if overrides:
        run.set_tags({"overrides": ", ".join(sorted(overrides))})
    run.log_input(dataset.name, dataset.digest, dataset.source, dataset.profile)
    file = run.folder / CONFIG_FILE
    file.write_text(to_yaml(config), encoding="utf-8", newline="\n")
    run.log_artifact(file)
    folder = run.folder / "description"
    folder.mkdir(parents=True, exist_ok=True)
    if metrics := task.describe(folder):
        run.log_metrics(0, metrics)
    log_files(run, folder)
    run.flush()


def log_results(run: Run, task: Task[Any], training: Training, device: str) -> None:
    """Log plots, the task's report, a note and the model of a finished training.

    Only the model is required; an error in another part only causes a warning.
    """
    folder, model = run.folder / "report", training.result.model
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    if task.config.tracking.log_report:
        with optional("plots/losses.png"):
            plots.losses(run.history(), folder / "plots" / "losses.png")
    with optional("the report on the finished model"), evaluating(model):
        task.report(model, folder, device)
    log_files(run, folder)
    with optional("the run's note"):
        if text := note(training.result, training.best_weights.step, run.history()):
            run.set_tags({"mlflow.note.content": text})
    if task.config.tracking.log_model:
        export = asdict(task.export(model, run.folder / "model"))
        facts = {"task": task.config.task, "predictor": predictor_module(task)}
        run.log_model(export | facts | {"folder": str(export["folder"].resolve())})


def log_files(run: Run, folder: Path) -> None:
    """Log every file below the folder as an artifact with the same relative path."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        where = file.parent.relative_to(folder).as_posix()
        run.log_artifact(file, "" if where == "." else where)


def note(result: Result, best_step: int | None, history: Iterable[tuple[int, Mapping[str, float]]]) -> str:
    """A Markdown table of the test metrics, or without a test split of the validation metrics; "" if there are none."""
    split, weights = "test", "last" if best_step is None else "best"
    scores = {name: value for name, value in result.metrics.items() if name.startswith("test/")}
    if not scores:
        split, at = "validation", result.steps if best_step is None else best_step
        scores = {name: value for step, values in history if step == at
                  for name, value in values.items() if name.startswith("valid/")}  # fmt: skip
    text = f"| {split}, at the {weights} weights | |\n|---|---|\n"
    for name, value in scores.items():
        line = f"| {name} | {value:.4f} |\n"
        if len(text) + len(line) > NOTE_LENGTH:  # a truncated line would break the table
            break
        text += line
    return text.rstrip("\n") if scores else ""


def headline(metrics: Mapping[str, float], names: Sequence[str] = ()) -> str:
    """Metrics of the test split on one line; of the validation split if there is no test split.

    names: the metrics without their split. By default all AUCs and F1 scores, or all metrics if there are none.
    """
    split = "test" if any(name.startswith("test/") for name in metrics) else "valid"
    shown = {name: value for name, value in metrics.items() if name.startswith(f"{split}/") and name.count("/") == 1}
    chosen = [f"{split}/{name}" for name in names if f"{split}/{name}" in metrics]
    chosen = chosen or [name for name in shown if "auc" in name or "f1" in name] or list(shown)
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in chosen)
