"""uvm_va_range.c and uvm_va_block.c, look-up: the block of a page, made at first use."""

from __future__ import annotations

from kit.drivers.uvm.types import (
    BLOCK_PAGES,
    VaBlock,
    VaRange,
    VaSpace,
)
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["uvm_va_block_find_create_in_range", "uvm_va_block_find_create_managed", "uvm_va_range_block_create"]


def uvm_va_range_block_create(va_range: VaRange, thread: Thread, page: int) -> VaBlock:
    """Return the block of `page`, creating it at first use (uvm_va_range.c)."""
    index = page // BLOCK_PAGES
    block = va_range.blocks.get(index)
    if block is None:
        first = max(index * BLOCK_PAGES, va_range.first)
        pages = min((index + 1) * BLOCK_PAGES, va_range.end) - first
        slots = (va_range.va_space.mm.table.slot_of(first), va_range.slot + first - va_range.first)
        block = va_range.blocks[index] = VaBlock(va_range, first, pages, slots)
    return block


@step
def uvm_va_block_find_create_in_range(va_space: VaSpace, thread: Thread, page: int) -> VaBlock | None:
    """Return the block of a faulting page, or None outside every managed range (uvm_va_block.c)."""
    va_range = va_space.find(page)
    return None if va_range is None else uvm_va_range_block_create(va_range, thread, page)


@step
def uvm_va_block_find_create_managed(va_space: VaSpace, thread: Thread, page: int) -> VaBlock:
    """Return the block of a page known to be managed (uvm_va_block.c)."""
    block = uvm_va_block_find_create_in_range(va_space, thread, page)
    assert block is not None
    return block
