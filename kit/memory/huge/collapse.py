"""Collapsing 512 small pages into a huge folio (mm/khugepaged.c @ 7.0, as MADV_COLLAPSE asks for it)."""

from __future__ import annotations

from errno import EAGAIN, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.faults.huge_page import install_huge
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.reclaim.rmap import remove_rmap
from kit.memory.types import HPAGE_PMD_NR, PAGE, PG, Bit, Kind, Leaf
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["madvise_collapse"]


@waiting_step
def madvise_collapse(vma: Vma, thread: Thread, first: int, count: int) -> Wait:
    """Collapse every whole 2 MiB of pages [first, first + count); the caller holds the mmap lock for reading.

    Returns
    -------
    int
        0; -EINVAL: no anonymous area, or nothing in a span to collapse; -ENOMEM: no huge folio; -EAGAIN: held pages.
    """
    if not vma.is_anonymous:
        return Errno(EINVAL, "madvise_collapse", f"{vma} is not anonymous")
    result = 0
    for number in range(-(-first // HPAGE_PMD_NR), (first + count) // HPAGE_PMD_NR):
        row = vma.mm.table.row_of(number)
        if row >= 0 and vma.mm.table.leaf_level[row] == Leaf.PMD:
            continue
        result = (yield from collapse_huge_page(vma, thread, number)) or result
    return result


@waiting_step
def collapse_huge_page(vma: Vma, thread: Thread, number: int) -> Wait:
    """Copy the pages of one leaf table into a huge folio and map it instead; 0, -EINVAL, -ENOMEM or -EAGAIN."""
    from kit.memory.faults.fault import handle_mm_faults

    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    pages = np.arange(number * HPAGE_PMD_NR, (number + 1) * HPAGE_PMD_NR)
    thread.note(va=number * HPAGE_PMD_NR * PAGE, pages=HPAGE_PMD_NR)
    slots = table.slots_of(pages)
    swapped = table.kind[slots] == Kind.SWAP
    if swapped.any():
        yield from handle_mm_faults(vma, thread, pages[swapped], 0)
    head = memory.alloc_huge()
    if head is None:
        return Errno(ENOMEM, "collapse_huge_page", "no 2 MiB of memory in one piece")
    told = yield from invalidate_start(mm, thread, int(pages[0]), HPAGE_PMD_NR, EVENTS.CLEAR)
    slots = table.slots_of(pages)
    result = _isolate(vma, slots)
    if result == 0:
        _copy(vma, thread, slots, head)
        row = table.row_of(number)
        table.clear(slice(row * HPAGE_PMD_NR, (row + 1) * HPAGE_PMD_NR))
        table.free_tables(np.array([number]))
        install_huge(vma, thread, number, head, "")
    else:
        memory.put(head)
    yield from invalidate_end(told, thread)
    return result


def _isolate(vma: Vma, slots: NDArray[np.int64]) -> int:
    """__collapse_huge_page_isolate: only unshared, unlocked single pages that nobody holds, zero pages and holes."""
    table, memory = vma.mm.table, vma.mm.memory
    kind, bits = table.kind[slots], table.bits[slots]
    if not ((kind == Kind.PRESENT) | (kind == Kind.NONE)).all() or not (kind == Kind.PRESENT).any():
        return Errno(EINVAL, "collapse_huge_page", "an entry is neither present nor none, or all are none")
    frames = table.frame[slots][(kind == Kind.PRESENT) & ((bits & Bit.SPECIAL) == 0)].astype(np.int64)
    if memory.order[frames].any() or (memory.flags[frames] & PG.LOCKED).any():
        return Errno(EAGAIN, "collapse_huge_page", "a page is locked, or part of a large folio")
    if (memory.refcount[frames] != memory.expected_refs(frames)).any() or (memory.mapcount[frames] != 1).any():
        return Errno(EAGAIN, "collapse_huge_page", "a page is shared or held by somebody else")
    return 0


def _copy(vma: Vma, thread: Thread, slots: NDArray[np.int64], head: int) -> None:
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    kind, bits, frame = table.kind[slots].copy(), table.bits[slots].copy(), table.frame[slots].astype(np.int64)
    mapped = (kind == Kind.PRESENT) & ((bits & Bit.SPECIAL) == 0)
    block = np.arange(head, head + HPAGE_PMD_NR)
    memory.zero(block[~mapped])
    memory.copy(frame[mapped], block[mapped])
    table.clear(slots)
    mm.rss["anon"] -= int(mapped.sum())
    remove_rmap(memory, frame[mapped])
    thread.charge(mm.costs.huge_copy + mm.costs.pte_write * HPAGE_PMD_NR + mm.costs.tlb_flush)
