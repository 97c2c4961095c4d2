"""mr.c: deregistering: no new faults, wait for running ones, fence the hardware, let go of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kit.drivers.mlx5.core.cmd import mlx5_core_destroy_mkey
from kit.drivers.mlx5.core.linux import xa_erase
from kit.drivers.mlx5.device import mlx5r_umr_can_load_pas
from kit.drivers.mlx5.enums import Era, base_mkey
from kit.drivers.mlx5.mr.mkey_cache import TMP_LIFETIME
from kit.drivers.mlx5.mr.mkey_cache_alloc import cache_ent_find_and_store
from kit.drivers.mlx5.mr.umr_post import mlx5r_umr_revoke_mr
from kit.drivers.mlx5.umem.umem import ib_umem_release
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMkey, Mlx5IbMr
    from kit.drivers.mlx5.umem.dmabuf import IbUmemDmabuf
    from kit.drivers.mlx5.umem.odp import IbUmemOdp

__all__ = [
    "destroy_mkey", "mlx5_ib_dereg_mr", "mlx5_ib_free_odp_mr", "mlx5r_deref_odp_mkey", "mlx5r_deref_wait_odp_mkey",
]  # fmt: skip


@step
def mlx5r_deref_odp_mkey(mmkey: Mlx5IbMkey, thread: Thread) -> None:
    """Give one use of a key up; the last one wakes who waits to destroy it (mlx5_ib.h)."""
    mmkey.usecount -= 1
    if not mmkey.usecount:
        mmkey.wait.wake_up()


@waiting_step
def mlx5r_deref_wait_odp_mkey(mmkey: Mlx5IbMkey, thread: Thread) -> Wait:
    """Give the own use up and wait until nobody else has one (mlx5_ib.h)."""
    yield from thread.sync()
    mlx5r_deref_odp_mkey(mmkey, thread)
    yield from mmkey.wait.wait_event(thread, lambda: mmkey.usecount == 0)


@waiting_step
def mlx5_ib_dereg_mr(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Deregister; returns 0 or the errno of the firmware (mr.c)."""
    dev, mmkey = mr.dev, mr.mmkey
    thread.note(va=mr.iova, bytes=mr.length)
    yield from thread.sync()
    if mmkey.usecount and xa_erase(dev.odp_mkeys, thread, base_mkey(mmkey.key)) is not None:
        if dev.era == Era.OLD:
            yield from synchronize_srcu(dev, thread)
            mmkey.usecount -= 1  # what is left are prefetches, whose work queue is flushed
            yield from mmkey.wait.wait_event(thread, lambda: mmkey.usecount == 0)
        else:
            yield from mlx5r_deref_wait_odp_mkey(mmkey, thread)
    ret = yield from stop_dma(mr, thread)
    if ret:
        return ret
    umem = mr.umem
    if umem is not None:
        if not umem.is_odp:
            dev.reg_pages -= umem.num_pages()
        yield from ib_umem_release(umem, thread)
        if umem.is_odp:
            yield from mlx5_ib_free_odp_mr(mr, thread)
    mr.dead = True
    return 0


@waiting_step
def synchronize_srcu(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Wait for a grace period: every fault handler that runs now ends in it (before the use counts)."""
    thread.charge(dev.costs.srcu_grace_period)
    yield from dev.srcu.wait_event(thread, lambda: not dev.srcu_readers)


def stop_dma(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Revoke the key and keep it for later, or destroy it; 0 or an errno."""
    dev = mr.dev
    if dev.era == Era.NEW:
        return (yield from mlx5r_handle_mkey_cleanup(mr, thread))
    mmkey = mr.mmkey
    if mr.umem is not None and mlx5r_umr_can_load_pas(dev, thread, mr.umem.length):
        revoke = revoke_mr_with_lock if dev.options.of("revoke_under_lock", dev.era) else mlx5r_umr_revoke_mr
        if (yield from revoke(mr, thread)) or (yield from cache_ent_find_and_store(dev, thread, mr)):
            mmkey.cache_ent = None
    return 0 if mmkey.cache_ent is not None else (yield from destroy_mkey(mr, thread))


@waiting_step
def mlx5r_handle_mkey_cleanup(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Since 6.12: revoke under the umem's lock and keep the key, or destroy it under that lock (mr.c)."""
    dev, mmkey = mr.dev, mr.mmkey
    from_cache = mmkey.cache_ent
    failed = not mmkey.cacheable or (yield from revoke_mr_with_lock(mr, thread))
    if not failed and not (yield from cache_ent_find_and_store(dev, thread, mr)):
        ent = mmkey.cache_ent
        assert ent is not None
        if from_cache is not None:
            ent.in_use -= 1
        if ent.is_tmp and not ent.tmp_cleanup_scheduled:
            ent.dwork.mod(thread, TMP_LIFETIME)
            ent.tmp_cleanup_scheduled = True
        return 0
    if from_cache is not None:
        from_cache.in_use -= 1
        mmkey.cache_ent = None
    return (yield from under_lock(mr, thread, destroy_mkey))


def revoke_mr_with_lock(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Revoke so that no invalidation can still write to the freed key (mlx5_umr_revoke_mr_with_lock)."""
    return (yield from under_lock(mr, thread, mlx5r_umr_revoke_mr))


def under_lock(mr: Mlx5IbMr, thread: Thread, end: Callable[[Mlx5IbMr, Thread], Wait]) -> Wait:
    """End a key's use while no invalidation runs, and let later ones find no region; a pinned one has none."""
    if mr.is_odp:
        odp = cast("IbUmemOdp", mr.umem)
        yield from odp.umem_mutex.acquire(thread)
        ret = yield from end(mr, thread)
        if not ret:
            odp.private = None
        yield from odp.umem_mutex.release(thread)
        return ret
    if mr.is_dmabuf:
        dmabuf = cast("IbUmemDmabuf", mr.umem)
        yield from dmabuf.resv.lock(thread)
        ret = yield from end(mr, thread)
        if not ret:
            dmabuf.private = None
        yield from dmabuf.resv.unlock(thread)
        return ret
    return (yield from end(mr, thread))


@waiting_step
def destroy_mkey(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """DESTROY_MKEY (mr.c)."""
    return (yield from mlx5_core_destroy_mkey(mr.dev.hca, thread, mr.mmkey.key))


@waiting_step
def mlx5_ib_free_odp_mr(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Deregister the children that an implicit region still has, and its own null key (odp.c)."""
    dev = mr.dev
    for idx in sorted(mr.implicit_children):
        child = xa_erase(mr.implicit_children, thread, idx)
        if child is not None:
            yield from mlx5_ib_dereg_mr(child, thread)
    if mr.null_mmkey.key:
        xa_erase(dev.odp_mkeys, thread, base_mkey(mr.null_mmkey.key))
        yield from mlx5_core_destroy_mkey(dev.hca, thread, mr.null_mmkey.key)
