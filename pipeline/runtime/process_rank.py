"""Which of the processes that train together this one is, as torchrun says in the environment."""

import os

_over = False


def number() -> int:
    """The rank of this process, from 0."""
    return _given("RANK", 0) if "WORLD_SIZE" in os.environ else 0


def size() -> int:
    """How many processes train together; 1 = this one is alone, or alone again."""
    return 1 if _over else _given("WORLD_SIZE", 1)


def _given(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    return int(text) if text.isdecimal() else default  # not torchrun's


def leads() -> bool:
    """This process is the one that tracks and writes."""
    return number() == 0


def go_alone() -> None:
    """The others have gone: from now on this process is the only one."""
    global _over  # noqa: PLW0603 (as the group is the process')
    _over = True
