"""Loops compiled by numba: kept on disk for the next process, and free of the interpreter's lock while they run.

A compiled function uses functions and constants of its own file alone: numba compiles it anew when that file changes,
and would not see a change elsewhere.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """The function in machine code; compiled by each process where no folder can be written to keep it."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the function's folder nor the user's can be written
        return njit(nogil=True, error_model="numpy")(function)
