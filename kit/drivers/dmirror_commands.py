"""The HMM test driver's snapshots, exclusive (atomic) access, and the end of its memory (lib/test_hmm.c @ 7.0)."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EPERM

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror
from kit.drivers.dmirror_access import read_back
from kit.drivers.dmirror_types import (
    DPT_XA_TAG_ATOMIC,
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
    DmirrorDevice,
    HmmDmirrorCmd,
)  # fmt: skip
from kit.errors import Errno
from kit.memory.device.exclusive import make_device_exclusive
from kit.memory.device.hmm import (
    HMM_RANGE_DEFAULT_TIMEOUT,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)
from kit.memory.device.hmm_entries import HMM_PFN_ERROR, HMM_PFN_VALID, HMM_PFN_WRITE
from kit.memory.device.migrate_device import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
    migrate_pfn,
    migrate_pfn_to_pfn,
)  # fmt: skip
from kit.memory.notifier.mmu_notifier import (
    MmuIntervalNotifier,
    MmuIntervalNotifierOps,
    MmuNotifierRange,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
    mmu_notifier_lock,
)  # fmt: skip
from kit.memory.physical.memremap import (
    MEMORY_DEVICE_COHERENT,
    MEMORY_DEVICE_PRIVATE,
    DevPagemap,
    memunmap_pages,
    pgmaps_where,
)  # fmt: skip
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.syscalls.exit import mmput
from kit.memory.types import HPAGE_PMD_NR
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = [
    "dmirror_check_atomic", "dmirror_device_evict_chunk", "dmirror_device_remove_chunks", "dmirror_exclusive",
    "dmirror_snapshot",
]  # fmt: skip


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


@waiting_step
def dmirror_device_evict_chunk(mdevice: DmirrorDevice, thread: Thread, chunk: DevPagemap) -> Wait:
    """Bring every page of a chunk home, from whichever address space it is in."""
    memory = mdevice.memory
    src = np.zeros(chunk.pages, dtype=np.uint64)
    dst = src.copy()
    yield from migrate_device_range(memory, thread, src, chunk.first_pfn, chunk.pages)
    at = np.flatnonzero((src & MIGRATE_PFN_VALID != 0) & (src & MIGRATE_PFN_MIGRATE != 0))
    large = src[at] & MIGRATE_PFN_COMPOUND != 0
    new = memory.alloc_pages(int((~large).sum()))
    old = migrate_pfn_to_pfn(src[at[~large]])
    if new is not None and len(new):
        memory.trylock(new)
        dst[at[~large]] = migrate_pfn(new)
        memory.copy(old, new)
    for each in at[large].tolist():
        head = memory.alloc_huge()
        if head is not None:
            folio = np.arange(head, head + HPAGE_PMD_NR)
            memory.trylock(folio[:1])
            dst[each] = migrate_pfn(folio)[0] | MIGRATE_PFN_COMPOUND
            memory.copy(migrate_pfn_to_pfn(src[each : each + 1]) + np.arange(HPAGE_PMD_NR), folio)
    huge, moves = np.count_nonzero(dst & MIGRATE_PFN_COMPOUND), np.count_nonzero(dst & MIGRATE_PFN_VALID)
    carried = int(huge) * (HPAGE_PMD_NR - 1) + int(moves)
    thread.charge(mdevice.costs.copy_setup * (carried > 0) + mdevice.costs.dma_page * carried)
    thread.note(pages=carried)
    yield from migrate_device_pages(memory, thread, src, dst)
    yield from migrate_device_finalize(memory, thread, src, dst)


@waiting_step
def dmirror_device_remove_chunks(mdevice: DmirrorDevice, thread: Thread) -> Wait:
    """Evict and unplug all device memory; returns 0, or what memunmap_pages says about pages that stay held."""
    yield from mdevice.devmem_lock.acquire(thread)
    ret, chunks = 0, list(mdevice.devmem_chunks)
    for gone in (mdevice.devmem_chunks, mdevice.free_pages, mdevice.free_folios):
        del gone[:]
    for chunk in chunks:
        yield from dmirror_device_evict_chunk(mdevice, thread, chunk)
        ret = (yield from memunmap_pages(mdevice.memory, thread, chunk)) or ret
    yield from mdevice.devmem_lock.release(thread)
    return ret
