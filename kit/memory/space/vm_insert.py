"""A driver's pages in an area of its own (vm_insert_page, mm/memory.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.columns import add, count
from kit.memory.types import VM_MIXEDMAP, VM_SHARED, Bit, Kind, Runs
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread

__all__ = ["insert_runs", "vm_insert_pages", "zap_runs"]

_NONE: Final = int(Kind.NONE)
_OPEN: Final = Bit.YOUNG | Bit.WRITABLE
_ONE: Final = 0x1_0000_0001  # a reference and a mapping: `PageAllocator.counts`


@step
def vm_insert_pages(vma: Vma, thread: Thread, page: int, pfns: NDArray[np.integer]) -> int:
    """Map a driver's pages at virtual page `page` and on, each with a reference; the area becomes VM_MIXEDMAP.

    They are writable only in a shared area that is. Returns 0, or -EINVAL where something is mapped already.
    """
    mm, memory = vma.mm, vma.mm.memory
    slots = mm.table.slots_of(np.arange(page, page + len(pfns)), create=True)
    if (mm.table.kind[slots] != Kind.NONE).any():
        return Errno(EINVAL, "vm_insert_pages", f"{page << 12:#x}: something is mapped there")
    vma.flags |= VM_MIXEDMAP
    memory.get(pfns)
    memory.mapcount[pfns] += 1
    mm.rss["file"] += len(pfns)
    shared = bool(vma.flags & VM_SHARED) and vma.writable
    mm.table.set_entries(slots, Kind.PRESENT, Bit.YOUNG | (Bit.WRITABLE if shared else 0), pfns)
    thread.charge(mm.costs.pte_write * len(pfns))
    thread.note(va=page << 12, pages=len(pfns))
    return 0


def insert_runs(vma: Vma, slot: int, runs: Runs, frames: NDArray[np.int32], write: bool, base: int = -1) -> None:
    """`vm_insert_pages` for a driver that has reserved its area's rows and records steps of its own.

    Parameters
    ----------
    slot, runs : int, sequence of (int, int)
        The entry of page 0, and the runs of pages whose entries, which are empty (`zap_runs`), are made.
    frames : ndarray of int32
        The frame of each page: single pages of the driver's, each once.
    write : bool
        Whether they may be written.
    base : int, optional
        The frame of page 0, if frames follow one another as pages do: that saves time.
    """
    mm, memory, pages = vma.mm, vma.mm.memory, _count(runs)
    if base >= 0:
        add(memory.counts, base, runs, _ONE)
    else:
        memory.counts[np.concatenate([frames[first : first + each] for first, each in runs])] += _ONE
    mm.table.set_present(slot, runs, _OPEN if write else Bit.YOUNG, frames)
    mm.rss["file"] += pages


def zap_runs(vma: Vma, slot: int, runs: Runs, base: int = -1) -> None:
    """Remove entries made by `insert_runs`, as far as they are there (unmap_mapping_range of one area, run by run).

    Parameters
    ----------
    base : int, optional
        The frame of page 0, if frames follow one another and the driver has not let go of any: that saves time.
    """
    mm, memory, pages = vma.mm, vma.mm.memory, _count(runs)
    table = mm.table
    there = pages - count(table.kind, slot, runs, _NONE)
    mm.rss["file"] -= there
    if base >= 0 and there == pages:
        table.clear_runs(slot, runs)
        add(memory.counts, base, runs, -_ONE)
        return
    slots = np.concatenate([np.arange(slot + first, slot + first + each) for first, each in runs])
    pfns = table.frame[slots[table.kind[slots] != Kind.NONE]]
    table.clear_runs(slot, runs)
    memory.counts[pfns] -= _ONE
    if np.count_nonzero(memory.counts[pfns]) < there:  # the driver has let go of some before
        memory.refcount[pfns] += 1
        memory.put(pfns)


def _count(runs: Runs) -> int:
    pages = 0
    for _, each in runs:
        pages += each
    return pages
