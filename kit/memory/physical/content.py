"""What the program last wrote to each page, so that a run can prove that no byte was lost."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.frames import Frames, Index

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

    def write(self, slots: NDArray[np.integer]) -> None:
        """Mark pages as written."""
        if len(slots):
            self.dirty[slots] = True

    def settle(self, slots: slice | NDArray[np.int64], frames: Frames, where: Index) -> None:
        """Put the content of written pages into the frames that hold them.

        Parameters
        ----------
        slots : slice or ndarray of int64, shape (n,)
            Pages, all written, each once.
        where : slice or ndarray of int32, shape (n,)
            The frame in `frames` of each page.
        """
        self._version += 1
        base = self._version << _VERSION_SHIFT | 1
        if isinstance(slots, slice):
            stamps = np.arange(base + slots.start, base + slots.stop, dtype=np.uint64)
            self.marks[slots] = bytes(len(stamps))
        else:
            stamps = (slots + base).astype(np.uint64)
            self.dirty[slots] = False
        self.stamps[slots] = stamps
        frames.write(where, stamps)

    def forget(self, first: int, count: int) -> None:
        """The pages were freed: they hold nothing any more."""
        self.stamps[first : first + count] = 0
        self.dirty[first : first + count] = False
