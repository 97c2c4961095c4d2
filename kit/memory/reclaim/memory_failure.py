"""Poisoned memory: taking a broken page out of use (mm/memory-failure.c @ 7.0, as MADV_HWPOISON injects it)."""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING

import numpy as np

from kit.errors import Errno
from kit.memory.faults.gup import get_user_pages
from kit.memory.huge.huge_split import split_folio
from kit.memory.reclaim.unmap_pages import try_to_unmap
from kit.memory.types import PAGE, PG
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["madvise_inject_error", "memory_failure"]


@waiting_step
def madvise_inject_error(mm: Mm, thread: Thread, first: int, count: int) -> Wait:
    """Poison the pages behind virtual pages [first, first + count); returns 0 or -errno."""
    for page in range(first, first + count):
        got = yield from get_user_pages(mm, thread, page * PAGE, 1)
        if isinstance(got, Errno):
            return got
        result = yield from memory_failure(mm.memory, thread, int(got[0]))
        if result < 0:
            return result
    return 0


@waiting_step
def memory_failure(memory: PhysicalMemory, thread: Thread, pfn: int) -> Wait:
    """Replace every mapping of a page by a poison entry; the page, with the caller's reference, is never used again.

    Returns
    -------
    int
        0, or -EBUSY for a huge folio that cannot be split, or a device's page.
    """
    if memory.pgmap[pfn]:
        memory.put(pfn)
        return Errno(EBUSY, "memory_failure", f"pfn {pfn:#x} is device memory")
    yield from memory.lock(thread, pfn)
    head = int(memory.head(np.array([pfn]))[0])
    if memory.order[head]:
        failed = yield from split_folio(memory, thread, head)
        if failed:
            yield from thread.sync()
            memory.unlock(head)
            memory.put(head)
            return Errno(EBUSY, "memory_failure", f"the huge folio of pfn {pfn:#x} cannot be split")
        if pfn != head:  # lock and reference are the head's
            memory.get(pfn)
            memory.trylock(np.array([pfn]))
            yield from thread.sync()
            memory.unlock(head)
            memory.put(head)
    memory.flags[pfn] |= PG.HWPOISON
    yield from try_to_unmap(memory, thread, np.array([pfn]), hwpoison=True)
    root = memory.mappings[int(memory.mapping[pfn])]
    if root is not None and not memory.flags[pfn] & PG.ANON:
        root.evict(np.array([pfn]))
        memory.put(pfn)
    on = memory.lru_isolate(np.array([pfn]))
    if on[0]:
        memory.put(pfn)
    yield from thread.sync()
    memory.unlock(pfn)
    return 0
