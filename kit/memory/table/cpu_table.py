"""The CPU's page table: leaf tables whose entries are of Linux's kinds, and what the hardware allows by them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.memory.columns import copy, fill
from kit.memory.table.leaf_tables import LeafTables, Slots
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, Bit, Kind, Leaf, Runs

__all__ = ["CpuTable"]

_LEAF = HPAGE_PMD_NR
_SHIFT = HPAGE_PMD_ORDER
_NONE, _PRESENT, _WRITABLE = int(Kind.NONE), int(Kind.PRESENT), int(Bit.WRITABLE)  # found sooner than the enums' own
_USED, _WRITTEN = (np.array(bits, dtype=np.uint8) for bits in (Bit.YOUNG, Bit.YOUNG | Bit.DIRTY))


class CpuTable(LeafTables):
    """x86-64 page table with Linux's entry kinds.

    ``kind``, ``bits``, ``frame`` and ``rights`` are columns over slots. ``rights`` is what the hardware allows and is
    kept in step by `set_entries` and `clear` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = np.zeros(_LEAF, dtype=np.uint8)
        self.bits = np.zeros(_LEAF, dtype=np.uint8)
        self.huge = False  # whether there may be leaves above the lowest level

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

    def set_entries(
        self, slots: Slots, kind: NDArray[np.integer] | int, bits: NDArray[np.integer] | int,
        frames: NDArray[np.integer] | int,
    ) -> None:  # fmt: skip
        """Write entries; an int stands for every slot. Rights follow from kind and bits."""
        self.kind[slots], self.bits[slots], self.frame[slots] = kind, bits, frames
        self._set_rights(slots, kind, bits)

    def set_present(self, slot: int, runs: Runs, bits: int, frames: NDArray[np.int32]) -> None:
        """`set_entries` for present entries that are alike: runs of pages from `slot` on, with frames by page."""
        fill(self.kind, slot, runs, _PRESENT)
        fill(self.bits, slot, runs, bits)
        fill(self.rights, slot, runs, 1 + (bits & _WRITABLE))
        copy(self.frame, slot, frames, 0, runs)

    def clear_runs(self, slot: int, runs: Runs) -> None:
        """`clear` for runs of pages from `slot` on."""
        fill(self.kind, slot, runs, _NONE)
        fill(self.bits, slot, runs, 0)
        fill(self.rights, slot, runs, 0)
        fill(self.frame, slot, runs, -1)

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

    def set_huge(self, number: int, kind: int, bits: int, pfn: int, level: int = Leaf.PMD) -> None:
        """Make leaf table `number` one leaf entry for 512 pages with consecutive frames from `pfn`."""
        row = self._leaf_row(number)
        self.leaf_level[row], self.huge = level, True
        self.set_entries(slice(row * _LEAF, (row + 1) * _LEAF), kind, bits, np.arange(pfn, pfn + _LEAF))

    def _room(self, rows: int) -> None:
        super()._room(rows)
        short = len(self.rights) - len(self.kind)
        if short:
            self.kind = np.concatenate([self.kind, np.zeros(short, dtype=np.uint8)])
            self.bits = np.concatenate([self.bits, np.zeros(short, dtype=np.uint8)])
