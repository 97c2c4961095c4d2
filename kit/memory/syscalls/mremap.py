"""mremap: growing, shrinking and moving areas with their entries (mm/mremap.c @ 7.0)."""

from __future__ import annotations

from dataclasses import replace
from errno import EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.huge.huge_split import __split_huge_pmd
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.space.unmapped_area import get_unmapped_area
from kit.memory.space.vma import Vma
from kit.memory.space.vma_ops import split_at, vma_merge
from kit.memory.syscalls.munmap import do_vmi_munmap
from kit.memory.types import (
    HPAGE_PMD_NR,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    VM_DONTEXPAND,
    VM_HUGETLB,
    VM_LOCKED,
    VM_PFNMAP,
    Kind,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["move_page_tables", "mremap"]


@waiting_step
def mremap(
    mm: Mm, thread: Thread, old: int, old_len: int, new_len: int, flags: int = 0, new_addr: int | None = None
) -> Wait:
    """Resize or move bytes [old, old + old_len) of one area; return the new address or -errno.

    Returns
    -------
    int
        -EINVAL: unaligned addresses, no new length, unknown or contradicting flags, overlapping old and new range;
        -EFAULT: the old range is not within one area; -ENOMEM: it cannot grow where it is and may not move.
    """
    thread.charge(mm.costs.syscall)
    known = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
    moves = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)
    wrong = flags & ~known or (moves and not flags & MREMAP_MAYMOVE) or old % PAGE or new_len <= 0 or old_len <= 0
    pages, wanted = -(-old_len // PAGE), -(-new_len // PAGE)
    if flags & MREMAP_FIXED:
        to = -1 if new_addr is None else new_addr
        wrong = wrong or to < 0 or to % PAGE or (old < to + wanted * PAGE and to < old + pages * PAGE)
    if wrong or (flags & MREMAP_DONTUNMAP and pages != wanted):
        return Errno(EINVAL, "mremap", f"old {old:#x}+{old_len:#x}, new {new_addr}+{new_len:#x}, flags {flags:#x}")
    thread.note(va=old, pages=pages)
    yield from mm.mmap_lock.write_acquire(thread)
    fixed = new_addr if flags & MREMAP_FIXED else None
    result = yield from _mremap(mm, thread, old // PAGE, pages, wanted, flags, fixed)
    if result < 0:
        thread.note(va=old, pages=pages, status=repr(result))
    yield from mm.mmap_lock.write_release(thread)
    return result


def _mremap(mm: Mm, thread: Thread, first: int, pages: int, wanted: int, flags: int, fixed: int | None) -> Wait:
    vma = mm.find(first)
    if vma is None or first + pages > vma.end:
        return Errno(EFAULT, "mremap", f"{first * PAGE:#x} and {pages} pages are not within one area")
    if wanted > pages and vma.flags & (VM_DONTEXPAND | VM_PFNMAP):
        return Errno(EFAULT, "mremap", f"{first * PAGE:#x} must not grow")
    if vma.flags & VM_HUGETLB and (first * PAGE | pages * PAGE | wanted * PAGE) % vma.page_size:
        return Errno(EINVAL, "mremap", f"{first * PAGE:#x}: not whole pages of {vma.page_size} bytes")
    if fixed is not None:
        if mm.vmas_in(fixed // PAGE, wanted):
            yield from do_vmi_munmap(mm, thread, fixed // PAGE, wanted)
    elif not flags & MREMAP_DONTUNMAP and wanted <= pages:
        if wanted < pages:
            result = yield from do_vmi_munmap(mm, thread, first + wanted, pages - wanted)
            return first * PAGE if result >= 0 else result
        return first * PAGE
    elif not flags & MREMAP_DONTUNMAP and first + pages == vma.end and not mm.vmas_in(vma.end, wanted - pages):
        vma.pages += wanted - pages
        _grow_file(vma)
        thread.charge(mm.costs.vma_op)
        vma_merge(mm, thread, vma.first, vma.end)
        return first * PAGE
    elif not flags & MREMAP_MAYMOVE:
        return Errno(ENOMEM, "mremap", f"{first * PAGE:#x} cannot grow to {wanted} pages where it is")
    if wanted < pages:
        yield from do_vmi_munmap(mm, thread, first + wanted, pages - wanted)
        pages = wanted
    return (yield from _move_vma(mm, thread, first, pages, wanted, flags, fixed))


def _grow_file(vma: Vma) -> None:
    if vma.file is not None and vma.file.anonymous:
        vma.file.extend(vma.pgoff + vma.pages)


def _move_vma(mm: Mm, thread: Thread, first: int, pages: int, wanted: int, flags: int, fixed: int | None) -> Wait:
    result = yield from split_at(mm, thread, first, first + pages)
    if result < 0:
        return result
    vma = mm.find(first)
    assert vma is not None
    where = fixed if fixed is not None else get_unmapped_area(mm, wanted, max(PAGE, vma.page_size))
    if where < 0:
        return where
    unborn = vma.is_anonymous and vma.anon is None
    new = replace(vma, first=where // PAGE, pages=wanted, pgoff=where // PAGE if unborn else vma.pgoff)
    mm.insert(new)
    thread.charge(mm.costs.vma_op)
    yield from move_page_tables(vma, thread, new, pages)
    if flags & MREMAP_DONTUNMAP:
        vma.flags &= ~VM_LOCKED
        if vma.anon is not None:
            vma.anon.vmas.pop(vma, None)
            vma.anon = None  # nothing anonymous is left there
    else:
        new_resv, vma.resv = vma.resv, set()
        yield from do_vmi_munmap(mm, thread, first, pages)
        new.resv = new_resv
    _grow_file(new)
    vma_merge(mm, thread, new.first, new.end)
    return where


@waiting_step
def move_page_tables(vma: Vma, thread: Thread, new: Vma, pages: int) -> Wait:
    """Move the entries of an area's first `pages` pages to the start of `new`, under one UNMAP notification.

    A PMD leaf moves whole when source and destination are equally aligned, and is split otherwise.
    """
    mm, first, delta = vma.mm, vma.first, new.first - vma.first
    thread.note(va=first * PAGE, pages=pages)
    told = yield from invalidate_start(mm, thread, first, pages, EVENTS.UNMAP)
    numbers, rows = mm.table.leaves(first, pages)
    huge = mm.table.leaf_level[rows] > 0
    whole = numbers[huge]
    if delta % HPAGE_PMD_NR:
        for number in whole.tolist():
            yield from __split_huge_pmd(mm, thread, number)
        whole = whole[:0]
    start = thread.now
    for number in whole.tolist():
        _move_leaf(mm, number, number + delta // HPAGE_PMD_NR)
    moved = np.concatenate([_span(whole), _move_ptes(mm, first, pages, delta)])
    if mm.record_moves and len(moved):
        _record(mm, thread, start, np.sort(moved), delta)
    thread.charge(mm.costs.pte_write * (len(moved) - (HPAGE_PMD_NR - 1) * len(whole)) + mm.costs.tlb_flush)
    yield from invalidate_end(told, thread)


def _span(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return (numbers[:, None] * HPAGE_PMD_NR + np.arange(HPAGE_PMD_NR)).ravel()


def _move_leaf(mm: Mm, number: int, to: int) -> None:
    """move_huge_pmd: the leaf takes the place of an empty PMD."""
    table = mm.table
    row = table.row_of(number)
    slots = slice(row * HPAGE_PMD_NR, (row + 1) * HPAGE_PMD_NR)
    kind, bits, frame, level = (
        int(table.kind[slots.start]), int(table.bits[slots.start]), int(table.frame[slots.start]),
        int(table.leaf_level[row]),
    )  # fmt: skip
    table.clear(slots)
    table.free_tables(np.array([number]))
    table.set_huge(to, kind, bits, frame, level)


def _move_ptes(mm: Mm, first: int, pages: int, delta: int) -> NDArray[np.int64]:
    table = mm.table
    slots = table.occupied(first, pages)
    if not len(slots):
        return slots
    virtual = table.pages_at(slots)
    kind, bits, frame = table.kind[slots].copy(), table.bits[slots].copy(), table.frame[slots].copy()
    to = table.slots_of(virtual + delta, create=True)
    table.clear(slots)
    table.set_entries(to, kind, bits, frame)
    return virtual


def _record(mm: Mm, thread: Thread, start: float, virtual: NDArray[np.int64], delta: int) -> None:
    slots = mm.table.slots_of(virtual + delta)
    paged = np.isin(mm.table.kind[slots], (Kind.PRESENT, Kind.DEVICE_PRIVATE, Kind.DEVICE_EXCLUSIVE))
    places = mm.memory.pgmap[np.where(paged, mm.table.frame[slots], 0)]
    for at in sorted(set(places[paged].tolist())):
        own = virtual[paged & (places == at)]
        place = mm.place_of(int(mm.table.frame[mm.table.slots_of(own[:1] + delta)][0]))
        mm.moved(thread, start, own, place, 0, "mremap")
        mm.moved(thread, start, own + delta, 0, place, "mremap")
