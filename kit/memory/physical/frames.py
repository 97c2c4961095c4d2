"""Frames: physical memory that carries content, so that a copy really copies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.zeros import zeros

__all__ = ["Frames", "Index"]

Index = NDArray[np.integer] | slice


class Frames:
    """The 4 KiB frames of one memory and what is in them; who has which is the affair of its allocator.

    A frame's payload is its first ``payload_bytes``: 4096 carries a page whole, 8 carries a stamp,
    enough to tell one page's content from every other's. Storage grows with the highest frame used (`ensure`).

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
        self.name, self.capacity = name, capacity
        self.payload_bytes, self.words = payload_bytes, payload_bytes // 8
        self.payload = np.zeros((0, self.words), dtype=np.uint64)

    def ensure(self, top: int) -> None:
        """Make room for the payload of frames below `top`."""
        have = len(self.payload)
        if top > have:
            frames = min(max(top, 2 * have, 4096), max(self.capacity, top))
            grown: NDArray[np.uint64] = zeros(frames * self.words, np.uint64).reshape(frames, self.words)
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
