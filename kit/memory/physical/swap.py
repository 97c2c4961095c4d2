"""Swap: slots that keep a page's content, how many entries name each, the swap cache (mm/swapfile.c, swap_state.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.types import PG

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory

__all__ = ["SwapArea", "folio_free_swap"]


class SwapArea:
    """One swap device.

    Attributes
    ----------
    count : ndarray of int32, shape (slots,)
        Page-table and shmem entries that name a slot.
    cache : ndarray of int32, shape (slots,)
        Page that caches the slot's content, -1: none.
    payload : ndarray of uint64, shape (slots, words)
    """

    def __init__(self, slots: int, words: int) -> None:
        self.slots = slots
        self.count = np.zeros(slots, dtype=np.int32)
        self.cache = np.full(slots, -1, dtype=np.int32)
        self.payload = np.zeros((slots, words), dtype=np.uint64)
        self._used = np.zeros(slots, dtype=bool)
        self._next = 0
        self._free = np.zeros(slots, dtype=np.int32)
        self._depth = 0

    @property
    def free(self) -> int:
        """Slots that nothing uses."""
        return self._depth + self.slots - self._next

    def alloc(self, n: int) -> NDArray[np.int32]:
        """Take up to `n` slots: fewer when the device is full (folio_alloc_swap)."""
        again = min(n, self._depth)
        old = self._free[self._depth - again : self._depth][::-1].copy()
        self._depth -= again
        fresh = min(n - again, self.slots - self._next)
        taken = np.concatenate([old, np.arange(self._next, self._next + fresh, dtype=np.int32)])
        self._next += fresh
        self._used[taken] = True
        return taken

    def dup(self, slots: NDArray[np.integer]) -> None:
        """One more entry names each slot (swap_dup_entry_direct)."""
        np.add.at(self.count, slots, 1)

    def drop(self, slots: NDArray[np.integer]) -> None:
        """One entry less names each slot; without entries and cached page it is free (swap_put_entries_direct)."""
        np.subtract.at(self.count, slots, 1)
        self.release(slots)

    def release(self, slots: NDArray[np.integer]) -> None:
        """Free those of `slots` that no entry names and no page caches."""
        idle = np.asarray(slots)[(self.count[slots] == 0) & (self.cache[slots] < 0) & self._used[slots]]
        if len(idle):
            idle = np.sort(idle)
            idle = idle[np.diff(idle, prepend=-1) > 0]
            self._used[idle] = False
            self._free[self._depth : self._depth + len(idle)] = idle
            self._depth += len(idle)

    def in_use(self) -> NDArray[np.bool_]:
        """Return which slots are taken, shape (slots,)."""
        return self._used.copy()


def folio_free_swap(memory: PhysicalMemory, pfns: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Take pages out of the swap cache where no entry names their slot any more; return which went.

    What swap kept of them is lost, so they are dirty from now on.
    """
    cached = (memory.flags[pfns] & PG.SWAPCACHE) != 0
    slots = memory.swap_slot[pfns]
    idle = cached.copy()
    idle[cached] = memory.swap.count[slots[cached]] == 0
    memory.swap.cache[slots[idle]] = -1
    memory.swap.release(slots[idle])
    memory.flags[pfns[idle]] = (memory.flags[pfns[idle]] & ~np.uint16(PG.SWAPCACHE)) | np.uint16(PG.DIRTY)
    memory.put(pfns[idle])
    return np.asarray(idle)
