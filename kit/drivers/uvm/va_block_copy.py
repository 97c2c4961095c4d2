"""uvm_va_block.c, copies: from one processor's memory to another's, in records as tools see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.perf_thrashing_events import thrashing_notify_migration
from kit.drivers.uvm.types import BLOCK_PAGES, CPU, GPU, PAGE_SHIFT, VaBlock, VaSpace
from kit.drivers.uvm.va_block_populate import BlockContext
from kit.memory.columns import copy, marked
from kit.memory.table.pagemask import PageMask, bools, cut_counts, cut_runs, from_pages, holds, runs
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["block_copy_resident_pages", "block_settle", "settle_late"]

# uvm_make_resident_cause_t -> migration cause that tools see
TOOLS_CAUSE: Final = {"fault": "coherence", "eviction": "eviction", "api": "user", "range_group": "coherence"}


@step
def block_copy_resident_pages(
    block: VaBlock, thread: Thread, context: BlockContext, mask: PageMask, prefetched: PageMask, duplicate: bool = False
) -> None:
    """Copy from every processor that holds wanted pages (uvm_va_block.c)."""
    dest = context.dest
    leaving = mask & ~block.resident[dest] & block.resident[1 - dest]
    if leaving:
        block_settle(block, 1 - dest, leaving)
        leaving &= ~block.discarded
    if leaving:
        block_copy_resident_pages_mask(block, thread, context, leaving, prefetched, duplicate)


@step
def block_copy_resident_pages_mask(
    block: VaBlock, thread: Thread, context: BlockContext, mask: PageMask, prefetched: PageMask, duplicate: bool
) -> None:
    """Sources from the closest to the farthest: with one GPU there is one (uvm_va_block.c)."""
    block_copy_resident_pages_from(block, thread, context, mask, prefetched, duplicate)


@step
def block_copy_resident_pages_from(
    block: VaBlock, thread: Thread, context: BlockContext, mask: PageMask, prefetched: PageMask, duplicate: bool
) -> None:
    """One source processor, its NUMA nodes one by one: here one node (uvm_va_block.c)."""
    block_copy_resident_pages_between(block, thread, context, mask, prefetched, duplicate)


@step
def block_copy_resident_pages_between(
    block: VaBlock, thread: Thread, context: BlockContext, mask: PageMask, prefetched: PageMask, duplicate: bool
) -> None:
    """One push of copies; a record ends where pages are not adjacent or their cause changes (uvm_va_block.c)."""
    va_space = block.range.va_space
    gpu, trace = va_space.gpu, thread.engine.trace
    dest, source = context.dest, 1 - context.dest
    if source == CPU and not gpu.hal.replayable_faults:
        mask &= ~block.clean
        if not mask:
            return
    cause = TOOLS_CAUSE[context.cause]
    counts = cut_counts(mask, prefetched)
    if dest == GPU:
        times, channel, actor = gpu.copy_htod, gpu.cpu_to_gpu, "copy HtoD"
    else:
        times, channel, actor = gpu.copy_dtoh, gpu.gpu_to_cpu, "copy DtoH"
    # One command a copy when both sides hold the block in a single chunk, else one a page (section 7.1).
    chunk = block.cpu_chunks.get(0)
    whole = chunk is not None and chunk[2] == BLOCK_PAGES == block.pages
    pages = mask.bit_count()
    thread.charge(gpu.costs.push + (len(counts) if whole else pages) * gpu.costs.copy_command)
    thread.note(block.va, pages, bytes=pages << PAGE_SHIFT, cause=cause)
    duration = 0.0
    for count in counts:
        duration += times[count]
    start, block.tracker = channel.push(thread, duration, after=block.tracker)
    src, dst, ids = 1 << source, 1 << dest, trace.causes.ids
    causes = ids[cause], ids["prefetch"] if mask & prefetched else 0
    trace.copied(
        "UvmEventTypeMigration", actor, thread.row, len(counts), src, src if duplicate else dst,
        _lay_out, start, times, block.first, mask, prefetched, causes,
    )  # fmt: skip
    _copy(block, dest, mask)
    for count in counts:  # the end of the last copy, rounded as each of them is
        start += times[count]
    context.did_copy, context.copies_end = True, start
    context.pages_changed_residency |= mask
    context.pages_copied |= mask
    if dest == CPU and not gpu.hal.replayable_faults:
        block.clean |= mask
    thrashing_notify_migration(block, thread, mask, dest, context.cause)


def _lay_out(
    start: float, times: list[float], base: int, mask: PageMask, prefetched: PageMask, causes: tuple[int, int]
) -> Iterator[tuple[float, float, int, int, int]]:  # fmt: skip
    """Yield start, end, first page, number of pages and cause's id of each copy of a push (`Trace.copied`)."""
    for page, count in cut_runs(mask, prefetched):
        done = start + times[count]
        yield start, done, base + page, count, causes[holds(prefetched, page)]
        start = done


def _copy(block: VaBlock, dest: int, mask: PageMask) -> None:
    """Copy the content of the pages of `mask` to `dest`."""
    va_space = block.range.va_space
    into, source = va_space.gpu.frames.payload, va_space.host.payload
    if dest == CPU:
        into, source = source, into
    there, here = block.base(dest), block.base(1 - dest)
    if there < 0 or here < 0:
        moved = bools(mask, block.pages)
        into[block.frames[dest][moved]] = source[block.frames[1 - dest][moved]]
    else:
        copy(into, there, source, here, runs(mask))


def settle_late(va_space: VaSpace, pages: NDArray[np.int64]) -> None:
    """Bring writes into both copies of pages that are read-duplicated: those writes came before the copying did.

    The push that took the right to write was still to be executed, and the copy is behind it. The pages, ascending,
    were of one block then, and are of several where advice has split it.
    """
    while len(pages):
        va_range = va_space.find(int(pages[0]))
        if va_range is None:
            return  # freed meanwhile
        block = va_range.blocks[int(pages[0]) // BLOCK_PAGES]
        inside = pages < block.first + block.pages
        written = from_pages(pages[inside] - block.first) & block.resident[CPU] & block.resident[GPU]
        if written:
            block_settle(block, GPU, written)
            _copy(block, CPU, written)
        pages = pages[~inside]


def block_settle(block: VaBlock, processor: int, mask: PageMask) -> None:
    """Bring the program's writes to the pages of `mask` into the frames that hold them at `processor`."""
    va_space = block.range.va_space
    content, slot = va_space.content, block.slot[GPU]
    pool, base = (va_space.host, va_space.gpu.frames)[processor], block.base(processor)
    if not marked(content.marks, slot, runs(mask)):
        return
    if base >= 0 and not block.clean:
        content.settle_runs(slot, runs(mask), pool, base)
        return
    pages = (content.dirty[slot : slot + block.pages] & bools(mask, block.pages)).nonzero()[0]
    if len(pages):
        block.clean &= ~from_pages(pages)
        content.settle(slot + pages, pool, block.frames[processor][pages])
