"""mmap and munmap, and the other calls that change areas by their names (mm/mmap.c, mm/vma.c @ 7.0)."""

from __future__ import annotations

from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING

from kit.errors import Errno
from kit.memory.files.file import File
from kit.memory.space.mm import MMAP_MIN_ADDR, Mm
from kit.memory.space.unmapped_area import get_unmapped_area
from kit.memory.space.vma import Vma
from kit.memory.space.vma_ops import vma_merge
from kit.memory.syscalls.mprotect import mprotect
from kit.memory.syscalls.mremap import mremap
from kit.memory.syscalls.munmap import do_vmi_munmap
from kit.memory.syscalls.populate import populate
from kit.memory.types import (
    HPAGE_PMD_NR,
    HPAGE_PMD_SIZE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_POPULATE,
    MAP_SHARED,
    PAGE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    VM_EXEC,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    VmOperations,
)
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

__all__ = ["mmap", "mprotect", "mremap", "munmap", "vm_flags_of"]

_MAY = VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC


def vm_flags_of(prot: int) -> int:
    """Return VM_READ, VM_WRITE and VM_EXEC for PROT_* bits; on x86-64 what can be written can be read."""
    read = VM_READ if prot & (PROT_READ | PROT_WRITE) else 0
    return read | (VM_WRITE if prot & PROT_WRITE else 0) | (VM_EXEC if prot & PROT_EXEC else 0)


@waiting_step
def mmap(
    mm: Mm, thread: Thread, length: int, prot: int, flags: int, file: File | None = None, offset: int = 0,
    addr: int | None = None, align: int | None = None, hugetlb: int | None = None, ops: VmOperations | None = None,
    vm_flags: int = 0, name: str = "",
) -> Wait:  # fmt: skip
    """Map memory and return its address (bytes), or -errno.

    Parameters
    ----------
    length, offset : int
        Bytes.
    prot, flags : int
        PROT_* and MAP_* bits. MAP_SHARED | MAP_ANONYMOUS makes a shmem file.
    addr : int, optional
        A hint, or the place itself with MAP_FIXED (which unmaps what is there).
    align : int, optional
        Bytes; the address is a multiple of it.
    hugetlb : int, optional
        Page size in bytes of a hugetlb mapping: 2 MiB (the default of MAP_HUGETLB) or 1 GiB.
    ops : VmOperations, optional
        A driver's area. ``ops.mmap(vma, thread)``, where it exists, is called under the lock and may set flags of the
        area and fill it; a negative result undoes the mapping.
    vm_flags : int
        Further VM_* bits that the driver sets (VM_IO, VM_PFNMAP, VM_MIXEDMAP, ...).

    Returns
    -------
    int
        The address; -EINVAL: no length, an unaligned offset or fixed address; -EEXIST: MAP_FIXED_NOREPLACE over an
        area; -ENOMEM: no gap of that size, or too few huge pages in the pool.
    """
    thread.charge(mm.costs.syscall)
    page_size = (hugetlb or HPAGE_PMD_SIZE) if flags & MAP_HUGETLB or hugetlb else PAGE
    fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)
    if length <= 0 or offset % PAGE or (fixed and (addr is None or addr % page_size)):
        return Errno(EINVAL, "mmap", f"length {length}, offset {offset:#x}, addr {addr}")
    pages = -(-length // page_size) * (page_size // PAGE)
    yield from mm.mmap_lock.write_acquire(thread)
    where = yield from _place(mm, thread, pages, flags, addr, max(align or PAGE, page_size), file, page_size)
    if where >= 0:
        bits = vm_flags_of(prot) | vm_flags | _MAY | (VM_LOCKED if flags & MAP_LOCKED else 0)
        bits |= VM_SHARED | VM_MAYSHARE if flags & MAP_SHARED else 0
        vma = Vma(mm, where // PAGE, pages, bits, offset // PAGE, file, None, ops, name, page_size)
        result = yield from _mmap_region(mm, thread, vma, flags)
        where = where if result >= 0 else result
    thread.note(va=max(where, -1), pages=pages, status="ok" if where >= 0 else repr(where))
    yield from mm.mmap_lock.write_release(thread)
    if where >= 0 and flags & (MAP_POPULATE | MAP_LOCKED):
        yield from populate(mm, thread, where // PAGE, pages)
    return where


def _place(
    mm: Mm, thread: Thread, pages: int, flags: int, addr: int | None, align: int, file: File | None, page_size: int
) -> Wait:
    """Find the address, making room for a fixed one."""
    if flags & MAP_FIXED_NOREPLACE and addr is not None:
        if mm.vmas_in(addr // PAGE, pages):
            return Errno(EEXIST, "mmap", f"{addr:#x} is mapped")
        return addr
    if flags & MAP_FIXED and addr is not None:
        if addr < MMAP_MIN_ADDR:
            return Errno(EINVAL, "mmap", f"{addr:#x} is below mmap_min_addr")
        if mm.vmas_in(addr // PAGE, pages):
            result = yield from do_vmi_munmap(mm, thread, addr // PAGE, pages)
            if result < 0:
                return result
        return addr
    if addr is not None and addr >= MMAP_MIN_ADDR and not addr % align and not mm.vmas_in(addr // PAGE, pages):
        return addr
    huge = file is None and pages % HPAGE_PMD_NR == 0 and page_size == PAGE
    return get_unmapped_area(mm, pages, align, huge and align == PAGE)


def _mmap_region(mm: Mm, thread: Thread, vma: Vma, flags: int) -> Wait:
    """Set the area up; returns 0 or -errno (mmap_region)."""
    if vma.page_size > PAGE:
        from kit.memory.huge.hugetlb import hugetlb_reserve_pages  # its faults need this module's callers

        vma.flags |= VM_HUGETLB
        result = hugetlb_reserve_pages(vma)
        if result < 0:
            return result
    elif flags & MAP_ANONYMOUS and flags & MAP_SHARED and vma.ops is None:
        vma.file = File(mm.memory, vma.pages, shmem=True, name="dev/zero", anonymous=True)
        vma.pgoff = 0
    elif vma.file is None and vma.ops is None:
        vma.pgoff = vma.first
    mm.insert(vma)
    thread.charge(mm.costs.vma_op)
    hook = getattr(vma.ops, "mmap", None)
    if hook is not None:
        result = yield from hook(vma, thread)
        if result < 0:
            yield from do_vmi_munmap(mm, thread, vma.first, vma.pages)
            return result
    vma_merge(mm, thread, vma.first, vma.end)
    return 0


@waiting_step
def munmap(mm: Mm, thread: Thread, start: int, length: int) -> Wait:
    """Unmap bytes [start, start + length), rounded up to pages.

    Returns
    -------
    int
        0, also where nothing was mapped; -EINVAL: unaligned start or no length, or a cut inside a huge page.
    """
    thread.charge(mm.costs.syscall)
    if start % PAGE or length <= 0:
        return Errno(EINVAL, "munmap", f"start {start:#x}, length {length}")
    pages = -(-length // PAGE)
    thread.note(va=start, pages=pages)
    yield from mm.mmap_lock.write_acquire(thread)
    result = yield from do_vmi_munmap(mm, thread, start // PAGE, pages, unlock=True)
    if result < 0:
        thread.note(va=start, pages=pages, status=repr(result))
    return result
