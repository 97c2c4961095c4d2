"""Device-exclusive entries: a device has a page for itself, for its atomics (mm/rmap.c, mm/memory.c @ 7.0)."""

from __future__ import annotations

from errno import EFAULT, EOPNOTSUPP
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.types import (
    FAULT_FLAG_ALLOW_RETRY,
    FOLL_GET,
    FOLL_SPLIT_PMD,
    FOLL_WRITE,
    PAGE,
    PG,
    VM_FAULT_RETRY,
    Bit,
    Kind,
    Leaf,
    Vmf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["make_device_exclusive", "remove_device_exclusive_entry", "restore_exclusive_pte"]


@waiting_step
def make_device_exclusive(mm: Mm, thread: Thread, address: int, owner: object) -> Wait:
    """Reserve the page at `address` (bytes) for a device; the caller holds the mmap lock.

    Returns
    -------
    int
        The pfn, locked and with a reference, whose CPU entry is device-exclusive now: program the device, then unlock
        and put it. -EFAULT: no writable area there; -EOPNOTSUPP: not private anonymous memory.
    """
    from kit.memory.faults.gup import faultin_pages

    memory, table = mm.memory, mm.table
    page = address // PAGE
    thread.note(va=page * PAGE, pages=1)
    while True:
        got = yield from faultin_pages(mm, thread, page, 1, FOLL_GET | FOLL_WRITE | FOLL_SPLIT_PMD)
        if isinstance(got, Errno):
            thread.note(va=page * PAGE, status=repr(got))
            return got
        if not len(got):
            return Errno(EFAULT, "make_device_exclusive", f"{address:#x} cannot be faulted in")
        pfn = int(got[0])
        flags = int(memory.flags[memory.head(got)][0])
        if not flags & PG.ANON or flags & PG.HUGETLB:
            memory.put(pfn)
            return Errno(EOPNOTSUPP, "make_device_exclusive", f"{address:#x} is not private anonymous memory")
        yield from memory.lock(thread, pfn)
        told = yield from invalidate_start(mm, thread, page, 1, EVENTS.EXCLUSIVE, owner)
        slot = int(table.slots_of(np.array([page]))[0])
        same = slot >= 0 and table.kind[slot] == Kind.PRESENT and table.frame[slot] == pfn
        if same and table.leaf_level[slot >> 9] == Leaf.PTE and table.bits[slot] & Bit.WRITABLE:
            break
        yield from invalidate_end(told, thread)
        memory.unlock(pfn)
        memory.put(pfn)
    bits = int(table.bits[slot])
    if bits & Bit.DIRTY:
        memory.flags[memory.head(np.array([pfn]))] |= PG.DIRTY
    table.set_entries(np.array([slot]), Kind.DEVICE_EXCLUSIVE, bits & Bit.SOFT_DIRTY, pfn)
    thread.charge(mm.costs.pte_write + mm.costs.tlb_flush)
    yield from invalidate_end(told, thread)
    return pfn


@waiting_step
def remove_device_exclusive_entry(vmf: Vmf, thread: Thread) -> Wait:
    """CPU access to a device-exclusive page: tell the device (CLEAR, no owner), and make the entry present again."""
    vma, page, pfn = vmf.vma, vmf.address // PAGE, vmf.page
    mm, memory, table = vma.mm, vma.mm.memory, vma.mm.table
    thread.note(va=vmf.address, pages=1)
    memory.get(pfn)
    yield from thread.sync()
    if not memory.trylock(np.array([pfn]))[0]:
        if vmf.flags & FAULT_FLAG_ALLOW_RETRY:
            yield from mm.mmap_lock.read_release(thread)
            yield from memory.wait_on_lock(thread, pfn)
            memory.put(pfn)
            return VM_FAULT_RETRY
        yield from memory.lock(thread, pfn)
    told = yield from invalidate_start(mm, thread, page, 1, EVENTS.CLEAR)
    slots = table.slots_of(np.array([page]))
    if slots[0] >= 0 and table.kind[slots[0]] == Kind.DEVICE_EXCLUSIVE and table.frame[slots[0]] == pfn:
        restore_exclusive_pte(vma, thread, slots)
    yield from invalidate_end(told, thread)
    yield from thread.sync()
    memory.unlock(pfn)
    memory.put(pfn)
    return 0


def restore_exclusive_pte(vma: Vma, thread: Thread, slots: NDArray[np.int64]) -> int:
    """Make device-exclusive entries present, writable where the area and exclusive ownership allow it.

    Only entries of folios that are not locked by others may be restored: the caller sees to it.
    """
    memory, table = vma.mm.memory, vma.mm.table
    frames, old = table.frame[slots].copy(), table.bits[slots]
    bits = old & (Bit.SOFT_DIRTY | Bit.UFFD_WP)
    up = ((memory.flags[frames] & PG.ANON_EXCLUSIVE) != 0) & ((old & Bit.UFFD_WP) == 0) & vma.writable
    dirty = (memory.flags[memory.head(frames)] & PG.DIRTY) != 0
    bits = bits | np.where(up, Bit.WRITABLE, 0) | np.where(up & dirty, Bit.DIRTY, 0)
    table.set_entries(slots, Kind.PRESENT, bits.astype(np.uint8), frames)
    thread.charge(vma.mm.costs.pte_write * len(slots))
    return len(slots)
