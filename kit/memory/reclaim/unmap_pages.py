"""Unmapping pages everywhere, to swap them out or to take them from use (mm/rmap.c try_to_unmap @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start, runs
from kit.memory.reclaim.rmap import remove_rmap, rmap_walk, try_share_anon_rmap
from kit.memory.types import PG, VM_LOCKED, Bit, Kind
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["try_to_unmap"]


@waiting_step
def try_to_unmap(memory: PhysicalMemory, thread: Thread, pfns: NDArray[np.integer], hwpoison: bool = False) -> Wait:
    """Unmap locked, referenced single pages from every address space; returns nothing, look at `mapcount`.

    Entries of swap-cache pages become swap entries, those of clean lazily freed pages and of files none, and with
    `hwpoison` all become poison entries. Areas that are mlocked and exclusive pages that are pinned keep theirs.
    """
    pages = np.asarray(pfns, dtype=np.int64)
    thread.note(pages=len(pages))
    for vma, virtual, _slots, which in rmap_walk(memory, pages, (Kind.PRESENT, Kind.DEVICE_EXCLUSIVE)):
        if vma.flags & VM_LOCKED and not hwpoison:
            continue
        for first, count in runs(virtual):
            told = yield from invalidate_start(vma.mm, thread, first, count, EVENTS.CLEAR)
            at = (virtual >= first) & (virtual < first + count)
            _unmap_run(vma, thread, virtual[at], pages[which[at]], hwpoison)
            yield from invalidate_end(told, thread)


def _unmap_run(vma: Vma, thread: Thread, virtual: NDArray[np.int64], pfns: NDArray[np.int64], hwpoison: bool) -> None:
    """try_to_unmap_one for a run, as far as its entries still map the pages."""
    mm, table, memory, start = vma.mm, vma.mm.table, vma.mm.memory, thread.now
    slots = table.slots_of(virtual)
    still = (slots >= 0) & (table.frame[slots] == pfns)
    still &= (table.kind[slots] == Kind.PRESENT) | (table.kind[slots] == Kind.DEVICE_EXCLUSIVE)
    slots, virtual, pfns = slots[still], virtual[still], pfns[still]
    dirty = (table.bits[slots] & Bit.DIRTY) != 0
    memory.flags[pfns[dirty]] |= PG.DIRTY
    flags = memory.flags[pfns]
    anon = (flags & PG.ANON) != 0
    lazy = anon & ((flags & PG.SWAPBACKED) == 0)
    keep = lazy & ((flags & PG.DIRTY) != 0) if not hwpoison else np.zeros(len(pfns), dtype=bool)
    keep |= lazy & (memory.refcount[pfns] != 1 + memory.mapcount[pfns]) if not hwpoison else False
    exclusive = (flags & PG.ANON_EXCLUSIVE) != 0
    keep |= anon & ~keep & ~np.where(keep, True, _share(memory, pfns, keep | ~anon))
    slots, virtual, pfns, exclusive = slots[~keep], virtual[~keep], pfns[~keep], exclusive[~keep]
    swapped = (memory.flags[pfns] & PG.SWAPCACHE) != 0
    entries = memory.swap_slot[pfns]
    old = table.bits[slots] & np.uint8(Bit.SOFT_DIRTY | Bit.UFFD_WP)
    table.clear(slots)
    if hwpoison:
        table.set_entries(slots, Kind.HWPOISON, 0, pfns)
        swapped = np.zeros(len(pfns), dtype=bool)
    some = slots[swapped]
    table.set_entries(
        some, Kind.SWAP, old[swapped] | np.where(exclusive[swapped], Bit.READ_EXCLUSIVE, 0).astype(np.uint8),
        entries[swapped],
    )  # fmt: skip
    memory.swap.dup(entries[swapped])
    mm.rss["swap"] += len(some)
    for counter in ("anon", "shmem", "file"):
        mm.rss[counter] -= _count(memory, pfns, counter)
    remove_rmap(memory, pfns)
    thread.charge((mm.costs.rmap_walk + mm.costs.pte_write) * len(pfns) + mm.costs.tlb_flush)
    mm.moved(thread, start, virtual, 1, 0, "swap-out")


def _share(memory: PhysicalMemory, pfns: NDArray[np.int64], leave: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """try_share_anon_rmap of those pages that are not to be left alone; True for the others."""
    done = np.ones(len(pfns), dtype=bool)
    done[~leave] = try_share_anon_rmap(memory, pfns[~leave])
    return done


def _count(memory: PhysicalMemory, pfns: NDArray[np.int64], counter: str) -> int:
    flags = memory.flags[pfns]
    anon, backed = (flags & PG.ANON) != 0, (flags & PG.SWAPBACKED) != 0
    return int({"anon": anon, "shmem": ~anon & backed, "file": ~anon & ~backed}[counter].sum())
