"""hmm_range_fault and migrate_vma, a page at a time, from the reference's tables: slow, plain, and independent of the kernel.

An oracle works on `Cell` objects, one a page, read off the page table once. It knows no pfn of a page that
is made during a fault: such entries are compared by their flags alone (`NEW`).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import numpy as np

from kit.memory.space.mm import Mm
from kit.memory.types import PG, VM_HUGEPAGE, VM_IO, VM_PFNMAP, VM_READ, VM_WRITE, Bit, Kind

VALID, WRITE, ERROR = 1 << 63, 1 << 62, 1 << 61
STICKY = 7 << 58
NINE = 9 << 53
NEW = -1  # a pfn that the fault made up
AGAIN = "again"
EFAULT, EPERM = -errno.EFAULT, -errno.EPERM


@dataclass
class Cell:
    """One virtual page: its area, its entry, and what lies behind the entry."""

    vma: Any  # None: no area
    readable: bool
    writable: bool  # the area
    anonymous: bool
    refused: bool  # IO, PFNMAP or not readable
    kind: int
    write: bool = False  # the entry
    protnone: bool = False
    special: bool = False
    pfn: int = 0
    huge: bool = False
    zero: bool = False
    owner: object = None  # of a device page
    coherent: bool = False
    exclusive: bool = False  # the anonymous page belongs to this mm alone
    mapping: bool = True  # the page has one: it is anonymous or in a file
    anon: bool = True  # the page is anonymous
    swap_exclusive: bool = True


def cells_of(mm: Mm, first: int, count: int) -> list[Cell]:
    """Read the state of every page, one by one."""
    memory, table, made = mm.memory, mm.table, []
    for page in range(first, first + count):
        vma = mm.find(page)
        if vma is None:
            made.append(Cell(None, False, False, False, True, Kind.NONE))
            continue
        flags = vma.flags
        refused = bool(flags & (VM_IO | VM_PFNMAP)) or not flags & VM_READ
        cell = Cell(vma, bool(flags & VM_READ), bool(flags & VM_WRITE), vma.is_anonymous, refused, Kind.NONE)
        made.append(cell)
        row = table.row_of(page >> 9)
        if row < 0:
            continue
        slot = row * 512 + page % 512
        bits = int(table.bits[slot])
        cell.kind, cell.pfn = int(table.kind[slot]), int(table.frame[slot])
        cell.write, cell.protnone = bool(bits & Bit.WRITABLE), bool(bits & Bit.PROTNONE)
        cell.special, cell.huge = bool(bits & Bit.SPECIAL), bool(table.leaf_level[row])
        if cell.kind in (Kind.PRESENT, Kind.MIGRATION, Kind.DEVICE_PRIVATE, Kind.DEVICE_EXCLUSIVE):
            cell.zero = cell.pfn == 0 or 0 <= memory.huge_zero <= cell.pfn < memory.huge_zero + 512
            if cell.zero:
                cell.special = False
            pgmap = memory.pgmaps[int(memory.pgmap[cell.pfn])]
            cell.owner = None if pgmap is None else pgmap.owner
            cell.coherent = pgmap is not None and cell.kind == Kind.PRESENT
            cell.exclusive = bool(memory.flags[cell.pfn] & PG.ANON_EXCLUSIVE)
            head = int(memory.head(np.array([cell.pfn]))[0])
            cell.anon = bool(memory.flags[head] & PG.ANON)
            cell.mapping = bool(memory.mapping[cell.pfn])
        elif cell.kind == Kind.SWAP:
            cell.swap_exclusive = int(memory.swap.count[cell.pfn]) == 1
    return made


def hole_end(page: int, tables: set[int]) -> int:
    """Where the hole around a page without leaf table ends: that of the highest level at which nothing is."""
    shift = 9
    while shift < 36 and not any(page >> shift + 9 == number >> shift for number in tables):
        shift += 9
    return (page >> shift) + 1 << shift


class RangeFault:
    """One caller's loop around hmm_range_fault, over pages [0, len(cells)); `tables` are the leaf tables that exist."""

    def __init__(
        self, cells: list[Cell], first: int, tables: set[int], inputs: list[int], default: int, mask: int, owner: object
    ) -> None:
        self.cells, self.first, self.tables, self.given = cells, first, set(tables), inputs
        self.default, self.mask, self.owner = default, mask, owner
        self.out = list(inputs)
        self.last, self.stale, self.restarts = 0, False, 0

    def run(self) -> int:
        while True:
            if self.stale:  # -EBUSY to the caller, who starts afresh
                self.out, self.last, self.stale = list(self.given), 0, False
                self.restarts += 1
                assert self.restarts < 50
            result = self.walk()
            if result is not AGAIN:
                return result

    def need(self, low: int, high: int, cpu: int) -> tuple[bool, bool]:
        """Whether pages [low, high) together need a fault, and a write fault."""
        fault = write = False
        for at in range(low, high):
            asked = self.out[at] & self.mask | self.default
            if not asked & VALID:
                continue
            if asked & WRITE and not cpu & WRITE:
                fault = write = True
            elif not cpu & VALID:
                fault = True
        return fault, write

    def put(self, at: int, value: int) -> None:
        self.out[at] = self.out[at] & STICKY | value

    def walk(self) -> object:
        at, end = self.last, len(self.cells)
        while at < end:
            cell, stop = self.cells[at], at
            while stop < end and self.cells[stop].vma is cell.vma:
                stop += 1
            if cell.vma is None or cell.refused:
                if self.need(at, stop, 0)[0]:
                    return EFAULT
                for each in range(at, stop):
                    self.put(each, ERROR)
                at = stop
                continue
            while at < stop:
                result, at = self.span(at, stop)
                if result != 0:
                    return result
        return 0

    def span(self, at: int, stop: int) -> tuple[object, int]:
        """Visit what one directory entry covers, from `at`; return (result, where to go on)."""
        page = self.first + at
        if page >> 9 not in self.tables:
            end = min(stop, hole_end(page, self.tables) - self.first)
            fault, write = self.need(at, end, 0)
            if fault:
                return self.fault(at, end, write), at
            for each in range(at, end):
                self.put(each, 0)
            return 0, end
        end = min(stop, ((page >> 9) + 1 << 9) - self.first)
        if self.cells[at].huge:
            return self.leaf(at, end), end
        for each in range(at, end):
            result = self.entry(each, end)
            if result != 0:
                return result, each
        return 0, end

    def leaf(self, at: int, end: int) -> object:
        cell = self.cells[at]
        own = cell.kind == Kind.DEVICE_PRIVATE and self.owner is not None and cell.owner is self.owner
        if own or cell.kind == Kind.PRESENT:
            cpu = 0 if cell.protnone else VALID | NINE | (WRITE if cell.write else 0)
            fault, write = (False, False) if own else self.need(at, end, cpu)
            if fault:
                return self.fault(at, end, write)
            for each in range(at, end):
                self.show(each, cpu)
            return 0
        fault, write = self.need(at, end, 0)
        if fault:
            return self.fault(at, end, write) if cell.kind == Kind.DEVICE_PRIVATE else EFAULT
        for each in range(at, end):
            self.put(each, ERROR)
        return 0

    def show(self, at: int, cpu: int) -> None:
        self.put(at, cpu | max(self.cells[at].pfn, 0))

    def entry(self, at: int, end: int) -> object:
        cell = self.cells[at]
        if cell.kind == Kind.DEVICE_PRIVATE and self.owner is not None and cell.owner is self.owner:
            self.show(at, VALID | (WRITE if cell.write else 0))
            return 0
        if cell.kind != Kind.PRESENT:
            fault, write = self.need(at, at + 1, 0)
            if not fault:
                self.put(at, 0)
                return 0
            if cell.kind in (Kind.NONE, Kind.SWAP, Kind.DEVICE_PRIVATE, Kind.DEVICE_EXCLUSIVE):
                return self.fault(at, end, write)
            return EFAULT
        cpu = 0 if cell.protnone else VALID | (WRITE if cell.write else 0)
        fault, write = self.need(at, at + 1, cpu)
        if fault:
            return self.fault(at, end, write)
        if cell.special:
            if self.need(at, at + 1, 0)[0]:
                return EFAULT
            self.put(at, ERROR)
            return 0
        self.show(at, cpu)
        return 0

    # handle_mm_fault, a page at a time

    def fault(self, at: int, end: int, write: bool) -> object:
        self.last = at
        if write and not self.cells[at].writable:
            return EPERM
        for each in range(at, end):
            if not self.handle(each, write):
                return EFAULT
        return AGAIN

    def handle(self, at: int, write: bool) -> bool:
        cell = self.cells[at]
        if cell.kind == Kind.HWPOISON:
            return False
        if cell.kind == Kind.NONE:
            number = self.first + at >> 9
            huge = number not in self.tables and cell.anonymous and cell.vma.flags & VM_HUGEPAGE
            self.tables.add(number)
            if huge and cell.vma.first <= number << 9 and (number + 1) << 9 <= cell.vma.end:
                self.whole(at, write, zero=not write)
                return True
            if cell.anonymous and not write:
                self.present(cell, 0, False, zero=True)
            elif cell.anonymous:
                self.present(cell, NEW, True)
            else:  # a private file mapping: the page cache, or a copy of it
                self.present(cell, NEW, write, anon=write)
            return True
        if cell.kind == Kind.SWAP:
            self.present(cell, NEW, cell.writable and (cell.swap_exclusive or write))
            return True
        if cell.kind == Kind.DEVICE_PRIVATE:
            self.stale = True  # its migration home invalidates
            if cell.huge:
                base = at - (self.first + at) % 512
                for other in range(max(base, 0), min(base + 512, len(self.cells))):
                    self.present(self.cells[other], NEW, self.cells[other].write)
                    self.cells[other].huge = True
            else:
                self.present(cell, NEW, cell.write)
        elif cell.kind == Kind.DEVICE_EXCLUSIVE:
            self.stale = True
            self.present(cell, cell.pfn, True)
        elif cell.protnone:
            cell.protnone = False
            cell.write = cell.writable and cell.exclusive
        if write and not cell.write:
            self.copy(at, cell)
        return True

    def copy(self, at: int, cell: Cell) -> None:
        """do_wp_page: take the page over when it is this mm's alone, else copy it."""
        if cell.huge and cell.zero:  # a huge page of its own
            self.stale = True
            self.whole(at, True)
            return
        if cell.huge and not cell.exclusive:
            base = at - (self.first + at) % 512  # split, then page by page
            self.stale = True
            for other in range(max(base, 0), min(base + 512, len(self.cells))):
                self.cells[other].huge = False
        if cell.exclusive and not cell.zero:
            cell.write = True
            return
        self.stale = True
        self.present(cell, NEW, True)

    def whole(self, at: int, write: bool, zero: bool = False) -> None:
        """The 2 MiB around a page become one new huge page, or the huge zero page."""
        base = at - (self.first + at) % 512
        for other in range(max(base, 0), min(base + 512, len(self.cells))):
            self.present(self.cells[other], NEW, write, zero)
            self.cells[other].huge = True

    def present(self, cell: Cell, pfn: int, write: bool, zero: bool = False, anon: bool = True) -> None:
        cell.kind, cell.pfn, cell.write, cell.zero, cell.huge = int(Kind.PRESENT), pfn, write, zero, False
        cell.owner, cell.coherent, cell.exclusive, cell.anon = None, False, anon and not zero, anon


MIGRATE, COMPOUND, SRC_VALID, SRC_WRITE = 2, 16, 1, 8
SYSTEM, PRIVATE, COHERENT, WHOLE = 1, 2, 4, 8


def collected(cells: list[Cell], first: int, tables: set[int], select: int, owner: object) -> tuple[list[int], int]:
    """What migrate_vma_setup leaves in src when nothing is pinned, locked or shared with a cache: (src, cpages).

    `tables` are the leaf tables before the call.
    """
    src, at = [], 0
    while at < len(cells):
        cell, page = cells[at], first + at
        whole = page % 512 == 0 and at + 512 <= len(cells) and bool(select & WHOLE)
        if page >> 9 not in tables:
            end = min(len(cells), hole_end(page, tables) - first)
            one = select & WHOLE and page % 512 == 0 and (first + end) % 512 == 0
            if not cell.anonymous:
                src += [0] * (end - at)
            else:
                src += [MIGRATE | COMPOUND] + [0] * (end - at - 1) if one else [MIGRATE] * (end - at)
            at = end
            continue
        if cell.huge:
            end = min(len(cells), ((page >> 9) + 1 << 9) - first)
            src += huge_entry(cells, at, end, select, owner, whole)
            at = end
            continue
        src.append(small_entry(cell, select, owner))
        at += 1
    return src, sum(bool(word & MIGRATE) for word in src)


def huge_entry(cells: list[Cell], at: int, end: int, select: int, owner: object, whole: bool) -> list[int]:
    cell, count = cells[at], end - at
    hole = [MIGRATE | COMPOUND] + [0] * (count - 1) if whole else [MIGRATE] * count
    if cell.kind == Kind.PRESENT:
        if not select & SYSTEM:
            return [0] * count
        if cell.zero:
            return hole
    elif cell.kind != Kind.DEVICE_PRIVATE or not select & PRIVATE or cell.owner is not owner:
        return [0] * count
    flags = SRC_VALID | MIGRATE | (SRC_WRITE if cell.write else 0)
    if whole:
        return [cell.pfn << 6 | flags | COMPOUND] + [0] * (count - 1)
    return [small_entry(each, select, owner) for each in cells[at:end]]  # split


def small_entry(cell: Cell, select: int, owner: object) -> int:
    flags = SRC_VALID | MIGRATE | (SRC_WRITE if cell.write else 0)
    if cell.kind == Kind.NONE:
        return MIGRATE if cell.anonymous else 0
    if cell.kind == Kind.DEVICE_PRIVATE:
        return cell.pfn << 6 | flags if select & PRIVATE and cell.owner is owner else 0
    if cell.kind != Kind.PRESENT or cell.special:
        return 0
    if cell.zero:
        return MIGRATE if select & SYSTEM else 0
    if cell.coherent:
        return cell.pfn << 6 | flags if select & COHERENT and cell.owner is owner else 0
    return cell.pfn << 6 | flags if select & SYSTEM and cell.mapping else 0
