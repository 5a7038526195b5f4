"""Table of the tasks by the names of their entry points. Text references avoid importing the tasks here.

The tasks of other packages are those that they declare as entry points of the group `focal_pipeline.tasks`:

    [project.entry-points."focal_pipeline.tasks"]
    train_fraud = "focal_fraud:ENTRY"  # a TaskEntry
"""

import re
import traceback
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.run_config import RunConfig
from pipeline.errors import UserError
from pipeline.runtime.importing import import_reference

ROOT = Path(__file__).parent.parent.parent  # root folder of the project, which contains configs/
GROUP = "focal_pipeline.tasks"
PREFIX = "train_"  # of the names of entry points; the rest is the task's name
NAME = re.compile(rf"{PREFIX}[a-z][a-z0-9_]*")


class TaskEntry(NamedTuple):
    about: str
    config: str  # module:class of the config
    make: str  # module:name of a class or function that creates the task from the config
    file: str  # default config file, absolute or relative to the root folder of the project


SHIPPED = {
    "train_mmoe": TaskEntry(
        "MMoE click and conversion training with an auxiliary focal loss on CTCVR.",
        "pipeline.tasks.mmoe.config:MmoeConfig", "pipeline.tasks.mmoe.task:MmoeTask", "configs/mtl_mmoe.yaml",
    ),
    "train_visobert": TaskEntry(
        "Multi-label aspect sentiment training with a global-alpha focal loss.",
        "pipeline.tasks.visobert.config:VisobertConfig", "pipeline.tasks.visobert.task:make_task",
        "configs/config_multi.yaml",
    ),
}  # fmt: skip


def task_names() -> list[str]:
    """The shipped tasks and those of other packages, of which nothing is imported."""
    return list(dict.fromkeys([*SHIPPED, *sorted(_declared())]))


def task_entry(name: str) -> TaskEntry:
    """Look up a task; the entry of another package is imported.

    Raises:
        KeyError: there is no such task.
        UserError: the name is not allowed or declared twice, or the entry cannot be imported.
    """
    declared = _declared().get(name, ())
    if name not in SHIPPED and not declared:
        raise KeyError(name)
    owners = ["focal-pipeline"] * (name in SHIPPED) + [_owner(point) for point in declared]
    if len(owners) > 1:
        raise UserError(f"{name}: found in {' and in '.join(owners)}, allowed: one package with this name")
    if not NAME.fullmatch(name):
        raise UserError(f"{name}: found in {owners[0]}, allowed: {PREFIX}<task>, where <task> begins with a letter "
                        "and has a-z, 0-9 and _")  # fmt: skip
    if name in SHIPPED:
        return SHIPPED[name]
    entry = _imported(name, declared[0].value)
    if not isinstance(entry, TaskEntry):
        raise UserError(f"{name}: found {declared[0].value} of type {type(entry).__name__}, allowed: a TaskEntry")
    return entry


def config_class(name: str) -> type[RunConfig]:
    """The config class of an entry point.

    Raises:
        UserError: it cannot be imported, or its `task` is not the one that the entry point's name says.
    """
    reference = task_entry(name).config
    config = _imported(name, reference)
    if not (isinstance(config, type) and issubclass(config, RunConfig)):
        raise UserError(f"{name}: found config {reference}, allowed: a subclass of RunConfig")
    task = name.removeprefix(PREFIX)
    if config.task != task:
        raise UserError(f"{name}: found task {config.task!r} in {reference}, allowed: {task!r}")
    return config


def task_factory(name: str) -> Callable[[Any], Any]:
    """The class or function that creates the task of an entry point from its config.

    Raises:
        UserError: it cannot be imported.
    """
    factory: Callable[[Any], Any] = _imported(name, task_entry(name).make)
    return factory


def declarations(task: str) -> type[RunConfig]:
    """The config class of a run's task, for what it declares; `RunConfig` if the task cannot be used here."""
    try:
        return config_class(f"{PREFIX}{task}")
    except (KeyError, UserError):
        return RunConfig


@cache
def _declared() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of other packages by name, which are several if packages use the same name."""
    declared: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=GROUP):
        declared[point.name] = (*declared.get(point.name, ()), point)
    return declared


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _imported(name: str, reference: str) -> Any:
    """Import what an entry point refers to. Any error becomes one line, since the code may be another package's."""
    try:
        return import_reference(reference)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        raise UserError(f"{name}: {reference} cannot be imported: {reason}") from error
