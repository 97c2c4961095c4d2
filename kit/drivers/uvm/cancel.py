"""uvm_gpu_replayable_faults.c, cancel: what happens to a fault that cannot be served."""

from __future__ import annotations

from kit.drivers.uvm.fault_batch import FaultBatch, fetch_fault_buffer_entries, preprocess_fault_batch
from kit.drivers.uvm.fault_buffer import plain
from kit.drivers.uvm.fault_service import service_fault_batch, service_fault_batch_dispatch
from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.replays import (
    fault_buffer_flush_locked,
    push_replay_on_gpu,
    wait_replay,
)
from kit.drivers.uvm.types import PAGE_SHIFT
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["cancel_fault_batch", "cancel_faults_precise"]


@waiting_step
def cancel_faults_precise(gpu: Gpu, thread: Thread, batch: FaultBatch) -> Wait:
    """Cancel exactly the fatal faults: by address since Volta, by uTLB on Pascal (uvm_gpu_replayable_faults.c)."""
    if gpu.hal.cancel_by_address:
        yield from service_fault_batch_for_cancel(gpu, thread)
    else:
        yield from cancel_faults_precise_tlb(gpu, thread)


@waiting_step
def service_fault_batch_for_cancel(gpu: Gpu, thread: Thread) -> Wait:
    """Flush, replay, fetch everything again; serve the good, cancel the fatal, replay (uvm_gpu_replayable_faults.c)."""
    batch = FaultBatch()
    yield from wait_replay(gpu, thread, fault_buffer_flush_locked(gpu, thread, batch, True))
    yield from _refault(gpu, thread)
    fetch_fault_buffer_entries(gpu, thread, batch, everything=True)
    preprocess_fault_batch(gpu, thread, batch)
    at = 0
    while at < len(batch):
        page = batch.page[at]
        if batch.fatal_type[at]:
            batch.fatal[page] = "InvalidFaultType"
            end = at + 1
        else:
            end = yield from service_fault_batch_dispatch(gpu, thread, batch, at)
        for bad in sorted(set(batch.page[at:end]) & set(batch.fatal)):
            cancel_fault_precise_va(gpu, thread, bad, batch.fatal[bad])
        at = end
    yield from wait_replay(gpu, thread, fault_buffer_flush_locked(gpu, thread, batch, True))


@step
def cancel_fault_precise_va(gpu: Gpu, thread: Thread, page: int, reason: str) -> None:
    """Cancel one page's accesses; reads too unless only the write was illegal (uvm_gpu_replayable_faults.c)."""
    thread.note(va=page << PAGE_SHIFT, pages=1, status=reason)
    _record_fatal(thread, page, reason)
    thread.charge(gpu.costs.cancel)
    gpu.cancelled[page] = reason


@waiting_step
def cancel_faults_precise_tlb(gpu: Gpu, thread: Thread) -> Wait:
    """Pascal: replay until only fatal faults are left in a uTLB, then cancel that uTLB (uvm_gpu_replayable_faults.c).

    A uTLB is in lock-down, and can be cancelled, when its fatal fault of the round before has shown up again.
    """
    was_enabled, gpu.prefetch_faults_enabled = gpu.prefetch_faults_enabled, False
    seen: dict[int, int] = {}  # uTLB -> its first fatal page in the round before
    while True:
        batch = FaultBatch()
        yield from wait_replay(gpu, thread, fault_buffer_flush_locked(gpu, thread, batch, True))
        yield from _refault(gpu, thread)
        fetch_fault_buffer_entries(gpu, thread, batch, everything=True)
        if not len(batch):
            break
        entries = list(zip(plain(batch.utlb), batch.page, strict=True))
        locked = {utlb for utlb, page in seen.items() if (utlb, page) in entries}
        preprocess_fault_batch(gpu, thread, batch)
        yield from service_fault_batch(gpu, thread, batch, cancel=True)
        if not batch.fatal:
            break
        try_to_cancel_utlbs(gpu, thread, batch, entries, locked)
        seen = {utlb: page for utlb, page in entries[::-1] if page in batch.fatal}
    gpu.prefetch_faults_enabled = was_enabled
    end = push_replay_on_gpu(gpu, thread, FaultBatch(), wake=False)
    yield from wait_replay(gpu, thread, end)


@step
def try_to_cancel_utlbs(
    gpu: Gpu, thread: Thread, batch: FaultBatch, entries: list[tuple[int, int]], locked: set[int]
) -> None:
    """Cancel each locked-down uTLB all of whose buffered faults are fatal (uvm_gpu_replayable_faults.c).

    Where one was served just now, the next round finds it gone.
    """
    first_of = {utlb: page for utlb, page in entries[::-1] if utlb in locked}
    alive = {utlb for utlb, page in entries if page not in batch.fatal}
    for utlb, page in sorted(first_of.items()):
        if utlb not in alive:
            record_fatal_fault_helper(gpu, thread, page, batch.fatal[page])
            push_cancel_on_gpu_targeted(gpu, thread, utlb, page, batch.fatal[page])


@step
def record_fatal_fault_helper(gpu: Gpu, thread: Thread, page: int, reason: str) -> None:
    """Tell tools about the fatal fault (uvm_gpu_replayable_faults.c)."""
    _record_fatal(thread, page, reason)


@step
def push_cancel_on_gpu_targeted(gpu: Gpu, thread: Thread, utlb: int, page: int, reason: str) -> None:
    """Cancel by (GPC, client), and wait (uvm_gpu_replayable_faults.c)."""
    thread.note(va=page << PAGE_SHIFT, pages=1, value=utlb)
    thread.charge(gpu.costs.cancel)
    gpu.cancelled[page] = reason


@waiting_step
def cancel_fault_batch(gpu: Gpu, thread: Thread, batch: FaultBatch, reason: str) -> Wait:
    """A service error: the whole batch dies, no precise attribution (uvm_gpu_replayable_faults.c)."""
    if gpu.hal.cancel_by_address:
        yield from cancel_faults_all(gpu, thread, batch, reason)
    else:
        cancel_fault_batch_tlb(gpu, thread, batch, reason)


@waiting_step
def cancel_faults_all(gpu: Gpu, thread: Thread, batch: FaultBatch, reason: str) -> Wait:
    """Cancel every fault of the batch by address, then flush and replay (uvm_gpu_replayable_faults.c)."""
    for page in _distinct(batch):
        cancel_fault_precise_va(gpu, thread, page, reason)
    yield from wait_replay(gpu, thread, fault_buffer_flush_locked(gpu, thread, batch, True))


@step
def cancel_fault_batch_tlb(gpu: Gpu, thread: Thread, batch: FaultBatch, reason: str) -> None:
    """Pascal: one global cancel takes everything on the instance pointer (uvm_gpu_replayable_faults.c)."""
    for page in _distinct(batch):
        _record_fatal(thread, page, reason)
    push_cancel_on_gpu_global(gpu, thread, reason)


@step
def push_cancel_on_gpu_global(gpu: Gpu, thread: Thread, reason: str) -> None:
    """Cancel globally, and wait (uvm_gpu_replayable_faults.c)."""
    thread.charge(gpu.costs.cancel)
    gpu.cancelled_all = reason


def _distinct(batch: FaultBatch) -> list[int]:
    return list(dict.fromkeys(batch.page))


def _refault(gpu: Gpu, thread: Thread) -> Wait:
    """Give woken accesses the time to fault again."""
    thread.charge(gpu.costs.interrupt)
    yield from thread.sync()


def _record_fatal(thread: Thread, page: int, reason: str) -> None:
    thread.engine.trace.span(
        "UvmEventTypeFatalFault",
        "gpu",
        thread.now,
        thread.now,
        parent=thread.row,
        va=page << PAGE_SHIFT,
        pages=1,
        cause=reason,
    )
