"""Taking pages for an address space, with direct reclaim when memory is out (mm/page_alloc.c @ 7.0)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.reclaim.reclaim import try_to_free_pages

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["alloc_folios", "alloc_huge_folio", "alloc_pages_exact", "free_pages_exact", "portions"]

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


def alloc_pages_exact(memory: PhysicalMemory, n: int) -> int | None:
    """Take `n` single pages in a row for a driver, refcount 1 each, content undefined; return the first.

    None when no `n` free pages are in one piece; nothing is reclaimed for them.
    """
    first = memory.pool.take_run(n)
    if first is not None:  # what was freed left no other state behind
        memory.refcount[first : first + n] = 1
        if first + n > len(memory.payload):
            memory.ensure(first + n)
    return first


def free_pages_exact(memory: PhysicalMemory, first: int, n: int) -> None:
    """Drop a driver's references on `n` pages in a row; pages that somebody else holds stay until he lets go."""
    pages = slice(first, first + n)
    if (memory.refcount[pages] != 1).any() or memory.flags[pages].any():
        memory.put(np.arange(first, first + n))
        return
    memory.refcount[pages] = 0
    memory.pool.give_run(first, n)
