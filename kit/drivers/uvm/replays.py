"""uvm_gpu_replayable_faults.c, replays: flush what is queued, wake what is stalled."""

from __future__ import annotations

from typing import Final

from kit.drivers.uvm.fault_batch import FaultBatch, flush
from kit.drivers.uvm.gpu import Gpu
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step

__all__ = [
    "BATCH",
    "BATCH_FLUSH",
    "BLOCK",
    "ONCE",
    "fault_buffer_flush_locked",
    "push_replay_on_gpu",
    "push_replay_on_parent_gpu",
    "wait_replay",
]

# uvm_perf_fault_replay_policy_t
BLOCK: Final = 0
BATCH: Final = 1
BATCH_FLUSH: Final = 2
ONCE: Final = 3


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
