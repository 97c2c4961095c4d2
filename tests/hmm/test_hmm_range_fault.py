"""hmm_range_fault: every state of a page, asked for nothing, for reading and for writing (mm/hmm.c @ 7.0)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
from hmm.harness import ANON, RW, TWOMEG, Buffer, Fixture, Process, Program, System
from hmm.migration import Migration
from hmm.probe import READ, SNAPSHOT, VALID, WRITABLE, WRITE, Probe, flags, look
from hmm.states import STATES, entry_kind

from kit.drivers.dmirror_types import HMM_DMIRROR_MIGRATE_TO_DEV
from kit.memory.device import hmm_entries
from kit.memory.device.hmm import hmm_range_fault
from kit.memory.device.hmm_entries import HMM_PFN_DMA_MAPPED, HMM_PFN_P2PDMA, HMM_PFN_P2PDMA_BUS, hmm_pfn_to_pfn
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_read_begin
from kit.memory.types import MADV_DONTNEED, MADV_NOHUGEPAGE, MAP_SHARED, PAGE, PROT_READ, Kind

EFAULT, EPERM = -errno.EFAULT, -errno.EPERM

# State: letters of a snapshot, then result (0 or an errno) and letters of a read and of a write request.
# E error, V valid, W writable, 9 order 9, p a pfn that is not valid, - nothing; the owner is device 0.
TABLE = {
    "gap": ("E", EFAULT, EFAULT),
    "io_vma": ("E", EFAULT, EFAULT),
    "pfnmap_vma": ("E", EFAULT, EFAULT),
    "prot_none": ("E", EFAULT, EFAULT),
    "hole": ("-", "V", "VW"),
    "hole_read_only": ("-", "V", EPERM),
    "zero_page": ("V", "V", "VW"),
    "anon": ("VW", "VW", "VW"),
    "anon_read_only": ("V", "V", EPERM),
    "anon_forked": ("V", "V", "VW"),
    "swapped": ("-", "VW", "VW"),
    "swapped_read_only": ("-", "V", EPERM),
    "private_own": ("VW", "VW", "VW"),
    "private_own_read_only": ("V", "V", "V"),  # returned before the request is looked at
    "private_other": ("-", "VW", "VW"),
    "coherent": ("VW", "VW", "VW"),
    "exclusive": ("-", "VW", "VW"),
    "hwpoison": ("-", EFAULT, EFAULT),
    "protnone_pte": ("p", "VW", "VW"),
    "special_pte": ("E", EFAULT, EFAULT),
    "file_hole_read_only": ("-", "V", EPERM),
    "file_hole": ("-", None, "VW"),
    "file_private_read": ("V", "V", "VW"),
    "file_private_written": ("VW", "VW", "VW"),
    "huge_page": ("VW9", "VW9", "VW9"),
    "huge_page_read_only": ("V9", "V9", EPERM),
    "huge_hole": ("-", "V9", "VW9"),
    "huge_zero_page": ("V9", "V9", "VW9"),
    "huge_private_own": ("VW9", "VW9", "VW9"),
    "huge_private_other": ("E", "VW9", "VW9"),
    "huge_coherent": ("VW", "VW", "VW"),  # a coherent device has no memory in 2 MiB pieces: it went page by page
    "hugetlb": ("VW9", "VW9", "VW9"),
    "hugetlb_hole": ("-", "VW9", "VW9"),
}
REQUESTS = {"snapshot": SNAPSHOT, "read": READ, "write": WRITE}


def run(program: Callable[[Fixture], Program], units: tuple[int, ...] = (0, 1, 2), **machine: int) -> System:
    """Run a program with the devices open on a machine of 8-byte pages; nothing may be left."""
    return Fixture.play(program, units, **{"payload_bytes": 8, **machine})


def test_every_state_has_its_row() -> None:
    assert set(TABLE) == set(STATES)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", TABLE)
def test_decision_table(name: str, request_: str) -> None:
    wanted = TABLE[name][list(REQUESTS).index(request_)]

    def program(t: Fixture) -> Program:
        start = yield from STATES[name](t)
        pages = 512 if name.startswith("huge") else 1
        default, before = REQUESTS[request_], entry_kind(t.process, start)
        result, entries = yield from look(t.process, start, pages, default, owner=t.system.devices[0])
        if isinstance(wanted, int):
            assert result == wanted
        else:
            assert result == 0
            if wanted is not None:
                assert flags(entries) == [wanted] * pages
            if "V" in flags(entries)[0] and "9" in flags(entries)[0]:
                assert (np.diff(hmm_pfn_to_pfn(entries).astype(np.int64)) == 1).all(), "every pfn is filled in"
        if request_ == "snapshot":
            assert entry_kind(t.process, start) == before, "a snapshot changes nothing"

    run(program)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[2] == "VW" or row[2] == "VW9"])
def test_without_an_owner_private_pages_come_home(name: str) -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES[name](t)
        pages = 512 if name.startswith("huge") else 1
        result, entries = yield from look(t.process, start, pages, WRITE)
        assert result == 0
        assert all(word.startswith("VW") for word in flags(entries))
        assert entry_kind(t.process, start) == Kind.PRESENT

    run(program)


def mapped(t: Fixture, pages: int, prot: int = RW) -> Program:
    start = yield from t.process.mmap(pages * PAGE, prot, ANON)
    assert (yield from t.process.madvise(start, pages * PAGE, MADV_NOHUGEPAGE)) == 0
    return start


def test_flags_of_the_driver_pass_through() -> None:
    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 4)
        yield from t.process.store_stamps(start, [1])
        sticky = int(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)
        assert (sticky >> 58) == 0b111, "bits 60, 59 and 58"
        for default in (SNAPSHOT, READ, WRITE):
            result, entries = yield from look(t.process, start, 4, default, inputs=[sticky] * 4)
            assert result == 0
            assert ((entries & np.uint64(sticky)) == sticky).all()

    run(program)


def test_requests_of_single_pages_need_the_mask() -> None:
    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 4)
        result, entries = yield from look(t.process, start, 4, inputs=[WRITE] * 4)
        assert (result, flags(entries)) == (0, ["-"] * 4), "requests are ignored without pfn_flags_mask"
        result, entries = yield from look(t.process, start, 4, mask=WRITE, inputs=[0, 0, 0, 0])
        assert (result, flags(entries)) == (0, ["-"] * 4)
        # A hole at page-table level is one span: one write request makes all of it a write fault.
        result, entries = yield from look(t.process, start, 4, mask=WRITE, inputs=[0, READ, WRITE, 0])
        assert (result, flags(entries)) == (0, ["VW"] * 4)
        result, entries = yield from look(t.process, start, 4, default=READ, mask=WRITE, inputs=[0, 0, WRITE, 0])
        assert (result, flags(entries)) == (0, ["VW"] * 4)

    run(program)


def test_from_the_first_page_that_needs_it_everything_to_the_end_is_faulted() -> None:
    """With a leaf table in place a fault starts at the page that asks, and covers all that follow in the PMD."""

    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 8)
        yield from t.process.store_stamps(start, [1])
        result, entries = yield from look(t.process, start, 8, mask=WRITE, inputs=[0, 0, 0, READ, 0, 0, 0, 0])
        assert (result, flags(entries)) == (0, ["VW", "-", "-", "V", "V", "V", "V", "V"])
        result, entries = yield from look(t.process, start, 8, mask=WRITE, inputs=[0, 0, 0, 0, 0, WRITE, 0, 0])
        assert (result, flags(entries)) == (0, ["VW", "-", "-", "V", "V", "VW", "VW", "VW"])

    run(program)


def test_a_fault_ends_with_the_leaf_table() -> None:
    def program(t: Fixture) -> Program:
        base = yield from mapped(t, 1536)
        start = -(-base // TWOMEG) * TWOMEG
        yield from t.process.store_stamps(start, [1])
        yield from t.process.store_stamps(start + TWOMEG, [1])
        first = start + TWOMEG - 4 * PAGE
        result, entries = yield from look(t.process, first, 8, mask=WRITE, inputs=[0, READ, 0, 0, 0, 0, 0, 0])
        assert (result, flags(entries)) == (0, ["-", "V", "V", "V", "VW", "-", "-", "-"])

    run(program)


def test_a_hole_without_tables_is_faulted_whole() -> None:
    """No table at the level above either: the span is the whole hole, cut at the range."""

    def program(t: Fixture) -> Program:
        base = yield from t.process.mmap(4 * TWOMEG, RW, ANON, addr=0x7000_0000_0000)
        assert (yield from t.process.madvise(base, 4 * TWOMEG, MADV_NOHUGEPAGE)) == 0
        inputs = np.zeros(1024, dtype=np.uint64)
        inputs[700] = READ
        result, entries = yield from look(t.process, base, 1024, mask=READ, inputs=inputs)
        assert result == 0
        seen = flags(entries)
        assert seen == ["V"] * 1024

    run(program)


def test_the_test_of_an_area_looks_at_all_its_pages() -> None:
    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 8)
        yield from t.process.store_stamps(start, [1] * 8)
        assert (yield from t.process.mprotect(start + 4 * PAGE, 2 * PAGE, 0)) == 0
        result, entries = yield from look(t.process, start, 8)
        assert (result, flags(entries)) == (0, ["VW"] * 4 + ["E"] * 2 + ["VW"] * 2)
        result, _ = yield from look(t.process, start, 8, mask=READ, inputs=[READ] * 4 + [0] * 2 + [READ] * 2)
        assert result == 0, "nothing is asked of the unreadable pages"
        result, entries = yield from look(t.process, start, 8, mask=READ, inputs=[0] * 5 + [READ] + [0] * 2)
        assert result == EFAULT
        assert flags(entries[:4]) == ["VW"] * 4, "earlier entries are already outputs"

    run(program)


def test_a_gap_is_an_error_only_where_it_is_asked_for() -> None:
    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 6)
        assert (yield from t.process.munmap(start + 2 * PAGE, 2 * PAGE)) == 0
        result, entries = yield from look(t.process, start, 6, mask=READ, inputs=[READ, 0, 0, 0, 0, READ])
        assert result == 0
        assert [word[:1] for word in flags(entries)][2:4] == ["E", "E"]
        result, _ = yield from look(t.process, start, 6, READ)
        assert result == EFAULT

    run(program)


def test_a_write_fault_in_a_read_only_area_keeps_what_came_before() -> None:
    def program(t: Fixture) -> Program:
        start = yield from mapped(t, 4)
        assert (yield from t.process.mprotect(start + 2 * PAGE, 2 * PAGE, PROT_READ)) == 0
        result, entries = yield from look(t.process, start, 4, WRITE)
        assert result == EPERM
        assert flags(entries[:2]) == ["VW", "VW"]

    run(program)


def test_a_page_outside_the_file_is_a_bus_error() -> None:
    def program(t: Fixture) -> Program:
        start = yield from t.process.mmap(4 * PAGE, RW, MAP_SHARED, t.create_file(2 * PAGE))
        result, _ = yield from look(t.process, start, 2, WRITE)
        assert result == 0
        result, _ = yield from look(t.process, start, 4, READ)
        assert result == EFAULT, "handle_mm_fault returned VM_FAULT_SIGBUS"

    run(program)


def test_what_comes_before_a_poisoned_page_is_faulted_in() -> None:
    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from mapped(t, 4)
        table = p.mm.table
        table.set_entries(table.slots(start // PAGE + 2, 1, create=True), int(Kind.HWPOISON), 0, 0)
        result, _ = yield from look(p, start, 4, READ)
        assert result == EFAULT
        kinds = [entry_kind(p, start + at * PAGE) for at in range(4)]
        assert kinds == [Kind.PRESENT, Kind.PRESENT, Kind.HWPOISON, Kind.NONE]

    run(program)


def test_a_stale_sequence_is_busy_before_anything_is_read() -> None:
    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from mapped(t, 4)
        yield from p.store_stamps(start, [1] * 4)
        probe = yield from Probe(p, start, 4).insert()
        seq = yield from mmu_interval_read_begin(probe.sub, p.thread)
        assert (yield from p.madvise(start, PAGE, MADV_DONTNEED)) == 0
        entries = np.full(4, READ, dtype=np.uint64)
        yield from p.mm.mmap_lock.read_acquire(p.thread)
        asked = probe.asked(start, entries, seq, READ)
        assert (yield from hmm_range_fault(asked, p.thread)) == -errno.EBUSY
        yield from p.mm.mmap_lock.read_release(p.thread)
        assert (entries == READ).all(), "inputs are as they were"
        yield from probe.remove()

    run(program)


def test_a_fault_that_invalidates_its_own_range_is_busy() -> None:
    """Copy-on-write during the walk moves the sequence: the walk starts again and finds itself stale."""

    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from mapped(t, 4)
        yield from p.store_stamps(start, [1] * 4)
        child = yield from p.fork(Process.pause)
        probe = yield from Probe(p, start, 4).insert()
        seq = yield from mmu_interval_read_begin(probe.sub, p.thread)
        entries = np.zeros(4, dtype=np.uint64)
        yield from p.mm.mmap_lock.read_acquire(p.thread)
        asked = probe.asked(start, entries, seq, WRITE)
        assert (yield from hmm_range_fault(asked, p.thread)) == -errno.EBUSY
        yield from p.mm.mmap_lock.read_release(p.thread)
        yield from probe.remove()
        result, entries = yield from look(p, start, 4, WRITE)
        assert (result, flags(entries)) == (0, ["VW"] * 4)
        yield from p.kill(child)
        assert (yield from p.waitpid(child)) == "killed"

    run(program)


def test_a_migration_is_waited_for_or_reported_as_nothing() -> None:
    """A reader that wants the page waits for the page lock; a snapshot in the middle sees an empty entry."""

    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from mapped(t, 2)
        yield from p.store_stamps(start, [5, 6])
        migration = yield from Migration(t, start, 2).setup()
        assert flags((yield from look(p, start, 2))[1]) == ["-", "-"]
        seen: list[list[str]] = []

        def reader(q: Process) -> Program:
            result, entries = yield from look(q, start, 2, WRITE)
            assert result == 0
            seen.append(flags(entries))

        waiting = p.pthread_create(reader)
        yield from p.sleep(50)
        assert not seen, "the reader waits while the page is locked"
        yield from migration.finish(copy=False)
        yield from p.join(waiting)
        assert seen == [["VW", "VW"]]
        assert list((yield from p.load_stamps(start, 2))) == [5, 6]

    run(program)


def test_what_a_huge_leaf_is_asked_for_is_asked_of_all_of_it() -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES["huge_page"](t)
        child = yield from t.process.fork(Process.pause)  # the leaf is read-only now
        inputs = np.zeros(512, dtype=np.uint64)
        inputs[300] = WRITE
        result, entries = yield from look(t.process, start, 512, mask=WRITE, inputs=inputs)
        assert result == 0
        assert all(word.startswith("VW") for word in flags(entries)), "copied for all pages"
        yield from t.process.kill(child)
        yield from t.process.waitpid(child)

    run(program)


def test_hugetlb_asks_only_its_first_page() -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES["hugetlb"](t)
        child = yield from t.process.fork(Process.pause)  # read-only now
        inputs = np.zeros(512, dtype=np.uint64)
        inputs[300] = WRITE
        result, entries = yield from look(t.process, start, 512, mask=WRITE, inputs=inputs)
        assert (result, set(flags(entries))) == (0, {"V9"}), "the request of page 300 is not looked at"
        inputs[0] = WRITE
        result, entries = yield from look(t.process, start, 512, mask=WRITE, inputs=inputs)
        assert (result, set(flags(entries))) == (0, {"VW9"})
        yield from t.process.kill(child)
        yield from t.process.waitpid(child)

    run(program)


def test_part_of_a_huge_page_has_the_pfns_of_that_part() -> None:
    def program(t: Fixture) -> Program:
        start = yield from STATES["huge_page"](t)
        _, whole = yield from look(t.process, start, 512)
        _, part = yield from look(t.process, start + 100 * PAGE, 50)
        assert np.array_equal(part, whole[100:150])

    run(program)


def test_two_devices_fault_pages_to_and_fro() -> None:
    """A foreign private page comes home in one request, its content with it."""

    def program(t: Fixture) -> Program:
        p = t.process
        start = yield from mapped(t, 8)
        yield from p.store_stamps(start, np.arange(8))
        for round_ in range(3):
            buffer = Buffer(start, 8 * PAGE, t.mirror(8), start)
            assert (yield from p.ioctl(t.fds[round_ % 2], HMM_DMIRROR_MIGRATE_TO_DEV, buffer, 8)) == 0
            assert np.array_equal(t.stamps(buffer.mirror, 8), np.arange(8))
            result, entries = yield from look(p, start, 8, READ, owner=t.system.devices[1 - round_ % 2])
            assert (result, flags(entries)) == (0, ["VW"] * 8)
        assert np.array_equal((yield from p.load_stamps(start, 8)), np.arange(8))

    run(program)


def test_entry_layout() -> None:
    assert (VALID, WRITABLE) == (1 << 63, 1 << 62)
    assert (READ, WRITE) == (1 << 63, 1 << 63 | 1 << 62)
    assert int(hmm_entries.HMM_PFN_ERROR) == 1 << 61
    assert int(hmm_entries.HMM_PFN_ORDER_SHIFT) == 53
