"""The GPU side with one access after the other: one thread, or a pointer chase."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.sm import FOREVER, Misses
from kit.drivers.uvm.stream import Stream
from kit.memory.physical.content import Content

__all__ = ["SerialKernel"]

# Accesses looked at together at first, after a miss while others may act, else after a miss, and at most.
WINDOW: Final = 4
AFTER_MISS: Final = 64
ALONE: Final = 512
MOST: Final = 1 << 18


class SerialKernel(Stream):
    """`StreamKernel` with a single lane and no prefetch instructions: at most one access is stalled.

    Its parameters are those of `Stream`.
    """

    lanes = 1
    stalled = 0
    window = WINDOW

    @property
    def progress(self) -> int:
        """See `kit.drivers.uvm.sm.Kernel.progress`."""
        return self.position - self.stalled

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
            self.stalled, spent, self.window = 0, self.cost_us, AFTER_MISS if horizon < FOREVER else ALONE
            if self.need.item(at) > 1:
                content.dirty[self.slots.item(at)] = True
        while self.position < self.count and spent < horizon:
            start = self.position
            stop = min(start + self.window, self.count)
            miss = self.missing(rights, start, stop)
            at = start + int(miss.argmax())
            if miss.item(at - start):
                self.wrote(start, at, content)
                spent += (at - start) * self.cost_us
                self.position, self.stalled = at + 1, 1
                return spent, self._miss(at, spent)
            self.wrote(start, stop, content)
            spent += (stop - start) * self.cost_us
            self.position, self.window = stop, min(2 * self.window, MOST)
        return spent, None

    def _miss(self, at: int, spent: float) -> Misses:
        return Misses([self.pages.item(at)], [self.access.item(at)], [0], [spent])

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.cancel`."""
        dead = bool(self.stalled) and (everything or self.pages.item(self.position - 1) in pages)
        if dead:
            self.stalled = 0
        return dead
