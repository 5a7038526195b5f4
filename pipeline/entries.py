"""The entry points: what each is about, its config, and what it runs, as text references that import nothing."""

from typing import NamedTuple

from pipeline.tasks.registry import TASKS


class Entry(NamedTuple):
    about: str
    config: str  # module:class of its keys
    target: str  # module:name, what makes a Task from the config, or a function of (config, given)
    file: str | None = None  # the config where none is named
    trains: bool = False
    passes_on: bool = False  # options that are not its own are the task's: the target gets (config, file, options)


ENTRIES = {
    "main": Entry(
        "The whole story on the embedded data: a baseline, the focal arm, and both side by side.",
        TASKS["train_mmoe"].config, "pipeline.demo:main", "configs/mtl_mmoe.yaml",
    ),
    "data_prep": Entry(
        "Reviews to their sentiment distribution and alpha, with copies and lengths.",
        "pipeline.tasks.visobert.config:DataPrepConfig", "pipeline.tasks.visobert.prepare.data_prep:data_prep",
        "configs/data_prep.yaml",
    ),
    "prepare_ctr": Entry(
        "Raw impressions (CSV or Parquet, with a schema) to a folder that train_mmoe reads.",
        "pipeline.tasks.mmoe.config:PrepareCtrConfig", "pipeline.tasks.mmoe.prepare.prepare_ctr:prepare_ctr",
        "configs/prepare_ctr.yaml",
    ),
    **{name: Entry(*task, trains=True) for name, task in TASKS.items()},
    "sweep": Entry(
        "A baseline and arms, each with every seed, to a verdict. Keys of the task go to every run.",
        "pipeline.sweeps.sweep_config:SweepConfig", "pipeline.sweeps.sweep:sweep", "configs/sweeps/aux_focal.yaml",
        passes_on=True,
    ),
    "compare": Entry(
        "Arms against the baseline: differences over seeds, a verdict in words, and a page that opens offline.",
        "pipeline.comparison.compare_config:CompareConfig", "pipeline.comparison.verdicts:compare_runs",
        "configs/compare.yaml",
    ),
}  # fmt: skip
