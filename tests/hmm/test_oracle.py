"""The vectorised kernel against a page-at-a-time oracle, on random address spaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from hmm.harness import ANON, RW, Buffer, Fixture, Process, Program
from hmm.migration import COMPOUND, MIGRATE, SYSTEM, VALID, WRITE, Device, Migration
from hmm.oracle import ERROR, NEW, RangeFault, cells_of, collected
from hmm.oracle import VALID as VALID_OUT
from hmm.probe import READ, SNAPSHOT, look
from hmm.probe import WRITE as REQ_WRITE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.drivers.dmirror_types import HMM_DMIRROR_EXCLUSIVE, HMM_DMIRROR_MIGRATE_TO_DEV
from kit.memory.device import migrate_vma
from kit.memory.reclaim.reclaim import reclaim_pages
from kit.memory.types import (
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE,
    PROT_NONE,
    PROT_READ,
    VM_IO,
    Bit,
    Kind,
)

BASE = 0x5000_0000_0000 // PAGE
SMALL = (
    "gap", "io", "none", "hole", "hole_ro", "zero", "anon", "anon_ro", "swapped", "private0", "private0_ro", "private1",
    "coherent", "exclusive", "file", "file_written", "forked", "protnone", "special", "hwpoison",
)  # fmt: skip
HUGE = ("huge", "huge_ro", "huge_zero", "huge_hole", "huge_private0", "huge_private1", "huge_coherent", "huge_forked")
small_block = st.lists(st.tuples(st.sampled_from(SMALL), st.integers(1, 12)), min_size=1, max_size=12)
huge_block = st.sampled_from(HUGE)
spaces = st.lists(st.one_of(small_block, small_block, huge_block), min_size=1, max_size=3)
requests = st.sampled_from([SNAPSHOT, READ, REQ_WRITE])
SETTINGS = settings(
    deadline=None,
    max_examples=600,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def build(t: Fixture, space: list[Any]) -> Program:
    """Make an address space from block descriptions, 512 pages each, from `BASE` on; first what a child shares."""
    parts = list(segments(space))
    shared = [part for part in parts if part[1].endswith("forked")]
    for at, name, count in shared:
        yield from segment(t, at, name, count)
    if shared:
        t.children.append((yield from t.process.fork(Process.pause)))
    for at, name, count in parts:
        if not name.endswith("forked"):
            yield from segment(t, at, name, count)


def segments(space: list[Any]) -> Iterator[tuple[int, str, int]]:
    for number, block in enumerate(space):
        at = BASE + 512 * number
        for name, count in [(block, 512)] if isinstance(block, str) else block:
            if at + count <= BASE + 512 * (number + 1):
                yield at, name, count
                at += count


def stamps(at: int, count: int) -> np.ndarray:
    return np.arange(at - BASE + 1, at - BASE + 1 + count, dtype=np.uint64)


def to_device(t: Fixture, unit: int, at: int, count: int, what: int = HMM_DMIRROR_MIGRATE_TO_DEV) -> Program:
    buffer = Buffer(at * PAGE, count * PAGE, t.mirror(count), at * PAGE)
    assert (yield from t.process.ioctl(t.fds[unit], what, buffer, count)) == 0
    assert buffer.cpages == count


def segment(t: Fixture, at: int, name: str, count: int) -> Program:
    p, start, size = t.process, at * PAGE, count * PAGE
    if name.startswith("huge"):
        yield from huge_block_of(t, at, name)
        return
    if name == "gap":
        return
    file = t.create_file(size) if name.startswith("file") else None
    prot = PROT_READ if name == "hole_ro" else RW
    flags = (MAP_PRIVATE if file else ANON) | MAP_FIXED
    assert (yield from p.mmap(size, prot, flags, file, addr=start)) == start
    assert (yield from p.madvise(start, size, MADV_NOHUGEPAGE)) == 0
    if name in ("zero", "file"):
        yield from p.load_stamps(start, count)
    elif name not in ("hole", "hole_ro", "hwpoison"):
        yield from p.store_stamps(start, stamps(at, count))
    table = p.mm.table
    if name == "io":
        p.mm.find(at).flags |= VM_IO
    elif name in ("none", "anon_ro"):
        assert (yield from p.mprotect(start, size, PROT_NONE if name == "none" else PROT_READ)) == 0
    elif name == "swapped":
        yield from reclaim_pages(p.mm, p.thread, start, size)
    elif name in ("private0", "private0_ro", "private1", "coherent"):
        yield from to_device(t, {"private1": 1, "coherent": 2}.get(name, 0), at, count)
        if name == "private0_ro":
            assert (yield from p.mprotect(start, size, PROT_READ)) == 0
    elif name == "exclusive":
        yield from to_device(t, 0, at, count, HMM_DMIRROR_EXCLUSIVE)
    elif name in ("protnone", "special"):
        bit = Bit.PROTNONE if name == "protnone" else Bit.SPECIAL
        slots = table.slots_of(np.arange(at, at + count))
        table.set_bits(slots, table.bits[slots] | np.uint8(bit))
        if name == "special":
            t.undo.append((start, count))
    elif name == "hwpoison":
        table.set_entries(table.slots(at, count, create=True), int(Kind.HWPOISON), 0, 0)


def huge_block_of(t: Fixture, at: int, name: str) -> Program:
    p, start, size = t.process, at * PAGE, 512 * PAGE
    assert (yield from p.mmap(size, RW, ANON | MAP_FIXED, addr=start)) == start
    assert (yield from p.madvise(start, size, MADV_HUGEPAGE)) == 0
    if name == "huge_zero":
        yield from p.load_stamps(start, 1)
    elif name != "huge_hole":
        yield from p.store_stamps(start, stamps(at, 512))
    if name == "huge_ro":
        assert (yield from p.mprotect(start, size, PROT_READ)) == 0
    elif name.endswith(("private0", "private1", "coherent")):
        yield from to_device(t, {"huge_private1": 1, "huge_coherent": 2}.get(name, 0), at, 512)


def window(data: st.DataObject, pages: int) -> tuple[int, int]:
    first = data.draw(st.integers(0, pages - 1), "first")
    return first, data.draw(st.integers(1, pages - first), "count")


def table_numbers(p: Process) -> set[int]:
    return set(p.mm.table.leaves(0, 1 << 36)[0].tolist())


def play(space: list[Any], check: Any) -> None:
    def program(t: Fixture) -> Program:
        yield from build(t, space)
        yield from check(t)

    Fixture.play(program, (0, 1, 2), payload_bytes=8, chunk_pages=4096, system_frames=1 << 15)


@SETTINGS
@given(
    space=spaces,
    default=requests,
    mask=st.sampled_from([0, READ, REQ_WRITE, (1 << 64) - 1]),
    owner=st.integers(-1, 2),
    data=st.data(),
)
def test_hmm_range_fault(space: list[Any], default: int, mask: int, owner: int, data: st.DataObject) -> None:
    first, count = window(data, 512 * len(space))
    pick = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    asked = np.where(pick.random(count) < data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]), "share"),
                     pick.choice(np.array([READ, REQ_WRITE, 1 << 62], dtype=np.uint64), count), 0).astype(np.uint64)  # fmt: skip
    inputs = asked | np.where(pick.random(count) < 0.1, np.uint64(5 << 58), np.uint64(0))

    def check(t: Fixture) -> Program:
        p, who = t.process, None if owner < 0 else t.system.devices[owner]
        oracle = RangeFault(
            cells_of(p.mm, BASE + first, count), BASE + first, table_numbers(p), inputs.tolist(), default, mask, who
        )
        wanted = oracle.run()
        result, entries = yield from look(p, (BASE + first) * PAGE, count, default, mask, inputs, who)
        assert result == wanted
        for at, (word, mine) in enumerate(zip(entries.tolist(), oracle.out, strict=True)):
            flags = 7 << 58 | 7 << 61 | 31 << 53
            known = oracle.cells[at].pfn != NEW or not mine & VALID_OUT
            seen = (word & flags, word & ~flags if known else 0), (mine & flags, mine & ~flags if known else 0)
            assert seen[0] == seen[1], (at, oracle.cells[at])
        after = cells_of(p.mm, BASE + first, count)
        for at, (cell, mine) in enumerate(zip(after, oracle.cells, strict=True)):
            if cell.vma is not None:
                assert (cell.kind, cell.write, cell.huge) == (mine.kind, mine.write, mine.huge), (at, cell, mine)

    play(space, check)


@SETTINGS
@given(
    space=spaces,
    select=st.integers(0, 15),
    owner=st.integers(-1, 2),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    data=st.data(),
)
def test_migrate_vma(space: list[Any], select: int, owner: int, share: float, data: st.DataObject) -> None:
    pages = 512 * len(space)
    first, count = window(data, pages)
    pick, cut = (
        np.random.default_rng(data.draw(st.integers(0, 99), "seed")),
        data.draw(st.booleans(), "cut at the area"),
    )

    def check(t: Fixture) -> Program:
        p, who, memory = t.process, None if owner < 0 else t.system.devices[owner], t.system.memory
        at, size, vma = BASE + first, count, p.mm.find(BASE + first)
        if vma is not None and cut:
            size = min(count, vma.end - at)
        cells = cells_of(p.mm, at, size)
        tables = table_numbers(p)
        contents = [int(memory.payload[cell.pfn, 0]) if cell.kind == Kind.PRESENT else None for cell in cells]
        migration = yield from Migration(t, at * PAGE, size, flags=select, pgmap_owner=who).setup()
        args = migration.args
        if vma is None or vma.flags & VM_IO or at + size > vma.end:
            assert migration.result == -22
            yield from p.mm.mmap_lock.read_release(p.thread)
            return
        assert migration.result == 0
        wanted, counted = collected(cells, at, tables, select, who)
        assert migration.src == [word & 0x3F for word in wanted]
        assert [int(word) >> 6 for word in args.src] == [word >> 6 for word in wanted]
        assert (args.cpages, args.npages) == (counted, size)
        assert not args.dst.any()
        moving = np.flatnonzero(args.src & np.uint64(MIGRATE))
        chosen = {int(each) for each in moving if pick.random() < share}
        moved = yield from give(t, migration, chosen)
        before = args.src.copy()
        yield from migration.pages()
        for each in range(size):
            word = int(args.src[each])
            if each in moved:
                assert word & MIGRATE or not may_move(cells[each]), (each, cells[each])
            elif each not in split_of(before, moved):
                assert not word & MIGRATE, each
        src = args.src.copy()
        yield from migration.finalize()
        after = cells_of(p.mm, at, size)
        for each, (was, now) in enumerate(zip(cells, after, strict=True)):
            word, new = int(src[each]), int(args.dst[each]) >> 6
            if each in moved and word & MIGRATE and not before[each] & np.uint64(COMPOUND):
                assert now.pfn == new, (each, was, now)
                if contents[each] is not None and word & VALID:
                    assert int(memory.payload[now.pfn, 0]) == contents[each]
            elif was.kind == Kind.PRESENT and not was.huge:
                assert (now.kind, now.pfn, now.write) == (was.kind, was.pfn, was.write), (each, was, now)

    play(space, check)


def may_move(cell: Any) -> bool:
    """Whether nothing can keep a collected page from its place on a device: it is anonymous."""
    return bool(cell.anon)


def split_of(src: np.ndarray, moved: set[int]) -> set[int]:
    """Pages of huge entries that were given small destinations."""
    return {head + each for head in moved if src[head] & np.uint64(COMPOUND) for each in range(512)}


def give(t: Fixture, migration: Migration, chosen: set[int]) -> Program:
    """Give the chosen entries destinations: of host memory if they are the device's, else of a device of this test."""
    device = Device(t, 2048)
    moved = set()
    for at in sorted(chosen):
        word = int(migration.args.src[at])
        pfn = word >> 6
        if word & COMPOUND:
            continue  # left where it is: huge destinations have tests of their own
        if word & VALID and t.system.memory.pgmap[pfn]:
            new = t.system.memory.alloc_pages(1)
            t.system.memory.trylock(new)
        else:
            new = np.array([device.alloc()])
        if word & VALID:
            t.system.memory.copy(np.array([pfn]), new)
        else:
            t.system.memory.zero(new)
        migration.args.dst[at] = int(new[0]) << 6 | VALID | word & WRITE
        moved.add(at)
    yield from ()
    return moved


def test_the_oracle_knows_an_error_entry() -> None:
    assert ERROR == 1 << 61
    assert int(migrate_vma.MIGRATE_VMA_SELECT_SYSTEM) == SYSTEM
