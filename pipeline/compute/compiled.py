"""Compile loops with numba: cached on disk, and run without the global interpreter lock.

A compiled function must use only functions and constants of its own file: numba recompiles it if that file changes,
but does not notice changes in other files.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function; if no cache folder is writable, without a cache."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the function's folder nor the user's is writable
        return njit(nogil=True, error_model="numpy")(function)
