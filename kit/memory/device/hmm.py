"""hmm_range_fault: what the CPU's page table says about a range, faulted in where a device asks (mm/hmm.c @ 7.0).

The kernel visits entry by entry. Here a stretch of up to 128 leaf tables is classified at once; the walk
then goes on from the first entry in it that needs anything but being written down, so the order in which
faults, waits and errors come is the kernel's.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EPERM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.device.hmm_entries import (
    HMM_PFN_ERROR,
    HMM_PFN_INOUT_FLAGS,
    HMM_PFN_ORDER_SHIFT,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    Stretch,
    classify,
)
from kit.memory.faults.fault import handle_mm_faults
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_check_retry
from kit.memory.physical.memremap import pgmaps_where
from kit.memory.types import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_WRITE,
    HPAGE_PMD_NR,
    VM_FAULT_ERROR,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    Kind,
)
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["HMM_RANGE_DEFAULT_TIMEOUT", "hmm_range_fault"]

HMM_RANGE_DEFAULT_TIMEOUT = 1000  # milliseconds that a caller should go on retrying
HMM_NEED_FAULT, HMM_NEED_WRITE_FAULT = 1, 2
_AGAIN = -EBUSY  # of the walk, never of the caller: a fault was served or a migration waited for
_LEAF = HPAGE_PMD_NR
_STRETCH = 128 * _LEAF  # pages classified at once: their columns fit the cache


class HmmVmaWalk:
    """One call's walk: pages of `mm`, and the page from which it goes on after a fault."""

    def __init__(self, range: HmmRange) -> None:
        self.range, self.mm = range, range.notifier.mm
        self.first = self.last = range.start >> 12
        self.end = range.end >> 12
        self.may_fault = bool((range.default_flags | range.pfn_flags_mask) & HMM_PFN_REQ_FAULT)
        self.step = _LEAF  # pages of the next stretch; grows while nothing needs a fault

    def owned(self) -> NDArray[np.bool_]:
        """Return which pagemaps are the caller's; more may be plugged in while a walk waits."""
        owner = self.range.dev_private_owner
        return pgmaps_where(self.mm.memory, lambda pgmap: owner is not None and pgmap.owner is owner)

    def requests(self, page: int, stop: int) -> NDArray[np.uint64] | int:
        """What is asked of pages [page, stop): one number if it is the same for all."""
        if not self.range.pfn_flags_mask:
            return self.range.default_flags
        asked = self.range.hmm_pfns[page - self.first : stop - self.first] & np.uint64(self.range.pfn_flags_mask)
        return asked | np.uint64(self.range.default_flags)

    def hmm_range_need_fault(self, page: int, stop: int, cpu_flags: int) -> int:
        """HMM_NEED_* bits over pages that share one state: one write request makes them all a write fault."""
        if not self.may_fault:
            return 0
        asked = np.atleast_1d(self.requests(page, stop))
        asked = asked[(asked & np.uint64(HMM_PFN_REQ_FAULT)) != 0]
        if not len(asked):
            return 0
        if not cpu_flags & HMM_PFN_WRITE and (asked & np.uint64(HMM_PFN_REQ_WRITE)).any():
            return HMM_NEED_FAULT | HMM_NEED_WRITE_FAULT
        return 0 if cpu_flags & HMM_PFN_VALID else HMM_NEED_FAULT

    def fill(self, page: int, stop: int, value: NDArray[np.uint64] | int) -> None:
        """Answer pages [page, stop), keeping what is carried from input to output (hmm_pfns_fill)."""
        out = self.range.hmm_pfns[page - self.first : stop - self.first]
        out &= np.uint64(HMM_PFN_INOUT_FLAGS)
        out |= np.uint64(value) if isinstance(value, int) else value


@waiting_step
def hmm_range_fault(range: HmmRange, thread: Thread) -> Wait:
    """Write every entry of `range`, faulting in what is asked for; the mmap lock is held for reading.

    Returns
    -------
    int
        0; -EBUSY when the range was invalidated since ``notifier_seq``; -EPERM for a write to a read-only
        area; -EFAULT for what cannot be made valid.
    """
    thread.note(va=range.start, pages=range.end - range.start >> 12)
    walk = HmmVmaWalk(range)
    while True:
        if mmu_interval_check_retry(range.notifier, range.notifier_seq):
            thread.note(status="-EBUSY")
            return Errno(EBUSY, "hmm_range_fault", f"{range.start:#x}..{range.end:#x} was invalidated meanwhile")
        ret = yield from walk_page_range(walk, thread)
        if ret != _AGAIN:
            if ret:
                thread.note(status=repr(ret))
            return ret


def walk_page_range(walk: HmmVmaWalk, thread: Thread) -> Wait:
    """Go over areas and gaps from ``walk.last``; return 0, -EBUSY to go on from the new ``walk.last``, or an error."""
    page = walk.last
    while page < walk.end:
        vma = walk.mm.find_vma(page << 12)
        if vma is None or vma.first > page:
            stop = walk.end if vma is None else min(walk.end, vma.first)
            ret = hmm_refused(walk, page, stop, "no area")
        elif vma.flags & (VM_IO | VM_PFNMAP) or not vma.flags & VM_READ:
            stop = min(walk.end, vma.end)
            ret = hmm_refused(walk, page, stop, "the area is of a device or not readable")
        else:
            stop = min(walk.end, vma.end)
            visit = hmm_vma_walk_hugetlb_entry if vma.page_size > 4096 else hmm_vma_walk_tables
            ret = yield from visit(walk, thread, vma, page, stop)
        if ret:
            return ret
        page = stop
    return 0


def hmm_refused(walk: HmmVmaWalk, page: int, stop: int, why: str) -> int:
    """What a gap or an unsupported area (hmm_vma_walk_test) comes to: an error if asked for, else ERROR entries."""
    if walk.hmm_range_need_fault(page, stop, 0):
        return Errno(EFAULT, "hmm_range_fault", f"{page << 12:#x}: {why}")
    walk.fill(page, stop, HMM_PFN_ERROR)
    return 0


def hmm_vma_walk_tables(walk: HmmVmaWalk, thread: Thread, vma: Vma, page: int, stop: int) -> Wait:
    """Visit the leaf tables and holes of one area (hmm_vma_walk_pmd, hmm_vma_walk_hole)."""
    table, costs = walk.mm.table, walk.mm.costs
    while page < stop:
        count = min(stop - page, walk.step - (page & (_LEAF - 1)))
        slots = table.slots(page, count)
        if not isinstance(slots, slice):
            missing = slots < 0
            if missing[0]:
                hole, pages = table.hole(page)
                end = min(hole + pages, stop)
                thread.charge(costs.walk_table)
                required = walk.hmm_range_need_fault(page, end, 0)
                if required:
                    return (yield from hmm_vma_fault(walk, thread, vma, page, end, required))
                walk.fill(page, end, 0)
                page = end
                continue
            if missing.any():
                count = int(missing.argmax())
                slots = slots[:count]
        found = classify(walk.mm, slots, walk.owned(), walk.requests(page, page + count))
        good = found.bad if found.bad >= 0 else count
        walk.fill(page, page + good, found.values[:good])
        thread.charge(costs.walk_table * (1 + (count >> 9)) + costs.hmm_entry * good)
        if found.bad >= 0:
            return (yield from hmm_handle_bad(walk, thread, vma, page + good, stop, found))
        page += count
        walk.step = min(2 * walk.step, _STRETCH)
    return 0


def hmm_handle_bad(walk: HmmVmaWalk, thread: Thread, vma: Vma, page: int, stop: int, found: Stretch) -> Wait:
    """Do what the first entry that could not be written down needs: a wait, a fault, or an error."""
    walk.step = _LEAF
    if found.kind == Kind.MIGRATION:
        walk.last = page
        yield from migration_entry_wait(walk.mm, thread, page, found.frame)
        return _AGAIN
    if found.error:
        return Errno(EFAULT, "hmm_range_fault", f"{page << 12:#x}: {found.error}")
    end = min(stop, (page | (_LEAF - 1)) + 1)
    required = walk.hmm_range_need_fault(page, end if found.huge else page + 1, found.cpu_flags)
    return (yield from hmm_vma_fault(walk, thread, vma, page, end, required))


@waiting_step
def migration_entry_wait(mm: Mm, thread: Thread, page: int, pfn: int) -> Wait:
    """Wait until the page behind a migration entry is unlocked (mm/migrate.c)."""
    thread.note(va=page << 12, pages=1)
    yield from mm.memory.wait_on_lock(thread, pfn)


@waiting_step
def hmm_vma_fault(walk: HmmVmaWalk, thread: Thread, vma: Vma, page: int, end: int, required: int) -> Wait:
    """Fault in each page of [page, end), present or not; return -EBUSY so that they are walked again, or an error."""
    thread.note(va=page << 12, pages=end - page, cause="write" if required & HMM_NEED_WRITE_FAULT else "read")
    walk.last = page
    flags = FAULT_FLAG_REMOTE
    if required & HMM_NEED_WRITE_FAULT:
        if not vma.writable:
            return Errno(EPERM, "hmm_vma_fault", f"{page << 12:#x}: write to a read-only area")
        flags |= FAULT_FLAG_WRITE
    result = yield from handle_mm_faults(vma, thread, np.arange(page, end, dtype=np.int64), flags)
    if result & VM_FAULT_ERROR:
        return Errno(EFAULT, "hmm_vma_fault", f"{page << 12:#x}: handle_mm_fault returned {result:#x}")
    return _AGAIN


def hmm_vma_walk_hugetlb_entry(walk: HmmVmaWalk, thread: Thread, vma: Vma, page: int, stop: int) -> Wait:
    """Visit the huge pages of a hugetlb area; the request of each one's first page in the range counts."""
    table, size = walk.mm.table, vma.page_size >> 12
    order = (size.bit_length() - 1) << HMM_PFN_ORDER_SHIFT
    while page < stop:
        end = min(stop, (page | (size - 1)) + 1)
        thread.charge(walk.mm.costs.walk_table)
        row = table.row_of(page >> 9)
        slot = row * _LEAF + (page & (_LEAF - 1))
        present = row >= 0 and table.kind[slot] == Kind.PRESENT
        flags = 0
        if present and table.rights[slot]:
            flags = HMM_PFN_VALID | (HMM_PFN_WRITE if table.rights[slot] > 1 else 0)
        required = walk.hmm_range_need_fault(page, page + 1, flags)
        if required:
            return (yield from hmm_vma_fault(walk, thread, vma, page, end, required))
        first = int(table.frame[slot])
        entries = np.arange(first, first + end - page, dtype=np.int64).astype(np.uint64) | np.uint64(flags | order)
        walk.fill(page, end, entries if present else 0)
        page = end
    return 0
