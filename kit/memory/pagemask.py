"""Page masks: which of a block's pages, as the bits of one Python integer.

Drivers keep a bitmap per block (512 bits for 2 MiB of 4 KiB pages). A Python integer of that width
is the same bitmap: and, or, complement and population count act on all pages at once and cost tens
of nanoseconds, an order less than a numpy call on 512 booleans. Bit *i* is page *i* of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["bools", "first_page", "from_bools", "from_pages", "pages_of", "region", "runs", "selection"]


def region(first: int, count: int) -> int:
    """Return the mask of `count` pages from page `first`."""
    return ((1 << count) - 1) << first


def first_page(mask: int) -> int:
    """Return the lowest page of a mask, -1 when it is empty."""
    return (mask & -mask).bit_length() - 1


@lru_cache(maxsize=1 << 12)
def runs(mask: int) -> tuple[tuple[int, int], ...]:
    """Return (first page, pages) of each contiguous run, ascending."""
    found, at = [], 0
    while mask:
        gap = (mask & -mask).bit_length() - 1
        mask >>= gap
        at += gap
        length = (~mask & (mask + 1)).bit_length() - 1
        found.append((at, length))
        mask >>= length
        at += length
    return tuple(found)


def from_pages(pages: Sequence[int] | NDArray[np.integer]) -> int:
    """Return the mask of the given page numbers (duplicates allowed), shape (n,)."""
    if len(pages) < 8:
        mask = 0
        for page in pages:
            mask |= 1 << int(page)
        return mask
    at = np.asarray(pages)
    marks = np.zeros(int(at.max()) + 1, dtype=bool)
    marks[at] = True
    return from_bools(marks)


def from_bools(marks: NDArray[np.bool_]) -> int:
    """Return the mask of marked pages, shape (n,)."""
    return int.from_bytes(np.packbits(marks, bitorder="little").tobytes(), "little")


def bools(mask: int, count: int) -> NDArray[np.bool_]:
    """Return a mask as booleans, shape (count,)."""
    raw = np.frombuffer(mask.to_bytes((count + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").view(np.bool_)


@lru_cache(maxsize=1 << 12)
def selection(mask: int, count: int) -> slice | NDArray[np.bool_]:
    """Return what picks the pages of a mask out of an array of `count` pages: a slice when they are one run."""
    low = mask & -mask
    if mask + low & mask:
        picked = bools(mask, count)
        picked.flags.writeable = False  # everybody who asks again gets this one
        return picked
    first = low.bit_length() - 1
    return slice(first, first + mask.bit_count())


def pages_of(mask: int) -> NDArray[np.int64]:
    """Return the page numbers of a mask, ascending."""
    return np.flatnonzero(bools(mask, mask.bit_length())).astype(np.int64)
