"""uvm_va_space.c, uvm_va_range.c, uvm.c: managed allocation, free, blocks on demand, CPU faults."""

from __future__ import annotations

import errno

from kit.drivers.uvm.perf_thrashing import PIN, THROTTLE, uvm_perf_thrashing_get_hint
from kit.drivers.uvm.types import (
    BLOCK_PAGES,
    CPU,
    GPU,
    PAGE,
    READ_ONLY,
    READ_WRITE_ATOMIC,
    MoreProcessingRequired,
    VaBlock,
    VaRange,
    VaSpace,
)
from kit.drivers.uvm.va_block_map import uvm_va_block_unmap_mask
from kit.drivers.uvm.va_block_populate import uvm_va_block_retry_deinit
from kit.drivers.uvm.va_block_service import ServiceContext, uvm_va_block_select_residency, uvm_va_block_service_locked
from kit.errors import DriverError, Errno
from kit.memory.reclaim.alloc import free_pages_exact
from kit.memory.space.special import install_special_mapping
from kit.memory.space.vma import Vma
from kit.memory.table.pagemask import runs
from kit.memory.types import (
    FAULT_FLAG_WRITE,
    VM_DONTCOPY,
    VM_FAULT_NOPAGE,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_MIXEDMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    Vmf,
)
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = [
    "PC",
    "VmOpsManaged",
    "uvm_mmap",
    "uvm_va_block_find_create_in_range",
    "uvm_va_range_block_create",
    "uvm_vm_close_managed",
    "uvm_vm_fault",
]

# uvm_mmap wants a shared mapping that may be read and written. A child of fork gets none: the driver would disable it.
VM_FLAGS = VM_READ | VM_WRITE | VM_SHARED | VM_MAYREAD | VM_MAYWRITE | VM_MAYSHARE | VM_MIXEDMAP | VM_DONTCOPY
PC = 0x55_5555_1000  # program counter that CPU faults report: the kit runs no real instructions


@step
def uvm_mmap(va_space: VaSpace, thread: Thread, nbytes: int, name: str, offset: int = 0) -> VaRange:
    """Create a managed range of `nbytes`; nothing is populated (uvm.c).

    Parameters
    ----------
    offset : int
        The range starts this many bytes into a 2 MiB block.
    """
    thread.charge(va_space.gpu.costs.ioctl)
    return uvm_va_range_create_mmap(va_space, thread, nbytes, name, offset)


@step
def uvm_va_range_create_mmap(va_space: VaSpace, thread: Thread, nbytes: int, name: str, offset: int) -> VaRange:
    """The range and its VMA (uvm_va_range.c)."""
    shift, pages = offset // PAGE, -(-nbytes // PAGE)
    first = -(-(va_space.next_page - shift) // BLOCK_PAGES) * BLOCK_PAGES + shift
    vma = install_special_mapping(va_space.mm, first, pages, VM_FLAGS, VmOpsManaged(va_space), name, pgoff=first)
    va_space.next_page = vma.end
    va_space.mm.table.reserve(vma.first, vma.pages)
    slot = va_space.gpu.table.reserve(vma.first, vma.pages)
    va_space.content.grow(slot + vma.pages)
    va_range = VaRange(vma.first, vma.pages, vma, va_space, slot)
    va_space.ranges.append(va_range)
    thread.note(va=vma.first * PAGE, pages=vma.pages, bytes=nbytes)
    return va_range


def uvm_va_range_block_create(va_range: VaRange, thread: Thread, page: int) -> VaBlock:
    """Return the block of `page`, creating it at first use (uvm_va_range.c)."""
    index = page // BLOCK_PAGES
    block = va_range.blocks.get(index)
    if block is None:
        first = max(index * BLOCK_PAGES, va_range.first)
        pages = min((index + 1) * BLOCK_PAGES, va_range.end) - first
        slots = (va_range.va_space.mm.table.slot_of(first), va_range.slot + first - va_range.first)
        block = va_range.blocks[index] = VaBlock(va_range, first, pages, slots)
    return block


@step
def uvm_va_block_find_create_in_range(va_space: VaSpace, thread: Thread, page: int) -> VaBlock | None:
    """Return the block of a faulting page, or None outside every managed range (uvm_va_block.c)."""
    va_range = va_space.find(page)
    return None if va_range is None else uvm_va_range_block_create(va_range, thread, page)


class VmOpsManaged:
    """uvm_vm_ops_managed: what Linux calls for an area of managed memory (uvm.c)."""

    def __init__(self, va_space: VaSpace) -> None:
        self.va_space = va_space

    def fault(self, vmf: Vmf, thread: Thread) -> Wait:
        """A page without an entry, or (``page_mkwrite``) a write to one that is read-only."""
        write = bool(vmf.flags & FAULT_FLAG_WRITE)
        return uvm_vm_fault(self.va_space, thread, vmf.address // PAGE, write)

    page_mkwrite = fault

    def may_split(self, vma: Vma, page: int) -> int:
        """An area is unmapped whole: ranges are not cut along with it, as uvm_vm_open_managed would do."""
        return Errno(errno.EINVAL, "uvm_vm_open_managed", f"{vma} cannot be cut at {page * PAGE:#x}")

    def close(self, vma: Vma, thread: Thread) -> None:
        """The area was unmapped."""
        uvm_vm_close_managed(self.va_space, thread, vma)


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
    thread.note(va=page * PAGE, pages=1)
    thread.charge(va_space.gpu.costs.cpu_fault)
    context = ServiceContext()
    while True:
        block = uvm_va_block_find_create_managed(va_space, thread, page)
        until = yield from uvm_va_block_cpu_fault(block, thread, context, page, write)
        if until is None:
            return
        _throttle_event(thread, "UvmEventTypeThrottlingStart", page)
        thread.now = max(thread.now, until)
        yield from thread.sync()
        _throttle_event(thread, "UvmEventTypeThrottlingEnd", page)


def _throttle_event(thread: Thread, name: str, page: int) -> None:
    thread.engine.trace.span(
        name, "cpu", thread.now, thread.now, parent=thread.row, va=page * PAGE, pages=1, bytes=PAGE
    )


@step
def uvm_va_block_find_create_managed(va_space: VaSpace, thread: Thread, page: int) -> VaBlock:
    """Return the block of a page known to be managed (uvm_va_block.c)."""
    block = uvm_va_block_find_create_in_range(va_space, thread, page)
    assert block is not None
    return block


@waiting_step
def uvm_va_block_cpu_fault(block: VaBlock, thread: Thread, context: ServiceContext, page: int, write: bool) -> Wait:
    """One block operation for a CPU fault; returns when to try again if it was throttled (uvm_va_block.c)."""
    gpu = block.range.va_space.gpu
    yield from block.lock.acquire(thread)
    try:
        while True:
            try:
                return (yield from block_cpu_fault_locked(block, thread, context, page, write))
            except MoreProcessingRequired:
                context.num_retries += 1
    finally:
        yield from block.lock.release(thread)
        uvm_va_block_retry_deinit(context.block_context, thread, gpu)


@waiting_step
def block_cpu_fault_locked(block: VaBlock, thread: Thread, context: ServiceContext, page: int, write: bool) -> Wait:
    """Permission, thrashing, destination, service: the GPU path for one page (uvm_va_block.c)."""
    index = page - block.first
    context.reset()
    if not context.num_retries:
        context.num_retries = 1
        thread.engine.trace.span(
            "UvmEventTypeCpuFault", "cpu", thread.now, thread.now, parent=thread.row, va=page * PAGE, pages=1,
            cause="write" if write else "read", value=PC + (8 if write else 0),
        )  # fmt: skip
    if not block.range.migratable:
        why = f"address {page * PAGE:#x} while a kernel may use it (no GPU page faults on this machine)"
        raise DriverError(errno.EFAULT, "NV_ERR_INVALID_OPERATION, SIGBUS", "block_cpu_fault_locked", why)
    if block.pte[CPU][READ_WRITE_ATOMIC if write else READ_ONLY] >> index & 1:
        return None
    hint = uvm_perf_thrashing_get_hint(block, thread, index, CPU)
    if hint.type == THROTTLE:
        return hint.end
    if hint.type == PIN:
        context.pinned[index] = hint.residency
    context.faulted = 1 << index
    context.wanted[READ_WRITE_ATOMIC if write else READ_ONLY] = 1 << index
    uvm_va_block_select_residency(block, thread, context, CPU)
    yield from uvm_va_block_service_locked(block, thread, context, CPU)
    return None


@step
def uvm_vm_close_managed(va_space: VaSpace, thread: Thread, vma: Vma) -> None:
    """Managed memory is freed by unmapping it (uvm.c)."""
    thread.charge(va_space.gpu.costs.ioctl)
    uvm_destroy_vma_managed(va_space, thread, vma)


@step
def uvm_destroy_vma_managed(va_space: VaSpace, thread: Thread, vma: Vma) -> None:
    """Destroy the ranges of the area: more than one where advice has split it (uvm.c)."""
    for part in [r for r in va_space.ranges if r.vma is vma]:
        uvm_va_range_destroy(va_space, thread, part)
        va_space.ranges.remove(part)
        va_space.content.forget(part.slot, part.pages)


@step
def uvm_va_range_destroy(va_space: VaSpace, thread: Thread, va_range: VaRange) -> None:
    """Destroy a range of any type (uvm_va_range.c)."""
    uvm_va_range_destroy_managed(va_space, thread, va_range)


@step
def uvm_va_range_destroy_managed(va_space: VaSpace, thread: Thread, va_range: VaRange) -> None:
    """Kill the blocks one by one (uvm_va_range.c)."""
    for block in va_range.blocks.values():
        uvm_va_block_kill(block, thread)
    va_range.blocks.clear()


@step
def uvm_va_block_kill(block: VaBlock, thread: Thread) -> None:
    """Take a block out of use (uvm_va_block.c)."""
    block_kill(block, thread)


@step
def block_kill(block: VaBlock, thread: Thread) -> None:
    """Unmap everybody, then give the memory of both sides back (uvm_va_block.c)."""
    va_space = block.range.va_space
    uvm_va_block_unmap_mask(block, thread, (CPU, GPU), block.all_pages)
    thread.now = max(thread.now, block.tracker)
    trace = thread.engine.trace
    for mask, places in _places(block):
        for first, count in runs(mask):
            trace.move(thread.now, thread.now, block.first + first, count, places, 0, "free")
    for chunk in list(block.gpu_chunks.values()):
        va_space.gpu.pmm.free(thread, chunk)
    for frame, count, _ in block.cpu_chunks.values():
        free_pages_exact(va_space.host, frame, count)
    block.gpu_chunks.clear()
    block.cpu_chunks.clear()
    block.resident = [0, 0]


def _places(block: VaBlock) -> list[tuple[int, int]]:
    """Return (pages, residency mask) for every kind of residency in the block."""
    cpu, gpu = block.resident[CPU], block.resident[GPU]
    return [(cpu & ~gpu, 1 << CPU), (gpu & ~cpu, 1 << GPU), (cpu & gpu, 1 << CPU | 1 << GPU)]
