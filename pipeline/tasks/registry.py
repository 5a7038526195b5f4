"""Table of the tasks by the names of their entry points. Text references avoid importing the tasks here."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent  # root folder of the project, which contains configs/


class TaskEntry(NamedTuple):
    about: str
    config: str  # module:class of the config
    make: str  # module:name of a class or function that creates the task from the config
    file: str  # default config file


TASKS = {
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
