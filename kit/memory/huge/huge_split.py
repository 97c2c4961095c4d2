"""Splitting huge mappings and huge folios (mm/huge_memory.c @ 7.0)."""

from __future__ import annotations

from errno import EAGAIN, EBUSY
from typing import TYPE_CHECKING

import numpy as np

from kit.errors import Errno
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.reclaim.rmap import rmap_walk
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PAGE, PG, VM_HUGETLB, Bit, Kind, Leaf
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["__split_huge_pmd", "split_edges", "split_folio", "split_huge_pmd_locked"]


@waiting_step
def __split_huge_pmd(mm: Mm, thread: Thread, number: int) -> Wait:
    """Turn the PMD leaf of table `number` into 512 PTEs; the folio stays whole (__split_huge_pmd)."""
    thread.note(va=number * HPAGE_PMD_NR * PAGE, pages=HPAGE_PMD_NR)
    told = yield from invalidate_start(mm, thread, number * HPAGE_PMD_NR, HPAGE_PMD_NR, EVENTS.CLEAR)
    split_huge_pmd_locked(mm, thread, number)
    yield from invalidate_end(told, thread)


def split_huge_pmd_locked(mm: Mm, thread: Thread, number: int) -> None:
    """Do the work of `__split_huge_pmd`, if the entry is still huge, when the range is already invalidated."""
    table, memory = mm.table, mm.memory
    row = table.row_of(number)
    if row < 0 or table.leaf_level[row] != Leaf.PMD:
        return
    slots = slice(row * HPAGE_PMD_NR, (row + 1) * HPAGE_PMD_NR)
    head, kind = int(table.frame[slots.start]), int(table.kind[slots.start])
    table.split_leaf(row)
    thread.charge(mm.costs.pte_write * HPAGE_PMD_NR + mm.costs.tlb_flush)
    if kind == Kind.PRESENT and head == memory.huge_zero:
        rights = int(table.bits[slots.start]) & Bit.PROTNONE  # those of the area, as vm_page_prot has them
        table.set_entries(slots, Kind.PRESENT, Bit.SPECIAL | Bit.YOUNG | rights, ZERO_PFN)
        return
    if kind in (Kind.PRESENT, Kind.DEVICE_PRIVATE):
        if kind == Kind.PRESENT and int(table.bits[slots.start]) & Bit.DIRTY:
            memory.flags[head] |= PG.DIRTY
        memory.mapcount[head] += HPAGE_PMD_NR - 1
        memory.refcount[head] += HPAGE_PMD_NR - 1


def split_edges(mm: Mm, thread: Thread, first: int, count: int) -> Wait:
    """Split PMD leaves that a change of pages [first, first + count) covers only in part; not for hugetlb areas."""
    for page in (first, first + count):
        if page % HPAGE_PMD_NR:
            number = page // HPAGE_PMD_NR
            row = mm.table.row_of(number)
            vma = mm.find(page)
            if row >= 0 and mm.table.leaf_level[row] == Leaf.PMD and not (vma and vma.flags & VM_HUGETLB):
                yield from __split_huge_pmd(mm, thread, number)


@waiting_step
def split_folio(memory: PhysicalMemory, thread: Thread, head: int) -> Wait:
    """Split an order-9 folio into 512 pages; the caller holds its lock and one reference.

    Returns 0; -EBUSY when it is no order-9 folio; -EAGAIN when somebody else holds a reference, such as a pin.
    Afterwards the caller's lock and reference are the head's.
    """
    if memory.order[head] != HPAGE_PMD_ORDER or memory.flags[head] & (PG.HUGETLB | PG.RESERVED):
        return Errno(EBUSY, "split_folio", f"pfn {head:#x} is not a transparent huge folio")
    thread.note(pages=HPAGE_PMD_NR)
    block = np.arange(head, head + HPAGE_PMD_NR)
    if int(memory.refcount[head]) != int(memory.expected_refs(np.array([head]))[0]) + 1:
        return Errno(EAGAIN, "split_folio", f"pfn {head:#x} is held by somebody else")
    yield from try_to_migrate(memory, thread, block)
    if int(memory.refcount[head]) != int(memory.expected_refs(np.array([head]))[0]) + 1:
        thread.note(status="-EAGAIN")
        return Errno(EAGAIN, "split_folio", f"pfn {head:#x} is held by somebody else")
    counts = np.zeros(HPAGE_PMD_NR, dtype=np.int32)
    for _vma, _pages, _slots, which in rmap_walk(memory, block):
        np.add.at(counts, which, 1)
    memory.split(head, counts)
    memory.count("thp_split_page")
    tails = block[1:]
    memory.flags[tails] &= ~np.uint16(PG.LOCKED)
    memory.put(tails)
    return 0


@waiting_step
def try_to_migrate(memory: PhysicalMemory, thread: Thread, block: NDArray[np.int64]) -> Wait:
    """Make every mapping of a huge folio small (mm/rmap.c with TTU_SPLIT_HUGE_PMD), for which everybody is told.

    The kernel leaves migration entries while it splits; here the entries stay, since the folio's lock keeps others off.
    """
    for vma, pages, _slots, _which in rmap_walk(memory, block):
        mm = vma.mm
        told = yield from invalidate_start(mm, thread, int(pages[0]), int(pages[-1] - pages[0]) + 1, EVENTS.CLEAR)
        for number in sorted({int(pages[0]) // HPAGE_PMD_NR, int(pages[-1]) // HPAGE_PMD_NR}):
            row = mm.table.row_of(number)
            slot = row * HPAGE_PMD_NR
            if row >= 0 and mm.table.leaf_level[row] == Leaf.PMD and mm.table.frame[slot] == block[0]:
                split_huge_pmd_locked(mm, thread, number)
        thread.charge(mm.costs.split_folio + mm.costs.tlb_flush)
        yield from invalidate_end(told, thread)
