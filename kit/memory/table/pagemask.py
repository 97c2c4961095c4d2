"""Page masks: which of a block's pages, as the bits of one Python integer.

Drivers keep a bitmap per block (512 bits for 2 MiB of 4 KiB pages). A Python integer of that width
is the same bitmap: and, or, complement and population count act on all pages at once and cost tens
of nanoseconds, an order less than a numpy call on 512 booleans. Bit *i* is page *i* of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import sub
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "bools", "cuts", "first_page", "from_bools", "from_pages", "lengths", "pages_of", "positions", "region",
    "run_count", "run_of", "runs", "selection",
]  # fmt: skip

FEW: Final = 6  # pages up to which a loop is faster than arrays


def region(first: int, count: int) -> int:
    """Return the mask of `count` pages from page `first`."""
    return ((1 << count) - 1) << first


def first_page(mask: int) -> int:
    """Return the lowest page of a mask, -1 when it is empty."""
    return (mask & -mask).bit_length() - 1


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


def run_count(mask: int) -> int:
    """Return how many contiguous runs a mask has."""
    return (mask & ~(mask << 1)).bit_count()


def run_of(mask: int) -> slice | None:
    """Return the pages of a mask that is one run, as a slice; None when it is several."""
    low = mask & -mask
    if mask + low & mask:
        return None
    return slice(low.bit_length() - 1, mask.bit_length())


def cuts(mask: int, apart: int) -> tuple[int, int]:
    """Return the runs of a mask, cut where they enter or leave the pages of `apart`: first pages, and ends.

    Both are masks; an end is one past the last page.
    """
    inside = mask & apart
    if not inside:
        return mask & ~(mask << 1), ~mask & mask << 1
    outside = mask ^ inside
    return inside & ~(inside << 1) | outside & ~(outside << 1), ~inside & inside << 1 | ~outside & outside << 1


def lengths(first: int, ends: int) -> list[int]:
    """Return the pages of each run, ascending, from first pages and ends (`cuts`)."""
    if first.bit_count() <= FEW:
        return list(map(sub, positions(ends), positions(first)))
    width = ends.bit_length() + 7 & ~7
    at = _set_bits(first | ends << width)
    count = len(at) // 2
    found: list[int] = (at[count:] - at[:count] - width).tolist()
    return found


def positions(mask: int) -> list[int]:
    """Return the page numbers of a mask, ascending."""
    found: list[int] = []
    if mask.bit_count() > FEW:
        found = _set_bits(mask).tolist()
        return found
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def _set_bits(mask: int) -> NDArray[np.int64]:
    raw = np.frombuffer(mask.to_bytes(mask.bit_length() + 7 >> 3, "little"), dtype=np.uint8)
    return np.unpackbits(raw, bitorder="little").nonzero()[0]


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
    run = run_of(mask)
    if run is None:
        picked = bools(mask, count)
        picked.flags.writeable = False  # everybody who asks again gets this one
        return picked
    return run


def pages_of(mask: int) -> NDArray[np.int64]:
    """Return the page numbers of a mask, ascending."""
    return np.flatnonzero(bools(mask, mask.bit_length())).astype(np.int64)
