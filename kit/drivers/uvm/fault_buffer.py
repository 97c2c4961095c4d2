"""The replayable fault buffer: a bounded ring that the GPU fills and the driver drains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FaultBuffer"]

# One entry, as columns: arrival time, virtual page, access type, uTLB, fault type (0: not fatal).
_TYPES = (np.float64, np.int64, np.int8, np.int32, np.int8)
Column = Sequence[float] | NDArray[np.generic]


class FaultBuffer:
    """Entries between GET and PUT.

    Full means PUT = GET - 1: the arriving entry is dropped and nothing more is recorded until GET
    has moved. A dropped fault is not lost: its access stays stalled and faults again after the next
    replay.

    Parameters
    ----------
    entries : int
        Size of the ring; one stays empty.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.ring = tuple(np.zeros(entries, dtype=kind) for kind in _TYPES)
        self.get = self.put = 0  # counters that never wrap; the ring index is the remainder
        self.cached_put = 0
        self.overflow = False
        self.dropped = 0
        self.last_time = 0.0
        self.interrupt: Callable[[], None] = lambda: None

    @property
    def space(self) -> int:
        """Entries that still fit."""
        return self.entries - 1 - (self.put - self.get)

    @property
    def first_time(self) -> float:
        """Arrival of the entry at GET."""
        return float(self.ring[0][self.get % self.entries])

    def write(self, time: Column, page: Column, access: Column, utlb: Column, fatal: Column | int = 0) -> None:
        """Append faults in order of arrival, dropping what does not fit, and raise the interrupt.

        Parameters
        ----------
        time, page, access, utlb, fatal : sequence or ndarray, shape (n,)
        """
        room = 0 if self.overflow else min(len(page), self.space)
        if room < len(page):
            self.overflow = True
            self.dropped += len(page) - room
        if room:
            self.last_time = float(time[room - 1])
            at = self._places(self.put, room)
            columns = (time, page, access, utlb, fatal)
            for place, column in zip(self.ring, columns, strict=True):
                place[at] = column if isinstance(column, int) else column[:room]
            self.put += room
            self.interrupt()

    def arrived(self, now: float) -> int:
        """Return PUT as the hardware shows it at time `now`: entries that have arrived by then."""
        count = self.put - self.get
        if not count or self.last_time <= now:
            return self.put
        return self.get + int(np.searchsorted(self.ring[0][self._places(self.get, count)], now, side="right"))

    def read(self, count: int) -> list[list[Any]]:
        """Take `count` entries from GET on, as columns of plain numbers; moving GET clears the overflow."""
        at = self._places(self.get, count)
        taken = [column[at].tolist() for column in self.ring]
        self.advance(self.get + count)
        return taken

    def advance(self, get: int) -> None:
        """Write GET, and by a second write clear OVERFLOW."""
        self.get = get
        self.overflow = False

    def _places(self, first: int, count: int) -> slice | NDArray[np.int64]:
        """Return where in the ring `count` entries from counter `first` are."""
        start = first % self.entries
        if start + count <= self.entries:
            return slice(start, start + count)
        return np.arange(first, first + count) % self.entries
