"""mr.c: a region and its key: from the cache, or created by a command."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.core.cmd import mlx5_core_create_mkey
from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.enums import MTT_PRESENT, PAGE, AccessMode, Era
from kit.drivers.mlx5.mr.mkey_cache import (
    get_unchangeable_access_flags,
    mkey_cache_ent_from_rb_key,
    set_mkc_access_pd_addr_fields,
)
from kit.drivers.mlx5.mr.mkey_cache_alloc import _mlx5_mr_cache_alloc
from kit.drivers.mlx5.mr.mkey_cache_work import assign_mkey_variant
from kit.drivers.mlx5.mr.umr import dma_blocks
from kit.drivers.mlx5.objects import MKEY_MR, IbPd, Mlx5IbMr, RbKey
from kit.drivers.mlx5.umem.umem import ib_umem_find_best_pgsz
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.umem.dmabuf import IbUmemDmabuf
    from kit.drivers.mlx5.umem.odp import IbUmemOdp
    from kit.drivers.mlx5.umem.umem import IbUmem

    Umem = IbUmem | IbUmemOdp

__all__ = ["alloc_cacheable_mr", "mlx5_umem_dmabuf_default_pgsz", "page_sizes", "reg_create"]


def page_sizes(dev: Mlx5IbDev) -> int:
    """Page sizes of an mkey, as a bitmap: its log is a field of 5 bits, of 6 in new drivers."""
    return (1 << (32 if dev.era < Era.NEW else 63)) - PAGE


@waiting_step
def alloc_cacheable_mr(dev: Mlx5IbDev, thread: Thread, pd: IbPd, umem: Umem, iova: int, access_flags: int) -> Wait:
    """Return a region whose key is there but free: from the cache, or created for it (mr.c)."""
    if umem.is_dmabuf:
        page_size = mlx5_umem_dmabuf_default_pgsz(cast("IbUmemDmabuf", umem), thread, iova)
    else:
        page_size = ib_umem_find_best_pgsz(cast("IbUmem", umem), thread, page_sizes(dev), iova)
    if not page_size:
        return Errno(EINVAL, "alloc_cacheable_mr", "the device has no page size that fits")
    page_shift = page_size.bit_length() - 1
    ndescs = ib_umem_num_dma_blocks(umem, thread, page_shift, iova)
    ats = mlx5_umem_needs_ats(dev, thread, access_flags)
    rb_key = RbKey(ats, AccessMode.MTT, get_unchangeable_access_flags(dev, thread, access_flags), ndescs)
    ent = mkey_cache_ent_from_rb_key(dev, thread, rb_key)
    if ent is None:
        yield from dev.slow_path_mutex.acquire(thread)
        mr = yield from reg_create(dev, thread, pd, umem, iova, access_flags, page_shift, False)
        yield from dev.slow_path_mutex.release(thread)
        if not isinstance(mr, Errno):
            mr.mmkey.rb_key, mr.mmkey.cacheable = rb_key, True
        return mr
    mr = yield from _mlx5_mr_cache_alloc(dev, thread, ent, pd)
    if isinstance(mr, Errno):
        return mr
    mr.umem, mr.page_shift = umem, page_shift
    set_mr_fields(mr, thread, umem.length, access_flags, iova)
    return mr


@step
def mlx5_umem_dmabuf_default_pgsz(umem: IbUmemDmabuf, thread: Thread, iova: int) -> int:
    """The smallest page size: the buffer is not mapped yet, and how it will be nobody knows (mr.c)."""
    umem.iova = iova
    return PAGE


@step
def mlx5_umem_needs_ats(dev: Mlx5IbDev, thread: Thread, access_flags: int) -> int:
    """Whether addresses are translated by the PCIe root; the modelled devices are not configured so (mlx5_ib.h)."""
    return 0


@step
def ib_umem_num_dma_blocks(umem: Umem, thread: Thread, page_shift: int, iova: int) -> int:
    """Hardware pages between a region's first and last byte (ib_umem.h)."""
    size = 1 << page_shift
    return ((iova + umem.length + size - 1 & -size) - (iova & -size)) >> page_shift


@step
def set_mr_fields(mr: Mlx5IbMr, thread: Thread, length: int, access_flags: int, iova: int) -> None:
    """What the user sees of the region (mr.c)."""
    mr.lkey = mr.rkey = mr.mmkey.key
    mr.length, mr.access_flags, mr.iova = length, access_flags, iova


@waiting_step
def reg_create(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, umem: Umem, iova: int, access_flags: int, page_shift: int,
    populate: bool,
) -> Wait:  # fmt: skip
    """Create a key by firmware command: with its translations, or free, for UMR to fill (mr.c)."""
    if dev.inject.hit("mr"):
        return Errno(ENOMEM, "reg_create", "struct mlx5_ib_mr")
    if dev.inject.hit("create_mkey_in"):
        return Errno(ENOMEM, "reg_create", "the command's input")
    mr = Mlx5IbMr(dev, pd, umem=umem, page_shift=page_shift)
    octowords = (ib_umem_num_dma_blocks(umem, thread, page_shift, iova) + 1) // 2  # get_octo_len
    mkc = Mkc(
        free=not populate, umr_en=True, access_mode=AccessMode.MTT, len=umem.length, log_page_size=page_shift,
        translations_octword_size=octowords,
    )  # fmt: skip
    pas = mlx5_ib_populate_pas(mr, thread, iova) if populate else None
    set_mkc_access_pd_addr_fields(mkc, thread, access_flags, iova, pd if populate else dev.umrc.pd)
    mlx5_umem_needs_ats(dev, thread, access_flags)
    key = yield from mlx5_ib_create_mkey(dev, thread, mkc, pas)
    if isinstance(key, Errno):
        return key
    mr.mmkey.key, mr.mmkey.type, mr.mmkey.ndescs = key, MKEY_MR, octowords
    set_mr_fields(mr, thread, umem.length, access_flags, iova)
    return mr


@step
def mlx5_ib_populate_pas(mr: Mlx5IbMr, thread: Thread, iova: int) -> NDArray[np.uint64]:
    """Translations of pinned memory, all present, for the command itself (mem.c)."""
    blocks = dma_blocks(cast("IbUmem", mr.umem), mr.page_shift, iova)
    thread.charge(mr.dev.costs.xlt_entry * len(blocks))
    return blocks | np.uint64(MTT_PRESENT if mr.dev.caps.pg else 0)


@waiting_step
def mlx5_ib_create_mkey(dev: Mlx5IbDev, thread: Thread, mkc: Mkc, pas: NDArray[np.uint64] | None) -> Wait:
    """CREATE_MKEY under the next variant (mr.c)."""
    mkc.mkey_7_0 = assign_mkey_variant(dev, thread)
    return (yield from mlx5_core_create_mkey(dev.hca, thread, mkc, dev.caps.pg, pas))
