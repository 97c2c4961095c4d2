"""Faults in mappings of files and of drivers (mm/memory.c do_fault @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.faults.anon import install_anon
from kit.memory.files.filemap import get_pages
from kit.memory.reclaim.alloc import alloc_folios, portions
from kit.memory.types import (
    FAULT_FLAG_WRITE,
    PAGE,
    PG,
    VM_FAULT_ERROR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_SHARED,
    Bit,
    Kind,
    Vmf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.files.file import File
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["FAULT_AROUND_PAGES", "do_fault", "finish_fault", "map_page"]

FAULT_AROUND_PAGES = 16  # fault_around_bytes: 64 KiB


@waiting_step
def do_fault(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """Serve pages that have no entry yet in a mapping of a file or driver; returns VM_FAULT_*."""
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages))
    if hasattr(vma.ops, "fault"):
        return (yield from _driver_fault(vma, thread, pages, flags))
    if vma.file is None:
        return VM_FAULT_SIGBUS
    beyond = vma.index(int(pages[-1])) >= vma.file.pages
    if beyond:
        pages = pages[pages - vma.first + vma.pgoff < vma.file.pages]
    result = VM_FAULT_SIGBUS if beyond else 0
    if len(pages):
        if not flags & FAULT_FLAG_WRITE:
            result |= yield from do_read_fault(vma, thread, pages, vma.file)
        elif not vma.flags & VM_SHARED:
            result |= yield from do_cow_fault(vma, thread, pages, vma.file)
        else:
            result |= yield from do_shared_fault(vma, thread, pages, vma.file)
    return result


def _driver_fault(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """One after the other: the driver may serve more than it was asked for."""
    table, result = vma.mm.table, 0
    assert vma.ops is not None
    for page in pages.tolist():
        slot = table.slots_of(np.array([page]))
        if slot[0] >= 0 and table.kind[slot[0]] != Kind.NONE:
            continue
        vma.mm.count_faults(thread, 1)
        vmf = Vmf(vma, page * PAGE, flags)
        served: int = yield from vma.ops.fault(vmf, thread)
        if served & (VM_FAULT_ERROR | VM_FAULT_RETRY):
            return result | served
        if not served & VM_FAULT_NOPAGE:
            finish_fault(vmf, thread)
        result |= served & ~VM_FAULT_NOPAGE
    return result


def finish_fault(vmf: Vmf, thread: Thread) -> None:
    """Map the page that a driver's `fault` has named."""
    page, pfn = np.array([vmf.address // PAGE]), np.array([vmf.page], dtype=np.int32)
    map_page(vmf.vma, thread, page, pfn, bool(vmf.flags & FAULT_FLAG_WRITE))
    vmf.vma.mm.memory.put(vmf.page)  # the reference that the driver gave; the entry has its own


@waiting_step
def do_read_fault(vma: Vma, thread: Thread, pages: NDArray[np.int64], file: File) -> Wait:
    """Map pages of a file: what its cache holds in a window around each, else the page itself, read in; VM_FAULT_*."""
    mm = vma.mm
    left = _unmapped(vma, pages)
    while len(left):
        mm.count_faults(thread, do_fault_around(vma, thread, left, file))
        left = _unmapped(vma, left)
        if not len(left):
            break
        block = (left - vma.first + vma.pgoff) // file.ra_pages
        cold = left if file.shmem else left[np.diff(block, prepend=-1) != 0]  # readahead brings the others
        mm.count_faults(thread, len(cold))
        for portion in portions(mm, cold):
            pfns = yield from get_pages(file, thread, mm, portion - vma.first + vma.pgoff)
            if pfns is None:
                return VM_FAULT_OOM
            slots = vma.mm.table.slots_of(portion, create=True)
            free = vma.mm.table.kind[slots] == Kind.NONE
            map_page(vma, thread, portion[free], pfns[free], False)
        left = _unmapped(vma, left)
    return 0


def _unmapped(vma: Vma, pages: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(pages[vma.mm.table.kind[vma.mm.table.slots_of(pages)] == Kind.NONE])


def do_fault_around(vma: Vma, thread: Thread, pages: NDArray[np.int64], file: File) -> int:
    """Map cached, unlocked pages in the windows of 16 around `pages`; return how many faults that served.

    A window starts at a multiple of 16 pages, or where its area or leaf table does, and ends with them.
    """
    mm, table, width = vma.mm, vma.mm.table, FAULT_AROUND_PAGES
    starts = np.maximum(pages // width * width, vma.first)
    starts = starts[np.diff(starts, prepend=-1) != 0]
    around = (starts[:, None] + np.arange(width)).ravel()
    inside = (around < vma.end) & (around >> 9 == np.repeat(starts, width) >> 9)
    inside &= around - vma.first + vma.pgoff < file.pages
    around = around[inside]
    around = around[np.diff(np.maximum.accumulate(around), prepend=-1) > 0]
    pfns = file.cache[around - vma.first + vma.pgoff]
    ready = (pfns >= 0) & ((mm.memory.flags[np.maximum(pfns, 0)] & (PG.LOCKED | PG.HWPOISON)) == 0)
    slots = table.slots_of(around)
    ready &= table.kind[slots] == Kind.NONE
    map_page(vma, thread, around[ready], pfns[ready], False)
    served = pages[table.kind[table.slots_of(pages)] != Kind.NONE] // width
    return int((np.diff(served, prepend=-1) != 0).sum())


@waiting_step
def do_cow_fault(vma: Vma, thread: Thread, pages: NDArray[np.int64], file: File) -> Wait:
    """Write to a private mapping of a file: copy its pages into anonymous ones; VM_FAULT_*."""
    mm, memory = vma.mm, vma.mm.memory
    mm.count_faults(thread, len(pages))
    for portion in portions(mm, pages):
        new = yield from alloc_folios(mm, thread, len(portion))
        if new is None:
            return VM_FAULT_OOM
        source = yield from get_pages(file, thread, mm, portion - vma.first + vma.pgoff)
        if source is None:
            memory.put(new)
            return VM_FAULT_OOM
        memory.copy(source, new)
        thread.charge(mm.costs.page_copy * len(portion))
        install_anon(vma, thread, portion, new, "first touch")
    return 0


@waiting_step
def do_shared_fault(vma: Vma, thread: Thread, pages: NDArray[np.int64], file: File) -> Wait:
    """Write to a shared mapping: the file's own pages, dirty at once; VM_FAULT_*."""
    mm, table = vma.mm, vma.mm.table
    mm.count_faults(thread, len(pages))
    for portion in portions(mm, pages):
        pfns = yield from get_pages(file, thread, mm, portion - vma.first + vma.pgoff)
        if pfns is None:
            return VM_FAULT_OOM
        slots = table.slots_of(portion, create=True)  # first: new tables may move the columns
        free = table.kind[slots] == Kind.NONE
        mm.memory.flags[pfns] |= PG.DIRTY
        map_page(vma, thread, portion[free], pfns[free], True)
    return 0


def map_page(vma: Vma, thread: Thread, pages: NDArray[np.int64], pfns: NDArray[np.int32], write: bool) -> None:
    """Map page-cache pages or a driver's (set_pte_range): each entry takes a reference and a mapping.

    A shared area whose first writes nobody wants to be told of is writable at once, as shmem's are.
    """
    mm, table, memory, start = vma.mm, vma.mm.table, vma.mm.memory, thread.now
    quiet = vma.flags & VM_SHARED and (vma.file is None or vma.file.shmem)
    bits = Bit.YOUNG | (Bit.WRITABLE if vma.writable and vma.flags & VM_SHARED and (write or quiet) else 0)
    bits |= Bit.DIRTY if write and vma.flags & VM_SHARED else 0
    slots = table.slots_of(pages, create=True)
    table.set_entries(slots, Kind.PRESENT, bits, pfns)
    np.add.at(memory.mapcount, memory.head(pfns), 1)
    memory.get(pfns)
    mm.rss["shmem" if vma.file is not None and vma.file.shmem else "file"] += len(pfns)
    thread.charge(mm.costs.pte_write * len(pfns))
    if mm.record_moves:
        mm.moved(thread, start, pages, 0, 1, "first touch")
