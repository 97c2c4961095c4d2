"""Physical memory: one space of page frame numbers for host and device memory, as columns over pfn.

A pin is one reference and one `pincount` on folios of every size. Code between two waits is atomic, which is what the
kernel's page-table and LRU locks give; they are not simulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import simpy
from numpy.typing import NDArray

from kit.memory.costs import make_costs
from kit.memory.physical.page_alloc import PageAllocator
from kit.memory.physical.swap import SwapArea
from kit.memory.physical.zeros import zeros
from kit.memory.types import HPAGE_PMD_NR, PG

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.memory.device.migrate_vma import MigrateVma
    from kit.memory.space.vma import RmapRoot
    from kit.sim.engine import Engine, Thread, Wait

__all__ = ["ZERO_PFN", "PhysicalMemory", "tally"]

ZERO_PFN = 0


def tally(column: NDArray[np.int32], where: NDArray[np.integer], by: int) -> None:
    """Add `by` to the column at each of `where`, which may name a place more than once (``np.add.at``)."""
    if len(where) < 2:
        column[where] += by
        return
    steps = where[1:] > where[:-1]
    if steps.all() or (where[1:] < where[:-1]).all():  # each place once: the usual case, and many times as fast
        column[where] += by
    else:
        np.add.at(column, where, by)


class PhysicalMemory(PageAllocator):
    """Host memory, the device memory that drivers add to it, and swap.

    Parameters
    ----------
    engine : Engine
    system_frames, device_frames : int
        4 KiB frames of host memory, and of device memory that `memremap_pages` may hand out.
    payload_bytes : int
        Content carried for each frame, a multiple of 8: 4096 carries a page whole, 8 one stamp.
    swap_slots : int
        Pages that fit on the swap device.
    """

    def __init__(
        self, engine: Engine, system_frames: int, device_frames: int = 0, payload_bytes: int = 8, swap_slots: int = 0
    ) -> None:
        super().__init__(system_frames, device_frames, payload_bytes)
        self.engine = engine
        self.zone_device_data = zeros(self.total, np.int64)
        self.swap_slot = zeros(self.total, np.int32)  # of pages in the swap cache
        self.lru_stamp = zeros(self.total, np.int64)  # order in which pages came to the LRU
        self.swap = SwapArea(swap_slots, self.words)
        self.mappings: list[RmapRoot | None] = [None]
        self.huge_zero: int = -1  # pfn of the huge zero page, once somebody needed it
        self.stamps = 0  # LRU clock
        self.lru_queue = np.zeros(0, dtype=np.int64)  # folios in LRU order, as of stamp `lru_cut`, not yet looked at
        self.lru_cut = 0
        self.costs = make_costs()  # what reclaim pays with: those of the address space made last
        self.thp = "madvise"  # /sys/kernel/mm/transparent_hugepage/enabled: always, madvise or never
        self.vm_events: dict[str, int] = {}
        self.observer: Callable[[str, MigrateVma], None] | None = None  # told of the phases of each migration
        self._unlocked: simpy.Event | None = None
        self.refcount[ZERO_PFN] = 1
        self.flags[ZERO_PFN] = PG.RESERVED

    # -- references -----------------------------------------------------------------------------------------------

    def get(self, pfns: NDArray[np.integer] | int) -> None:
        """Take one reference on each page's folio."""
        tally(self.refcount, self.head(np.atleast_1d(pfns)), 1)

    def put(self, pfns: NDArray[np.integer] | int) -> int:
        """Drop one reference on each page's folio; the last one frees it. Return how many folios went."""
        heads = self.head(np.atleast_1d(pfns))
        tally(self.refcount, heads, -1)
        dead = heads[self.refcount[heads] <= 0]
        if not len(dead):
            return 0
        if len(dead) > 1:
            dead = np.sort(dead)
            dead = dead[np.diff(dead, prepend=-1) > 0]
        if (self.refcount[dead] < 0).any():
            raise RuntimeError(f"pages {dead[self.refcount[dead] < 0][:8]} were put more often than they were got")
        self._free(dead)
        return len(dead)

    def pin(self, pfns: NDArray[np.integer]) -> None:
        """Pin each page's folio (FOLL_PIN): a reference that forbids moving and sharing."""
        heads = self.head(pfns)
        tally(self.refcount, heads, 1)
        tally(self.pincount, heads, 1)

    def unpin(self, pfns: NDArray[np.integer]) -> None:
        """Drop pins."""
        tally(self.pincount, self.head(pfns), -1)
        self.put(pfns)

    def expected_refs(self, heads: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the references that mappings and caches hold (folio_expected_ref_count)."""
        flags = self.flags[heads]
        pages = np.left_shift(1, self.order[heads].astype(np.int64))
        cached = ((flags & PG.SWAPCACHE) != 0) | ((self.mapping[heads] != 0) & ((flags & PG.ANON) == 0))
        pages = np.where(flags & PG.HUGETLB, 1, pages)
        return np.asarray(self.mapcount[heads] + np.where(cached, pages, 0))

    # -- page locks -----------------------------------------------------------------------------------------------

    def trylock(self, pfns: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Lock the folios that are free to lock; return which. Each folio may occur once."""
        heads = self.head(np.atleast_1d(pfns))
        free = (self.flags[heads] & PG.LOCKED) == 0
        self.flags[heads[free]] |= PG.LOCKED
        return np.asarray(free)

    def unlock(self, pfns: NDArray[np.integer] | int) -> None:
        """Unlock folios and wake whoever waits for a page; `Thread.sync` first, waiters resume at the common clock."""
        self.flags[self.head(np.atleast_1d(pfns))] &= ~np.uint16(PG.LOCKED)
        if self._unlocked is not None:
            event, self._unlocked = self._unlocked, None
            event.succeed()

    def locked(self, pfn: int) -> bool:
        """Return whether a page's folio is locked."""
        return bool(self.flags[self.head(np.array([pfn]))][0] & PG.LOCKED)

    def lock(self, thread: Thread, pfn: int) -> Wait:
        """Lock a page's folio, waiting for it (folio_lock)."""
        yield from thread.sync()
        while not self.trylock(np.array([pfn]))[0]:
            yield from self._wait(thread)

    def wait_on_lock(self, thread: Thread, pfn: int) -> Wait:
        """Wait until a page's folio is not locked (folio_wait_locked)."""
        yield from thread.sync()
        while self.locked(pfn):
            yield from self._wait(thread)

    def _wait(self, thread: Thread) -> Wait:
        if self._unlocked is None:
            self._unlocked = self.engine.env.event()
        yield from thread.wait(self._unlocked)

    # -- content --------------------------------------------------------------------------------------------------

    def copy(self, src: NDArray[np.integer], dst: NDArray[np.integer]) -> None:
        """Copy pages."""
        self.payload[dst] = self.payload[src]

    # -- LRU ------------------------------------------------------------------------------------------------------

    def lru_add(self, pfns: NDArray[np.integer]) -> None:
        """Put folios at the young end of the LRU (folio_add_lru)."""
        heads = self.head(pfns)
        self.flags[heads] |= PG.LRU
        self.lru_stamp[heads] = np.arange(self.stamps, self.stamps + len(heads))
        self.stamps += len(heads)

    def lru_isolate(self, pfns: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Take folios off the LRU with a reference each (folio_isolate_lru); return which were on it."""
        heads = self.head(pfns)
        on = (self.flags[heads] & PG.LRU) != 0
        self.flags[heads[on]] &= ~np.uint16(PG.LRU)
        self.refcount[heads[on]] += 1
        return np.asarray(on)

    def lru_putback(self, pfns: NDArray[np.integer]) -> None:
        """Undo `lru_isolate` (folio_putback_lru)."""
        self.lru_add(pfns)
        self.put(pfns)

    # -- folios ---------------------------------------------------------------------------------------------------

    def split(self, head: int, mapcounts: NDArray[np.integer] | None = None) -> None:
        """Make an order-9 folio 512 single pages (the physical part of split_folio).

        Every page has its part of the mappings with their references; the head keeps all other references, and each
        tail has one more reference, which is the caller's, and is locked as the head is.

        Parameters
        ----------
        mapcounts : ndarray of int, shape (512,)
            How many PTEs map each page; None: the folio is unmapped.
        """
        tails = np.arange(head + 1, head + HPAGE_PMD_NR)
        total = int(self.mapcount[head])
        self.order[head : head + HPAGE_PMD_NR] = 0
        keep = np.uint16(PG.LOCKED | PG.LRU | PG.DIRTY | PG.ANON | PG.SWAPBACKED | PG.UPTODATE | PG.ACTIVE)
        self.flags[tails] = (self.flags[tails] & (PG.ANON_EXCLUSIVE | PG.HWPOISON)) | (self.flags[head] & keep)
        self.lru_stamp[tails] = self.lru_stamp[head]
        self.refcount[tails], self.mapcount[tails], self.pincount[tails] = 1, 0, 0
        if mapcounts is not None:
            self.mapcount[head : head + HPAGE_PMD_NR] = mapcounts
            self.refcount[head] -= total
            self.refcount[head : head + HPAGE_PMD_NR] += np.asarray(mapcounts, dtype=np.int32)

    # -- mappings -------------------------------------------------------------------------------------------------

    def register(self, root: RmapRoot) -> int:
        """Give an anon family or file its id, which `mapping` of its pages holds."""
        self.mappings.append(root)
        return len(self.mappings) - 1

    def count(self, event: str, n: int = 1) -> None:
        """Add to a counter of /proc/vmstat."""
        self.vm_events[event] = self.vm_events.get(event, 0) + n
