"""The HMM test driver, /dev/hmm_dmirror: the smallest complete mirror of an address space (lib/test_hmm.c @ 7.0).

A device with its own page table (``pt``) follows a process. In the order in which to read it: *mirror*, which hears of
every change of the address space before it is made; *fault*, which asks `hmm_range_fault` what the CPU has and enters
the answer if no change came in between; *device memory*; *migration* there, and back home when the CPU touches a page.
The commands that the kernel's tests give are in `kit.drivers.dmirror_ioctl`, which only uses what is here.
"""

from __future__ import annotations

from collections import Counter
from errno import EBUSY, EFAULT, ENOMEM
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror_types import DPT_NONE, DPT_READ, DPT_XA_TAG_WRITE, FAULT_BATCH, DmirrorDevice, DmirrorFile
from kit.errors import Errno
from kit.memory.device.hmm import HMM_RANGE_DEFAULT_TIMEOUT, hmm_range_fault
from kit.memory.device.hmm_entries import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_WRITE, HmmRange, hmm_pfn_to_pfn
from kit.memory.device.migrate_device import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_COMPOUND,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_pfn,
    migrate_pieces,
)
from kit.memory.notifier.mmu_interval_notifier import (
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from kit.memory.notifier.mmu_notifier import mmu_notifier_lock
from kit.memory.notifier.mmu_notifier_types import EVENTS, MmuIntervalNotifier, MmuIntervalNotifierOps, MmuNotifierRange
from kit.memory.physical.memremap import DevPagemap, DevPagemapOps, memremap_pages, page_pgmap, zone_device_folio_init
from kit.memory.space.mm import Mm
from kit.memory.space.vma import Vma
from kit.memory.syscalls.exit import mmput
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, VM_FAULT_OOM, VM_FAULT_SIGBUS, Vmf
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step


class Dmirror(DmirrorFile):
    """struct dmirror: one open device file; its page table ``pt`` is read and written under ``mutex``."""

    def __init__(self, mdevice: DmirrorDevice, mm: Mm) -> None:
        super().__init__(mdevice, mm)
        self.notifier = MmuIntervalNotifier(self)
        self.invalidations: Counter[Thread] = Counter()  # by who changed something, own migrations left out
        self.id = len(mdevice.mirrors)  # what zone_device_data of its device pages holds
        mdevice.mirrors.append(self)


@waiting_step
def dmirror_fops_open(mdevice: DmirrorDevice, thread: Thread, mm: Mm) -> Wait:
    """Open the device: mirror the whole of `mm`. Returns a `Dmirror`, or a negative errno."""
    dmirror, ops = Dmirror(mdevice, mm), MmuIntervalNotifierOps(dmirror_interval_invalidate)
    ret = yield from mmu_interval_notifier_insert(dmirror.notifier, thread, mm, 0, (1 << 64) - 4096, ops)
    return ret or dmirror


@waiting_step
def dmirror_fops_release(dmirror: Dmirror, thread: Thread) -> Wait:
    """Close the file: stop mirroring. Pages on the device stay there."""
    yield from mmu_interval_notifier_remove(dmirror.notifier, thread)
    dmirror.pt.rights[:] = DPT_NONE
    return 0


@waiting_step
def dmirror_interval_invalidate(sub: MmuIntervalNotifier, thread: Thread, range: MmuNotifierRange, seq: int) -> Wait:
    """Forget a range before the CPU's page table changes; the device's own migrations look after ``pt`` themselves."""
    dmirror: Dmirror = sub.user
    own = range.event == EVENTS.MIGRATE and range.owner is dmirror.mdevice
    if own and not dmirror.mdevice.guarded:
        return True
    if not (yield from mmu_notifier_lock(range, thread, dmirror.mutex)):
        return False
    mmu_interval_set_seq(sub, seq)
    if not own:
        dmirror.invalidations[thread] += 1
        # The end is taken as part of the range: an entry too many may go, which only costs a fault.
        slots = dmirror.pt.mapped(range.start >> 12, range.end >> 12)
        dmirror.pt.rights[slots] = DPT_NONE
        thread.charge(dmirror.mdevice.costs.device_pte * len(slots))
        thread.note(va=range.start, pages=len(slots), cause=EVENTS(range.event).name)
    yield from dmirror.mutex.release(thread)
    return True


@waiting_step
def dmirror_fault(dmirror: Dmirror, thread: Thread, start: int, end: int, write: bool) -> Wait:
    """Fault bytes [start, end) into the device's page table, 32 pages at a time."""
    thread.note(va=start, pages=end - start >> 12, cause="write" if write else "read")
    if not dmirror.mm.mmget_not_zero():
        return 0
    flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
    pfns, ret = np.zeros(FAULT_BATCH, dtype=np.uint64), 0
    for addr in range(start, end, FAULT_BATCH << 12):
        last = min(addr + (FAULT_BATCH << 12), end)
        asked = HmmRange(dmirror.notifier, 0, addr, last, pfns, flags, 0, dmirror.mdevice)
        ret = yield from dmirror_range_fault(dmirror, thread, asked)
        if ret:
            break
    yield from mmput(dmirror.mm, thread)
    return ret


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
        stale = mmu_interval_read_retry(range.notifier, range.notifier_seq)
        ret = 0 if stale else dmirror_do_fault(dmirror, thread, range)
        yield from dmirror.mutex.release(thread)
        if not stale:
            return ret
    return Errno(EBUSY, "dmirror_range_fault", f"{range.start:#x}..{range.end:#x} does not hold still")


@step
def dmirror_do_fault(dmirror: Dmirror, thread: Thread, range: HmmRange) -> int:
    """Enter what hmm_range_fault answered into the device's page table; under the mutex."""
    costs, pages = dmirror.mdevice.costs, range.end - range.start >> 12
    writable = range.hmm_pfns[:pages] & HMM_PFN_WRITE != 0
    refused = bool(range.default_flags & HMM_PFN_REQ_WRITE) and not writable.all()
    if refused:  # an own private page that is read-only
        thread.note(status="WARN")
        pages = int(writable.argmin())
    rights = np.where(writable[:pages], DPT_XA_TAG_WRITE, DPT_READ)
    dmirror.store((range.start >> 12) + np.arange(pages), hmm_pfn_to_pfn(range.hmm_pfns[:pages]), rights)
    thread.charge((costs.dma_map + costs.device_pte) * pages)
    if refused:
        return Errno(EFAULT, "dmirror_do_fault", f"{range.start + (pages << 12):#x} was to be writable and is not")
    return 0


def dmirror_device_init(mdevice: DmirrorDevice, thread: Thread, is_large: bool = False) -> int:
    """Plug a chunk of memory in, as single pages or as folios of 2 MiB; returns 0 or -ENOMEM."""
    ops = DevPagemapOps(partial(dmirror_devmem_fault, mdevice=mdevice), partial(dmirror_devmem_free, mdevice))
    chunk = DevPagemap(mdevice.zone_device_type, mdevice, ops, mdevice.chunk_pages, 1 << (mdevice.unit + 1))
    ret = memremap_pages(mdevice.memory, thread, chunk)
    if not ret:
        mdevice.devmem_chunks.append(chunk)
        end = chunk.first_pfn + chunk.pages
        single = end - chunk.pages % HPAGE_PMD_NR if is_large else chunk.first_pfn
        mdevice.free_folios.extend(range(chunk.first_pfn, single, HPAGE_PMD_NR))
        mdevice.free_pages.extend(range(single, end))
    return ret


@waiting_step
def dmirror_allocate_chunk(mdevice: DmirrorDevice, thread: Thread, is_large: bool) -> Wait:
    """Plug one more chunk in; a coherent device has one only."""
    yield from mdevice.devmem_lock.acquire(thread)
    ret: int = Errno(ENOMEM, "dmirror_allocate_chunk", "a coherent device has one chunk")
    if mdevice.grows or not mdevice.devmem_chunks:
        ret = dmirror_device_init(mdevice, thread, is_large)
    yield from mdevice.devmem_lock.release(thread)
    return ret


@waiting_step
def dmirror_devmem_alloc_page(dmirror: Dmirror, thread: Thread, n: int, is_large: bool) -> Wait:
    """Take `n` pages or folios, locked and referenced; returns their heads, fewer when there is no more memory."""
    mdevice, memory, order = dmirror.mdevice, dmirror.mdevice.memory, HPAGE_PMD_ORDER if is_large else 0
    n = (yield from mdevice.make_room(thread, n << order)) >> order
    heads = mdevice.take(n, is_large)
    while len(heads) < n and not (yield from dmirror_allocate_chunk(mdevice, thread, is_large)):
        heads = np.concatenate([heads, mdevice.take(n - len(heads), is_large)])
    zone_device_folio_init(memory, heads, order)
    memory.zone_device_data[memory.block(heads, order)] = dmirror.id
    mdevice.calloc += len(heads) << order
    mdevice.arrived(memory.block(heads, order))
    thread.charge(mdevice.costs.devmem_alloc * len(heads))
    return heads


def dmirror_devmem_free(mdevice: DmirrorDevice, pfns: NDArray[np.integer]) -> None:
    """Take pages of one chunk back, unless the chunk is going away."""
    large = mdevice.memory.order[pfns] > 0
    frames = np.concatenate([pfns[~large], mdevice.memory.block(pfns[large], HPAGE_PMD_ORDER)])
    if page_pgmap(mdevice.memory, int(pfns[0])) in mdevice.devmem_chunks:
        mdevice.cfree += len(frames)
        mdevice.free_folios.extend(pfns[large].tolist())
        mdevice.free_pages.extend(pfns[~large].tolist())
    mdevice.left(frames)


def migrate_to_device(dmirror: Dmirror, thread: Thread, vma: Vma, start: int, end: int) -> Wait:
    """Move what can move of [start, end), at most 512 pages of one area; returns 0 or a negative errno."""
    src, since = np.zeros(end - start >> 12, dtype=np.uint64), (yield from dmirror.mdevice.listen(dmirror, thread))
    flags = MIGRATE_VMA_SELECT_SYSTEM | MIGRATE_VMA_SELECT_COMPOUND
    args = MigrateVma(vma, src, src.copy(), start, end, dmirror.mdevice, flags)
    ret = yield from migrate_vma_setup(args, thread)
    if not ret:
        yield from dmirror_migrate_alloc_and_copy(args, thread, dmirror)
        yield from migrate_vma_pages(args, thread)
        yield from dmirror_migrate_finalize_and_map(args, thread, dmirror, since)
        yield from migrate_vma_finalize(args, thread)
    return ret


@waiting_step
def dmirror_migrate_alloc_and_copy(args: MigrateVma, thread: Thread, dmirror: Dmirror) -> Wait:
    """Give every page that can migrate a device page with its content; holes get cleared ones."""
    mdevice, memory, src = dmirror.mdevice, dmirror.mdevice.memory, args.src
    go = np.flatnonzero((src & MIGRATE_PFN_MIGRATE != 0) & (memory.pgmap[migrate_pfn_to_pfn(src)] == 0))
    yield from mdevice.leaving(dmirror, thread, args.start, args.end)
    failing = int(go[0]) if len(go) and dmirror.refuses() else -1  # goes as 512 pages if huge, else not at all
    for at, words in migrate_pieces(src, go[(go != failing) | (src[go] & MIGRATE_PFN_COMPOUND != 0)]):
        heads, new, kept = at[:0], at[:0], MIGRATE_PFN_WRITE | MIGRATE_PFN_COMPOUND
        if words[0] & MIGRATE_PFN_COMPOUND and at[0] != failing:
            heads = yield from dmirror_devmem_alloc_page(dmirror, thread, 1, True)
            new = memory.block(heads, HPAGE_PMD_ORDER)
        if not len(new):
            heads = new = yield from dmirror_devmem_alloc_page(dmirror, thread, len(at), False)
            kept = MIGRATE_PFN_WRITE
        args.dst[at[: len(heads)]] = migrate_pfn(heads) | (words[: len(heads)] & kept)
        full = np.flatnonzero(words[: len(new)] & MIGRATE_PFN_VALID)
        if len(full):
            mdevice.carry(thread, migrate_pfn_to_pfn(words[full]), new[full])
        memory.zero(np.delete(new, full))


@waiting_step
def dmirror_migrate_finalize_and_map(args: MigrateVma, thread: Thread, dmirror: Dmirror, since: int) -> Wait:
    """Enter what moved, writable where the CPU's entry was; a guarded device, if nothing was invalidated `since`."""
    yield from dmirror.mutex.acquire(thread)
    moved = np.flatnonzero((args.src & MIGRATE_PFN_MIGRATE != 0) & (args.dst & MIGRATE_PFN_VALID != 0))
    stale, pages = dmirror.mdevice.stale(dmirror, thread, since), 0
    for at, words in migrate_pieces(args.dst, moved):
        rights = DPT_NONE if stale else np.where(words & MIGRATE_PFN_WRITE, DPT_XA_TAG_WRITE, DPT_READ)
        dmirror.store((args.start >> 12) + at, migrate_pfn_to_pfn(words), rights)
        pages += len(at)
    thread.charge(dmirror.mdevice.costs.device_pte * pages)
    thread.note(va=args.start, pages=pages)
    yield from dmirror.mutex.release(thread)


@waiting_step
def dmirror_devmem_fault(vmf: Vmf, thread: Thread, mdevice: DmirrorDevice) -> Wait:
    """The CPU touched a private page: bring it home, or all of its folio when the entry is huge. Returns VM_FAULT_*."""
    dmirror = mdevice.mirrors[int(mdevice.memory.zone_device_data[vmf.page])]
    pages = 1 << int(mdevice.memory.order[vmf.page]) if vmf.pmd else 1
    start = vmf.address & ~((pages << 12) - 1)
    thread.note(va=start, pages=pages)
    src, flags = np.zeros(pages, dtype=np.uint64), MIGRATE_VMA_SELECT_COMPOUND if pages > 1 else 0
    flags |= mdevice.select_device
    args = MigrateVma(vmf.vma, src, src.copy(), start, start + (pages << 12), mdevice, flags, vmf.page)
    if (yield from migrate_vma_setup(args, thread)):
        return VM_FAULT_SIGBUS
    ret = yield from dmirror_devmem_fault_alloc_and_copy(args, thread, dmirror)
    yield from migrate_vma_pages(args, thread)  # also after a failure, where the real driver forgets to restore pages
    yield from migrate_vma_finalize(args, thread)
    return ret


@waiting_step
def dmirror_devmem_fault_alloc_and_copy(args: MigrateVma, thread: Thread, dmirror: Dmirror) -> Wait:
    """Give every device page that can migrate a host page with its content; returns 0, or VM_FAULT_OOM."""
    mdevice, src = dmirror.mdevice, args.src
    go = np.flatnonzero((src & MIGRATE_PFN_VALID != 0) & (src & MIGRATE_PFN_MIGRATE != 0))
    failing = go[0] if len(go) and dmirror.refuses() else -1
    for at, words in migrate_pieces(src, go):
        old, new, huge = migrate_pfn_to_pfn(words), None, bool(words[0] & MIGRATE_PFN_COMPOUND)
        if huge or at[0] != failing:
            new = yield from mdevice.home(args.area.mm, thread, old, huge and at[0] != failing)
        if new is None:
            return VM_FAULT_OOM
        heads = new[:1] if huge and mdevice.memory.order[new[0]] else new
        mdevice.memory.trylock(heads)
        kept = 0 if huge and len(heads) > 1 else MIGRATE_PFN_WRITE | MIGRATE_PFN_COMPOUND  # in pieces: read-only
        args.dst[at[: len(heads)]] = migrate_pfn(heads) | (words[: len(heads)] & kept)
        dmirror.pt.rights[dmirror.pt.slots_of((args.start >> 12) + at)] = DPT_NONE
        thread.charge(mdevice.costs.device_pte * len(at))
        mdevice.carry(thread, old, new)
    return 0
