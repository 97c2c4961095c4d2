"""The HMM test driver's commands, as the kernel's tests give them to an open file (lib/test_hmm.c @ 7.0).

A command returns 0 or a negative errno.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EINVAL, ENOMEM

import numpy as np

from kit.drivers.dmirror import Dmirror, dmirror_devmem_fault_alloc_and_copy, migrate_to_device
from kit.drivers.dmirror_access import dmirror_read, dmirror_write, read_back
from kit.drivers.dmirror_evict import dmirror_device_remove_chunks
from kit.drivers.dmirror_exclusive import dmirror_check_atomic, dmirror_exclusive
from kit.drivers.dmirror_snapshot import dmirror_snapshot
from kit.drivers.dmirror_types import (
    HMM_DMIRROR_CHECK_EXCLUSIVE,
    HMM_DMIRROR_EXCLUSIVE,
    HMM_DMIRROR_FLAGS,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_RELEASE,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
    PTRS_PER_PTE,
    DmirrorFile,
    HmmDmirrorCmd,
)  # fmt: skip
from kit.errors import Errno
from kit.memory.device.migrate_device import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_VMA_SELECT_COMPOUND,
    MigrateVma,
)
from kit.memory.reclaim.alloc import alloc_folios
from kit.memory.space.vm_insert import vm_insert_pages
from kit.memory.space.vma import Vma
from kit.memory.syscalls.exit import mmput
from kit.memory.types import VM_READ
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

__all__ = ["dmirror_fops_mmap", "dmirror_fops_unlocked_ioctl", "dmirror_migrate_to_device", "dmirror_migrate_to_system"]


@waiting_step
def dmirror_migrate_to_device(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_MIGRATE_TO_DEV: move a range to the device, then read it back without faulting."""
    ret = yield from _migrate(dmirror, thread, cmd, True)
    return ret or (yield from read_back(dmirror, thread, cmd))


@waiting_step
def dmirror_migrate_to_system(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_MIGRATE_TO_SYS: bring the device's own pages of a range home."""
    return (yield from _migrate(dmirror, thread, cmd, False))


def _migrate(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd, to_device: bool) -> Wait:
    """Migrate area by area, 512 pages at a time; what is done stays done when a later slice has no readable area."""
    mm, addr, end, ret = dmirror.mm, cmd.addr, cmd.addr + (cmd.npages << 12), 0
    if not mm.mmget_not_zero():
        return Errno(EINVAL, "dmirror_migrate_to_device", "the address space is gone")
    yield from mm.mmap_lock.read_acquire(thread)
    while addr < end and not ret:
        vma = mm.find(addr >> 12)
        if vma is None or not vma.flags & VM_READ:
            ret = Errno(EINVAL, "dmirror_migrate_to_device", f"{addr:#x}: no readable area")
            break
        stop = min(end, addr + (PTRS_PER_PTE << 12), vma.stop)
        if to_device:
            ret = yield from migrate_to_device(dmirror, thread, vma, addr, stop)
        else:
            ret = yield from _migrate_home(dmirror, thread, vma, addr, stop, cmd)
        addr = stop
    yield from mm.mmap_lock.read_release(thread)
    yield from mmput(mm, thread)
    return ret


def _migrate_home(dmirror: Dmirror, thread: Thread, vma: Vma, start: int, end: int, cmd: HmmDmirrorCmd) -> Wait:
    src = np.zeros(end - start >> 12, dtype=np.uint64)
    flags = dmirror.mdevice.select_device | MIGRATE_VMA_SELECT_COMPOUND
    args = MigrateVma(vma, src, src.copy(), start, end, dmirror.mdevice, flags)
    ret = yield from migrate_vma_setup(args, thread)
    if not ret:
        yield from dmirror_devmem_fault_alloc_and_copy(args, thread, dmirror)
        yield from migrate_vma_pages(args, thread)
        cmd.cpages += dmirror_successful_migrated_pages(args)
        yield from migrate_vma_finalize(args, thread)
    return ret


def dmirror_successful_migrated_pages(args: MigrateVma) -> int:
    """Count the entries that moved; a huge one counts once."""
    both = np.uint64(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)
    return int(np.count_nonzero(args.src & both == both))


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
def dmirror_fops_mmap(dmirror: DmirrorFile, thread: Thread, vma: Vma) -> Wait:
    """Map fresh pages of the driver's own, one for each page of the area."""
    pfns = yield from alloc_folios(vma.mm, thread, vma.pages)
    if pfns is None:
        return Errno(ENOMEM, "dmirror_fops_mmap", f"{vma.pages} pages")
    vma.mm.memory.zero(pfns)
    ret = vm_insert_pages(vma, thread, vma.first, pfns)
    vma.mm.memory.put(pfns)
    return ret
