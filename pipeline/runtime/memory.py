"""How the process keeps its memory."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST = 32 << 20  # what it takes for M_MMAP_THRESHOLD at most


def keep_freed_memory() -> None:
    """Have the C library keep what a training step frees for the next one.

    Given back to the system, thousands of pages a step would be mapped and cleared anew: a tenth of its time. Another
    C library than glibc stays as it is.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
