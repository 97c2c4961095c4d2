"""Page masks: which of a block's pages, as the bits of one Python integer.

Drivers keep a bitmap per block (512 bits for 2 MiB of 4 KiB pages). A Python integer of that width
is the same bitmap: and, or, complement and population count act on all pages at once and cost tens
of nanoseconds, an order less than a numpy call on 512 booleans. Bit *i* is page *i* of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["bools", "first_page", "from_bools", "from_pages", "pages_of", "region", "run_count", "run_of"]


def region(first: int, count: int) -> int:
    """Return the mask of `count` pages from page `first`."""
    return ((1 << count) - 1) << first


def first_page(mask: int) -> int:
    """Return the lowest page of a mask, -1 when it is empty."""
    return (mask & -mask).bit_length() - 1


def run_count(mask: int) -> int:
    """Return how many contiguous runs a mask has."""
    return (mask & ~(mask << 1)).bit_count()


def run_of(mask: int) -> slice | None:
    """Return the pages of a mask that is one run, as a slice; None when it is several."""
    low = mask & -mask
    if mask + low & mask:
        return None
    return slice(low.bit_length() - 1, mask.bit_length())


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


def pages_of(mask: int) -> NDArray[np.int64]:
    """Return the page numbers of a mask, ascending."""
    return np.flatnonzero(bools(mask, mask.bit_length())).astype(np.int64)
