"""The HMM test driver's snapshots: what the CPU has of a range, one byte a page (lib/test_hmm.c @ 7.0)."""

from __future__ import annotations

from errno import EBUSY, EINVAL

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror
from kit.drivers.dmirror_types import (
    FAULT_BATCH,
    HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
    HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
    HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE,
    HMM_DMIRROR_PROT_ERROR,
    HMM_DMIRROR_PROT_NONE,
    HMM_DMIRROR_PROT_PMD,
    HMM_DMIRROR_PROT_PUD,
    HMM_DMIRROR_PROT_READ,
    HMM_DMIRROR_PROT_WRITE,
    HMM_DMIRROR_PROT_ZERO,
    HmmDmirrorCmd,
)
from kit.errors import Errno
from kit.memory.device.hmm import HMM_RANGE_DEFAULT_TIMEOUT, hmm_range_fault
from kit.memory.device.hmm_entries import (
    HMM_PFN_ERROR,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
)
from kit.memory.notifier.mmu_interval_notifier import (
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from kit.memory.notifier.mmu_notifier import mmu_notifier_lock
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier, MmuIntervalNotifierOps, MmuNotifierRange
from kit.memory.physical.memremap import MEMORY_DEVICE_COHERENT, MEMORY_DEVICE_PRIVATE, DevPagemap, pgmaps_where
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.syscalls.exit import mmput
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["dmirror_snapshot"]


@step
def dmirror_mkentry(dmirror: Dmirror, thread: Thread, entries: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the snapshot byte (HMM_DMIRROR_PROT_*) of each answer of hmm_range_fault."""
    memory = dmirror.mm.memory
    valid, error = entries & np.uint64(HMM_PFN_VALID) != 0, entries & np.uint64(HMM_PFN_ERROR) != 0
    pfns = np.where(valid & ~error, hmm_pfn_to_pfn(entries), -1)
    pgmap = np.where(pfns >= 0, memory.pgmap[pfns], 0)
    perm = np.where(pfns == ZERO_PFN, HMM_DMIRROR_PROT_ZERO, HMM_DMIRROR_PROT_NONE).astype(np.uint8)
    for kind, local, value in (
        (MEMORY_DEVICE_PRIVATE, True, HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL),
        (MEMORY_DEVICE_PRIVATE, False, HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE),
        (MEMORY_DEVICE_COHERENT, True, HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL),
        (MEMORY_DEVICE_COHERENT, False, HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE),
    ):

        def matches(its: DevPagemap, kind: int = kind, local: bool = local) -> bool:
            return its.type == kind and (its.owner is dmirror.mdevice) == local

        perm[pgmaps_where(memory, matches)[pgmap]] = value
    writable = entries & np.uint64(HMM_PFN_WRITE) != 0
    perm |= np.where(writable, HMM_DMIRROR_PROT_WRITE, HMM_DMIRROR_PROT_READ).astype(np.uint8)
    order = hmm_pfn_to_map_order(entries)
    perm[order == 9] |= HMM_DMIRROR_PROT_PMD
    perm[order == 18] |= HMM_DMIRROR_PROT_PUD
    perm[~valid] = HMM_DMIRROR_PROT_NONE
    perm[error] = HMM_DMIRROR_PROT_ERROR
    return perm


@waiting_step
def dmirror_snapshot_invalidate(
    sub: MmuIntervalNotifier, thread: Thread, range: MmuNotifierRange, cur_seq: int
) -> Wait:
    """Any invalidation of the interval makes the whole snapshot stale: there is nothing to drop."""
    dmirror: Dmirror = sub.user
    if not (yield from mmu_notifier_lock(range, thread, dmirror.mutex)):
        return False
    mmu_interval_set_seq(sub, cur_seq)
    yield from dmirror.mutex.release(thread)
    return True


dmirror_mrn_ops = MmuIntervalNotifierOps(dmirror_snapshot_invalidate)


@waiting_step
def dmirror_range_snapshot(dmirror: Dmirror, thread: Thread, range: HmmRange) -> Wait:
    """Look at a range under a notifier of its own; returns the snapshot bytes, or a negative errno."""
    deadline, mm = thread.now + HMM_RANGE_DEFAULT_TIMEOUT * 1000, dmirror.mm
    length = range.end - range.start
    ret = yield from mmu_interval_notifier_insert(range.notifier, thread, mm, range.start, length, dmirror_mrn_ops)
    if ret:
        return ret
    result: NDArray[np.uint8] | int = Errno(EBUSY, "dmirror_range_snapshot", f"{range.start:#x} does not hold still")
    while thread.now <= deadline:
        range.notifier_seq = yield from mmu_interval_read_begin(range.notifier, thread)
        yield from mm.mmap_lock.read_acquire(thread)
        ret = yield from hmm_range_fault(range, thread)
        yield from mm.mmap_lock.read_release(thread)
        if ret == -EBUSY:
            continue
        if ret:
            result = ret
            break
        yield from dmirror.mutex.acquire(thread)
        still = not mmu_interval_read_retry(range.notifier, range.notifier_seq)
        if still:
            result = dmirror_mkentry(dmirror, thread, range.hmm_pfns[: length >> 12])
        yield from dmirror.mutex.release(thread)
        if still:
            break
    yield from mmu_interval_notifier_remove(range.notifier, thread)
    return result


@waiting_step
def dmirror_snapshot(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_SNAPSHOT: one byte a page about what the CPU has, without faulting, 32 pages at a time."""
    if not dmirror.mm.mmget_not_zero():
        return Errno(EINVAL, "dmirror_snapshot", "the address space is gone")
    out, ret = cmd.ptr.view(np.uint8), 0
    end = cmd.addr + (cmd.npages << 12)
    for addr in range(cmd.addr, end, FAULT_BATCH << 12):
        pfns = np.zeros(FAULT_BATCH, dtype=np.uint64)
        last = min(addr + (FAULT_BATCH << 12), end)
        asked = HmmRange(MmuIntervalNotifier(dmirror), 0, addr, last, pfns, 0, 0, dmirror.mdevice)
        perm = yield from dmirror_range_snapshot(dmirror, thread, asked)
        if isinstance(perm, int):
            ret = perm
            break
        out[cmd.cpages : cmd.cpages + len(perm)] = perm
        cmd.cpages += len(perm)
    yield from mmput(dmirror.mm, thread)
    return ret
