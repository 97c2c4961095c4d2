"""The HMM test driver, /dev/hmm_dmirror: the smallest complete mirror of an address space (lib/test_hmm.c @ 7.0).

A device with its own page table (``pt``) follows a process. What it has to do, in three places:

- *fault*: `dmirror_range_fault` asks `hmm_range_fault` what the CPU sees, and enters the answer into ``pt`` only if no
  invalidation came in between;
- *invalidate*: `dmirror_interval_invalidate` drops entries before the CPU's page table changes;
- *migrate*: `kit.drivers.dmirror_migrate` moves pages between the host and `kit.drivers.dmirror_devmem`.

Everything else is commands that use these; a command returns 0 or a negative errno.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EBUSY, EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np

from kit.drivers import dmirror_types
from kit.drivers.dmirror_commands import dmirror_check_atomic, dmirror_exclusive, dmirror_snapshot
from kit.drivers.dmirror_devmem import dmirror_device_init, dmirror_device_remove_chunks
from kit.drivers.dmirror_migrate import dmirror_migrate_to_device, dmirror_migrate_to_system
from kit.drivers.dmirror_types import *  # noqa: F403 - the words of test_hmm_uapi.h belong to the driver's face
from kit.drivers.dmirror_types import (
    DPT_NONE,
    DPT_READ,
    DPT_XA_TAG_WRITE,
    HMM_DMIRROR_CHECK_EXCLUSIVE,
    HMM_DMIRROR_EXCLUSIVE,
    HMM_DMIRROR_FLAGS,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_RELEASE,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
    Bounce,
    Dmirror,
    DmirrorDevice,
    HmmDmirrorCmd,
)  # fmt: skip
from kit.errors import Errno
from kit.memory.alloc import alloc_folios
from kit.memory.exit import mmput
from kit.memory.hmm import HMM_RANGE_DEFAULT_TIMEOUT, HmmRange, hmm_pfn_to_pfn, hmm_range_fault
from kit.memory.hmm_entries import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_WRITE
from kit.memory.mmu_notifier import (
    EVENTS,
    MmuIntervalNotifier,
    MmuIntervalNotifierOps,
    MmuNotifierRange,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)  # fmt: skip
from kit.memory.vm_insert import vm_insert_pages
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.mm import Mm
    from kit.memory.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["dmirror_device_init", "dmirror_fops_open", "dmirror_fops_release", "dmirror_fops_unlocked_ioctl"]
__all__ += dmirror_types.__all__

FAULT_BATCH = 32  # pages of one hmm_range_fault: the driver keeps the answers on its stack


@waiting_step
def dmirror_fops_open(mdevice: DmirrorDevice, thread: Thread, mm: Mm) -> Wait:
    """Open the device: mirror the whole of `mm`. Returns a `Dmirror`, or a negative errno."""
    dmirror = Dmirror(mdevice, mm)
    ret = yield from mmu_interval_notifier_insert(dmirror.notifier, thread, mm, 0, (1 << 64) - 4096, dmirror_min_ops)
    return ret or dmirror


@waiting_step
def dmirror_fops_release(dmirror: Dmirror, thread: Thread) -> Wait:
    """Close the file: stop mirroring. Pages on the device stay there."""
    yield from mmu_interval_notifier_remove(dmirror.notifier, thread)
    dmirror.pt.rights[:] = DPT_NONE
    return 0


@waiting_step
def dmirror_interval_invalidate(
    sub: MmuIntervalNotifier, thread: Thread, range: MmuNotifierRange, cur_seq: int
) -> Wait:
    """Forget a range before the CPU's page table changes; the device's own migrations look after ``pt`` themselves."""
    dmirror: Dmirror = sub.user
    own = range.event == EVENTS.MIGRATE and range.owner is dmirror.mdevice
    if own and not dmirror.mdevice.guarded:
        return True
    if not (yield from dmirror.lock_for(thread, range)):
        return False
    mmu_interval_set_seq(sub, cur_seq)
    if own:
        yield from dmirror.mutex.release(thread)
        return True
    dmirror.invalidations += 1
    # The end is taken as part of the range: an entry too many may go, which only costs a fault.
    erased = dmirror.erase(range.start >> 12, range.end >> 12)
    thread.charge(dmirror.mdevice.costs.device_pte * erased)
    thread.note(va=range.start, pages=erased, cause=EVENTS(range.event).name)
    yield from dmirror.mutex.release(thread)
    return True


dmirror_min_ops = MmuIntervalNotifierOps(dmirror_interval_invalidate)


@waiting_step
def dmirror_range_fault(dmirror: Dmirror, thread: Thread, range: HmmRange) -> Wait:
    """Fault a range into the device's page table; -EBUSY when it was invalidated again and again for a second."""
    deadline, mm = thread.now + HMM_RANGE_DEFAULT_TIMEOUT * 1000, dmirror.mm
    while thread.now <= deadline:
        range.notifier_seq = yield from mmu_interval_read_begin(range.notifier, thread)
        yield from mm.mmap_lock.read_acquire(thread)
        ret = yield from hmm_range_fault(range, thread)
        yield from mm.mmap_lock.read_release(thread)
        if ret == -EBUSY:
            continue
        if ret:
            return ret
        yield from dmirror.mutex.acquire(thread)
        if not mmu_interval_read_retry(range.notifier, range.notifier_seq):
            ret = dmirror_do_fault(dmirror, thread, range)
            yield from dmirror.mutex.release(thread)
            return ret
        yield from dmirror.mutex.release(thread)
    return Errno(EBUSY, "dmirror_range_fault", f"{range.start:#x}..{range.end:#x} does not hold still")


@step
def dmirror_do_fault(dmirror: Dmirror, thread: Thread, range: HmmRange) -> int:
    """Enter what hmm_range_fault answered into the device's page table; under the mutex."""
    pages = range.end - range.start >> 12
    entries = range.hmm_pfns[:pages]
    writable = entries & np.uint64(HMM_PFN_WRITE) != 0
    if range.default_flags & HMM_PFN_REQ_WRITE and not writable.all():  # an own private page that is read-only
        thread.note(status="WARN")
        pages = int(writable.argmin())
        entries, writable = entries[:pages], writable[:pages]
    if pages:
        dmirror.store(range.start, hmm_pfn_to_pfn(entries), np.where(writable, DPT_XA_TAG_WRITE, DPT_READ))
    thread.charge((dmirror.mdevice.costs.dma_map + dmirror.mdevice.costs.device_pte) * pages)
    if pages < range.end - range.start >> 12:
        return Errno(EFAULT, "dmirror_do_fault", f"{range.start + (pages << 12):#x} was to be writable and is not")
    return 0


@waiting_step
def dmirror_fault(dmirror: Dmirror, thread: Thread, start: int, end: int, write: bool) -> Wait:
    """Fault bytes [start, end) into the device's page table, 32 pages at a time."""
    thread.note(va=start, pages=end - start >> 12, cause="write" if write else "read")
    if not dmirror.mm.mmget_not_zero():
        return 0
    flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
    pfns = np.zeros(FAULT_BATCH, dtype=np.uint64)
    ret = 0
    for addr in range(start, end, FAULT_BATCH << 12):
        last = min(addr + (FAULT_BATCH << 12), end)
        asked = HmmRange(dmirror.notifier, 0, addr, last, pfns, flags, 0, dmirror.mdevice)
        ret = yield from dmirror_range_fault(dmirror, thread, asked)
        if ret:
            break
    yield from mmput(dmirror.mm, thread)
    return ret


@waiting_step
def dmirror_read(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_READ: the device reads; one fault covers all that is missing from the first missing page on."""
    bounce = Bounce(dmirror, cmd)
    ret = yield from _access(dmirror, thread, cmd, bounce, False)
    if not ret:
        cmd.rows(bounce.data.shape[1])[:] = bounce.data
    return ret


@waiting_step
def dmirror_write(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_WRITE: the device writes."""
    return (yield from _access(dmirror, thread, cmd, Bounce(dmirror, cmd, filled=True), True))


def _access(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd, bounce: Bounce, write: bool) -> Wait:
    """Read or write, faulting in between, until all is done or a fault fails."""
    start, end = cmd.addr, cmd.addr + (cmd.npages << 12)
    transfer = bounce.dmirror_do_write if write else bounce.dmirror_do_read
    while True:
        yield from dmirror.mutex.acquire(thread)
        ret = transfer(thread, start, end)
        yield from dmirror.mutex.release(thread)
        cmd.cpages = bounce.cpages
        if not ret:
            return 0
        start = cmd.addr + (bounce.cpages << 12)
        ret = yield from dmirror_fault(dmirror, thread, start, end, write)
        if ret:
            return ret
        cmd.faults += 1


@waiting_step
def dmirror_fops_unlocked_ioctl(dmirror: Dmirror, thread: Thread, command: int, cmd: HmmDmirrorCmd) -> Wait:
    """Do a command (HMM_DMIRROR_*); `cmd` learns `cpages` and `faults` only from one that succeeds."""
    thread.charge(dmirror.mdevice.costs.ioctl)
    size = cmd.npages << 12
    thread.note(va=cmd.addr, pages=cmd.npages)
    if cmd.addr % 4096 or not 0 < size <= (1 << 64) - 1 - cmd.addr:
        return Errno(EINVAL, "dmirror_fops_unlocked_ioctl", f"{cmd.npages} pages from {cmd.addr:#x}")
    mine = replace(cmd, cpages=0, faults=0)
    if command == HMM_DMIRROR_FLAGS:
        dmirror.flags, ret = cmd.npages, 0
    elif command == HMM_DMIRROR_RELEASE:
        ret = yield from dmirror_device_remove_chunks(dmirror.mdevice, thread)
    elif command in _COMMANDS:
        ret = yield from _COMMANDS[command](dmirror, thread, mine)
    else:
        return Errno(EINVAL, "dmirror_fops_unlocked_ioctl", f"command {command:#x}")
    if ret:
        thread.note(status=repr(ret))
        return ret
    cmd.cpages, cmd.faults = mine.cpages, mine.faults
    return 0


_COMMANDS = {
    HMM_DMIRROR_READ: dmirror_read,
    HMM_DMIRROR_WRITE: dmirror_write,
    HMM_DMIRROR_MIGRATE_TO_DEV: dmirror_migrate_to_device,
    HMM_DMIRROR_MIGRATE_TO_SYS: dmirror_migrate_to_system,
    HMM_DMIRROR_SNAPSHOT: dmirror_snapshot,
    HMM_DMIRROR_EXCLUSIVE: dmirror_exclusive,
    HMM_DMIRROR_CHECK_EXCLUSIVE: dmirror_check_atomic,
}


@waiting_step
def dmirror_fops_mmap(dmirror: Dmirror, thread: Thread, vma: Vma) -> Wait:
    """Map fresh pages of the driver's own, one for each page of the area."""
    pfns = yield from alloc_folios(vma.mm, thread, vma.pages)
    if pfns is None:
        return Errno(ENOMEM, "dmirror_fops_mmap", f"{vma.pages} pages")
    vma.mm.memory.zero(pfns)
    ret = vm_insert_pages(vma, thread, vma.first, pfns)
    vma.mm.memory.put(pfns)
    return ret
