"""Faults on PMD leaves (mm/huge_memory.c @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.memory.faults.anon import anon_bits
from kit.memory.huge.huge_split import __split_huge_pmd
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.physical.memremap import page_pgmap
from kit.memory.reclaim.alloc import alloc_huge_folio
from kit.memory.reclaim.rmap import add_anon_rmap
from kit.memory.types import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_VMA_LOCK,
    FAULT_FLAG_WRITE,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    PAGE,
    PG,
    VM_FAULT_FALLBACK,
    VM_FAULT_RETRY,
    VM_HUGEPAGE,
    VM_NOHUGEPAGE,
    Bit,
    Kind,
    Leaf,
    Vmf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = [
    "do_huge_pmd_anonymous_page", "do_huge_pmd_device_private", "do_huge_pmd_wp_page", "install_huge",
    "mm_get_huge_zero", "thp_vma_suitable",
]  # fmt: skip


def thp_vma_suitable(vma: Vma) -> bool:
    """Whether faults of an area may be served by 2 MiB: the system's setting and the area's advice."""
    if not vma.is_anonymous or vma.flags & VM_NOHUGEPAGE:
        return False
    mode = vma.mm.memory.thp
    return mode == "always" or (mode == "madvise" and bool(vma.flags & VM_HUGEPAGE))


def mm_get_huge_zero(memory: PhysicalMemory) -> int | None:
    """Return the huge zero page, allocating it on first use; None when there is no memory for it."""
    if memory.huge_zero < 0:
        head = memory.alloc_huge()
        if head is None:
            return None
        memory.zero(np.arange(head, head + HPAGE_PMD_NR))
        memory.flags[head : head + HPAGE_PMD_NR] = PG.RESERVED
        memory.huge_zero = head
    return memory.huge_zero


@waiting_step
def do_huge_pmd_anonymous_page(vma: Vma, thread: Thread, number: int, flags: int) -> Wait:
    """First touch of 2 MiB: the huge zero page or a huge folio; VM_FAULT_FALLBACK when neither can be had."""
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    thread.note(va=number * HPAGE_PMD_NR * PAGE, pages=HPAGE_PMD_NR)
    yield from thread.sync()
    if table.row_of(number) >= 0:
        return VM_FAULT_FALLBACK
    if not flags & FAULT_FLAG_WRITE:
        zero = mm_get_huge_zero(memory)
        if zero is None:
            return VM_FAULT_FALLBACK
        mm.count_faults(thread, 1)
        table.set_huge(number, Kind.PRESENT, Bit.SPECIAL | Bit.YOUNG, zero)
        thread.charge(mm.costs.pte_write + mm.costs.table_alloc)
        return 0
    head = alloc_huge_folio(mm, thread)
    if head is None:
        return VM_FAULT_FALLBACK
    mm.count_faults(thread, 1)
    thread.charge(mm.costs.huge_zero + mm.costs.table_alloc)
    memory.zero(np.arange(head, head + HPAGE_PMD_NR))
    install_huge(vma, thread, number, head, "first touch")
    return 0


def install_huge(vma: Vma, thread: Thread, number: int, head: int, cause: str) -> None:
    """Map a new huge folio as the PMD leaf of table `number`."""
    mm, start = vma.mm, thread.now
    pages = np.arange(number * HPAGE_PMD_NR, (number + 1) * HPAGE_PMD_NR)
    add_anon_rmap(mm.memory, vma, np.array([head]), pages, HPAGE_PMD_ORDER)
    mm.memory.flags[head] |= PG.DIRTY
    mm.table.set_huge(number, Kind.PRESENT, anon_bits(vma), head)
    mm.rss["anon"] += HPAGE_PMD_NR
    thread.charge(mm.costs.pte_write + mm.costs.lru_page)
    mm.moved(thread, start, pages, 0, 1, cause)


@waiting_step
def do_huge_pmd_wp_page(vma: Vma, thread: Thread, number: int, flags: int) -> Wait:
    """Write to a PMD leaf that is not writable: replace the huge zero page, reuse the folio, or split and fall back."""
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    thread.note(va=number * HPAGE_PMD_NR * PAGE, pages=HPAGE_PMD_NR)
    yield from thread.sync()
    slot = table.row_of(number) * HPAGE_PMD_NR
    head = int(table.frame[slot])
    if head == memory.huge_zero:
        if not flags & FAULT_FLAG_UNSHARE and (yield from _do_huge_zero_wp_pmd(vma, thread, number)):
            return 0
    elif memory.flags[head] & PG.ANON_EXCLUSIVE or _only_user(memory, head):
        mm.count_faults(thread, 1)
        slots = slice(slot, slot + HPAGE_PMD_NR)
        memory.flags[head : head + HPAGE_PMD_NR] |= PG.ANON_EXCLUSIVE
        if not flags & FAULT_FLAG_UNSHARE:
            more = Bit.YOUNG | Bit.DIRTY | (Bit.WRITABLE if vma.writable else 0)
            table.set_bits(slots, table.bits[slots] | np.uint8(more))
        thread.charge(mm.costs.pte_write)
        return 0
    yield from __split_huge_pmd(mm, thread, number)
    return VM_FAULT_FALLBACK


def _only_user(memory: PhysicalMemory, head: int) -> bool:
    """Whether the mapping that faults is the folio's only reference; its lock must be free, and is not kept."""
    return int(memory.refcount[head]) == 1 and not memory.flags[head] & PG.LOCKED


def _do_huge_zero_wp_pmd(vma: Vma, thread: Thread, number: int) -> Wait:
    """Replace the huge zero page by a huge folio; returns whether it could."""
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    head = alloc_huge_folio(mm, thread)
    if head is None:
        return False
    mm.count_faults(thread, 1)
    thread.charge(mm.costs.huge_zero)
    memory.zero(np.arange(head, head + HPAGE_PMD_NR))
    told = yield from invalidate_start(mm, thread, number * HPAGE_PMD_NR, HPAGE_PMD_NR, EVENTS.CLEAR)
    row = table.row_of(number)
    slot = row * HPAGE_PMD_NR
    if row >= 0 and table.leaf_level[row] == Leaf.PMD and table.frame[slot] == memory.huge_zero:
        install_huge(vma, thread, number, head, "first touch")
    else:
        memory.put(head)
    yield from invalidate_end(told, thread)
    return True


@waiting_step
def do_huge_pmd_device_private(vma: Vma, thread: Thread, page: int, flags: int) -> Wait:
    """CPU touch of a PMD-sized device-private entry: the driver moves it home; a locked folio just faults again."""
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    thread.note(va=page * PAGE, pages=1)
    if flags & FAULT_FLAG_VMA_LOCK:
        yield from mm.mmap_lock.read_release(thread)
        return VM_FAULT_RETRY
    mm.count_faults(thread, 1)
    yield from thread.sync()
    row = table.row_of(page >> 9)
    slot = row * HPAGE_PMD_NR  # vmf->page is what the PMD names: the folio's head
    if row < 0 or table.leaf_level[row] != Leaf.PMD or table.kind[slot] != Kind.DEVICE_PRIVATE:
        return 0
    pfn = int(table.frame[slot])
    if not memory.trylock(np.array([pfn]))[0]:
        yield from memory.wait_on_lock(thread, pfn)  # stands for the access faulting again and again
        return 0
    memory.get(pfn)
    pgmap = page_pgmap(memory, pfn)
    assert pgmap is not None
    result: int = yield from pgmap.ops.migrate_to_ram(Vmf(vma, page * PAGE, flags, pfn, pmd=True), thread)
    yield from thread.sync()
    memory.unlock(pfn)
    memory.put(pfn)
    return result
