"""Every state that a page of an address space can be in, made by what a program and its drivers do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hmm.harness import ANON, RW, TWOMEG, Buffer, Fixture, Process, Program

from kit.drivers.dmirror_types import HMM_DMIRROR_EXCLUSIVE, HMM_DMIRROR_MIGRATE_TO_DEV
from kit.memory.reclaim.reclaim import reclaim_pages
from kit.memory.types import (
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MAP_HUGETLB,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_NONE,
    PROT_READ,
    VM_IO,
    VM_PFNMAP,
    Bit,
    Kind,
)

Builder = Callable[[Fixture], Program]
STAMP = 77


def entry_kind(p: Process, start: int) -> int:
    slot = p.mm.table.slots_of(np.array([start // PAGE]))[0]
    return int(p.mm.table.kind[slot]) if slot >= 0 else 0


# -- how one state follows from another


def area(prot: int = RW, flags: int = ANON, file: bool = False) -> Builder:
    """A mapped page that nobody has touched; never part of a huge one."""

    def build(t: Fixture) -> Program:
        start = yield from t.process.mmap(PAGE, prot, flags, t.create_file(PAGE) if file else None)
        assert start > 0
        if flags == ANON:
            assert (yield from t.process.madvise(start, PAGE, MADV_NOHUGEPAGE)) == 0
        return start

    return build


def of_vma(flag: int) -> Builder:
    """An untouched page of a VMA with a flag that keeps HMM out."""

    def build(t: Fixture) -> Program:
        start = yield from hole(t)
        t.process.mm.find(start // PAGE).flags |= flag
        return start

    return build


def stored(before: Builder, pages: int = 1) -> Builder:
    def build(t: Fixture) -> Program:
        start = yield from before(t)
        yield from t.process.store_stamps(start, np.arange(STAMP, STAMP + pages))
        return start

    return build


def loaded(before: Builder) -> Builder:
    def build(t: Fixture) -> Program:
        start = yield from before(t)
        yield from t.process.load_stamps(start, 1)
        return start

    return build


def protected(before: Builder, prot: int = PROT_READ, length: int = PAGE) -> Builder:
    def build(t: Fixture) -> Program:
        start = yield from before(t)
        assert (yield from t.process.mprotect(start, length, prot)) == 0
        return start

    return build


def commanded(before: Builder, device: int, what: int = HMM_DMIRROR_MIGRATE_TO_DEV, pages: int = 1) -> Builder:
    """The page after a command to one of the devices, which must have done it for all pages."""

    def build(t: Fixture) -> Program:
        start = yield from before(t)
        buffer = Buffer(start, pages * PAGE, t.mirror(pages), start)
        assert (yield from t.process.ioctl(t.fds[device], what, buffer, pages)) == 0
        assert buffer.cpages == pages
        return start

    return build


def with_bit(before: Builder, bit: int) -> Builder:
    def build(t: Fixture) -> Program:
        start = yield from before(t)
        table = t.process.mm.table
        slots = table.slots(start // PAGE, 1)
        table.set_bits(slots, int(table.bits[slots][0]) | bit)
        return start

    return build


# -- states of a kind of their own, and those that others are made of


def huge_hole(t: Fixture) -> Program:
    base = yield from t.process.mmap(2 * TWOMEG, RW, ANON)
    start = -(-base // TWOMEG) * TWOMEG
    assert (yield from t.process.madvise(start, TWOMEG, MADV_HUGEPAGE)) == 0
    return start


def gap(t: Fixture) -> Program:
    start = yield from hole(t)
    assert (yield from t.process.munmap(start, PAGE)) == 0
    return start


def anon_forked(t: Fixture) -> Program:
    start = yield from anon(t)
    t.children.append((yield from t.process.fork(Process.pause)))
    return start


def swapped(t: Fixture) -> Program:
    start = yield from anon(t)
    yield from reclaim_pages(t.process.mm, t.process.thread, start, PAGE)
    assert entry_kind(t.process, start) == Kind.SWAP
    return start


def hwpoison(t: Fixture) -> Program:
    start = yield from hole(t)
    table = t.process.mm.table
    table.set_entries(table.slots(start // PAGE, 1, create=True), int(Kind.HWPOISON), 0, 0)
    return start


def special_pte(t: Fixture) -> Program:
    """A pfn without a struct page in a mixed map."""
    start = yield from with_bit(anon, Bit.SPECIAL)(t)
    t.undo.append((start, 1))
    return start


def hugetlb_hole(t: Fixture) -> Program:
    return (yield from t.process.mmap(TWOMEG, RW, ANON | MAP_HUGETLB))


OWN, OTHER, COHERENT = range(3)  # devices: private, another private one, coherent
hole = area()
anon, huge_page = stored(hole), stored(huge_hole, 512)
private_own = commanded(anon, OWN)
STATES: dict[str, Builder] = {
    "gap": gap,
    "io_vma": of_vma(VM_IO),
    "pfnmap_vma": of_vma(VM_PFNMAP),
    "prot_none": protected(anon, PROT_NONE),
    "hole": hole,
    "hole_read_only": area(PROT_READ),
    "zero_page": loaded(hole),
    "anon": anon,
    "anon_read_only": protected(anon),
    "anon_forked": anon_forked,
    "swapped": swapped,
    "swapped_read_only": protected(swapped),
    "private_own": private_own,
    "private_own_read_only": protected(private_own),
    "private_other": commanded(anon, OTHER),
    "coherent": commanded(anon, COHERENT),
    "exclusive": commanded(anon, OWN, HMM_DMIRROR_EXCLUSIVE),
    "hwpoison": hwpoison,
    "protnone_pte": with_bit(anon, Bit.PROTNONE),  # what automatic NUMA balancing leaves: present, no access
    "special_pte": special_pte,
    "file_hole_read_only": area(PROT_READ, MAP_SHARED, file=True),
    "file_hole": area(RW, MAP_SHARED, file=True),
    "file_private_read": loaded(area(RW, MAP_PRIVATE, file=True)),
    "file_private_written": stored(area(RW, MAP_PRIVATE, file=True)),
    "huge_page": huge_page,
    "huge_page_read_only": protected(huge_page, length=TWOMEG),
    "huge_hole": huge_hole,
    "huge_zero_page": loaded(huge_hole),
    "huge_private_own": commanded(huge_page, OWN, pages=512),
    "huge_private_other": commanded(huge_page, OTHER, pages=512),
    "huge_coherent": commanded(huge_page, COHERENT, pages=512),
    "hugetlb": stored(hugetlb_hole, 512),
    "hugetlb_hole": hugetlb_hole,
}
