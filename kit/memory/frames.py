"""Frames: physical memory that carries content, so that a copy really copies."""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from kit.errors import DriverError

__all__ = ["Frames", "Index"]

Index = NDArray[np.integer] | slice


class Frames:
    """The 4 KiB frames of one memory and what is in them.

    A frame's payload is its first ``payload_bytes``: 4096 carries a page whole, 8 carries a stamp,
    enough to tell one page's content from every other's. Storage grows with the highest frame used.

    Parameters
    ----------
    name : str
        The memory, for messages.
    capacity : int
        Frames that exist.
    payload_bytes : int
        Content carried for each frame, a multiple of 8.
    """

    def __init__(self, name: str, capacity: int, payload_bytes: int = 8) -> None:
        self.name, self.capacity, self.words = name, capacity, payload_bytes // 8
        self.payload = np.zeros((0, self.words), dtype=np.uint64)
        self.used = 0
        self._top = 0
        self._free: dict[int, list[int]] = {}

    def alloc(self, count: int) -> int:
        """Take `count` contiguous frames and return the first.

        Raises
        ------
        DriverError
            ENOMEM: fewer than `count` frames are left.
        """
        if self.used + count > self.capacity:
            raise DriverError(
                errno.ENOMEM, "NV_ERR_NO_MEMORY", "alloc_pages", f"{self.name} has no {count} frames left"
            )
        self.used += count
        free = self._free.get(count)
        if free:
            return free.pop()
        if self._top + count > self.capacity:
            return self._from_larger(count)
        first = self._top
        self._top += count
        self.ensure(self._top)
        return first

    def free(self, first: int, count: int) -> None:
        """Give back what `alloc` returned."""
        self.used -= count
        self._free.setdefault(count, []).append(first)

    def _from_larger(self, count: int) -> int:
        """Split a free run: the smallest one that is large enough."""
        for size in sorted(size for size, found in self._free.items() if size > count and found):
            first = self._free[size].pop()
            self._free.setdefault(size - count, []).append(first + count)
            return first
        self.used -= count
        raise DriverError(errno.ENOMEM, "NV_ERR_NO_MEMORY", "alloc_pages", f"{self.name} is too fragmented for {count}")

    def ensure(self, top: int) -> None:
        """Make room for the payload of frames below `top`."""
        have = len(self.payload)
        if top > have:
            grown = np.zeros((min(max(top, 2 * have, 4096), max(self.capacity, top)), self.words), dtype=np.uint64)
            grown[:have] = self.payload
            self.payload = grown

    def zero(self, at: Index) -> None:
        """Clear frames."""
        self.payload[at] = 0

    def write(self, at: Index, stamps: NDArray[np.uint64]) -> None:
        """Fill each frame's payload with its stamp, word by word distinguishable."""
        if self.words == 1:
            self.payload[at, 0] = stamps
        else:
            self.payload[at] = self.pattern(stamps)

    def pattern(self, stamps: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the payload that `stamps` stand for, shape (frames, words); stamp 0 is a zeroed page."""
        column = stamps.astype(np.uint64, copy=False)[:, None]
        if self.words == 1:
            return column
        return column * (np.arange(self.words, dtype=np.uint64) * np.uint64(2) + np.uint64(1))[None, :]

    def intact(self, at: Index, stamps: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each frame whether its whole payload is the stamp's."""
        return np.asarray((self.payload[at] == self.pattern(stamps)).all(axis=1))
