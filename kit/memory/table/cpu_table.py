"""The CPU's page table: the radix class with typed entries, and rows that know which range they translate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.memory.table.pagetable import GEOMETRIES, PageTable
from kit.memory.types import HPAGE_PMD_NR, Bit, Kind, Leaf

__all__ = ["CpuTable", "Slots"]

Slots = slice | NDArray[np.int64]
_LEAF = HPAGE_PMD_NR
_SHIFT = 9
_USED, _WRITTEN = (np.array(bits, dtype=np.uint8) for bits in (Bit.YOUNG, Bit.YOUNG | Bit.DIRTY))


class CpuTable(PageTable):
    """x86-64 page table with Linux's entry kinds.

    ``kind``, ``bits``, ``frame`` and ``rights`` are columns over slots; ``leaf_level`` and ``number`` over rows.
    ``rights`` is what the hardware allows and is kept in step by `set_entries` and `clear` alone. A row that exists
    stands for a PMD that is not none: a PTE table, or 512 like entries of a PMD leaf (or of a piece of a PUD leaf).
    """

    def __init__(self) -> None:
        super().__init__(GEOMETRIES["x86_64"])
        self.kind = np.zeros(_LEAF, dtype=np.uint8)
        self.bits = np.zeros(_LEAF, dtype=np.uint8)
        self.leaf_level = np.zeros(1, dtype=np.uint8)
        self.number = np.full(1, -1, dtype=np.int64)  # leaf table number of each row; -1: free
        self.made = 0  # leaf tables made so far
        self.huge = False  # whether there may be leaves above the lowest level
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

    def occupied(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the slots of entries that are not NONE in pages [first, first + count), in ascending page order."""
        numbers, rows = self.leaves(first, count)
        if not len(rows):
            return np.zeros(0, dtype=np.int64)
        used = self.kind.reshape(-1, _LEAF)[rows] != Kind.NONE
        low, high = first - int(numbers[0]) * _LEAF, (int(numbers[-1]) + 1) * _LEAF - first - count
        if low > 0:
            used[0, :low] = False
        if high > 0:
            used[-1, _LEAF - high :] = False
        which, index = np.nonzero(used)
        return np.asarray(rows[which] * _LEAF + index)

    def mapped(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the slots of pages `first` to `last` (inclusive) with any rights, in ascending page order."""
        numbers, rows = self.leaves(first, last - first + 1)
        pages, slots = ((each[:, None] * _LEAF + np.arange(_LEAF)).ravel() for each in (numbers, rows))
        return np.asarray(slots[(pages >= first) & (pages <= last) & (self.rights[slots] > 0)])

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

    def _missing(self, low: int, high: int) -> list[int]:
        known = self._sorted[: self._count]
        there = known[known.searchsorted(low) : known.searchsorted(high, side="right")]
        if len(there) == high - low + 1:
            return []
        absent = np.ones(high - low + 1, dtype=bool)
        absent[there - low] = False
        return [int(n) for n in np.flatnonzero(absent) + low]

    # -- entries --------------------------------------------------------------------------------------------------

    def set_entries(
        self, slots: Slots, kind: NDArray[np.integer] | int, bits: NDArray[np.integer] | int,
        frames: NDArray[np.integer] | int,
    ) -> None:  # fmt: skip
        """Write entries; an int stands for every slot. Rights follow from kind and bits."""
        self.kind[slots], self.bits[slots], self.frame[slots] = kind, bits, frames
        self._set_rights(slots, kind, bits)

    def set_present(self, first: int, stop: int, bits: int, frames: NDArray[np.int32]) -> None:
        """`set_entries` for present entries of slots [first, stop) that are alike."""
        self.kind[first:stop], self.bits[first:stop], self.frame[first:stop] = Kind.PRESENT, bits, frames
        self.rights[first:stop] = 1 + (bits & Bit.WRITABLE)

    def clear_run(self, first: int, stop: int) -> None:
        """`clear` for slots [first, stop)."""
        self.kind[first:stop] = self.bits[first:stop] = self.rights[first:stop] = 0
        self.frame[first:stop] = -1

    def set_bits(self, slots: Slots, bits: NDArray[np.integer] | int) -> None:
        """Replace the bits of entries, keeping kind and frame."""
        self.bits[slots] = bits
        self._set_rights(slots, self.kind[slots], bits)

    def clear(self, slots: Slots) -> None:
        """Empty entries."""
        self.kind[slots], self.bits[slots], self.frame[slots], self.rights[slots] = 0, 0, -1, 0

    def _set_rights(self, slots: Slots, kind: NDArray[np.integer] | int, bits: NDArray[np.integer] | int) -> None:
        if isinstance(kind, int) and isinstance(bits, int):
            open_ = kind == Kind.PRESENT and not bits & Bit.PROTNONE
            self.rights[slots] = 1 + (bits & Bit.WRITABLE) if open_ else 0
            return
        present = (np.asarray(kind) == Kind.PRESENT) & ((np.asarray(bits) & Bit.PROTNONE) == 0)
        self.rights[slots] = np.where(present, 1 + (np.asarray(bits) & Bit.WRITABLE), 0)

    def young(self, slots: Slots, written: Slots) -> None:
        """What the hardware notes in entries that it used: accessed, and dirty in those of them that were written."""
        if written is not slots:
            self._mark(slots, _USED)
        self._mark(written, _WRITTEN)

    def _mark(self, slots: Slots, bits: NDArray[np.uint8]) -> None:
        if self.huge:
            slots = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
            rows = slots >> _SHIFT
            large = self.leaf_level[rows] > 0
            if large.any():  # one entry for 512 pages
                table, used = self.bits.reshape(-1, _LEAF), np.zeros(len(self.leaf_level), dtype=bool)
                used[rows[large]] = True
                some = np.flatnonzero(used)
                some = some[table[some, 0] & bits != bits]
                table[some] |= bits
                slots = slots[~large]
        if isinstance(slots, slice):
            marked = self.bits[slots]
            np.bitwise_or(marked, bits, marked)
        else:
            self.bits[slots] |= bits

    # -- leaves and tables ----------------------------------------------------------------------------------------

    def set_huge(self, number: int, kind: int, bits: int, pfn: int, level: int = Leaf.PMD) -> None:
        """Make leaf table `number` one leaf entry for 512 pages with consecutive frames from `pfn`."""
        row = self._leaf_row(number)
        self.leaf_level[row], self.huge = level, True
        self.set_entries(slice(row * _LEAF, (row + 1) * _LEAF), kind, bits, np.arange(pfn, pfn + _LEAF))

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
        short = len(self.rights) - len(self.kind)
        if short:
            self.kind = np.concatenate([self.kind, np.zeros(short, dtype=np.uint8)])
            self.bits = np.concatenate([self.bits, np.zeros(short, dtype=np.uint8)])
            rows = short // _LEAF
            self.leaf_level = np.concatenate([self.leaf_level, np.zeros(rows, dtype=np.uint8)])
            self.number = np.concatenate([self.number, np.full(rows, -1, dtype=np.int64)])

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
