"""Zeroed arrays of which only what is written takes memory and time.

`numpy.zeros` gives that too, until the C library hands out again what a program has freed: then it clears all of it.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["zeros"]

MAPPED = 1 << 20  # bytes from which on an array is a mapping of its own
HUGE = 1 << 22  # bytes from which on in huge pages, as numpy does
LARGE = 1 << 30  # bytes from which on memory is asked for without reserving it
MAP_NORESERVE = 0x4000  # Linux's, which module mmap lacks before Python 3.12


def zeros(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return `count` zeros.

    A simulated machine may have more memory than the one that simulates it: what is never written must not even be
    promised.

    Raises
    ------
    MemoryError
        The machine has no room for them.
    """
    size = count * np.dtype(dtype).itemsize
    if size < MAPPED or sys.platform != "linux":
        return np.zeros(count, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if size >= LARGE else 0)
    try:
        pages = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError):  # as many mappings as a process may have, or more memory than there is
        return np.zeros(count, dtype)
    if size >= HUGE:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype)
