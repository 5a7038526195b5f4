"""The tasks by the names of their entry points, as text references that import nothing."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent  # of the project, which has the configs


class TaskEntry(NamedTuple):
    about: str
    config: str  # module:class of its keys
    make: str  # module:name, what makes a Task from the config
    file: str  # the config where none is named


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
