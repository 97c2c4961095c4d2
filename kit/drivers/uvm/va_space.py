"""uvm.c, uvm_va_range.c: managed memory is mapped, and goes with its area."""

from __future__ import annotations

import errno
from typing import Final

from kit.drivers.uvm.cpu_fault import uvm_vm_fault
from kit.drivers.uvm.types import (
    BLOCK_PAGES,
    CPU,
    GPU,
    PAGE,
    PAGE_SHIFT,
    VaBlock,
    VaRange,
    VaSpace,
)
from kit.drivers.uvm.va_block_map import uvm_va_block_unmap_mask
from kit.errors import Errno
from kit.memory.reclaim.alloc import free_pages_exact
from kit.memory.space.special import install_special_mapping
from kit.memory.space.vma import Vma
from kit.memory.table.pagemask import EMPTY, PageMask, runs
from kit.memory.types import (
    FAULT_FLAG_WRITE,
    VM_DONTCOPY,
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
from kit.sim.trace import step

__all__ = ["VmOpsManaged", "uvm_mmap", "uvm_vm_close_managed"]

# uvm_mmap wants a shared mapping that may be read and written. A child of fork gets none: the driver would disable it.
VM_FLAGS: Final = VM_READ | VM_WRITE | VM_SHARED | VM_MAYREAD | VM_MAYWRITE | VM_MAYSHARE | VM_MIXEDMAP | VM_DONTCOPY


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
    thread.note(va=vma.first << PAGE_SHIFT, pages=vma.pages, bytes=nbytes)
    return va_range


class VmOpsManaged:
    """uvm_vm_ops_managed: what Linux calls for an area of managed memory (uvm.c)."""

    def __init__(self, va_space: VaSpace) -> None:
        self.va_space = va_space

    def fault(self, vmf: Vmf, thread: Thread) -> Wait:
        """A page without an entry, or (``page_mkwrite``) a write to one that is read-only."""
        write = bool(vmf.flags & FAULT_FLAG_WRITE)
        return uvm_vm_fault(self.va_space, thread, vmf.address // PAGE, write)

    def page_mkwrite(self, vmf: Vmf, thread: Thread) -> Wait:
        """A write to an entry that is read-only: the same."""
        return self.fault(vmf, thread)

    def may_split(self, vma: Vma, page: int) -> int:
        """An area is unmapped whole: ranges are not cut along with it, as uvm_vm_open_managed would do."""
        return Errno(errno.EINVAL, "uvm_vm_open_managed", f"{vma} cannot be cut at {page << PAGE_SHIFT:#x}")

    def close(self, vma: Vma, thread: Thread) -> None:
        """The area was unmapped."""
        uvm_vm_close_managed(self.va_space, thread, vma)


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
    block.resident = [EMPTY, EMPTY]


def _places(block: VaBlock) -> list[tuple[PageMask, int]]:
    """Return (pages, residency mask) for every kind of residency in the block."""
    cpu, gpu = block.resident[CPU], block.resident[GPU]
    return [(cpu & ~gpu, 1 << CPU), (gpu & ~cpu, 1 << GPU), (cpu & gpu, 1 << CPU | 1 << GPU)]
