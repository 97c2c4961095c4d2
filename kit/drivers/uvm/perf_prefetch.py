"""uvm_perf_prefetch.c: the tree that decides what else a fault brings along."""

from __future__ import annotations

from typing import Final

from kit.drivers.uvm.types import BIG_PAGES, BLOCK_PAGES, CPU, VaBlock
from kit.memory.table.pagemask import first_page, region
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["uvm_perf_prefetch_get_hint_va_block"]

# The top bit, and all bits but the top one, of every 64 KiB unit that a block and its padding can have.
_TOP_BITS: Final = sum(1 << unit + BIG_PAGES - 1 for unit in range(0, BLOCK_PAGES + BIG_PAGES, BIG_PAGES))
_LOW_BITS: Final = region(0, BLOCK_PAGES + BIG_PAGES) & ~_TOP_BITS


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
    thread.note(block.va, hint.bit_count())
    return hint


@step
def uvm_perf_prefetch_prenotify_fault_migrations(block: VaBlock, thread: Thread, dest: int, faulted: int) -> int:
    """Note the faults and compute the hint (uvm_perf_prefetch.c)."""
    if block.last_migration_proc_id != dest:
        block.last_migration_proc_id = dest
        block.fault_migrations_to_last_proc = 0
    module, thrashing = block.range.va_space.module, block.thrashing.pages if block.thrashing else 0
    if not (block.resident[0] | block.resident[1]) and block.range.policy.preferred_location == dest:
        hint = block.all_pages
    else:
        lead = min(-block.first % BIG_PAGES, block.pages)  # pages before the first 64 KiB boundary
        hint = _compute_prefetch_mask(
            block.resident[dest], faulted, thrashing, block.pages, lead, module.prefetch_threshold
        )
    hint &= ~faulted & ~thrashing
    if dest == CPU:
        hint &= ~(block.resident[CPU] & block.mapped(CPU))
    block.fault_migrations_to_last_proc += faulted.bit_count()
    return hint


def _compute_prefetch_mask(resident: int, faulted: int, thrashing: int, pages: int, lead: int, threshold: int) -> int:
    """Grow faults to 64 KiB units, then take for each fault the highest node that is full enough."""
    every = region(0, pages)
    # Shift the leaves so that big pages align with tree nodes, unless there is no big page at all.
    aligned = pages - lead >= BIG_PAGES
    offset = BIG_PAGES - lead if lead and aligned else 0
    units = _units(faulted << offset) & ~_units(thrashing << offset) if aligned else 0 if thrashing else -1
    tree = (resident | faulted) << offset | units & every << offset
    leaves = pages + offset
    hint = 0
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
        todo &= -1 << max(end, page + 1)
    return hint


def _units(mask: int) -> int:
    """Return the whole 64 KiB units that hold a page of `mask`."""
    # In each unit the sum carries into the top bit when any bit below it is set.
    top = ((mask & _LOW_BITS) + _LOW_BITS | mask) & _TOP_BITS
    return (top << 1) - (top >> BIG_PAGES - 1)


def _highest_node(tree: int, leaf: int, leaves: int, threshold: int) -> tuple[int, int]:
    """Return the range of the highest node around `leaf` that is above the threshold, or the leaf alone.

    A node cut off by the end of the tree counts the leaves it has. Failing a level does not stop the
    driver's climb, a larger ancestor may pass: so the search may as well start at the root, at the first node
    that all the pages there are could fill.
    """
    enough = tree.bit_count() * 100
    for level in range((leaves - 1).bit_length(), 0, -1):
        first = leaf >> level << level
        size = min(1 << level, leaves - first)
        if enough > threshold * size and (tree >> first & ((1 << size) - 1)).bit_count() * 100 > threshold * size:
            return first, first + size
    return leaf, leaf + 1
