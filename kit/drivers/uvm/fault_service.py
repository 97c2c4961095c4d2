"""uvm_gpu_replayable_faults.c, service: the sorted faults of a batch, block by block."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

import numpy as np

from kit.drivers.uvm.fault_batch import FaultBatch
from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.perf_thrashing import PIN, THROTTLE, uvm_perf_thrashing_get_hint
from kit.drivers.uvm.replays import BLOCK, push_replay_on_gpu
from kit.drivers.uvm.types import (
    ACCESS_NAMES,
    GPU,
    NV_ERR_MORE_PROCESSING_REQUIRED,
    NV_OK,
    PAGE_SHIFT,
    PREFETCH,
    READ,
    REQUIRED_PROT,
    VaBlock,
)
from kit.drivers.uvm.va_block_policy import ServiceContext, uvm_va_block_select_residency
from kit.drivers.uvm.va_block_populate import uvm_va_block_retry_deinit
from kit.drivers.uvm.va_block_service import uvm_va_block_service_locked
from kit.drivers.uvm.va_range import uvm_va_block_find_create_in_range
from kit.memory.table.pagemask import EMPTY, PageMask, bit, first_page, from_bools, pages_of
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["report_group", "service_fault_batch", "service_fault_batch_dispatch"]

NEEDED: Final[list[int]] = REQUIRED_PROT.tolist()
NO_FAULT: Final = np.int8(-1)
MANY: Final = 32  # faults from which on arrays are faster than a loop


@waiting_step
def service_fault_batch(gpu: Gpu, thread: Thread, batch: FaultBatch, cancel: bool = False) -> Wait:
    """Serve the sorted faults block by block (uvm_gpu_replayable_faults.c)."""
    at, count = 0, len(batch.page)
    while at < count:
        if batch.fatal_type[at]:
            batch.fatal[batch.page[at]] = "InvalidFaultType"
            at += 1
            continue
        at = yield from service_fault_batch_dispatch(gpu, thread, batch, at)
        if gpu.module.fault_replay_policy == BLOCK and not cancel and not batch.fatal:
            push_replay_on_gpu(gpu, thread, batch)
            report_group(gpu, thread, batch, at)


def report_group(gpu: Gpu, thread: Thread, batch: FaultBatch, end: int) -> None:
    """Emit the faults of one batch id as tools show them: the first page, how often it faulted, until the copies end.

    They are those before `end` that are in no group yet. With the first drivers that had such records they end with
    the bottom half's work.
    """
    start, batch.reported = batch.reported, end
    if start == end:
        return
    page, distinct = batch.page[start], end - start
    same = bisect_right(batch.page, page, start, end)
    if batch.ascending is None and distinct > 1:
        distinct = len(set(batch.page[start:end]))
    until = (batch.copies_end or max(thread.now, batch.tracker)) if gpu.group_has_copies else thread.now
    thread.engine.trace.span(
        "UvmEventTypeGpuFault", "gpu", batch.first_time, until, va=page << PAGE_SHIFT, pages=distinct,
        cause=ACCESS_NAMES[batch.access[start]], value=sum(batch.instances[start:same]),
    )  # fmt: skip
    batch.copies_end = 0.0


@waiting_step
def service_fault_batch_dispatch(gpu: Gpu, thread: Thread, batch: FaultBatch, at: int) -> Wait:
    """Find the block of fault `at`, serve all faults inside it, return the next fault (uvm_gpu_replayable_faults.c)."""
    thread.charge(gpu.costs.service_block)
    page = batch.page[at]
    assert gpu.va_space is not None
    block = uvm_va_block_find_create_in_range(gpu.va_space, thread, page)
    if block is None:
        service_fault_batch_fatal_notify(gpu, thread, batch, at)
        return bisect_right(batch.page, page, at)
    end, past = at + 1, block.first + block.pages
    if end < len(batch.page) and batch.page[end] < past:
        end = bisect_left(batch.page, past, end)
    yield from service_fault_batch_block(gpu, thread, batch, block, at, end)
    return end


@step
def service_fault_batch_fatal_notify(gpu: Gpu, thread: Thread, batch: FaultBatch, at: int) -> None:
    """No range there: fatal, unless it was only a prefetch (uvm_gpu_replayable_faults.c)."""
    page = batch.page[at]
    if batch.access[at] == PREFETCH:
        batch.num_invalid_prefetch += batch.instances[at]
    else:
        batch.fatal[page] = "InvalidAddress"
    thread.note(va=page << PAGE_SHIFT, pages=1, status="NV_ERR_INVALID_ADDRESS")


@waiting_step
def service_fault_batch_block(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, start: int, end: int
) -> Wait:
    """One block operation, started again as often as memory had to be evicted for it (uvm_gpu_replayable_faults.c)."""
    context = ServiceContext()
    yield from block.lock.acquire(thread)
    try:
        while (
            yield from service_fault_batch_block_locked(gpu, thread, batch, block, context, start, end)
        ) == NV_ERR_MORE_PROCESSING_REQUIRED:
            context.num_retries += 1
    finally:
        yield from block.lock.release(thread)
        uvm_va_block_retry_deinit(context.block_context, thread, gpu)
    batch.tracker = max(batch.tracker, block.tracker)


@waiting_step
def service_fault_batch_block_locked(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, context: ServiceContext, start: int, end: int
) -> Wait:
    """Policy for every faulting page, then one service operation; NV_STATUS (uvm_gpu_replayable_faults.c)."""
    _take_faults(gpu, thread, batch, block, context, start, end)
    if not context.faulted:
        return NV_OK
    uvm_va_block_select_residency(block, thread, context, GPU)
    status: int = yield from uvm_va_block_service_locked(block, thread, context, GPU)
    if status == NV_OK and context.did_migrate:
        batch.copies_end = max(batch.copies_end, context.block_context.copies_end)
    return status


def _take_faults(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, context: ServiceContext, start: int, end: int
) -> None:
    """Note the faults in the block and what they ask for; who tries again knows them already."""
    context.reset()
    if not context.num_retries:
        context.strongest = _strongest(batch, block, start, end)
        context.distinct = 0
        for pages in context.strongest.values():
            context.distinct += pages.bit_count()
        context.instances = end - start
        if batch.ascending is None:
            for at in range(start, end):
                context.instances += batch.instances[at] - 1
    strongest, distinct = context.strongest, context.distinct
    thread.note(block.va, distinct, value=context.instances)
    thread.charge(distinct * gpu.costs.service_fault)
    if not context.num_retries:
        update_batch_and_notify_fault(gpu, thread, batch, context.instances - distinct)
    rights = block.pte[GPU]
    for access, pages in check_fault_access_permissions(gpu, thread, batch, block, strongest).items():
        prot = NEEDED[access]
        pages &= ~rights[prot]  # where the GPU already has the right the fault is spurious
        context.wanted[prot] |= pages
        context.faulted |= pages
    if context.faulted and block.thrashing is not None and block.thrashing.page is not None:
        _thrashing_hints(gpu, thread, batch, block, context)


def _strongest(batch: FaultBatch, block: VaBlock, start: int, end: int) -> dict[int, PageMask]:
    """Return access type -> faulting pages for which it is the strongest, which is the first fault of each page."""
    first = block.first
    if end - start == 1:
        return {batch.access[start]: bit(batch.page[start] - first)}
    if end - start >= MANY and batch.ascending is not None:
        pages, kinds = (column[start:end] for column in batch.ascending)
        at, lead, there = kinds, batch.page[start] - first, kinds.tobytes()
        if batch.page[end - 1] - batch.page[start] > end - start - 1:  # pages are left out
            at, lead = np.full(block.pages, NO_FAULT), 0
            at[pages - first] = kinds
        return {kind: from_bools(at == kind) << lead for kind in range(len(ACCESS_NAMES)) if kind in there}
    strongest: dict[int, PageMask] = {}
    before = -1
    for page, kind in zip(batch.page[start:end], batch.access[start:end], strict=True):
        if page != before:
            before = page
            strongest[kind] = strongest.get(kind, EMPTY) | bit(page - first)
    return strongest


def _thrashing_hints(gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, context: ServiceContext) -> None:
    """Ask thrashing about faults on suspicious pages: a throttled one is left out of this batch."""
    info = block.thrashing
    assert info is not None
    # One page at least: the epoch is tested whatever page is asked about.
    for index in pages_of(context.faulted & info.pages).tolist() or [first_page(context.faulted)]:
        hint = uvm_perf_thrashing_get_hint(block, thread, index, GPU)
        if hint.type == THROTTLE:
            batch.has_throttled = True
            context.faulted &= ~bit(index)
            context.wanted = [pages & ~bit(index) for pages in context.wanted]
        elif hint.type == PIN:
            context.pinned[index] = hint.residency


@step
def update_batch_and_notify_fault(gpu: Gpu, thread: Thread, batch: FaultBatch, duplicates: int) -> None:
    """Count duplicates: merged instances, and same-page entries that the sort brought together."""
    batch.num_duplicates += duplicates


@step
def check_fault_access_permissions(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, strongest: dict[int, PageMask]
) -> dict[int, PageMask]:
    """Return which faults may be served; a write to a read-only area is fatal (uvm_gpu_replayable_faults.c).

    Like `strongest`, a dict of access types and the pages that they are about.
    """
    fatal = EMPTY
    for access, pages in strongest.items():
        if access > READ:
            fatal |= pages
    if not fatal or block.range.vma.writable:
        return strongest
    batch.fatal.update(dict.fromkeys((block.first + pages_of(fatal)).tolist(), "InvalidPermissions"))
    return {access: pages for access, pages in strongest.items() if access <= READ}
