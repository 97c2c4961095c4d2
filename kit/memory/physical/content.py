"""What the program last wrote to each page, so that a run can prove that no byte was lost."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.memory.columns import fill, mark, ramp_where
from kit.memory.physical.frames import Frames
from kit.memory.types import Runs

__all__ = ["Content"]

_VERSION_SHIFT: Final = 36  # a stamp is a settlement and, below, the page's slot plus 1


class Content:
    """The program's view of its memory, page by page, beside the frames that must agree with it.

    A write only marks its page; `settle` turns the marks into new content, in the frame that holds
    the page at that moment. Between two settlements a page may be written any number of times: only
    the last content matters, as with a write-back cache that is flushed before the page is unmapped.
    Content is a stamp, different for every page and every settlement; 0 is a page never written.
    """

    def __init__(self) -> None:
        self.stamps = np.zeros(0, dtype=np.uint64)
        self.marks = bytearray()  # 1 for each page written since its content was settled; `dirty` is the same memory
        self.dirty = np.frombuffer(self.marks, dtype=bool)
        self._version = 0

    def grow(self, slots: int) -> None:
        """Make room for pages with slots below `slots`."""
        more = slots - len(self.stamps)
        if more > 0:
            self.stamps = np.concatenate([self.stamps, np.zeros(more, dtype=np.uint64)])
            self.marks = self.marks + bytes(more)
            self.dirty = np.frombuffer(self.marks, dtype=bool)

    def write(self, slots: NDArray[np.signedinteger]) -> None:
        """Mark pages as written."""
        if len(slots):
            mark(self.marks, slots)

    def settle(self, slots: NDArray[np.int64], frames: Frames, where: NDArray[np.integer]) -> None:
        """Put the content of written pages into the frames that hold them.

        Parameters
        ----------
        slots : ndarray of int64, shape (n,)
            Pages, all written, each once.
        where : ndarray of int32, shape (n,)
            The frame in `frames` of each page.
        """
        stamps = (slots + self._next()).astype(np.uint64)
        self.dirty[slots] = False
        self.stamps[slots] = stamps
        frames.write(where, stamps)

    def settle_runs(self, slot: int, runs: Runs, frames: Frames, base: int) -> None:
        """`settle` for the written ones of runs of pages; page 0 has `slot` and frame `base`, and so on from there."""
        if frames.words > 1:
            pages = np.concatenate([np.arange(first, first + count) for first, count in runs])
            pages = pages[self.dirty[pages + slot]]
            self.settle(pages + slot, frames, pages + base)
            return
        stamp = self._next() + slot
        ramp_where(self.stamps, slot, runs, stamp, self.dirty, slot)
        ramp_where(frames.payload, base, runs, stamp, self.dirty, slot)
        fill(self.dirty, slot, runs, 0)

    def _next(self) -> int:
        """Return the stamp of slot 0 in a new settlement."""
        self._version += 1
        return self._version << _VERSION_SHIFT | 1

    def forget(self, first: int, count: int) -> None:
        """The pages were freed: they hold nothing any more."""
        self.stamps[first : first + count] = 0
        self.dirty[first : first + count] = False
