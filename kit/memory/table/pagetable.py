"""One radix page table with a geometry: the CPU's, a GPU's, an HCA's are this class with other numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["GEOMETRIES", "Geometry", "PageTable"]


@dataclass(frozen=True)
class Geometry:
    """Shape of a page table.

    Attributes
    ----------
    name : str
    bits : tuple of int
        Index bits of each level, root first; the last is the leaf's.
    page_shift : int
        log2 of the smallest page.
    source : str
        Where the numbers are documented.
    """

    name: str
    bits: tuple[int, ...]
    page_shift: int
    source: str

    @property
    def va_bits(self) -> int:
        """Bits of an address that the table translates."""
        return sum(self.bits) + self.page_shift

    @property
    def leaf(self) -> int:
        """Entries of a leaf table."""
        return 1 << self.bits[-1]


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("x86_64", (9, 9, 9, 9), 12, "Intel SDM volume 3, 4-level paging"),
        Geometry("pascal", (2, 9, 9, 8, 9), 12, "kernel-open/nvidia-uvm/uvm_pascal_mmu.c @ 580.105.08: 49-bit VA"),
        Geometry("hopper", (1, 9, 9, 9, 8, 9), 12, "kernel-open/nvidia-uvm/uvm_hopper_mmu.c @ 580.105.08: 57-bit VA"),
    )
}


class PageTable:
    """Radix tree whose leaf tables are rows of pooled arrays.

    An entry is a right (0: none) in ``rights`` and a frame in ``frame``; walks, maps and unmaps take
    arrays or runs of page numbers. `reserve` gives a range's leaf tables consecutive rows, so that a
    page of it is found by one subtraction (`window`), which is what makes a resident touch cost one
    gather.

    Parameters
    ----------
    geometry : Geometry
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.rows = 0
        # Row after row in one dimension. The last row is never used: slot -1 (no table there) reads as no right.
        self.rights = np.zeros(geometry.leaf, dtype=np.uint8)
        self.frame = np.full(geometry.leaf, -1, dtype=np.int32)
        # One pool of directory tables a level above the leaves; entry: row of the table below, or -1.
        self.directories = [np.full((1, 1 << geometry.bits[0]), -1, dtype=np.int32)]
        self.directories += [np.full((1, 1 << bits), -1, dtype=np.int32) for bits in geometry.bits[1:-1]]
        self.directory_rows = [1] + [0] * (len(geometry.bits) - 2)

    def walk(self, pages: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the slot (leaf row x entries + index) of each page, -1 where no leaf table exists.

        Parameters
        ----------
        pages : ndarray of int, shape (n,)
            Virtual page numbers.
        """
        pages, leaf = np.asarray(pages, dtype=np.int64), self.geometry.leaf
        table = pages >> self.geometry.bits[-1]
        # Neighbours in the list are mostly neighbours in memory: each run of pages in one leaf table is looked up once.
        starts = np.flatnonzero(np.append(len(pages) > 0, table[1:] != table[:-1]))
        row = np.repeat(self._leaf_rows(table[starts]), np.diff(starts, append=len(pages)))
        return np.where(row >= 0, row * leaf + (pages & (leaf - 1)), -1)

    def _leaf_rows(self, tables: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each leaf table, -1 where there is none."""
        row = np.zeros(len(tables), dtype=np.int64)
        below = sum(self.geometry.bits[:-1])
        known = (tables >= 0) & (tables < (1 << below))
        for level, bits in enumerate(self.geometry.bits[:-1]):
            below -= bits
            index = (tables >> below) & ((1 << bits) - 1)
            found = self.directories[level][np.where(known, row, 0), index]
            known &= found >= 0
            row = np.where(known, found, 0)
        return np.where(known, row, -1)

    def lookup(self, pages: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return right and frame of each page; 0 and -1 where nothing is mapped."""
        slots = self.walk(pages)
        there = slots >= 0
        rights = np.where(there, self.rights[slots], 0).astype(np.uint8)
        return rights, np.where(rights > 0, self.frame[slots], -1).astype(np.int32)

    def reserve(self, first: int, count: int) -> int:
        """Create the leaf tables of a range on consecutive rows and return the slot of page `first`.

        Leaf tables that exist already (a neighbour's) must be the ones in front of the new rows;
        otherwise the range cannot be contiguous and ValueError is raised.
        """
        leaf = self.geometry.leaf
        low, high = first // leaf, (first + count - 1) // leaf
        self._room(self.rows + high - low + 1)
        start = self._leaf_row(low)
        for table in range(low + 1, high + 1):
            if self._leaf_row(table) != start + table - low:
                raise ValueError(f"pages {first:#x}..{first + count - 1:#x}: leaf tables are not consecutive")
        return start * leaf + first % leaf

    def map(self, slot: int, count: int, frames: NDArray[np.integer] | int, right: int) -> None:
        """Write `count` entries from `slot`: consecutive frames from an int, or an array of frames."""
        at = slice(slot, slot + count)
        self.rights[at] = right
        if isinstance(frames, int):
            self.frame[at] = np.arange(frames, frames + count, dtype=np.int32)
        else:
            self.frame[at] = frames

    def protect(self, slot: int, count: int, right: int) -> None:
        """Change the right of `count` entries from `slot`."""
        self.rights[slot : slot + count] = right

    def unmap(self, slot: int, count: int) -> None:
        """Clear `count` entries from `slot`."""
        self.rights[slot : slot + count] = 0

    @property
    def tables(self) -> int:
        """Tables that exist, all levels."""
        return self.rows + sum(self.directory_rows)

    def _leaf_row(self, table: int) -> int:
        """Return the row of leaf table number `table`, creating it and its directories."""
        row, below = 0, sum(self.geometry.bits[:-1])
        if table < 0 or table >> below:
            raise ValueError(f"page {table * self.geometry.leaf:#x} is outside {self.geometry.va_bits} bits")
        last = len(self.geometry.bits) - 2
        for level, bits in enumerate(self.geometry.bits[:-1]):
            below -= bits
            index = (table >> below) & ((1 << bits) - 1)
            child = int(self.directories[level][row, index])
            if child < 0:
                child = self._new_leaf() if level == last else self._new_directory(level + 1)
                self.directories[level][row, index] = child
            row = child
        return row

    def _new_directory(self, level: int) -> int:
        row = self.directory_rows[level]
        if row == len(self.directories[level]):
            grown = np.full((max(4, 2 * row), self.directories[level].shape[1]), -1, dtype=np.int32)
            grown[:row] = self.directories[level]
            self.directories[level] = grown
        self.directory_rows[level] += 1
        return row

    def _new_leaf(self) -> int:
        row = self.rows
        if (row + 1) * self.geometry.leaf == len(self.rights):
            self._room(row + max(16, row))
        self.rows += 1
        return row

    def _room(self, rows: int) -> None:
        """Make the pools large enough for `rows` leaf tables, and the row that is never used."""
        more = (rows + 1) * self.geometry.leaf - len(self.rights)
        if more > 0:
            self.rights = np.concatenate([self.rights, np.zeros(more, dtype=np.uint8)])
            self.frame = np.concatenate([self.frame, np.full(more, -1, dtype=np.int32)])
