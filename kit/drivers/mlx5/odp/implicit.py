"""odp.c: implicit regions: a parent of keys over the whole address space, and children of 1 GiB made by faults."""

from __future__ import annotations

from errno import EFAULT, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING, cast

from kit.drivers.mlx5.core.cmd import mlx5_core_create_mkey
from kit.drivers.mlx5.core.linux import __xa_cmpxchg, queue_work, xa_erase, xa_init, xa_load, xa_store
from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.device import mlx5r_umr_can_load_pas
from kit.drivers.mlx5.enums import PAGE_SHIFT, AccessMode, base_mkey
from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr, mlx5r_deref_odp_mkey, mlx5r_deref_wait_odp_mkey
from kit.drivers.mlx5.mr.mkey_cache_alloc import mlx5_mr_cache_alloc
from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_xlt
from kit.drivers.mlx5.objects import (
    MKEY_IMPLICIT_CHILD,
    MKEY_NULL,
    UPD_XLT_ATOMIC,
    UPD_XLT_ENABLE,
    UPD_XLT_INDIRECT,
    UPD_XLT_ZAP,
    IbPd,
    Mlx5IbMr,
)
from kit.drivers.mlx5.odp.fault import BytesMapped, pagefault_real_mr
from kit.drivers.mlx5.umem.odp import (
    IbUmemOdp,
    ib_umem_odp_alloc_child,
    ib_umem_odp_alloc_implicit,
    ib_umem_odp_release,
)
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.memory.space.mm import Mm

__all__ = [
    "destroy_unused_implicit_child_mr", "free_implicit_child_mr_work", "implicit_get_child_mr",
    "mlx5_ib_alloc_implicit_mr", "pagefault_implicit_mr",
]  # fmt: skip

NULL_LOG_PAGE_SIZE = 61
NULL_OCTOWORDS = 4


@waiting_step
def mlx5_ib_alloc_implicit_mr(dev: Mlx5IbDev, thread: Thread, pd: IbPd, access_flags: int) -> Wait:
    """Register the whole address space; every slot of the parent faults until a child is there (odp.c)."""
    shape = dev.imr
    if not mlx5r_umr_can_load_pas(dev, thread, shape.mtt_entries << PAGE_SHIFT):
        return Errno(EOPNOTSUPP, "mlx5_ib_alloc_implicit_mr", "UMR cannot write the translations of a child")
    umem_odp = ib_umem_odp_alloc_implicit(dev, thread, cast("Mm", pd.mm), access_flags)
    if isinstance(umem_odp, Errno):
        return umem_odp
    imr = yield from mlx5_mr_cache_alloc(dev, thread, pd, access_flags, AccessMode.KSM, shape.ksm_entries)
    if isinstance(imr, Errno):
        yield from ib_umem_odp_release(umem_odp, thread)
        return imr
    imr.access_flags, imr.umem, imr.is_odp_implicit = access_flags, umem_odp, True
    imr.iova, imr.lkey, imr.rkey = 0, imr.mmkey.key, imr.mmkey.key
    xa_init(imr.implicit_children, thread)
    ret = yield from enable_implicit_mr(dev, thread, imr)
    if ret:
        yield from mlx5_ib_dereg_mr(imr, thread)
        return ret
    return imr


def enable_implicit_mr(dev: Mlx5IbDev, thread: Thread, imr: Mlx5IbMr) -> Wait:
    """Make every slot empty, enable the key, and let faults find it; 0 or an errno."""
    from kit.drivers.mlx5.mr.reg import mlx5r_store_odp_mkey

    ret = 0
    if dev.mem_page_fault():
        ret = yield from alloc_implicit_mr_null_mkey(dev, thread, imr)
        ret = ret or mlx5r_store_odp_mkey(dev, thread, imr.null_mmkey)
    if not ret:
        flags = UPD_XLT_INDIRECT | UPD_XLT_ZAP | UPD_XLT_ENABLE
        ret = yield from mlx5r_umr_update_xlt(imr, thread, 0, dev.imr.ksm_entries, dev.imr.mtt_shift, flags)
    return ret or mlx5r_store_odp_mkey(dev, thread, imr.mmkey)


@waiting_step
def alloc_implicit_mr_null_mkey(dev: Mlx5IbDev, thread: Thread, imr: Mlx5IbMr) -> Wait:
    """Memory scheme: a null key of the region's own, so that an event tells whose empty slot was hit (odp.c @ 7.0)."""
    if dev.inject.hit("create_mkey_in"):
        return Errno(ENOMEM, "alloc_implicit_mr_null_mkey", "the command's input")
    mkc = Mkc(
        access_mode=AccessMode.MTT, a=True, rw=True, rr=True, lw=True, lr=True, length64=True, pd=imr.pd.pdn,
        log_page_size=NULL_LOG_PAGE_SIZE, translations_octword_size=NULL_OCTOWORDS,
    )  # fmt: skip
    key = yield from mlx5_core_create_mkey(dev.hca, thread, mkc, True)
    if isinstance(key, Errno):
        return key
    imr.null_mmkey.key, imr.null_mmkey.type = key, MKEY_NULL
    return 0


@waiting_step
def pagefault_implicit_mr(
    imr: Mlx5IbMr, thread: Thread, odp_imr: IbUmemOdp, user_va: int, bcnt: int, bytes_mapped: BytesMapped | None,
    flags: int,
) -> Wait:  # fmt: skip
    """Fault each child that the range touches, making those that are missing; return pages, or an errno (odp.c).

    The parent's slots are written after the children were entered. A fault that comes in between sees the child,
    resumes, and faults once more.
    """
    shape = imr.dev.imr
    end_idx = user_va + bcnt - 1 >> shape.mtt_shift
    upd_start_idx, upd_len, npages = end_idx + 1, 0, 0
    limit = shape.ksm_entries * shape.mtt_size
    thread.note(va=user_va, bytes=bcnt)
    if user_va >= limit or limit - user_va < bcnt:
        return Errno(EFAULT, "pagefault_implicit_mr", f"{bcnt} bytes from {user_va:#x} are beyond the address space")
    ret = 0
    while bcnt:
        idx = user_va >> shape.mtt_shift
        yield from thread.sync()
        mtt = xa_load(imr.implicit_children, thread, idx)
        if mtt is None:
            mtt = yield from implicit_get_child_mr(imr, thread, idx)
            if isinstance(mtt, Errno):
                ret = mtt
                break
            upd_start_idx = min(upd_start_idx, idx)
            upd_len = idx - upd_start_idx + 1
        else:
            mtt.mmkey.usecount += 1
        umem_odp = cast(IbUmemOdp, mtt.umem)
        part = min(user_va + bcnt, umem_odp.end) - user_va
        ret = yield from pagefault_real_mr(mtt, thread, umem_odp, user_va, part, bytes_mapped, flags)
        mlx5r_deref_odp_mkey(mtt.mmkey, thread)
        if ret < 0:
            break
        user_va, bcnt, npages = user_va + part, bcnt - part, npages + ret
    if ret >= 0:
        ret = npages
    if not upd_len:
        return ret
    failed = yield from update_slots(imr, thread, upd_start_idx, upd_len)
    return failed or ret


def update_slots(imr: Mlx5IbMr, thread: Thread, idx: int, count: int) -> Wait:
    """Write slots of a parent from the children there are now, under the parent's lock; 0 or an errno."""
    odp_imr = cast(IbUmemOdp, imr.umem)
    yield from odp_imr.umem_mutex.acquire(thread)
    ret = yield from mlx5r_umr_update_xlt(imr, thread, idx, count, 0, UPD_XLT_INDIRECT | UPD_XLT_ATOMIC)
    yield from odp_imr.umem_mutex.release(thread)
    return ret


@waiting_step
def implicit_get_child_mr(imr: Mlx5IbMr, thread: Thread, idx: int) -> Wait:
    """Make the child of one slot, or use the one that somebody else made meanwhile; one use is the caller's (odp.c)."""
    from kit.drivers.mlx5.odp.invalidate import mlx5_mn_ops

    dev, size = imr.dev, imr.dev.imr.mtt_size
    thread.note(va=idx * size, bytes=size)
    odp = yield from ib_umem_odp_alloc_child(cast(IbUmemOdp, imr.umem), thread, idx * size, size, mlx5_mn_ops)
    if isinstance(odp, Errno):
        thread.note(status=repr(odp))
        return odp
    mr = yield from mlx5_mr_cache_alloc(dev, thread, imr.pd, imr.access_flags, AccessMode.MTT, dev.imr.mtt_entries)
    if isinstance(mr, Errno):
        thread.note(status=repr(mr))
        yield from ib_umem_odp_release(odp, thread)
        return mr
    mr.access_flags, mr.umem, mr.parent = imr.access_flags, odp, imr
    mr.lkey = mr.rkey = mr.mmkey.key
    mr.iova, odp.private = idx * size, mr
    mr.mmkey.usecount = 2  # one is the table's, one the caller's
    flags = UPD_XLT_ZAP | UPD_XLT_ENABLE
    ret = yield from mlx5r_umr_update_xlt(mr, thread, 0, dev.imr.mtt_entries, PAGE_SHIFT, flags)
    if ret:
        thread.note(status=repr(ret))
        yield from mlx5_ib_dereg_mr(mr, thread)
        return ret
    yield from thread.sync()
    winner = __xa_cmpxchg(imr.implicit_children, thread, idx, None, mr)
    if winner is not None:
        winner.mmkey.usecount += 1
        thread.note(status="unused")
        yield from mlx5_ib_dereg_mr(mr, thread)
        return winner
    if dev.mem_page_fault():
        xa_store(dev.odp_mkeys, thread, base_mkey(mr.mmkey.key), mr.mmkey)
        mr.mmkey.type = MKEY_IMPLICIT_CHILD
    return mr


@step
def destroy_unused_implicit_child_mr(mr: Mlx5IbMr, thread: Thread) -> None:
    """A child has lost its last page: take it out of its parent and let a work item free it (odp.c)."""
    dev, imr = mr.dev, mr.parent
    assert imr is not None
    idx = cast(IbUmemOdp, mr.umem).start >> dev.imr.mtt_shift
    if not imr.mmkey.usecount:  # refcount_inc_not_zero: the parent is going, and will free its children itself
        return
    imr.mmkey.usecount += 1
    if dev.options.of("child_cmpxchg", dev.era):
        if __xa_cmpxchg(imr.implicit_children, thread, idx, mr, None) is not mr:
            mlx5r_deref_odp_mkey(imr.mmkey, thread)
            return
        if dev.mem_page_fault():
            xa_erase(dev.odp_mkeys, thread, base_mkey(mr.mmkey.key))
    else:
        xa_erase(imr.implicit_children, thread, idx)
    queue_work(dev.system_unbound_wq, thread, lambda worker: free_implicit_child_mr_work(mr, worker))


@waiting_step
def free_implicit_child_mr_work(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Wait for the child's faults, empty its slot or give it to a newer child, then destroy it (odp.c)."""
    imr, odp = cast(Mlx5IbMr, mr.parent), cast(IbUmemOdp, mr.umem)
    yield from mlx5r_deref_wait_odp_mkey(mr.mmkey, thread)
    yield from update_slots(imr, thread, odp.start >> mr.dev.imr.mtt_shift, 1)
    yield from mlx5_ib_dereg_mr(mr, thread)
    mlx5r_deref_odp_mkey(imr.mmkey, thread)
