"""umr.c: the queue pair that changes mkeys: posting, waiting, recovering, revoking."""

from __future__ import annotations

from errno import EFAULT, EIO, ENOMEM, EPERM
from typing import TYPE_CHECKING

from kit.drivers.mlx5.descriptors import Mkc, UmrWqe
from kit.drivers.mlx5.device import UMR_ACTIVE, UMR_ERR, UMR_RECOVER, UMR_UNINIT
from kit.drivers.mlx5.enums import Era, MkeyMask, QpState, UmrFlags, WcStatus, mkey_variant
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr

__all__ = [
    "access_mask", "mlx5r_umr_post_send_wait", "mlx5r_umr_resource_init", "mlx5r_umr_revoke_mr", "pd_mask",
    "umr_check_mkey_mask",
]  # fmt: skip

_RIGHTS = int(MkeyMask.LR | MkeyMask.LW | MkeyMask.RR | MkeyMask.RW)
_A, _PAGE_SIZE = int(MkeyMask.A), int(MkeyMask.PAGE_SIZE)
_RELAXED_WRITE, _RELAXED_READ = int(MkeyMask.RELAXED_ORDERING_WRITE), int(MkeyMask.RELAXED_ORDERING_READ)
POLL = 4000.0  # microseconds: usleep_range(3000, 5000)


def access_mask(dev: Mlx5IbDev) -> int:
    """Fields that carry the access rights (get_umr_update_access_mask)."""
    mask = _RIGHTS
    if dev.caps.atomic:
        mask |= _A
    if dev.caps.relaxed_ordering_write_umr:
        mask |= _RELAXED_WRITE
    if dev.caps.relaxed_ordering_read_umr:
        mask |= _RELAXED_READ
    return mask


def pd_mask() -> int:
    """The field that carries the protection domain (get_umr_update_pd_mask)."""
    return int(MkeyMask.PD)


@step
def umr_check_mkey_mask(dev: Mlx5IbDev, thread: Thread, mask: int) -> int:
    """Return 0, or -EPERM when the device's UMR may not write one of these fields (umr.c)."""
    caps, mask = dev.caps, int(mask)
    if not mask:
        return 0
    forbidden = (
        (_PAGE_SIZE, caps.umr_modify_entity_size_disabled),
        (_A, caps.umr_modify_atomic_disabled),
        (_RELAXED_WRITE, not caps.relaxed_ordering_write_umr),
        (_RELAXED_READ, not caps.relaxed_ordering_read_umr),
    )
    for field, disabled in forbidden:
        if disabled and mask & field:
            return Errno(EPERM, "umr_check_mkey_mask", f"UMR may not change {MkeyMask(field).name}")
    return 0


@waiting_step
def mlx5r_umr_resource_init(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Make the UMR queue pair: by the first registration since 6.11, with the device before (umr.c)."""
    umrc = dev.umrc
    if umrc.state != UMR_UNINIT:
        return 0
    yield from umrc.init_lock.acquire(thread)
    ret = 0
    if umrc.state == UMR_UNINIT:
        ret = yield from mlx5r_umr_qp_rst2rts(dev, thread)
        if not ret:
            umrc.state = UMR_ACTIVE
    yield from umrc.init_lock.release(thread)
    return ret


@waiting_step
def mlx5r_umr_qp_rst2rts(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Take the queue pair from RESET to RTS (umr.c)."""
    if dev.inject.hit("umr_recover"):
        return Errno(ENOMEM, "mlx5r_umr_qp_rst2rts", "the queue pair cannot be modified")
    ret = 0
    for state in (QpState.INIT, QpState.RTR, QpState.RTS):
        ret = ret or (yield from dev.hca.modify_umr_qp(thread, state))
    return ret


@step
def mlx5r_umr_post_send(dev: Mlx5IbDev, thread: Thread, wqe: UmrWqe) -> int:
    """Ring the doorbell, unless the device is dead (umr.c)."""
    if dev.hca.internal_error:
        return Errno(EIO, "mlx5r_umr_post_send", "the device is in internal error state")
    dev.umrc.posted += 1
    return 0


@waiting_step
def mlx5r_umr_post_send_wait(dev: Mlx5IbDev, thread: Thread, wqe: UmrWqe) -> Wait:
    """Have the hardware execute one work request; return 0 or an errno (umr.c).

    At most 128 are in flight. A flushed one is posted again; after any other failure the queue pair is reset.
    """
    umrc = dev.umrc
    ret: int = umr_check_mkey_mask(dev, thread, wqe.mkey_mask)
    if ret:
        return ret
    yield from umrc.sem.down(thread)
    while True:
        yield from umrc.lock.acquire(thread)
        state = umrc.state
        if state == UMR_ACTIVE:
            ret = mlx5r_umr_post_send(dev, thread, wqe)
        yield from umrc.lock.release(thread)
        if state == UMR_ERR:
            ret = Errno(EFAULT, "mlx5r_umr_post_send_wait", "the UMR queue pair could not be recovered")
            break
        if state == UMR_RECOVER:
            yield from dev.engine.pause(POLL)
            thread.now = max(thread.now, float(dev.engine.now))
            continue
        if ret:
            break
        status = yield from dev.hca.execute_umr(thread, wqe)
        complete(dev, thread, status)
        if status == WcStatus.SUCCESS:
            break
        if status == WcStatus.WR_FLUSH_ERR and dev.era > Era.OLD:
            continue
        thread.note(status=status.name)
        if dev.era > Era.OLD:
            yield from recover(dev, thread, wqe)
        ret = Errno(EFAULT, "mlx5r_umr_post_send_wait", f"mkey {wqe.mkey:#x}: {status.name}")
        break
    yield from umrc.sem.up(thread)
    return ret


def complete(dev: Mlx5IbDev, thread: Thread, status: WcStatus) -> None:
    """Let the completion queue's handler run, which nobody calls."""
    thread.apart(lambda: mlx5r_umr_done(dev, thread, status))


@step
def mlx5r_umr_done(dev: Mlx5IbDev, thread: Thread, status: WcStatus) -> None:
    """The completion, which wakes who waits (umr.c)."""
    if status != WcStatus.SUCCESS:
        thread.note(status=status.name)


def recover(dev: Mlx5IbDev, thread: Thread, wqe: UmrWqe) -> Wait:
    """Bring the queue pair back: up to 6.11 others wait for the lock meanwhile, since then they poll the state."""
    lock = dev.umrc.lock
    if dev.era < Era.NEW:
        yield from lock.acquire(thread)
        yield from mlx5r_umr_recover(dev, thread, wqe)
        yield from lock.release(thread)
    else:
        yield from mlx5r_umr_recover(dev, thread, wqe)


@waiting_step
def mlx5r_umr_recover(dev: Mlx5IbDev, thread: Thread, wqe: UmrWqe) -> Wait:
    """Reset the failed queue pair; since 6.12 it is first drained behind a barrier (umr.c)."""
    umrc, ret = dev.umrc, 0
    if dev.era == Era.NEW:
        yield from umrc.lock.acquire(thread)
        umrc.state = UMR_RECOVER
        yield from umrc.lock.release(thread)
        ret = mlx5r_umr_post_send(dev, thread, wqe)
        if not ret:
            yield from dev.hca.execute_umr(thread, wqe)  # the barrier; it can only be flushed
    ret = ret or (yield from dev.hca.modify_umr_qp(thread, QpState.RESET))
    ret = ret or (yield from mlx5r_umr_qp_rst2rts(dev, thread))
    umrc.state = UMR_ERR if ret else UMR_ACTIVE
    return ret


@waiting_step
def mlx5r_umr_revoke_mr(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Fence all DMA on a region: its key becomes free and belongs to the kernel's domain (umr.c)."""
    dev = mr.dev
    if dev.hca.internal_error:
        return 0
    mkc = Mkc(free=True, pd=dev.umrc.pd.pdn, mkey_7_0=mkey_variant(mr.mmkey.key))
    wqe = UmrWqe(mr.mmkey.key, UmrFlags.INLINE, pd_mask() | MkeyMask.FREE, mkc)
    return (yield from mlx5r_umr_post_send_wait(dev, thread, wqe))
