"""uvm_perf_prefetch.c: the tree that decides what else a fault brings along."""

from __future__ import annotations

from kit.drivers.uvm.types import BIG_PAGES, CPU, VaBlock
from kit.memory.pagemask import region, runs
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["uvm_perf_prefetch_get_hint_va_block"]


@step
def uvm_perf_prefetch_get_hint_va_block(block: VaBlock, thread: Thread, dest: int, faulted: int) -> int:
    """Return the mask of pages to fetch along with `faulted`, which go to `dest` (uvm_perf_prefetch.c).

    Never reaches past the block, never includes faulted or thrashing pages.
    """
    module = block.range.va_space.module
    if not module.prefetch_enable:
        return 0
    thread.charge(block.range.va_space.gpu.costs.prefetch_hint)
    hint = uvm_perf_prefetch_prenotify_fault_migrations(block, thread, dest, faulted)
    if block.fault_migrations_to_last_proc < module.prefetch_min_faults:
        return 0
    thread.note(va=block.va, pages=hint.bit_count())
    return hint


@step
def uvm_perf_prefetch_prenotify_fault_migrations(block: VaBlock, thread: Thread, dest: int, faulted: int) -> int:
    """Note the faults and compute the hint (uvm_perf_prefetch.c)."""
    if block.last_migration_proc_id != dest:
        block.last_migration_proc_id = dest
        block.fault_migrations_to_last_proc = 0
    thrashing = block.thrashing.pages if block.thrashing else 0
    if not (block.resident[0] | block.resident[1]) and block.range.policy.preferred_location == dest:
        hint = block.all_pages
    else:
        hint = _compute_prefetch_mask(block, dest, faulted, thrashing)
    hint &= ~faulted & ~thrashing
    if dest == CPU:
        hint &= ~(block.resident[CPU] & block.mapped(CPU))
    block.fault_migrations_to_last_proc += faulted.bit_count()
    return hint


def _compute_prefetch_mask(block: VaBlock, dest: int, faulted: int, thrashing: int) -> int:
    """Grow faults to 64 KiB units, then take for each fault the highest node that is full enough."""
    pages = block.pages
    lead = min(-block.first % BIG_PAGES, pages)  # pages before the first 64 KiB boundary
    big = (pages - lead) // BIG_PAGES
    # Shift the leaves so that big pages align with tree nodes, unless there is no big page at all.
    offset = BIG_PAGES - lead if lead and big else 0
    tree = (block.resident[dest] | faulted) << offset
    for first, count in _units(pages, lead, big, faulted):
        unit = region(first, count)
        if not unit & thrashing:
            tree |= unit << offset
    leaves = pages + offset
    threshold = block.range.va_space.module.prefetch_threshold
    levels = (leaves - 1).bit_length() + 1
    hint = 0
    todo = faulted & ~thrashing
    while todo:
        page = (todo & -todo).bit_length() - 1
        first, end = _highest_node(tree, page + offset, leaves, levels, threshold)
        # A range that starts inside the padding is clamped to page `offset` of the block (the driver's own quirk).
        first = first - offset if first >= offset else offset
        end -= offset
        if end > first:
            hint |= region(first, end - first)
        if end == pages:
            break
        # Faults inside the node just taken climb the same way: the next one outside it can differ.
        todo &= ~region(0, max(end, page + 1)) if end > page else ~region(0, page + 1)
    return hint


def _units(pages: int, lead: int, big: int, faulted: int) -> list[tuple[int, int]]:
    """Return the 64 KiB units (and unaligned head and tail) that hold a fault."""
    if not big:
        return [(0, pages)]
    units: set[tuple[int, int]] = set()
    tail = lead + big * BIG_PAGES
    for first, count in runs(faulted):
        last = first + count - 1
        if first < lead:
            units.add((0, lead))
        if last >= tail:
            units.add((tail, pages - tail))
        low, high = max(first, lead), min(last, tail - 1)
        if low <= high:
            units.update(
                (lead + at * BIG_PAGES, BIG_PAGES) for at in range((low - lead) // BIG_PAGES, (high - lead) // BIG_PAGES + 1)
            )
    return sorted(units)


def _highest_node(tree: int, leaf: int, leaves: int, levels: int, threshold: int) -> tuple[int, int]:
    """Climb from `leaf` to the root; return the range of the highest node above the threshold.

    A node cut off by the end of the tree counts the leaves it has. Failing a level does not stop the
    climb: a larger ancestor may pass.
    """
    best = (leaf, leaf + 1)
    for level in range(1, levels):
        first = leaf >> level << level
        size = min(1 << level, leaves - first)
        if (tree >> first & ((1 << size) - 1)).bit_count() * 100 > threshold * size:
            best = (first, first + size)
    return best
