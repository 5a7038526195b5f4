"""Rank of this process and world size, from torchrun's environment variables."""

import os

_alone = False


def rank() -> int:
    """The rank of this process, from 0."""
    return _variable("RANK", 0) if "WORLD_SIZE" in os.environ else 0


def world_size() -> int:
    """The number of processes that train together."""
    return 1 if _alone else _variable("WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this is the main process, which alone tracks the run and writes files."""
    return rank() == 0


def go_alone() -> None:
    """Set the world size to 1 after the other processes have ended."""
    global _alone  # noqa: PLW0603 (as the process group is global)
    _alone = True


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    return int(text) if text.isdecimal() else default  # not set by torchrun
