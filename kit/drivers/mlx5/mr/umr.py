"""umr.c: writing translations of an mkey through UMR work requests."""

from __future__ import annotations

from errno import EINVAL, ENOMEM, EPERM
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.descriptors import Mkc, UmrWqe
from kit.drivers.mlx5.enums import MTT_PRESENT, PAGE_SHIFT, UMR_ALIGNMENT, MkeyMask, UmrFlags, mkey_variant
from kit.drivers.mlx5.mr.umr_post import access_mask, mlx5r_umr_post_send_wait, pd_mask
from kit.drivers.mlx5.mr.umr_xlt import (
    KSM_SIZE,
    MTT_SIZE,
    OCTOWORD,
    Xlt,
    align,
    mlx5r_umr_create_xlt,
    mlx5r_umr_unmap_free_xlt,
)
from kit.drivers.mlx5.objects import (
    UPD_XLT_ACCESS,
    UPD_XLT_ADDR,
    UPD_XLT_ENABLE,
    UPD_XLT_INDIRECT,
    UPD_XLT_KEEP_PGSZ,
    UPD_XLT_PD,
    UPD_XLT_ZAP,
)
from kit.drivers.mlx5.odp.xlt import mlx5_odp_populate_xlt
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.drivers.mlx5.umem.odp import IbUmemOdp
    from kit.drivers.mlx5.umem.umem import IbUmem

__all__ = ["dma_blocks", "mlx5r_umr_update_mr_pas", "mlx5r_umr_update_xlt", "update_pas"]


@step
def mlx5r_umr_set_update_xlt_ctrl_seg(wqe: UmrWqe, thread: Thread, flags: int, length: int) -> None:
    """An enabling request must find the key free, any other must find it in use (umr.c)."""
    wqe.flags = int(UmrFlags.CHECK_NOT_FREE if flags & UPD_XLT_ENABLE else UmrFlags.CHECK_FREE)
    wqe.xlt_octowords = align(length, UMR_ALIGNMENT) // OCTOWORD


@step
def mlx5r_umr_set_update_xlt_mkey_seg(wqe: UmrWqe, thread: Thread, mr: Mlx5IbMr, page_shift: int) -> None:
    """Everything that the last request may write into the key (umr.c)."""
    mkc = wqe.mkc = Mkc(pd=mr.pd.pdn, start_addr=mr.iova, len=mr.length, log_page_size=page_shift)
    mlx5r_umr_set_access_flags(mr.dev, thread, mkc, mr.access_flags)
    mkc.mkey_7_0 = mkey_variant(mr.mmkey.key)


@step
def mlx5r_umr_set_access_flags(dev: Mlx5IbDev, thread: Thread, seg: Mkc, access_flags: int) -> None:
    """Rights in the mkey segment (umr.c)."""
    seg.set_access(access_flags)


@step
def mlx5r_umr_set_update_xlt_data_seg(wqe: UmrWqe, thread: Thread, xlt: Xlt) -> None:
    """Point the request at the buffer (umr.c)."""
    wqe.xlt = xlt.entries


@step
def mlx5r_umr_final_update_xlt(dev: Mlx5IbDev, thread: Thread, wqe: UmrWqe, mr: Mlx5IbMr, flags: int) -> None:
    """Let the last request also enable the key and write rights, domain and range (umr.c)."""
    if flags & UPD_XLT_ENABLE:
        wqe.mkey_mask |= MkeyMask.KEY | MkeyMask.FREE
    if flags & (UPD_XLT_ENABLE | UPD_XLT_PD | UPD_XLT_ACCESS):
        wqe.mkey_mask |= access_mask(dev) | pd_mask()
    if flags & (UPD_XLT_ENABLE | UPD_XLT_ADDR):
        wqe.mkey_mask |= MkeyMask.LEN | MkeyMask.PAGE_SIZE | MkeyMask.START_ADDR
        if dev.caps.umr_log_entity_size_5:
            wqe.mkey_mask |= MkeyMask.PAGE_SIZE_5
        if not mr.length:
            cast(Mkc, wqe.mkc).length64 = True
        if flags & UPD_XLT_KEEP_PGSZ:
            wqe.mkey_mask &= ~MkeyMask.PAGE_SIZE


def wqe_of(mr: Mlx5IbMr, thread: Thread, flags: int, page_shift: int, xlt: Xlt) -> UmrWqe:
    """Fill in the three segments of a request."""
    wqe = UmrWqe(mr.mmkey.key)
    mlx5r_umr_set_update_xlt_ctrl_seg(wqe, thread, flags, xlt.length)
    mlx5r_umr_set_update_xlt_mkey_seg(wqe, thread, mr, page_shift)
    mlx5r_umr_set_update_xlt_data_seg(wqe, thread, xlt)
    return wqe


def carry(wqe: UmrWqe, xlt: Xlt, entries: int) -> None:
    """Let the request carry the first entries of the buffer, rounded up to 64 bytes."""
    length = align(entries * xlt.entries.itemsize, UMR_ALIGNMENT)
    wqe.xlt_octowords = length // OCTOWORD
    wqe.xlt = xlt.entries[: length // xlt.entries.itemsize]


@step
def mlx5r_umr_update_offset(wqe: UmrWqe, thread: Thread, offset: int) -> None:
    """Let the entries go to byte `offset` of the key's table (umr.c)."""
    wqe.xlt_offset = offset // OCTOWORD
    wqe.flags |= UmrFlags.TRANSLATION_OFFSET_EN


@waiting_step
def mlx5r_umr_update_xlt(mr: Mlx5IbMr, thread: Thread, idx: int, npages: int, page_shift: int, flags: int) -> Wait:
    """Write the hardware's entries `idx` on from the driver's lists; return 0 or an errno (umr.c).

    The hardware takes 64 bytes at a time, so entries on both sides are written again. The caller holds umem_mutex,
    or the key is known to nobody yet.

    Parameters
    ----------
    idx, npages : int
        Entries: 8-byte MTTs, or 16-byte KSMs with UPD_XLT_INDIRECT.
    page_shift : int
        Written with UPD_XLT_ENABLE or UPD_XLT_ADDR.
    flags : int
        UPD_XLT_*: ZAP writes empty entries, ENABLE makes a free key usable.
    """
    dev, indirect = mr.dev, flags & UPD_XLT_INDIRECT
    desc_size = KSM_SIZE if indirect else MTT_SIZE
    per_unit = UMR_ALIGNMENT // desc_size
    if indirect and dev.caps.umr_indirect_mkey_disabled:
        return Errno(EPERM, "mlx5r_umr_update_xlt", "UMR may not change indirect keys")
    if not mr.is_odp:
        return Errno(EINVAL, "mlx5r_umr_update_xlt", "the region is not on demand")
    thread.note(pages=npages, bytes=npages * desc_size, value=idx)
    npages += idx % per_unit
    idx -= idx % per_unit
    pages_to_map = align(npages, per_unit)
    xlt = yield from mlx5r_umr_create_xlt(dev, thread, npages, desc_size, flags)
    if xlt is None:
        return Errno(ENOMEM, "mlx5r_umr_create_xlt", "the buffer cannot be mapped for DMA")
    pages_iter = xlt.length // desc_size
    if not indirect:
        pages_to_map = min(pages_to_map, cast("IbUmemOdp", mr.umem).num_pages() - idx)
    wqe = wqe_of(mr, thread, flags, page_shift, xlt)
    wqe.zeros = bool(flags & UPD_XLT_ZAP) and not indirect
    ret, mapped = 0, 0
    while mapped < pages_to_map and not ret:
        npages = min(pages_iter, pages_to_map - mapped)
        ret = mlx5_odp_populate_xlt(mr, thread, xlt.entries, idx, npages, flags)
        if ret:
            break
        carry(wqe, xlt, npages)
        if mapped + pages_iter >= pages_to_map:
            mlx5r_umr_final_update_xlt(dev, thread, wqe, mr, flags)
        mlx5r_umr_update_offset(wqe, thread, idx * desc_size)
        ret = yield from mlx5r_umr_post_send_wait(dev, thread, wqe)
        mapped += pages_iter
        idx += pages_iter
    yield from mlx5r_umr_unmap_free_xlt(dev, thread, xlt)
    return ret


@waiting_step
def mlx5r_umr_update_mr_pas(mr: Mlx5IbMr, thread: Thread, flags: int) -> Wait:
    """Write all translations of a region that is not on demand, or with ZAP empty ones; return 0 or an errno (umr.c).

    Only those of a dma-buf are ever emptied.
    """
    return (yield from update_pas(mr, thread, flags))


def update_pas(mr: Mlx5IbMr, thread: Thread, flags: int, start_block: int = 0, nblocks: int = 0) -> Wait:
    """Write some of the translations, `nblocks` 0: all from `start_block` on (mlx5r_umr_update_mr_pas_range)."""
    dev, umem = mr.dev, cast("IbUmem", mr.umem)
    if umem.is_odp:
        return Errno(EINVAL, "mlx5r_umr_update_mr_pas", "the region is on demand")
    blocks = dma_blocks(umem, mr.page_shift, mr.iova)[start_block:]
    blocks = blocks[:nblocks] if nblocks else blocks
    xlt = yield from mlx5r_umr_create_xlt(dev, thread, max(nblocks, len(blocks)), MTT_SIZE, flags)
    if xlt is None:
        return Errno(ENOMEM, "mlx5r_umr_create_xlt", "the buffer cannot be mapped for DMA")
    per_wqe = xlt.length // MTT_SIZE
    wqe = wqe_of(mr, thread, flags, mr.page_shift, xlt)
    wqe.zeros = bool(flags & UPD_XLT_ZAP)
    thread.note(va=mr.iova, pages=len(blocks), bytes=len(blocks) * MTT_SIZE, value=start_block)
    ret = 0
    for at in range(0, len(blocks), per_wqe):
        part = blocks[at : at + per_wqe]
        if not wqe.zeros:
            xlt.entries[: len(part)] = part | np.uint64(MTT_PRESENT)
            xlt.entries[len(part) :] = 0
        thread.charge(dev.costs.xlt_entry * len(part))
        carry(wqe, xlt, len(part))
        if start_block + at:
            mlx5r_umr_update_offset(wqe, thread, (start_block + at) * MTT_SIZE)
        if at + per_wqe >= len(blocks):
            mlx5r_umr_final_update_xlt(dev, thread, wqe, mr, flags)
        ret = yield from mlx5r_umr_post_send_wait(dev, thread, wqe)
        if ret:
            break
    yield from mlx5r_umr_unmap_free_xlt(dev, thread, xlt)
    return ret


def dma_blocks(umem: IbUmem, page_shift: int, iova: int) -> NDArray[np.uint64]:
    """DMA address of each hardware page of pinned memory (rdma_umem_for_each_dma_block)."""
    per = page_shift - PAGE_SHIFT
    first = (iova >> PAGE_SHIFT) & ((1 << per) - 1)  # pages of the first hardware page that are not the region's
    at = np.maximum((np.arange(umem.num_dma_blocks(page_shift, iova), dtype=np.int64) << per) - first, 0)
    blocks: NDArray[np.uint64] = umem.dma[at].copy()
    if first and len(blocks):
        blocks[0] -= np.uint64(first << PAGE_SHIFT)
    return blocks
