"""fork: a copy of an address space whose pages are shared until somebody writes (kernel/fork.c, mm/memory.c @ 7.0)."""

from __future__ import annotations

from dataclasses import replace
from errno import EBUSY, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.device.exclusive import restore_exclusive_pte
from kit.memory.huge.huge_split import __split_huge_pmd
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.reclaim.alloc import alloc_folios
from kit.memory.reclaim.rmap import add_anon_rmap
from kit.memory.space.mm import Mm
from kit.memory.syscalls.exit import exit_mmap
from kit.memory.types import (
    PG,
    VM_DONTCOPY,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MAYWRITE,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    Bit,
    Kind,
    Leaf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["copy_page_range", "fork"]


@waiting_step
def fork(mm: Mm, thread: Thread) -> Wait:
    """Return the address space of a new child (`Mm`); Errno -ENOMEM when a page cannot be shared, whatever the reason.

    The reason does not reach the program (dup_mm returns NULL, copy_mm -ENOMEM): no memory for a copy, or a
    device-exclusive page that somebody has locked.
    """
    thread.charge(mm.costs.syscall + mm.costs.fork_base)
    child = Mm(mm.memory, mm.engine, mm.costs, f"{mm.name}'s child", mm.record_moves)
    child.rlimit_memlock = mm.rlimit_memlock
    failed: int = 0
    yield from mm.mmap_lock.write_acquire(thread)
    for vma in list(mm.vmas):
        if vma.flags & VM_DONTCOPY:
            continue
        new = replace(vma, mm=child, flags=vma.flags & ~VM_LOCKED, resv=set())
        child.insert(new)
        thread.charge(mm.costs.vma_op)
        if vma.anon is not None or vma.flags & (VM_PFNMAP | VM_MIXEDMAP | VM_HUGETLB):
            failed = yield from copy_page_range(new, thread, vma)
            if failed:
                break
    yield from mm.mmap_lock.write_release(thread)
    if failed:
        yield from exit_mmap(child, thread)
        return Errno(ENOMEM, "copy_mm", f"{mm.name} could not be copied")
    return child


@waiting_step
def copy_page_range(dst: Vma, thread: Thread, src: Vma) -> Wait:
    """Copy an area's entries to the child's, under a PROTECTION_PAGE notification where writes must fault from now on.

    Private writable entries become read-only in both; pages that may be pinned are copied at once. Returns 0; -ENOMEM;
    -EBUSY at a device-exclusive page that somebody has locked, when the pages before it have been shared already.
    """
    mm, table = src.mm, src.mm.table
    cow = src.flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE
    thread.note(va=src.start, pages=src.pages)
    told = None
    if cow:
        told = yield from invalidate_start(mm, thread, src.first, src.pages, EVENTS.PROTECTION_PAGE)
    yield from _split_pinned(src, thread)
    every = table.occupied(src.first, src.pages)
    slots = _restore_exclusive(src, thread, every)
    result = 0 if len(slots) == len(every) else Errno(EBUSY, "copy_page_range", "a device-exclusive page is locked")
    if len(slots):
        pinned = _copy(dst, thread, src, slots, bool(cow))
        if len(pinned):
            result = (yield from _copy_present_pages(dst, thread, src, pinned)) or result
    yield from invalidate_end(told, thread)
    return result


def _restore_exclusive(src: Vma, thread: Thread, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Make device-exclusive entries present, up to the first of a locked folio; return the slots before that."""
    memory, table = src.mm.memory, src.mm.table
    at = np.flatnonzero(table.kind[slots] == Kind.DEVICE_EXCLUSIVE)
    if not len(at):
        return slots
    locked = np.flatnonzero(memory.flags[memory.head(table.frame[slots[at]])] & PG.LOCKED)
    if len(locked):
        slots, at = slots[: at[locked[0]]], at[: locked[0]]
    restore_exclusive_pte(src, thread, slots[at])
    return slots


def _split_pinned(src: Vma, thread: Thread) -> Wait:
    """A PMD leaf of a pinned folio cannot be shared whole (copy_huge_pmd falls back to PTEs)."""
    mm, table = src.mm, src.mm.table
    numbers, rows = table.leaves(src.first, src.pages)
    huge = (table.leaf_level[rows] == Leaf.PMD) & (table.kind[rows * 512] == Kind.PRESENT)
    for number, row in zip(numbers[huge].tolist(), rows[huge].tolist(), strict=True):
        head = int(table.frame[row * 512])
        if mm.memory.pincount[head] and not mm.memory.flags[head] & PG.HUGETLB:
            yield from __split_huge_pmd(mm, thread, number)
    return 0


def _copy(dst: Vma, thread: Thread, src: Vma, slots: NDArray[np.int64], cow: bool) -> NDArray[np.int64]:
    """copy_pte_range and copy_huge_pmd for all entries at once; return the slots of pages that must not be shared."""
    mm, table, memory, child = src.mm, src.mm.table, src.mm.memory, dst.mm
    kind, bits, frame = table.kind[slots], table.bits[slots], table.frame[slots].astype(np.int64)
    struct = ((kind == Kind.PRESENT) & ((bits & Bit.SPECIAL) == 0)) | (kind == Kind.DEVICE_PRIVATE)
    named = np.where(struct | (kind == Kind.MIGRATION), frame, 0)
    exclusive = struct & ((memory.flags[named] & PG.ANON_EXCLUSIVE) != 0)
    pinned = exclusive & (memory.pincount[memory.head(named)] > 0)
    later = slots[pinned]
    ours = ~pinned & (kind != Kind.MARKER)
    slots, kind, bits, frame, struct, exclusive, named = (
        column[ours] for column in (slots, kind, bits, frame, struct, exclusive, named)
    )
    memory.flags[frame[exclusive]] &= ~np.uint16(PG.ANON_EXCLUSIVE)
    drop = Bit.WRITABLE | Bit.READ_EXCLUSIVE if cow else 0
    shared = bits & ~np.uint8(drop)
    table.set_bits(slots, shared)
    lead = table.leads(slots)
    old = Bit.YOUNG | (0 if cow else Bit.DIRTY)
    copied = np.where(kind == Kind.PRESENT, shared & ~np.uint8(old), shared).astype(np.uint8)
    to = _child_slots(dst, src, slots)
    child.table.set_entries(to, kind, copied, frame)
    leading = memory.head(frame[struct & lead])
    np.add.at(memory.mapcount, leading, 1)
    np.add.at(memory.refcount, leading, 1)
    memory.swap.dup(frame[kind == Kind.SWAP])
    child.rss["swap"] += int((kind == Kind.SWAP).sum())
    counted = struct | (kind == Kind.MIGRATION)
    _count_rss(child, memory.flags[memory.head(named[counted])])
    thread.charge(mm.costs.pte_write * int(lead.sum()))
    if mm.record_moves:
        places = memory.pgmap[frame[struct]]
        for at in sorted(set(places.tolist())):
            pages = table.pages_at(slots[struct][places == at])
            place = mm.place_of(int(frame[struct][places == at][0]))
            child.moved(thread, thread.now, pages, place, place, "fork")
    return np.asarray(later)


def _child_slots(dst: Vma, src: Vma, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the same pages' slots in the child's table, whose leaves become as large as the parent's."""
    table, child = src.mm.table, dst.mm.table
    to = child.slots_of(table.pages_at(slots), create=True)
    child.leaf_level[to >> 9] = table.leaf_level[slots >> 9]
    child.huge |= table.huge
    return np.asarray(to)


def _count_rss(mm: Mm, flags: NDArray[np.uint16]) -> None:
    plain = (flags & PG.HUGETLB) == 0
    anon, backed = (flags & PG.ANON) != 0, (flags & PG.SWAPBACKED) != 0
    mm.rss["anon"] += int((plain & anon).sum())
    mm.rss["shmem"] += int((plain & ~anon & backed).sum())
    mm.rss["file"] += int((plain & ~anon & ~backed).sum())


def _copy_present_pages(dst: Vma, thread: Thread, src: Vma, slots: NDArray[np.int64]) -> Wait:
    """copy_present_page: the child gets its own copies of pages that devices may have pinned in the parent."""
    mm, child = src.mm, dst.mm
    pages = mm.table.pages_at(slots)
    new = yield from alloc_folios(mm, thread, len(slots))
    if new is None:
        return Errno(ENOMEM, "copy_page_range", f"no memory to copy {len(slots)} pinned pages")
    mm.memory.copy(mm.table.frame[slots], new)
    thread.charge(mm.costs.page_copy * len(new))
    add_anon_rmap(mm.memory, dst, new, pages)
    mm.memory.flags[new] |= PG.DIRTY
    more = Bit.WRITABLE if dst.writable else 0
    child.table.set_entries(child.table.slots_of(pages, create=True), Kind.PRESENT, Bit.DIRTY | more, new)
    child.rss["anon"] += len(new)
    return 0
