"""core/umem_odp.c: memory of an on-demand region: its page lists and its notifier.

Up to 6.11 the rights of a page are the low bits of its ``dma_list`` entry. Since then they are HMM's own
flags in ``pfn_list``, and the DMA address is made where the translation entry is (`populate_mtt`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EFAULT, EINVAL, ENOMEM, EOPNOTSUPP, EOVERFLOW
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import PAGE_SHIFT, U64_MAX, Access, Era
from kit.errors import Errno
from kit.memory.device.hmm_entries import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
)
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_notifier_insert, mmu_interval_notifier_remove
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier
from kit.memory.physical.zeros import zeros
from kit.memory.syscalls.exit import mmput
from kit.sim.engine import Thread, Wait
from kit.sim.locks import Lock
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifierOps
    from kit.memory.space.mm import Mm

__all__ = [
    "MAPPED", "ODP_READ", "ODP_WRITE", "RIGHTS", "VALID", "WRITE", "IbUmemOdp", "ib_umem_odp_alloc_child",
    "ib_umem_odp_alloc_implicit", "ib_umem_odp_get", "ib_umem_odp_release",
]  # fmt: skip

ODP_READ, ODP_WRITE = 1, 2  # ODP_READ_ALLOWED_BIT, ODP_WRITE_ALLOWED_BIT: low bits of a dma_list entry
RIGHTS = np.uint64(ODP_READ | ODP_WRITE)
HPAGE_SHIFT = 21
VALID, WRITE, MAPPED = np.uint64(HMM_PFN_VALID), np.uint64(HMM_PFN_WRITE), np.uint64(HMM_PFN_DMA_MAPPED)
NOTHING: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)


@dataclass(eq=False)
class IbUmemOdp:
    """Struct ib_umem_odp.

    Attributes
    ----------
    address, length : int
        Bytes, as the user gave them; `start` and `end` are rounded out to pages of ``1 << page_shift``.
    notifier : MmuIntervalNotifier
        Its ``user`` is this object (container_of).
    pfn_list : ndarray of uint64, shape (4 KiB pages,)
        What `hmm_range_fault` writes.
    dma_list : ndarray of uint64, shape (pages of page_shift,)
        DMA address, with `ODP_READ` and `ODP_WRITE` up to 6.11; 0: not mapped.
    umem_mutex : Lock
        Held over every change of the lists and of the hardware's translations made from them.
    private : Mlx5IbMr or None
    npages : int
        Mapped entries.
    """

    ibdev: Mlx5IbDev
    address: int
    length: int
    writable: bool
    owning_mm: Mm
    page_shift: int = PAGE_SHIFT
    is_implicit_odp: bool = False
    is_odp: bool = True
    is_dmabuf: bool = False
    start: int = 0
    end: int = 0
    notifier: MmuIntervalNotifier = field(init=False, repr=False)
    pfn_list: NDArray[np.uint64] = field(default_factory=lambda: NOTHING, repr=False)
    dma_list: NDArray[np.uint64] = field(default_factory=lambda: NOTHING, repr=False)
    umem_mutex: Lock = field(default_factory=Lock, repr=False)
    private: Mlx5IbMr | None = field(default=None, repr=False)
    npages: int = 0
    touched: tuple[int, int] = (0, 0)  # entries outside have never been anything but empty
    owner_alive: bool = True  # get_pid_task(tgid) finds the process

    def __post_init__(self) -> None:
        self.notifier = MmuIntervalNotifier(self)

    def num_pages(self) -> int:
        """Entries of `dma_list` (ib_umem_odp_num_pages)."""
        return self.end - self.start >> self.page_shift

    def touch(self, low: int, high: int) -> None:
        """Note that entries [low, high) may be filled from now on."""
        if self.touched[0] == self.touched[1]:
            self.touched = low, high
        else:
            self.touched = min(self.touched[0], low), max(self.touched[1], high)

    def mapped(self, low: int, high: int) -> NDArray[np.bool_]:
        """Which of the entries [low, high) the invalidation scan takes for mapped."""
        if self.ibdev.era < Era.NEW:
            found: NDArray[np.bool_] = (self.dma_list[low:high] & RIGHTS) != 0
            return found
        shift = self.page_shift - PAGE_SHIFT
        found = (self.pfn_list[low << shift : high << shift : 1 << shift] & VALID) != 0
        return found


@waiting_step
def ib_umem_odp_get(
    dev: Mlx5IbDev, thread: Thread, mm: Mm, addr: int, size: int, access: int, ops: MmuIntervalNotifierOps
) -> Wait:  # fmt: skip
    """Make the umem of an explicit region: nothing is touched, pinned or charged (core/umem_odp.c)."""
    if not access & Access.ON_DEMAND:
        return Errno(EINVAL, "ib_umem_odp_get", "the region is not on demand")
    if dev.inject.hit("umem_odp"):
        return Errno(ENOMEM, "ib_umem_odp_get", "struct ib_umem_odp")
    umem_odp = IbUmemOdp(dev, addr, size, writable(access), mm)
    if access & Access.HUGETLB:
        umem_odp.page_shift = HPAGE_SHIFT
    ret = yield from ib_init_umem_odp(umem_odp, thread, ops)
    return ret if ret else umem_odp


def writable(access: int) -> bool:
    """Whether the hardware may write (ib_access_writable)."""
    return bool(access & (Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC | Access.MW_BIND))


@step
def ib_umem_odp_alloc_implicit(dev: Mlx5IbDev, thread: Thread, mm: Mm, access: int) -> IbUmemOdp | Errno:
    """Make the umem of an implicit parent: no range, no lists, no notifier (core/umem_odp.c)."""
    name = "ib_umem_odp_alloc_implicit"
    if access & Access.HUGETLB:
        return Errno(EINVAL, name, "IB_ACCESS_HUGETLB on an implicit region")
    if dev.inject.hit("umem_odp"):
        return Errno(ENOMEM, name, "struct ib_umem_odp")
    return IbUmemOdp(dev, 0, 0, writable(access), mm, is_implicit_odp=True)


@waiting_step
def ib_umem_odp_alloc_child(
    root: IbUmemOdp, thread: Thread, addr: int, size: int, ops: MmuIntervalNotifierOps
) -> Wait:  # fmt: skip
    """Make the umem of one child, with a notifier of its own (core/umem_odp.c)."""
    dev, mm = root.ibdev, root.owning_mm
    if dev.inject.hit("umem_odp"):
        return Errno(ENOMEM, "ib_umem_odp_alloc_child", "struct ib_umem_odp")
    odp_data = IbUmemOdp(dev, addr, size, root.writable, mm, owner_alive=root.owner_alive)
    if not mm.mmget_not_zero():
        return Errno(EFAULT, "ib_umem_odp_alloc_child", "the owner's address space is gone")
    ret = yield from ib_init_umem_odp(odp_data, thread, ops)
    yield from mmput(mm, thread)
    return ret if ret else odp_data


@waiting_step
def ib_init_umem_odp(umem_odp: IbUmemOdp, thread: Thread, ops: MmuIntervalNotifierOps) -> Wait:
    """Round the range out, allocate its lists, and only then watch it (core/umem_odp.c)."""
    name, dev = "ib_init_umem_odp", umem_odp.ibdev
    page_size = 1 << umem_odp.page_shift
    start, end = umem_odp.address & -page_size, umem_odp.address + umem_odp.length
    if end > U64_MAX:
        return Errno(EOVERFLOW, name, f"{umem_odp.length} bytes from {umem_odp.address:#x}")
    end = (end + page_size - 1) & -page_size & U64_MAX
    if end < page_size:
        return Errno(EOVERFLOW, name, f"{umem_odp.length} bytes from {umem_odp.address:#x}")
    ndmas = end - start >> umem_odp.page_shift
    if not ndmas:
        return Errno(EINVAL, name, "no page")
    npfns = end - start >> PAGE_SHIFT
    thread.note(va=start, pages=npfns, bytes=end - start)
    if dev.era == Era.NEW and dev.inject.hit("swiotlb"):
        return Errno(EOPNOTSUPP, "hmm_dma_map_alloc", "the device needs bounce buffers")
    for site in ("pfn_list", "dma_list"):
        if dev.inject.hit(site):
            return Errno(ENOMEM, name, f"{site} of {npfns} pages")
    umem_odp.start, umem_odp.end = start, end
    try:
        umem_odp.pfn_list, umem_odp.dma_list = zeros(npfns, np.uint64), zeros(ndmas, np.uint64)
    except (MemoryError, ValueError):
        return Errno(ENOMEM, name, f"lists of {npfns} pages")
    thread.charge(dev.costs.list_page * npfns)
    if dev.inject.hit("notifier_insert"):
        return Errno(ENOMEM, "mmu_interval_notifier_insert", "injected")
    mm = umem_odp.owning_mm
    return (yield from mmu_interval_notifier_insert(umem_odp.notifier, thread, mm, start, end - start, ops))


@waiting_step
def ib_umem_odp_release(umem_odp: IbUmemOdp, thread: Thread) -> Wait:
    """Unmap everything, stop watching, free the lists; the hardware must have been fenced (core/umem_odp.c)."""
    from kit.drivers.mlx5.umem.odp_map import ib_umem_odp_unmap_dma_pages

    if umem_odp.is_implicit_odp:
        return
    yield from umem_odp.umem_mutex.acquire(thread)
    ib_umem_odp_unmap_dma_pages(umem_odp, thread, umem_odp.start, umem_odp.end)
    yield from umem_odp.umem_mutex.release(thread)
    yield from mmu_interval_notifier_remove(umem_odp.notifier, thread)
    umem_odp.pfn_list = umem_odp.dma_list = NOTHING
