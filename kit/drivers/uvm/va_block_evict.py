"""uvm_va_block.c, eviction: every page resident in a root chunk goes home, the chunk changes hands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.drivers.uvm.types import CPU, GPU, VaBlock
from kit.drivers.uvm.va_block_map import uvm_va_block_add_mappings
from kit.drivers.uvm.va_block_populate import BlockContext
from kit.drivers.uvm.va_block_residency import uvm_va_block_make_resident
from kit.memory.columns import fill
from kit.memory.table.pagemask import EMPTY, PageMask, region
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.uvm.pmm_chunks import RootChunk

__all__ = ["uvm_va_block_evict_chunks"]


@waiting_step
def uvm_va_block_evict_chunks(block: VaBlock, thread: Thread, root: RootChunk) -> Wait:
    """Move the block's resident pages out of `root` and take its chunks away (uvm_va_block.c)."""
    chunks = [chunk for chunk in block.gpu_chunks.values() if chunk.root is root]
    pages = EMPTY
    for chunk in chunks:
        pages |= region(chunk.page_index, chunk.pages)
    pages &= block.resident[GPU]
    thread.note(block.va, pages.bit_count())
    if pages:
        context = BlockContext()
        yield from uvm_va_block_make_resident(block, thread, context, CPU, pages, EMPTY, "eviction")
        if block.range.policy.accessed_by:
            thread.engine.start(_eviction_mappings(block, pages))
    root.tracker = max(root.tracker, block.tracker)
    for chunk in chunks:
        chunk.block = None  # uvm_pmm_gpu_mark_chunk_evicted
        del block.gpu_chunks[chunk.page_index]
        fill(block.frames[GPU], chunk.page_index, ((0, chunk.pages),), -1)
    block.evicted = True


def _eviction_mappings(block: VaBlock, pages: PageMask) -> Wait:
    """Work queue item: remote mappings that accessed-by promises, made once locks allow it."""
    worker = block.range.va_space.engine.thread("uvm worker")
    yield from block.lock.acquire(worker)
    block_add_eviction_mappings(block, worker, pages)
    yield from block.lock.release(worker)


@step
def block_add_eviction_mappings(block: VaBlock, thread: Thread, pages: PageMask) -> None:
    """Map evicted pages for accessed-by processors (uvm_va_block.c)."""
    for processor in sorted(block.range.policy.accessed_by):
        uvm_va_block_add_mappings(block, thread, pages & block.resident[CPU], processor)
