"""Table of the entry points. Configs and functions are text references, so that this module imports none of them."""

from typing import NamedTuple

from pipeline.tasks.registry import SHIPPED, task_entry, task_names


class Entry(NamedTuple):
    about: str
    config: str  # module:class
    target: str  # module:name; called with the config if `trains`, to create the task, else with (config, given)
    file: str | None = None  # default config file
    trains: bool = False
    passes_on: bool = False  # accept unknown options (keys of the task); target is called with (config, file, options)


OWN = {
    "main": Entry(
        "The demo on embedded data: a baseline and the focal arm side by side, and a review model.",
        SHIPPED["train_mmoe"].config, "pipeline.demo:main", "configs/mtl_mmoe.yaml",
    ),
    "data_prep": Entry(
        "Sentiment distribution, alpha, duplicates and lengths of reviews.",
        "pipeline.tasks.visobert.config:DataPrepConfig", "pipeline.tasks.visobert.prepare.data_prep:data_prep",
        "configs/data_prep.yaml",
    ),
    "prepare_ctr": Entry(
        "Convert raw impressions (with a schema) to a folder that train_mmoe reads.",
        "pipeline.tasks.mmoe.config:PrepareCtrConfig", "pipeline.tasks.mmoe.prepare.prepare_ctr:prepare_ctr",
        "configs/prepare_ctr.yaml",
    ),
    "sweep": Entry(
        "Train a baseline and arms with several seeds and compare them. Keys of the task apply to every run.",
        "pipeline.sweeps.sweep_config:SweepConfig", "pipeline.sweeps.sweep:sweep", "configs/sweeps/aux_focal.yaml",
        passes_on=True,
    ),
    "compare": Entry(
        "Compare arms with the baseline: differences over seeds, a verdict, and an HTML page.",
        "pipeline.comparison.compare_config:CompareConfig", "pipeline.comparison.verdicts:compare_runs",
        "configs/compare.yaml",
    ),
}  # fmt: skip


def entry_names() -> list[str]:
    """The project's own entry points and those that train a task."""
    return [*OWN, *task_names()]


def find_entry(name: str) -> Entry:
    """Look up an entry point. Raises what `task_entry` does."""
    return OWN[name] if name in OWN else Entry(*task_entry(name), trains=True)
