"""uvm_va_space.c and uvm_va_block.c, CPU faults: the GPU's path for one page, with throttling."""

from __future__ import annotations

import errno
from typing import Final

from kit.drivers.uvm.perf_thrashing import PIN, THROTTLE, uvm_perf_thrashing_get_hint
from kit.drivers.uvm.types import (
    CPU,
    NV_ERR_MORE_PROCESSING_REQUIRED,
    NV_OK,
    NV_WARN_MORE_PROCESSING_REQUIRED,
    PAGE,
    PAGE_SHIFT,
    READ_ONLY,
    READ_WRITE_ATOMIC,
    VaBlock,
    VaSpace,
)
from kit.drivers.uvm.va_block_policy import ServiceContext, uvm_va_block_select_residency
from kit.drivers.uvm.va_block_populate import uvm_va_block_retry_deinit
from kit.drivers.uvm.va_block_service import uvm_va_block_service_locked
from kit.drivers.uvm.va_range import uvm_va_block_find_create_managed
from kit.errors import DriverError
from kit.memory.table.pagemask import bit, holds
from kit.memory.types import (
    VM_FAULT_NOPAGE,
)
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

__all__ = ["uvm_vm_fault"]

PC: Final = 0x55_5555_1000  # program counter that CPU faults report: the kit runs no real instructions


@waiting_step
def uvm_vm_fault(va_space: VaSpace, thread: Thread, page: int, write: bool) -> Wait:
    """The VMA's fault handler; entries are in when it returns (uvm.c)."""
    yield from uvm_va_space_cpu_fault_managed(va_space, thread, page, write)
    return VM_FAULT_NOPAGE


@waiting_step
def uvm_va_space_cpu_fault_managed(va_space: VaSpace, thread: Thread, page: int, write: bool) -> Wait:
    """A CPU fault on managed memory (uvm_va_space.c)."""
    yield from uvm_va_space_cpu_fault(va_space, thread, page, write)


@waiting_step
def uvm_va_space_cpu_fault(va_space: VaSpace, thread: Thread, page: int, write: bool) -> Wait:
    """Find the block and serve; a throttled fault sleeps without locks and starts again (uvm_va_space.c)."""
    thread.note(va=page << PAGE_SHIFT, pages=1)
    thread.charge(va_space.gpu.costs.cpu_fault)
    context = ServiceContext()
    while True:
        block = uvm_va_block_find_create_managed(va_space, thread, page)
        status: int = yield from uvm_va_block_cpu_fault(block, thread, context, page, write)
        if status == NV_OK:
            return
        _throttle_event(thread, "UvmEventTypeThrottlingStart", page)
        thread.now = max(thread.now, context.wakeup_time_stamp)
        yield from thread.sync()
        _throttle_event(thread, "UvmEventTypeThrottlingEnd", page)


def _throttle_event(thread: Thread, name: str, page: int) -> None:
    thread.engine.trace.span(
        name, "cpu", thread.now, thread.now, parent=thread.row, va=page << PAGE_SHIFT, pages=1, bytes=PAGE
    )


@waiting_step
def uvm_va_block_cpu_fault(block: VaBlock, thread: Thread, context: ServiceContext, page: int, write: bool) -> Wait:
    """One block operation for a CPU fault; returns NV_STATUS (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    yield from block.lock.acquire(thread)
    try:
        while True:
            status: int = yield from block_cpu_fault_locked(block, thread, context, page, write)
            if status != NV_ERR_MORE_PROCESSING_REQUIRED:
                return status
            context.num_retries += 1
    finally:
        yield from block.lock.release(thread)
        uvm_va_block_retry_deinit(context.block_context, thread, gpu)


@waiting_step
def block_cpu_fault_locked(block: VaBlock, thread: Thread, context: ServiceContext, page: int, write: bool) -> Wait:
    """Permission, thrashing, destination, service: the GPU path for one page; NV_STATUS (uvm_va_block.c)."""
    index = page - block.first
    context.reset()
    if not context.num_retries:
        context.num_retries = 1
        thread.engine.trace.span(
            "UvmEventTypeCpuFault", "cpu", thread.now, thread.now, parent=thread.row, va=page << PAGE_SHIFT, pages=1,
            cause="write" if write else "read", value=PC + (8 if write else 0),
        )  # fmt: skip
    if not block.range.migratable:
        why = f"address {page << PAGE_SHIFT:#x} while a kernel may use it (no GPU page faults on this machine)"
        raise DriverError(errno.EFAULT, "NV_ERR_INVALID_OPERATION, SIGBUS", "block_cpu_fault_locked", why)
    if holds(block.pte[CPU][READ_WRITE_ATOMIC if write else READ_ONLY], index):
        return NV_OK
    hint = uvm_perf_thrashing_get_hint(block, thread, index, CPU)
    if hint.type == THROTTLE:
        context.wakeup_time_stamp = hint.end
        return NV_WARN_MORE_PROCESSING_REQUIRED
    if hint.type == PIN:
        context.pinned[index] = hint.residency
    context.faulted = bit(index)
    context.wanted[READ_WRITE_ATOMIC if write else READ_ONLY] = bit(index)
    uvm_va_block_select_residency(block, thread, context, CPU)
    return (yield from uvm_va_block_service_locked(block, thread, context, CPU))
