"""The HMM test driver's exclusive (atomic) access to pages (lib/test_hmm.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL, EPERM

import numpy as np

from kit.drivers.dmirror import Dmirror
from kit.drivers.dmirror_access import read_back
from kit.drivers.dmirror_types import DPT_XA_TAG_ATOMIC, HmmDmirrorCmd
from kit.errors import Errno
from kit.memory.device.exclusive import make_device_exclusive
from kit.memory.syscalls.exit import mmput
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

__all__ = ["dmirror_check_atomic", "dmirror_exclusive"]


@waiting_step
def dmirror_exclusive(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_EXCLUSIVE: take each page away from the CPU for atomic access, then read all back."""
    mm = dmirror.mm
    if not mm.mmget_not_zero():
        return Errno(EINVAL, "dmirror_exclusive", "the address space is gone")
    ret = 0
    yield from mm.mmap_lock.read_acquire(thread)
    for addr in range(cmd.addr, cmd.addr + (cmd.npages << 12), 4096):
        since = yield from dmirror.mdevice.listen(dmirror, thread)
        page = yield from make_device_exclusive(mm, thread, addr, None)
        if page < 0:
            ret = page
            break
        yield from dmirror_atomic_map(dmirror, thread, addr, page, since)
        yield from thread.sync()
        mm.memory.unlock(page)
        mm.memory.put(page)
    yield from mm.mmap_lock.read_release(thread)
    yield from mmput(mm, thread)
    return ret or (yield from read_back(dmirror, thread, cmd))


@waiting_step
def dmirror_atomic_map(dmirror: Dmirror, thread: Thread, addr: int, page: int, since: int) -> Wait:
    """Enter one page as atomic; a plain write of the device faults on it. A guarded device: if it is not stale."""
    yield from dmirror.mutex.acquire(thread)
    if not dmirror.mdevice.stale(dmirror, thread, since):
        dmirror.store(np.array([addr >> 12]), np.array([page]), DPT_XA_TAG_ATOMIC)
    thread.charge(dmirror.mdevice.costs.device_pte)
    yield from dmirror.mutex.release(thread)


@waiting_step
def dmirror_check_atomic(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_CHECK_EXCLUSIVE: -EPERM while any page is still atomic."""
    yield from thread.sync()
    rights, _frames = dmirror.load(cmd.addr, cmd.addr + (cmd.npages << 12))
    if (rights == DPT_XA_TAG_ATOMIC).any():
        return Errno(EPERM, "dmirror_check_atomic", "a page is still exclusive to the device")
    return 0
