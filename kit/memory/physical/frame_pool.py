"""Which frames of host memory are free: single ones, 2 MiB blocks, and runs (what the buddy allocator is here)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.zeros import zeros
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER

__all__ = ["FramePool"]


class FramePool:
    """Frames [first, frames): given out from the bottom up, the last one given back first.

    Parameters
    ----------
    frames, first : int
        Number past the last frame, and the first one to give out.
    """

    def __init__(self, frames: int, first: int) -> None:
        self.frames = frames
        self._stack = zeros(frames, np.int32)  # single free frames
        self._depth = 0
        self._next = first  # frames from here on were never given out
        self._huge: list[int] = []  # free aligned blocks of 512
        self._runs: dict[int, list[int]] = {}  # length: first frames of free runs
        self._in_runs = 0

    @property
    def free(self) -> int:
        """How many frames are free."""
        return self._depth + self.frames - self._next + len(self._huge) * HPAGE_PMD_NR + self._in_runs

    @property
    def top(self) -> int:
        """Every frame ever given out lies below."""
        return self._next

    def take(self, n: int) -> NDArray[np.int32] | None:
        """Take `n` frames; None when there are not so many."""
        if n > self.free:
            return None
        if n > self.free - self._in_runs:
            self._break_runs()
        again = min(n, self._depth)
        parts = [self._stack[self._depth - again : self._depth][::-1].copy()]
        self._depth -= again
        fresh = min(n - again, self.frames - self._next)
        parts.append(np.arange(self._next, self._next + fresh, dtype=np.int32))
        self._next += fresh
        rest = n - again - fresh
        while rest > 0:
            head = self._huge.pop()
            part = np.arange(head, head + HPAGE_PMD_NR, dtype=np.int32)
            parts.append(part[:rest])
            self.give(part[rest:])
            rest -= HPAGE_PMD_NR
        return np.concatenate(parts)

    def take_huge(self) -> int | None:
        """Take an aligned block of 512 frames; None when none is free in one piece."""
        if not self._huge:
            self._huge = self.carve(HPAGE_PMD_NR, 1)
        if not self._huge:
            self._merge()
        return self._huge.pop() if self._huge else None

    def take_run(self, n: int) -> int | None:
        """Take `n` frames in a row; None when there are not so many in one piece."""
        runs = self._runs.get(n)
        if runs:
            self._in_runs -= n
            return runs.pop()
        if self._next + n <= self.frames:
            self._next += n
            return self._next - n
        first = self._cut(n)
        if first is None and n <= self.free:
            self._join()
            first = self._cut(n)
        return first

    def give_run(self, first: int, n: int) -> None:
        """Give `n` frames in a row back."""
        self._runs.setdefault(n, []).append(first)
        self._in_runs += n

    def carve(self, size: int, count: int) -> list[int]:
        """Take up to `count` blocks of `size` frames, aligned to it, out of what was never given out."""
        found: list[int] = []
        while len(found) < count:
            first = -(-self._next // size) * size
            if first + size > self.frames:
                break
            self.give(np.arange(self._next, first, dtype=np.int32))
            self._next = first + size
            found.append(first)
        return found

    def give(self, frames: NDArray[np.integer]) -> None:
        """Give single frames back."""
        self._stack[self._depth : self._depth + len(frames)] = frames
        self._depth += len(frames)

    def give_huge(self, head: int) -> None:
        """Give an aligned block of 512 frames back."""
        self._huge.append(head)

    def free_mask(self) -> NDArray[np.bool_]:
        """Return which frames are free, shape (frames,)."""
        free = np.zeros(self.frames, dtype=bool)
        free[self._stack[: self._depth]] = True
        free[self._next :] = True
        for head in self._huge:
            free[head : head + HPAGE_PMD_NR] = True
        for length, runs in self._runs.items():
            for first in runs:
                free[first : first + length] = True
        return free

    def _cut(self, n: int) -> int | None:
        """Take `n` frames off the shortest run that is long enough."""
        for length in sorted(length for length, runs in self._runs.items() if length >= n and runs):
            first = self._runs[length].pop()
            self._in_runs -= length
            if length > n:
                self.give_run(first + n, length - n)
            return first
        return None

    def _join(self) -> None:
        """Make runs, as long as they get, of all that was given back."""
        for head in self._huge:
            self.give_run(head, HPAGE_PMD_NR)
        self._huge = []
        self._break_runs()
        frames = np.sort(self._stack[: self._depth])
        self._depth = 0
        cuts = np.flatnonzero(np.diff(frames, prepend=-2) != 1)
        lengths = np.diff(np.append(cuts, len(frames)))
        for first, length in zip(frames[cuts].tolist(), lengths.tolist(), strict=True):
            self.give_run(first, length)

    def _break_runs(self) -> None:
        """Make the frames of runs single ones."""
        for length, runs in self._runs.items():
            for first in runs:
                self.give(np.arange(first, first + length, dtype=np.int32))
        self._runs, self._in_runs = {}, 0

    def _merge(self) -> None:
        """Find blocks all of whose frames are free singly, and make them blocks again."""
        self._break_runs()
        stack = self._stack[: self._depth]
        whole = np.bincount(stack >> HPAGE_PMD_ORDER) == HPAGE_PMD_NR
        if whole.any():
            rest = stack[~whole[stack >> HPAGE_PMD_ORDER]]
            self._huge = (np.flatnonzero(whole)[::-1] << HPAGE_PMD_ORDER).tolist()
            self._depth = 0
            self.give(rest)
