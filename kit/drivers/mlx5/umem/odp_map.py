"""core/umem_odp.c: bringing the pages of an on-demand region in, mapping them for DMA, and unmapping them."""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EFAULT, EINVAL
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.core.linux import hmm_dma_unmap_pfn, ib_dma_map_page, ib_dma_unmap_page
from kit.drivers.mlx5.enums import PAGE_SHIFT, Era
from kit.drivers.mlx5.umem.odp import MAPPED, ODP_READ, ODP_WRITE, RIGHTS, VALID, WRITE, IbUmemOdp
from kit.errors import Errno
from kit.memory.device import hmm_entries
from kit.memory.device.hmm import hmm_range_fault
from kit.memory.device.hmm_entries import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HmmRange, hmm_pfn_to_pfn
from kit.memory.notifier import mmu_interval_notifier
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_read_begin
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier
from kit.memory.syscalls.exit import exit_mmap
from kit.memory.types import PG
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm

__all__ = ["ib_umem_odp_map_dma_and_lock", "ib_umem_odp_unmap_dma_pages", "mmput_async", "set_page_dirty"]

ADDRESS = ~RIGHTS  # ODP_DMA_ADDR_MASK
STICKY = np.uint64(hmm_entries.HMM_PFN_INOUT_FLAGS)
HMM_RANGE_DEFAULT_TIMEOUT = 1e6  # microseconds: 1000 ms (include/linux/hmm.h)
NO_FLAGS = np.uint64((1 << hmm_entries.HMM_PFN_ORDER_SHIFT) - 1)  # ~HMM_PFN_FLAGS


@step
def mmu_interval_read_retry(sub: MmuIntervalNotifier, thread: Thread, seq: int) -> bool:
    """Whether an invalidation has come since `seq` was read (mm/mmu_notifier.c)."""
    return mmu_interval_notifier.mmu_interval_read_retry(sub, seq)


@step
def hmm_pfn_to_map_order(entries: NDArray[np.uint64], thread: Thread) -> NDArray[np.int64]:
    """How large the CPU's own mapping of each page is (include/linux/hmm.h)."""
    return hmm_entries.hmm_pfn_to_map_order(entries)


@step
def set_page_dirty(memory: PhysicalMemory, thread: Thread, pfns: NDArray[np.integer]) -> None:
    """Mark the folios of pages dirty (mm/page-writeback.c)."""
    memory.flags[memory.head(pfns)] |= PG.DIRTY


@step
def mmput_async(mm: Mm, thread: Thread, dev: Mlx5IbDev) -> None:
    """Drop a user reference; if it is the last, a work item tears the address space down (kernel/fork.c).

    Not the caller: the teardown takes the umem_mutex that he may hold.
    """
    mm.mm_users -= 1
    if not mm.mm_users:
        dev.system_wq.queue_work(thread, lambda worker: exit_mmap(mm, worker))


@waiting_step
def ib_umem_odp_map_dma_and_lock(
    umem_odp: IbUmemOdp, thread: Thread, user_virt: int, bcnt: int, access_mask: int, fault: bool
) -> Wait:
    """Bring in and map a range; return its pages with umem_mutex held, or an errno without (core/umem_odp.c).

    Parameters
    ----------
    user_virt, bcnt : int
        Bytes; rounded out to the umem's pages.
    access_mask : int
        `ODP_READ` and `ODP_WRITE`; the second asks for pages that may be written.
    fault : bool
        False: only look at what is resident now.
    """
    name, mm, shift = "ib_umem_odp_map_dma_and_lock", umem_odp.owning_mm, umem_odp.page_shift
    thread.note(va=user_virt, bytes=bcnt, cause="fault" if fault else "snapshot")
    if umem_odp.ibdev.era < Era.NEW and access_mask == 0:
        return Errno(EINVAL, name, "no access asked for")
    if user_virt < umem_odp.start or user_virt + bcnt > umem_odp.end:
        return Errno(EFAULT, name, f"{bcnt} bytes from {user_virt:#x} are outside the region")
    if not umem_odp.owner_alive or not mm.mmget_not_zero():
        return Errno(EINVAL, name, "the process that registered the region is gone")
    size = 1 << shift
    start, end = user_virt & -size, user_virt + bcnt + size - 1 & -size
    first, pfns = start - umem_odp.start >> PAGE_SHIFT, end - start >> PAGE_SHIFT
    umem_odp.touch(first >> shift - PAGE_SHIFT, first + pfns >> shift - PAGE_SHIFT)
    hmm_pfns = umem_odp.pfn_list[first : first + pfns]
    flags = _wanted(access_mask, fault)
    if umem_odp.ibdev.options.private_hmm_pfns:
        hmm_pfns = hmm_pfns.copy()
    range = HmmRange(
        notifier=umem_odp.notifier, notifier_seq=0, start=start, end=end, hmm_pfns=hmm_pfns, default_flags=flags
    )
    ret = yield from _fault_in(umem_odp, thread, range)
    if not ret:
        if umem_odp.ibdev.options.private_hmm_pfns:
            range.hmm_pfns = umem_odp.pfn_list[first : first + pfns]
            range.hmm_pfns[:] = hmm_pfns & ~STICKY | range.hmm_pfns & STICKY
        thread.note(va=start, pages=pfns, bytes=bcnt, cause="fault" if fault else "snapshot")
        ret = _map_pages(umem_odp, thread, range, access_mask, fault)
        if ret < 0:
            yield from umem_odp.umem_mutex.release(thread)
    yield from thread.sync()
    mmput_async(mm, thread, umem_odp.ibdev)
    return ret


def _wanted(access_mask: int, fault: bool) -> int:
    """Flags that every page of a range has to come to (default_flags)."""
    if not fault:
        return 0
    return int(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE) if access_mask & ODP_WRITE else int(HMM_PFN_REQ_FAULT)


def _fault_in(umem_odp: IbUmemOdp, thread: Thread, range: HmmRange) -> Wait:
    """Ask HMM until no invalidation has come in between; 0 with umem_mutex held, or an errno."""
    mm, deadline = umem_odp.owning_mm, thread.now + HMM_RANGE_DEFAULT_TIMEOUT
    while True:
        seq = yield from mmu_interval_read_begin(umem_odp.notifier, thread)
        range.notifier_seq = seq
        if range.start == range.end:
            return Errno(EINVAL, "walk_page_range", "an empty range")
        yield from mm.mmap_lock.read_acquire(thread)
        ret = yield from hmm_range_fault(range, thread)
        yield from mm.mmap_lock.read_release(thread)
        if ret:
            if ret == -EBUSY and thread.now <= deadline:
                continue
            return ret
        yield from umem_odp.umem_mutex.acquire(thread)
        if not mmu_interval_read_retry(umem_odp.notifier, thread, seq):
            return 0
        yield from umem_odp.umem_mutex.release(thread)
        # Before interval notifiers: let it end, then have the hardware fault again. A registration has no hardware.
        if umem_odp.ibdev.era == Era.OLD and range.default_flags:
            yield from mmu_interval_read_begin(umem_odp.notifier, thread)
            return Errno(EAGAIN, "ib_umem_odp_map_dma_pages", "an invalidation came in between")


def _map_pages(umem_odp: IbUmemOdp, thread: Thread, range: HmmRange, access_mask: int, fault: bool) -> int:
    """Check what HMM gave for each page of the range, and up to 6.11 map it; return pages or an errno.

    Pages before the one that fails stay mapped.
    """
    shift = umem_odp.page_shift - PAGE_SHIFT
    entries = range.hmm_pfns[:: 1 << shift]
    valid = (entries & VALID) != 0
    if umem_odp.ibdev.era == Era.NEW:
        valid &= (entries & MAPPED) == 0
    at = np.flatnonzero(valid)
    order = hmm_pfn_to_map_order(entries[at], thread)
    small = np.flatnonzero(order < shift) if shift else at[:0]
    if len(small):
        at = at[: small[0]]
    if umem_odp.ibdev.era < Era.NEW and len(at):
        index = at + (range.start - umem_odp.start >> umem_odp.page_shift)
        rights: NDArray[np.uint64] | np.uint64 = np.uint64(access_mask)
        if not fault:
            rights = np.where(entries[at] & WRITE, RIGHTS, np.uint64(ODP_READ))
        ret = ib_umem_odp_map_dma_single_page(umem_odp, thread, index, hmm_pfn_to_pfn(entries[at]), rights)
        if ret < 0:
            return ret
    if len(small):
        return Errno(EINVAL, "ib_umem_odp_map_dma_and_lock", "the CPU's page is smaller than the region's")
    return len(entries)


@step
def ib_umem_odp_map_dma_single_page(
    umem_odp: IbUmemOdp,
    thread: Thread,
    dma_index: NDArray[np.int64],
    pfns: NDArray[np.int64],
    access_mask: NDArray[np.uint64] | np.uint64,
) -> int:
    """Map pages, each as the documented function does its one: what is mapped only gets new rights (core/umem_odp.c).

    Parameters
    ----------
    dma_index : ndarray of int64, shape (n,)
        Entries of ``dma_list``, ascending.
    pfns : ndarray of int64, shape (n,)
    access_mask : uint64, or ndarray of uint64 of shape (n,)
        Rights of the entries.

    Returns
    -------
    int
        0, or -EFAULT at the first page that cannot be mapped: the pages before it are.
    """
    dev, dma_list = umem_odp.ibdev, umem_odp.dma_list
    addresses = dma_list[dma_index] & ADDRESS
    new = np.flatnonzero(dma_list[dma_index] == 0)
    thread.note(va=umem_odp.start + (int(dma_index[0]) << umem_odp.page_shift), pages=len(new))
    done = len(dma_index)
    if len(new):
        got = ib_dma_map_page(dev, thread, pfns[new], umem_odp.page_shift - PAGE_SHIFT)
        if len(got) < len(new):
            done = int(new[len(got)])
        addresses[new[: len(got)]] = got
        umem_odp.npages += len(got)
    if isinstance(access_mask, np.ndarray):
        access_mask = access_mask[:done]
    dma_list[dma_index[:done]] = addresses[:done] | access_mask
    if done < len(dma_index):
        return Errno(EFAULT, "ib_umem_odp_map_dma_single_page", f"page {int(pfns[done]):#x} has no DMA address")
    return 0


@step
def ib_umem_odp_unmap_dma_pages(umem_odp: IbUmemOdp, thread: Thread, virt: int, bound: int) -> None:
    """Unmap what is mapped in a range, dirtying what the hardware could write (core/umem_odp.c)."""
    dev, shift = umem_odp.ibdev, umem_odp.page_shift
    low = max(virt, umem_odp.start) - umem_odp.start >> shift
    high = -(-(min(bound, umem_odp.end) - umem_odp.start) >> shift) if bound > umem_odp.start else low
    thread.charge(dev.costs.scan_entry * max(high - low, 0))
    start, step = low, 1 << shift - PAGE_SHIFT
    low, high = max(low, umem_odp.touched[0]), min(high, umem_odp.touched[1])
    high = max(low, high)
    pfns = umem_odp.pfn_list[low * step : high * step : step]
    dma = umem_odp.dma_list[low:high]
    if dev.era < Era.NEW:
        at = np.flatnonzero(dma)
        written = (dma[at] & np.uint64(ODP_WRITE)) != 0
    else:
        both = VALID | MAPPED
        at = np.flatnonzero((pfns & both) == both)
        written = (pfns[at] & WRITE) != 0
    if len(at):
        unmap = ib_dma_unmap_page if dev.era < Era.NEW else hmm_dma_unmap_pfn
        unmap(dev, thread, dma[at] & ADDRESS, shift - PAGE_SHIFT)
        memory = umem_odp.owning_mm.memory
        set_page_dirty(memory, thread, hmm_pfn_to_pfn(pfns[at[written]]))
        dma[at] = 0
        umem_odp.npages -= len(at)
    if dev.era == Era.NEW:
        pfns &= NO_FLAGS
    thread.note(va=umem_odp.start + (start << shift), pages=len(at))
