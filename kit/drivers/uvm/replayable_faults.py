"""uvm_gpu_replayable_faults.c: interrupt, bottom half, batch after batch until nothing is left to serve."""

from __future__ import annotations

from typing import Final

from simpy import Event

from kit.drivers.uvm.cancel import cancel_fault_batch, cancel_faults_precise
from kit.drivers.uvm.fault_batch import FaultBatch, fetch_fault_buffer_entries, preprocess_fault_batch
from kit.drivers.uvm.fault_service import report_group, service_fault_batch
from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.replays import (
    BATCH,
    BATCH_FLUSH,
    ONCE,
    fault_buffer_flush_locked,
    push_replay_on_parent_gpu,
    wait_replay,
)
from kit.errors import DriverError
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["start_bottom_half"]

DEEP_IDLE: Final = 600.0  # microseconds without work before a CPU is let into C6 (Linux intel_idle.c, server cores)


def start_bottom_half(gpu: Gpu) -> None:
    """Create the GPU's bottom-half thread; the buffer's interrupt wakes it, one at a time."""
    engine, buffer = gpu.engine, gpu.fault_buffer
    thread = gpu.bottom_half = engine.thread("UVM GPU0 BH")
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
        report_group(gpu, thread, batch, len(batch.page))
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
