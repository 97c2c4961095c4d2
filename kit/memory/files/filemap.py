"""Getting pages of files, and what programs do with files besides mapping them (mm/filemap.c, mm/shmem.c @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start, runs
from kit.memory.reclaim.alloc import alloc_folios
from kit.memory.reclaim.zap import zap_page_range_single
from kit.memory.types import PG, Bit, Kind
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.files.file import File
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["fsync", "get_pages", "pread", "pwrite", "truncate"]


def get_pages(file: File, thread: Thread, mm: Mm, indices: NDArray[np.int64], readahead: bool = True) -> Wait:
    """Bring pages of a file into its cache; returns their pfns (ndarray of int32), or None when memory is out.

    Other pages of the cache may be reclaimed while this waits, these not before the next wait.
    """
    memory = file.memory
    for _attempt in range(8):
        absent = file.cache[indices] < 0
        if not absent.any():
            return file.cache[indices].copy()
        missing = indices[absent]
        if readahead and not file.shmem and len(missing) * file.ra_pages < memory.free_pages // 4:
            missing = _read_around(file, missing)
        new = yield from alloc_folios(mm, thread, len(missing))
        if new is None:
            return None
        still = file.cache[missing] < 0
        memory.put(new[~still])
        _fill(file, thread, mm, missing[still], new[still])
    return None


def _read_around(file: File, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what is not cached of the windows of `ra_pages` around each index (do_sync_mmap_readahead)."""
    starts = np.maximum(indices - file.ra_pages // 2, 0)
    around = np.sort((starts[:, None] + np.arange(file.ra_pages)).ravel())
    around = around[(np.diff(around, prepend=-1) != 0) & (around < file.pages)]
    return np.asarray(around[file.cache[around] < 0])


def _fill(file: File, thread: Thread, mm: Mm, missing: NDArray[np.int64], new: NDArray[np.int32]) -> None:
    """Read what is missing from disk or swap, or clear it."""
    memory, held = file.memory, file.cache[missing]
    swapped = held < -1
    if file.shmem:
        memory.zero(new[~swapped])
        thread.charge(mm.costs.page_zero * int((~swapped).sum()) + mm.costs.swap_in_page * int(swapped.sum()))
        memory.payload[new[swapped]] = memory.swap.payload[-2 - held[swapped]]
        memory.swap.drop(-2 - held[swapped])
    else:
        memory.payload[new] = file.data[missing]
        thread.charge(mm.costs.file_read_page * len(new))
    file.add(missing, new)
    memory.flags[new[swapped]] |= PG.DIRTY


@waiting_step
def pread(file: File, thread: Thread, mm: Mm, first: int, count: int) -> Wait:
    """Return the content of pages [first, first + count) as a program reads it: ndarray of uint64, (count, words)."""
    pfns = yield from get_pages(file, thread, mm, np.arange(first, first + count))
    thread.charge(mm.costs.page_copy * count)
    return None if pfns is None else file.memory.payload[pfns].copy()


@waiting_step
def pwrite(file: File, thread: Thread, mm: Mm, first: int, content: NDArray[np.uint64]) -> Wait:
    """Write whole pages; returns how many, or 0 when memory is out. The disk has them after `fsync`."""
    file.extend(first + len(content))
    pfns = yield from get_pages(file, thread, mm, np.arange(first, first + len(content)), readahead=False)
    if pfns is None:
        return 0
    file.memory.payload[pfns] = content
    file.memory.flags[pfns] |= PG.DIRTY
    thread.charge(mm.costs.page_copy * len(content))
    return len(content)


@waiting_step
def fsync(file: File, thread: Thread, mm: Mm) -> Wait:
    """Write dirty pages to disk; their entries become clean and read-only first (folio_mkclean, PROTECTION_PAGE)."""
    memory = file.memory
    pfns = file.cache[file.cache >= 0]
    for vma in list(file.vmas):
        low, high = vma.pgoff, vma.pgoff + vma.pages
        own = pfns[(memory.index[pfns] >= low) & (memory.index[pfns] < high)]
        pages = np.sort(memory.index[own] - vma.pgoff + vma.first)
        slots = vma.mm.table.slots_of(pages)
        table = vma.mm.table
        dirty = (table.kind[slots] == Kind.PRESENT) & ((table.bits[slots] & (Bit.DIRTY | Bit.WRITABLE)) != 0)
        dirty &= table.frame[slots] == file.cache[np.minimum(pages - vma.first + vma.pgoff, file.pages - 1)]
        for first, count in runs(pages[dirty]):
            told = yield from invalidate_start(vma.mm, thread, first, count, EVENTS.PROTECTION_PAGE)
            at = table.slots_of(np.arange(first, first + count))
            here = at[table.kind[at] == Kind.PRESENT]
            memory.flags[table.frame[here][(table.bits[here] & Bit.DIRTY) != 0]] |= PG.DIRTY
            table.set_bits(here, table.bits[here] & ~np.uint8(Bit.DIRTY | Bit.WRITABLE))
            yield from invalidate_end(told, thread)
    pfns = file.cache[file.cache >= 0]
    dirty_pfns = pfns[(memory.flags[pfns] & PG.DIRTY) != 0]
    file.write_back(dirty_pfns)
    thread.charge(mm.costs.file_write_page * len(dirty_pfns))
    return 0


@waiting_step
def truncate(file: File, thread: Thread, pages: int) -> Wait:
    """Shorten a file: its mappings past the end go (unmap_mapping_range), private copies included, and its pages."""
    for vma in list(file.vmas):
        first = max(vma.first, vma.first + pages - vma.pgoff)
        if first < vma.end:
            yield from zap_page_range_single(vma, thread, first, vma.end - first)
    gone = np.arange(pages, file.pages)
    file.remove(gone[file.cache[gone] != -1])
    file.cache, file.pages = file.cache[:pages].copy(), pages
    if not file.shmem:
        file.data = file.data[:pages].copy()
    return 0
