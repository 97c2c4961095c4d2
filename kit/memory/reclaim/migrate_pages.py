"""Middle phase of a migration: holes are filled, and pages take over what the kernel knows of their sources.

__migrate_device_pages and what it calls (mm/migrate_device.c @ 7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MigratePfns,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from kit.memory.huge.huge_split import __split_huge_pmd
from kit.memory.notifier.mmu_notifier import mmu_notifier_invalidate_range_end, mmu_notifier_invalidate_range_start
from kit.memory.notifier.mmu_notifier_types import EVENTS, MmuNotifierRange
from kit.memory.physical.memremap import MEMORY_DEVICE_PRIVATE, pgmaps_where
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.physical.swap import folio_free_swap
from kit.memory.reclaim.rmap import add_anon_rmap
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PG, Bit, Kind, Leaf
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.sim.engine import Thread, Wait

__all__ = ["migrate_pages"]

_VALID, _MIGRATE, _COMPOUND = (np.uint64(f) for f in (MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_COMPOUND))
_FLAG_BITS = np.uint64((1 << MIGRATE_PFN_SHIFT) - 1)
_CARRIED = PG.DIRTY | PG.ANON | PG.SWAPBACKED | PG.UPTODATE | PG.ACTIVE | PG.YOUNG  # folio_migrate_flags


def migrate_pages(
    memory: PhysicalMemory, thread: Thread, src: MigratePfns, dst: MigratePfns, migrate: MigrateVma | None
) -> Wait:
    """Do every entry; without an area (`migrate` None) there are no holes, and large folios are not split."""
    yield from thread.sync()
    given = dst & _VALID != 0
    src[~given] &= ~_MIGRATE
    holes = given & (src & _VALID == 0) & (src & _MIGRATE != 0)
    told = None
    if holes.any() and migrate is not None:
        first = migrate.start + (int(holes.argmax()) << 12)
        told = MmuNotifierRange(migrate.area.mm, first, migrate.end, EVENTS.MIGRATE, migrate.pgmap_owner)
        yield from mmu_notifier_invalidate_range_start(told, thread)
        yield from _fill_holes(migrate, thread, src, dst, np.flatnonzero(holes))
    yield from _split_where_small(memory, thread, src, dst, migrate)
    at = np.flatnonzero((dst & _VALID != 0) & (src & _VALID != 0) & (src & _MIGRATE != 0))
    if len(at):
        moved = folio_migrate_mapping(memory, src[at], dst[at], migrate)
        src[at[~moved]] &= ~_MIGRATE
    if told is not None:
        yield from mmu_notifier_invalidate_range_end(told, thread)


def _fill_holes(
    migrate: MigrateVma, thread: Thread, src: MigratePfns, dst: MigratePfns, holes: NDArray[np.intp]
) -> Wait:
    """Fill holes, huge ones as one or, where the destination is small, page by page."""
    large = src[holes] & _COMPOUND != 0
    for at in holes[large].tolist():
        if dst[at] & _COMPOUND:
            migrate_vma_insert_huge_pmd_page(migrate, thread, at, src, dst)
        else:
            src[at] &= ~_COMPOUND
            src[at : at + HPAGE_PMD_NR] |= _MIGRATE
    small = (dst & _VALID != 0) & (src & _VALID == 0) & (src & _MIGRATE != 0) & (src & _COMPOUND == 0)
    if small.any():
        yield from migrate_vma_insert_page(migrate, thread, np.flatnonzero(small), src, dst)
    src[(dst & _VALID == 0) & (src & _VALID == 0)] &= ~_MIGRATE


@waiting_step
def migrate_vma_insert_page(
    migrate: MigrateVma, thread: Thread, at: NDArray[np.intp], src: MigratePfns, dst: MigratePfns
) -> Wait:
    """Map new pages where there is still nothing, or the zero page; a lost race clears MIGRATE.

    A huge zero page is split first, of which everybody hears (CLEAR): its other pages are small zero pages then.
    """
    vma, mm, memory = migrate.area, migrate.area.mm, migrate.area.mm.memory
    table, pages = mm.table, (migrate.start >> 12) + at.astype(np.int64)
    if not vma.is_anonymous:
        src[at] &= ~_MIGRATE
        return
    numbers = pages >> 9
    for number in numbers[np.diff(numbers, prepend=-1) != 0].tolist():
        row = table.row_of(number)
        if row >= 0 and table.leaf_level[row] == Leaf.PMD and table.frame[row * HPAGE_PMD_NR] == memory.huge_zero:
            yield from __split_huge_pmd(mm, thread, number)
    slots = table.slots_of(pages, create=True)
    kind = table.kind[slots]
    zero = (kind == Kind.PRESENT) & (table.frame[slots] == ZERO_PFN)
    free = (table.leaf_level[slots >> 9] == Leaf.PTE) & ((kind == Kind.NONE) | zero)
    src[at[~free]] &= ~_MIGRATE
    at, pages, slots = at[free], pages[free], slots[free]
    pfns = migrate_pfn_to_pfn(dst[at])
    add_anon_rmap(memory, vma, pfns, pages)
    memory.refcount[pfns] += 1
    mm.rss["anon"] += len(pfns)
    kinds, bits = _new_entries(memory, pfns, vma.writable)
    table.set_entries(slots, kinds, bits, pfns)
    src[at] = _MIGRATE
    costs = mm.costs
    thread.charge((costs.pte_write + costs.migrate_entry) * len(pfns) + (costs.tlb_flush if zero.any() else 0.0))
    thread.note(va=int(pages[0]) << 12 if len(pages) else -1, pages=len(pages))
    if len(pfns):
        mm.moved(thread, migrate.began, pages, 0, mm.place_of(int(pfns[0])), "migrate")


@step
def migrate_vma_insert_huge_pmd_page(
    migrate: MigrateVma, thread: Thread, at: int, src: MigratePfns, dst: MigratePfns
) -> None:
    """Map a new huge page where there is still nothing, or the huge zero page; a lost race clears MIGRATE."""
    vma, mm, memory = migrate.area, migrate.area.mm, migrate.area.mm.memory
    table, page = mm.table, (migrate.start >> 12) + at
    number, row = page >> 9, mm.table.row_of(page >> 9)
    head = int(migrate_pfn_to_pfn(dst[at : at + 1])[0])
    free = row < 0 or (
        table.leaf_level[row] == Leaf.PMD and table.kind[row * HPAGE_PMD_NR] == Kind.PRESENT
        and table.frame[row * HPAGE_PMD_NR] == memory.huge_zero
    )  # fmt: skip
    suitable = page % HPAGE_PMD_NR == 0 and vma.first <= page and page + HPAGE_PMD_NR <= vma.end
    if not (free and suitable and vma.is_anonymous and memory.order[head] == HPAGE_PMD_ORDER):
        src[at : at + HPAGE_PMD_NR] &= ~_MIGRATE
        return
    folio, pages = np.array([head]), np.arange(page, page + HPAGE_PMD_NR)
    add_anon_rmap(memory, vma, folio, pages, HPAGE_PMD_ORDER)
    memory.refcount[head] += 1
    mm.rss["anon"] += HPAGE_PMD_NR
    kinds, bits = _new_entries(memory, folio, vma.writable)
    table.set_huge(number, int(kinds[0]), int(bits[0]), head)
    thread.charge(mm.costs.table_alloc + mm.costs.pte_write + (mm.costs.tlb_flush if row >= 0 else 0.0))
    thread.note(va=page << 12, pages=HPAGE_PMD_NR)
    mm.moved(thread, migrate.began, pages, 0, mm.place_of(head), "migrate")


def _new_entries(
    memory: PhysicalMemory, pfns: NDArray[np.int64], writable: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return kinds and bits of entries for new pages: device-private ones, or present ones that are young and dirty."""
    private = pgmaps_where(memory, lambda pgmap: pgmap.type == MEMORY_DEVICE_PRIVATE)[memory.pgmap[pfns]]
    kinds = np.where(private, Kind.DEVICE_PRIVATE, Kind.PRESENT).astype(np.uint8)
    may = Bit.WRITABLE if writable else 0
    present = Bit.YOUNG | (Bit.WRITABLE | Bit.DIRTY if writable else 0)
    return kinds, np.where(private, may, present).astype(np.uint8)


def _split_where_small(
    memory: PhysicalMemory, thread: Thread, src: MigratePfns, dst: MigratePfns, migrate: MigrateVma | None
) -> Wait:
    """Settle pairs of unequal size: a large source is split for small destinations, a small one fails for a large."""
    going = (dst & _VALID != 0) & (src & _VALID != 0) & (src & _MIGRATE != 0)
    unequal = going & ((src ^ dst) & _COMPOUND != 0)
    for at in np.flatnonzero(unequal & (src & _COMPOUND != 0)).tolist():
        if migrate is None:
            src[at] &= ~(_MIGRATE | _COMPOUND)
        else:
            yield from migrate_vma_split_unmapped_folio(migrate, thread, at, src)
            src[at : at + HPAGE_PMD_NR][dst[at : at + HPAGE_PMD_NR] & _VALID == 0] &= ~_MIGRATE
    src[unequal & (src & _COMPOUND == 0) & (dst & _COMPOUND != 0)] &= ~_MIGRATE


@waiting_step
def migrate_vma_split_unmapped_folio(migrate: MigrateVma, thread: Thread, at: int, src: MigratePfns) -> Wait:
    """Split the unmapped folio of entry `at`: 512 entries, each with a lock and a reference of its own.

    The PMD goes first, of which everybody hears (CLEAR), and stays a table when the folio then cannot be split.
    """
    mm, memory = migrate.area.mm, migrate.area.mm.memory
    head = int(migrate_pfn_to_pfn(src[at : at + 1])[0])
    yield from __split_huge_pmd(mm, thread, (migrate.start >> 12) + at >> 9)
    # The kernel does not count the reference of a fault here, and faults again and again until 2 MiB are free.
    held = 1 + int(migrate.fault_page is not None and migrate.fault_page == head)
    if memory.refcount[head] != held + int(memory.expected_refs(np.array([head]))[0]):
        src[at] &= ~(_MIGRATE | _COMPOUND)
        return
    memory.split(head)
    flags = src[at] & _FLAG_BITS & ~_COMPOUND
    src[at : at + HPAGE_PMD_NR] = migrate_pfn(np.arange(head, head + HPAGE_PMD_NR)) | flags
    thread.charge(mm.costs.split_folio)
    thread.note(va=migrate.start + (at << 12), pages=HPAGE_PMD_NR)


def folio_migrate_mapping(
    memory: PhysicalMemory, src: MigratePfns, dst: MigratePfns, migrate: MigrateVma | None
) -> NDArray[np.bool_]:
    """Hand mapping, index and flags over to the destinations; return which took them (mm/migrate.c).

    File pages do not go to device memory, and pages that somebody else holds a reference to go nowhere.
    """
    old, new = migrate_pfn_to_pfn(src), migrate_pfn_to_pfn(dst)
    flags, to_device = memory.flags[old], memory.pgmap[new] > 0
    cached = (flags & PG.SWAPCACHE != 0) & to_device
    if cached.any():
        folio_free_swap(memory, old[cached])
        flags = memory.flags[old]
    anon = flags & PG.ANON != 0
    refused = to_device & ((memory.mapping[old] != 0) & ~anon | (flags & PG.SWAPCACHE != 0))
    expected = memory.expected_refs(old) + 1
    if migrate is not None and migrate.fault_page is not None:
        expected = expected + (old == migrate.fault_page)
    good = ~refused & (memory.refcount[old] == expected)
    old, new = old[good], new[good]
    memory.flags[new] = (memory.flags[new] & (PG.LOCKED | PG.LRU)) | (memory.flags[old] & _CARRIED)
    huge = memory.order[old] == HPAGE_PMD_ORDER
    if huge.any():
        old = np.concatenate([old[~huge], memory.block(old[huge], HPAGE_PMD_ORDER)])
        new = np.concatenate([new[~huge], memory.block(new[huge], HPAGE_PMD_ORDER)])
    memory.mapping[new], memory.index[new] = memory.mapping[old], memory.index[old]
    return np.asarray(good)
