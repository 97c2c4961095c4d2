"""get_user_pages: the pages behind addresses, referenced or pinned (mm/gup.c @ 7.0).

Host memory has one zone, from which long-term pins move nothing; device-coherent pages they move home first, and
device-private pages come home by the fault that every access takes.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.faults.fault import handle_mm_fault
from kit.memory.huge.huge_split import __split_huge_pmd
from kit.memory.physical.memremap import MEMORY_DEVICE_COHERENT, pgmaps_where
from kit.memory.physical.pages import ZERO_PFN
from kit.memory.types import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    FOLL_GET,
    FOLL_LONGTERM,
    FOLL_PIN,
    FOLL_SPLIT_PMD,
    FOLL_WRITE,
    PAGE,
    PG,
    VM_FAULT_ERROR,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    Bit,
    Leaf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["faultin_pages", "get_user_pages", "pin_user_pages", "pin_user_pages_fast", "unpin_user_pages"]


@waiting_step
def get_user_pages(mm: Mm, thread: Thread, start: int, n: int, gup_flags: int = 0) -> Wait:
    """Return the pfns of `n` pages from address `start` (bytes), with a reference each; takes the mmap lock.

    Returns
    -------
    ndarray of int64, shape (m,)
        m < n when page m could not be had; Errno -EFAULT (no area, no right, SIGBUS) or -ENOMEM when it is the first.
    """
    return (yield from _gup(mm, thread, start, n, gup_flags | FOLL_GET))


@waiting_step
def pin_user_pages(mm: Mm, thread: Thread, start: int, n: int, gup_flags: int = 0) -> Wait:
    """As `get_user_pages`, but pins: give them back with `unpin_user_pages`."""
    return (yield from _gup(mm, thread, start, n, (gup_flags & ~FOLL_GET) | FOLL_PIN))


@waiting_step
def pin_user_pages_fast(mm: Mm, thread: Thread, start: int, n: int, gup_flags: int = 0) -> Wait:
    """As `pin_user_pages`, without the mmap lock for the pages at the start that are there already."""
    flags = (gup_flags & ~FOLL_GET) | FOLL_PIN
    yield from thread.sync()
    first = start // PAGE
    pfns, ready = _follow(mm, first, n, flags)
    fast = int(ready.argmin()) if not ready.all() else n
    if flags & FOLL_LONGTERM and fast:
        fast = min(fast, _before_coherent(mm.memory, pfns[:fast]))
    head = pfns[:fast]
    _grab(mm.memory, head, flags)
    thread.charge(mm.costs.gup_page * fast)
    if fast == n:
        return head
    rest = yield from _gup(mm, thread, start + fast * PAGE, n - fast, flags)
    if isinstance(rest, Errno):
        return head if fast else rest
    return np.concatenate([head, rest])


def unpin_user_pages(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> None:
    """Drop the pins of pages that `pin_user_pages` returned."""
    memory.unpin(pfns[(memory.flags[memory.head(pfns)] & PG.RESERVED) == 0])


def _gup(mm: Mm, thread: Thread, start: int, n: int, flags: int) -> Wait:
    if start % PAGE or n < 0:
        return Errno(EINVAL, "get_user_pages", f"start {start:#x}, {n} pages")
    thread.note(va=start, pages=n)
    while True:
        yield from mm.mmap_lock.read_acquire(thread)
        got = yield from faultin_pages(mm, thread, start // PAGE, n, flags)
        yield from mm.mmap_lock.read_release(thread)
        if isinstance(got, Errno):
            thread.note(va=start, status=repr(got))
            return got
        if not flags & FOLL_LONGTERM:
            return got
        moved = yield from _check_and_migrate_movable_pages(mm, thread, got, flags)
        if moved is None:
            return got
        if isinstance(moved, Errno):
            return moved


def _check_and_migrate_movable_pages(mm: Mm, thread: Thread, pfns: NDArray[np.int64], flags: int) -> Wait:
    """Long-term pins: None when every page may stay, else 0 after pages were let go and moved home, or -errno."""
    from kit.memory.device.migrate_device import migrate_device_coherent_folio

    memory = mm.memory
    coherent = pgmaps_where(memory, lambda pgmap: pgmap.type == MEMORY_DEVICE_COHERENT)[memory.pgmap[pfns]]
    if not coherent.any():
        return None
    heads = memory.head(pfns[coherent])
    heads = np.sort(heads)
    heads = heads[np.diff(heads, prepend=-1) != 0]
    memory.get(heads)
    if flags & FOLL_PIN:
        unpin_user_pages(memory, pfns)
    else:
        memory.put(pfns)
    for head in heads.tolist():
        failed = yield from migrate_device_coherent_folio(memory, thread, head)
        if failed:
            return Errno(EFAULT, "migrate_device_coherent_folio", f"pfn {head:#x} cannot be moved home")
    return 0


def faultin_pages(mm: Mm, thread: Thread, first: int, n: int, flags: int) -> Wait:
    """`get_user_pages` for a caller that holds the mmap lock (__get_user_pages); pages are virtual page numbers."""
    memory = mm.memory
    got: list[NDArray[np.int64]] = []
    at, end, failed = first, first + n, 0
    while at < end and not failed:
        vma = mm.find(at)
        failed = _check_vma_flags(vma, at, flags)
        if failed or vma is None:
            break
        stop = min(vma.end, end)
        if flags & FOLL_SPLIT_PMD:
            yield from _split(mm, thread, at, stop)
        pfns, ready = _follow(mm, at, stop - at, flags, vma)
        count = len(ready) if ready.all() else int(ready.argmin())
        if count:
            some = pfns[:count]
            _grab(memory, some, flags)
            got.append(some)
            thread.charge(mm.costs.gup_page * count)
            at += count
        elif at < stop:
            failed = yield from _faultin(vma, thread, np.arange(at, stop)[~ready][:8192], flags)
    if not got:
        return failed if failed else np.zeros(0, dtype=np.int64)
    return np.concatenate(got)


def _split(mm: Mm, thread: Thread, first: int, end: int) -> Wait:
    numbers, rows = mm.table.leaves(first, end - first)
    for number in numbers[mm.table.leaf_level[rows] == Leaf.PMD].tolist():
        yield from __split_huge_pmd(mm, thread, number)


def _check_vma_flags(vma: Vma | None, page: int, flags: int) -> int:
    if vma is None:
        return Errno(EFAULT, "check_vma_flags", f"{page * PAGE:#x} is not mapped")
    if vma.flags & (VM_IO | VM_PFNMAP):
        return Errno(EFAULT, "check_vma_flags", f"{page * PAGE:#x} is no memory")
    if not vma.writable if flags & FOLL_WRITE else not vma.flags & VM_READ:
        return Errno(EFAULT, "check_vma_flags", f"{page * PAGE:#x} does not allow the access")
    return 0


def _faultin(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """faultin_page: what kind of fault brings the pages in; returns 0 or -errno."""
    fault = FAULT_FLAG_WRITE if flags & FOLL_WRITE else 0
    table = vma.mm.table
    slots = table.slots_of(pages)
    present = table.rights[slots] > 0
    if not fault and present.any():  # there, but shared: a pin wants its own copy
        fault, pages = FAULT_FLAG_UNSHARE, pages[present]
    result: int = yield from handle_mm_fault(vma, thread, pages * PAGE, fault)
    if result & VM_FAULT_RETRY:
        raise RuntimeError("a fault without FAULT_FLAG_ALLOW_RETRY asked for a retry")
    if result & VM_FAULT_OOM:
        return Errno(ENOMEM, "faultin_page", f"{int(pages[0]) * PAGE:#x}: memory is out")
    if result & VM_FAULT_ERROR:
        return Errno(EFAULT, "faultin_page", f"{int(pages[0]) * PAGE:#x}: handle_mm_fault returned {result:#x}")
    return 0


def _follow(
    mm: Mm, first: int, n: int, flags: int, vma: Vma | None = None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """follow_page_mask: frames of pages, and which may be taken as they are."""
    table, memory = mm.table, mm.memory
    slots = table.slots_of(np.arange(first, first + n))
    frames = table.frame[slots].astype(np.int64)
    need = 2 if flags & FOLL_WRITE else 1
    ready = table.rights[slots] >= need
    named = np.where(ready, frames, ZERO_PFN)
    zero = (named == ZERO_PFN) | ((memory.huge_zero >= 0) & (named >> 9 == memory.huge_zero >> 9))
    ready &= ((table.bits[slots] & Bit.SPECIAL) == 0) | zero
    if flags & FOLL_PIN and not flags & FOLL_WRITE:  # gup_must_unshare
        anon = (memory.flags[memory.head(named)] & PG.ANON) != 0
        shared = anon & ((memory.flags[named] & PG.ANON_EXCLUSIVE) == 0)
        if flags & FOLL_LONGTERM and (vma is None or not vma.flags & VM_SHARED):
            shared |= ~anon
        ready &= (table.rights[slots] > 1) | ~shared
    return frames, ready


def _grab(memory: PhysicalMemory, pfns: NDArray[np.int64], flags: int) -> None:
    """try_grab_folio: zero pages are referenced, but never pinned."""
    if flags & FOLL_PIN:
        memory.pin(pfns[(memory.flags[memory.head(pfns)] & PG.RESERVED) == 0])
    else:
        memory.get(pfns)


def _before_coherent(memory: PhysicalMemory, pfns: NDArray[np.int64]) -> int:
    coherent = pgmaps_where(memory, lambda pgmap: pgmap.type == MEMORY_DEVICE_COHERENT)[memory.pgmap[pfns]]
    return int(coherent.argmax()) if coherent.any() else len(pfns)
