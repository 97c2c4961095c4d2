"""The test driver beyond its own selftests: its ioctls' edges, exclusive access, eviction, and what outlives what."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
from hmm.harness import ANON, RW, TWOMEG, Buffer, Fixture, Process, Program, System
from hmm.probe import Probe
from hmm.states import STATES, entry_kind

from kit.drivers.dmirror_types import (
    HMM_DMIRROR_CHECK_EXCLUSIVE,
    HMM_DMIRROR_EXCLUSIVE,
    HMM_DMIRROR_FLAG_FAIL_ALLOC,
    HMM_DMIRROR_FLAGS,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
    HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
    HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE,
    HMM_DMIRROR_PROT_ERROR,
    HMM_DMIRROR_PROT_NONE,
    HMM_DMIRROR_PROT_PMD,
    HMM_DMIRROR_PROT_PUD,
    HMM_DMIRROR_PROT_READ,
    HMM_DMIRROR_PROT_WRITE,
    HMM_DMIRROR_PROT_ZERO,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_RELEASE,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
)
from kit.memory.faults.gup import pin_user_pages_fast, unpin_user_pages
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.types import (
    FOLL_LONGTERM,
    FOLL_WRITE,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_NOHUGEPAGE,
    MAP_SHARED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PROT_NONE,
    PROT_READ,
    Kind,
)

EINVAL, ENOENT, EPERM, EFAULT, ENOMEM = (
    -code for code in (errno.EINVAL, errno.ENOENT, errno.EPERM, errno.EFAULT, errno.ENOMEM)
)
COMMANDS = range(9)
BOTH = pytest.mark.parametrize("unit", [0, 2], ids=["private", "coherent"])


def run(program: Callable[[Fixture], Program], units: tuple[int, ...] = (0, 1, 2, 3), **machine: int) -> System:
    return Fixture.play(program, units, **{"payload_bytes": 8, **machine})


def filled(t: Fixture, pages: int, prot: int = RW) -> Program:
    """Map pages with stamps 10, 11, ..., and return a buffer over them."""
    start = yield from t.process.mmap(pages * PAGE, RW, ANON)
    assert (yield from t.process.madvise(start, pages * PAGE, MADV_NOHUGEPAGE)) == 0
    yield from t.process.store_stamps(start, np.arange(10, 10 + pages))
    if prot != RW:
        assert (yield from t.process.mprotect(start, pages * PAGE, prot)) == 0
    return Buffer(start, pages * PAGE, t.mirror(pages), start)


def command(t: Fixture, unit: int, what: int, buffer: Buffer, pages: int, first: int = 0) -> Program:
    """Run a command over pages [first, first + pages) of a buffer."""
    part = Buffer(buffer.ptr + first * PAGE, pages * PAGE, buffer.mirror[first * PAGE :], buffer.base)
    result = yield from t.process.ioctl(t.fds[unit], what, part, pages)
    buffer.cpages, buffer.faults = part.cpages, part.faults
    return result


def snapshot(t: Fixture, unit: int, buffer: Buffer, pages: int) -> Program:
    assert (yield from command(t, unit, HMM_DMIRROR_SNAPSHOT, buffer, pages)) == 0
    assert buffer.cpages == pages
    return buffer.mirror[:pages].tolist()


def test_the_numbers_of_test_hmm_uapi_h() -> None:
    assert list(COMMANDS) == [
        HMM_DMIRROR_READ, HMM_DMIRROR_WRITE, HMM_DMIRROR_MIGRATE_TO_DEV, HMM_DMIRROR_MIGRATE_TO_SYS, HMM_DMIRROR_SNAPSHOT,
        HMM_DMIRROR_EXCLUSIVE, HMM_DMIRROR_CHECK_EXCLUSIVE, HMM_DMIRROR_RELEASE, HMM_DMIRROR_FLAGS,
    ]  # fmt: skip
    assert [
        HMM_DMIRROR_PROT_NONE, HMM_DMIRROR_PROT_READ, HMM_DMIRROR_PROT_WRITE, HMM_DMIRROR_PROT_PMD,
        HMM_DMIRROR_PROT_PUD, HMM_DMIRROR_PROT_ZERO, HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
        HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE, HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL, HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
        HMM_DMIRROR_PROT_ERROR, HMM_DMIRROR_FLAG_FAIL_ALLOC,
    ] == [0, 1, 2, 4, 8, 0x10, 0x20, 0x30, 0x40, 0x50, 0xFF, 1]  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
def test_unaligned_empty_and_overflowing_ranges(what: int) -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 2)
        for ptr, pages in (
            (buffer.ptr + 8, 1), (buffer.ptr, 0), ((1 << 64) - PAGE, 1), ((1 << 64) - PAGE, 2), (buffer.ptr, 1 << 52),
            (buffer.ptr, (1 << 52) - 1),
        ):  # fmt: skip
            bad = Buffer(ptr, PAGE, buffer.mirror, ptr, cpages=-1, faults=-1)
            assert (yield from t.process.ioctl(t.fd, what, bad, pages)) == EINVAL, (hex(ptr), pages)
            assert (bad.cpages, bad.faults) == (-1, -1), "nothing is copied back"

    run(program)


def test_an_unknown_command() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 1)
        assert (yield from command(t, 0, 9, buffer, 1)) == EINVAL

    run(program)


def test_faults_counts_rounds_not_pages() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 100)
        assert (yield from command(t, 0, HMM_DMIRROR_READ, buffer, 100)) == 0
        assert (buffer.cpages, buffer.faults) == (100, 1)
        assert (yield from command(t, 0, HMM_DMIRROR_READ, buffer, 100)) == 0
        assert (buffer.cpages, buffer.faults) == (100, 0), "all of it is mapped"
        # The entries of a writable page are writable, so a write needs nothing either.
        assert (yield from command(t, 0, HMM_DMIRROR_WRITE, buffer, 100)) == 0
        assert (buffer.cpages, buffer.faults) == (100, 0)
        assert (yield from t.process.madvise(buffer.ptr + 50 * PAGE, PAGE, MADV_DONTNEED)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_READ, buffer, 100)) == 0
        assert (buffer.cpages, buffer.faults) == (100, 1)
        assert t.stamps(buffer.mirror, 100).tolist() == [*range(10, 60), 0, *range(61, 110)]

    run(program)


def test_a_range_with_a_hole_in_the_areas_faults_nowhere() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 8)
        assert (yield from t.process.munmap(buffer.ptr + 4 * PAGE, PAGE)) == 0
        before = buffer.mirror.copy()
        assert (yield from command(t, 0, HMM_DMIRROR_READ, buffer, 8)) == EFAULT
        assert np.array_equal(buffer.mirror, before), "nothing is copied out"

    run(program)


@BOTH
def test_slices_before_the_bad_area_stay_migrated(unit: int) -> None:
    """MIGRATE_TO_DEV goes area by area: -EINVAL at the first that it cannot have, and what was done stays done."""

    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 6)
        assert (yield from t.process.munmap(buffer.ptr + 4 * PAGE, PAGE)) == 0
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 6)) == EINVAL
        kinds = [entry_kind(t.process, buffer.ptr + at * PAGE) for at in range(4)]
        assert kinds == [Kind.PRESENT if unit == 2 else Kind.DEVICE_PRIVATE] * 4
        assert entry_kind(t.process, buffer.ptr + 5 * PAGE) == Kind.PRESENT
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_SYS, buffer, 6)) == EINVAL
        assert (yield from t.process.load_stamps(buffer.ptr, 4)).tolist() == [10, 11, 12, 13]

    run(program)


def test_areas_are_migrated_one_by_one() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 6)
        assert (yield from t.process.mprotect(buffer.ptr + 2 * PAGE, 2 * PAGE, PROT_READ)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 6)) == 0
        assert buffer.cpages == 6
        local = HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
        own = (
            [local | HMM_DMIRROR_PROT_WRITE] * 2
            + [local | HMM_DMIRROR_PROT_READ] * 2
            + [local | HMM_DMIRROR_PROT_WRITE] * 2
        )
        assert (yield from snapshot(t, 0, buffer, 6)) == own
        assert (yield from snapshot(t, 1, buffer, 6)) == [HMM_DMIRROR_PROT_NONE] * 6

    run(program)


def test_a_write_that_meets_an_own_read_only_private_page_fails() -> None:
    """hmm_range_fault returns such an entry before it looks at the request; the driver has no write then."""

    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 2)
        assert (yield from t.process.mprotect(buffer.ptr, 2 * PAGE, PROT_READ)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 2)) == 0
        assert (yield from t.process.mprotect(buffer.ptr, 2 * PAGE, RW)) == 0
        buffer.mirror[:] = 1
        assert (yield from command(t, 0, HMM_DMIRROR_WRITE, buffer, 2)) == EFAULT
        assert (yield from t.process.load_stamps(buffer.ptr, 2)).tolist() == [10, 11]

    run(program)


def test_a_filled_hole_is_read_only_for_the_device_at_first() -> None:
    """Its source had no WRITE, so neither has the device's entry, though the CPU's is writable; a write faults once."""

    def program(t: Fixture) -> Program:
        start = yield from t.process.mmap(4 * PAGE, RW, ANON)
        assert (yield from t.process.madvise(start, 4 * PAGE, MADV_NOHUGEPAGE)) == 0
        buffer = Buffer(start, 4 * PAGE, t.mirror(4), start)
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0
        assert (yield from snapshot(t, 0, buffer, 4)) == [
            HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_WRITE
        ] * 4
        buffer.mirror.view(np.uint64)[:: PAGE // 8] = [1, 2, 3, 4]
        assert (yield from command(t, 0, HMM_DMIRROR_WRITE, buffer, 4)) == 0
        assert (buffer.cpages, buffer.faults) == (4, 1)
        assert (yield from t.process.load_stamps(start, 4)).tolist() == [1, 2, 3, 4]

    run(program)


def test_pages_that_an_earlier_read_left_count_as_read_back() -> None:
    """cpages of MIGRATE_TO_DEV is what is in the device's table, where it is."""

    def program(t: Fixture) -> Program:
        start = yield from t.process.mmap(4 * PAGE, RW, MAP_SHARED, t.create_file(4 * PAGE))
        yield from t.process.store_stamps(start, [1, 2, 3, 4])
        buffer = Buffer(start, 4 * PAGE, t.mirror(4), start)
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == ENOENT
        assert (yield from command(t, 0, HMM_DMIRROR_READ, buffer, 4)) == 0
        # File pages cannot go, but their migration entries invalidated nothing of this device's: owner is its own.
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0
        assert buffer.cpages == 4
        assert t.stamps(buffer.mirror, 4).tolist() == [1, 2, 3, 4]

    run(program)


def test_a_swapped_out_page_is_not_brought_in() -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES["swapped"](t)
        buffer = Buffer(start, PAGE, t.mirror(1), start)
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 1)) == ENOENT
        assert entry_kind(t.process, start) == Kind.SWAP
        assert (yield from command(t, 0, HMM_DMIRROR_READ, buffer, 1)) == 0
        assert t.stamps(buffer.mirror, 1).tolist() == [77]

    run(program)


@BOTH
def test_one_failed_allocation_leaves_one_page_behind(unit: int) -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 4)
        assert (yield from command(t, unit, HMM_DMIRROR_FLAGS, buffer, HMM_DMIRROR_FLAG_FAIL_ALLOC)) == 0
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == ENOENT
        places = t.system.memory.pgmap[t.process.mm.table.frame[t.process.mm.table.slots(buffer.ptr // PAGE, 4)]]
        assert [bool(place) for place in places] == [False, True, True, True]
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0, "the flag is used up"
        assert buffer.cpages == 4
        assert (yield from t.process.load_stamps(buffer.ptr, 4)).tolist() == [10, 11, 12, 13]

    run(program)


def test_a_failed_allocation_ends_the_way_home() -> None:

    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 2)
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 2)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_FLAGS, buffer, HMM_DMIRROR_FLAG_FAIL_ALLOC)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_SYS, buffer, 2)) == 0
        assert buffer.cpages == 0, "the one without memory stays, and with it what came after it"
        assert (yield from t.process.load_stamps(buffer.ptr, 2)).tolist() == [10, 11]

    run(program)


@BOTH
def test_home_counts_each_page_and_a_huge_one_once(unit: int) -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 5)
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 3)) == 0
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_SYS, buffer, 5)) == 0
        assert buffer.cpages == 3
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_SYS, buffer, 5)) == 0
        assert buffer.cpages == 0
        start = yield from STATES["huge_private_own"](t)
        huge = Buffer(start, TWOMEG, t.mirror(512), start)
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_SYS, huge, 512)) == 0
        assert huge.cpages == 1
        assert (yield from t.process.load_stamps(start, 512)).tolist() == list(range(77, 77 + 512))

    run(program)


def test_a_huge_page_goes_to_a_coherent_device_page_by_page() -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES["huge_coherent"](t)
        huge = Buffer(start, TWOMEG, t.mirror(512), start)
        wanted = HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL | HMM_DMIRROR_PROT_WRITE
        assert (yield from snapshot(t, 2, huge, 512)) == [wanted] * 512
        assert (yield from command(t, 2, HMM_DMIRROR_MIGRATE_TO_SYS, huge, 512)) == 0
        assert huge.cpages == 512
        assert (yield from t.process.load_stamps(start, 512)).tolist() == list(range(77, 77 + 512))

    run(program)


def test_snapshots_of_every_kind_of_page() -> None:
    wanted = {
        "gap": HMM_DMIRROR_PROT_ERROR, "prot_none": HMM_DMIRROR_PROT_ERROR, "hole": HMM_DMIRROR_PROT_NONE,
        "zero_page": HMM_DMIRROR_PROT_ZERO | HMM_DMIRROR_PROT_READ, "anon": HMM_DMIRROR_PROT_WRITE,
        "anon_read_only": HMM_DMIRROR_PROT_READ, "anon_forked": HMM_DMIRROR_PROT_READ,
        "swapped": HMM_DMIRROR_PROT_NONE, "exclusive": HMM_DMIRROR_PROT_NONE,
        "private_own": HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_WRITE,
        "private_own_read_only": HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_READ,
        "private_other": HMM_DMIRROR_PROT_NONE,
        "coherent": HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE | HMM_DMIRROR_PROT_WRITE,
        "huge_page": HMM_DMIRROR_PROT_WRITE | HMM_DMIRROR_PROT_PMD,
        "huge_private_own": HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL | HMM_DMIRROR_PROT_WRITE | HMM_DMIRROR_PROT_PMD,
        "huge_private_other": HMM_DMIRROR_PROT_ERROR,
        "hugetlb": HMM_DMIRROR_PROT_WRITE | HMM_DMIRROR_PROT_PMD,
    }  # fmt: skip

    def program(t: Fixture) -> Program:
        for name, byte in wanted.items():
            start = yield from STATES[name](t)
            pages = 512 if name.startswith("huge") else 1
            buffer = Buffer(start, pages * PAGE, t.mirror(pages), start)
            assert (yield from snapshot(t, 0, buffer, pages)) == [byte] * pages, name

    run(program)


# Exclusive access


def test_exclusive_is_lost_to_any_touch_and_only_for_that_page() -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 4))
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 4)) == 0
        assert buffer.cpages == 4
        assert t.stamps(buffer.mirror, 4).tolist() == [10, 11, 12, 13]
        assert [entry_kind(p, buffer.ptr + at * PAGE) for at in range(4)] == [Kind.DEVICE_EXCLUSIVE] * 4
        probe = yield from Probe(p, buffer.ptr, 4).insert()
        yield from p.load_stamps(buffer.ptr + PAGE, 1)
        clear = int(EVENTS.CLEAR)
        assert probe.heard == [(clear, buffer.ptr + PAGE, buffer.ptr + 2 * PAGE, None)]
        yield from probe.remove()
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 4)) == EPERM
        # Only page 1 was touched. The driver's erase is inclusive of the end and may take page 2's entry too.
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 1, first=1)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 1, first=0)) == EPERM
        yield from p.store_stamps(buffer.ptr, [20, 21, 22, 23])
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 4)) == 0

    run(program)


def test_an_exclusive_entry_is_not_a_writable_one() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 2)
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 2)) == 0
        buffer.mirror.view(np.uint64)[:: PAGE // 8] = [1, 2]
        assert (yield from command(t, 0, HMM_DMIRROR_WRITE, buffer, 2)) == 0
        assert buffer.faults == 1, "the tag is atomic, so the write faults, which takes the exclusive access away"
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 2)) == 0
        assert (yield from t.process.load_stamps(buffer.ptr, 2)).tolist() == [1, 2]

    run(program)


def test_exclusive_needs_anonymous_writable_memory() -> None:
    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from p.mmap(PAGE, RW, MAP_SHARED, t.create_file(PAGE))
        yield from p.store_stamps(start, [1])
        shared = Buffer(start, PAGE, t.mirror(1), start)
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, shared, 1)) == -errno.EOPNOTSUPP
        for prot in (PROT_READ, PROT_NONE):
            buffer = yield from filled(t, 1, prot)
            assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 1)) == EFAULT
        gap = Buffer(buffer.ptr, PAGE, buffer.mirror, 0)
        assert (yield from p.munmap(buffer.ptr, PAGE)) == 0
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, gap, 1)) == EFAULT

    run(program)


def test_two_devices_take_exclusive_access_in_turn() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 3)
        for unit in (0, 1, 0):
            assert (yield from command(t, unit, HMM_DMIRROR_EXCLUSIVE, buffer, 3)) == 0
            assert buffer.cpages == 3
            assert (yield from command(t, unit, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 3)) == EPERM
            assert (yield from command(t, 1 - unit, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 3)) == 0
        assert (yield from t.process.load_stamps(buffer.ptr, 3)).tolist() == [10, 11, 12]

    run(program)


def test_exclusive_of_pages_of_every_kind() -> None:
    """get_user_pages brings in what is not there, and splits what is huge."""

    def program(t: Fixture) -> Program:
        for name, stamp in (("hole", 0), ("zero_page", 0), ("swapped", 77), ("private_own", 77), ("private_other", 77),
                            ("anon_forked", 77), ("huge_page", 77), ("exclusive", 77)):  # fmt: skip
            start = yield from STATES[name](t)
            buffer = Buffer(start, PAGE, t.mirror(1), start)
            assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 1)) == 0, name
            assert entry_kind(t.process, start) == Kind.DEVICE_EXCLUSIVE
            assert t.stamps(buffer.mirror, 1).tolist() == [stamp]
            assert (yield from t.process.load_stamps(start, 1)).tolist() == [stamp]

    run(program)


def test_fork_gives_exclusive_pages_back() -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 3))
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 3)) == 0
        child = yield from p.fork(Process.pause)
        assert [entry_kind(p, buffer.ptr + at * PAGE) for at in range(3)] == [Kind.PRESENT] * 3
        assert [entry_kind(child, buffer.ptr + at * PAGE) for at in range(3)] == [Kind.PRESENT] * 3
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 3)) == 0
        yield from p.kill(child)
        yield from p.waitpid(child)

    run(program)


def test_fork_fails_while_somebody_has_an_exclusive_page_locked() -> None:
    """copy_page_range gives up with -EBUSY at that page, having shared those before it; the program sees -ENOMEM."""

    def program(t: Fixture) -> Program:
        p, memory, buffer = t.process, t.system.memory, (yield from filled(t, 4))
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 4)) == 0
        pages = p.mm.table.slots(buffer.ptr // PAGE, 4)
        locked = p.mm.table.frame[pages][2:3].copy()
        assert memory.trylock(locked).all()
        assert (yield from p.fork(Process.pause)) == ENOMEM
        assert p.mm.table.kind[pages].tolist() == [Kind.PRESENT] * 2 + [Kind.DEVICE_EXCLUSIVE] * 2
        assert p.mm.table.rights[pages].tolist() == [1, 1, 0, 0], "what the dead child shared is read-only"
        memory.unlock(locked)
        t.system.check()
        child = yield from p.fork(Process.pause)
        assert p.mm.table.kind[pages].tolist() == [Kind.PRESENT] * 4
        assert (yield from child.load_stamps(buffer.ptr, 4)).tolist() == [10, 11, 12, 13]
        yield from p.kill(child)
        yield from p.waitpid(child)

    run(program)


def test_unmapping_exclusive_pages_frees_them() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 8)
        free = t.system.memory.free_pages
        assert (yield from command(t, 0, HMM_DMIRROR_EXCLUSIVE, buffer, 8)) == 0
        assert (yield from t.process.munmap(buffer.ptr, 4 * PAGE)) == 0
        assert t.system.memory.free_pages == free + 4
        assert (yield from t.process.madvise(buffer.ptr + 4 * PAGE, 4 * PAGE, MADV_DONTNEED)) == 0
        assert t.system.memory.free_pages == free + 8
        assert (yield from command(t, 0, HMM_DMIRROR_CHECK_EXCLUSIVE, buffer, 8)) == 0

    run(program)


# Pages on a device, and what a process does with them


@BOTH
def test_madvise_on_device_pages(unit: int) -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 8))
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 8)) == 0
        assert (yield from p.madvise(buffer.ptr, 4 * PAGE, MADV_DONTNEED)) == 0
        assert (yield from p.load_stamps(buffer.ptr, 4)).tolist() == [0] * 4
        assert (yield from p.madvise(buffer.ptr + 4 * PAGE, 2 * PAGE, MADV_FREE)) == 0
        seen = (yield from p.load_stamps(buffer.ptr + 4 * PAGE, 4)).tolist()
        assert seen[2:] == [16, 17]
        assert all(value in (0, 14 + at) for at, value in enumerate(seen[:2]))

    run(program)


@BOTH
@pytest.mark.parametrize("flags", [0, MREMAP_DONTUNMAP])
def test_device_pages_move_with_mremap(unit: int, flags: int) -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 8))
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 8)) == 0
        target = yield from p.mmap(16 * PAGE, PROT_NONE, ANON)
        flags_ = MREMAP_MAYMOVE | MREMAP_FIXED | flags
        assert (yield from p.mremap(buffer.ptr, 8 * PAGE, 8 * PAGE, flags_, target + 3 * PAGE)) == target + 3 * PAGE
        moved = Buffer(target + 3 * PAGE, 8 * PAGE, t.mirror(8), target)
        assert (yield from command(t, unit, HMM_DMIRROR_READ, moved, 8)) == 0
        assert t.stamps(moved.mirror, 8).tolist() == list(range(10, 18))
        old = yield from command(t, unit, HMM_DMIRROR_READ, buffer, 8)
        assert old == (0 if flags else EFAULT)
        if flags:
            assert t.stamps(buffer.mirror, 8).tolist() == [0] * 8
        assert (yield from p.load_stamps(moved.ptr, 8)).tolist() == list(range(10, 18))

    run(program)


@BOTH
def test_fork_of_device_pages_is_copy_on_write(unit: int) -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 4))
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0
        pfns = t.process.mm.table.frame[t.process.mm.table.slots(buffer.ptr // PAGE, 4)].copy()
        assert (yield from snapshot(t, unit, buffer, 4))[0] & HMM_DMIRROR_PROT_WRITE

        def child(q: Process) -> Program:
            assert entry_kind(q, buffer.ptr) == (Kind.PRESENT if unit == 2 else Kind.DEVICE_PRIVATE)
            yield from q.store_stamps(buffer.ptr, [50, 51])
            assert (yield from q.load_stamps(buffer.ptr, 4)).tolist() == [50, 51, 12, 13]

        forked = yield from p.fork(child)
        assert (t.system.memory.mapcount[pfns] == 2).all(), "both processes map the device's page"
        seen = yield from snapshot(t, unit, buffer, 4)
        assert [byte & HMM_DMIRROR_PROT_WRITE for byte in seen] == [0] * 4, "read-only in both"
        assert (yield from p.waitpid(forked)) == "exited"
        assert (yield from p.load_stamps(buffer.ptr, 4)).tolist() == [10, 11, 12, 13]
        yield from p.store_stamps(buffer.ptr, [60])
        assert (yield from p.load_stamps(buffer.ptr, 4)).tolist() == [60, 11, 12, 13]

    run(program)


def test_a_device_page_made_read_only_keeps_its_content_and_right() -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 2)
        assert (yield from command(t, 0, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 2)) == 0
        assert (yield from t.process.mprotect(buffer.ptr, 2 * PAGE, PROT_READ)) == 0
        assert entry_kind(t.process, buffer.ptr) == Kind.DEVICE_PRIVATE, "mprotect brings nothing home"
        local = HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
        assert (yield from snapshot(t, 0, buffer, 2)) == [local | HMM_DMIRROR_PROT_READ] * 2
        assert (yield from t.process.load_stamps(buffer.ptr, 2)).tolist() == [10, 11]

    run(program)


@BOTH
def test_a_process_that_exits_leaves_nothing_on_the_device(unit: int) -> None:
    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 16)

        def child(q: Process) -> Program:
            yield from q.store_stamps(buffer.ptr, np.arange(16))
            fd = yield from q.open(unit + 1)
            mine = buffer.copy()
            assert (yield from q.ioctl(fd, HMM_DMIRROR_MIGRATE_TO_DEV, mine, 16)) == 0
            yield from q.close(fd)

        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 16)) == 0
        assert t.system.device_pages_in_use(unit) == 16
        forked = yield from t.process.fork(child)
        assert (yield from t.process.waitpid(forked)) == "exited"
        assert t.system.device_pages_in_use(unit + 1) == 0
        assert (yield from t.process.munmap(buffer.ptr, 16 * PAGE)) == 0
        assert t.system.device_pages_in_use(unit) == 0

    run(program)


@BOTH
def test_release_evicts_pages_of_every_process(unit: int) -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 8))
        assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 8)) == 0
        child = yield from p.fork(Process.pause)
        assert (yield from command(t, unit, HMM_DMIRROR_RELEASE, buffer, 8)) == 0
        assert (yield from snapshot(t, unit, buffer, 8)) == [HMM_DMIRROR_PROT_READ] * 8, "home, and still shared"
        assert [entry_kind(child, buffer.ptr + at * PAGE) for at in range(8)] == [Kind.PRESENT] * 8
        assert t.system.device_pages_in_use(unit) == 0
        assert (yield from command(t, unit, HMM_DMIRROR_READ, buffer, 8)) == 0
        assert buffer.faults == 1, "the eviction emptied the device's table"
        assert t.stamps(buffer.mirror, 8).tolist() == list(range(10, 18))
        yield from p.kill(child)
        yield from p.waitpid(child)

    run(program)


def test_long_term_pins_bring_device_pages_home_and_others_do_not() -> None:
    def program(t: Fixture) -> Program:
        p = t.process
        for unit in (0, 2):
            buffer = yield from filled(t, 4)
            assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0
            pinned = yield from pin_user_pages_fast(p.mm, p.thread, buffer.ptr, 2, FOLL_WRITE | FOLL_LONGTERM)
            assert (t.system.memory.pgmap[pinned] == 0).all()
            short = yield from pin_user_pages_fast(p.mm, p.thread, buffer.ptr + 2 * PAGE, 2, FOLL_WRITE)
            assert [bool(place) for place in t.system.memory.pgmap[short]] == [unit == 2] * 2
            again = yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)
            assert again == ENOENT, "pinned pages stay"
            unpin_user_pages(t.system.memory, pinned)
            unpin_user_pages(t.system.memory, short)
            assert (yield from p.load_stamps(buffer.ptr, 4)).tolist() == [10, 11, 12, 13]

    run(program)


def test_closing_a_device_keeps_its_pages_reachable() -> None:
    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 4))
        fd = yield from p.open(1)
        assert (yield from p.ioctl(t.fds[0], HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 4)) == 0
        yield from p.close(fd)
        assert (yield from p.load_stamps(buffer.ptr, 4)).tolist() == [10, 11, 12, 13]

    run(program)


def test_the_mirror_of_a_dead_process() -> None:
    """An ioctl after the address space is gone: no fault is possible, and migrations are refused."""

    def program(t: Fixture) -> Program:
        buffer = yield from filled(t, 2)
        opened = []

        def child(q: Process) -> Program:
            opened.append((yield from q.open(1)))
            mine = buffer.copy()
            assert (yield from q.ioctl(opened[0], HMM_DMIRROR_READ, mine, 2)) == 0

        forked = yield from t.process.fork(child)
        assert (yield from t.process.waitpid(forked)) == "exited"
        fd = opened[0]
        for what in (
            HMM_DMIRROR_MIGRATE_TO_DEV,
            HMM_DMIRROR_MIGRATE_TO_SYS,
            HMM_DMIRROR_EXCLUSIVE,
            HMM_DMIRROR_SNAPSHOT,
        ):
            assert (yield from t.process.ioctl(fd, what, buffer, 2)) == EINVAL, what
        yield from t.process.close(fd)

    run(program)


def test_chunks_grow_when_the_device_is_full() -> None:
    """A private device adds a chunk; a coherent one has only its own."""

    def program(t: Fixture) -> Program:
        pages = 1024 + 64
        for unit, result in ((0, 0), (2, ENOENT)):
            buffer = yield from filled(t, pages)
            assert (yield from command(t, unit, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, pages)) == result
            assert (yield from t.process.load_stamps(buffer.ptr, pages)).tolist() == list(range(10, 10 + pages))

    run(program, chunk_pages=1024)
