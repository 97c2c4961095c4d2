"""uvm_va_block.c, residency: populate, copy, make resident. Unmap, wait, copy, then map: in that order."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from kit.drivers.uvm.perf_thrashing import thrashing_notify_migration
from kit.drivers.uvm.pmm_gpu import Chunk
from kit.drivers.uvm.types import (
    BIG_PAGES,
    BLOCK_PAGES,
    CPU,
    GPU,
    PAGE,
    READ_WRITE,
    MoreProcessingRequired,
    VaBlock,
)
from kit.drivers.uvm.va_block_map import uvm_va_block_revoke_prot, uvm_va_block_unmap, uvm_va_block_unmap_mask
from kit.errors import DriverError
from kit.memory.pagemask import bools, first_page, from_pages, region, runs, selection
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.uvm.gpu import Gpu

__all__ = [
    "BlockContext", "block_settle", "uvm_va_block_make_resident", "uvm_va_block_make_resident_copy",
    "uvm_va_block_make_resident_finish", "uvm_va_block_make_resident_read_duplicate", "uvm_va_block_retry_deinit",
]  # fmt: skip

# uvm_make_resident_cause_t -> migration cause that tools see
TOOLS_CAUSE = {"fault": "coherence", "eviction": "eviction", "api": "user", "range_group": "coherence"}


@dataclass(slots=True)
class BlockContext:
    """State of one block operation: chunks of a retry, and what the last make-resident did."""

    dest: int = CPU
    cause: str = "fault"
    pages_changed_residency: int = 0
    did_copy: bool = False
    pages_copied: int = 0
    copies_end: float = 0.0
    free_chunks: list[Chunk] = field(default_factory=list)
    used_chunks: list[Chunk] = field(default_factory=list)


@step
def uvm_va_block_retry_deinit(context: BlockContext, thread: Thread, gpu: Gpu) -> None:
    """End of a block operation: unpin what it used, free what it did not (uvm_va_block.c)."""
    for chunk in context.used_chunks:
        gpu.pmm.unpin(chunk)
    for chunk in context.free_chunks:
        chunk.root.pins -= 1
        gpu.pmm.free(thread, chunk)
    context.used_chunks, context.free_chunks = [], []


@waiting_step
def uvm_va_block_make_resident(
    block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: int, prefetched: int, cause: str
) -> Wait:
    """Copy and take over residency in one go (uvm_va_block.c)."""
    yield from uvm_va_block_make_resident_copy(block, thread, context, dest, mask, prefetched, cause)
    uvm_va_block_make_resident_finish(block, thread, context, mask)


@waiting_step
def uvm_va_block_make_resident_copy(
    block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: int, prefetched: int, cause: str
) -> Wait:
    """Unmap what must move, populate the destination, copy (uvm_va_block.c)."""
    thread.note(va=block.va, pages=mask.bit_count())
    context.dest, context.cause, context.pages_copied = dest, cause, 0
    block_resident_mask_get_alloc(block, thread, dest)
    mappers = _mappers(block)
    uvm_va_block_unmap_mask(block, thread, mappers, mask & ~block.resident[dest])
    duplicates = mask & block.read_duplicated
    uvm_va_block_unmap_mask(block, thread, tuple(p for p in mappers if p != dest), duplicates)
    for first, count in runs(duplicates):
        thread.engine.trace.span(
            "UvmEventTypeReadDuplicateInvalidate", "gpu", thread.now, thread.now, parent=thread.row,
            va=block.va + first * PAGE, pages=count, bytes=count * PAGE,
        )  # fmt: skip
    yield from block_populate_pages(block, thread, context, dest, mask)
    block_copy_resident_pages(block, thread, context, mask, prefetched)


@step
def block_resident_mask_get_alloc(block: VaBlock, thread: Thread, dest: int) -> None:
    """The destination's residency; for a GPU its state in the block, made at first use (uvm_va_block.c)."""
    if dest == GPU and not block.gpu_state:
        uvm_va_block_gpu_state_get_alloc(block, thread)


@waiting_step
def uvm_va_block_make_resident_read_duplicate(
    block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: int, prefetched: int, cause: str
) -> Wait:
    """Give the destination a copy of its own; everybody is left with read rights (uvm_va_block.c)."""
    thread.note(va=block.va, pages=mask.bit_count())
    context.dest, context.cause = dest, cause
    for holder in (CPU, GPU):
        entering = mask & ~block.read_duplicated & block.resident[holder]
        if entering:
            block_prep_read_duplicate_mapping(block, thread, holder, entering)
    yield from block_populate_pages(block, thread, context, dest, mask)
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
    for first, count in runs(elsewhere):
        trace.span(
            "UvmEventTypeReadDuplicate", "gpu", thread.now, thread.now, parent=thread.row, va=block.va + first * PAGE,
            pages=count, bytes=count * PAGE,
        )  # fmt: skip
    block_mark_memory_used(block, dest)


@step
def block_prep_read_duplicate_mapping(block: VaBlock, thread: Thread, holder: int, mask: int) -> None:
    """Unmap everybody but the holder of the copy, and take its write rights (uvm_va_block.c)."""
    for processor in _mappers(block):
        if processor != holder:
            uvm_va_block_unmap(block, thread, processor, mask)
    uvm_va_block_revoke_prot(block, thread, holder, mask, READ_WRITE)


@step
def uvm_va_block_make_resident_finish(block: VaBlock, thread: Thread, context: BlockContext, mask: int) -> None:
    """Update residency after the copies, drop duplicates, refresh the eviction order (uvm_va_block.c)."""
    dest, other = context.dest, 1 - context.dest
    nowhere = mask & ~(block.resident[CPU] | block.resident[GPU])
    trace = thread.engine.trace
    for first, count in runs(nowhere):
        trace.move(thread.now, thread.now, block.first + first, count, 0, 1 << dest, "populate")
    for first, count in runs(mask & block.read_duplicated):
        trace.move(thread.now, thread.now, block.first + first, count, 3, 1 << dest, "collapse")
    context.pages_changed_residency |= nowhere
    moved = mask & block.resident[other]
    for first, count in runs(moved & ~context.pages_copied & ~block.read_duplicated):
        trace.move(thread.now, thread.now, block.first + first, count, 1 << other, 1 << dest, "clean")
    block.resident[dest] |= mask
    block.read_duplicated &= ~mask
    block.resident[other] &= ~mask
    if context.cause == "api":
        block.discarded &= ~mask
    if moved and other == GPU and not block.resident[GPU] and block.whole and block.gpu_chunks:
        block.range.va_space.gpu.pmm.mark_unused(block.gpu_chunks[0].root)
    if block.resident[dest]:
        block_mark_memory_used(block, dest)


def block_mark_memory_used(block: VaBlock, dest: int) -> None:
    """Append the root chunk to the eviction order: full 2 MiB blocks only (uvm_va_block.c)."""
    if dest == GPU and block.whole and block.gpu_chunks and block.gpu_chunks[0].pages == BLOCK_PAGES:
        block.range.va_space.gpu.pmm.mark_used(block.gpu_chunks[0].root)


@waiting_step
def block_populate_pages(block: VaBlock, thread: Thread, context: BlockContext, dest: int, mask: int) -> Wait:
    """Get memory at the destination for pages not resident there (uvm_va_block.c)."""
    wanted = mask & ~block.resident[dest]
    if not wanted:
        return
    if dest == GPU:
        yield from uvm_va_block_populate_pages_gpu(block, thread, context, wanted)
    else:
        block_populate_pages_cpu(block, thread, wanted)


@step
def block_populate_pages_cpu(block: VaBlock, thread: Thread, wanted: int) -> None:
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
        while count > va_space.host.capacity - va_space.host.used and "+" in sizes:
            sizes = sizes.rpartition("+")[0]  # no chunk of that size is left: a smaller one
            first, count, each = _cpu_chunk(block, sizes, at, held, todo)
        frame = va_space.host.alloc(count)
        if region(first, count) & ~(block.resident[CPU] | block.resident[GPU]):
            va_space.host.zero(slice(frame, frame + count))
            thread.charge(count * costs.cpu_zero_page)
        frames[first : first + count] = range(frame, frame + count)
        block.cpu_chunks[first] = (frame, count, each)
        held |= region(first, count)
        todo &= ~held
        chunks += count // each
    thread.charge(chunks * costs.cpu_alloc_chunk)
    if block.gpu_state:
        thread.charge(chunks * costs.dma_map)


def _cpu_chunk(block: VaBlock, sizes: str, at: int, held: int, todo: int) -> tuple[int, int, int]:
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
def uvm_va_block_populate_pages_gpu(block: VaBlock, thread: Thread, context: BlockContext, wanted: int) -> Wait:
    """Populate every GPU chunk that covers wanted pages (uvm_va_block.c)."""
    todo = wanted
    while todo:
        first, pages = _gpu_chunk(block, first_page(todo))
        if first not in block.gpu_chunks:
            yield from block_populate_gpu_chunk(block, thread, context, first, pages)
        todo &= ~region(first, pages)


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
    """Allocate one chunk, zero what must be zero, hand it to the block (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    if not block.gpu_state:
        uvm_va_block_gpu_state_get_alloc(block, thread)
    chunk = yield from block_alloc_gpu_chunk(block, thread, context, pages)
    block.tracker = max(block.tracker, chunk.root.tracker)
    block_zero_new_gpu_chunk(block, thread, chunk, first)
    gpu.pmm.own(chunk, block, first)
    block.gpu_chunks[first] = chunk
    block.frames[GPU][first : first + pages] = range(chunk.frame, chunk.frame + pages)
    gpu.frames.ensure(chunk.frame + pages)
    context.used_chunks.append(chunk)


@waiting_step
def block_alloc_gpu_chunk(block: VaBlock, thread: Thread, context: BlockContext, pages: int) -> Wait:
    """Take a chunk kept from an earlier try, a free one, or evict with the block unlocked (uvm_va_block.c).

    Raises
    ------
    MoreProcessingRequired
        Memory was evicted meanwhile: the block operation starts again.
    """
    for index, kept in enumerate(context.free_chunks):
        if kept.pages == pages:
            return context.free_chunks.pop(index)
    pmm = block.range.va_space.gpu.pmm
    try:
        return (yield from pmm.uvm_pmm_gpu_alloc_user(thread, pages, evict=False))
    except DriverError as error:
        if error.status != "NV_ERR_NO_MEMORY":
            raise
    yield from block.lock.release(thread)
    try:
        chunk = yield from pmm.uvm_pmm_gpu_alloc_user(thread, pages, evict=True)
    finally:
        yield from block.lock.acquire(thread)
    context.free_chunks.append(chunk)
    raise MoreProcessingRequired


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


@step
def block_copy_resident_pages(
    block: VaBlock, thread: Thread, context: BlockContext, mask: int, prefetched: int, duplicate: bool = False
) -> None:
    """Copy from every processor that holds wanted pages (uvm_va_block.c)."""
    dest = context.dest
    leaving = mask & ~block.resident[dest] & block.resident[1 - dest]
    if leaving:
        block_settle(block, 1 - dest, leaving)
    if leaving & ~block.discarded:
        block_copy_resident_pages_mask(block, thread, context, leaving & ~block.discarded, prefetched, duplicate)


@step
def block_copy_resident_pages_mask(
    block: VaBlock, thread: Thread, context: BlockContext, mask: int, prefetched: int, duplicate: bool
) -> None:
    """Sources from the closest to the farthest: with one GPU there is one (uvm_va_block.c)."""
    block_copy_resident_pages_from(block, thread, context, mask, prefetched, duplicate)


@step
def block_copy_resident_pages_from(
    block: VaBlock, thread: Thread, context: BlockContext, mask: int, prefetched: int, duplicate: bool
) -> None:
    """One source processor, its NUMA nodes one by one: here one node (uvm_va_block.c)."""
    block_copy_resident_pages_between(block, thread, context, mask, prefetched, duplicate)


@step
def block_copy_resident_pages_between(
    block: VaBlock, thread: Thread, context: BlockContext, mask: int, prefetched: int, duplicate: bool
) -> None:
    """One push of copies; a record ends where pages are not adjacent or their cause changes (uvm_va_block.c)."""
    va_space = block.range.va_space
    gpu, trace = va_space.gpu, thread.engine.trace
    dest, source = context.dest, 1 - context.dest
    clean = mask & block.clean if source == CPU and not gpu.hal.replayable_faults else 0
    mask &= ~clean
    if not mask:
        return
    cause = TOOLS_CAUSE[context.cause]
    copies = [(block.first + first, count, cause) for first, count in runs(mask & ~prefetched)]
    if mask & prefetched:
        copies += [(block.first + first, count, "prefetch") for first, count in runs(mask & prefetched)]
        copies.sort()
    curve, channel, actor = (
        (gpu.copy_htod, gpu.cpu_to_gpu, "copy HtoD") if dest == GPU else (gpu.copy_dtoh, gpu.gpu_to_cpu, "copy DtoH")
    )
    durations = [curve(count * PAGE) for _, count, _ in copies]
    # One command a copy when both sides hold the block in a single chunk, else one a page (section 7.1).
    whole = block.whole and 0 in block.cpu_chunks and block.cpu_chunks[0][2] == BLOCK_PAGES
    pages = mask.bit_count()
    thread.charge(gpu.costs.push + (len(copies) if whole else pages) * gpu.costs.copy_command)
    thread.note(va=block.va, pages=pages, bytes=pages * PAGE, cause=cause)
    start, block.tracker = channel.push(thread, sum(durations), after=block.tracker)
    times = list(accumulate(durations, initial=start))
    src, dst = 1 << source, 1 << dest
    trace.copied("UvmEventTypeMigration", actor, thread.row, times, copies, src, src if duplicate else dst)
    pools, moved = (va_space.host, gpu.frames), selection(mask, block.pages)
    pools[dest].payload[block.frames_at(dest, moved)] = pools[source].payload[block.frames_at(source, moved)]
    context.did_copy, context.copies_end = True, times[-1]
    context.pages_changed_residency |= mask
    context.pages_copied |= mask
    if dest == CPU:
        block.clean |= mask
    thrashing_notify_migration(block, thread, mask, dest, context.cause)


def block_settle(block: VaBlock, processor: int, mask: int) -> None:
    """Bring the program's writes to the pages of `mask` into the frames that hold them at `processor`."""
    va_space = block.range.va_space
    content, slot = va_space.content, block.slot[GPU]
    dirty, moved = content.dirty[slot : slot + block.pages], selection(mask, block.pages)
    written = np.count_nonzero(dirty[moved])
    if not written:
        return
    pool = (va_space.host, va_space.gpu.frames)[processor]
    if isinstance(moved, slice) and written == moved.stop - moved.start:
        block.clean &= ~mask
        content.settle(slice(slot + moved.start, slot + moved.stop), pool, block.frames_at(processor, moved))
        return
    pages = (dirty & bools(mask, block.pages)).nonzero()[0]
    if block.clean:
        block.clean &= ~from_pages(pages)
    content.settle(slot + pages, pool, block.frames[processor][pages])


def _mappers(block: VaBlock) -> tuple[int, ...]:
    """Processors whose mappings a move removes, the CPU first; UVM-Lite GPUs keep theirs."""
    return (CPU, GPU) if block.range.va_space.gpu.hal.replayable_faults else (CPU,)
