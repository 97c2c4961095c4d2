"""uvm_va_block.c, population: memory for a block's pages, in host and GPU chunks of the documented sizes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kit.drivers.uvm.pmm_chunks import Chunk
from kit.drivers.uvm.types import BIG_PAGES, BLOCK_PAGES, CPU, GPU, NV_ERR_MORE_PROCESSING_REQUIRED, NV_OK, VaBlock
from kit.errors import DriverError
from kit.memory.columns import ramp
from kit.memory.reclaim.alloc import alloc_pages_exact
from kit.memory.table.pagemask import EMPTY, PageMask, first_page, region, runs
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.uvm.gpu import Gpu

__all__ = ["BlockContext", "block_populate_pages", "uvm_va_block_gpu_state_get_alloc", "uvm_va_block_retry_deinit"]


class BlockContext:
    """State of one block operation: chunks of a retry, and what the last make-resident did."""

    def __init__(self) -> None:
        self.dest, self.cause = CPU, "fault"
        self.pages_changed_residency = self.pages_copied = EMPTY
        self.did_copy, self.copies_end = False, 0.0
        self.free_chunks: list[Chunk] = []
        self.used_chunks: list[Chunk] = []


@step
def uvm_va_block_retry_deinit(context: BlockContext, thread: Thread, gpu: Gpu) -> None:
    """End of a block operation: unpin what it used, free what it did not (uvm_va_block.c)."""
    for chunk in context.used_chunks:
        gpu.pmm.unpin(chunk)
    for chunk in context.free_chunks:
        chunk.root.pins -= 1
        gpu.pmm.free(thread, chunk)
    context.used_chunks.clear()
    context.free_chunks.clear()


@waiting_step
def block_populate_pages(block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: PageMask) -> Wait:
    """Get memory at the destination for pages not resident there; returns NV_STATUS (uvm_va_block.c)."""
    wanted = mask & ~block.resident[dest]
    if not wanted:
        return NV_OK
    if dest == GPU:
        return (yield from uvm_va_block_populate_pages_gpu(block, thread, context, wanted))
    block_populate_pages_cpu(block, thread, wanted)
    return NV_OK


@step
def block_populate_pages_cpu(block: VaBlock, thread: Thread, wanted: PageMask) -> None:
    """Allocate CPU chunks, the largest that fit first (uvm_va_block.c)."""
    va_space = block.range.va_space
    costs, frames = va_space.gpu.costs, block.frames[CPU]
    held = block.populated(CPU)
    sizes = va_space.module.cpu_chunk_allocation_sizes if va_space.gpu.hal.replayable_faults else "4K"
    chunks = 0
    todo = wanted & ~held
    while todo:
        at = first_page(todo)
        first, count, each = _cpu_chunk(block, sizes, at, held, todo)
        frame = alloc_pages_exact(va_space.host, count)
        while frame is None and "+" in sizes:
            sizes = sizes.rpartition("+")[0]  # no chunk of that size is left: a smaller one
            first, count, each = _cpu_chunk(block, sizes, at, held, todo)
            frame = alloc_pages_exact(va_space.host, count)
        if frame is None:
            why = f"host memory has no {count} frames left"
            raise DriverError(errno.ENOMEM, "NV_ERR_NO_MEMORY", "alloc_pages", why)
        if region(first, count) & ~(block.resident[CPU] | block.resident[GPU]):
            va_space.host.zero(slice(frame, frame + count))
            thread.charge(count * costs.cpu_zero_page)
        ramp(frames, first, ((0, count),), frame)
        block.cpu_chunks[first] = (frame, count, each)
        held |= region(first, count)
        todo &= ~held
        chunks += count // each
    thread.charge(chunks * costs.cpu_alloc_chunk)
    if block.gpu_state:
        thread.charge(chunks * costs.dma_map)


def _cpu_chunk(block: VaBlock, sizes: str, at: int, held: PageMask, todo: PageMask) -> tuple[int, int, int]:
    """Return (first page, pages, pages a chunk) of the largest aligned chunk around page `at`.

    Single 4 KiB chunks are taken a run at a time, which allocates the same frames in one go.
    """
    if "2M" in sizes and block.whole and not held:
        return 0, BLOCK_PAGES, BLOCK_PAGES
    if "64K" in sizes:
        first = at - (block.first + at) % BIG_PAGES
        around = region(max(first, 0), BIG_PAGES)
        if first >= 0 and first + BIG_PAGES <= block.pages and not around & held:
            return first, BIG_PAGES, BIG_PAGES
        return at, 1, 1
    length = runs(todo)[0][1]
    return at, length, 1


@waiting_step
def uvm_va_block_populate_pages_gpu(block: VaBlock, thread: Thread, context: BlockContext, wanted: PageMask) -> Wait:
    """Populate every GPU chunk that covers wanted pages; returns NV_STATUS (uvm_va_block.c)."""
    todo = wanted
    while todo:
        first, pages = _gpu_chunk(block, first_page(todo))
        if first not in block.gpu_chunks:
            status: int = yield from block_populate_gpu_chunk(block, thread, context, first, pages)
            if status != NV_OK:
                return status
        todo &= ~region(first, pages)
    return NV_OK


@step
def uvm_va_block_gpu_state_get_alloc(block: VaBlock, thread: Thread) -> None:
    """First GPU operation on the block: state, and DMA mappings of the CPU chunks it has."""
    block.gpu_state = True
    costs = block.range.va_space.gpu.costs
    chunks = sum(count // each for _, count, each in block.cpu_chunks.values())
    thread.charge(costs.gpu_state + chunks * costs.dma_map)


def _gpu_chunk(block: VaBlock, page: int) -> tuple[int, int]:
    """Return (first page, pages) of the chunk that backs `page`: 2 MiB, 64 KiB, 4 KiB at unaligned ends."""
    if block.whole:
        return 0, BLOCK_PAGES
    first = page - (block.first + page) % BIG_PAGES
    if first >= 0 and first + BIG_PAGES <= block.pages:
        return first, BIG_PAGES
    return page, 1


@waiting_step
def block_populate_gpu_chunk(block: VaBlock, thread: Thread, context: BlockContext, first: int, pages: int) -> Wait:
    """Allocate one chunk, zero what must be zero, hand it to the block; returns NV_STATUS (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    if not block.gpu_state:
        uvm_va_block_gpu_state_get_alloc(block, thread)
    chunk = yield from block_alloc_gpu_chunk(block, thread, context, pages)
    if chunk is None:
        return NV_ERR_MORE_PROCESSING_REQUIRED
    block.tracker = max(block.tracker, chunk.root.tracker)
    block_zero_new_gpu_chunk(block, thread, chunk, first)
    gpu.pmm.own(chunk, block, first)
    block.gpu_chunks[first], frame = chunk, chunk.frame
    ramp(block.frames[GPU], first, ((0, pages),), frame)
    gpu.frames.ensure(frame + pages)
    context.used_chunks.append(chunk)
    return NV_OK


@waiting_step
def block_alloc_gpu_chunk(block: VaBlock, thread: Thread, context: BlockContext, pages: int) -> Wait:
    """Take a chunk kept from an earlier try, a free one, or evict with the block unlocked (uvm_va_block.c).

    Returns None where memory was evicted: NV_ERR_MORE_PROCESSING_REQUIRED.
    """
    for index, kept in enumerate(context.free_chunks):
        if kept.pages == pages:
            return context.free_chunks.pop(index)
    pmm = block.range.va_space.gpu.pmm
    chunk = yield from pmm.uvm_pmm_gpu_alloc_user(thread, pages, evict=False)
    if chunk is not None:
        return chunk
    yield from block.lock.release(thread)
    try:
        chunk = yield from pmm.uvm_pmm_gpu_alloc_user(thread, pages, evict=True)
    finally:
        yield from block.lock.acquire(thread)
    context.free_chunks.append(chunk)
    return None


@step
def block_zero_new_gpu_chunk(block: VaBlock, thread: Thread, chunk: Chunk, first: int) -> None:
    """Clear the pages of a new chunk that are resident nowhere, one memset a run (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    gpu.frames.ensure(chunk.frame + chunk.pages)
    nowhere = region(first, chunk.pages) & ~(block.resident[CPU] | block.resident[GPU])
    if chunk.zeroed or not nowhere:
        return
    duration = gpu.costs.membar_sys
    for at, count in runs(nowhere):
        start = chunk.frame + at - first
        gpu.frames.zero(slice(start, start + count))
        duration += count * gpu.costs.zero_page
    thread.charge(gpu.costs.push)
    _, block.tracker = gpu.gpu_internal.push(thread, duration, after=block.tracker)
