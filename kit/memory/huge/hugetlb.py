"""hugetlb areas: 2 MiB and 1 GiB pages from a pool (mm/hugetlb.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.types import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    HPAGE_PUD_ORDER,
    PAGE,
    PG,
    VM_FAULT_HWPOISON,
    VM_FAULT_SIGBUS,
    VM_SHARED,
    Bit,
    Kind,
    Leaf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.memory.table.cpu_table import CpuTable
    from kit.sim.engine import Thread, Wait

__all__ = ["hugetlb_fault", "hugetlb_reserve_pages", "hugetlb_unreserve_pages"]

_ORDERS = {PAGE << HPAGE_PMD_ORDER: HPAGE_PMD_ORDER, PAGE << HPAGE_PUD_ORDER: HPAGE_PUD_ORDER}


def _order(vma: Vma) -> int:
    return _ORDERS[vma.page_size]


def hugetlb_reserve_pages(vma: Vma) -> int:
    """Promise the area huge pages for all of it; returns 0, -EINVAL (no such size) or -ENOMEM (pool too small)."""
    if vma.page_size not in _ORDERS:
        return Errno(EINVAL, "hugetlb_reserve_pages", f"{vma.page_size} is no huge page size: 2 MiB or 1 GiB")
    order, memory = _order(vma), vma.mm.memory
    count = vma.pages >> order
    left = len(memory.hugetlb_free.get(order, ())) - memory.hugetlb_reserved.get(order, 0)
    if count > left:
        return Errno(ENOMEM, "hugetlb_reserve_pages", f"{count} huge pages wanted, {left} in the pool")
    vma.pgoff = vma.first if vma.file is None else vma.pgoff
    memory.hugetlb_reserved[order] = memory.hugetlb_reserved.get(order, 0) + count
    low = vma.pgoff >> order
    vma.resv = set(range(low, low + count))
    return 0


def hugetlb_unreserve_pages(vma: Vma) -> None:
    """Give back the promises that faults did not use."""
    order = _order(vma)
    low = vma.pgoff >> order
    mine = [at for at in vma.resv if low <= at < low + (vma.pages >> order)]
    vma.resv.difference_update(mine)
    vma.mm.memory.hugetlb_reserved[order] -= len(mine)


def _alloc(vma: Vma, page: int) -> int | None:
    """alloc_hugetlb_folio: a page of the pool, out of the area's reservation or what is not promised to others."""
    memory, order = vma.mm.memory, _order(vma)
    pool, at = memory.hugetlb_free[order], vma.index(page) >> order
    if at in vma.resv:
        vma.resv.remove(at)
        memory.hugetlb_reserved[order] -= 1
    elif len(pool) <= memory.hugetlb_reserved[order]:
        return None
    head = pool.pop()
    memory.prep(np.array([head]), order)
    memory.flags[head] = PG.HUGETLB | PG.UPTODATE
    return head


@waiting_step
def hugetlb_fault(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """Serve faults of a hugetlb area, each huge page once; returns VM_FAULT_*."""
    mm, table, size = vma.mm, vma.mm.table, vma.page_size // PAGE
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages))
    yield from thread.sync()
    units = pages // size
    for page in (units[np.diff(units, prepend=-1) != 0] * size).tolist():
        slot = int(table.slots_of(np.array([page]))[0])
        kind = int(table.kind[slot]) if slot >= 0 else Kind.NONE
        mm.count_faults(thread, 1)
        if kind == Kind.NONE:
            result = hugetlb_no_page(vma, thread, page, flags)
        elif kind == Kind.MIGRATION:
            yield from mm.memory.wait_on_lock(thread, int(table.frame[slot]))
            result = 0
        elif kind != Kind.PRESENT:
            return VM_FAULT_HWPOISON
        elif flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE) and not int(table.bits[slot]) & Bit.WRITABLE:
            result = yield from hugetlb_wp(vma, thread, page, slot, flags)
        else:
            result = 0
        if result:
            return result
    return 0


def hugetlb_no_page(vma: Vma, thread: Thread, page: int, flags: int) -> int:
    """First touch: a cleared huge page, the file's own in a shared mapping."""
    mm, memory, order = vma.mm, vma.mm.memory, _order(vma)
    blocks = np.arange(1 << order)
    at = vma.index(page)
    shared = bool(vma.flags & VM_SHARED)
    head = int(vma.file.cache[at]) if vma.file is not None else -1
    if head < 0:
        new = _alloc(vma, page)
        if new is None:
            return VM_FAULT_SIGBUS
        head = new
        memory.zero(head + blocks)
        thread.charge(mm.costs.huge_zero * (1 << order - HPAGE_PMD_ORDER))
        if vma.file is not None and shared:
            vma.file.cache[at] = head
            memory.mapping[head + blocks], memory.index[head + blocks] = vma.file.id, at + blocks
            memory.get(head)  # the cache's; what the allocation gave becomes the entry's
        else:
            _make_anon(vma, page, head)
    else:
        memory.get(head)
    memory.mapcount[head] += 1
    write = vma.writable and (not shared or bool(flags & FAULT_FLAG_WRITE))
    anon = bool(memory.flags[head] & PG.ANON)
    bits = Bit.YOUNG | (Bit.WRITABLE | Bit.DIRTY if write and (shared or anon) else 0)
    _set_huge(mm.table, page, order, bits, head)
    thread.charge(mm.costs.pte_write)
    return 0


def _make_anon(vma: Vma, page: int, head: int) -> None:
    memory = vma.mm.memory
    blocks = np.arange(1 << _order(vma))
    family = vma.mm.anon_vma_prepare(vma)
    memory.mapping[head + blocks], memory.index[head + blocks] = family.id, vma.index(page) + blocks
    memory.flags[head + blocks] |= PG.ANON_EXCLUSIVE
    memory.flags[head] |= PG.ANON


def _set_huge(table: CpuTable, page: int, order: int, bits: int, head: int) -> None:
    level = Leaf.PMD if order == HPAGE_PMD_ORDER else Leaf.PUD
    for part in range(1 << order - HPAGE_PMD_ORDER):
        table.set_huge(page // HPAGE_PMD_NR + part, Kind.PRESENT, bits, head + part * HPAGE_PMD_NR, level)


def hugetlb_wp(vma: Vma, thread: Thread, page: int, slot: int, flags: int) -> Wait:
    """Write to a read-only huge page: use it when it is ours alone, else copy it under a CLEAR notification."""
    mm, table, memory, order = vma.mm, vma.mm.table, vma.mm.memory, _order(vma)
    old, size = int(table.frame[slot]), 1 << order
    blocks = np.arange(size)
    slots = table.slots_of(page + blocks)
    more = Bit.YOUNG | Bit.DIRTY | (Bit.WRITABLE if vma.writable else 0)
    unshare = bool(flags & FAULT_FLAG_UNSHARE)
    anon = bool(memory.flags[old] & PG.ANON)
    if vma.flags & VM_SHARED or (anon and memory.mapcount[old] == 1):
        if anon:
            memory.flags[old + blocks] |= PG.ANON_EXCLUSIVE
        if not unshare:
            table.set_bits(slots, table.bits[slots] | np.uint8(more))
        thread.charge(mm.costs.pte_write)
        return 0
    new = _alloc(vma, page)
    if new is None:
        return VM_FAULT_SIGBUS
    memory.get(old)
    memory.copy(old + blocks, new + blocks)
    thread.charge(mm.costs.huge_copy * (size // HPAGE_PMD_NR))
    told = yield from invalidate_start(mm, thread, page, size, EVENTS.CLEAR)
    if table.kind[slot] == Kind.PRESENT and table.frame[slot] == old:
        _make_anon(vma, page, new)
        memory.mapcount[new], memory.mapcount[old] = 1, memory.mapcount[old] - 1
        memory.put(old)
        _set_huge(table, page, order, Bit.YOUNG if unshare else more, new)
        thread.charge(mm.costs.pte_write + mm.costs.tlb_flush)
    else:
        memory.put(new)
    yield from invalidate_end(told, thread)
    memory.put(old)
    return 0
