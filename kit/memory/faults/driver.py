"""The way down to a driver's fault operation, for accesses to an area of its own (arch/x86/mm/fault.c @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.memory.faults.fault import handle_mm_fault
from kit.memory.faults.file_backed import finish_fault
from kit.memory.faults.write_protect import driver_mkwrite
from kit.memory.types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_USER,
    FAULT_FLAG_WRITE,
    PAGE,
    VM_FAULT_ERROR,
    VM_FAULT_NOPAGE,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_SHARED,
    Bit,
    Kind,
    Vmf,
)  # fmt: skip

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["driver_area_fault"]

_SERVED = VM_FAULT_ERROR | VM_FAULT_RETRY | VM_FAULT_NOPAGE


def driver_area_fault(vma: Vma, thread: Thread, page: int, write: bool, slot: int) -> Wait:
    """`do_user_addr_fault` down to the driver's operation, for one page of a driver's area whose entry is at `slot`.

    It records no step: such an area's faults are its driver's, from the first documented one on. The way down costs
    what it does elsewhere. Returns VM_FAULT_*.
    """
    mm, result = vma.mm, 0
    areas = mm.changes
    yield from mm.mmap_lock.read_acquire(thread)
    try:
        if mm.changes != areas and mm.find(page) is not vma:
            return 0  # the area went while we waited for the lock: the access is tried again
        vmf = Vmf(vma, page * PAGE, FAULT_FLAG_USER | FAULT_FLAG_ALLOW_RETRY | (FAULT_FLAG_WRITE if write else 0))
        if mm.table.kind.item(slot) == Kind.NONE:
            _count(mm, thread)
            fault = getattr(vma.ops, "fault", None)
            result = (yield from fault(vmf, thread)) if fault is not None else VM_FAULT_SIGBUS  # __do_fault
            if not result & _SERVED:
                finish_fault(vmf, thread)
        else:
            result = yield from _driver_entry_fault(vmf, thread)
    finally:
        if not result & VM_FAULT_RETRY:
            yield from mm.mmap_lock.read_release(thread)
    if mm.costs.fault_entry:
        thread.charge(mm.costs.fault_entry)
    return result


def _driver_entry_fault(vmf: Vmf, thread: Thread) -> Wait:
    """The entry is there, but does not allow the access: a write to a shared area is the driver's to judge."""
    vma, table = vmf.vma, vmf.vma.mm.table
    bits = table.bits.item(table.slot_of(vmf.address // PAGE))
    if vmf.flags & FAULT_FLAG_WRITE and vma.flags & VM_SHARED and not bits & Bit.PROTNONE:
        result: int = yield from driver_mkwrite(vmf, thread)
        if result & _SERVED:
            _count(vma.mm, thread)
            return result
    return (yield from handle_mm_fault(vma, thread, vmf.address, vmf.flags))


def _count(mm: Mm, thread: Thread) -> None:
    mm.faults += 1
    if mm.costs.handle_mm_fault:  # a driver's flow may pay for the whole way down itself
        thread.charge(mm.costs.handle_mm_fault)
