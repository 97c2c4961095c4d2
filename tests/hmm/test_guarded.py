"""What happens between the driver's look at a page and its entry: races of the test driver that a guarded device closes.

Each is shown on both: the real driver, unguarded, leaves an entry behind; a guarded device does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hmm.harness import ANON, RW, Buffer, Fixture, Process, Program, System
from hmm.probe import Probe
from hmm.states import STATES, entry_kind

from kit.drivers.dmirror_types import HMM_DMIRROR_EXCLUSIVE, HMM_DMIRROR_MIGRATE_TO_DEV
from kit.memory.types import MADV_DONTNEED, MADV_NOHUGEPAGE, PAGE, Kind

BOTH = pytest.mark.parametrize("guarded", [False, True], ids=["as the real driver", "guarded"])
DONE, ENOENT = 0, -2


def run(program: Callable[[Fixture], Program], guarded: bool) -> System:
    def whole(t: Fixture) -> Program:
        for device in t.system.devices:
            device.guarded = guarded
        yield from program(t)

    return Fixture.play(whole, (0, 1), payload_bytes=8)


def filled(t: Fixture, pages: int) -> Program:
    """Map pages with stamps 10, 11, ..., and return a buffer over them."""
    start = yield from t.process.mmap(pages * PAGE, RW, ANON)
    assert (yield from t.process.madvise(start, pages * PAGE, MADV_NOHUGEPAGE)) == 0
    yield from t.process.store_stamps(start, np.arange(10, 10 + pages))
    return Buffer(start, pages * PAGE, t.mirror(pages), start)


def entered(fd: object, buffer: Buffer, pages: int) -> int:
    """Return how many of a buffer's pages a device has an entry for."""
    return int((fd.load(buffer.ptr, buffer.ptr + pages * PAGE)[0] > 0).sum())


@BOTH
def test_an_exclusive_page_that_goes_before_the_device_has_entered_it(guarded: bool) -> None:
    """MADV_DONTNEED needs no page lock: it comes between the CPU's exclusive entry and the device's."""
    results: list[int] = []

    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 1))

        def takes(q: Process) -> Program:
            results.append((yield from q.ioctl(t.fd, HMM_DMIRROR_EXCLUSIVE, buffer, 1)))

        def drops(q: Process) -> Program:
            while entry_kind(p, buffer.ptr) != Kind.DEVICE_EXCLUSIVE:
                yield from q.sleep(0.1)
            assert (yield from q.madvise(buffer.ptr, PAGE, MADV_DONTNEED)) == 0

        for actor in [p.pthread_create(takes), p.pthread_create(drops)]:
            yield from p.join(actor)
        assert entry_kind(p, buffer.ptr) == Kind.NONE
        assert entered(t.fd, buffer, 1) == (0 if guarded else 1)

    run(program, guarded)
    assert results == [ENOENT if guarded else DONE]


@BOTH
@pytest.mark.parametrize("command", [HMM_DMIRROR_MIGRATE_TO_DEV, HMM_DMIRROR_EXCLUSIVE], ids=["to_device", "exclusive"])
def test_pages_taken_after_the_device_heard_that_they_go_and_before_they_go(guarded: bool, command: int) -> None:
    """The device has been told of MADV_DONTNEED, somebody else keeps it waiting: the pages are still there."""

    def program(t: Fixture) -> Program:
        p, buffer = t.process, (yield from filled(t, 4))
        slow = yield from Probe(p, buffer.ptr + 3 * PAGE, 1).insert()

        def keeps_waiting(q: Process) -> Program:
            yield from slow.lock.acquire(q.thread)
            yield from q.sleep(500)
            yield from slow.lock.release(q.thread)

        def drops(q: Process) -> Program:
            yield from q.sleep(10)
            assert (yield from q.madvise(buffer.ptr, 4 * PAGE, MADV_DONTNEED)) == 0

        def takes(q: Process) -> Program:
            yield from q.sleep(100)
            assert (yield from q.ioctl(t.fd, command, buffer, 3)) == 0
            assert t.stamps(buffer.mirror, 3).tolist() == ([0] * 3 if guarded else [10, 11, 12])

        for actor in [p.pthread_create(each) for each in (keeps_waiting, drops, takes)]:
            yield from p.join(actor)
        # A guarded device waits until the pages are gone, and takes what is there then.
        taken = Kind.DEVICE_PRIVATE if command == HMM_DMIRROR_MIGRATE_TO_DEV else Kind.DEVICE_EXCLUSIVE
        left = [entry_kind(p, buffer.ptr + at * PAGE) for at in range(3)]
        assert left == [taken if guarded else Kind.NONE] * 3
        assert entered(t.fd, buffer, 3) == 3, "which without a guard are entries of pages that are gone"
        yield from slow.remove()

    run(program, guarded)


@BOTH
def test_what_a_migration_itself_has_others_hear_is_no_reason_to_leave_entries_out(guarded: bool) -> None:
    """Filling part of a huge zero page splits it, under a CLEAR that the device that migrates hears too."""

    def program(t: Fixture) -> Program:
        start = yield from STATES["huge_zero_page"](t)
        buffer = Buffer(start, 8 * PAGE, t.mirror(8), start)
        assert (yield from t.process.ioctl(t.fd, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 8)) == 0
        assert entered(t.fd, buffer, 8) == 8

    run(program, guarded)
