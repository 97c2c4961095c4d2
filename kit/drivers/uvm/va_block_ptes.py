"""uvm_va_block.c, GPU page-table entries: their sizes, their writes, and the TLB invalidates that follow."""

from __future__ import annotations

from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.types import (
    BIG_PAGES,
    BLOCK_PAGES,
    GPU,
    READ_WRITE,
    VaBlock,
)
from kit.memory.columns import copy, fill
from kit.memory.table.pagemask import EMPTY, PageMask, runs, whole_units
from kit.sim.engine import Thread

__all__ = ["downgrade_membar", "push_ptes"]


def downgrade_membar(block: VaBlock, gpu: Gpu, mask: PageMask) -> float:
    """Return the cost of the membar that follows: a GPU-wide one is enough for local memory (uvm_hal.c)."""
    local = not mask & ~block.resident[GPU]
    wide = gpu.costs.membar_gpu if local and not gpu.module.downgrade_force_membar_sys else gpu.costs.membar_sys
    return float(wide + gpu.hal.extra_hshub_membars * gpu.costs.membar_gpu)


def push_ptes(
    block: VaBlock, thread: Thread, gpu: Gpu, mask: PageMask, prot: int, location: int, invalidated: PageMask,
    membar: float,
) -> None:  # fmt: skip
    """One MEMOPS push: entries, then the TLB invalidate that a downgrade or a change needs.

    The masks of what is mapped are the caller's, who changes them afterwards.
    """
    costs = gpu.costs
    duration = _write_ptes(block, gpu, mask, prot, location) * costs.pte_write
    if invalidated:
        duration += gpu.tlb_invalidate(invalidated) + membar
    thread.charge(costs.push)
    _, block.tracker = gpu.memops.push(thread, duration, after=block.tracker)
    if thread is not gpu.unwatched:
        lost = mask & block.pte[GPU][READ_WRITE] if prot < READ_WRITE else EMPTY
        gpu.written_at(block.tracker, block, lost)


def _write_ptes(block: VaBlock, gpu: Gpu, mask: PageMask, prot: int, location: int) -> int:
    """Update the GPU's table and return how many entries of which size had to be written."""
    table, slot = gpu.table, block.slot[GPU]
    fill(table.rights, slot, runs(mask), prot)
    if prot:
        copy(table.frame, slot, block.frames[location], 0, runs(mask))
    return _pte_sizes(block, mask, prot, location)


def _pte_sizes(block: VaBlock, mask: PageMask, prot: int, location: int) -> int:
    """Choose 2 MiB, 64 KiB or 4 KiB entries (one contiguous chunk, one right) and count the writes.

    A size change passes through an unmapped state: splitting a 2 MiB entry writes its 64 KiB or
    4 KiB entries anew.
    """
    whole = block.all_pages
    single = _single_chunk(block, location)
    if block.pages == BLOCK_PAGES and mask == whole and prot and single and not block.cancel_4k:
        block.pte_2m, block.big_ptes = True, EMPTY
        return 1
    writes = 0
    if block.pte_2m:
        block.pte_2m, block.big_ptes = False, EMPTY
        writes += BLOCK_PAGES // BIG_PAGES
    if (single or location == GPU) and not block.cancel_4k:
        lead = block.first % BIG_PAGES
        big = whole_units(mask << lead) >> lead
        block.big_ptes |= big
        writes -= big.bit_count() // BIG_PAGES * (BIG_PAGES - 1)
    return writes + mask.bit_count()


def _single_chunk(block: VaBlock, location: int) -> bool:
    """Whether one contiguous 2 MiB chunk backs the whole block at `location`."""
    if location == GPU:
        return block.pages == BLOCK_PAGES
    found = block.cpu_chunks.get(0)
    return found is not None and found[2] == BLOCK_PAGES
