"""Taking entries out of the page table (mm/memory.c: unmap_vmas, zap_page_range_single @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.huge.huge_split import split_edges
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.reclaim.rmap import MAPPED
from kit.memory.types import PAGE, PG, VM_HUGETLB, Bit, Kind
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["free_pgtables", "free_swap_and_cache", "unmap_vmas", "zap_page_range_single", "zap_slots"]


@waiting_step
def unmap_vmas(mm: Mm, thread: Thread, vmas: list[Vma], first: int, count: int) -> Wait:
    """Zap the parts of areas in pages [first, first + count) under one UNMAP notification."""
    thread.note(va=first * PAGE, pages=count)
    told = yield from invalidate_start(mm, thread, first, count, EVENTS.UNMAP)
    for vma in vmas:
        low, high = max(vma.first, first), min(vma.end, first + count)
        yield from _unmap_page_range(mm, thread, vma, low, high - low)
    yield from invalidate_end(told, thread)


@waiting_step
def zap_page_range_single(vma: Vma, thread: Thread, first: int, count: int) -> Wait:
    """Zap a part of one area under a CLEAR notification (MADV_DONTNEED, truncation)."""
    thread.note(va=first * PAGE, pages=count)
    told = yield from invalidate_start(vma.mm, thread, first, count, EVENTS.CLEAR)
    yield from _unmap_page_range(vma.mm, thread, vma, first, count)
    yield from invalidate_end(told, thread)


def _unmap_page_range(mm: Mm, thread: Thread, vma: Vma, first: int, count: int) -> Wait:
    if not vma.flags & VM_HUGETLB:
        yield from split_edges(mm, thread, first, count)
    numbers, _rows = mm.table.leaves(first, count)
    thread.charge(mm.costs.walk_table * len(numbers))
    slots = mm.table.occupied(first, count)
    if len(slots):
        zap_slots(mm, thread, slots)
        thread.charge(mm.costs.tlb_flush)


def zap_slots(mm: Mm, thread: Thread, slots: NDArray[np.int64]) -> None:
    """Clear entries and drop what they hold: references, rmap, swap counts, resident set counters."""
    table, memory, start = mm.table, mm.memory, thread.now
    kind, frame, bits = table.kind[slots].copy(), table.frame[slots].copy(), table.bits[slots].copy()
    pages, lead = table.pages_at(slots), table.leads(slots)
    huge = slots[(table.leaf_level[slots >> 9] > 0)] >> 9
    table.clear(slots)
    thread.charge(mm.costs.pte_write * int(lead.sum()))

    struct = ((kind == Kind.PRESENT) & ((bits & Bit.SPECIAL) == 0)) | np.isin(kind, MAPPED[1:])
    counted = struct | (kind == Kind.MIGRATION)
    _uncount(mm, frame[counted])
    mapped = frame[struct]
    places = memory.pgmap[mapped]
    for at in set(places.tolist()):
        mm.moved(thread, start, pages[struct][places == at], mm.place_of(int(mapped[places == at][0])), 0, "unmap")
    dirty = frame[(kind == Kind.PRESENT) & struct & ((bits & Bit.DIRTY) != 0)]
    memory.flags[memory.head(dirty)] |= PG.DIRTY
    leading = frame[struct & lead]
    np.subtract.at(memory.mapcount, memory.head(leading), 1)
    thread.charge(mm.costs.page_free * memory.put(leading))

    swapped = frame[kind == Kind.SWAP]
    if len(swapped):
        mm.rss["swap"] -= len(swapped)
        free_swap_and_cache(mm, swapped)
    if len(huge):  # an empty PMD leaf is a PMD that is none
        rows = huge[np.diff(huge, prepend=-1) != 0]
        table.leaf_level[rows] = 0
        table.free_tables(table.number[rows])


def _uncount(mm: Mm, frames: NDArray[np.int32]) -> None:
    flags = mm.memory.flags[mm.memory.head(frames)]
    hugetlb = (flags & PG.HUGETLB) != 0
    anon = ((flags & PG.ANON) != 0) & ~hugetlb
    shmem = ((flags & (PG.ANON | PG.SWAPBACKED)) == PG.SWAPBACKED) & ~hugetlb
    mm.rss["anon"] -= int(anon.sum())
    mm.rss["shmem"] -= int(shmem.sum())
    mm.rss["file"] -= len(frames) - int(anon.sum()) - int(shmem.sum()) - int(hugetlb.sum())


def free_swap_and_cache(mm: Mm, swap_slots: NDArray[np.integer]) -> None:
    """Entries no longer name swap slots; cached pages that nothing else needs go with the last one."""
    memory = mm.memory
    swap = memory.swap
    np.subtract.at(swap.count, swap_slots, 1)
    idle = swap_slots[(swap.count[swap_slots] == 0) & (swap.cache[swap_slots] >= 0)]
    if len(idle):
        idle = np.sort(idle)
        idle = idle[np.diff(idle, prepend=-1) > 0]
        cached = swap.cache[idle]
        free = (memory.flags[cached] & (PG.LOCKED | PG.WRITEBACK)) == 0
        swap.cache[idle[free]] = -1
        memory.flags[cached[free]] &= ~np.uint16(PG.SWAPCACHE)
        memory.put(cached[free])
    swap.release(swap_slots)


@step
def free_pgtables(mm: Mm, thread: Thread, first: int, count: int) -> None:
    """Free the leaf tables in pages [first, first + count) that no area needs any more."""
    before = mm.before(first)
    floor = before.end if before is not None else 0
    after = mm.find_vma((first + count) * PAGE)
    ceiling = after.first if after is not None else 1 << 36
    low, high = max(-(-floor // 512), first // 512), min(ceiling // 512, -(-(first + count) // 512))
    if low < high:
        numbers, _rows = mm.table.leaves(low * 512, (high - low) * 512)
        gone = mm.table.free_tables(numbers)
        thread.charge(mm.costs.table_alloc * gone)
