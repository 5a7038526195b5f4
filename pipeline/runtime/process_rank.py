"""This process's rank among those that train together, from torchrun's environment variables."""

import os

_alone = False


def rank() -> int:
    """The rank of this process, from 0."""
    return _variable("RANK", 0) if "WORLD_SIZE" in os.environ else 0


def world_size() -> int:
    """The number of processes that train together."""
    return 1 if _alone else _variable("WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this process is the one that tracks and writes."""
    return rank() == 0


def go_alone() -> None:
    """Make this process the only one: the others have ended."""
    global _alone  # noqa: PLW0603 (as the process group is global)
    _alone = True


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    return int(text) if text.isdecimal() else default  # not torchrun's
