"""A driver's pages in an area of its own (vm_insert_page, mm/memory.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.types import VM_MIXEDMAP, VM_SHARED, Bit, Kind
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.memory.vma import Vma
    from kit.sim.engine import Thread

__all__ = ["insert_run", "vm_insert_pages", "zap_run"]

_OPEN = Bit.YOUNG | Bit.WRITABLE


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


def insert_run(vma: Vma, slot: int, count: int, pfns: slice | NDArray[np.integer], write: bool) -> None:
    """`vm_insert_pages` for a driver that has reserved its area's rows and records steps of its own.

    Parameters
    ----------
    slot, count : int
        The entries; what they map already gives way.
    pfns : slice, or ndarray of int, shape (count,)
        Single pages of the driver's, each once.
    write : bool
        Whether they may be written.
    """
    table, memory, entries = vma.mm.table, vma.mm.memory, slice(slot, slot + count)
    if table.kind[entries].any():
        zap_run(vma, slot, count)
    memory.refcount[pfns] += 1
    memory.mapcount[pfns] += 1
    vma.mm.rss["file"] += count
    frames = np.arange(pfns.start, pfns.stop, dtype=np.int32) if isinstance(pfns, slice) else pfns
    table.set_entries(entries, Kind.PRESENT, _OPEN if write else Bit.YOUNG, frames)


def zap_run(vma: Vma, slot: int, count: int) -> None:
    """Remove entries made by `insert_run`, as far as they are there (unmap_mapping_range of one area)."""
    table, memory, entries = vma.mm.table, vma.mm.memory, slice(slot, slot + count)
    pfns, there = table.frame[entries], table.kind[entries] != Kind.NONE
    pfns = pfns.copy() if there.all() else pfns[there]
    if not len(pfns):
        return
    table.clear(entries)
    vma.mm.rss["file"] -= len(pfns)
    memory.mapcount[pfns] -= 1
    left = memory.refcount[pfns] - 1
    if left.all():
        memory.refcount[pfns] = left
    else:  # the driver has let go of some before
        memory.put(pfns)
