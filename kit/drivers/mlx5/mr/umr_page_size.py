"""umr.c @ 7.0: giving a dma-buf region another page size while its key is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kit.drivers.mlx5.descriptors import Mkc, UmrWqe
from kit.drivers.mlx5.enums import PAGE_SHIFT, UMR_ALIGNMENT, MkeyMask, UmrFlags, mkey_variant
from kit.drivers.mlx5.mr.umr import update_pas
from kit.drivers.mlx5.mr.umr_post import mlx5r_umr_post_send_wait
from kit.drivers.mlx5.mr.umr_xlt import MTT_SIZE, align
from kit.drivers.mlx5.objects import UPD_XLT_ATOMIC, UPD_XLT_ENABLE, UPD_XLT_KEEP_PGSZ, UPD_XLT_ZAP
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.drivers.mlx5.umem.dmabuf import IbUmemDmabuf

__all__ = ["MAX_LOG_ENTITY_SIZE", "mlx5r_umr_dmabuf_update_pgsz"]

MAX_LOG_ENTITY_SIZE = 62  # a field of 6 bits; the capability max_log_entity_size says less where a device has it


@waiting_step
def mlx5r_umr_dmabuf_update_pgsz(mr: Mlx5IbMr, thread: Thread, xlt_flags: int, page_shift: int) -> Wait:
    """Change page size and translations so that at no moment a mixture of both can be used; 0 or an errno (umr.c).

    The first entries are emptied, enough for the whole region at the largest page size, which the key then gets.
    The other entries are written, then the page size is set, and the first entries come last.
    """
    old_page_shift, umem = mr.page_shift, cast("IbUmemDmabuf", mr.umem)
    zapped = yield from _mlx5r_umr_zap_mkey(mr, thread, xlt_flags, page_shift)
    if zapped < 0:
        return zapped
    xlt_flags &= ~UPD_XLT_ENABLE
    mr.page_shift = page_shift
    total = umem.num_dma_blocks(page_shift, mr.iova)
    err: int = 0
    if 0 < zapped < total:
        err = yield from update_pas(mr, thread, xlt_flags | UPD_XLT_KEEP_PGSZ, zapped, total - zapped)
    if not err:
        err = yield from mlx5r_umr_update_mr_page_shift(mr, thread, mr.page_shift)
    if not err:
        err = yield from update_pas(mr, thread, xlt_flags, 0, zapped)
    if err:
        mr.page_shift = old_page_shift
    return err


@waiting_step
def _mlx5r_umr_zap_mkey(mr: Mlx5IbMr, thread: Thread, flags: int, page_shift: int) -> Wait:
    """Make all of a region missing with as few entries as can be; return how many, 0: all, or an errno (umr.c)."""
    old_page_shift, umem = mr.page_shift, cast("IbUmemDmabuf", mr.umem)
    flags |= UPD_XLT_KEEP_PGSZ | UPD_XLT_ZAP | UPD_XLT_ATOMIC
    largest = min(max((mr.length - 1).bit_length(), page_shift), MAX_LOG_ENTITY_SIZE)
    nblocks = align(umem.num_dma_blocks(largest, mr.iova), UMR_ALIGNMENT // MTT_SIZE)
    if nblocks >= umem.num_dma_blocks(page_shift, mr.iova):
        nblocks = 0
    if nblocks:
        mr.page_shift = largest
    err = yield from update_pas(mr, thread, flags, 0, nblocks)
    if not err and nblocks:
        err = yield from mlx5r_umr_update_mr_page_shift(mr, thread, largest)
    if err:
        mr.page_shift = old_page_shift
        return err
    return nblocks


@waiting_step
def mlx5r_umr_update_mr_page_shift(mr: Mlx5IbMr, thread: Thread, page_shift: int) -> Wait:
    """Write a key's page size, and nothing else that matters; 0 or an errno (umr.c)."""
    mask = MkeyMask.LEN | MkeyMask.PAGE_SIZE | MkeyMask.START_ADDR
    if mr.dev.caps.umr_log_entity_size_5:
        mask |= MkeyMask.PAGE_SIZE_5
    wqe = UmrWqe(mr.mmkey.key, int(UmrFlags.CHECK_FREE | UmrFlags.INLINE), int(mask))
    wqe.mkc = Mkc(pd=mr.pd.pdn, start_addr=mr.iova, len=mr.length, log_page_size=page_shift)
    wqe.mkc.mkey_7_0 = mkey_variant(mr.mmkey.key)
    thread.note(va=mr.iova, pages=1 << page_shift - PAGE_SHIFT)
    err: int | Errno = yield from mlx5r_umr_post_send_wait(mr.dev, thread, wqe)
    if not err:
        mr.page_shift = page_shift
    return err
