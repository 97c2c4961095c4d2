"""advise_mr: fetching pages ahead, before the hardware asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL, ENOENT, ENOMEM, EOPNOTSUPP, EPERM
from typing import TYPE_CHECKING

from kit.drivers.mlx5.core.linux import queue_work, xa_load
from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.enums import base_mkey
from kit.drivers.mlx5.mr.dereg import mlx5r_deref_odp_mkey
from kit.drivers.mlx5.objects import MKEY_MR, PF_DOWNGRADE, PF_SNAPSHOT, IbPd, Mlx5IbMr
from kit.drivers.mlx5.odp.fault import BytesMapped, mlx5_update_odp_stats, pagefault_mr
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = [
    "ADVISE_FLUSH", "PREFETCH", "PREFETCH_NO_FAULT", "PREFETCH_WRITE", "get_prefetchable_mr", "ib_uverbs_advise_mr",
    "mlx5_ib_advise_mr",
]  # fmt: skip

PREFETCH, PREFETCH_WRITE, PREFETCH_NO_FAULT = range(3)  # IB_UVERBS_ADVISE_MR_ADVICE_*
ADVISE_FLUSH = 1  # IB_UVERBS_ADVISE_MR_FLAG_FLUSH
Frag = tuple[Mlx5IbMr, int, int]


def ib_uverbs_advise_mr(pd: IbPd, thread: Thread, advice: int, flags: int, sg_list: Sequence[Sge]) -> Wait:
    """What ibv_advise_mr enters the kernel through (core/uverbs_std_types_mr.c)."""
    thread.charge(pd.dev.costs.verb)
    if flags & ~ADVISE_FLUSH:
        return Errno(EINVAL, "ib_uverbs_advise_mr", f"unknown flags {flags:#x}")
    if not sg_list:
        return Errno(EINVAL, "ib_uverbs_advise_mr", "no segment")
    return (yield from mlx5_ib_advise_mr(pd, thread, advice, flags, sg_list))


@waiting_step
def mlx5_ib_advise_mr(pd: IbPd, thread: Thread, advice: int, flags: int, sg_list: Sequence[Sge]) -> Wait:
    """Fetch pages ahead; returns 0 or an errno (mr.c)."""
    if advice not in (PREFETCH, PREFETCH_WRITE, PREFETCH_NO_FAULT):
        return Errno(EOPNOTSUPP, "mlx5_ib_advise_mr", f"advice {advice}")
    return (yield from mlx5_ib_advise_mr_prefetch(pd, thread, advice, flags, sg_list))


@waiting_step
def mlx5_ib_advise_mr_prefetch(pd: IbPd, thread: Thread, advice: int, flags: int, sg_list: Sequence[Sge]) -> Wait:
    """Read-only, writable or only what is resident; while the caller waits, or in one work item (odp.c)."""
    dev = pd.dev
    pf_flags = {PREFETCH: PF_DOWNGRADE, PREFETCH_NO_FAULT: PF_SNAPSHOT}.get(advice, 0)
    if flags & ADVISE_FLUSH:
        return (yield from mlx5_ib_prefetch_sg_list(dev, thread, pd, advice, pf_flags, sg_list))
    if dev.inject.hit("prefetch_work"):
        return Errno(ENOMEM, "mlx5_ib_advise_mr_prefetch", "struct prefetch_mr_work")
    frags: list[Frag] = []
    ret = init_prefetch_work(dev, thread, pd, advice, sg_list, frags)
    if ret:
        destroy_prefetch_work(dev, thread, frags)
        return ret
    queue_work(dev.system_unbound_wq, thread, lambda worker: mlx5_ib_prefetch_mr_work(dev, worker, pf_flags, frags))
    return 0


@step
def get_prefetchable_mr(dev: Mlx5IbDev, thread: Thread, pd: IbPd, advice: int, lkey: int) -> Mlx5IbMr | Errno:
    """Find the region and take a use of its key, which holds a deregistration up (odp.c)."""
    name, mmkey = "get_prefetchable_mr", xa_load(dev.odp_mkeys, thread, base_mkey(lkey))
    if mmkey is None or mmkey.key != lkey:
        return Errno(ENOENT, name, f"key {lkey:#x} is not on demand")
    if mmkey.type != MKEY_MR or mmkey.mr is None:
        return Errno(EINVAL, name, f"key {lkey:#x} is no plain region's")
    mr = mmkey.mr
    if mr.pd is not pd:
        return Errno(EPERM, name, f"key {lkey:#x} belongs to another protection domain")
    if advice == PREFETCH_WRITE and mr.umem is not None and not mr.umem.writable:
        return Errno(EPERM, name, f"key {lkey:#x} may not be written through")
    mmkey.usecount += 1
    return mr


@waiting_step
def mlx5_ib_prefetch_sg_list(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, advice: int, pf_flags: int, sg_list: Sequence[Sge]
) -> Wait:
    """Segment after segment; the first error ends it (odp.c)."""
    mapped = BytesMapped()
    for sge in sg_list:
        mr = get_prefetchable_mr(dev, thread, pd, advice, sge.lkey)
        if isinstance(mr, Errno):
            return mr
        ret = yield from pagefault_mr(mr, thread, sge.addr, sge.length, mapped, pf_flags)
        if ret >= 0:
            mlx5_update_odp_stats(mr, thread, "prefetch", ret)
        mlx5r_deref_odp_mkey(mr.mmkey, thread)
        if ret < 0:
            return ret
    return 0


@step
def init_prefetch_work(
    dev: Mlx5IbDev, thread: Thread, pd: IbPd, advice: int, sg_list: Sequence[Sge], frags: list[Frag]
) -> int:
    """Look every segment up before any is fetched (odp.c)."""
    for sge in sg_list:
        mr = get_prefetchable_mr(dev, thread, pd, advice, sge.lkey)
        if isinstance(mr, Errno):
            return mr
        frags.append((mr, sge.addr, sge.length))
    return 0


@waiting_step
def mlx5_ib_prefetch_mr_work(dev: Mlx5IbDev, thread: Thread, pf_flags: int, frags: list[Frag]) -> Wait:
    """Fetch in the background: a segment that fails does not keep the others from it (odp.c)."""
    mapped = BytesMapped()
    for mr, io_virt, length in frags:
        ret = yield from pagefault_mr(mr, thread, io_virt, length, mapped, pf_flags)
        if ret > 0:
            mlx5_update_odp_stats(mr, thread, "prefetch", ret)
    destroy_prefetch_work(dev, thread, frags)


@step
def destroy_prefetch_work(dev: Mlx5IbDev, thread: Thread, frags: list[Frag]) -> None:
    """Give the uses of all keys up (odp.c)."""
    for mr, _, _ in frags:
        mlx5r_deref_odp_mkey(mr.mmkey, thread)
