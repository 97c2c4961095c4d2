"""Areas of drivers: how they come, and what is put into them that is no memory (mm/mmap.c, mm/memory.c @ 7.0)."""

from __future__ import annotations

from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING

import numpy as np

from kit.errors import DriverError, Errno
from kit.memory.reclaim.zap import zap_page_range_single
from kit.memory.space.vma import Vma
from kit.memory.types import PAGE, VM_DONTEXPAND, VM_IO, VM_PFNMAP, VM_SHARED, Bit, Kind
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.files.file import File
    from kit.memory.space.mm import Mm
    from kit.memory.types import VmOperations
    from kit.sim.engine import Thread, Wait

__all__ = ["install_special_mapping", "remap_pfn_range", "unmap_mapping_range", "zap_vma_ptes"]


def install_special_mapping(
    mm: Mm, first: int, pages: int, flags: int, ops: VmOperations, name: str, pgoff: int = 0
) -> Vma:
    """Give a driver an area of its own at pages [first, first + pages); nobody else may be changing areas just now.

    What `mmap` does of a driver's device file between finding the place and calling the driver.

    Parameters
    ----------
    flags : int
        VM_* bits.
    ops : VmOperations
        Who serves its faults.
    pgoff : int
        Offset in pages into the driver's file.

    Raises
    ------
    DriverError
        EINVAL: no pages. EEXIST: something is there.
    """
    if pages <= 0:
        raise DriverError(EINVAL, "EINVAL", "mmap", f"{name}: {pages} pages")
    if mm.vmas_in(first, pages):
        raise DriverError(EEXIST, "EEXIST", "mmap", f"{name}: {first * PAGE:#x} is mapped")
    vma = Vma(mm, first, pages, flags | VM_DONTEXPAND, pgoff, ops=ops, name=name)
    mm.insert(vma)
    return vma


@step
def remap_pfn_range(vma: Vma, thread: Thread, address: int, pfn: int, pages: int) -> int:
    """Map raw page frames without struct page (registers, carve-outs) from `address`; returns 0 or -EINVAL."""
    first = address // PAGE
    if first < vma.first or first + pages > vma.end:
        return Errno(EINVAL, "remap_pfn_range", f"{address:#x} and {pages} pages are not within the area")
    vma.flags |= VM_IO | VM_PFNMAP | VM_DONTEXPAND
    slots = vma.mm.table.slots(first, pages, create=True)
    bits = Bit.SPECIAL | Bit.YOUNG | (Bit.WRITABLE if vma.writable and vma.flags & VM_SHARED else 0)
    vma.mm.table.set_entries(slots, Kind.PRESENT, bits, np.arange(pfn, pfn + pages))
    thread.charge(vma.mm.costs.pte_write * pages)
    return 0


def zap_vma_ptes(vma: Vma, thread: Thread, address: int, length: int) -> Wait:
    """Remove a driver's own entries from bytes [address, address + length) of its area."""
    yield from zap_page_range_single(vma, thread, address // PAGE, length // PAGE)


@waiting_step
def unmap_mapping_range(file: File, thread: Thread, first: int, count: int) -> Wait:
    """Zap indices [first, first + count) of a file, or of a driver's device file, wherever they are mapped."""
    for vma in list(file.vmas):
        low = max(vma.pgoff, first) - vma.pgoff + vma.first
        high = min(vma.pgoff + vma.pages, first + count) - vma.pgoff + vma.first
        if low < high:
            yield from zap_page_range_single(vma, thread, low, high - low)
