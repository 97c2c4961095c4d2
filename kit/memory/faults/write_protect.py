"""Writes to present entries that do not allow it: copy on write, or reuse (mm/memory.c do_wp_page @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start, runs
from kit.memory.physical.swap import folio_free_swap
from kit.memory.reclaim.alloc import alloc_folios, portions
from kit.memory.reclaim.rmap import add_anon_rmap, remove_rmap, rss_kind
from kit.memory.types import (
    FAULT_FLAG_MKWRITE,
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    HPAGE_PMD_NR,
    PAGE,
    PG,
    VM_ACCESS_FLAGS,
    VM_FAULT_ERROR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_SHARED,
    Bit,
    Kind,
    Leaf,
    Vmf,
)  # fmt: skip
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["do_numa_page", "do_wp_page", "driver_mkwrite", "wp_page_copy"]


@step
def do_numa_page(vma: Vma, thread: Thread, pages: NDArray[np.int64]) -> None:
    """A protnone entry in an area that may be accessed: its rights come back (numa_rebuild_single_mapping)."""
    table = vma.mm.table
    vma.mm.count_faults(thread, len(pages))
    slots = table.slots_of(pages)
    if vma.flags & VM_ACCESS_FLAGS:
        table.set_bits(slots, (table.bits[slots] & ~np.uint8(Bit.PROTNONE)) | np.uint8(Bit.YOUNG))
    thread.charge(vma.mm.costs.pte_write * len(pages))


@waiting_step
def do_wp_page(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """Make present pages writable for a write, or exclusive for a pin (FAULT_FLAG_UNSHARE); returns VM_FAULT_*."""
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages))
    yield from thread.sync()
    slots = table.slots_of(pages)
    present = (table.kind[slots] == Kind.PRESENT) & (table.leaf_level[slots >> 9] == Leaf.PTE)
    slots, pages = slots[present], pages[present]
    frames, bits = table.frame[slots].astype(np.int64), table.bits[slots]
    unshare = bool(flags & FAULT_FLAG_UNSHARE)
    if vma.flags & VM_SHARED:
        return 0 if unshare else (yield from _wp_page_shared(vma, thread, pages, flags))
    normal = (bits & Bit.SPECIAL) == 0
    anon = normal & ((memory.flags[memory.head(frames)] & PG.ANON) != 0)
    reuse = anon & ((memory.flags[frames] & PG.ANON_EXCLUSIVE) != 0)
    maybe = np.flatnonzero(anon & ~reuse)
    if len(maybe):
        alone = wp_can_reuse_anon_folio(vma, pages[maybe], frames[maybe])
        memory.flags[frames[maybe[alone]]] |= PG.ANON_EXCLUSIVE
        reuse[maybe[alone]] = True
    if unshare:  # exclusive pages are as they should be
        mm.count_faults(thread, int(reuse.sum()))
    elif reuse.any():
        _reuse(vma, thread, slots[reuse])
    copy = ~reuse
    if copy.any():
        return (yield from wp_page_copy(vma, thread, pages[copy], frames[copy], flags))
    return 0


def _wp_page_shared(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """wp_page_shared: the entries become writable, unless a driver wants to see to it; returns VM_FAULT_*."""
    table, memory = vma.mm.table, vma.mm.memory
    for page in pages.tolist() if hasattr(vma.ops, "page_mkwrite") else []:
        if table.rights.item(table.slot_of(page)) != 1:
            continue  # the driver has served it together with another one
        served: int = yield from driver_mkwrite(Vmf(vma, page * PAGE, flags), thread)
        if served & (VM_FAULT_ERROR | VM_FAULT_RETRY):
            return served
        if served & VM_FAULT_NOPAGE:
            vma.mm.count_faults(thread, 1)
            pages = pages[pages != page]
    slots = table.slots_of(pages)
    slots = slots[(table.kind[slots] == Kind.PRESENT) & ((table.bits[slots] & Bit.WRITABLE) == 0)]
    _reuse(vma, thread, slots)
    if vma.file is not None:
        memory.flags[memory.head(table.frame[slots[(table.bits[slots] & Bit.SPECIAL) == 0]])] |= PG.DIRTY
    return 0


def driver_mkwrite(vmf: Vmf, thread: Thread) -> Wait:
    """Tell a driver of a write to an entry that is there but read-only (do_page_mkwrite); returns VM_FAULT_*.

    With VM_FAULT_NOPAGE the driver has seen to the entry, and the access is tried again.
    """
    mkwrite = getattr(vmf.vma.ops, "page_mkwrite", None)
    if mkwrite is None:
        return 0
    vmf.flags |= FAULT_FLAG_WRITE | FAULT_FLAG_MKWRITE
    return (yield from mkwrite(vmf, thread))


def _reuse(vma: Vma, thread: Thread, slots: NDArray[np.int64]) -> None:
    """wp_page_reuse: the page is ours alone; only the entry changes."""
    table = vma.mm.table
    vma.mm.count_faults(thread, len(slots))
    more = Bit.YOUNG | Bit.DIRTY | (Bit.WRITABLE if vma.writable else 0)
    table.set_bits(slots, table.bits[slots] | np.uint8(more))
    thread.charge(vma.mm.costs.pte_write * len(slots))


def wp_can_reuse_anon_folio(vma: Vma, pages: NDArray[np.int64], frames: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which anonymous pages that are not marked exclusive turn out to be: nobody else has a reference."""
    memory = vma.mm.memory
    heads = memory.head(frames)
    cached = (memory.flags[heads] & PG.SWAPCACHE) != 0
    small = memory.order[heads] == 0
    free = (memory.flags[heads] & PG.LOCKED) == 0
    drop = np.flatnonzero(cached & small & free & (memory.refcount[heads] == 2))
    if len(drop):
        folio_free_swap(memory, heads[drop])
    alone = small & free & (memory.refcount[heads] == 1)
    large = ~small & free & (memory.refcount[heads] == memory.mapcount[heads])
    for head in _distinct(heads[large]):
        at = int(np.flatnonzero(heads == head)[0])
        first = int(pages[at]) - int(frames[at]) + head
        slots = vma.mm.table.slots_of(np.arange(first, first + HPAGE_PMD_NR))
        own = (vma.mm.table.frame[slots] >> 9 == head >> 9) & (vma.mm.table.kind[slots] == Kind.PRESENT)
        alone[heads == head] = int(own.sum()) == int(memory.mapcount[head])
    return np.asarray(alone)


def _distinct(heads: NDArray[np.integer]) -> list[int]:
    heads = np.sort(heads)
    return [int(head) for head in heads[np.diff(heads, prepend=-1) != 0]]


@waiting_step
def wp_page_copy(vma: Vma, thread: Thread, pages: NDArray[np.int64], frames: NDArray[np.int64], flags: int) -> Wait:
    """Replace pages by copies of their own, each run under a CLEAR notification; returns VM_FAULT_*."""
    mm, memory = vma.mm, vma.mm.memory
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages))
    mm.count_faults(thread, len(pages))
    memory.get(frames)  # they must not go away while we wait
    at = 0
    for portion in portions(mm, pages):
        source = frames[at : at + len(portion)]
        at += len(portion)
        new = yield from alloc_folios(mm, thread, len(portion))
        if new is None:
            memory.put(frames[at - len(portion) :])
            return VM_FAULT_OOM
        thread.charge(mm.costs.page_copy * len(portion))
        memory.copy(source, new)
        for first, count in runs(portion):
            low = int(np.searchsorted(portion, first))
            part = slice(low, low + count)
            told = yield from invalidate_start(mm, thread, first, count, EVENTS.CLEAR)
            _replace(vma, thread, portion[part], source[part], new[part], bool(flags & FAULT_FLAG_UNSHARE))
            yield from invalidate_end(told, thread)
        memory.put(source)
    return 0


def _replace(
    vma: Vma, thread: Thread, pages: NDArray[np.int64], old: NDArray[np.int64], new: NDArray[np.int32], unshare: bool
) -> None:
    """Put copies in the place of entries that are still what they were."""
    mm, table, memory, start = vma.mm, vma.mm.table, vma.mm.memory, thread.now
    slots = table.slots_of(pages)
    same = (table.kind[slots] == Kind.PRESENT) & (table.frame[slots] == old) & (slots >= 0)
    same &= (table.bits[slots] & Bit.WRITABLE) == 0
    memory.put(new[~same])
    slots, pages, old, new = slots[same], pages[same], old[same], new[same]
    special = (table.bits[slots] & Bit.SPECIAL) != 0
    counted = old[~special]
    if len(counted):
        kind = rss_kind(memory, int(counted[0]))
        anon = int(((memory.flags[memory.head(counted)] & PG.ANON) != 0).sum())
        mm.rss["anon"] -= anon
        mm.rss["file" if kind == "anon" else kind] -= len(counted) - anon
    mm.rss["anon"] += len(new)
    add_anon_rmap(memory, vma, new, pages)
    memory.flags[new] |= PG.DIRTY
    bits = Bit.YOUNG | (0 if unshare else Bit.DIRTY | (Bit.WRITABLE if vma.writable else 0))
    table.set_entries(slots, Kind.PRESENT, bits, new)
    remove_rmap(memory, counted)
    thread.charge((mm.costs.pte_write + mm.costs.lru_page) * len(new) + mm.costs.tlb_flush)
    if mm.record_moves:
        here = np.where(special, 0, memory.pgmap[old])
        mm.moved(thread, start, pages[special], 0, 1, "first touch")
        mm.moved(thread, start, pages[~special & (here == 0)], 1, 1, "cow")
        for at in sorted(set(here[~special].tolist()) - {0}):
            place = mm.place_of(int(old[here == at][0]))
            mm.moved(thread, start, pages[here == at], place, 1, "cow")
