"""A driver's pages in an area of its own (vm_insert_page, mm/memory.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.columns import add, count
from kit.memory.types import VM_MIXEDMAP, VM_SHARED, Bit, Kind
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread

__all__ = ["insert_run", "vm_insert_pages", "zap_run"]

Frames = slice | NDArray[np.int32]
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


def insert_run(vma: Vma, slot: int, pages: int, pfns: Frames, write: bool) -> None:
    """`vm_insert_pages` for a driver that has reserved its area's rows and records steps of its own.

    Parameters
    ----------
    slot, pages : int
        The entries, which are empty (`zap_run`).
    pfns : slice, or ndarray of int32, shape (pages,)
        Single pages of the driver's, each once.
    write : bool
        Whether they may be written.
    """
    mm, stop = vma.mm, slot + pages
    table, memory = mm.table, mm.memory
    if isinstance(pfns, slice):
        add(memory.counts, pfns.start, pfns.stop, _ONE)
    else:
        memory.counts[pfns] += _ONE
    table.set_present(slot, stop, _OPEN if write else Bit.YOUNG, pfns)
    mm.rss["file"] += pages


def zap_run(vma: Vma, slot: int, pages: int, held: int = -1) -> None:
    """Remove entries made by `insert_run`, as far as they are there (unmap_mapping_range of one area).

    Parameters
    ----------
    held : int, optional
        The first of as many pages in a row that are mapped where all entries are there, if the driver has not let go
        of any: that saves time.
    """
    mm, stop = vma.mm, slot + pages
    table, memory = mm.table, mm.memory
    there = pages - count(table.kind, slot, stop, _NONE)
    mm.rss["file"] -= there
    if held >= 0 and there == pages:
        table.clear_run(slot, stop)
        add(memory.counts, held, held + pages, -_ONE)
        return
    pfns = table.frame[slot:stop][table.kind[slot:stop] != Kind.NONE]
    table.clear_run(slot, stop)
    memory.counts[pfns] -= _ONE
    if np.count_nonzero(memory.counts[pfns]) < there:  # the driver has let go of some before
        memory.refcount[pfns] += 1
        memory.put(pfns)
