"""migrate_vma_setup, _pages and _finalize: every row of the flags' life, and everything that keeps a page from moving."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
from hmm.harness import ANON, RW, TWOMEG, Buffer, Fixture, Process, Program, System
from hmm.migration import COMPOUND, MIGRATE, SYSTEM, VALID, WRITE, Device, Migration
from hmm.probe import Probe, flags, look
from hmm.states import STATES, entry_kind

from kit.drivers.dmirror_types import HMM_DMIRROR_MIGRATE_TO_DEV, HMM_DMIRROR_READ
from kit.memory.device import migrate_device as md
from kit.memory.device import migrate_vma
from kit.memory.faults.gup import get_user_pages, pin_user_pages_fast, unpin_user_pages
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.types import (
    FOLL_WRITE,
    MADV_NOHUGEPAGE,
    MAP_HUGETLB,
    MAP_SHARED,
    PAGE,
    PROT_READ,
    VM_DONTEXPAND,
    VM_IO,
    VM_MIXEDMAP,
    VM_PFNMAP,
    Kind,
)

EINVAL = -errno.EINVAL
MOVES = VALID | MIGRATE | WRITE


def run(program: Callable[[Fixture], Program], units: tuple[int, ...] = (0, 1, 2), **machine: int) -> System:
    return Fixture.play(program, units, **{"payload_bytes": 8, **machine})


def mapped(t: Fixture, pages: int = 4, prot: int = RW, stamps: bool = True) -> Program:
    start = yield from t.process.mmap(pages * PAGE, prot, ANON)
    assert (yield from t.process.madvise(start, pages * PAGE, MADV_NOHUGEPAGE)) == 0
    if stamps:
        yield from t.process.store_stamps(start, np.arange(10, 10 + pages))
    return start


def test_encodings() -> None:
    assert (VALID, MIGRATE, WRITE, COMPOUND) == (1, 2, 8, 16)
    selects = ("SYSTEM", "DEVICE_PRIVATE", "DEVICE_COHERENT", "COMPOUND")
    assert [int(getattr(migrate_vma, f"MIGRATE_VMA_SELECT_{name}")) for name in selects] == [1, 2, 4, 8]


# src after the setup with SELECT_SYSTEM, by the state of the page; huge ones without SELECT_COMPOUND.
COLLECTED = {
    "hole": MIGRATE,
    "hole_read_only": MIGRATE,
    "zero_page": MIGRATE,
    "anon": MOVES,
    "anon_read_only": VALID | MIGRATE,
    "anon_forked": VALID | MIGRATE,
    "swapped": 0,
    "private_own": 0,
    "private_other": 0,
    "coherent": 0,
    "exclusive": 0,
    "hwpoison": 0,
    "file_hole": 0,
    "file_private_written": MOVES,
    "huge_zero_page": MIGRATE,
    "huge_hole": MIGRATE,
}


@pytest.mark.parametrize("name", COLLECTED)
def test_collected_by_setup(name: str) -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES[name](t)
        before = entry_kind(t.process, start)
        migration = yield from Migration(t, start, 1).setup()
        assert migration.result == 0
        assert migration.src == [COLLECTED[name]]
        assert migration.args.cpages == bool(COLLECTED[name])
        assert migration.args.npages == 1
        assert list(migration.args.dst) == [0]
        if COLLECTED[name] & VALID:
            assert entry_kind(t.process, start) == Kind.MIGRATION
            assert t.system.memory.locked(int(migration.pfns[0]))
        else:
            assert migration.pfns[0] == 0
        yield from migration.finish()
        if not name.startswith("huge"):
            assert entry_kind(t.process, start) == before
        assert migration.src == [COLLECTED[name] & ~MIGRATE], "without a destination nothing has moved"

    run(program)


PRIVATE, COHERENT = (
    int(migrate_vma.MIGRATE_VMA_SELECT_DEVICE_PRIVATE),
    int(migrate_vma.MIGRATE_VMA_SELECT_DEVICE_COHERENT),
)


@pytest.mark.parametrize(
    ("name", "select", "owner", "collected"),
    [
        ("private_own", PRIVATE, 0, MOVES), ("private_own", PRIVATE, 1, 0), ("private_own", COHERENT, 0, 0),
        ("private_own", SYSTEM, 0, 0), ("private_own", SYSTEM | PRIVATE, 0, MOVES),
        ("private_own_read_only", PRIVATE, 0, VALID | MIGRATE), ("private_other", PRIVATE, 0, 0),
        ("coherent", COHERENT, 2, MOVES), ("coherent", COHERENT, 0, 0), ("coherent", PRIVATE, 2, 0),
        ("coherent", SYSTEM, 2, 0), ("anon", PRIVATE | COHERENT, 0, 0), ("zero_page", PRIVATE, 0, 0),
        ("hole", PRIVATE, 0, MIGRATE), ("file_private_read", PRIVATE, 0, 0),
    ],
)  # fmt: skip
def test_selected_by_flags_and_owner(name: str, select: int, owner: int, collected: int) -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES[name](t)
        migration = Migration(t, start, 1, flags=select, pgmap_owner=t.system.devices[owner])
        yield from migration.setup()
        assert (migration.result, migration.src) == (0, [collected])
        yield from migration.finish()

    run(program)


def test_what_setup_refuses() -> None:
    def program(t: Fixture) -> Program:
        p, start = t.process, (yield from mapped(t, 8))
        huge = yield from p.mmap(TWOMEG, RW, ANON | MAP_HUGETLB)
        vma = p.mm.find(start // PAGE)

        def refused(at: int = start, pages: int = 1, **how: object) -> Program:
            migration = yield from Migration(t, at, pages, **how).setup()
            yield from p.mm.mmap_lock.read_release(p.thread)
            assert migration.result == EINVAL

        yield from refused(vma=None)
        yield from refused(huge, vma=p.mm.find(huge // PAGE))
        for special in (VM_IO, VM_PFNMAP, VM_MIXEDMAP, VM_DONTEXPAND):
            vma.flags |= special
            yield from refused()
            vma.flags &= ~special
        yield from refused(start - PAGE, 1, vma=vma)
        yield from refused(start + 4 * PAGE, 5, vma=vma)
        yield from refused(start + 8 * PAGE, 1, vma=vma)
        yield from refused(end=start)
        yield from refused(end=start + PAGE - 1)  # rounded down to nothing
        yield from refused(src=np.zeros(0, dtype=np.uint64))
        yield from refused(dst=np.zeros(0, dtype=np.uint64))
        table = p.mm.table
        yield from refused(fault_page=int(table.frame[table.slots(start // PAGE, 1)][0]))  # not device-private
        private = yield from STATES["private_own"](t)
        pfn = int(table.frame[table.slots(private // PAGE, 1)][0])
        yield from refused(private, 1, fault_page=pfn)  # not locked

    run(program)


def test_a_range_across_areas_is_refused() -> None:
    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 8)
        assert (yield from t.process.mprotect(start + 4 * PAGE, 4 * PAGE, PROT_READ)) == 0
        migration = yield from Migration(t, start, 8).setup()
        assert migration.result == EINVAL
        yield from t.process.mm.mmap_lock.read_release(t.process.thread)

    run(program)


@pytest.mark.parametrize("coherent", [False, True])
def test_pages_holes_and_the_pages_a_driver_leaves_out(coherent: bool) -> None:
    """src and dst through all three steps."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t, coherent=coherent)
        start = yield from mapped(t, 6, stamps=False)
        yield from p.store_stamps(start, [10, 11, 12])  # pages 3, 4 and 5 are holes
        yield from p.load_stamps(start + 5 * PAGE, 1)  # and 5 the zero page
        migration = yield from Migration(t, start, 6, pgmap_owner=device).setup()
        assert migration.src == [MOVES] * 3 + [MIGRATE] * 3
        assert migration.args.cpages == 6
        old = migration.pfns[:3].copy()
        taken = migration.choose(device, {0, 1, 3, 5})
        dst = migration.args.dst.copy()
        yield from migration.pages()
        assert migration.src == [MOVES, MOVES, VALID | WRITE, MIGRATE, 0, MIGRATE]
        assert np.array_equal(migration.args.dst, dst), "dst is unchanged"
        assert all(t.system.memory.locked(int(pfn)) for pfn in [*old, *taken]), "both sides are still locked"
        yield from migration.finalize()
        assert not any(t.system.memory.locked(int(pfn)) for pfn in [*old, *taken])
        table = p.mm.table
        slots = table.slots(start // PAGE, 6)
        there = int(Kind.PRESENT if coherent else Kind.DEVICE_PRIVATE)
        assert table.kind[slots].tolist() == [there, there, Kind.PRESENT, there, Kind.NONE, there]
        assert table.frame[slots][[0, 1, 3, 5]].tolist() == taken
        assert table.frame[slots][2] == old[2]
        assert list((yield from p.load_stamps(start, 6))) == [10, 11, 12, 0, 0, 0]
        assert p.mm.rss["anon"] >= 5
        if not coherent:
            assert sorted(device.freed) == sorted(taken), "every touched page came home"

    run(program, ())


def test_a_migrated_page_keeps_its_right() -> None:
    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 4)
        assert (yield from p.mprotect(start, 2 * PAGE, PROT_READ)) == 0
        for first, pages in ((start, 2), (start + 2 * PAGE, 2)):
            yield from (yield from Migration(t, first, pages, pgmap_owner=device).setup()).finish(device)
        result, entries = yield from look(p, start, 4, owner=device)
        assert (result, flags(entries)) == (0, ["V", "V", "VW", "VW"])

    run(program, ())


def test_a_hole_is_writable_when_its_area_is() -> None:
    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 2, stamps=False)
        assert (yield from p.mprotect(start + PAGE, PAGE, PROT_READ)) == 0
        for first in (start, start + PAGE):
            yield from (yield from Migration(t, first, 1, pgmap_owner=device).setup()).finish(device)
        result, entries = yield from look(p, start, 2, owner=device)
        assert (result, flags(entries)) == (0, ["VW", "V"])

    run(program, ())


def test_a_hole_filled_by_somebody_else_meanwhile_stays_his() -> None:
    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 2, stamps=False)
        migration = yield from Migration(t, start, 2, pgmap_owner=device).setup()
        assert migration.src == [MIGRATE, MIGRATE]
        yield from p.store_stamps(start, [5])
        migration.choose(device)
        yield from migration.pages()
        assert migration.src == [0, MIGRATE]
        yield from migration.finalize()
        assert len(device.freed) == 1
        assert list((yield from p.load_stamps(start, 2))) == [5, 0]

    run(program, ())


def test_shared_and_file_pages_do_not_go_to_a_device() -> None:
    """They are collected, and fail only when the mapping is moved: their content was copied for nothing."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from p.mmap(2 * PAGE, RW, MAP_SHARED, t.create_file(2 * PAGE))
        yield from p.store_stamps(start, [1, 2])
        migration = yield from Migration(t, start, 2, pgmap_owner=device).setup()
        assert [each & (VALID | MIGRATE) for each in migration.src] == [VALID | MIGRATE] * 2
        assert migration.args.cpages == 2
        migration.choose(device)
        yield from migration.pages()
        assert [each & MIGRATE for each in migration.src] == [0, 0]
        yield from migration.finalize()
        assert len(device.freed) == 2
        assert list((yield from p.load_stamps(start, 2))) == [1, 2]

    run(program, ())


def stays(keep: Callable[[Fixture, int], Program], release: Callable[[Fixture, object], Program]) -> None:
    """Check that of four pages the second, held by somebody, is restored at setup and the others move."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 4)
        held = yield from keep(t, start + PAGE)
        migration = yield from Migration(t, start, 4, pgmap_owner=device).setup()
        assert migration.src == [MOVES, 0, MOVES, MOVES]
        assert migration.args.cpages == 3
        assert entry_kind(p, start + PAGE) == Kind.PRESENT
        yield from migration.finish(device)
        assert list((yield from p.load_stamps(start, 4))) == [10, 11, 12, 13]
        yield from release(t, held)
        migration = yield from Migration(t, start, 4, pgmap_owner=device).setup()
        assert migration.args.cpages == 4, "nothing holds it any more"
        yield from migration.finish()

    run(program, ())


def test_a_pinned_page_stays() -> None:
    def pin(t: Fixture, address: int) -> Program:
        return (yield from pin_user_pages_fast(t.process.mm, t.process.thread, address, 1, FOLL_WRITE))

    def unpin(t: Fixture, pfns: object) -> Program:
        unpin_user_pages(t.system.memory, pfns)
        yield from ()

    stays(pin, unpin)


def test_a_page_with_another_reference_stays() -> None:
    def get(t: Fixture, address: int) -> Program:
        return (yield from get_user_pages(t.process.mm, t.process.thread, address, 1, FOLL_WRITE))

    def put(t: Fixture, pfns: object) -> Program:
        t.system.memory.put(pfns)
        yield from ()

    stays(get, put)


def test_a_locked_page_stays() -> None:
    def lock(t: Fixture, address: int) -> Program:
        table = t.process.mm.table
        pfn = table.frame[table.slots(address // PAGE, 1)].copy()
        assert t.system.memory.trylock(pfn).all()
        yield from ()
        return pfn

    def unlock(t: Fixture, pfns: object) -> Program:
        t.system.memory.unlock(pfns)
        yield from ()

    stays(lock, unlock)


def test_a_page_off_the_lru_stays() -> None:
    def isolate(t: Fixture, address: int) -> Program:
        table = t.process.mm.table
        pfn = table.frame[table.slots(address // PAGE, 1)].copy()
        assert t.system.memory.lru_isolate(pfn).all()
        yield from ()
        return pfn

    def putback(t: Fixture, pfns: object) -> Program:
        t.system.memory.lru_putback(pfns)
        yield from ()

    stays(isolate, putback)


def test_a_late_reference_fails_the_page_after_its_copy() -> None:
    """folio_migrate_mapping wants exactly the references it knows of."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 3)
        migration = yield from Migration(t, start, 3, pgmap_owner=device).setup()
        migration.choose(device)
        late = migration.pfns[1:2].copy()
        t.system.memory.get(late)
        yield from migration.pages()
        assert migration.src == [MOVES, VALID | WRITE, MOVES]
        yield from migration.finalize()
        t.system.memory.put(late)
        assert entry_kind(p, start + PAGE) == Kind.PRESENT
        assert list((yield from p.load_stamps(start, 3))) == [10, 11, 12]

    run(program, ())


def test_a_forked_page_is_unmapped_everywhere() -> None:
    """try_to_migrate takes the other process's mapping too, and both get the new page."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 2)
        child = yield from p.fork(Process.pause)
        migration = yield from Migration(t, start, 2, pgmap_owner=device).setup()
        assert migration.src == [VALID | MIGRATE] * 2
        assert entry_kind(child, start) == Kind.MIGRATION
        yield from migration.finish(device)
        assert entry_kind(p, start) == entry_kind(child, start) == Kind.DEVICE_PRIVATE
        seen = []

        def grandchild(q: Process) -> Program:
            yield from q.store_stamps(start, [99])
            seen.extend((yield from q.load_stamps(start, 2)))

        third = yield from child.fork(grandchild)
        assert (yield from p.waitpid(third)) == "exited"
        assert seen == [99, 11]
        yield from p.kill(child)
        yield from p.waitpid(child)
        assert list((yield from p.load_stamps(start, 2))) == [10, 11]

    run(program, ())


def test_private_memory_of_a_dead_process_goes_back_to_its_device() -> None:
    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 4)
        yield from (yield from Migration(t, start, 4, pgmap_owner=device).setup()).finish(device)
        child = yield from p.fork(Process.pause)
        assert (yield from p.munmap(start, 4 * PAGE)) == 0
        assert not device.freed, "the child still has them"
        yield from p.kill(child)
        assert (yield from p.waitpid(child)) == "killed"
        assert len(device.freed) == 4

    run(program, ())


def test_events_of_a_migration() -> None:
    """MIGRATE with the owner at collect, and once more from the first hole to the end."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 8, stamps=False)
        yield from p.store_stamps(start, [1, 2])
        probe = yield from Probe(p, start, 8).insert()
        migration = yield from Migration(t, start, 8, pgmap_owner=device).setup()
        event = int(EVENTS.MIGRATE)
        assert probe.heard == [(event, start, start + 8 * PAGE, device)]
        yield from migration.finish(device)
        assert probe.heard[1:] == [(event, start + 2 * PAGE, start + 8 * PAGE, device)]
        probe.heard.clear()
        yield from p.load_stamps(start + PAGE, 1)
        assert probe.heard == [(event, start + PAGE, start + 2 * PAGE, device)]
        yield from probe.remove()

    run(program, ())


def test_the_whole_huge_page_is_one_entry() -> None:
    select = SYSTEM | int(migrate_vma.MIGRATE_VMA_SELECT_COMPOUND)

    def program(t: Fixture) -> Program:
        for name, first in (("huge_page", MOVES | COMPOUND), ("huge_hole", MIGRATE | COMPOUND),
                            ("huge_zero_page", MIGRATE | COMPOUND)):  # fmt: skip
            start = yield from STATES[name](t)
            migration = yield from Migration(t, start, 512, flags=select).setup()
            assert migration.src == [first] + [0] * 511
            assert migration.args.cpages == 1, "a huge entry counts once"
            yield from migration.finish()

    run(program)


@pytest.mark.parametrize("coherent", [False, True])
def test_a_huge_page_moves_whole(coherent: bool) -> None:
    """A present huge page of coherent memory is not selected as such, and is selected as the system's (by reading)."""
    whole = int(migrate_vma.MIGRATE_VMA_SELECT_COMPOUND)
    own = COHERENT if coherent else PRIVATE

    def program(t: Fixture) -> Program:
        p, device, memory = t.process, Device(t, coherent=coherent), t.system.memory
        start = yield from STATES["huge_page"](t)
        migration = yield from Migration(t, start, 512, flags=SYSTEM | whole, pgmap_owner=device).setup()
        head = device.alloc_huge()
        memory.copy(migration.pfns[0] + np.arange(512), head + np.arange(512))
        migration.args.dst[0] = head << 6 | VALID | WRITE | COMPOUND
        yield from migration.pages()
        assert migration.src == [MOVES | COMPOUND] + [0] * 511
        yield from migration.finalize()
        result, entries = yield from look(p, start, 512, owner=device)
        assert (result, set(flags(entries))) == (0, {"VW9"})
        assert p.mm.rss["anon"] == 512
        for select, taken in ((own | whole, not coherent), (SYSTEM | whole, coherent)):
            migration = yield from Migration(t, start, 512, flags=select, pgmap_owner=device).setup()
            assert migration.src == ([MOVES | COMPOUND] if taken else [0]) + [0] * 511
            yield from migration.finish()
        assert np.array_equal((yield from p.load_stamps(start, 512)), np.arange(77, 77 + 512))
        if not coherent:
            assert sorted(device.freed) == list(range(head, head + 512))

    run(program, ())


@pytest.mark.parametrize("pin", [False, True])
def test_a_page_held_in_a_huge_page_mapped_small_keeps_it_whole(pin: bool) -> None:
    """The folio cannot be split, so nothing from there to the end of the 2 MiB is collected."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t, 2048)
        start = yield from STATES["huge_page"](t)
        assert (
            yield from p.mprotect(start + 256 * PAGE, PAGE, PROT_READ)
        ) == 0  # the mapping is split, the folio is not
        assert (yield from p.mprotect(start + 256 * PAGE, PAGE, RW)) == 0
        take = pin_user_pages_fast if pin else get_user_pages
        taken = yield from take(p.mm, p.thread, start + 5 * PAGE, 1, FOLL_WRITE)
        migration = yield from Migration(t, start, 512, pgmap_owner=device).setup()
        assert migration.src == [0] * 512
        assert migration.args.cpages == 0
        yield from migration.finish(device)
        if pin:
            unpin_user_pages(t.system.memory, taken)
        else:
            t.system.memory.put(taken)
        migration = yield from Migration(t, start, 512, pgmap_owner=device).setup()
        assert migration.args.cpages == 512
        yield from migration.finish(device)
        assert np.array_equal((yield from p.load_stamps(start, 512)), np.arange(77, 77 + 512))

    run(program, ())


@pytest.mark.parametrize("pages", [511, 512, 100])
def test_a_huge_page_that_is_not_selected_whole_is_split(pages: int) -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES["huge_page"](t)
        select = SYSTEM | (int(migrate_vma.MIGRATE_VMA_SELECT_COMPOUND) if pages < 512 else 0)
        migration = yield from Migration(t, start, pages, flags=select).setup()
        assert migration.src == [MOVES] * pages
        assert migration.args.cpages == pages
        device = Device(t)
        yield from migration.finish(device)
        assert np.array_equal((yield from t.process.load_stamps(start, 512)), np.arange(77, 77 + 512))

    run(program)


def test_a_small_destination_splits_a_huge_source() -> None:
    select = SYSTEM | int(migrate_vma.MIGRATE_VMA_SELECT_COMPOUND)

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from STATES["huge_page"](t)
        migration = yield from Migration(t, start, 512, flags=select, pgmap_owner=device).setup()
        head = int(migration.pfns[0])
        for at in range(512):
            pfn = device.alloc()
            t.system.memory.copy(np.array([head + at]), np.array([pfn]))
            migration.args.dst[at] = pfn << 6 | VALID
        yield from migration.pages()
        assert migration.src == [MOVES] * 512, "COMPOUND is gone, every page has its own entry"
        assert np.array_equal(migration.pfns, np.arange(head, head + 512))
        yield from migration.finalize()
        assert np.array_equal((yield from p.load_stamps(start, 512)), np.arange(77, 77 + 512))

    run(program)


def test_everybody_hears_of_the_split_of_a_huge_source() -> None:
    """split_huge_pmd_address raises CLEAR over all 2 MiB, after the MIGRATE of the collection."""
    select = SYSTEM | int(migrate_vma.MIGRATE_VMA_SELECT_COMPOUND)

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from STATES["huge_page"](t)
        probe = yield from Probe(p, start, 512).insert()
        migration = yield from Migration(t, start, 512, flags=select, pgmap_owner=device).setup()
        probe.heard.clear()
        migration.args.dst[:] = [device.alloc() << 6 | VALID for _ in range(512)]
        yield from migration.pages()
        assert probe.heard == [(int(EVENTS.CLEAR), start, start + TWOMEG, None)]
        yield from migration.finalize()
        yield from probe.remove()

    run(program)


def test_everybody_hears_of_the_split_of_a_huge_zero_page() -> None:
    """Filling part of it makes the rest small zero pages (split_huge_pmd): no device may go on naming the huge one."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from STATES["huge_zero_page"](t)
        buffer = Buffer(start, TWOMEG, t.mirror(512), start)
        assert (yield from p.ioctl(t.fd, HMM_DMIRROR_READ, buffer, 512)) == 0
        probe = yield from Probe(p, start, 512).insert()
        migration = yield from Migration(t, start + 4 * PAGE, 8, pgmap_owner=device).setup()
        yield from migration.finish(device)
        migrate, clear, part = int(EVENTS.MIGRATE), int(EVENTS.CLEAR), (start + 4 * PAGE, start + 12 * PAGE)
        assert probe.heard == [(migrate, *part, device), (migrate, *part, device), (clear, start, start + TWOMEG, None)]
        assert not t.fd.load(start, start + TWOMEG)[0].any(), "the device has forgotten the huge zero page"
        assert entry_kind(p, start + 4 * PAGE) == Kind.DEVICE_PRIVATE
        yield from probe.remove()

    run(program)


def test_two_migrations_of_the_same_pages_do_not_wait_for_each_other() -> None:
    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 4)
        first = yield from Migration(t, start, 2, pgmap_owner=device).setup()

        def other(q: Process) -> Program:
            second = yield from Migration(t, start, 4, pgmap_owner=device, thread=q.thread).setup()
            assert second.src == [0, 0, MOVES, MOVES], "migration entries are skipped"
            yield from second.finish(device)

        yield from p.join(p.pthread_create(other))
        yield from first.finish(device)
        assert list((yield from p.load_stamps(start, 4))) == [10, 11, 12, 13]

    run(program, ())


def test_a_swap_cached_page_leaves_the_swap_cache() -> None:
    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from STATES["swapped"](t)
        yield from p.load_stamps(start, 1)
        migration = yield from Migration(t, start, 1, pgmap_owner=device).setup()
        assert migration.args.cpages == 1
        yield from migration.finish(device)
        assert entry_kind(p, start) == Kind.DEVICE_PRIVATE
        assert list((yield from p.load_stamps(start, 1))) == [77]

    run(program, ())


def test_migrate_device_range_brings_everything_home() -> None:
    """By device page frame, without an area: what a driver does when it is unloaded."""

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t, 1024)
        start = yield from mapped(t, 6)
        yield from (yield from Migration(t, start, 6, pgmap_owner=device).setup()).finish(device)
        child = yield from p.fork(Process.pause)
        src, dst = np.zeros(1024, dtype=np.uint64), np.zeros(1024, dtype=np.uint64)
        assert (yield from md.migrate_device_range(t.system.memory, p.thread, src, device.pgmap.first_pfn, 1024)) == 0
        moving = np.flatnonzero(src)
        assert len(moving) == 6
        assert ((src[moving] & np.uint64(0x3F)) == VALID | MIGRATE).all()
        for at in moving.tolist():
            new = t.system.memory.alloc_pages(1)
            t.system.memory.trylock(new)
            t.system.memory.copy(np.array([int(src[at]) >> 6]), new)
            dst[at] = int(new[0]) << 6 | VALID
        yield from md.migrate_device_pages(t.system.memory, p.thread, src, dst)
        yield from md.migrate_device_finalize(t.system.memory, p.thread, src, dst)
        assert len(device.freed) == 6
        for process in (p, child):
            assert [entry_kind(process, start + at * PAGE) for at in range(6)] == [Kind.PRESENT] * 6
        assert list((yield from p.load_stamps(start, 6))) == list(range(10, 16))
        yield from p.kill(child)
        yield from p.waitpid(child)

    run(program, ())


def test_a_driver_that_cannot_move_a_page_back_kills_the_program() -> None:
    """Failure of migrate_to_ram is SIGBUS."""
    from kit.errors import DriverError
    from kit.memory.types import VM_FAULT_SIGBUS

    def program(t: Fixture) -> Program:
        p, device = t.process, Device(t)
        start = yield from mapped(t, 1)
        yield from (yield from Migration(t, start, 1, pgmap_owner=device).setup()).finish(device)

        def broken(vmf: object, thread: object) -> Program:
            yield from ()
            return VM_FAULT_SIGBUS

        ops = device.pgmap.ops
        object.__setattr__(ops, "migrate_to_ram", broken)
        with pytest.raises(DriverError) as caught:
            yield from p.load_stamps(start, 1)
        assert (caught.value.errno, caught.value.status) == (errno.EFAULT, "SIGBUS")
        result, _ = yield from look(p, start, 1, 1 << 63)
        assert result == -errno.EFAULT
        object.__setattr__(ops, "migrate_to_ram", device.migrate_to_ram)
        assert list((yield from p.load_stamps(start, 1))) == [10]

    run(program, ())


def test_the_mirror_of_a_migrating_process_refaults() -> None:
    """An unrelated mirror hears of the migration and reads the same content again, from the device's page."""

    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from mapped(t, 4)
        buffer = Buffer(start, 4 * PAGE, t.mirror(4), start)
        assert (yield from p.ioctl(t.fds[1], HMM_DMIRROR_READ, buffer, 4)) == 0
        assert buffer.faults == 1
        assert (yield from p.ioctl(t.fds[0], HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0
        assert (yield from p.ioctl(t.fds[1], HMM_DMIRROR_READ, buffer, 4)) == 0
        assert buffer.faults == 1
        assert list(t.stamps(buffer.mirror, 4)) == [10, 11, 12, 13]

    run(program)
