"""The reverse map: from pages to the entries that map them, and what is done to all of them (mm/rmap.c @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start, runs
from kit.memory.physical.memremap import MEMORY_DEVICE_PRIVATE
from kit.memory.physical.pages import tally
from kit.memory.space.vma import Vma
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PG, Bit, Kind, Leaf
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = [
    "MAPPED", "Mapping", "add_anon_rmap", "mappings_of", "pages_of", "remove_migration_ptes", "remove_rmap",
    "rmap_walk", "rss_kind", "set_migration_entries", "try_share_anon_rmap", "try_to_migrate",
]  # fmt: skip

MAPPED = (Kind.PRESENT, Kind.DEVICE_PRIVATE, Kind.DEVICE_EXCLUSIVE)
Mapping = tuple[Vma, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
_CARRY = Bit.YOUNG | Bit.DIRTY | Bit.SOFT_DIRTY | Bit.UFFD_WP  # what a migration entry keeps of a present one


def pages_of(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return all pages of the folios that `pfns` name by any of their pages, each folio once, in order of its first."""
    heads = np.asarray(memory.head(pfns), dtype=np.int64)
    if not memory.order[heads].any():
        return heads
    first = np.ones(len(heads), dtype=bool)
    order = np.argsort(heads, kind="stable")
    first[order[1:]] = heads[order][1:] != heads[order][:-1]
    parts = [np.arange(head, head + (1 << int(memory.order[head]))) for head in heads[first].tolist()]
    return np.concatenate(parts) if parts else heads


def rmap_walk(
    memory: PhysicalMemory, pfns: NDArray[np.integer], kinds: tuple[int, ...] = MAPPED,
    entries: NDArray[np.integer] | None = None,
) -> list[Mapping]:  # fmt: skip
    """Return where pages are mapped: (area, virtual pages, slots, positions in `pfns`) for each area that maps some.

    Parameters
    ----------
    pfns : ndarray of int, shape (n,)
        Single pages, tails of folios included; their mapping and index say where to look.
    kinds : tuple of int
        Kinds of entry to find.
    entries : ndarray of int, shape (n,), optional
        The frame that an entry must name, where it is not `pfns` (a page's migration entries after it has moved).
    """
    pfns = np.asarray(pfns, dtype=np.int64)
    wanted = pfns if entries is None else np.asarray(entries, dtype=np.int64)
    mapping, index = memory.mapping[pfns], memory.index[pfns]
    found: list[Mapping] = []
    for root_id in sorted(set(mapping.tolist()) - {0}):
        root = memory.mappings[root_id]
        own = np.flatnonzero(mapping == root_id)
        for vma in list(root.vmas) if root is not None else []:
            pages = index[own] - vma.pgoff + vma.first
            inside = (pages >= vma.first) & (pages < vma.end)
            if not inside.any():
                continue
            at, pages = own[inside], pages[inside]
            table = vma.mm.table
            slots = table.slots_of(pages)
            kind = table.kind[slots]
            match = (table.frame[slots] == wanted[at]) & (slots >= 0)
            match &= (kind == kinds[0]) if len(kinds) == 1 else np.isin(kind, kinds)
            if match.any():
                order = np.argsort(pages[match], kind="stable")
                found.append((vma, pages[match][order], slots[match][order], at[match][order]))
    return found


def mappings_of(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> list[Mapping]:
    """Return the present, device-private and device-exclusive entries of all pages of the folios of `pfns`."""
    return rmap_walk(memory, pages_of(memory, pfns))


def rss_kind(memory: PhysicalMemory, pfn: int) -> str:
    """Return the counter of `mm.rss` that a page is part of (mm_counter)."""
    flags = int(memory.flags[memory.head(np.array([pfn]))][0])
    return "anon" if flags & PG.ANON else "shmem" if flags & PG.SWAPBACKED else "file"


def add_anon_rmap(
    memory: PhysicalMemory, vma: Vma, pfns: NDArray[np.integer], pages: NDArray[np.int64], order: int = 0
) -> None:
    """Make new folios (order 9: one) anonymous pages of an area, mapped once, exclusive (folio_add_new_anon_rmap)."""
    family = vma.mm.anon_vma_prepare(vma)
    blocks = memory.block(pfns, order)
    memory.mapping[blocks] = family.id
    memory.index[blocks] = pages - vma.first + vma.pgoff
    memory.flags[blocks] |= PG.ANON_EXCLUSIVE
    memory.flags[pfns] |= PG.ANON | PG.SWAPBACKED | PG.UPTODATE
    memory.mapcount[pfns] = 1
    memory.lru_add(pfns[memory.pgmap[pfns] == 0])


def remove_rmap(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> int:
    """One mapping less, with its reference, of each page's folio; return how many folios that freed."""
    tally(memory.mapcount, memory.head(pfns), -1)
    return memory.put(pfns)


def try_share_anon_rmap(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Take exclusiveness from anonymous pages; those that may be pinned refuse. Return which are not exclusive now."""
    exclusive = (memory.flags[pfns] & PG.ANON_EXCLUSIVE) != 0
    pinned = memory.pincount[memory.head(pfns)] > 0
    memory.flags[pfns[exclusive & ~pinned]] &= ~np.uint16(PG.ANON_EXCLUSIVE)
    return np.asarray(~(exclusive & pinned))


def set_migration_entries(mm: Mm, thread: Thread, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Replace mapped entries by migration entries, dropping their rmap and reference; return which were replaced.

    Entries of exclusive pages that are pinned stay. A PMD leaf is given by all its 512 slots and stays one. The caller
    holds the folios' locks and has invalidated the range.
    """
    table, memory = mm.table, mm.memory
    frames, bits, kind = table.frame[slots].copy(), table.bits[slots].copy(), table.kind[slots].copy()
    exclusive = (memory.flags[frames] & PG.ANON_EXCLUSIVE) != 0
    done = try_share_anon_rmap(memory, frames)
    slots, frames, bits, kind, exclusive = slots[done], frames[done], bits[done], kind[done], exclusive[done]
    present = kind == Kind.PRESENT
    dirty = frames[present & ((bits & Bit.DIRTY) != 0)]
    memory.flags[memory.head(dirty)] |= PG.DIRTY
    writable = (bits & Bit.WRITABLE) != 0
    entry = np.where(writable, Bit.WRITABLE, np.where(exclusive, Bit.READ_EXCLUSIVE, 0)).astype(np.uint8)
    entry |= np.where(present, bits & _CARRY, bits & (Bit.SOFT_DIRTY | Bit.UFFD_WP)).astype(np.uint8)
    lead = table.leads(slots)
    table.set_entries(slots, Kind.MIGRATION, entry, frames)
    remove_rmap(memory, frames[lead])
    thread.charge(mm.costs.pte_write * int(lead.sum()))
    return done


@waiting_step
def try_to_migrate(memory: PhysicalMemory, thread: Thread, pfns: NDArray[np.integer]) -> Wait:
    """Replace every mapping of locked, referenced folios by a migration entry; returns nothing, look at `mapcount`."""
    pages = pages_of(memory, pfns)
    thread.note(pages=len(pages))
    for vma, virtual, _slots, which in rmap_walk(memory, pages):
        mm = vma.mm
        for first, count in runs(virtual):
            told = yield from invalidate_start(mm, thread, first, count, EVENTS.CLEAR)
            at = which[(virtual >= first) & (virtual < first + count)]
            _migrate_run(mm, thread, np.arange(first, first + count), pages[at])
            yield from invalidate_end(told, thread)


def _migrate_run(mm: Mm, thread: Thread, virtual: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
    """Do one run, if its entries still map the pages: others may have run while the invalidation waited."""
    table = mm.table
    slots = table.slots_of(virtual)
    still = (slots >= 0) & (table.frame[slots] == pfns) & np.isin(table.kind[slots], MAPPED)
    if still.any():
        set_migration_entries(mm, thread, slots[still])
    thread.charge(mm.costs.rmap_walk * len(virtual) + mm.costs.tlb_flush)


@waiting_step
def remove_migration_ptes(
    memory: PhysicalMemory, thread: Thread, src: NDArray[np.integer], dst: NDArray[np.integer],
    moved: tuple[float, str] | None = None,
) -> Wait:  # fmt: skip
    """Turn the migration entries that name `src` into mappings of `dst`; return how many entries that were.

    Parameters
    ----------
    src, dst : ndarray of int, shape (n,)
        Pairs of folios by their heads, equal where a page goes back to its mappings; orders of a pair may differ only
        when the larger is given page by page. Mapping and index of `dst` say where the entries are.
    moved : (float, str), optional
        Since when pages whose place changes were under way, and why: for the moves.
    """
    yield from thread.sync()
    src, dst = _paired(memory, np.asarray(src, dtype=np.int64), np.asarray(dst, dtype=np.int64))
    thread.note(pages=len(src))
    done = 0
    for vma, pages, slots, which in rmap_walk(memory, dst, (Kind.MIGRATION,), entries=src):
        done += len(slots)
        _restore(vma.mm, thread, vma, slots, dst[which])
        if moved is not None:
            _record(vma.mm, thread, pages, src[which], dst[which], *moved)
    return done


def _record(
    mm: Mm, thread: Thread, pages: NDArray[np.int64], src: NDArray[np.int64], dst: NDArray[np.int64], start: float,
    cause: str,
) -> None:  # fmt: skip
    """Record the moves of pages whose place changed, for each pair of places."""
    if not mm.record_moves:
        return
    places = np.array([1 if pgmap is None else pgmap.place for pgmap in mm.memory.pgmaps])
    old, new = places[mm.memory.pgmap[src]], places[mm.memory.pgmap[dst]]
    for pair in sorted(set(zip(old[old != new].tolist(), new[old != new].tolist(), strict=True))):
        mm.moved(thread, start, pages[(old == pair[0]) & (new == pair[1])], *pair, cause)


def _paired(
    memory: PhysicalMemory, src: NDArray[np.int64], dst: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    huge = (memory.order[dst] == HPAGE_PMD_ORDER) & (memory.order[src] == HPAGE_PMD_ORDER)
    huge &= (dst % HPAGE_PMD_NR == 0) & (src % HPAGE_PMD_NR == 0)
    if not huge.any():
        return src, dst
    lanes = np.arange(HPAGE_PMD_NR)
    return (
        np.concatenate([src[~huge], (src[huge][:, None] + lanes).ravel()]),
        np.concatenate([dst[~huge], (dst[huge][:, None] + lanes).ravel()]),
    )


def _restore(mm: Mm, thread: Thread, vma: Vma, slots: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
    table, memory = mm.table, mm.memory
    old = table.bits[slots]
    heads = memory.head(pfns)
    anon = (memory.flags[heads] & PG.ANON) != 0
    exclusive = anon & ((old & (Bit.WRITABLE | Bit.READ_EXCLUSIVE)) != 0)
    memory.flags[pfns[exclusive]] |= PG.ANON_EXCLUSIVE
    private = _device_private(memory, pfns)
    kind = np.where(private, Kind.DEVICE_PRIVATE, Kind.PRESENT).astype(np.uint8)
    keep = np.where(private, Bit.SOFT_DIRTY | Bit.UFFD_WP, _CARRY)
    bits = ((old & keep) | (old & Bit.WRITABLE)).astype(np.uint8)
    rows = slots >> 9
    apart = (table.leaf_level[rows] == Leaf.PMD) & (memory.order[pfns] == 0)
    if apart.any():
        table.leaf_level[rows[apart]] = Leaf.PTE
    lead = table.leads(slots)
    table.set_entries(slots, kind, bits, pfns)
    tally(memory.mapcount, heads[lead], 1)
    tally(memory.refcount, heads[lead], 1)
    thread.charge((mm.costs.pte_write + mm.costs.rmap_walk) * int(lead.sum()))


def _device_private(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return which pages lie in device-private memory."""
    pgmap = memory.pgmap[pfns]
    if not pgmap.any():
        return np.zeros(len(pfns), dtype=bool)
    private = np.array([p is not None and p.type == MEMORY_DEVICE_PRIVATE for p in memory.pgmaps])
    return np.asarray(private[pgmap])
