"""First touch of anonymous memory (mm/memory.c do_anonymous_page @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.pages import ZERO_PFN
from kit.memory.reclaim.alloc import alloc_folios, portions
from kit.memory.reclaim.rmap import add_anon_rmap
from kit.memory.types import FAULT_FLAG_WRITE, PAGE, PG, VM_FAULT_OOM, Bit, Kind
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["anon_bits", "do_anonymous_page", "install_anon"]


def anon_bits(vma: Vma) -> int:
    """Return the bits of a new anonymous entry: writable and dirty at once where the area may be written."""
    return Bit.YOUNG | Bit.DIRTY | Bit.WRITABLE if vma.writable else Bit.YOUNG


@waiting_step
def do_anonymous_page(vma: Vma, thread: Thread, pages: NDArray[np.int64], flags: int) -> Wait:
    """Give pages of anonymous memory the zero page (read) or a cleared page each (write); returns VM_FAULT_*."""
    mm, table = vma.mm, vma.mm.table
    thread.note(va=int(pages[0]) * PAGE, pages=len(pages))
    mm.count_faults(thread, len(pages))
    if not flags & FAULT_FLAG_WRITE:
        slots = _pte_alloc(vma, thread, pages)
        slots = slots[(table.kind[slots] == Kind.NONE) | (table.kind[slots] == Kind.MARKER)]
        table.set_entries(slots, Kind.PRESENT, Bit.SPECIAL | Bit.YOUNG, ZERO_PFN)
        thread.charge(mm.costs.pte_write * len(slots))
        return 0
    for portion in portions(mm, pages):
        pfns = yield from alloc_folios(mm, thread, len(portion))
        if pfns is None:
            return VM_FAULT_OOM
        thread.charge(mm.costs.page_zero * len(pfns))
        mm.memory.zero(pfns)
        install_anon(vma, thread, portion, pfns, "first touch")
    return 0


def _pte_alloc(vma: Vma, thread: Thread, pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pages' slots, making the tables that are missing."""
    table = vma.mm.table
    before = table.made
    slots = table.slots_of(pages, create=True)
    thread.charge(vma.mm.costs.table_alloc * (table.made - before))
    return slots


def install_anon(vma: Vma, thread: Thread, pages: NDArray[np.int64], pfns: NDArray[np.int32], cause: str) -> None:
    """Map new pages where entries are still none, and give back those of which others were quicker."""
    mm, table, memory, start = vma.mm, vma.mm.table, vma.mm.memory, thread.now
    slots = _pte_alloc(vma, thread, pages)
    free = (table.kind[slots] == Kind.NONE) | (table.kind[slots] == Kind.MARKER)
    if not free.all():
        memory.put(pfns[~free])
        slots, pages, pfns = slots[free], pages[free], pfns[free]
    add_anon_rmap(memory, vma, pfns, pages)
    memory.flags[pfns] |= PG.DIRTY
    table.set_entries(slots, Kind.PRESENT, anon_bits(vma), pfns)
    mm.rss["anon"] += len(pfns)
    thread.charge((mm.costs.pte_write + mm.costs.lru_page) * len(pfns))
    mm.moved(thread, start, pages, 0, 1, cause)
