"""Leaf tables that know which range they translate: found by it, made when needed, freed when empty."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.memory.table.pagetable import GEOMETRIES, PageTable
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, Leaf

__all__ = ["LeafTables", "Slots"]

Slots = slice | NDArray[np.int64]
_LEAF = HPAGE_PMD_NR
_SHIFT = HPAGE_PMD_ORDER


class LeafTables(PageTable):
    """x86-64 page table that keeps its leaf tables in the order of the ranges that they translate.

    ``leaf_level`` and ``number`` are columns over rows. A row that exists stands for a PMD that is not none: a PTE
    table, or 512 like entries of a PMD leaf (or of a piece of a PUD leaf).
    """

    def __init__(self) -> None:
        super().__init__(GEOMETRIES["x86_64"])
        self.leaf_level = np.zeros(1, dtype=np.uint8)
        self.number = np.full(1, -1, dtype=np.int64)  # leaf table number of each row; -1: free
        self.made = 0  # leaf tables made so far
        self.reserved: set[int] = set()  # rows that stay although they are empty: a driver reads them in place
        self._free_rows: list[int] = []
        self._free_directories: dict[int, list[int]] = {}
        self._sorted = np.zeros(16, dtype=np.int64)  # numbers of existing tables, ascending, and their rows
        self._sorted_rows = np.zeros(16, dtype=np.int64)
        self._count = 0

    # -- ranges ---------------------------------------------------------------------------------------------------

    def leaves(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return numbers and rows of the leaf tables that exist in pages [first, first + count), ascending."""
        numbers = self._sorted[: self._count]
        low = int(numbers.searchsorted(first >> _SHIFT))
        high = int(numbers.searchsorted((first + count - 1) >> _SHIFT, side="right"))
        return numbers[low:high].copy(), self._sorted_rows[low:high].copy()

    def row_of(self, number: int) -> int:
        """Return the row of leaf table `number`, -1 when it does not exist."""
        at = int(self._sorted[: self._count].searchsorted(number))
        return int(self._sorted_rows[at]) if at < self._count and self._sorted[at] == number else -1

    def slot_of(self, page: int) -> int:
        """Return the slot of a page, -1 where no table exists."""
        row = self.row_of(page >> _SHIFT)
        return row * _LEAF + (page & (_LEAF - 1)) if row >= 0 else -1

    def slots(self, first: int, count: int, create: bool = False) -> Slots:
        """Return the slots of `count` pages from `first`: a slice when rows are consecutive, else an array.

        Slot -1, where no table exists, reads as NONE. With `create` missing tables are made, as PTE tables.
        """
        low, high = first >> _SHIFT, (first + count - 1) >> _SHIFT
        if create:
            for number in self._missing(low, high):
                self._leaf_row(number)
        numbers, rows = self.leaves(first, count)
        if len(rows) == high - low + 1:
            if len(rows) == 1 or bool((np.diff(rows) == 1).all()):
                start = int(rows[0]) * _LEAF + (first & (_LEAF - 1))
                return slice(start, start + count)
            table = rows
        else:
            table = np.full(high - low + 1, -1, dtype=np.int64)
            table[numbers - low] = rows
        pages = np.arange(first, first + count, dtype=np.int64)
        row = table[(pages >> _SHIFT) - low]
        return np.where(row >= 0, row * _LEAF + (pages & (_LEAF - 1)), -1)

    def slots_of(self, pages: NDArray[np.integer], create: bool = False) -> NDArray[np.int64]:
        """Return the slot of each page, shape (n,); as `slots`, for pages in any order."""
        pages = np.asarray(pages, dtype=np.int64)
        numbers = pages >> _SHIFT
        known = self._sorted[: self._count]
        at = np.minimum(known.searchsorted(numbers), max(self._count - 1, 0))
        found = known[at] == numbers if self._count else np.zeros(len(pages), dtype=bool)
        if create and not found.all():
            for number in sorted(set(numbers[~found].tolist())):
                self._leaf_row(number)
            return self.slots_of(pages)
        if not self._count:
            return np.full(len(pages), -1, dtype=np.int64)
        return np.where(found, self._sorted_rows[at] * _LEAF + (pages & (_LEAF - 1)), -1)

    def leads(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which slots stand for a mapping of their own: PTEs, and the first of each PMD or PUD leaf."""
        rows = slots >> _SHIFT
        level = self.leaf_level[rows]
        if not level.any():
            return np.ones(len(slots), dtype=bool)
        start = (slots & (_LEAF - 1)) == 0
        return np.asarray((level == 0) | (start & ((level == Leaf.PMD) | ((self.number[rows] & (_LEAF - 1)) == 0))))

    def pages_at(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the virtual page number that each slot translates."""
        return np.asarray(self.number[slots >> _SHIFT] * _LEAF + (slots & (_LEAF - 1)))

    def hole(self, page: int) -> tuple[int, int]:
        """Return (first page, pages) of the largest aligned span around `page` that has no table, (page, 0) if one has.

        This is what a page walk calls a hole: the span of the highest level whose entry is none.
        """
        below = sum(self.geometry.bits)
        row = 0
        for level, bits in enumerate(self.geometry.bits[:-1]):
            below -= bits
            row = int(self.directories[level][row, (page >> below) & ((1 << bits) - 1)])
            if row < 0:
                return page >> below << below, 1 << below
        return page, 0

    def _missing(self, low: int, high: int) -> list[int]:
        known = self._sorted[: self._count]
        there = known[known.searchsorted(low) : known.searchsorted(high, side="right")]
        if len(there) == high - low + 1:
            return []
        absent = np.ones(high - low + 1, dtype=bool)
        absent[there - low] = False
        return [int(n) for n in np.flatnonzero(absent) + low]

    # -- tables ---------------------------------------------------------------------------------------------------

    def split_leaf(self, row: int) -> None:
        """Turn a PMD leaf into a PTE table of 512 like entries."""
        self.leaf_level[row] = Leaf.PTE

    def free_tables(self, numbers: NDArray[np.int64]) -> int:
        """Remove leaf tables and directories that become empty; entries must be clear. Return how many tables went."""
        gone = 0
        for number in numbers.tolist():
            row = self.row_of(number)
            if row < 0 or row in self.reserved:
                continue
            gone += 1 + self._detach(number)
            at = int(self._sorted[: self._count].searchsorted(number))
            self._sorted[at : self._count - 1] = self._sorted[at + 1 : self._count]
            self._sorted_rows[at : self._count - 1] = self._sorted_rows[at + 1 : self._count]
            self._count -= 1
            self.leaf_level[row], self.number[row] = Leaf.PTE, -1
            self._free_rows.append(row)
        return gone

    def reserve(self, first: int, count: int) -> int:
        """As `PageTable.reserve`; the rows stay until the table goes."""
        low, high = first >> _SHIFT, (first + count - 1) >> _SHIFT
        if len(self._missing(low, high)) > 1:
            self._free_rows.clear()  # consecutive rows come from the end of the pool
        slot = super().reserve(first, count)
        self.reserved.update(range(slot >> _SHIFT, (slot >> _SHIFT) + high - low + 1))
        return slot

    def _leaf_row(self, table: int) -> int:
        row = super()._leaf_row(table)
        if self.number[row] != table:
            self.number[row] = table
            self.made += 1
            self._remember(table, row)
        return row

    def _remember(self, number: int, row: int) -> None:
        if self._count == len(self._sorted):
            self._sorted = np.concatenate([self._sorted, np.zeros(self._count, dtype=np.int64)])
            self._sorted_rows = np.concatenate([self._sorted_rows, np.zeros(self._count, dtype=np.int64)])
        at = int(self._sorted[: self._count].searchsorted(number))
        self._sorted[at + 1 : self._count + 1] = self._sorted[at : self._count]
        self._sorted_rows[at + 1 : self._count + 1] = self._sorted_rows[at : self._count]
        self._sorted[at], self._sorted_rows[at] = number, row
        self._count += 1

    def _new_leaf(self) -> int:
        return self._free_rows.pop() if self._free_rows else super()._new_leaf()

    def _room(self, rows: int) -> None:
        super()._room(rows)
        short = len(self.rights) // _LEAF - len(self.number)
        if short:
            self.leaf_level = np.concatenate([self.leaf_level, np.zeros(short, dtype=np.uint8)])
            self.number = np.concatenate([self.number, np.full(short, -1, dtype=np.int64)])

    def _detach(self, number: int) -> int:
        """Take a leaf table out of its directory, and the directories above it that this empties."""
        path, row, below = [], 0, sum(self.geometry.bits[:-1])
        for level, bits in enumerate(self.geometry.bits[:-1]):
            below -= bits
            index = (number >> below) & ((1 << bits) - 1)
            path.append((level, row, index))
            row = int(self.directories[level][row, index])
        gone = 0
        for level, row, index in reversed(path):
            self.directories[level][row, index] = -1
            if level == 0 or bool((self.directories[level][row] >= 0).any()):
                break
            self._free_directories.setdefault(level, []).append(row)
            gone += 1
        return gone

    def _new_directory(self, level: int) -> int:
        free = self._free_directories.get(level)
        return free.pop() if free else super()._new_directory(level)
