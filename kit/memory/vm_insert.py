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

__all__ = ["vm_insert_pages"]


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
