"""The HMM test driver's migrations: to the device and home, as a command and as a CPU fault (lib/test_hmm.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror_devmem import dmirror_devmem_alloc_page
from kit.drivers.dmirror_types import (
    DPT_NONE,
    DPT_READ,
    DPT_XA_TAG_WRITE,
    HMM_DMIRROR_FLAG_FAIL_ALLOC,
    HMM_DMIRROR_MEMORY_DEVICE_COHERENT,
    Dmirror,
    DmirrorDevice,
    HmmDmirrorCmd,
)
from kit.errors import Errno
from kit.memory.exit import mmput
from kit.memory.migrate_device import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_COMPOUND,
    MIGRATE_VMA_SELECT_DEVICE_COHERENT,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_pfn,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, VM_FAULT_OOM, VM_FAULT_SIGBUS, VM_READ, Vmf
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

__all__ = ["dmirror_devmem_fault", "dmirror_migrate_to_device", "dmirror_migrate_to_system"]

PTRS_PER_PTE = 512  # pages of one migration
_VALID, _MIGRATE, _WRITE, _COMPOUND = (
    np.uint64(flag) for flag in (MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_WRITE, MIGRATE_PFN_COMPOUND)
)


@waiting_step
def dmirror_migrate_to_device(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_MIGRATE_TO_DEV: move a range to the device, then read it back without faulting."""
    ret = yield from _migrate(dmirror, thread, cmd, True)
    return ret or (yield from dmirror.read_back(thread, cmd))


@waiting_step
def dmirror_migrate_to_system(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_MIGRATE_TO_SYS: bring the device's own pages of a range home."""
    return (yield from _migrate(dmirror, thread, cmd, False))


def _migrate(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd, to_device: bool) -> Wait:
    """Migrate area by area, 512 pages at a time; what is done stays done when a later slice has no readable area."""
    mm, addr, end = dmirror.mm, cmd.addr, cmd.addr + (cmd.npages << 12)
    if not mm.mmget_not_zero():
        return Errno(EINVAL, "dmirror_migrate_to_device", "the address space is gone")
    flags = MIGRATE_VMA_SELECT_COMPOUND | (MIGRATE_VMA_SELECT_SYSTEM if to_device else dmirror_select_device(dmirror))
    src, dst = np.zeros(PTRS_PER_PTE, dtype=np.uint64), np.zeros(PTRS_PER_PTE, dtype=np.uint64)
    ret = 0
    yield from mm.mmap_lock.read_acquire(thread)
    while addr < end and not ret:
        vma = mm.find(addr >> 12)
        if vma is None or not vma.flags & VM_READ:
            ret = Errno(EINVAL, "dmirror_migrate_to_device", f"{addr:#x}: no readable area")
            break
        stop = min(end, addr + (PTRS_PER_PTE << 12), vma.stop)
        args = MigrateVma(vma, src, dst, addr, stop, dmirror.mdevice, flags)
        since = dmirror.invalidations
        ret = yield from migrate_vma_setup(args, thread)
        if ret:
            break
        if to_device:
            yield from dmirror_migrate_alloc_and_copy(args, thread, dmirror)
            yield from migrate_vma_pages(args, thread)
            yield from dmirror_migrate_finalize_and_map(args, thread, dmirror, since)
        else:
            yield from dmirror_devmem_fault_alloc_and_copy(args, thread, dmirror)
            yield from migrate_vma_pages(args, thread)
            cmd.cpages += dmirror_successful_migrated_pages(args)
        yield from migrate_vma_finalize(args, thread)
        addr = stop
    yield from mm.mmap_lock.read_release(thread)
    yield from mmput(mm, thread)
    return ret


def dmirror_successful_migrated_pages(args: MigrateVma) -> int:
    """Count the entries that moved; a huge one counts once."""
    both = np.uint64(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)
    return int(np.count_nonzero(args.src[: args.npages] & both == both))


def _fails(dmirror: Dmirror) -> bool:
    """Whether the next allocation was told to fail; only that one."""
    fails = bool(dmirror.flags & HMM_DMIRROR_FLAG_FAIL_ALLOC)
    dmirror.flags &= ~HMM_DMIRROR_FLAG_FAIL_ALLOC
    return fails


def _copy(dmirror: Dmirror, thread: Thread, src: NDArray[np.integer], dst: NDArray[np.integer]) -> None:
    """The device's DMA engine copies pages."""
    dmirror.mdevice.carry(thread, src, dst)


@waiting_step
def dmirror_migrate_alloc_and_copy(args: MigrateVma, thread: Thread, dmirror: Dmirror) -> Wait:
    """Give every page that can migrate a device page with its content; holes get cleared ones."""
    memory, src, dst = dmirror.mdevice.memory, args.src[: args.npages], args.dst[: args.npages]
    valid = src & _VALID != 0
    go = src & _MIGRATE != 0
    go[valid] &= memory.pgmap[migrate_pfn_to_pfn(src[valid])] == 0  # already on a device: left alone
    if dmirror.mdevice.guarded:
        yield from _forbid_writes(args, thread, dmirror)
    small, failing = go & (src & _COMPOUND == 0), -1
    if go.any() and _fails(dmirror):
        failing = int(go.argmax())
        small[failing] = False
    for at in np.flatnonzero(go & (src & _COMPOUND != 0)).tolist():
        pages = np.arange(at, at + HPAGE_PMD_NR)
        heads = (yield from dmirror_devmem_alloc_page(dmirror, thread, 1, True)) if at != failing else src[:0]
        if len(heads):
            dst[at] = migrate_pfn(heads)[0] | (src[at] & _WRITE) | _COMPOUND
            new = memory.block(heads, HPAGE_PMD_ORDER)
        else:
            new = yield from dmirror_devmem_alloc_page(dmirror, thread, HPAGE_PMD_NR, False)
            pages = pages[: len(new)]
            dst[pages] = migrate_pfn(new) | (src[at] & _WRITE)
        if valid[at]:
            _copy(dmirror, thread, migrate_pfn_to_pfn(src[at : at + 1]) + np.arange(len(new)), new)
        else:
            memory.zero(new)
    at_small = np.flatnonzero(small)
    if len(at_small):
        new = yield from dmirror_devmem_alloc_page(dmirror, thread, len(at_small), False)
        at_small = at_small[: len(new)]
        dst[at_small] = migrate_pfn(new) | (src[at_small] & _WRITE)
        full = valid[at_small]
        _copy(dmirror, thread, migrate_pfn_to_pfn(src[at_small[full]]), new[full])
        memory.zero(new[~full])


def _forbid_writes(args: MigrateVma, thread: Thread, dmirror: Dmirror) -> Wait:
    """Let the device only read what is about to be copied: a write would be lost."""
    yield from dmirror.mutex.acquire(thread)
    slots = dmirror.slots_in(args.start >> 12, (args.end >> 12) - 1)
    writable = slots[dmirror.pt.rights[slots] == DPT_XA_TAG_WRITE]
    dmirror.pt.rights[writable] = DPT_READ
    yield from dmirror.mutex.release(thread)


@waiting_step
def dmirror_migrate_finalize_and_map(args: MigrateVma, thread: Thread, dmirror: Dmirror, since: int) -> Wait:
    """Enter what moved into the device's page table, writable where the CPU's entry was; holes read-only.

    A guarded device forgets it instead when anything was invalidated after its count of invalidations was `since`.
    """
    memory = dmirror.mdevice.memory
    yield from dmirror.mutex.acquire(thread)
    src, dst = args.src[: args.npages], args.dst[: args.npages]
    moved = (src & _MIGRATE != 0) & (dst & _VALID != 0)
    frames, rights = migrate_pfn_to_pfn(dst), np.where(dst & _WRITE, DPT_XA_TAG_WRITE, DPT_READ)
    for at in np.flatnonzero(moved & (dst & _COMPOUND != 0)).tolist():
        block = slice(at, at + HPAGE_PMD_NR)
        frames[block] = memory.block(frames[at : at + 1], HPAGE_PMD_ORDER)
        rights[block], moved[block] = rights[at], True
    slots = dmirror.pt.slots(args.start >> 12, len(src), create=True)
    where = (np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots)[moved]
    stale = dmirror.mdevice.guarded and dmirror.invalidations != since
    dmirror.pt.frame[where], dmirror.pt.rights[where] = frames[moved], DPT_NONE if stale else rights[moved]
    thread.charge(dmirror.mdevice.costs.device_pte * len(where))
    thread.note(va=args.start, pages=len(where))
    yield from dmirror.mutex.release(thread)


@waiting_step
def dmirror_devmem_fault_alloc_and_copy(args: MigrateVma, thread: Thread, dmirror: Dmirror) -> Wait:
    """Give every device page that can migrate a host page with its content; returns 0, or VM_FAULT_OOM."""
    mm, src, dst = args.area.mm, args.src[: args.npages], args.dst[: args.npages]
    memory = mm.memory
    at = np.flatnonzero((src & _VALID != 0) & (src & _MIGRATE != 0))
    large = src[at] & _COMPOUND != 0
    fails = len(at) > 0 and _fails(dmirror)
    dst[at] = src[at] & _WRITE
    for each in at[large].tolist():
        old = migrate_pfn_to_pfn(src[each : each + 1]) + np.arange(HPAGE_PMD_NR)
        single = (fails and each == at[0]) or dmirror.mdevice.keeps(old)
        head = None if single else memory.alloc_huge()
        new = np.arange(head, head + HPAGE_PMD_NR) if head is not None else None
        held = np.zeros(HPAGE_PMD_NR, dtype=np.bool_)
        if new is None:
            new, held = yield from dmirror.mdevice.home(mm, thread, old)
        if new is None:
            return VM_FAULT_OOM
        if head is not None:
            memory.trylock(new[:1])
            dst[each] |= migrate_pfn(new)[0] | _COMPOUND
        else:
            memory.trylock(new)
            dst[each : each + HPAGE_PMD_NR] = migrate_pfn(new)
        _carry_home(args, thread, dmirror, np.arange(each, each + HPAGE_PMD_NR), old, new, held)
    small = at[~large]
    if not len(small):
        return 0
    if fails and not large[0]:
        return VM_FAULT_OOM
    old = migrate_pfn_to_pfn(src[small])
    host, held = yield from dmirror.mdevice.home(mm, thread, old)
    if host is None:
        return VM_FAULT_OOM
    memory.trylock(host)
    dst[small] |= migrate_pfn(host)
    _carry_home(args, thread, dmirror, small, old, host, held)
    return 0


def _carry_home(
    args: MigrateVma, thread: Thread, dmirror: Dmirror, at: NDArray[np.intp], old: NDArray[np.integer],
    new: NDArray[np.integer], held: NDArray[np.bool_],
) -> None:  # fmt: skip
    """Copy pages home but those that `held` says are there already, and forget them in the device's page table."""
    slots = dmirror.pt.slots_of((args.start >> 12) + at)
    dmirror.pt.rights[slots[slots >= 0]] = 0
    thread.charge(dmirror.mdevice.costs.device_pte * len(at))
    _copy(dmirror, thread, old[~held], new[~held])


def dmirror_select_device(dmirror: Dmirror) -> int:
    """Return the select flag of the device's own pages."""
    coherent = dmirror.mdevice.zone_device_type == HMM_DMIRROR_MEMORY_DEVICE_COHERENT
    return MIGRATE_VMA_SELECT_DEVICE_COHERENT if coherent else MIGRATE_VMA_SELECT_DEVICE_PRIVATE


@waiting_step
def dmirror_devmem_fault(vmf: Vmf, thread: Thread, mdevice: DmirrorDevice) -> Wait:
    """The CPU touched a private page: bring it home, or all of its folio when the entry is huge. Returns VM_FAULT_*."""
    memory = mdevice.memory
    dmirror = mdevice.mirrors[int(memory.zone_device_data[vmf.page])]
    pages = 1 << int(memory.order[vmf.page]) if vmf.pmd else 1
    start = vmf.address & ~((pages << 12) - 1)
    thread.note(va=start, pages=pages)
    src = np.zeros(pages, dtype=np.uint64)
    args = MigrateVma(vmf.vma, src, src.copy(), start, start + (pages << 12), mdevice)
    args.flags = dmirror_select_device(dmirror) | (MIGRATE_VMA_SELECT_COMPOUND if pages > 1 else 0)
    args.fault_page = vmf.page
    if (yield from migrate_vma_setup(args, thread)):
        return VM_FAULT_SIGBUS
    ret = yield from dmirror_devmem_fault_alloc_and_copy(args, thread, dmirror)
    # The real driver leaves an allocation failure here without restoring the page; this one restores it.
    yield from migrate_vma_pages(args, thread)
    yield from migrate_vma_finalize(args, thread)
    return ret
