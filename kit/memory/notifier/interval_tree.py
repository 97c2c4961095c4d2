"""Which of many intervals overlap a range: what lib/interval_tree.c answers, with arrays instead of a tree."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np

__all__ = ["ULONG_MAX", "IntervalTree"]

ULONG_MAX = (1 << 64) - 1
T = TypeVar("T")


class IntervalTree(Generic[T]):
    """Intervals of bytes, `start` to `last` inclusive, found by overlap in order of start.

    A query is one comparison of two columns whatever the number of intervals; insertion and removal
    are constant time. An unused row overlaps nothing.
    """

    def __init__(self) -> None:
        self._starts = np.full(4, ULONG_MAX, dtype=np.uint64)
        self._lasts = np.zeros(4, dtype=np.uint64)
        self._items: list[T | None] = [None] * 4
        self._rows: dict[T, int] = {}
        self._free = [3, 2, 1, 0]

    def __len__(self) -> int:
        return len(self._rows)

    def insert(self, item: T, start: int, last: int) -> None:
        """Add an interval; ValueError when `item` is in already."""
        if item in self._rows:
            raise ValueError(f"interval {start:#x}..{last:#x} is in the tree already")
        if not self._free:
            more = len(self._items)
            self._free = list(range(2 * more - 1, more - 1, -1))
            self._starts = np.concatenate([self._starts, np.full(more, ULONG_MAX, dtype=np.uint64)])
            self._lasts = np.concatenate([self._lasts, np.zeros(more, dtype=np.uint64)])
            self._items += [None] * more
        row = self._rows[item] = self._free.pop()
        self._starts[row], self._lasts[row], self._items[row] = start, last, item

    def remove(self, item: T) -> None:
        """Take an interval out; KeyError when it is not in."""
        row = self._rows.pop(item)
        self._starts[row], self._lasts[row], self._items[row] = ULONG_MAX, 0, None
        self._free.append(row)

    def overlapping(self, start: int, last: int) -> list[T]:
        """Return the items whose interval shares a byte with `start` to `last`, lowest start first."""
        rows = np.flatnonzero((self._starts <= last) & (self._lasts >= start))
        if len(rows) > 1:
            rows = rows[np.argsort(self._starts[rows], kind="stable")]
        found = (self._items[row] for row in rows)
        return [item for item in found if item is not None]
