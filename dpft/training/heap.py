"""While a run trains, the memory that one micro-batch frees waits for the next.

A backward pass frees activations from the top of the heap downwards, and glibc gives the top back to the system once
more than a threshold is free there: every micro-batch then asks for it again, page by page, each zeroed. How often
depends on what was allocated before, and no number computed does.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
LARGEST = 1 << 24  # bytes; blocks from here on go back: kept, they took 50 MB more for an encoder
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory while entered, and give all of it back before and afterwards.

    Nothing happens under another C library than glibc, or if the environment tells it what to keep (:data:`CHOSEN`).
    Afterwards glibc's thresholds are fixed, at what it comes to by itself where tensors are large.
    """
    functions = None if any(name in os.environ for name in CHOSEN) else _glibc()
    if functions is None:
        yield
        return
    mallopt, malloc_trim = functions
    malloc_trim(0)  # what loading a model left would be kept as well
    mallopt(M_MMAP_THRESHOLD, LARGEST)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        malloc_trim(0)


def _glibc() -> tuple[Callable[[int, int], int], Callable[[int], int]] | None:
    try:
        library = ctypes.CDLL(None)
        return library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):  # another library, or another system
        return None
