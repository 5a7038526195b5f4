"""Settings of the C library's memory allocator."""

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a training step frees for the next step; other C libraries are unaffected.

    Otherwise thousands of pages are mapped and cleared again at every step, which takes a tenth of its time.
    """
    if sys.platform == "win32":  # has no library with this name
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
