"""uvm_perf_prefetch.c: the tree that decides what else a fault brings along."""

from __future__ import annotations

from kit.drivers.uvm.types import BIG_PAGES, CPU, VaBlock
from kit.memory.table.pagemask import EMPTY, PageMask, first_page, region, region_weight, units
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["uvm_perf_prefetch_get_hint_va_block"]


@step
def uvm_perf_prefetch_get_hint_va_block(block: VaBlock, thread: Thread, dest: int, faulted: PageMask) -> PageMask:
    """Return the mask of pages to fetch along with `faulted`, which go to `dest` (uvm_perf_prefetch.c).

    Never reaches past the block, never includes faulted or thrashing pages.
    """
    module = block.range.va_space.module
    if not module.prefetch_enable:
        return EMPTY
    thread.charge(block.range.va_space.gpu.costs.prefetch_hint)
    hint = uvm_perf_prefetch_prenotify_fault_migrations(block, thread, dest, faulted)
    if block.fault_migrations_to_last_proc < module.prefetch_min_faults:
        return EMPTY
    thread.note(block.va, hint.bit_count())
    return hint


@step
def uvm_perf_prefetch_prenotify_fault_migrations(
    block: VaBlock, thread: Thread, dest: int, faulted: PageMask
) -> PageMask:
    """Note the faults and compute the hint (uvm_perf_prefetch.c)."""
    if block.last_migration_proc_id != dest:
        block.last_migration_proc_id = dest
        block.fault_migrations_to_last_proc = 0
    module, thrashing = block.range.va_space.module, block.thrashing.pages if block.thrashing else EMPTY
    if not (block.resident[0] | block.resident[1]) and block.range.policy.preferred_location == dest:
        hint = block.all_pages
    else:
        lead = min(-block.first % BIG_PAGES, block.pages)  # pages before the first 64 KiB boundary
        hint = _compute_prefetch_mask(
            block.resident[dest], faulted, thrashing, block.pages, lead, module.prefetch_threshold
        )
    hint = hint & ~faulted & ~thrashing
    if dest == CPU:
        hint &= ~(block.resident[CPU] & block.mapped(CPU))
    block.fault_migrations_to_last_proc += faulted.bit_count()
    return hint


def _compute_prefetch_mask(
    resident: PageMask, faulted: PageMask, thrashing: PageMask, pages: int, lead: int, threshold: int
) -> PageMask:
    """Grow faults to 64 KiB units, then take for each fault the highest node that is full enough."""
    every = region(0, pages)
    # Shift the leaves so that big pages align with tree nodes, unless there is no big page at all.
    aligned = pages - lead >= BIG_PAGES
    offset = BIG_PAGES - lead if lead and aligned else 0
    grown = units(faulted << offset) if aligned else every
    if thrashing:
        grown = grown & ~units(thrashing << offset) if aligned else EMPTY
    tree = (resident | faulted) << offset | grown & every << offset
    leaves = pages + offset
    hint = EMPTY
    todo = faulted & ~thrashing
    while todo:
        page = first_page(todo)
        first, end = _highest_node(tree, page + offset, leaves, threshold)
        # A range that starts inside the padding is clamped to page `offset` of the block (the driver's own quirk).
        first = first - offset if first >= offset else offset
        end -= offset
        if end > first:
            hint |= region(first, end - first)
        if end == pages:
            break
        # Faults inside the node just taken climb the same way: the next one outside it can differ.
        todo &= ~region(0, max(end, page + 1))
    return hint


def _highest_node(tree: PageMask, leaf: int, leaves: int, threshold: int) -> tuple[int, int]:
    """Return the range of the highest node around `leaf` that is above the threshold, or the leaf alone.

    A node cut off by the end of the tree counts the leaves it has. Failing a level does not stop the
    driver's climb, a larger ancestor may pass: so the search may as well start at the root, at the first node
    that all the pages there are could fill.
    """
    enough, level = tree.bit_count() * 100, 1
    while level < leaves:
        level += level
    while level > 1:  # leaves of a node that is not cut off
        first = leaf & -level
        size = min(level, leaves - first)
        if enough > threshold * size and region_weight(tree, first, size) * 100 > threshold * size:
            return first, first + size
        level >>= 1
    return leaf, leaf + 1
