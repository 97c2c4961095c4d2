"""Taking pages for an address space, with direct reclaim when memory is out (mm/page_alloc.c @ 7.0)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.reclaim import try_to_free_pages

if TYPE_CHECKING:
    from kit.memory.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["alloc_folios", "alloc_huge_folio", "portions"]

_PORTION = 512  # pages taken at a time when memory is nearly out


def alloc_folios(mm: Mm, thread: Thread, n: int) -> Wait:
    """Return `n` single pages (ndarray of int32), reclaiming when there are too few; None: out of memory."""
    memory = mm.memory
    pfns = memory.alloc_pages(n)
    while pfns is None:
        freed = yield from try_to_free_pages(mm, thread, n - memory.free_pages)
        if not freed:
            return None
        pfns = memory.alloc_pages(n)
    thread.charge(mm.costs.page_alloc * n)
    return pfns


def alloc_huge_folio(mm: Mm, thread: Thread) -> int | None:
    """Return an order-9 folio's head; None when no 2 MiB are in one piece (no reclaim: there is the small fallback)."""
    head = mm.memory.alloc_huge()
    mm.memory.count("thp_fault_alloc" if head is not None else "thp_fault_fallback")
    if head is not None:
        thread.charge(mm.costs.huge_alloc)
    return head


def portions(mm: Mm, pages: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield pages whole when memory for all of them is free, else in portions that reclaim can make room for."""
    if len(pages) <= mm.memory.free_pages:
        yield pages
        return
    size = max(1, min(_PORTION, mm.memory.system_frames // 8))
    for at in range(0, len(pages), size):
        yield pages[at : at + size]
