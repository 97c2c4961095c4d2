"""uvm_migrate.c: what cudaMemPrefetchAsync asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kit.drivers.uvm.types import (
    CPU,
    GPU,
    NV_ERR_MORE_PROCESSING_REQUIRED,
    NV_OK,
    PAGE_SHIFT,
    READ_ONLY,
    READ_WRITE_ATOMIC,
    VaBlock,
    VaRange,
    VaSpace,
)
from kit.drivers.uvm.va_block_map import uvm_va_block_add_mappings_after_migration, uvm_va_block_map
from kit.drivers.uvm.va_block_populate import BlockContext, uvm_va_block_retry_deinit
from kit.drivers.uvm.va_block_residency import uvm_va_block_make_resident, uvm_va_block_make_resident_read_duplicate
from kit.drivers.uvm.va_range import uvm_va_range_block_create
from kit.memory.table.pagemask import EMPTY, PageMask, region
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["block_operation", "uvm_api_migrate"]


@waiting_step
def uvm_api_migrate(va_space: VaSpace, thread: Thread, first: int, pages: int, destination: int) -> Wait:
    """UVM_MIGRATE: move pages [first, first + pages) to `destination`; returns when the copies end (uvm_migrate.c).

    The caller's thread unmaps, populates and pushes; it does not wait for the copies.
    """
    thread.charge(va_space.gpu.costs.ioctl)
    return (yield from uvm_migrate(va_space, thread, first, pages, destination))


@waiting_step
def uvm_migrate(va_space: VaSpace, thread: Thread, first: int, pages: int, destination: int) -> Wait:
    """One block: copy then map. Several: copy all, then map all (uvm_migrate.c)."""
    thread.note(va=first << PAGE_SHIFT, pages=pages)
    spans = [(r, max(r.first, first), min(r.end, first + pages)) for r in va_space.ranges]
    spans = [(r, low, high) for r, low, high in spans if low < high and r.migratable]
    single = sum((high - 1) // 512 - low // 512 + 1 for _, low, high in spans) == 1
    end = 0.0
    for map_pages in (True,) if single else (False, True):
        end = max(end, (yield from uvm_migrate_ranges(va_space, thread, spans, destination, map_pages)))
    return end


@waiting_step
def uvm_migrate_ranges(
    va_space: VaSpace, thread: Thread, spans: list[tuple[VaRange, int, int]], destination: int, map_pages: bool
) -> Wait:
    """One pass over the ranges (uvm_migrate.c)."""
    end = 0.0
    for va_range, low, high in spans:
        end = max(end, (yield from uvm_va_range_migrate(va_range, thread, low, high, destination, map_pages)))
    return end


@waiting_step
def uvm_va_range_migrate(
    va_range: VaRange, thread: Thread, low: int, high: int, destination: int, map_pages: bool
) -> Wait:
    """One range (uvm_migrate.c)."""
    return (yield from uvm_va_range_migrate_multi_block(va_range, thread, low, high, destination, map_pages))


@waiting_step
def uvm_va_range_migrate_multi_block(
    va_range: VaRange, thread: Thread, low: int, high: int, destination: int, map_pages: bool
) -> Wait:
    """Blocks ascending, each clipped to the request, each an operation that may evict (uvm_migrate.c)."""
    end = 0.0
    page = low
    while page < high:
        block = uvm_va_range_block_create(va_range, thread, page)
        last = min(high, block.first + block.pages)
        mask = region(page - block.first, last - page)
        migrate = partial(
            uvm_va_block_migrate_locked, block, thread, mask=mask, destination=destination, map_pages=map_pages
        )
        yield from block_operation(block, thread, migrate)
        end = max(end, block.tracker)
        page = last
    return end


def block_operation(block: VaBlock, thread: Thread, operation: Callable[[BlockContext], Wait]) -> Wait:
    """UVM_VA_BLOCK_LOCK_RETRY: lock, do, start again while memory had to be evicted."""
    context = BlockContext()
    yield from block.lock.acquire(thread)
    try:
        while (yield from operation(context)) == NV_ERR_MORE_PROCESSING_REQUIRED:
            continue
    finally:
        yield from block.lock.release(thread)
        uvm_va_block_retry_deinit(context, thread, block.range.va_space.gpu)


@waiting_step
def uvm_va_block_migrate_locked(
    block: VaBlock, thread: Thread, context: BlockContext, mask: PageMask, destination: int, map_pages: bool
) -> Wait:
    """Make resident with cause User, then map; returns NV_STATUS (uvm_migrate.c)."""
    make_resident = uvm_va_block_make_resident
    if block.range.read_duplicate:
        make_resident = uvm_va_block_make_resident_read_duplicate
    status: int = yield from make_resident(block, thread, context, destination, mask, EMPTY, "api")
    if status != NV_OK:
        return status
    if destination == CPU:
        thread.now = max(thread.now, block.tracker)
    if map_pages:
        block_migrate_add_mappings(block, thread, mask, destination)
    return NV_OK


@step
def block_migrate_add_mappings(block: VaBlock, thread: Thread, mask: PageMask, destination: int) -> None:
    """Pages mapped nowhere get every right; the others what takes nothing from anybody (uvm_migrate.c)."""
    duplicated = mask & block.read_duplicated
    mapped = block.mapped(CPU) | block.mapped(GPU)
    fresh = mask & ~mapped & ~duplicated
    if fresh:
        block_migrate_map_unmapped_pages(block, thread, fresh, destination)
    rest = mask & ~fresh & block.resident[destination]
    if rest:
        uvm_va_block_migrate_map_mapped_pages(block, thread, rest, duplicated, destination)


@step
def block_migrate_map_unmapped_pages(block: VaBlock, thread: Thread, mask: PageMask, destination: int) -> None:
    """Map the destination, then accessed-by processors (uvm_migrate.c)."""
    uvm_va_block_map(block, thread, destination, mask, READ_WRITE_ATOMIC, "policy")
    accessed_by = tuple(sorted(block.range.policy.accessed_by))
    if accessed_by:
        uvm_va_block_add_mappings_after_migration(block, thread, mask, READ_WRITE_ATOMIC, destination, accessed_by)


@step
def uvm_va_block_migrate_map_mapped_pages(
    block: VaBlock, thread: Thread, mask: PageMask, duplicated: PageMask, destination: int
) -> None:
    """The highest right that needs no revocation (uvm_migrate.c)."""
    other = 1 - destination
    contested = block.pte[other][READ_WRITE_ATOMIC] | duplicated
    if mask & contested:
        uvm_va_block_map(block, thread, destination, mask & contested, READ_ONLY, "policy")
    if mask & ~contested:
        uvm_va_block_map(block, thread, destination, mask & ~contested, READ_WRITE_ATOMIC, "policy")
