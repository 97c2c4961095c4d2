"""Moves of evicted pages, which the CPU's page table does not show.

A driver that hands pages over keeps the content of a device page in a system page while the CPU's entry stays as it
is: the trace says where the content is, and says so again when the kernel, which knows nothing of it, moves the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.migrate_vma import MIGRATE_PFN_COMPOUND, MIGRATE_PFN_SHIFT
from kit.memory.notifier.notify import runs
from kit.memory.types import PAGE, Kind

if TYPE_CHECKING:
    from kit.drivers.dmirror_limited import LimitedDevice
    from kit.memory.space.mm import Mm

__all__ = ["Evictions"]

SYSTEM, DEVICE = 1, 2  # residency masks
CAUSE = "eviction"


class Evictions:
    """Writes evictions of a process's pages into the trace.

    Parameters
    ----------
    mm : Mm
        The parent's address space, which the map of pages shows.
    device : LimitedDevice
    """

    def __init__(self, mm: Mm, device: LimitedDevice) -> None:
        self.mm, self.device = mm, device

    def kept(self, frames: NDArray[np.int64], start: float, end: float) -> None:
        """The content of device pages went to system pages."""
        table = self.mm.table
        slots = np.flatnonzero((table.kind == Kind.DEVICE_PRIVATE) & np.isin(table.frame, frames))
        for first, count in runs(np.sort(table.pages_at(slots))):
            self.mm.engine.trace.move(start, end, first, count, DEVICE, SYSTEM, CAUSE)

    def take_back(self, first: int, src: NDArray[np.uint64], time: float) -> None:
        """Take back what was recorded: the kernel, which moves these pages now, knows only their device pages.

        It records the move where the parent's table has the page, whoever asked for it.
        """
        engine, table = self.mm.engine, self.mm.table
        valid = np.flatnonzero(src & np.uint64(1) != 0)
        frames = (src[valid] >> np.uint64(MIGRATE_PFN_SHIFT)).astype(np.int64)
        for at in valid[(frames >= self.device.first) & self._elsewhere(frames)].tolist():
            count = 512 if src[at] & np.uint64(MIGRATE_PFN_COMPOUND) else 1
            slot = table.slots_of(np.array([first + at]))[0]
            if table.kind[slot] == Kind.MIGRATION and table.frame[slot] == src[at] >> np.uint64(MIGRATE_PFN_SHIFT):
                engine.trace.move(time, time, first + at, count, SYSTEM, DEVICE, CAUSE)

    def settle(self, base: int, pages: int) -> None:
        """Do the same for what is about to be unmapped."""
        engine, mm = self.mm.engine, self.mm
        slots = mm.table.slots_of(base // PAGE + np.arange(pages))
        private = np.flatnonzero(mm.table.kind[slots] == Kind.DEVICE_PRIVATE)
        frames = mm.table.frame[slots[private]].astype(np.int64)
        for at in private[self._elsewhere(frames)].tolist():
            engine.trace.move(engine.now, engine.now, base // PAGE + at, 1, SYSTEM, DEVICE, CAUSE)

    def _elsewhere(self, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return of which device pages the driver keeps the content in a system page."""
        return np.asarray(self.device.backing(frames) < self.device.first)
