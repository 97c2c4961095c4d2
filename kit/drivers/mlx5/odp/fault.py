"""odp.c: bringing in the pages of one region and telling the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EAGAIN, EFAULT
from typing import cast

from kit.drivers.mlx5.enums import PAGE_SHIFT, U64_MAX
from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_xlt
from kit.drivers.mlx5.objects import (
    PF_DOWNGRADE,
    PF_ENABLE,
    PF_SNAPSHOT,
    UPD_XLT_ATOMIC,
    UPD_XLT_DOWNGRADE,
    UPD_XLT_ENABLE,
    Mlx5IbMr,
)
from kit.drivers.mlx5.umem.odp import ODP_READ, ODP_WRITE, IbUmemOdp
from kit.drivers.mlx5.umem.odp_map import ib_umem_odp_map_dma_and_lock
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["BytesMapped", "count", "mlx5_ib_init_odp_mr", "mlx5_update_odp_stats", "pagefault_mr", "pagefault_real_mr"]

U32 = (1 << 32) - 1


@dataclass
class BytesMapped:
    """What a caller learns beside the pages: how many of the bytes it asked for are mapped (u32 *bytes_mapped)."""

    value: int = 0

    def add(self, count: int) -> None:
        """Count as a 32-bit number does."""
        self.value = self.value + count & U32


@step
def mlx5_update_odp_stats(mr: Mlx5IbMr, thread: Thread, counter_name: str, value: int) -> None:
    """Add to one of the region's counters; newer drivers also count the operation (mlx5_ib.h)."""
    stats = mr.odp_stats
    setattr(stats, counter_name, getattr(stats, counter_name) + value)


@step
def mlx5_update_odp_stats_with_handled(mr: Mlx5IbMr, thread: Thread, counter_name: str, value: int) -> None:
    """Add to a counter, and one to the operations that it counts (mlx5_ib.h @ 7.0)."""
    mlx5_update_odp_stats(mr, thread, counter_name, value)
    handled = f"{counter_name}_handled"
    setattr(mr.odp_stats, handled, getattr(mr.odp_stats, handled) + 1)


def count(mr: Mlx5IbMr, thread: Thread, counter_name: str, value: int) -> None:
    """Add to a counter of faults or invalidations as this kernel does."""
    if mr.dev.options.of("handled_counters", mr.dev.era):
        mlx5_update_odp_stats_with_handled(mr, thread, counter_name, value)
    else:
        mlx5_update_odp_stats(mr, thread, counter_name, value)


@waiting_step
def pagefault_real_mr(
    mr: Mlx5IbMr, thread: Thread, odp: IbUmemOdp, user_va: int, bcnt: int, bytes_mapped: BytesMapped | None, flags: int
) -> Wait:
    """Map a range of one region and write its translations; return 4 KiB pages, or an errno (odp.c).

    Whether pages must be writable follows from the region's rights, and never from the operation that faulted.
    """
    fault, xlt_flags = not flags & PF_SNAPSHOT, UPD_XLT_ATOMIC
    if flags & PF_ENABLE:
        xlt_flags |= UPD_XLT_ENABLE
    if flags & PF_DOWNGRADE:
        xlt_flags |= UPD_XLT_DOWNGRADE
    shift = odp.page_shift
    access_mask = ODP_READ | (ODP_WRITE if odp.writable and not flags & PF_DOWNGRADE else 0)
    thread.note(va=user_va, bytes=bcnt)
    pages = yield from ib_umem_odp_map_dma_and_lock(odp, thread, user_va, bcnt, access_mask, fault)
    if pages < 0:
        return pages
    ret = yield from mlx5r_umr_update_xlt(mr, thread, user_va - odp.start >> shift, pages, shift, xlt_flags)
    yield from odp.umem_mutex.release(thread)
    if ret < 0:
        if ret != -EAGAIN:
            thread.note(status=repr(ret))
        return ret
    if bytes_mapped is not None:
        bytes_mapped.add(min((pages << shift) - (user_va & (1 << shift) - 1) & U32, bcnt & U32))
    return pages << shift - PAGE_SHIFT


@waiting_step
def pagefault_mr(
    mr: Mlx5IbMr, thread: Thread, io_virt: int, bcnt: int, bytes_mapped: BytesMapped | None, flags: int,
    permissive_fault: bool = False,
) -> Wait:  # fmt: skip
    """Fault part of a region, of whatever kind; return 4 KiB pages, or an errno (odp.c).

    Parameters
    ----------
    io_virt, bcnt : int
        As the hardware addresses them.
    permissive_fault : bool
        Clamp to the region instead of failing (memory scheme).
    """
    from kit.drivers.mlx5.mr.dmabuf import pagefault_dmabuf_mr
    from kit.drivers.mlx5.odp.implicit import pagefault_implicit_mr

    odp, name = cast(IbUmemOdp, mr.umem), "pagefault_mr"
    thread.note(va=io_virt, bytes=bcnt)
    if io_virt < mr.iova and not permissive_fault:
        return Errno(EFAULT, name, f"{io_virt:#x} is below the region")
    if mr.is_dmabuf:
        return (yield from pagefault_dmabuf_mr(mr, thread, bcnt, bytes_mapped, flags))
    if odp.is_implicit_odp:
        return (yield from pagefault_implicit_mr(mr, thread, odp, io_virt, bcnt, bytes_mapped, flags))
    user_va = max(io_virt - mr.iova, 0) + odp.address
    if user_va > U64_MAX:
        return Errno(EFAULT, name, f"{io_virt:#x} wraps around")
    if permissive_fault:
        user_va = max(user_va, odp.start)
        if user_va + bcnt > odp.end:
            bcnt = odp.end - user_va & U64_MAX
    elif user_va >= odp.end or odp.end - user_va < bcnt:
        return Errno(EFAULT, name, f"{bcnt} bytes from {io_virt:#x} leave the region")
    return (yield from pagefault_real_mr(mr, thread, odp, user_va, bcnt, bytes_mapped, flags))


@waiting_step
def mlx5_ib_init_odp_mr(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Program what is resident right now and enable the key; no CPU fault is taken (odp.c)."""
    odp = cast(IbUmemOdp, mr.umem)
    flags = PF_SNAPSHOT | PF_ENABLE
    ret = yield from pagefault_real_mr(mr, thread, odp, odp.address, odp.length, None, flags)
    return min(ret, 0) if not isinstance(ret, Errno) else ret
