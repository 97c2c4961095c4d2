"""A content model: every page is a register, and a read may only return what a write could have left there.

Writers are slow and overlap: a write has a start and an end, and takes effect on each page at some
moment in between. A read of value v is right when some write of v began before the read ended, and
no other write lies wholly after that one and wholly before the read. A write that failed may or may
not have happened (it never ends). A forked process starts with what its parent had during the fork.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FOREVER = float("inf")


@dataclass
class Write:
    """Values put on the pages ``first .. first + len(values)`` at some time from start to end."""

    first: int
    values: NDArray[np.uint64]
    start: float
    end: float = FOREVER
    what: str = ""


@dataclass
class Registers:
    """What the pages ``first .. first + pages`` of one address space may hold."""

    first: int
    pages: int
    parent: Registers | None = None
    forked: tuple[float, float] = (0.0, 0.0)
    writes: list[Write] = field(default_factory=list)

    def begin(self, first: int, values: NDArray[np.uint64], now: float, what: str) -> Write:
        """Record that a write has begun; its ``end`` is set when it has succeeded."""
        made = Write(first, values, now, what=what)
        self.writes.append(made)
        return made

    def wrong(self, first: int, values: NDArray[np.uint64], start: float, end: float) -> NDArray[np.int64]:
        """Return the indices of the values that no admissible write explains."""
        count = len(values)
        fine = np.zeros(count, dtype=bool)
        cover = np.zeros((len(self.writes), count), dtype=bool)
        held = np.zeros((len(self.writes), count), dtype=np.uint64)
        for row, write in enumerate(self.writes):
            lo, hi = max(first, write.first), min(first + count, write.first + len(write.values))
            if lo < hi:
                cover[row, lo - first : hi - first] = True
                held[row, lo - first : hi - first] = write.values[lo - write.first : hi - write.first]
        began = np.array([write.start for write in self.writes]).reshape(-1, 1)
        ended = np.array([write.end for write in self.writes]).reshape(-1, 1)
        # The latest start among the writes that were over before this read began: what had ended by then is gone.
        latest = np.where(cover & (ended <= start), began, -FOREVER).max(axis=0, initial=-FOREVER)
        for row, write in enumerate(self.writes):
            fine |= cover[row] & (held[row] == values) & (write.start <= end) & (write.end >= latest)
        open_ = ~fine & (latest == -FOREVER)  # nothing written here for certain: what was there at the start
        if self.parent is None:
            fine |= open_ & (values == 0)
        elif open_.any():
            at = np.flatnonzero(open_)
            fine[at] = True
            fine[at[self.parent.wrong_at(first + at, values[at], *self.forked)]] = False
        return np.flatnonzero(~fine)

    def wrong_at(
        self, pages: NDArray[np.int64], values: NDArray[np.uint64], start: float, end: float
    ) -> NDArray[np.int64]:
        """Return the indices of scattered pages whose values are wrong."""
        low, high = int(pages.min()), int(pages.max()) + 1
        spread = np.zeros(high - low, dtype=np.uint64)
        spread[pages - low] = values
        bad = np.zeros(high - low, dtype=bool)
        bad[self.wrong(low, spread, start, end)] = True
        return np.flatnonzero(bad[pages - low])
