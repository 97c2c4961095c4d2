"""The replayable fault buffer: a bounded ring that the GPU fills and the driver drains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Column", "FaultBuffer", "plain"]

Column = list[Any] | NDArray[Any]


class FaultBuffer:
    """Entries between GET and PUT, kept as they were written: sets of columns, one for each write.

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
        # Arrival time, virtual page, access type, uTLB, fault type (0: not fatal); the first set's start is taken.
        self._written: deque[tuple[Column, ...]] = deque()
        self._taken = 0
        self.get = self.put = 0  # counters that never wrap
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
        return float(self._written[0][0][self._taken])

    def write(self, time: Column, page: Column, access: Column, utlb: Column, fatal: Column | None = None) -> None:
        """Append faults in order of arrival, dropping what does not fit, and raise the interrupt.

        Parameters
        ----------
        time, page, access, utlb, fatal : list or ndarray, shape (n,)
        """
        count = len(page)
        room = 0 if self.overflow else min(count, self.space)
        columns: tuple[Column, ...] = (time, page, access, utlb, [0] * count if fatal is None else fatal)
        if room < count:
            self.overflow = True
            self.dropped += count - room
            columns = tuple(column[:room] for column in columns)
        if room:
            self.last_time = float(time[room - 1])
            self._written.append(columns)
            self.put += room
            self.interrupt()

    def arrived(self, now: float) -> int:
        """Return PUT as the hardware shows it at time `now`: entries that have arrived by then."""
        if self.put == self.get or self.last_time <= now:
            return self.put
        count = sum(int(np.searchsorted(columns[0], now, side="right")) for columns in self._written)
        return self.get + max(count - self._taken, 0)

    def read(self, count: int) -> list[Column]:
        """Take `count` entries from GET on: as they were written where one write holds them all, else as lists."""
        if self._taken == 0 and len(self._written[0][0]) == count:
            self.get, self.overflow = self.get + count, False
            return list(self._written.popleft())
        parts, start, missing = [], self._taken, count
        for columns in self._written:
            parts.append([column[start : start + missing] for column in columns])
            missing -= len(parts[-1][0])
            if not missing:
                break
            start = 0
        self.advance(self.get + count)
        if len(parts) == 1:
            return parts[0]
        return [list(chain(*map(plain, column))) for column in zip(*parts, strict=True)]

    def advance(self, get: int) -> None:
        """Write GET, and by a second write clear OVERFLOW."""
        self._taken += get - self.get
        while self._written and self._taken >= len(self._written[0][0]):
            self._taken -= len(self._written.popleft()[0])
        self.get = get
        self.overflow = False


def plain(column: Column | Sequence[Any]) -> list[Any]:
    """Return a column as a list of plain numbers."""
    if isinstance(column, list):
        return column
    return column.tolist() if isinstance(column, np.ndarray) else list(column)
