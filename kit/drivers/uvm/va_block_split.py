"""uvm_va_range.c and uvm_va_block.c, splitting: advice for part of a range gives that part its own blocks."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np

from kit.drivers.uvm.pmm_chunks import Chunk
from kit.drivers.uvm.types import BIG_PAGES, BLOCK_PAGES, CPU, GPU, VaBlock, VaRange, VaSpace
from kit.errors import DriverError
from kit.memory.table.pagemask import EMPTY, region
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["split_span_as_needed"]


@waiting_step
def split_span_as_needed(va_space: VaSpace, thread: Thread, first: int, pages: int) -> Wait:
    """Return the ranges that make up [first, first + pages), split at its ends (uvm_policy.c).

    Raises
    ------
    DriverError
        EINVAL: pages outside managed memory.
    """
    for at in (first, first + pages):
        va_range = va_space.find(at)
        if va_range is not None and va_range.first != at:
            yield from split_as_needed(va_space, thread, va_range, at)
    found = [r for r in va_space.ranges if r.first < first + pages and first < r.end]
    if sum(r.pages for r in found) != pages:
        raise DriverError(
            errno.EINVAL, "NV_ERR_INVALID_ADDRESS", "split_span_as_needed", "not all of it is managed memory"
        )
    return found


@waiting_step
def split_as_needed(va_space: VaSpace, thread: Thread, va_range: VaRange, at: int) -> Wait:
    """Split a range at page `at` (uvm_policy.c)."""
    yield from uvm_va_range_split(va_space, thread, va_range, at)


@waiting_step
def uvm_va_range_split(va_space: VaSpace, thread: Thread, va_range: VaRange, at: int) -> Wait:
    """The upper part becomes a range of its own, with the same policy (uvm_va_range.c)."""
    upper = VaRange(
        at, va_range.end - at, va_range.vma, va_space, va_range.slot + at - va_range.first, replace(va_range.policy),
        migratable=va_range.migratable,
    )  # fmt: skip
    yield from uvm_va_range_split_blocks(va_range, thread, upper)
    va_range.pages = at - va_range.first
    va_space.ranges.insert(va_space.ranges.index(va_range) + 1, upper)


@waiting_step
def uvm_va_range_split_blocks(va_range: VaRange, thread: Thread, upper: VaRange) -> Wait:
    """Hand over the blocks above the split; the one across it is split as well (uvm_va_range.c)."""
    across = va_range.blocks.get(upper.first // BLOCK_PAGES)
    moved = {i: b for i, b in va_range.blocks.items() if b.first >= upper.first}
    for block in moved.values():
        block.range = upper
    upper.blocks = moved
    va_range.blocks = {i: b for i, b in va_range.blocks.items() if b.first < upper.first}
    if across is not None and across.first < upper.first:
        upper.blocks[upper.first // BLOCK_PAGES] = yield from uvm_va_block_split(across, thread, upper)


@waiting_step
def uvm_va_block_split(block: VaBlock, thread: Thread, upper: VaRange) -> Wait:
    """Split one block at the start of `upper`; returns the new block (uvm_va_block.c)."""
    at = upper.first - block.first
    new = VaBlock(upper, upper.first, block.pages - at, (block.slot[CPU] + at, block.slot[GPU] + at))
    yield from block.lock.acquire(thread)
    uvm_va_block_split_locked(block, thread, new, at)
    yield from block.lock.release(thread)
    return new


@step
def uvm_va_block_split_locked(block: VaBlock, thread: Thread, new: VaBlock, at: int) -> None:
    """Share out masks, frames and chunks; 2 MiB entries become smaller ones, histories are dropped (uvm_va_block.c)."""
    thread.now = max(thread.now, block.tracker)
    for processor in (CPU, GPU):
        new.resident[processor] = block.resident[processor] >> at
        new.pte[processor] = [mask >> at for mask in block.pte[processor]]
        new.frames[processor] = np.array(block.frames[processor][at:])
        block.resident[processor] &= region(0, at)
        block.pte[processor] = [mask & region(0, at) for mask in block.pte[processor]]
        block.frames[processor] = np.array(block.frames[processor][:at])
    for name in ("read_duplicated", "discarded", "clean"):
        setattr(new, name, getattr(block, name) >> at)
        setattr(block, name, getattr(block, name) & region(0, at))
    new.gpu_state, new.tracker, new.evicted = block.gpu_state, block.tracker, block.evicted
    block.pages, block.all_pages = at, region(0, at)
    for part in (block, new):
        part.pte_2m, part.big_ptes, part.thrashing = False, EMPTY, None
        part.last_migration_proc_id, part.fault_migrations_to_last_proc = None, 0
    _share_cpu_chunks(block, new, at)
    _share_gpu_chunks(block, new, at)


def _share_cpu_chunks(block: VaBlock, new: VaBlock, at: int) -> None:
    """A CPU chunk across the split becomes runs of 4 KiB chunks."""
    chunks, block.cpu_chunks = block.cpu_chunks, {}
    for first, (frame, count, each) in chunks.items():
        if first >= at:
            new.cpu_chunks[first - at] = (frame, count, each)
        elif first + count <= at:
            block.cpu_chunks[first] = (frame, count, each)
        else:
            block.cpu_chunks[first] = (frame, at - first, 1)
            new.cpu_chunks[0] = (frame + at - first, first + count - at, 1)


def _share_gpu_chunks(block: VaBlock, new: VaBlock, at: int) -> None:
    """Chunks are cut to the sizes that the shorter blocks are backed by."""
    chunks, block.gpu_chunks = block.gpu_chunks, {}
    for first, chunk in chunks.items():
        del chunk.root.owners[chunk.offset]
        page = first
        while page < first + chunk.pages:
            part, base = (block, 0) if page < at else (new, at)
            big = not (part.first + page - base) % BIG_PAGES and page + BIG_PAGES <= base + part.pages
            pages = BIG_PAGES if big and page + BIG_PAGES <= first + chunk.pages else 1
            piece = Chunk(chunk.root, chunk.offset + page - first, pages, part, page - base)
            part.gpu_chunks[page - base] = chunk.root.owners[piece.offset] = piece
            page += pages
