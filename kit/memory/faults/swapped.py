"""Faults on entries that are not present but name a page or a swap slot (mm/memory.c do_swap_page @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.exclusive import remove_device_exclusive_entry
from kit.memory.physical.memremap import page_pgmap
from kit.memory.physical.swap import folio_free_swap
from kit.memory.reclaim.alloc import alloc_folios, portions
from kit.memory.types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_VMA_LOCK,
    FAULT_FLAG_WRITE,
    PAGE,
    PG,
    VM_FAULT_ERROR,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    Bit,
    Kind,
    Leaf,
    Vmf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["do_swap_page"]

_STOP = VM_FAULT_ERROR | VM_FAULT_RETRY


@waiting_step
def do_swap_page(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int, kind: int) -> Wait:
    """Serve pages whose entries are of one `kind`: swap, migration, device-private or -exclusive; VM_FAULT_*."""
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages))
    yield from thread.sync()
    if kind == Kind.SWAP:
        return (yield from _swap_in(vma, thread, pages, flags))
    if kind == Kind.DEVICE_PRIVATE and flags & FAULT_FLAG_VMA_LOCK:
        yield from vma.mm.mmap_lock.read_release(thread)  # migrate_to_ram needs the mmap lock
        return VM_FAULT_RETRY
    result = 0
    for page in pages.tolist():
        table = vma.mm.table
        slot = int(table.slots_of(np.array([page]))[0])
        if slot < 0 or table.kind[slot] != kind or table.leaf_level[slot >> 9] != Leaf.PTE:
            continue  # somebody was quicker
        vma.mm.count_faults(thread, 1)
        pfn = int(table.frame[slot])
        if kind == Kind.MIGRATION:
            yield from vma.mm.memory.wait_on_lock(thread, pfn)  # migration_entry_wait
        elif kind == Kind.DEVICE_EXCLUSIVE:
            result |= yield from remove_device_exclusive_entry(Vmf(vma, page * PAGE, flags, pfn), thread)
        else:
            result |= yield from _device_private(vma, thread, page, flags, slot, pfn)
        if result & _STOP:
            break
    return result


def _device_private(vma: Vma, thread: Thread, page: int, flags: int, slot: int, pfn: int) -> Wait:
    """Let the driver bring its page home; a locked page means that somebody already does."""
    memory, table = vma.mm.memory, vma.mm.table
    yield from thread.sync()
    if table.kind[slot] != Kind.DEVICE_PRIVATE or table.frame[slot] != pfn:
        return 0
    if not memory.trylock(np.array([pfn]))[0]:
        yield from memory.wait_on_lock(thread, pfn)
        return 0
    memory.get(pfn)
    pgmap = page_pgmap(memory, pfn)
    assert pgmap is not None
    result: int = yield from pgmap.ops.migrate_to_ram(Vmf(vma, page * PAGE, flags, pfn), thread)
    yield from thread.sync()
    memory.unlock(pfn)
    memory.put(pfn)
    return result


def _swap_in(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    result = 0
    for portion in portions(mm, pages):
        slots = table.slots_of(portion)
        still = (slots >= 0) & (table.kind[slots] == Kind.SWAP)  # others may have been quicker while this waited
        portion, slots = portion[still], slots[still]
        entries = table.frame[slots].copy()
        mm.count_faults(thread, len(portion))
        cached = memory.swap.cache[entries]
        locked = cached[(cached >= 0) & ((memory.flags[np.maximum(cached, 0)] & PG.LOCKED) != 0)]
        if len(locked):  # folio_lock_or_retry
            if flags & FAULT_FLAG_ALLOW_RETRY:
                yield from mm.mmap_lock.read_release(thread)
                yield from memory.wait_on_lock(thread, int(locked[0]))
                return result | VM_FAULT_RETRY
            for pfn in locked.tolist():
                yield from memory.wait_on_lock(thread, pfn)
        missing = entries[memory.swap.cache[entries] < 0]
        if len(missing):
            result |= VM_FAULT_MAJOR
            new = yield from alloc_folios(mm, thread, len(missing))
            if new is None:
                return VM_FAULT_OOM
            thread.charge(mm.costs.swap_in_page * len(missing))
            _fill_swap_cache(vma, new, missing)
        _map_cached(vma, thread, portion, entries, flags)
    return result


def _fill_swap_cache(vma: Vma, pfns: NDArray[np.int32], entries: NDArray[np.int32]) -> None:
    """Read slots into pages, unless somebody did so or freed the slots while we waited for the pages."""
    memory = vma.mm.memory
    swap = memory.swap
    ours = (swap.cache[entries] < 0) & (swap.count[entries] > 0)
    memory.put(pfns[~ours])
    pfns, entries = pfns[ours], entries[ours]
    memory.payload[pfns] = swap.payload[entries]
    swap.cache[entries] = pfns
    memory.swap_slot[pfns] = entries
    memory.flags[pfns] |= PG.SWAPCACHE | PG.SWAPBACKED | PG.UPTODATE
    memory.lru_add(pfns)
    memory.count("pswpin", len(pfns))


def _map_cached(vma: Vma, thread: Thread, pages: NDArray[np.int64], entries: NDArray[np.int32], flags: int) -> None:
    """Map pages of the swap cache where entries still are the slots; free slots that nothing names any more."""
    mm, table, memory, start = vma.mm, vma.mm.table, vma.mm.memory, thread.now
    swap = memory.swap
    slots = table.slots_of(pages)
    pfns = swap.cache[entries].astype(np.int64)
    same = (slots >= 0) & (table.kind[slots] == Kind.SWAP) & (table.frame[slots] == entries) & (pfns >= 0)
    slots, pages, entries, pfns = slots[same], pages[same], entries[same], pfns[same]
    family = mm.anon_vma_prepare(vma)
    memory.mapping[pfns] = family.id
    memory.index[pfns] = pages - vma.first + vma.pgoff
    memory.flags[pfns] |= PG.ANON
    np.add.at(memory.mapcount, pfns, 1)
    np.add.at(memory.refcount, pfns, 1)
    np.subtract.at(swap.count, entries, 1)
    folio_free_swap(memory, pfns[(memory.flags[pfns] & PG.LOCKED) == 0])
    old = table.bits[slots]
    exclusive = ((old & Bit.READ_EXCLUSIVE) != 0) | (memory.refcount[pfns] == 1)
    memory.flags[pfns[exclusive]] |= PG.ANON_EXCLUSIVE
    write = Bit.DIRTY if flags & FAULT_FLAG_WRITE else 0
    more = np.where(exclusive & vma.writable, Bit.WRITABLE | write, 0)
    keep = old & (Bit.SOFT_DIRTY | Bit.UFFD_WP)
    table.set_entries(slots, Kind.PRESENT, (keep | more | Bit.YOUNG).astype(np.uint8), pfns)
    mm.rss["anon"] += len(pfns)
    mm.rss["swap"] -= len(pfns)
    thread.charge(mm.costs.pte_write * len(pfns))
    mm.moved(thread, start, pages, 0, 1, "swap-in")
