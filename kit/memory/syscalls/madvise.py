"""madvise: what a program says about its memory (mm/madvise.c @ 7.0)."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.huge.collapse import madvise_collapse
from kit.memory.huge.huge_split import split_folio
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.reclaim.reclaim import reclaim_pages
from kit.memory.reclaim.zap import free_swap_and_cache, zap_page_range_single
from kit.memory.space.vma_ops import split_at, vma_merge
from kit.memory.syscalls.populate import populate
from kit.memory.types import (
    HPAGE_PMD_NR,
    MADV_COLD,
    MADV_COLLAPSE,
    MADV_DOFORK,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_HWPOISON,
    MADV_NOHUGEPAGE,
    MADV_NORMAL,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MADV_RANDOM,
    MADV_SEQUENTIAL,
    MADV_WILLNEED,
    PAGE,
    PG,
    VM_ACCESS_FLAGS,
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_SPECIAL,
    Bit,
    Kind,
    Leaf,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.memory.table.cpu_table import CpuTable
    from kit.sim.engine import Thread, Wait

__all__ = ["madvise"]

_FLAGS = {  # advice -> VM_* bits that it sets, that it clears
    MADV_HUGEPAGE: (VM_HUGEPAGE, VM_NOHUGEPAGE),
    MADV_NOHUGEPAGE: (VM_NOHUGEPAGE, VM_HUGEPAGE),
    MADV_DONTFORK: (VM_DONTCOPY, 0),
    MADV_DOFORK: (0, VM_DONTCOPY),
}
_NO_EFFECT = (MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED)  # they steer readahead only
_WORK = (MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT, MADV_COLD)


@waiting_step
def madvise(mm: Mm, thread: Thread, start: int, length: int, advice: int) -> Wait:
    """Apply `advice` to bytes [start, start + length), rounded up to pages.

    Returns
    -------
    int
        0; -EINVAL: unaligned start, unknown advice, or one that an area does not take; -ENOMEM: parts are not mapped
        (the others were served); -EFAULT: MADV_POPULATE_* met an error; -EAGAIN: MADV_COLLAPSE met held pages.
    """
    thread.charge(mm.costs.syscall)
    known = (*_FLAGS, *_NO_EFFECT, *_WORK, MADV_COLLAPSE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_HWPOISON)
    if start % PAGE or length < 0 or advice not in known:
        return Errno(EINVAL, "madvise", f"start {start:#x}, length {length}, advice {advice}")
    first, count = start // PAGE, -(-length // PAGE)
    thread.note(va=start, pages=count, value=advice)
    if not count or advice in _NO_EFFECT:
        return 0
    if advice in (MADV_POPULATE_READ, MADV_POPULATE_WRITE):
        return (yield from _populate(mm, thread, first, count, advice))
    if advice == MADV_HWPOISON:
        from kit.memory.reclaim.memory_failure import madvise_inject_error

        return (yield from madvise_inject_error(mm, thread, first, count))
    if advice in _FLAGS:
        yield from mm.mmap_lock.write_acquire(thread)
        result = yield from _set_flags(mm, thread, first, count, advice)
        yield from mm.mmap_lock.write_release(thread)
        return result
    yield from mm.mmap_lock.read_acquire(thread)
    result = yield from _walk(mm, thread, first, count, advice)
    yield from mm.mmap_lock.read_release(thread)
    return result


def _populate(mm: Mm, thread: Thread, first: int, count: int, advice: int) -> Wait:
    vmas = mm.vmas_in(first, count)
    if sum(min(v.end, first + count) - max(v.first, first) for v in vmas) != count:
        return Errno(ENOMEM, "madvise", f"{first * PAGE:#x}: not all is mapped")
    write = advice == MADV_POPULATE_WRITE
    if any(v.flags & (VM_IO | VM_PFNMAP) or not (v.writable if write else v.flags & VM_ACCESS_FLAGS) for v in vmas):
        return Errno(EINVAL, "madvise", f"{first * PAGE:#x}: an area does not allow it")
    met = yield from populate(mm, thread, first, count, write)
    return Errno(EFAULT, "madvise", f"handle_mm_fault returned {met:#x}") if met else 0


def _set_flags(mm: Mm, thread: Thread, first: int, count: int, advice: int) -> Wait:
    on, off = _FLAGS[advice]
    vmas = mm.vmas_in(first, count)
    mapped = sum(min(v.end, first + count) - max(v.first, first) for v in vmas)
    for old in vmas:
        if old.flags & VM_SPECIAL and advice != MADV_DONTFORK:
            return Errno(EINVAL, "madvise", f"{old} does not take advice {advice}")
        low, high = max(old.first, first), min(old.end, first + count)
        if (old.flags | on) & ~off == old.flags:
            continue
        result = yield from split_at(mm, thread, low, high)
        if result < 0:
            return result
        part = mm.find(low)
        assert part is not None
        part.flags = (part.flags | on) & ~off
    vma_merge(mm, thread, first, first + count)
    return 0 if mapped == count else Errno(ENOMEM, "madvise", f"{first * PAGE:#x}: not all is mapped")


def _walk(mm: Mm, thread: Thread, first: int, count: int, advice: int) -> Wait:
    vmas = mm.vmas_in(first, count)
    mapped = sum(min(v.end, first + count) - max(v.first, first) for v in vmas)
    for vma in vmas:
        low, high = max(vma.first, first), min(vma.end, first + count)
        result = yield from _one(vma, thread, low, high - low, advice)
        if result < 0:
            return result
    return 0 if mapped == count else Errno(ENOMEM, "madvise", f"{first * PAGE:#x}: not all is mapped")


def _one(vma: Vma, thread: Thread, first: int, count: int, advice: int) -> Wait:
    if advice == MADV_COLLAPSE:
        return (yield from madvise_collapse(vma, thread, first, count))
    forbidden = VM_LOCKED | VM_PFNMAP | (0 if advice == MADV_DONTNEED else VM_HUGETLB)
    if vma.flags & forbidden or (advice == MADV_FREE and not vma.is_anonymous):
        return Errno(EINVAL, "madvise", f"{vma} does not take advice {advice}")
    if advice == MADV_DONTNEED:
        if vma.flags & VM_HUGETLB:
            size = vma.page_size // PAGE
            if first % size:
                return Errno(EINVAL, "madvise", f"{first * PAGE:#x} is inside a huge page")
            count = count // size * size
        if count:
            yield from zap_page_range_single(vma, thread, first, count)
    elif advice == MADV_FREE:
        yield from madvise_free_single_vma(vma, thread, first, count)
    elif advice == MADV_PAGEOUT:
        yield from reclaim_pages(vma.mm, thread, first * PAGE, count * PAGE)
    else:
        _cold(vma, first, count)
    return 0


def _cold(vma: Vma, first: int, count: int) -> None:
    """MADV_COLD: what was used is forgotten, so that reclaim takes it sooner."""
    table = vma.mm.table
    slots = _whole_leaves(table, table.occupied(first, count), first, count)
    present = slots[table.kind[slots] == Kind.PRESENT]
    table.bits[present] &= ~np.uint8(Bit.YOUNG)


def _whole_leaves(table: CpuTable, slots: NDArray[np.int64], first: int, count: int) -> NDArray[np.int64]:
    """Leave out entries of PMD leaves that the range covers only in part."""
    start = table.number[slots >> 9] << 9
    whole = (start >= first) & (start + HPAGE_PMD_NR <= first + count)
    return np.asarray(slots[whole | (table.leaf_level[slots >> 9] == Leaf.PTE)])


@waiting_step
def madvise_free_single_vma(vma: Vma, thread: Thread, first: int, count: int) -> Wait:
    """Let reclaim drop pages unless they are written again, under a CLEAR notification; swapped ones go at once."""
    mm, table, memory = vma.mm, vma.mm.table, vma.mm.memory
    thread.note(va=first * PAGE, pages=count)
    told = yield from invalidate_start(mm, thread, first, count, EVENTS.CLEAR)
    yield from _split_partial(vma, thread, first, count)
    slots = _whole_leaves(table, table.occupied(first, count), first, count)
    kind = table.kind[slots]
    swapped = slots[(kind == Kind.SWAP) | (kind == Kind.HWPOISON)]
    entries = table.frame[swapped][table.kind[swapped] == Kind.SWAP]
    table.clear(swapped)
    mm.rss["swap"] -= len(entries)
    free_swap_and_cache(mm, entries)
    present = slots[(kind == Kind.PRESENT) & ((table.bits[slots] & Bit.SPECIAL) == 0)]
    frames = table.frame[present]
    heads = memory.head(frames)
    ours = (memory.mapcount[heads] == 1) & ((memory.flags[heads] & PG.ANON) != 0)
    ours &= (memory.flags[heads] & PG.LOCKED) == 0
    present, heads = present[ours], heads[ours]
    table.bits[present] &= ~np.uint8(Bit.YOUNG | Bit.DIRTY)
    memory.flags[heads] &= ~np.uint16(PG.SWAPBACKED | PG.DIRTY)  # folio_mark_lazyfree
    thread.charge(mm.costs.pte_write * len(present) + mm.costs.tlb_flush)
    yield from invalidate_end(told, thread)


def _split_partial(vma: Vma, thread: Thread, first: int, count: int) -> Wait:
    """A huge folio that is only partly in the range is split, if it can be (madvise_free_huge_pmd)."""
    table, memory = vma.mm.table, vma.mm.memory
    for page in {first, first + count}:
        row = table.row_of(page >> 9) if page % HPAGE_PMD_NR else -1
        slot = row * HPAGE_PMD_NR
        if row < 0 or table.leaf_level[row] != Leaf.PMD or table.kind[slot] != Kind.PRESENT:
            continue
        head = int(table.frame[slot])
        if head == memory.huge_zero or memory.mapcount[head] != 1 or not memory.trylock(np.array([head]))[0]:
            continue
        memory.get(head)
        yield from split_folio(memory, thread, head)
        yield from thread.sync()
        memory.unlock(head)
        memory.put(head)
