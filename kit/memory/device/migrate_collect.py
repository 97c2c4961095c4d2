"""First phase of a migration: find the pages of a range, lock them and put migration entries in their place.

migrate_vma_collect and what it calls (mm/migrate_device.c @ 7.0). The kernel goes entry by entry; here runs of
PTE tables are collected at once, and PMD leaves and holes one by one, in address order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.memory.device.migrate_select import Selection
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_COMPOUND,
    MigrateVma,
    migrate_pfn,
)
from kit.memory.huge.huge_split import split_folio
from kit.memory.notifier.mmu_notifier import mmu_notifier_invalidate_range_end, mmu_notifier_invalidate_range_start
from kit.memory.notifier.mmu_notifier_types import EVENTS, MmuNotifierRange
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.reclaim.rmap import set_migration_entries
from kit.memory.types import HPAGE_PMD_NR, PG, Bit, Kind, Leaf
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

__all__ = ["migrate_vma_collect"]

_STRETCH = 128 * HPAGE_PMD_NR  # pages collected at once


@waiting_step
def migrate_vma_collect(migrate: MigrateVma, thread: Thread) -> Wait:
    """Fill ``src`` for the range, between the start and the end of an invalidation that carries the owner."""
    mm = migrate.area.mm
    thread.note(va=migrate.start, pages=migrate.end - migrate.start >> 12)
    range = MmuNotifierRange(mm, migrate.start, migrate.end, EVENTS.MIGRATE, migrate.pgmap_owner)
    yield from mmu_notifier_invalidate_range_start(range, thread)
    first, end = migrate.start >> 12, migrate.end >> 12
    selection, page = Selection(migrate), first
    while page < end:
        row = mm.table.row_of(page >> 9)
        thread.charge(mm.costs.walk_table)
        if row < 0:
            hole, pages = mm.table.hole(page)
            stop = min(hole + pages, end)
            migrate_vma_collect_hole(migrate, page, stop)
        else:
            stop = yield from migrate_vma_collect_pmd(migrate, thread, selection, page, end, row)
        page = stop
    yield from mmu_notifier_invalidate_range_end(range, thread)
    migrate.npages = end - first
    migrate.end = migrate.start + (migrate.npages << 12)


def migrate_vma_collect_hole(migrate: MigrateVma, page: int, stop: int) -> None:
    """Mark nothing as something to fill: anonymous areas only.

    A hole that begins and ends on 2 MiB boundaries is *one* compound entry, also when it is longer than that.
    """
    if not migrate.area.is_anonymous:
        return
    at = page - (migrate.start >> 12)
    aligned = page % HPAGE_PMD_NR == 0 and stop % HPAGE_PMD_NR == 0
    if migrate.flags & MIGRATE_VMA_SELECT_COMPOUND and aligned:
        migrate.src[at] = MIGRATE_PFN_MIGRATE | MIGRATE_PFN_COMPOUND
        migrate.cpages += 1
        return
    migrate.src[at : at + stop - page] = MIGRATE_PFN_MIGRATE
    migrate.cpages += stop - page


@waiting_step
def migrate_vma_collect_huge_pmd(
    migrate: MigrateVma, thread: Thread, selection: Selection, page: int, stop: int, row: int
) -> Wait:
    """Collect a PMD leaf whole when that is asked for and possible, else split its folio; return whether it did."""
    mm, memory = migrate.area.mm, migrate.area.mm.memory
    table, slot = mm.table, row * HPAGE_PMD_NR
    kind, bits, head = int(table.kind[slot]), int(table.bits[slot]), int(table.frame[slot])
    if kind == Kind.NONE or (kind == Kind.PRESENT and selection.system and head == memory.huge_zero):
        migrate_vma_collect_hole(migrate, page, stop)
        return False
    # Whether a present leaf is coherent device memory is not looked at: SELECT_SYSTEM takes it.
    taken = selection.system if kind == Kind.PRESENT else kind == Kind.DEVICE_PRIVATE
    if not taken or (kind == Kind.DEVICE_PRIVATE and not selection.private[memory.pgmap[head]]):
        return False
    folio = np.array([head])
    ours = migrate.fault_page is not None and int(memory.head(np.array([migrate.fault_page]))[0]) == head
    if not ours and not memory.trylock(folio)[0]:
        return False
    memory.get(folio)
    whole = page % HPAGE_PMD_NR == 0 and stop % HPAGE_PMD_NR == 0
    pinned = memory.pincount[head] > 0 and memory.flags[head] & PG.ANON_EXCLUSIVE  # folio_try_share_anon_rmap_pmd
    if migrate.flags & MIGRATE_VMA_SELECT_COMPOUND and whole and not pinned:
        set_migration_entries(mm, thread, np.arange(slot, slot + HPAGE_PMD_NR))
        write = MIGRATE_PFN_WRITE if bits & Bit.WRITABLE else 0
        migrate.src[page - (migrate.start >> 12)] = (
            int(migrate_pfn(folio)[0]) | write | MIGRATE_PFN_MIGRATE | MIGRATE_PFN_COMPOUND
        )
        migrate.cpages += 1
        thread.charge(mm.costs.migrate_entry + (mm.costs.tlb_flush if kind == Kind.PRESENT else 0.0))
        return False
    failed = yield from split_folio(memory, thread, head)
    if not ours:
        memory.unlock(folio)
    memory.put(folio)
    return not failed


@waiting_step
def migrate_vma_collect_pmd(
    migrate: MigrateVma, thread: Thread, selection: Selection, page: int, end: int, row: int
) -> Wait:
    """Collect from `page` on what one huge entry or a run of tables holds; returns where to go on."""
    if migrate.area.mm.table.leaf_level[row] != Leaf.PTE:
        stop = min((page | HPAGE_PMD_NR - 1) + 1, end)
        again = yield from migrate_vma_collect_huge_pmd(migrate, thread, selection, page, stop, row)
        return page if again else stop  # again: it is a table now
    stop = _pte_run(migrate, page, end)
    if (yield from _split_large_folios(migrate, thread, selection, page, stop)):
        return page
    _collect_ptes(migrate, thread, selection, page, stop)
    return stop


def _collect_ptes(migrate: MigrateVma, thread: Thread, selection: Selection, page: int, stop: int) -> None:
    """Collect the entries of PTE tables: lock each page that may go, and put a migration entry in its place."""
    vma, mm, memory = migrate.area, migrate.area.mm, migrate.area.mm.memory
    table = mm.table
    slots = table.slots(page, stop - page)
    kind, bits, frame = table.kind[slots].copy(), table.bits[slots].copy(), table.frame[slots].copy()
    src = migrate.src[page - (migrate.start >> 12) :][: stop - page]
    empty = kind == Kind.NONE if vma.is_anonymous else np.zeros(len(kind), dtype=bool)
    present = kind == Kind.PRESENT
    if selection.system:
        empty |= present & (frame == ZERO_PFN)
    eligible = selection.eligible(kind, bits, frame)
    whole = np.flatnonzero(eligible & (memory.order[np.where(eligible, frame, 0)] > 0))
    for at_whole in whole[np.diff(page + whole >> 9, prepend=-1) != 0].tolist() if len(whole) else ():
        # A folio that could not be split: nothing from there to the end of the PMD is collected.
        rest = slice(at_whole, ((page + at_whole | HPAGE_PMD_NR - 1) + 1) - page)
        eligible[rest] = empty[rest] = False
    src[empty] = MIGRATE_PFN_MIGRATE
    at = np.flatnonzero(eligible)
    pfns = frame[at]
    got = memory.mapping[pfns] != 0
    at, pfns = at[got], pfns[got]
    locked = memory.trylock(pfns) if len(pfns) else np.zeros(0, dtype=bool)
    if migrate.fault_page is not None:
        locked |= pfns == migrate.fault_page  # the fault locked it, for us
    at, pfns = at[locked], pfns[locked]
    # The collector's reference stands in for the mapping's; it is dropped when the page is off the LRU.
    memory.get(pfns)
    where = slots.start + at if isinstance(slots, slice) else slots[at]
    done = set_migration_entries(mm, thread, where)
    if not done.all():  # exclusive and pinned
        left = pfns[~done]
        memory.put(left)
        memory.unlock(left if migrate.fault_page is None else left[left != migrate.fault_page])
        at, pfns = at[done], pfns[done]
    old_bits, old_kind = bits[at], kind[at]
    write = np.where(old_bits & np.uint8(Bit.WRITABLE), MIGRATE_PFN_WRITE, 0).astype(np.uint64)
    src[at] = migrate_pfn(pfns) | write | np.uint64(MIGRATE_PFN_MIGRATE)
    migrate.cpages += int(np.count_nonzero(empty)) + len(at)
    tables = at[old_kind == Kind.PRESENT] + page >> 9
    flushed = 1 + int(np.count_nonzero(tables[1:] != tables[:-1])) if len(tables) else 0
    costs = mm.costs
    thread.charge(costs.pte_read * len(kind) + costs.migrate_entry * len(at) + costs.tlb_flush * flushed)
    thread.note(va=page << 12, pages=len(at))


def _pte_run(migrate: MigrateVma, page: int, end: int) -> int:
    """Return where the run of PTE tables that begins at `page` ends."""
    if end <= (page | HPAGE_PMD_NR - 1) + 1:  # no further than this table
        return end
    table = migrate.area.mm.table
    numbers, rows = table.leaves(page, min(end - page, _STRETCH))
    good = (np.diff(numbers, prepend=numbers[0] - 1) == 1) & (table.leaf_level[rows] == Leaf.PTE)
    run = len(good) if good.all() else int(good.argmin())
    return min((int(numbers[0]) + run) * HPAGE_PMD_NR, end)


def _split_large_folios(migrate: MigrateVma, thread: Thread, selection: Selection, page: int, stop: int) -> Wait:
    """Split the large folios that PTEs of a run map and that may go; return whether any was."""
    mm, memory = migrate.area.mm, migrate.area.mm.memory
    slots = mm.table.slots(page, stop - page)
    kind, bits, frame = mm.table.kind[slots], mm.table.bits[slots], mm.table.frame[slots]
    if len(kind) == 1 and kind[0] in (Kind.PRESENT, Kind.DEVICE_PRIVATE) and not memory.order[frame[0]]:
        return False  # as for nearly every CPU fault on a device page
    large = selection.eligible(kind, bits, frame)
    large &= memory.order[np.where(large, frame, 0)] > 0
    if not large.any():
        return False
    heads = memory.head(frame[large])
    heads = heads[np.diff(heads, prepend=-1) != 0]
    fault_head = -1 if migrate.fault_page is None else int(memory.head(np.array([migrate.fault_page]))[0])
    split = False
    for head in heads.tolist():
        yield from migrate_vma_split_folio(migrate, thread, head, fault_head)
        split = split or memory.order[head] == 0
    return split


@waiting_step
def migrate_vma_split_folio(migrate: MigrateVma, thread: Thread, head: int, fault_head: int) -> Wait:
    """Split one folio; only the page of the fault stays locked and held, if it is in it. Return 0 or an error."""
    memory = migrate.area.mm.memory
    folio = np.array([head])
    if head != fault_head:
        memory.get(folio)
        yield from memory.lock(thread, head)
    ret = yield from split_folio(memory, thread, head)
    if head == fault_head and not ret and migrate.fault_page != head:
        tail = np.array([migrate.fault_page])  # the fault's lock and reference go with its page
        memory.get(tail)
        memory.trylock(tail)
    if head != fault_head or (not ret and migrate.fault_page != head):
        memory.unlock(folio)
        memory.put(folio)
    return ret
