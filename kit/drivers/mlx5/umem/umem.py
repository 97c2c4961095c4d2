"""core/umem.c: user memory that a region is made of; here what both kinds share, and the pinned kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EINVAL, ENOMEM, EOPNOTSUPP, EPERM
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import PAGE, PAGE_SHIFT, U64_MAX, Access
from kit.drivers.mlx5.umem.odp import ib_umem_odp_release
from kit.errors import Errno
from kit.memory.faults.gup import pin_user_pages_fast, unpin_user_pages
from kit.memory.types import FOLL_LONGTERM, FOLL_WRITE, PG
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.umem.odp import IbUmemOdp
    from kit.memory.space.mm import Mm

__all__ = ["IbUmem", "ib_access_writable", "ib_umem_find_best_pgsz", "ib_umem_get", "ib_umem_release"]

PIN_BATCH = PAGE // 8  # page pointers in the page that __get_free_page gives
UINT_MAX = (1 << 32) - 1
WRITABLE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC | Access.MW_BIND
NO_PAGES: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


@dataclass(eq=False)
class IbUmem:
    """Struct ib_umem.

    Attributes
    ----------
    address, length : int
        Bytes, as the user gave them.
    pfns, dma : ndarray
        The pinned pages in order, and their DMA addresses; empty on demand.
    """

    ibdev: Mlx5IbDev
    address: int
    length: int
    writable: bool
    owning_mm: Mm
    is_odp: bool = False
    is_dmabuf: bool = False
    pfns: NDArray[np.integer] = field(default_factory=lambda: NO_PAGES, repr=False)
    dma: NDArray[np.uint64] = field(default_factory=lambda: NO_PAGES.astype(np.uint64), repr=False)

    def num_pages(self) -> int:
        """4 KiB pages that the region touches (ib_umem_num_pages)."""
        return (self.address + self.length + PAGE - 1 >> PAGE_SHIFT) - (self.address >> PAGE_SHIFT)

    def num_dma_blocks(self, page_shift: int, iova: int) -> int:
        """Translation entries that it needs (ib_umem_num_dma_blocks)."""
        size = 1 << page_shift
        return ((iova + self.length + size - 1 & -size) - (iova & -size)) >> page_shift


def ib_access_writable(access: int) -> bool:
    """Whether the hardware may write: any right to write, or to bind a window that has it (ib_verbs.h)."""
    return bool(access & WRITABLE)


@waiting_step
def ib_umem_get(dev: Mlx5IbDev, thread: Thread, mm: Mm, addr: int, size: int, access: int) -> Wait:
    """Charge, pin and DMA-map a range; return the IbUmem or an errno (core/umem.c).

    The pages are pinned for good: whatever the CPU's page table does later, the hardware keeps using them.
    """
    name = "ib_umem_get"
    if addr + size > U64_MAX or addr + size + PAGE - 1 > U64_MAX:
        return Errno(EINVAL, name, f"{size} bytes from {addr:#x} wrap around")
    if mm.rlimit_memlock == 0:  # can_do_mlock
        return Errno(EPERM, name, "RLIMIT_MEMLOCK is 0")
    if access & Access.ON_DEMAND:
        return Errno(EOPNOTSUPP, name, "on-demand regions are not pinned")
    umem = IbUmem(dev, addr, size, ib_access_writable(access), mm)
    npages = umem.num_pages()
    thread.note(va=addr, pages=npages, bytes=size)
    if not 0 < npages <= UINT_MAX:
        return Errno(EINVAL, name, f"{npages} pages")
    mm.pinned_vm += npages
    if mm.pinned_vm > mm.rlimit_memlock >> PAGE_SHIFT:
        mm.pinned_vm -= npages
        return Errno(ENOMEM, name, f"{npages} more pinned pages exceed RLIMIT_MEMLOCK = {mm.rlimit_memlock}")
    flags = FOLL_LONGTERM | (FOLL_WRITE if umem.writable else 0)
    ret = yield from _pin(umem, thread, npages, flags)
    if ret >= 0:
        ret = ib_dma_map_sgtable_attrs(umem, thread)
    if ret < 0:
        __ib_umem_release(umem, thread, False)
        mm.pinned_vm -= npages
        return ret
    return umem


@step
def ib_dma_map_sgtable_attrs(umem: IbUmem, thread: Thread) -> int:
    """Give all pages DMA addresses; contiguous ones follow each other (ib_verbs.h)."""
    dev = umem.ibdev
    dma = None if dev.inject.hit("dma_map") else dev.hca.dma.map_pages(umem.pfns)
    if dma is None:
        return Errno(ENOMEM, "ib_dma_map_sgtable_attrs", "no DMA address")
    umem.dma = dma
    thread.charge(dev.costs.dma_map_page * _pieces(umem))
    return 0


def _pieces(umem: IbUmem) -> int:
    """Entries of the scatter/gather table: pages that lie side by side are one."""
    return int(np.count_nonzero(np.diff(umem.pfns) != 1)) + 1 if len(umem.pfns) else 0


@step
def ib_dma_unmap_sgtable_attrs(umem: IbUmem, thread: Thread) -> None:
    """Take the DMA addresses back (ib_verbs.h)."""
    umem.ibdev.hca.dma.unmap_pages(umem.dma)
    thread.charge(umem.ibdev.costs.dma_unmap_page * _pieces(umem))
    umem.dma = umem.dma[:0]


def _pin(umem: IbUmem, thread: Thread, npages: int, flags: int) -> Wait:
    """Pin batch after batch; 0 or the errno of the first that fails."""
    got: list[NDArray[np.integer]] = []
    at, ret = umem.address & -PAGE, 0
    while npages and ret >= 0:
        ret = yield from pin_user_pages_fast(umem.owning_mm, thread, at, min(npages, PIN_BATCH), flags)
        if isinstance(ret, int):
            break
        got.append(ret)
        npages -= len(ret)
        at += len(ret) << PAGE_SHIFT
        ret = 0
    umem.pfns = np.concatenate(got) if got else NO_PAGES
    thread.charge(umem.ibdev.costs.pin_page * len(umem.pfns))
    return ret


@step
def __ib_umem_release(umem: IbUmem, thread: Thread, dirty: bool) -> None:
    """Unmap from the device, then unpin (core/umem.c)."""
    if len(umem.dma):
        ib_dma_unmap_sgtable_attrs(umem, thread)
    if len(umem.pfns):
        unpin_user_page_range_dirty_lock(umem, thread, umem.writable and dirty)


@step
def unpin_user_page_range_dirty_lock(umem: IbUmem, thread: Thread, make_dirty: bool) -> None:
    """Give the pins up, after marking dirty what the hardware may have written (mm/gup.c)."""
    memory = umem.owning_mm.memory
    if make_dirty:
        memory.flags[memory.head(umem.pfns)] |= PG.DIRTY
    unpin_user_pages(memory, umem.pfns)
    thread.charge(umem.ibdev.costs.unpin_page * len(umem.pfns))
    umem.pfns = NO_PAGES


@waiting_step
def ib_umem_release(umem: IbUmem | IbUmemOdp | None, thread: Thread) -> Wait:
    """Let go of the memory: unmap and unpin; on demand, unmap and stop watching; of a dma-buf, detach (core/umem.c)."""
    if umem is None:
        return
    if umem.is_dmabuf:
        from kit.drivers.mlx5.umem.dmabuf import IbUmemDmabuf, ib_umem_dmabuf_release

        yield from ib_umem_dmabuf_release(cast("IbUmemDmabuf", umem), thread)
        return
    if not isinstance(umem, IbUmem):
        yield from ib_umem_odp_release(umem, thread)
        return
    __ib_umem_release(umem, thread, True)
    umem.owning_mm.pinned_vm -= umem.num_pages()


@step
def ib_umem_find_best_pgsz(umem: IbUmem, thread: Thread, pgsz_bitmap: int, virt: int) -> int:
    """Return the largest page size, in bytes, with which hardware can describe the region; 0: none (core/umem.c).

    On demand it is the region's own page size or nothing. Pinned memory may use any size to which the
    user's and the hardware's addresses of every contiguous piece are aligned alike.
    """
    if umem.is_odp:
        return pgsz_bitmap & 1 << cast("IbUmemOdp", umem).page_shift
    varying = max(((umem.length - 1 + virt) ^ virt).bit_length(), 1)
    mask = pgsz_bitmap >> varying << varying  # beyond the bits in which the region's own addresses differ
    first = (virt & -PAGE) if len(umem.dma) else 0
    starts = np.flatnonzero(np.diff(umem.dma.astype(np.int64), prepend=-1) != PAGE)
    for piece in starts.tolist():
        va = first + (piece << PAGE_SHIFT)
        mask |= int(umem.ibdev.hca.dma.physical(umem.dma[piece : piece + 1])[0]) ^ va
        if piece:  # only the last piece may end, so only the first may start, off a hardware page's edge
            mask |= va
    lowest = (mask & -mask).bit_length() - 1 if mask else 64
    fitting = pgsz_bitmap & ((1 << lowest + 1) - 1)
    return 1 << fitting.bit_length() - 1 if fitting else 0
