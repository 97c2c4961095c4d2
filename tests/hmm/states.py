"""Every state that a page of an address space can be in, made by what a program and its drivers do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hmm.harness import ANON, RW, TWOMEG, Buffer, Fixture, Process, Program

from kit.drivers.dmirror_types import HMM_DMIRROR_EXCLUSIVE, HMM_DMIRROR_MIGRATE_TO_DEV
from kit.memory.reclaim import reclaim_pages
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
STATES: dict[str, Builder] = {}
STAMP = 77


def state(build: Builder) -> Builder:
    STATES[build.__name__] = build
    return build


def page(t: Fixture, prot: int = RW, flags: int = ANON, file: object = None, size: int = PAGE) -> Program:
    start = yield from t.process.mmap(size, prot, flags, file)
    assert start > 0
    if flags == ANON:
        assert (yield from t.process.madvise(start, size, MADV_NOHUGEPAGE)) == 0
    return start


def huge(t: Fixture, prot: int = RW) -> Program:
    base = yield from t.process.mmap(2 * TWOMEG, prot, ANON)
    start = -(-base // TWOMEG) * TWOMEG
    assert (yield from t.process.madvise(start, TWOMEG, MADV_HUGEPAGE)) == 0
    return start


def written(t: Fixture, start: int, pages: int = 1) -> Program:
    yield from t.process.store_stamps(start, np.arange(STAMP, STAMP + pages))
    return start


def command(t: Fixture, fd: object, what: int, start: int, pages: int = 1) -> Program:
    buffer = Buffer(start, pages * PAGE, t.mirror(pages), start)
    assert (yield from t.process.ioctl(fd, what, buffer, pages)) == 0
    assert buffer.cpages == pages
    return start


def entry_kind(p: Process, start: int) -> int:
    slot = p.mm.table.slots_of(np.array([start // PAGE]))[0]
    return int(p.mm.table.kind[slot]) if slot >= 0 else 0


@state
def gap(t: Fixture) -> Program:
    start = yield from page(t)
    assert (yield from t.process.munmap(start, PAGE)) == 0
    return start


@state
def io_vma(t: Fixture) -> Program:
    start = yield from page(t)
    t.process.mm.find(start // PAGE).flags |= VM_IO
    return start


@state
def pfnmap_vma(t: Fixture) -> Program:
    start = yield from page(t)
    t.process.mm.find(start // PAGE).flags |= VM_PFNMAP
    return start


@state
def prot_none(t: Fixture) -> Program:
    start = yield from written(t, (yield from page(t)))
    assert (yield from t.process.mprotect(start, PAGE, PROT_NONE)) == 0
    return start


@state
def hole(t: Fixture) -> Program:
    return (yield from page(t))


@state
def hole_read_only(t: Fixture) -> Program:
    return (yield from page(t, PROT_READ))


@state
def zero_page(t: Fixture) -> Program:
    start = yield from page(t)
    yield from t.process.load_stamps(start, 1)
    return start


@state
def anon(t: Fixture) -> Program:
    return (yield from written(t, (yield from page(t))))


@state
def anon_read_only(t: Fixture) -> Program:
    start = yield from anon(t)
    assert (yield from t.process.mprotect(start, PAGE, PROT_READ)) == 0
    return start


@state
def anon_forked(t: Fixture) -> Program:
    start = yield from anon(t)
    t.children.append((yield from t.process.fork(Process.pause)))
    return start


@state
def swapped(t: Fixture) -> Program:
    start = yield from anon(t)
    yield from reclaim_pages(t.process.mm, t.process.thread, start, PAGE)
    assert entry_kind(t.process, start) == Kind.SWAP
    return start


@state
def swapped_read_only(t: Fixture) -> Program:
    start = yield from swapped(t)
    assert (yield from t.process.mprotect(start, PAGE, PROT_READ)) == 0
    return start


@state
def private_own(t: Fixture) -> Program:
    return (yield from command(t, t.fds[0], HMM_DMIRROR_MIGRATE_TO_DEV, (yield from anon(t))))


@state
def private_own_read_only(t: Fixture) -> Program:
    start = yield from private_own(t)
    assert (yield from t.process.mprotect(start, PAGE, PROT_READ)) == 0
    return start


@state
def private_other(t: Fixture) -> Program:
    return (yield from command(t, t.fds[1], HMM_DMIRROR_MIGRATE_TO_DEV, (yield from anon(t))))


@state
def coherent(t: Fixture) -> Program:
    return (yield from command(t, t.fds[2], HMM_DMIRROR_MIGRATE_TO_DEV, (yield from anon(t))))


@state
def exclusive(t: Fixture) -> Program:
    return (yield from command(t, t.fds[0], HMM_DMIRROR_EXCLUSIVE, (yield from anon(t))))


@state
def hwpoison(t: Fixture) -> Program:
    start = yield from page(t)
    table = t.process.mm.table
    table.set_entries(table.slots(start // PAGE, 1, create=True), int(Kind.HWPOISON), 0, 0)
    return start


@state
def protnone_pte(t: Fixture) -> Program:
    """What automatic NUMA balancing leaves: present, no access, in an area that allows it."""
    start = yield from anon(t)
    table = t.process.mm.table
    slots = table.slots(start // PAGE, 1)
    table.set_bits(slots, int(table.bits[slots][0]) | Bit.PROTNONE)
    return start


@state
def special_pte(t: Fixture) -> Program:
    """A pfn without a struct page in a mixed map."""
    start = yield from anon(t)
    table = t.process.mm.table
    slots = table.slots(start // PAGE, 1)
    table.set_bits(slots, int(table.bits[slots][0]) | Bit.SPECIAL)
    t.undo.append((start, 1))
    return start


@state
def file_hole_read_only(t: Fixture) -> Program:
    return (yield from page(t, PROT_READ, MAP_SHARED, t.create_file(PAGE)))


@state
def file_hole(t: Fixture) -> Program:
    return (yield from page(t, RW, MAP_SHARED, t.create_file(PAGE)))


@state
def file_private_read(t: Fixture) -> Program:
    start = yield from page(t, RW, MAP_PRIVATE, t.create_file(PAGE))
    yield from t.process.load_stamps(start, 1)
    return start


@state
def file_private_written(t: Fixture) -> Program:
    return (yield from written(t, (yield from page(t, RW, MAP_PRIVATE, t.create_file(PAGE)))))


@state
def huge_page(t: Fixture) -> Program:
    return (yield from written(t, (yield from huge(t)), 512))


@state
def huge_page_read_only(t: Fixture) -> Program:
    start = yield from huge_page(t)
    assert (yield from t.process.mprotect(start, TWOMEG, PROT_READ)) == 0
    return start


@state
def huge_hole(t: Fixture) -> Program:
    return (yield from huge(t))


@state
def huge_zero_page(t: Fixture) -> Program:
    start = yield from huge(t)
    yield from t.process.load_stamps(start, 1)
    return start


@state
def huge_private_own(t: Fixture) -> Program:
    return (yield from command(t, t.fds[0], HMM_DMIRROR_MIGRATE_TO_DEV, (yield from huge_page(t)), 512))


@state
def huge_private_other(t: Fixture) -> Program:
    return (yield from command(t, t.fds[1], HMM_DMIRROR_MIGRATE_TO_DEV, (yield from huge_page(t)), 512))


@state
def huge_coherent(t: Fixture) -> Program:
    return (yield from command(t, t.fds[2], HMM_DMIRROR_MIGRATE_TO_DEV, (yield from huge_page(t)), 512))


@state
def hugetlb(t: Fixture) -> Program:
    start = yield from t.process.mmap(TWOMEG, RW, ANON | MAP_HUGETLB)
    return (yield from written(t, start, 512))


@state
def hugetlb_hole(t: Fixture) -> Program:
    return (yield from t.process.mmap(TWOMEG, RW, ANON | MAP_HUGETLB))
