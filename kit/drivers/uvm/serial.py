"""The GPU side with one access after the other: one thread, or a pointer chase."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.sm import NEVER, Misses
from kit.memory.physical.content import Content

__all__ = ["SerialKernel"]

WINDOW = 4  # accesses looked at together at first, after a miss, and at most
AFTER_MISS, MOST = 64, 1 << 18


class SerialKernel:
    """`StreamKernel` with a single lane and no prefetch instructions: at most one access is stalled.

    Parameters
    ----------
    name : str
    slots : ndarray of int, shape (n,)
        Page-table slot of each access, -1 where nothing is mapped and never will be.
    pages : ndarray of int64, shape (n,)
        Virtual page number of each access.
    access : ndarray of int8, shape (n,)
        Access types.
    need : ndarray of uint8, shape (n,)
        Right that each access needs.
    cost_us : float
        Time of one resident access, and the pause after it.
    """

    def __init__(
        self, name: str, slots: NDArray[np.integer], pages: NDArray[np.int64], access: NDArray[np.int8],
        need: NDArray[np.uint8], cost_us: float,
    ) -> None:  # fmt: skip
        self.name, self.slots, self.pages, self.access, self.cost_us = name, slots, pages, access, cost_us
        self.need = np.where(slots < 0, NEVER, need)
        writes = need > 1
        self.writes = np.zeros(len(slots) + 1, dtype=np.int32)  # how many of the accesses before each one write
        np.cumsum(writes, out=self.writes[1:])
        self.write_slots, self.written = slots[writes], 0
        self.position, self.count, self.window = 0, len(slots), WINDOW
        self.stalled = 0

    @property
    def blocked(self) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.blocked`."""
        return self.stalled > 0

    @property
    def done(self) -> bool:
        """Every access has been made."""
        return self.position == self.count and not self.stalled

    def advance(
        self, rights: NDArray[np.uint8], content: Content, horizon: float, retry: bool
    ) -> tuple[float, Misses | None]:
        """See `kit.drivers.uvm.sm.Kernel.advance`."""
        spent = 0.0
        if self.stalled:
            if not retry:
                return spent, None
            at = self.position - 1
            if rights.item(self.slots.item(at)) < self.need.item(at):
                return spent, self._miss(at, spent)
            self.stalled, spent = 0, self.cost_us
            if self.need.item(at) > 1:
                content.dirty[self.slots.item(at)] = True
        while self.position < self.count and spent < horizon:
            start = self.position
            stop = min(start + self.window, self.count)
            miss = rights[self.slots[start:stop]] < self.need[start:stop]
            at = start + int(miss.argmax())
            if miss.item(at - start):
                self._ran(at, content)
                spent += (at - start) * self.cost_us
                self.position, self.window, self.stalled = at + 1, AFTER_MISS, 1
                self.written += self.need.item(at) > 1
                return spent, self._miss(at, spent)
            self._ran(stop, content)
            spent += (stop - start) * self.cost_us
            self.position, self.window = stop, min(2 * self.window, MOST)
        return spent, None

    def _ran(self, stop: int, content: Content) -> None:
        """Accesses before `stop` have been made."""
        first, self.written = self.written, self.writes.item(stop)
        if first != self.written:
            content.dirty[self.write_slots[first : self.written]] = True

    def _miss(self, at: int, spent: float) -> Misses:
        return Misses([self.pages.item(at)], [self.access.item(at)], [0], [spent])

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.cancel`."""
        dead = bool(self.stalled) and (everything or self.pages.item(self.position - 1) in pages)
        if dead:
            self.stalled = 0
        return dead
