"""hmm_range_fault: the decision table, the spans of its faults, and who hears of -EBUSY."""

from __future__ import annotations

from errno import EBUSY, EFAULT, EPERM

import numpy as np
import pytest
from memory.mmworld import COMPOUND, FIRST, MIGRATE, RW, World

from kit.memory.device import hmm
from kit.memory.device.hmm import hmm_range_fault
from kit.memory.device.hmm_entries import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_ERROR,
    HMM_PFN_P2PDMA,
    HMM_PFN_P2PDMA_BUS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_pfn_to_pfn,
)
from kit.memory.device.migrate_device import migrate_vma_finalize
from kit.memory.device.migrate_vma import MIGRATE_VMA_SELECT_COMPOUND, MIGRATE_VMA_SELECT_SYSTEM
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_read_begin
from kit.memory.types import FAULT_FLAG_REMOTE, FAULT_FLAG_WRITE, VM_FAULT_SIGBUS, VM_IO, VM_PFNMAP, VM_READ, Bit, Kind

READ, FULL = HMM_PFN_REQ_FAULT, HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
V, VW, E = HMM_PFN_VALID, HMM_PFN_VALID | HMM_PFN_WRITE, HMM_PFN_ERROR
W = Bit.WRITABLE


def ask(world, first, pages, default=0, mask=0, owner=None, given=None, seq=None):
    """Return (result, entries); `first` counts from FIRST."""
    entries = np.zeros(pages, dtype=np.uint64) if given is None else np.array(given, dtype=np.uint64)
    start = FIRST + first << 12

    def go():
        begun = yield from mmu_interval_read_begin(world.sub, world.thread)
        asked = HmmRange(
            world.sub, begun if seq is None else seq, start, start + (pages << 12), entries, default, mask, owner
        )
        return (yield from hmm_range_fault(asked, world.thread))

    return world.run(go()), entries


def put(world, first, kind, bits=0, frame=-1, pages=1):
    table = world.mm.table
    table.set_entries(table.slots(FIRST + first, pages, create=True), kind, bits, frame)


def faults(monkeypatch, world, answer=0):
    """Replace the CPU's fault handler by one that maps what is asked; return the list of (first, pages, flags)."""
    seen = []

    def handle_mm_faults(vma, thread, pages, flags):
        seen.append((int(pages[0]) - FIRST, len(pages), flags))
        if not answer:
            slots = world.mm.table.slots_of(pages, create=True)
            world.mm.table.set_entries(slots, Kind.PRESENT, W if flags & FAULT_FLAG_WRITE else 0, pages % 4096)
            world.mm.table.leaf_level[slots >> 9] = 0
        yield from thread.sync()
        return answer

    monkeypatch.setattr(hmm, "handle_mm_faults", handle_mm_faults)
    return seen


def state(world):
    table = world.mm.table
    return table.kind.copy(), table.bits.copy(), table.frame.copy(), table.rows, world.memory.refcount.copy()


# kind, bits, frame -> snapshot, what a read request does: None nothing, "fault", or an errno
PTES = {
    "none": (Kind.NONE, 0, -1, 0, "fault"),
    "marker": (Kind.MARKER, Bit.UFFD_WP, -1, 0, "fault"),
    "swap": (Kind.SWAP, 0, 7, 0, "fault"),
    "exclusive": (Kind.DEVICE_EXCLUSIVE, W, 9, 0, "fault"),
    "poison": (Kind.HWPOISON, 0, 9, 0, -EFAULT),
    "read-only": (Kind.PRESENT, 0, 9, V | 9, None),
    "writable": (Kind.PRESENT, W, 9, VW | 9, None),
    "protnone": (Kind.PRESENT, Bit.PROTNONE | W, 9, 9, "fault"),
    "zero page": (Kind.PRESENT, Bit.SPECIAL, 0, V | 0, None),
    "no struct page": (Kind.PRESENT, Bit.SPECIAL | W, 9, E, -EFAULT),
}


@pytest.mark.parametrize("name", PTES)
def test_pte_in_a_snapshot_and_under_a_read_request(name, monkeypatch):
    kind, bits, frame, snapshot, asked = PTES[name]
    world = World()
    world.area(8)
    put(world, 3, kind, bits, frame)
    before = state(world)
    ret, entries = ask(world, 3, 1)
    assert (ret, [int(e) for e in entries]) == (0, [snapshot])
    assert all(np.array_equal(a, b) for a, b in zip(before, state(world), strict=True)), "a snapshot changes nothing"
    seen = faults(monkeypatch, world)
    ret, entries = ask(world, 3, 1, READ)
    if asked == "fault":
        assert seen == [(3, 1, FAULT_FLAG_REMOTE)] and ret == 0 and entries[0] & np.uint64(V)
    else:
        assert seen == [] and ret == (asked or 0)
        assert asked or int(entries[0]) == snapshot


@pytest.mark.parametrize("name", [n for n in PTES if PTES[n][4] != -EFAULT])
def test_pte_under_a_write_request(name, monkeypatch):
    kind, bits, frame, snapshot, _asked = PTES[name]
    world = World()
    world.area(8)
    put(world, 3, kind, bits, frame)
    seen = faults(monkeypatch, world)
    ret, entries = ask(world, 3, 1, FULL)
    assert ret == 0 and int(entries[0]) & VW == VW
    assert seen == ([] if snapshot & VW == VW else [(3, 1, FAULT_FLAG_REMOTE | FAULT_FLAG_WRITE)])


def test_gap_is_an_error_entry_or_efault():
    world = World()
    world.area(4)
    world.area(4, first=FIRST + 8)
    world.fill(world.mm.find(FIRST), 0, 4)
    ret, entries = ask(world, 0, 12)
    assert ret == 0 and [int(e) >> 61 for e in entries] == [6] * 4 + [1] * 4 + [0] * 4
    assert ask(world, 0, 12, READ)[0] == -EFAULT
    assert ask(world, 0, 4, READ)[0] == 0


@pytest.mark.parametrize("flags", [0, VM_READ | VM_IO, VM_READ | VM_PFNMAP])
def test_unsupported_area_is_an_error_entry_or_efault(flags):
    world = World()
    world.area(4)
    world.fill(world.mm.find(FIRST), 0, 4)
    world.area(4, flags, first=FIRST + 4)
    world.fill(world.mm.find(FIRST + 4), 0, 4)
    world.area(4, first=FIRST + 8)
    ret, entries = ask(world, 0, 12)
    assert ret == 0 and [int(e) >> 61 for e in entries] == [6] * 4 + [1] * 4 + [0] * 4
    assert ask(world, 2, 4, READ)[0] == -EFAULT


def test_write_request_in_a_read_only_area_is_eperm():
    world = World()
    vma = world.area(4, VM_READ)
    world.fill(vma, 0, 2, writable=False)
    assert ask(world, 0, 1, READ)[0] == 0
    ret, _ = ask(world, 0, 1, FULL)
    assert ret == -EPERM and ret.step == "hmm_vma_fault"


def test_failing_fault_is_efault(monkeypatch):
    world = World()
    world.area(4)
    seen = faults(monkeypatch, world, VM_FAULT_SIGBUS)
    assert ask(world, 0, 4, READ)[0] == -EFAULT and len(seen) == 1


def test_fault_goes_from_the_first_bad_page_to_the_end_of_its_table(monkeypatch):
    """Present pages on the way are faulted too; the next table is another span."""
    world = World()
    vma = world.area(1024)
    world.fill(vma, 0, 100)
    world.fill(vma, 200, 100)
    world.fill(vma, 600, 10)
    seen = faults(monkeypatch, world)
    ret, entries = ask(world, 50, 900, READ)
    assert ret == 0 and (entries & np.uint64(V)).all()
    assert seen == [(100, 412, FAULT_FLAG_REMOTE), (512, 438, FAULT_FLAG_REMOTE)]


def test_fault_of_a_hole_covers_all_of_it(monkeypatch):
    """No table at all: the hole is one span, up to the range's end; beside a table it ends with its 2 MiB."""
    world = World()
    world.area(4096)
    seen = faults(monkeypatch, world)
    assert ask(world, 100, 3000, READ)[0] == 0
    assert seen == [(100, 3000, FAULT_FLAG_REMOTE)]
    world = World()
    vma = world.area(4096)
    world.fill(vma, 0, 1)
    seen = faults(monkeypatch, world)
    assert ask(world, 600, 1000, READ)[0] == 0
    assert [s[:2] for s in seen] == [(600, 424), (1024, 512), (1536, 64)]


def test_one_write_request_makes_a_whole_hole_a_write_fault(monkeypatch):
    world = World()
    world.area(1024)
    seen = faults(monkeypatch, world)
    given = [0] * 3 + [READ] + [0] * 10 + [FULL] + [0] * 5
    ret, _ = ask(world, 0, 20, 0, FULL, given=given)
    assert ret == 0 and seen == [(0, 20, FAULT_FLAG_REMOTE | FAULT_FLAG_WRITE)]


def test_requests_of_single_pages_count_one_by_one_in_a_table(monkeypatch):
    world = World()
    vma = world.area(512)
    world.fill(vma, 0, 4, writable=False)
    put(world, 6, Kind.SWAP, 0, 3)
    seen = faults(monkeypatch, world)
    ret, _ = ask(world, 0, 8, 0, FULL, given=[READ, 0, 0, FULL, 0, 0, 0, 0])
    assert ret == 0 and seen == [(3, 5, FAULT_FLAG_REMOTE | FAULT_FLAG_WRITE)]
    seen.clear()
    assert ask(world, 0, 8, 0, 0, given=[READ] * 8)[0] == 0 and seen == [], "the mask hides the requests"


def test_flags_of_dma_are_carried_over_and_nothing_else():
    world = World()
    vma = world.area(4)
    pfns = world.fill(vma, 0, 2)
    sticky = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS
    _, entries = ask(world, 0, 4, given=[sticky | 5, FULL | 77, HMM_PFN_P2PDMA | HMM_PFN_ERROR, 99])
    assert [int(e) for e in entries] == [sticky | VW | int(pfns[0]), VW | int(pfns[1]), HMM_PFN_P2PDMA, 0]


@pytest.mark.parametrize("owner,wish,outcome", [("own", FULL, "as is"), ("other", 0, 0), (None, 0, 0)])
def test_device_private_page_is_its_owners_as_it_is(owner, wish, outcome, monkeypatch):
    world = World()
    vma = world.area(4, VM_READ)
    world.fill(vma, 0, 4, writable=False)
    world.to_device(vma)
    pfns = world.entries(vma)[2]
    seen = faults(monkeypatch, world)
    who = {"own": world.device, "other": "somebody else", None: None}[owner]
    ret, entries = ask(world, 0, 4, wish, owner=who)
    assert ret == 0 and seen == []
    assert [int(e) for e in entries] == ([V | int(p) for p in pfns] if outcome == "as is" else [0] * 4)


def test_foreign_device_private_page_is_faulted(monkeypatch):
    world = World()
    vma = world.area(4)
    world.fill(vma, 0, 4)
    world.to_device(vma, 0, 3)
    seen = faults(monkeypatch, world)
    assert ask(world, 0, 4, READ, owner="other")[0] == 0 and seen == [(0, 4, FAULT_FLAG_REMOTE)]


# PMD leaves


def test_huge_page_has_order_nine_on_every_page():
    world = World()
    vma = world.area(1024)
    head = world.fill_huge(vma, 0)
    world.fill(vma, 512, 2)
    ret, entries = ask(world, 500, 14, FULL)
    assert ret == 0 and hmm_pfn_to_map_order(entries).tolist() == [9] * 12 + [0] * 2
    assert hmm_pfn_to_pfn(entries)[:12].tolist() == list(range(head + 500, head + 512))
    assert all(int(e) & VW == VW for e in entries)


def test_protnone_huge_page_has_neither_flags_nor_order():
    world = World()
    head = world.fill_huge(world.area(512), 0, Bit.PROTNONE | W)
    ret, entries = ask(world, 1, 2)
    assert ret == 0 and entries.tolist() == [head + 1, head + 2]


def test_one_short_page_faults_the_whole_huge_page(monkeypatch):
    world = World()
    world.fill_huge(world.area(512), 0, Bit.YOUNG)
    seen = faults(monkeypatch, world)
    ret, _ = ask(world, 10, 20, 0, FULL, given=[READ] * 5 + [FULL] + [0] * 14)
    assert ret == 0 and seen == [(10, 20, FAULT_FLAG_REMOTE | FAULT_FLAG_WRITE)]


def test_private_huge_page_is_reported_to_its_owner_and_an_error_to_others(monkeypatch):
    world = World()
    vma = world.area(512)
    world.fill_huge(vma, 0)
    world.to_device(vma, 0, 512, MIGRATE_VMA_SELECT_SYSTEM | MIGRATE_VMA_SELECT_COMPOUND)
    head = int(world.entries(vma)[2][0])
    ret, entries = ask(world, 0, 512, FULL, owner=world.device)
    assert ret == 0 and [int(e) for e in entries[:2]] == [VW | 9 << 53 | head, VW | 9 << 53 | head + 1]
    ret, entries = ask(world, 0, 512, owner="other")
    assert ret == 0 and set(entries.tolist()) == {E}
    seen = faults(monkeypatch, world)
    assert ask(world, 5, 10, READ, owner="other")[0] == 0 and seen == [(5, 10, FAULT_FLAG_REMOTE)]


@pytest.mark.parametrize("kind", [Kind.SWAP, Kind.HWPOISON])
def test_other_absent_huge_entry_is_an_error(kind):
    world = World()
    world.area(512)
    world.mm.table.set_huge(FIRST >> 9, kind, 0, 512)
    ret, entries = ask(world, 0, 3)
    assert (ret, entries.tolist()) == (0, [E] * 3)
    assert ask(world, 0, 3, READ)[0] == -EFAULT


# Sequences


def test_only_a_moved_sequence_is_busy():
    world = World()
    world.fill(world.area(4), 0, 4)
    before = [FULL] * 4
    ret, entries = ask(world, 0, 4, FULL, seq=world.sub.invalidate_seq + 2, given=before)
    assert ret == -EBUSY and entries.tolist() == before, "inputs are as they were"


def test_fault_that_invalidates_is_busy_and_keeps_inputs_from_there_on(monkeypatch):
    world = World()
    vma = world.area(8)
    world.fill(vma, 0, 4)

    def handle_mm_faults(vma, thread, pages, flags):
        world.sub.invalidate_seq += 2  # copy on write: the range itself was invalidated
        yield from thread.sync()
        return 0

    monkeypatch.setattr(hmm, "handle_mm_faults", handle_mm_faults)
    ret, entries = ask(world, 0, 8, READ, given=[0] * 8)
    assert ret == -EBUSY and all(int(e) & V for e in entries[:4]) and not entries[4:].any()


@pytest.mark.parametrize("huge", [False, True])
def test_migration_is_waited_for_when_asked_and_nothing_in_a_snapshot(huge):
    world = World()
    vma = world.area(512)
    if huge:
        world.fill_huge(vma, 0)
    else:
        world.fill(vma, 0, 512)
    args = world.migration(vma, flags=MIGRATE_VMA_SELECT_SYSTEM | MIGRATE_VMA_SELECT_COMPOUND)
    world.setup(args)
    assert (args.src[0] & (MIGRATE | COMPOUND) == MIGRATE | COMPOUND) == huge
    ret, entries = ask(world, 0, 512)
    assert ret == 0 and not entries.any()
    mover, reader = world.engine.thread("mover"), world.engine.thread("reader")
    asked = HmmRange(
        world.sub, world.sub.invalidate_seq, FIRST << 12, (FIRST + 512) << 12, np.zeros(512, dtype=np.uint64), READ
    )

    def finish():
        mover.charge(50.0)
        yield from mover.sync()
        yield from migrate_vma_finalize(args, mover)

    def read():
        ret = yield from hmm_range_fault(asked, reader)
        return ret, reader.now

    _, (ret, when) = world.run(finish(), read())
    assert ret == 0 and when == 50.0 and all(int(e) & V for e in asked.hmm_pfns)
    world.check()


def test_many_tables_agree_with_one_by_one():
    """Stretches, tables that are missing, and every kind of entry: the same answers as page by page."""
    world = World(frames=4096)
    rng = np.random.default_rng(5)
    pages = 512 * 300
    world.area(pages, RW)
    table = world.mm.table
    for number in np.flatnonzero(rng.random(300) < 0.7).tolist():
        slots = table.slots(FIRST + 512 * number, 512, create=True)
        kinds = rng.choice([Kind.NONE, Kind.PRESENT, Kind.SWAP, Kind.MARKER, Kind.HWPOISON], 512).astype(np.uint8)
        bits = rng.choice([0, W, Bit.PROTNONE, Bit.YOUNG | W], 512).astype(np.uint8)
        table.set_entries(slots, kinds, bits, rng.integers(1, 4000, 512))
    _, entries = ask(world, 0, pages)
    slots = table.slots_of(np.arange(FIRST, FIRST + pages))
    kind, bits, frame = table.kind[slots], table.bits[slots], table.frame[slots]
    for at in rng.integers(0, pages, 3000).tolist():
        want = 0
        if kind[at] == Kind.PRESENT:
            want = int(frame[at]) | (0 if bits[at] & Bit.PROTNONE else VW if bits[at] & W else V)
        assert int(entries[at]) == want
