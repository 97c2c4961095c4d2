"""uvm_va_block.c, residency: unmap, wait, copy, then map, in that order."""

from __future__ import annotations

from kit.drivers.uvm.types import BLOCK_PAGES, CPU, GPU, NV_OK, PAGE_SHIFT, READ_WRITE, VaBlock
from kit.drivers.uvm.va_block_copy import block_copy_resident_pages
from kit.drivers.uvm.va_block_map import uvm_va_block_revoke_prot, uvm_va_block_unmap, uvm_va_block_unmap_mask
from kit.drivers.uvm.va_block_populate import BlockContext, block_populate_pages, uvm_va_block_gpu_state_get_alloc
from kit.memory.table.pagemask import EMPTY, PageMask, runs
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = [
    "uvm_va_block_make_resident", "uvm_va_block_make_resident_copy", "uvm_va_block_make_resident_finish",
    "uvm_va_block_make_resident_read_duplicate",
]  # fmt: skip


@waiting_step
def uvm_va_block_make_resident(
    block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: PageMask, prefetched: PageMask, cause: str
) -> Wait:
    """Copy and take over residency in one go; returns NV_STATUS (uvm_va_block.c)."""
    status: int = yield from uvm_va_block_make_resident_copy(block, thread, context, dest, mask, prefetched, cause)
    if status == NV_OK:
        uvm_va_block_make_resident_finish(block, thread, context, mask)
    return status


@waiting_step
def uvm_va_block_make_resident_copy(
    block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: PageMask, prefetched: PageMask, cause: str
) -> Wait:
    """Unmap what must move, populate the destination, copy; returns NV_STATUS (uvm_va_block.c)."""
    thread.note(block.va, mask.bit_count())
    context.dest, context.cause, context.pages_copied = dest, cause, EMPTY
    block_resident_mask_get_alloc(block, thread, dest)
    mappers = _mappers(block)
    uvm_va_block_unmap_mask(block, thread, mappers, mask & ~block.resident[dest])
    duplicates = mask & block.read_duplicated
    uvm_va_block_unmap_mask(block, thread, (1 - dest,) if 1 - dest in mappers else (), duplicates)
    for first, count in runs(duplicates) if duplicates else ():
        thread.engine.trace.span(
            "UvmEventTypeReadDuplicateInvalidate", "gpu", thread.now, thread.now, parent=thread.row,
            va=block.va + (first << PAGE_SHIFT), pages=count, bytes=count << PAGE_SHIFT,
        )  # fmt: skip
    status: int = yield from block_populate_pages(block, thread, context, dest, mask)
    if status == NV_OK:
        block_copy_resident_pages(block, thread, context, mask, prefetched)
    return status


@step
def block_resident_mask_get_alloc(block: VaBlock, thread: Thread, dest: int) -> None:
    """The destination's residency; for a GPU its state in the block, made at first use (uvm_va_block.c)."""
    if dest == GPU and not block.gpu_state:
        uvm_va_block_gpu_state_get_alloc(block, thread)


@waiting_step
def uvm_va_block_make_resident_read_duplicate(
    block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: PageMask, prefetched: PageMask, cause: str
) -> Wait:
    """Give the destination a copy of its own; all are left with read rights; returns NV_STATUS (uvm_va_block.c)."""
    thread.note(block.va, mask.bit_count())
    context.dest, context.cause = dest, cause
    for holder in (CPU, GPU):
        entering = mask & ~block.read_duplicated & block.resident[holder]
        if entering:
            block_prep_read_duplicate_mapping(block, thread, holder, entering)
    status: int = yield from block_populate_pages(block, thread, context, dest, mask)
    if status != NV_OK:
        return status
    elsewhere = mask & block.resident[1 - dest]
    block_copy_resident_pages(block, thread, context, mask, prefetched, duplicate=True)
    trace = thread.engine.trace
    arriving = mask & ~block.resident[dest]
    for first, count in runs(arriving & elsewhere):
        trace.move(thread.now, thread.now, block.first + first, count, 1 << (1 - dest), 3, "duplicate")
    for first, count in runs(arriving & ~elsewhere):
        trace.move(thread.now, thread.now, block.first + first, count, 0, 1 << dest, "populate")
    block.resident[dest] |= mask
    block.read_duplicated |= elsewhere & mask
    block.range.va_space.duplicates = True
    for first, count in runs(elsewhere):
        trace.span(
            "UvmEventTypeReadDuplicate", "gpu", thread.now, thread.now, parent=thread.row,
            va=block.va + (first << PAGE_SHIFT), pages=count, bytes=count << PAGE_SHIFT,
        )  # fmt: skip
    block_mark_memory_used(block, dest)
    return NV_OK


@step
def block_prep_read_duplicate_mapping(block: VaBlock, thread: Thread, holder: int, mask: PageMask) -> None:
    """Unmap everybody but the holder of the copy, and take its write rights (uvm_va_block.c)."""
    for processor in _mappers(block):
        if processor != holder:
            uvm_va_block_unmap(block, thread, processor, mask)
    uvm_va_block_revoke_prot(block, thread, holder, mask, READ_WRITE)


@step
def uvm_va_block_make_resident_finish(block: VaBlock, thread: Thread, context: BlockContext, mask: PageMask) -> None:
    """Update residency after the copies, drop duplicates, refresh the eviction order (uvm_va_block.c)."""
    dest, other, resident = context.dest, 1 - context.dest, block.resident
    nowhere = mask & ~(resident[CPU] | resident[GPU])
    moved = mask & resident[other]
    duplicated = mask & block.read_duplicated
    clean = moved & ~(context.pages_copied | duplicated)
    if nowhere:
        _moves(block, thread, nowhere, 0, 1 << dest, "populate")
        context.pages_changed_residency |= nowhere
    if duplicated:
        _moves(block, thread, duplicated, 3, 1 << dest, "collapse")
        block.read_duplicated &= ~mask
    if clean:
        _moves(block, thread, clean, 1 << other, 1 << dest, "clean")
    resident[dest] |= mask
    resident[other] &= ~mask
    if context.cause == "api":
        block.discarded &= ~mask
    if moved and other == GPU and not resident[GPU] and block.whole and block.gpu_chunks:
        block.range.va_space.gpu.pmm.mark_unused(block.gpu_chunks[0].root)
    if resident[dest]:
        block_mark_memory_used(block, dest)


def _moves(block: VaBlock, thread: Thread, mask: PageMask, src: int, dst: int, cause: str) -> None:
    """Pages change place without a copy."""
    for first, count in runs(mask):
        thread.engine.trace.move(thread.now, thread.now, block.first + first, count, src, dst, cause)


def block_mark_memory_used(block: VaBlock, dest: int) -> None:
    """Append the root chunk to the eviction order: full 2 MiB blocks only (uvm_va_block.c)."""
    if dest == GPU and block.pages == BLOCK_PAGES:
        chunk = block.gpu_chunks.get(0)
        if chunk is not None and chunk.pages == BLOCK_PAGES:
            block.range.va_space.gpu.pmm.mark_used(chunk.root)


def _mappers(block: VaBlock) -> tuple[int, ...]:
    """Processors whose mappings a move removes, the CPU first; UVM-Lite GPUs keep theirs."""
    return (CPU, GPU) if block.range.va_space.gpu.hal.replayable_faults else (CPU,)
