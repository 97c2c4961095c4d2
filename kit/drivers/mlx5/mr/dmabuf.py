"""mr.c and odp.c: regions over a dma-buf: registering, faulting, and following when its exporter moves it.

Such a region is not on demand in the driver's sense: no notifier, no list of pages. It is mapped as a whole or not at
all, and a fault only ever happens after its exporter has moved it.
"""

from __future__ import annotations

from errno import EINVAL, EOPNOTSUPP, EPROTONOSUPPORT
from typing import TYPE_CHECKING, cast

from kit.drivers.mlx5.device import mlx5r_umr_can_load_pas
from kit.drivers.mlx5.enums import PAGE, Access, Era
from kit.drivers.mlx5.mr.alloc import alloc_cacheable_mr, page_sizes
from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr
from kit.drivers.mlx5.mr.reg import ib_check_mr_access, mlx5r_store_odp_mkey
from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_mr_pas
from kit.drivers.mlx5.mr.umr_page_size import mlx5r_umr_dmabuf_update_pgsz
from kit.drivers.mlx5.mr.umr_post import mlx5r_umr_resource_init
from kit.drivers.mlx5.objects import PF_ENABLE, UPD_XLT_ENABLE, UPD_XLT_ZAP, IbPd, Mlx5IbMr
from kit.drivers.mlx5.odp.fault import BytesMapped
from kit.drivers.mlx5.umem.dmabuf import (
    IbUmemDmabuf,
    ib_umem_dmabuf_get,
    ib_umem_dmabuf_map_pages,
    ib_umem_dmabuf_unmap_pages,
)
from kit.drivers.mlx5.umem.umem import ib_umem_find_best_pgsz, ib_umem_release
from kit.errors import Errno
from kit.memory.device.dma_buf import DmaBufAttachment, DmaBufAttachOps
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.memory.space.mm import Mm

__all__ = [
    "ib_uverbs_handler_UVERBS_METHOD_REG_DMABUF_MR", "mlx5_ib_dmabuf_attach_ops", "mlx5_ib_dmabuf_invalidate_cb",
    "mlx5_ib_init_dmabuf_mr", "mlx5_ib_reg_user_mr_dmabuf", "pagefault_dmabuf_mr",
]  # fmt: skip

ALLOWED = int(
    Access.LOCAL_WRITE
    | Access.REMOTE_READ
    | Access.REMOTE_WRITE
    | Access.REMOTE_ATOMIC
    | Access.RELAXED_ORDERING
)  # fmt: skip


@waiting_step
def ib_uverbs_handler_UVERBS_METHOD_REG_DMABUF_MR(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, offset: int, length: int, iova: int, fd: int, access_flags: int
) -> Wait:
    """What ibv_reg_dmabuf_mr enters the kernel through (core/uverbs_std_types_mr.c); a region or an Errno.

    The name is what the macro UVERBS_HANDLER makes of it.
    """
    name = "UVERBS_METHOD_REG_DMABUF_MR"
    thread.charge(dev.costs.verb)
    if dev.era == Era.OLD:  # 5.12 is the first that has the method
        return Errno(EPROTONOSUPPORT, "ib_uverbs_cmd_verbs", "the kernel has no such method")
    if (offset ^ iova) & (PAGE - 1):
        return Errno(EINVAL, name, f"offset {offset:#x} and address {iova:#x} differ within the page")
    if access_flags & ~ALLOWED:
        return Errno(EINVAL, name, f"flags {access_flags & ~ALLOWED:#x} do not go with a dma-buf")
    ret = ib_check_mr_access(dev, thread, access_flags)
    if ret:
        return ret
    return (yield from mlx5_ib_reg_user_mr_dmabuf(dev, thread, pd, offset, length, iova, fd, access_flags))


@waiting_step
def mlx5_ib_reg_user_mr_dmabuf(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, offset: int, length: int, virt_addr: int, fd: int, access_flags: int
) -> Wait:
    """Register part of the buffer behind descriptor `fd`, mapped from the start; a region or an Errno (mr.c).

    The page-fault queue of the device is not made here but by the first on-demand region (`create_user_odp_mr`):
    without one, nobody hears of the fault that follows a move.
    """
    name = "mlx5_ib_reg_user_mr_dmabuf"
    thread.note(va=virt_addr, bytes=length)
    if not dev.options.config_odp:
        return Errno(EOPNOTSUPP, name, "the kernel was built without on-demand paging")
    new, ret = dev.era == Era.NEW, 0
    if dev.options.lazy_umr and not new:
        ret = yield from mlx5r_umr_resource_init(dev, thread)
        if ret:
            return ret
    if not mlx5r_umr_can_load_pas(dev, thread, length):
        return Errno(EINVAL, name, f"UMR cannot write translations of {length} bytes")
    if dev.options.lazy_umr and new:
        ret = yield from mlx5r_umr_resource_init(dev, thread)
        if ret:
            return ret
    umem_dmabuf = yield from ib_umem_dmabuf_get(
        dev, thread, cast("Mm", pd.mm), offset, length, fd, access_flags, mlx5_ib_dmabuf_attach_ops
    )
    if isinstance(umem_dmabuf, Errno):
        return umem_dmabuf
    mr = yield from alloc_cacheable_mr(dev, thread, pd, umem_dmabuf, virt_addr, access_flags)
    if isinstance(mr, Errno):
        yield from ib_umem_release(umem_dmabuf, thread)
        return mr
    dev.reg_pages += umem_dmabuf.num_pages()
    umem_dmabuf.private = mr
    ret = mlx5r_store_odp_mkey(dev, thread, mr.mmkey)
    if not ret:
        ret = yield from mlx5_ib_init_dmabuf_mr(mr, thread)
    if ret:
        yield from mlx5_ib_dereg_mr(mr, thread)
        return ret
    return mr


@waiting_step
def mlx5_ib_init_dmabuf_mr(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Map the buffer and enable the key (odp.c)."""
    umem = cast(IbUmemDmabuf, mr.umem)
    ret = yield from pagefault_dmabuf_mr(mr, thread, umem.length, None, PF_ENABLE)
    return ret if ret < 0 else 0


@waiting_step
def pagefault_dmabuf_mr(
    mr: Mlx5IbMr, thread: Thread, bcnt: int, bytes_mapped: BytesMapped | None, flags: int
) -> Wait:  # fmt: skip
    """Map all of the region, whatever part of it faulted; return its 4 KiB pages, or an errno (odp.c).

    Under the buffer's reservation, so that its exporter cannot move it before the hardware has its translations. In
    6.9 they are of 4 KiB; in 7.0 of the largest size that the mapping allows, which may differ each time.
    """
    umem = cast(IbUmemDmabuf, mr.umem)
    xlt_flags = UPD_XLT_ENABLE if flags & PF_ENABLE else 0
    thread.note(va=mr.iova, pages=umem.num_pages(), bytes=bcnt)
    old_page_shift = mr.page_shift
    yield from umem.resv.lock(thread)
    err = yield from ib_umem_dmabuf_map_pages(umem, thread)
    if err:
        yield from umem.resv.unlock(thread)
        return err
    page_size = ib_umem_find_best_pgsz(umem, thread, page_sizes(mr.dev), umem.iova)
    if page_size < PAGE:
        ib_umem_dmabuf_unmap_pages(umem, thread)
        err = Errno(EINVAL, "pagefault_dmabuf_mr", "the device has no page size that fits")
    elif mr.dev.era < Era.NEW:
        err = yield from mlx5r_umr_update_mr_pas(mr, thread, xlt_flags)
    else:
        page_shift = page_size.bit_length() - 1
        if page_shift != mr.page_shift and mr.dmabuf_faulted:
            err = yield from mlx5r_umr_dmabuf_update_pgsz(mr, thread, xlt_flags, page_shift)
        else:
            mr.page_shift = page_shift
            err = yield from mlx5r_umr_update_mr_pas(mr, thread, xlt_flags)
    yield from umem.resv.unlock(thread)
    if err:
        mr.page_shift = old_page_shift
        return err
    mr.dmabuf_faulted = True
    if bytes_mapped is not None:
        bytes_mapped.add(bcnt)
    return umem.num_pages()


@waiting_step
def mlx5_ib_dmabuf_invalidate_cb(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """The buffer is about to move: empty the hardware's entries, then give the mapping up (mr.c)."""
    umem: IbUmemDmabuf = attach.importer_priv
    umem.resv.assert_held(thread)
    mr = umem.private
    if umem.sgt is None or mr is None:
        return
    thread.note(va=mr.iova, pages=umem.num_pages(), bytes=umem.length)
    yield from mlx5r_umr_update_mr_pas(mr, thread, UPD_XLT_ZAP)
    ib_umem_dmabuf_unmap_pages(umem, thread)


mlx5_ib_dmabuf_attach_ops = DmaBufAttachOps(move_notify=mlx5_ib_dmabuf_invalidate_cb, allow_peer2peer=True)
