"""Page masks: which of a block's pages, as the bits of one Python integer.

Drivers keep a bitmap per block (512 bits for 2 MiB of 4 KiB pages). A Python integer of that width
is the same bitmap: and, or, complement and population count act on all pages at once and cost tens
of nanoseconds, an order less than a numpy call on 512 booleans. Bit *i* is page *i* of the block.
Where the driver is compiled, `kit.native.pagemask` stands in its place: the same over eight words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EMPTY", "PageMask", "bit", "bools", "cut_counts", "cut_runs", "first_page", "from_bools", "from_pages", "holds",
    "pages_of", "region", "region_weight", "run_count", "run_of", "runs", "units", "whole_units",
]  # fmt: skip

PageMask: TypeAlias = int  # at most 512 pages; ``~mask`` is for what ``&`` follows
EMPTY: Final[PageMask] = 0
UNIT: Final = 16  # pages
FEW: Final = 6  # pages up to which a loop is faster than arrays
# The first bit, the last bit, and all but the last one of every unit.
_FIRST: Final = sum(1 << page for page in range(0, 512, UNIT))
_LAST: Final = _FIRST << UNIT - 1
_OTHERS: Final = _LAST - _FIRST


def bit(page: int) -> PageMask:
    """Return the mask of one page."""
    return 1 << page


def region(first: int, count: int) -> PageMask:
    """Return the mask of `count` pages from page `first`."""
    return ((1 << count) - 1) << first


def holds(mask: PageMask, page: int) -> bool:
    """Whether a page is in a mask."""
    return mask >> page & 1 != 0


def first_page(mask: PageMask) -> int:
    """Return the lowest page of a mask, -1 when it is empty."""
    return (mask & -mask).bit_length() - 1


def region_weight(mask: PageMask, first: int, count: int) -> int:
    """Return how many of `count` pages from page `first` are in a mask."""
    return (mask >> first & ((1 << count) - 1)).bit_count()


def units(mask: PageMask) -> PageMask:
    """Return the pages of all aligned units of 16 that hold a page of a mask."""
    # In each unit the sum carries into the last bit when any bit below it is set.
    found = ((mask & _OTHERS) + _OTHERS | mask) & _LAST
    return (found << 1) - (found >> UNIT - 1)


def whole_units(mask: PageMask) -> PageMask:
    """Return the pages of the aligned units of 16 that are in a mask as a whole."""
    found = mask & mask >> 1  # followed by one more page of the mask, then by three, seven, fifteen
    found &= found >> 2
    found &= found >> 4
    found &= found >> 8
    found &= _FIRST
    return (found << UNIT) - found


def run_count(mask: PageMask) -> int:
    """Return how many contiguous runs a mask has."""
    return (mask & ~(mask << 1)).bit_count()


def run_of(mask: PageMask) -> slice | None:
    """Return the pages of a mask that is one run, as a slice; None when it is several."""
    low = mask & -mask
    if mask + low & mask:
        return None
    return slice(low.bit_length() - 1, mask.bit_length())


@lru_cache(maxsize=1 << 12)
def runs(mask: PageMask) -> tuple[tuple[int, int], ...]:
    """Return (first page, pages) of each contiguous run, ascending."""
    found = []
    while mask:
        low = mask & -mask
        rest = mask + low  # the carry clears the lowest run and sets the bit past it
        first = low.bit_length() - 1
        found.append((first, (mask ^ rest).bit_length() - 1 - first))
        mask &= rest
    return tuple(found)


def cut_runs(mask: PageMask, apart: PageMask) -> list[tuple[int, int]]:
    """Return (first page, pages) of each run, ascending, cut where it enters or leaves the pages of `apart`."""
    starts, ends = (_positions(bits) for bits in _cuts(mask, apart))
    return [(first, end - first) for first, end in zip(starts, ends, strict=True)]


def cut_counts(mask: PageMask, apart: PageMask) -> list[int]:
    """Return the number of pages of each run of `cut_runs`."""
    return [count for _, count in cut_runs(mask, apart)]


def from_pages(pages: Sequence[int] | NDArray[np.integer]) -> PageMask:
    """Return the mask of the given page numbers (duplicates allowed), shape (n,)."""
    if len(pages) < 8:
        mask = EMPTY
        for page in pages:
            mask |= bit(int(page))
        return mask
    at = np.asarray(pages)
    marks = np.zeros(int(at.max()) + 1, dtype=bool)
    marks[at] = True
    return from_bools(marks)


def from_bools(marks: NDArray[np.bool_]) -> PageMask:
    """Return the mask of marked pages, shape (n,)."""
    return int.from_bytes(np.packbits(marks, bitorder="little").tobytes(), "little")


def bools(mask: PageMask, count: int) -> NDArray[np.bool_]:
    """Return a mask as booleans, shape (count,)."""
    raw = np.frombuffer(mask.to_bytes((count + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").view(np.bool_)


def pages_of(mask: PageMask) -> NDArray[np.int64]:
    """Return the page numbers of a mask, ascending."""
    return np.flatnonzero(bools(mask, mask.bit_length())).astype(np.int64)


def _cuts(mask: PageMask, apart: PageMask) -> tuple[int, int]:
    """Return the first pages of the cut runs and the pages after their last ones, as masks."""
    inside = mask & apart
    if not inside:
        return mask & ~(mask << 1), ~mask & mask << 1
    outside = mask ^ inside
    return inside & ~(inside << 1) | outside & ~(outside << 1), ~inside & inside << 1 | ~outside & outside << 1


def _positions(mask: PageMask) -> list[int]:
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
