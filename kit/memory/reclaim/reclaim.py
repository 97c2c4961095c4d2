"""Reclaim: which pages leave memory when it is short (mm/vmscan.c @ 7.0).

Huge folios are split before they are swapped out, as without CONFIG_THP_SWAP. One LRU list stands for the kernel's:
pages that were used since they were last looked at go round again. Dirty pages of files are written back here, which
stands for the flusher threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.huge.huge_split import split_folio
from kit.memory.physical.swap import folio_free_swap
from kit.memory.reclaim.rmap import rmap_walk
from kit.memory.reclaim.unmap_pages import try_to_unmap
from kit.memory.types import HPAGE_PMD_NR, PAGE, PG, VM_LOCKED, Bit, Kind
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["reclaim_pages", "shrink_folio_list", "try_to_free_pages"]

SWAP_CLUSTER_MAX = 32
DEF_PRIORITY = 12


@waiting_step
def try_to_free_pages(mm: Mm, thread: Thread, want: int) -> Wait:
    """Direct reclaim: free about `want` pages from the old end of the LRU; returns how many went."""
    memory, freed = mm.memory, 0
    thread.note(pages=want)
    memory.count("allocstall")
    batch = SWAP_CLUSTER_MAX
    for priority in range(DEF_PRIORITY, -1, -1):
        look_at = max(SWAP_CLUSTER_MAX, (memory.system_frames - memory.free_pages) >> priority)
        while look_at > 0 and freed < want:
            oldest = _isolate_lru_folios(memory, max(want - freed, batch))
            thread.charge(mm.costs.lru_page * len(oldest))
            if not len(oldest):
                return freed
            cold, spared = _put_back_used(memory, oldest, max(want - freed, SWAP_CLUSTER_MAX))
            look_at -= len(oldest) - spared
            got = (yield from shrink_folio_list(memory, thread, cold, True)) if len(cold) else 0
            freed += got
            batch = SWAP_CLUSTER_MAX if got else 2 * batch  # the kernel keeps to its batch: here it saves host time
    return freed


def _isolate_lru_folios(memory: PhysicalMemory, n: int) -> NDArray[np.int64]:
    """Take up to `n` folios that are longest on the LRU off it."""
    fresh = False
    while True:
        if not len(memory.lru_queue):
            if fresh:
                return memory.lru_queue  # nothing is on the LRU
            on = np.flatnonzero(memory.flags & PG.LRU)
            memory.lru_queue = on[np.argsort(memory.lru_stamp[on], kind="stable")]
            memory.lru_cut, fresh = memory.stamps, True
        some, memory.lru_queue = memory.lru_queue[:n], memory.lru_queue[n:]
        some = some[((memory.flags[some] & PG.LRU) != 0) & (memory.lru_stamp[some] < memory.lru_cut)]
        if len(some):
            break
    memory.lru_isolate(some)
    return np.asarray(some)


def _put_back_used(memory: PhysicalMemory, folios: NDArray[np.int64], want: int) -> tuple[NDArray[np.int64], int]:
    """Send folios that were used round again; return the first `want` of the others, and how many stay the oldest."""
    used = _referenced(memory, folios)
    memory.lru_putback(folios[used])
    cold = folios[~used]
    spare = cold[want:]
    memory.flags[spare] |= PG.LRU
    memory.put(spare)
    memory.lru_queue = np.concatenate([spare, memory.lru_queue])
    return cold[:want], len(spare)


@waiting_step
def shrink_folio_list(
    memory: PhysicalMemory, thread: Thread, pfns: NDArray[np.integer], ignore_references: bool = False
) -> Wait:
    """Reclaim isolated folios as far as that is possible, put the others back; returns how many pages were freed."""
    thread.note(pages=len(pfns))
    yield from thread.sync()
    listed = np.asarray(pfns, dtype=np.int64)
    got = memory.trylock(listed)
    memory.lru_putback(listed[~got])
    folios = yield from _split_large(memory, thread, listed[got])
    return (yield from _shrink(memory, thread, folios, ignore_references))


def _shrink(memory: PhysicalMemory, thread: Thread, pfns: NDArray[np.int64], ignore_references: bool) -> Wait:
    """Take locked single pages through unmapping, writing and freeing; return how many were freed."""
    keep = np.zeros(len(pfns), dtype=bool)
    if not ignore_references:
        keep |= _referenced(memory, pfns)
    flags = memory.flags[pfns]
    anon, backed = (flags & PG.ANON) != 0, (flags & PG.SWAPBACKED) != 0
    keep |= memory.pincount[pfns] > 0  # folio_maybe_dma_pinned
    out = np.flatnonzero(backed & ~keep & ((flags & PG.SWAPCACHE) == 0) & (anon | (memory.mapping[pfns] != 0)))
    given = _add_to_swap(memory, pfns[out])
    keep[out[given:]] = True
    yield from try_to_unmap(memory, thread, pfns[~keep])
    memory.flags[pfns[~keep & anon & ~backed & ((memory.flags[pfns] & PG.DIRTY) != 0)]] |= PG.SWAPBACKED
    keep |= memory.mapcount[pfns] > 0
    keep |= anon & ((memory.flags[pfns] & (PG.SWAPBACKED | PG.SWAPCACHE)) == PG.SWAPBACKED)
    lazy = anon & ((memory.flags[pfns] & PG.SWAPBACKED) == 0)
    cached = np.where(lazy, 0, 1)
    keep |= memory.refcount[pfns] != 1 + cached  # __remove_mapping: somebody else holds it
    gone = pfns[~keep]
    written, costs = _pageout(memory, gone), memory.costs
    thread.charge(costs.swap_out_page * written[0] + costs.file_write_page * written[1] + costs.page_free * len(gone))
    _remove_mapping(memory, gone)
    folio_free_swap(memory, pfns[keep])
    unused = pfns[out[:given]]
    unused = unused[keep[out[:given]] & ~anon[out[:given]]]
    memory.swap.release(memory.swap_slot[unused])  # shmem pages that stay
    yield from thread.sync()
    memory.unlock(pfns)
    memory.put(gone)
    memory.lru_putback(pfns[keep])
    memory.count("pgsteal", len(gone))
    return len(gone)


def _split_large(memory: PhysicalMemory, thread: Thread, pfns: NDArray[np.int64]) -> Wait:
    """Split huge folios into pages, each with the lock and the reference of the isolated; others pass."""
    large = memory.order[pfns] > 0
    if not large.any():
        return pfns
    parts = [pfns[~large]]
    for head in pfns[large].tolist():
        if (yield from split_folio(memory, thread, head)):
            yield from thread.sync()
            memory.unlock(head)
            memory.lru_putback(np.array([head]))
            continue
        tails = np.arange(head + 1, head + HPAGE_PMD_NR)
        tails = tails[memory.refcount[tails] > 0]  # the others were not mapped any more
        memory.trylock(tails)
        memory.get(tails)  # isolated like the head that they come from
        parts += [np.array([head]), tails]
    return np.concatenate(parts)


def _referenced(memory: PhysicalMemory, pfns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """folio_check_references: pages used since the last look, whose accessed bits this clears, or mlocked."""
    used = np.zeros(len(pfns), dtype=bool)
    for vma, _pages, slots, which in rmap_walk(memory, pfns, (Kind.PRESENT,)):
        table = vma.mm.table
        young = (table.bits[slots] & Bit.YOUNG) != 0
        used[which[young]] = True
        table.bits[slots[young]] &= ~np.uint8(Bit.YOUNG)
        leaves = slots[young & (table.leaf_level[slots >> 9] > 0)] >> 9  # one entry, kept 512 times
        table.bits.reshape(-1, HPAGE_PMD_NR)[leaves] &= np.uint8(0xFF ^ Bit.YOUNG)
        if vma.flags & VM_LOCKED:
            used[which] = True
    return used


def _add_to_swap(memory: PhysicalMemory, pfns: NDArray[np.int64]) -> int:
    """Give pages swap slots and enter them into the swap cache (folio_alloc_swap); return how many got one."""
    slots = memory.swap.alloc(len(pfns))
    pfns = pfns[: len(slots)]
    anon = (memory.flags[pfns] & PG.ANON) != 0
    memory.swap_slot[pfns] = slots
    memory.swap.cache[slots[anon]] = pfns[anon]
    memory.flags[pfns[anon]] |= PG.SWAPCACHE | PG.DIRTY
    memory.refcount[pfns[anon]] += 1
    return len(slots)


def _pageout(memory: PhysicalMemory, pfns: NDArray[np.int64]) -> tuple[int, int]:
    """Write dirty pages to swap or to their file; return how many went to each."""
    flags = memory.flags[pfns]
    swap = pfns[(flags & PG.SWAPBACKED) != 0]
    dirty = swap[(memory.flags[swap] & PG.DIRTY) != 0]
    memory.swap.payload[memory.swap_slot[swap]] = memory.payload[swap]
    file = pfns[((flags & (PG.SWAPBACKED | PG.ANON)) == 0) & ((flags & PG.DIRTY) != 0)]
    for root_id in set(memory.mapping[file].tolist()):
        root = memory.mappings[root_id]
        if root is not None:
            root.write_back(file[memory.mapping[file] == root_id])
    memory.count("pswpout", len(dirty))
    return len(dirty), len(file)


def _remove_mapping(memory: PhysicalMemory, pfns: NDArray[np.int64]) -> None:
    """Take pages out of the swap cache or page cache, with its reference (__remove_mapping)."""
    flags = memory.flags[pfns]
    cached = pfns[(flags & PG.SWAPCACHE) != 0]
    slots = memory.swap_slot[cached]
    memory.swap.cache[slots] = -1
    memory.flags[cached] &= ~np.uint16(PG.SWAPCACHE)
    memory.put(cached)
    memory.swap.release(slots)
    rest = pfns[(flags & (PG.SWAPCACHE | PG.ANON)) == 0]
    for root_id in set(memory.mapping[rest].tolist()):
        root = memory.mappings[root_id]
        own = rest[memory.mapping[rest] == root_id]
        if root is not None:
            root.evict(own)
        memory.put(own)


@waiting_step
def reclaim_pages(mm: Mm, thread: Thread, start: int, length: int) -> Wait:
    """Reclaim the pages that only bytes [start, start + length) map (MADV_PAGEOUT); returns how many pages were freed.

    The caller holds the mmap lock.
    """
    memory, table = mm.memory, mm.table
    thread.note(va=start, pages=length // PAGE)
    slots = table.occupied(start // PAGE, -(-length // PAGE))
    slots = slots[(table.kind[slots] == Kind.PRESENT) & ((table.bits[slots] & Bit.SPECIAL) == 0)]
    frames = table.frame[slots].astype(np.int64)
    lead = table.leads(slots)  # entries, of which a folio that only this range maps has all its mappings here
    heads = memory.head(frames)
    order = np.argsort(heads, kind="stable")
    cuts = np.flatnonzero(np.diff(heads[order], prepend=-1))
    entries = np.add.reduceat(lead[order].astype(np.int64), cuts) if len(cuts) else cuts
    pages = np.diff(np.append(cuts, len(order)))
    heads = heads[order][cuts]
    heads = heads[(memory.mapcount[heads] == entries) & (pages == 1 << memory.order[heads].astype(np.int64))]
    isolated = heads[memory.lru_isolate(heads)]
    if not len(isolated):
        return 0
    return (yield from shrink_folio_list(memory, thread, isolated, ignore_references=True))
