"""Faulting ranges in on behalf of the kernel (mm/gup.c populate_vma_page_range @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.memory.types import FAULT_FLAG_WRITE, VM_FAULT_ERROR, VM_IO, VM_PFNMAP, VM_SHARED
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["populate"]


@waiting_step
def populate(mm: Mm, thread: Thread, first: int, count: int, write: bool | None = None) -> Wait:
    """Fault in pages [first, first + count), taking the mmap lock; returns the VM_FAULT_* error bits met.

    Parameters
    ----------
    write : bool, optional
        Populate for writing; None: for writing where the area is private and writable, as MAP_POPULATE does.
    """
    from kit.memory.faults.fault import handle_mm_faults

    result = 0
    yield from mm.mmap_lock.read_acquire(thread)
    for vma in mm.vmas_in(first, count):
        if vma.flags & (VM_IO | VM_PFNMAP):
            continue
        dirty = vma.writable and not vma.flags & VM_SHARED if write is None else write
        need = 2 if dirty else 1
        low, high = max(vma.first, first), min(vma.end, first + count)
        for start in range(low, high, 8192):
            pages = np.arange(start, min(start + 8192, high))
            for _attempt in range(16):
                pages = pages[mm.table.rights[mm.table.slots_of(pages)] < need]
                if not len(pages) or result & VM_FAULT_ERROR:
                    break
                result |= yield from handle_mm_faults(vma, thread, pages, FAULT_FLAG_WRITE if dirty else 0)
    yield from mm.mmap_lock.read_release(thread)
    return result & VM_FAULT_ERROR
