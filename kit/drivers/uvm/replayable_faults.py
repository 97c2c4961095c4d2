"""uvm_gpu_replayable_faults.c: interrupt, service loop, batches, blocks, replays."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
from simpy import Event

from kit.drivers.uvm.cancel import cancel_fault_batch, cancel_faults_precise
from kit.drivers.uvm.fault_batch import FaultBatch, fetch_fault_buffer_entries, flush, preprocess_fault_batch
from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.perf_thrashing import PIN, THROTTLE, uvm_perf_thrashing_get_hint
from kit.drivers.uvm.types import (
    ACCESS_NAMES,
    GPU,
    PAGE,
    PREFETCH,
    READ,
    REQUIRED_PROT,
    MoreProcessingRequired,
    VaBlock,
)
from kit.drivers.uvm.va_block_populate import uvm_va_block_retry_deinit
from kit.drivers.uvm.va_block_service import ServiceContext, uvm_va_block_select_residency, uvm_va_block_service_locked
from kit.drivers.uvm.va_space import uvm_va_block_find_create_in_range
from kit.errors import DriverError
from kit.memory.table.pagemask import from_bools, pages_of
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = [
    "fault_buffer_flush_locked", "push_replay_on_parent_gpu", "replayable_faults_isr_bottom_half",
    "service_fault_batch",
    "start_bottom_half",
]  # fmt: skip

BLOCK, BATCH, BATCH_FLUSH, ONCE = range(4)
NEEDED: list[int] = REQUIRED_PROT.tolist()
NO_FAULT = np.int8(-1)
MANY = 32  # faults from which on arrays are faster than a loop
DEEP_IDLE = 600.0  # microseconds without work before a CPU is let into C6 (Linux intel_idle.c, server cores)


def start_bottom_half(gpu: Gpu) -> None:
    """Create the GPU's bottom-half thread; the buffer's interrupt wakes it, one at a time."""
    engine, buffer = gpu.engine, gpu.fault_buffer
    thread = engine.thread("UVM GPU0 BH")
    pending = [engine.env.event()]

    def top_half() -> None:
        if not pending[0].triggered:
            pending[0].succeed()

    def run() -> Wait:
        busy_until = 0.0
        while True:
            yield pending[0]
            pending[0] = Event(engine.env)
            while buffer.get != buffer.put:
                thread.now = max(engine.now, buffer.first_time)
                thread.charge(gpu.costs.interrupt)
                if thread.now - busy_until > DEEP_IDLE:
                    thread.charge(gpu.costs.idle_wake)
                if not gpu.seen_fault:
                    gpu.seen_fault = True
                    thread.charge(gpu.costs.gpu_first_fault)
                yield from thread.sync()
                yield from replayable_faults_isr_bottom_half(gpu, thread)
                busy_until = thread.now

    buffer.interrupt = top_half
    engine.start(run())


@waiting_step
def replayable_faults_isr_bottom_half(gpu: Gpu, thread: Thread) -> Wait:
    """Serve what is in the buffer under the GPU's service lock (uvm_gpu_isr.c)."""
    yield from gpu.service_lock.acquire(thread)
    yield from uvm_parent_gpu_service_replayable_faults(gpu, thread)
    yield from gpu.service_lock.release(thread)


@waiting_step
def uvm_parent_gpu_service_replayable_faults(gpu: Gpu, thread: Thread) -> Wait:
    """Batch after batch until the buffer is empty or a limit is reached (uvm_gpu_replayable_faults.c)."""
    module = gpu.module
    batches = throttled = replays = 0
    while throttled < module.fault_max_throttle_per_service and batches < module.fault_max_batches_per_service:
        batch = FaultBatch()
        fetch_fault_buffer_entries(gpu, thread, batch)
        if not batch.num_cached:
            break
        preprocess_fault_batch(gpu, thread, batch)
        enough = True
        try:
            yield from service_fault_batch(gpu, thread, batch)
        except DriverError as error:
            enough = _is_memory_left(error)
        report_group(gpu, thread, batch)
        replays += batch.num_replays
        enable_disable_prefetch_faults(gpu, thread, batch)
        if not enough:
            yield from cancel_fault_batch(gpu, thread, batch, "OutOfMemory")
            break
        batches += 1
        if batch.fatal:
            thread.now = max(thread.now, batch.tracker)
            try:
                yield from cancel_faults_precise(gpu, thread, batch)
            except DriverError as error:
                _is_memory_left(error)
                break
            continue
        if module.fault_replay_policy == BATCH:
            push_replay_on_parent_gpu(gpu, thread, batch)
            replays += 1
        elif module.fault_replay_policy == BATCH_FLUSH:
            update_put = batch.num_duplicates * 100 > batch.num_cached * module.fault_replay_update_put_ratio
            end = fault_buffer_flush_locked(gpu, thread, batch, update_put)
            replays += 1
            yield from wait_replay(gpu, thread, end)
        throttled += batch.has_throttled
    if module.fault_replay_policy == ONCE or not replays:
        push_replay_on_parent_gpu(gpu, thread, FaultBatch())


def _is_memory_left(error: DriverError) -> bool:
    """Return False for want of memory; any other failure is not the GPU's."""
    if error.status != "NV_ERR_NO_MEMORY":
        raise error
    return False


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
    end = bisect_left(batch.page, block.first + block.pages, at)
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
    thread.note(va=page * PAGE, pages=1, status="NV_ERR_INVALID_ADDRESS")


@waiting_step
def service_fault_batch_block(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, start: int, end: int
) -> Wait:
    """One block operation, started again as often as memory had to be evicted for it (uvm_gpu_replayable_faults.c)."""
    context = ServiceContext()
    yield from block.lock.acquire(thread)
    try:
        while True:
            try:
                yield from service_fault_batch_block_locked(gpu, thread, batch, block, context, start, end)
                break
            except MoreProcessingRequired:
                context.num_retries += 1
    finally:
        yield from block.lock.release(thread)
        uvm_va_block_retry_deinit(context.block_context, thread, gpu)
    batch.tracker = max(batch.tracker, block.tracker)


@waiting_step
def service_fault_batch_block_locked(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, context: ServiceContext, start: int, end: int
) -> Wait:
    """Policy for every faulting page, then one service operation (uvm_gpu_replayable_faults.c)."""
    context.reset()
    if not context.num_retries:
        context.strongest = _strongest(batch, block, start, end)
        context.distinct = sum(map(int.bit_count, context.strongest.values()))
        context.instances = end - start if batch.ascending is not None else sum(batch.instances[start:end])
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
    if block.thrashing is not None and block.thrashing.page is not None:
        _thrashing_hints(gpu, thread, batch, block, context)
    if not context.faulted:
        return
    uvm_va_block_select_residency(block, thread, context, GPU)
    yield from uvm_va_block_service_locked(block, thread, context, GPU)
    if context.did_migrate:
        batch.copies_end = max(batch.copies_end, context.block_context.copies_end)


def _strongest(batch: FaultBatch, block: VaBlock, start: int, end: int) -> dict[int, int]:
    """Return access type -> faulting pages for which it is the strongest, which is the first fault of each page."""
    first = block.first
    if end - start == 1:
        return {batch.access[start]: 1 << batch.page[start] - first}
    if end - start >= MANY and batch.ascending is not None:
        pages, kinds = (column[start:end] for column in batch.ascending)
        at = np.full(block.pages, NO_FAULT)
        at[pages - first] = kinds
        there = kinds.tobytes()
        return {kind: from_bools(at == kind) for kind in range(len(ACCESS_NAMES)) if kind in there}
    strongest: dict[int, int] = {}
    before = -1
    for page, kind in zip(batch.page[start:end], batch.access[start:end], strict=True):
        if page != before:
            before = page
            strongest[kind] = strongest.get(kind, 0) | 1 << page - first
    return strongest


def _thrashing_hints(gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, context: ServiceContext) -> None:
    """Ask thrashing about faults on suspicious pages: a throttled one is left out of this batch."""
    info = block.thrashing
    assert info is not None
    # One page at least: the epoch is tested whatever page is asked about.
    for index in pages_of(context.faulted & info.pages or context.faulted & -context.faulted).tolist():
        hint = uvm_perf_thrashing_get_hint(block, thread, index, GPU)
        if hint.type == THROTTLE:
            batch.has_throttled = True
            context.faulted &= ~(1 << index)
            context.wanted = [pages & ~(1 << index) for pages in context.wanted]
        elif hint.type == PIN:
            context.pinned[index] = hint.residency


@step
def update_batch_and_notify_fault(gpu: Gpu, thread: Thread, batch: FaultBatch, duplicates: int) -> None:
    """Count duplicates: merged instances, and same-page entries that the sort brought together."""
    batch.num_duplicates += duplicates


@step
def check_fault_access_permissions(
    gpu: Gpu, thread: Thread, batch: FaultBatch, block: VaBlock, strongest: dict[int, int]
) -> dict[int, int]:
    """Return which faults may be served; a write to a read-only area is fatal (uvm_gpu_replayable_faults.c).

    Like `strongest`, a dict of access types and the pages that they are about.
    """
    if block.range.vma.writable:
        return strongest
    fatal = 0
    for access, pages in strongest.items():
        fatal |= pages if access > READ else 0
    batch.fatal.update(dict.fromkeys((block.first + pages_of(fatal)).tolist(), "InvalidPermissions"))
    return {access: pages for access, pages in strongest.items() if access <= READ}


def report_group(gpu: Gpu, thread: Thread, batch: FaultBatch) -> None:
    """Emit the batch as tools show it: the first faulting page, how often it faulted, until the copies end.

    With the first drivers that had such records they end with the bottom half's work.
    """
    page, distinct = batch.page[0], len(batch.page)
    same = bisect_right(batch.page, page)
    if batch.ascending is None and distinct > 1:
        distinct = len(set(batch.page))
    end = (batch.copies_end or max(thread.now, batch.tracker)) if gpu.group_has_copies else thread.now
    thread.engine.trace.span(
        "UvmEventTypeGpuFault", "gpu", batch.first_time, end, va=page * PAGE, pages=distinct,
        cause=ACCESS_NAMES[batch.access[0]], value=sum(batch.instances[:same]),
    )  # fmt: skip


@step
def enable_disable_prefetch_faults(gpu: Gpu, thread: Thread, batch: FaultBatch) -> None:
    """Too many invalid prefetch faults switch them off for a while (uvm_gpu_replayable_faults.c)."""
    if not gpu.prefetch_faults_supported:
        return
    lapse = gpu.module.reenable_prefetch_faults_lapse_msec * 1000.0
    most = min(gpu.module.fault_batch_count, gpu.fault_buffer.entries)
    if gpu.prefetch_faults_enabled and lapse and batch.num_invalid_prefetch * 3 > most * 2:
        gpu.prefetch_faults_enabled, gpu.prefetch_faults_disabled_at = False, thread.now
    elif not gpu.prefetch_faults_enabled and thread.now - gpu.prefetch_faults_disabled_at > lapse:
        gpu.prefetch_faults_enabled = True


@step
def fault_buffer_flush_locked(gpu: Gpu, thread: Thread, batch: FaultBatch, update_put: bool) -> float:
    """Throw queued entries away and replay: their accesses fault again if they must (uvm_gpu_replayable_faults.c)."""
    thread.charge(gpu.costs.flush_buffer)
    thread.note(value=flush(gpu.fault_buffer, thread.now, update_put))
    return push_replay_on_parent_gpu(gpu, thread, batch, wake=False)


@step
def push_replay_on_parent_gpu(gpu: Gpu, thread: Thread, batch: FaultBatch, wake: bool = True) -> float:
    """Replay on the parent GPU (uvm_gpu_replayable_faults.c)."""
    return push_replay_on_gpu(gpu, thread, batch, wake)


@step
def push_replay_on_gpu(gpu: Gpu, thread: Thread, batch: FaultBatch, wake: bool = True) -> float:
    """Push a replay behind the batch's work; it wakes every stalled access (uvm_gpu_replayable_faults.c)."""
    thread.charge(gpu.costs.push)
    _, end = gpu.memops.push(thread, gpu.costs.replay, after=batch.tracker)
    batch.num_replays += 1
    thread.engine.trace.span("UvmEventTypeGpuFaultReplay", "gpu", end, end)
    if wake:
        thread.engine.start(_wake_at(gpu, end))
    return end


def _wake_at(gpu: Gpu, time: float) -> Wait:
    yield gpu.engine.env.timeout(max(0.0, time - gpu.engine.now))
    gpu.wake_stalled()


def wait_replay(gpu: Gpu, thread: Thread, end: float) -> Wait:
    """Wait for a replay to finish (uvm_tracker_wait), which is when stalled accesses run again."""
    thread.now = max(thread.now, end)
    yield from thread.sync()
    gpu.wake_stalled()
