"""The replayable fault buffer: a bounded ring that the GPU fills and the driver drains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "FaultBuffer"]

# One entry, as columns: arrival time, virtual page, access type, uTLB, fault type (0: not fatal).
FIELDS = ("time", "page", "access", "utlb", "fatal")
_TYPES = (np.float64, np.int64, np.int8, np.int32, np.int8)


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
        self.ring = {name: np.zeros(entries, dtype=kind) for name, kind in zip(FIELDS, _TYPES, strict=True)}
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

    def write(
        self, time: NDArray[np.float64], page: NDArray[np.int64], access: NDArray[np.integer], utlb: NDArray[np.integer],
        fatal: NDArray[np.integer] | int = 0,
    ) -> None:  # fmt: skip
        """Append faults in order of arrival, dropping what does not fit, and raise the interrupt.

        Parameters
        ----------
        time, page, access, utlb, fatal : ndarray, shape (n,)
        """
        room = 0 if self.overflow else min(len(page), self.space)
        if room < len(page):
            self.overflow = True
            self.dropped += len(page) - room
        if room:
            self.last_time = float(time[room - 1])
            at = (self.put + np.arange(room)) % self.entries
            columns = (time[:room], page[:room], access[:room], utlb[:room], fatal if isinstance(fatal, int) else fatal[:room])
            for name, column in zip(FIELDS, columns, strict=True):
                self.ring[name][at] = column
            self.put += room
            self.interrupt()

    def arrived(self, now: float) -> int:
        """Return PUT as the hardware shows it at time `now`: entries that have arrived by then."""
        count = self.put - self.get
        if not count or self.last_time <= now:
            return self.put
        times = self.ring["time"][(self.get + np.arange(count)) % self.entries]
        return self.get + int(np.searchsorted(times, now, side="right"))

    def read(self, count: int) -> dict[str, NDArray[np.generic]]:
        """Take `count` entries from GET on; moving GET clears the overflow."""
        at = (self.get + np.arange(count)) % self.entries
        taken = {name: column[at] for name, column in self.ring.items()}
        self.advance(self.get + count)
        return taken

    def advance(self, get: int) -> None:
        """Write GET, and by a second write clear OVERFLOW."""
        self.get = get
        self.overflow = False
