"""CPU page faults: finding out what kind a fault is (mm/memory.c handle_mm_fault @ 7.0).

The functions take all pages of an operation at once. What they do is what the kernel does page after page, ascending:
a page's fault is one fault, 512 pages that one huge fault serves are one, and so are pages mapped around a file fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.faults.anon import do_anonymous_page
from kit.memory.faults.file_backed import do_fault
from kit.memory.faults.huge_page import (
    do_huge_pmd_anonymous_page,
    do_huge_pmd_device_private,
    do_huge_pmd_wp_page,
    thp_vma_suitable,
)
from kit.memory.faults.swapped import do_swap_page
from kit.memory.faults.write_protect import do_numa_page, do_wp_page
from kit.memory.huge.hugetlb import hugetlb_fault
from kit.memory.types import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    HPAGE_PMD_NR,
    PAGE,
    VM_FAULT_ERROR,
    VM_FAULT_FALLBACK,
    VM_FAULT_HWPOISON,
    VM_FAULT_RETRY,
    VM_HUGETLB,
    Bit,
    Kind,
    Leaf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["handle_mm_fault", "handle_mm_faults"]

_SWAPPISH = (Kind.MIGRATION, Kind.DEVICE_EXCLUSIVE, Kind.DEVICE_PRIVATE, Kind.SWAP)
_STOP = VM_FAULT_ERROR | VM_FAULT_RETRY


def handle_mm_faults(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """`handle_mm_fault` for an array of virtual page numbers, ascending and distinct."""
    return (yield from handle_mm_fault(vma, thread, pages * PAGE, flags))


@waiting_step
def handle_mm_fault(vma: Vma, thread: Thread, address: int | NDArray[np.int64], flags: int) -> Wait:
    """Serve the fault at `address`, or one fault at each of several addresses of one area.

    The caller holds the mmap lock for reading and has checked that the area allows the access.

    Parameters
    ----------
    address : int, or ndarray of int64, shape (n,)
        Bytes; of an array each names another page, ascending.
    flags : int
        FAULT_FLAG_* bits.

    Returns
    -------
    int
        VM_FAULT_* bits. With VM_FAULT_RETRY the mmap lock is no longer held. 0 does not promise that the page is there:
        the access is tried again.
    """
    pages = np.atleast_1d(np.asarray(address, dtype=np.int64)) >> 12
    mm = vma.mm
    cause = "write" if flags & FAULT_FLAG_WRITE else "read"
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages), cause=cause)
    before = mm.faults
    if vma.flags & VM_HUGETLB:
        result = yield from hugetlb_fault(vma, thread, pages, flags)
    else:
        result = yield from _huge_then_small(vma, thread, pages, flags)
    if flags & FAULT_FLAG_REMOTE and mm.faults - before < len(pages):
        thread.charge(mm.costs.handle_mm_fault * (len(pages) - mm.faults + before))  # asked for, although all was well
    if result & _STOP:
        thread.note(status=_word(result))
    return result


def _word(result: int) -> str:
    if result & VM_FAULT_RETRY:
        return "VM_FAULT_RETRY"
    names = ((1, "VM_FAULT_OOM"), (2, "VM_FAULT_SIGBUS"), (16, "VM_FAULT_HWPOISON"), (64, "VM_FAULT_SIGSEGV"))
    return next((name for bit, name in names if result & bit), "VM_FAULT_FALLBACK")


def _huge_then_small(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """__handle_mm_fault: what the PMD says first."""
    table = vma.mm.table
    result = 0
    numbers = pages >> 9
    slots = table.slots_of(pages)
    huge = (slots < 0) if thp_vma_suitable(vma) else np.zeros(len(pages), dtype=bool)
    huge |= (slots >= 0) & (table.leaf_level[slots >> 9] == Leaf.PMD)
    if huge.any():
        some = numbers[huge]
        done = np.zeros(len(pages), dtype=bool)
        for number in some[np.diff(some, prepend=-1) != 0].tolist():
            result |= yield from _pmd_fault(vma, thread, number, int(pages[np.searchsorted(numbers, number)]), flags)
            if result & VM_FAULT_FALLBACK:
                result &= ~VM_FAULT_FALLBACK
            else:
                done |= numbers == number
            if result & _STOP:
                return result
        pages = pages[~done]
    if len(pages):
        result |= yield from _pte_faults(vma, thread, pages, flags)
    return result


def _pmd_fault(vma: Vma, thread: Thread, number: int, page: int, flags: int) -> Wait:
    """One PMD that is none or a leaf; VM_FAULT_FALLBACK: go on with its PTEs."""
    table = vma.mm.table
    row = table.row_of(number)
    if row < 0:
        if vma.first <= number * HPAGE_PMD_NR and (number + 1) * HPAGE_PMD_NR <= vma.end:
            return (yield from do_huge_pmd_anonymous_page(vma, thread, number, flags))
        return VM_FAULT_FALLBACK
    if table.leaf_level[row] != Leaf.PMD:
        return VM_FAULT_FALLBACK
    slot = row * HPAGE_PMD_NR
    kind, bits = int(table.kind[slot]), int(table.bits[slot])
    if kind == Kind.DEVICE_PRIVATE:
        return (yield from do_huge_pmd_device_private(vma, thread, page, flags))
    if kind == Kind.MIGRATION:
        vma.mm.count_faults(thread, 1)
        yield from vma.mm.memory.wait_on_lock(thread, int(table.frame[slot]))  # pmd_migration_entry_wait
        return 0
    if bits & Bit.PROTNONE:
        do_numa_page(vma, thread, np.arange(number * HPAGE_PMD_NR, (number + 1) * HPAGE_PMD_NR))
        return 0
    if flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE) and not bits & Bit.WRITABLE:
        return (yield from do_huge_pmd_wp_page(vma, thread, number, flags))
    return 0


def _pte_faults(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """handle_pte_fault, for pages whose kinds may differ."""
    table = vma.mm.table
    slots = table.slots_of(pages)
    kind = table.kind[slots]
    found = set(kind.tolist())
    result = 0
    if Kind.HWPOISON in found:
        before = pages[: int((kind == Kind.HWPOISON).argmax())]
        if len(before):
            result = yield from _pte_faults(vma, thread, before, flags)
        return result if result & _STOP else result | VM_FAULT_HWPOISON
    for each in _SWAPPISH:
        if each in found:
            result |= yield from do_swap_page(vma, thread, pages[kind == each], flags, each)
            if result & _STOP:
                return result
    if Kind.NONE in found or Kind.MARKER in found:
        some = pages[(kind == Kind.NONE) | (kind == Kind.MARKER)]
        missing = do_anonymous_page if vma.is_anonymous else do_fault
        result |= yield from missing(vma, thread, some, flags)
        if result & _STOP:
            return result
    if found != {Kind.NONE}:
        result |= yield from _present(vma, thread, pages, flags)
    return result


def _present(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """Entries that are there by now: protection."""
    table = vma.mm.table
    slots = table.slots_of(pages)
    present = (table.kind[slots] == Kind.PRESENT) & (table.leaf_level[slots >> 9] == Leaf.PTE)
    bits = table.bits[slots]
    numa = present & ((bits & Bit.PROTNONE) != 0)
    if numa.any():
        do_numa_page(vma, thread, pages[numa])
        bits = table.bits[slots]
    if flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE):
        protected = present & ((bits & Bit.WRITABLE) == 0)
        if protected.any():
            return (yield from do_wp_page(vma, thread, pages[protected], flags))
    return 0
