"""Page masks taken apart: their contiguous runs, and what picks their pages out of an array.

Where the driver is compiled, `kit.native.mask_runs` stands in its place: the same functions over 32-bit words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.memory.table.pagemask import bools, pages_of, run_of

__all__ = ["cut_runs", "runs", "selection"]

FEW: Final = 6  # pages up to which a loop is faster than arrays


@lru_cache(maxsize=1 << 12)
def runs(mask: int) -> tuple[tuple[int, int], ...]:
    """Return (first page, pages) of each contiguous run, ascending."""
    found = []
    while mask:
        low = mask & -mask
        rest = mask + low  # the carry clears the lowest run and sets the bit past it
        first = low.bit_length() - 1
        found.append((first, (mask ^ rest).bit_length() - 1 - first))
        mask &= rest
    return tuple(found)


def cut_runs(mask: int, apart: int) -> list[tuple[int, int]]:
    """Return (first page, pages) of each run, ascending, cut where it enters or leaves the pages of `apart`."""
    starts, ends = (_positions(bits) for bits in _cuts(mask, apart))
    return [(first, end - first) for first, end in zip(starts, ends, strict=True)]


@lru_cache(maxsize=1 << 12)
def selection(mask: int, count: int) -> slice | NDArray[np.bool_]:
    """Return what picks the pages of a mask out of an array of `count` pages: a slice when they are one run."""
    run = run_of(mask)
    if run is None:
        picked = bools(mask, count)
        picked.flags.writeable = False  # everybody who asks again gets this one
        return picked
    return run


def _cuts(mask: int, apart: int) -> tuple[int, int]:
    """Return the first pages of the cut runs and the pages after their last ones, as masks."""
    inside = mask & apart
    if not inside:
        return mask & ~(mask << 1), ~mask & mask << 1
    outside = mask ^ inside
    return inside & ~(inside << 1) | outside & ~(outside << 1), ~inside & inside << 1 | ~outside & outside << 1


def _positions(mask: int) -> list[int]:
    """Return the page numbers of a mask, ascending."""
    found: list[int] = []
    if mask.bit_count() > FEW:
        found = pages_of(mask).tolist()
        return found
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
