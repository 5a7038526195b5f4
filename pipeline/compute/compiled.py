"""Loops compiled by numba, cached on disk, running without the interpreter's lock.

A compiled function must use only functions and constants of its own file: numba recompiles it when that file changes,
and does not notice changes elsewhere.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function; without a cache if no cache folder is writable."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the function's folder nor the user's is writable
        return njit(nogil=True, error_model="numpy")(function)
