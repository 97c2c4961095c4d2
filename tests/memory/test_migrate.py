"""migrate_vma_*: what is collected, what each phase leaves in src and dst, and that nothing is ever lost."""

from __future__ import annotations

from errno import EINVAL

import numpy as np
import pytest
from memory.mmworld import COMPOUND, FIRST, MIGRATE, RW, VALID, WRITE, World

from kit.memory.device.migrate_device import (
    migrate_device_coherent_folio,
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
    migrate_vma_finalize,
    migrate_vma_pages,
)
from kit.memory.device.migrate_vma import (
    MIGRATE_VMA_SELECT_COMPOUND,
    MIGRATE_VMA_SELECT_DEVICE_COHERENT,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from kit.memory.huge.huge_split import __split_huge_pmd
from kit.memory.physical.memremap import DEVICE_COHERENT, DevPagemap, memremap_pages, memunmap_pages
from kit.memory.types import VM_HUGETLB, VM_PFNMAP, VM_READ, Bit, Kind, Leaf

SYSTEM, PRIVATE = MIGRATE_VMA_SELECT_SYSTEM, MIGRATE_VMA_SELECT_DEVICE_PRIVATE
COHERENT, HUGE = MIGRATE_VMA_SELECT_DEVICE_COHERENT, MIGRATE_VMA_SELECT_COMPOUND
LOCKED, LRU, ANON_EXCLUSIVE = 1, 2, 16


def flags(words):
    """The words without their pfns, as a list."""
    return [int(w) & 63 for w in words]


def test_setup_life_cycle_of_present_pages_and_holes():
    world = World()
    vma = world.area(8)
    world.fill(vma, 0, 3)
    world.fill(vma, 3, 1, writable=False)
    args = world.migration(vma)
    assert world.setup(args) == 0
    assert flags(args.src) == [VALID | MIGRATE | WRITE] * 3 + [VALID | MIGRATE] + [MIGRATE] * 4
    assert not args.dst.any() and (args.cpages, args.npages) == (8, 8)
    kind, bits, frame = world.entries(vma)
    assert kind.tolist() == [Kind.MIGRATION] * 4 + [Kind.NONE] * 4
    assert (frame[:4] == migrate_pfn_to_pfn(args.src[:4])).all()
    assert bits[0] & Bit.WRITABLE and bits[3] & Bit.READ_EXCLUSIVE and not bits[3] & Bit.WRITABLE
    pfns = frame[:4]
    memory = world.memory
    assert (
        (memory.flags[pfns] & LOCKED).all() and not memory.mapcount[pfns].any() and (memory.refcount[pfns] == 1).all()
    )
    assert not (memory.flags[pfns] & (LRU | ANON_EXCLUSIVE)).any()
    world.finish(args)  # no destinations: everything is as it was
    assert world.content(vma, 0, 4).tolist() == [1000 + FIRST + i for i in range(4)]
    kind, bits, _ = world.entries(vma)
    assert kind.tolist() == [Kind.PRESENT] * 4 + [Kind.NONE] * 4 and [b & 1 for b in bits[:4]] == [1, 1, 1, 0]
    assert (memory.flags[pfns] & (LRU | ANON_EXCLUSIVE) == LRU | ANON_EXCLUSIVE).all()
    world.check()


def test_to_the_device_and_home_again_keeps_content_rights_and_counts():
    world = World()
    vma = world.area(1024)
    host = world.fill(vma, 0, 700)
    args = world.to_device(vma)
    assert args.cpages == 1024
    assert flags(args.src[:700]) == [VALID | MIGRATE | WRITE] * 700 and flags(args.src[700:]) == [MIGRATE] * 324
    kind, bits, frame = world.entries(vma)
    assert (kind == Kind.DEVICE_PRIVATE).all() and (bits & Bit.WRITABLE).all()
    assert (world.memory.pgmap[frame] > 0).all() and not world.mm.table.rights[world.mm.table.slots(FIRST, 1024)].any()
    assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(700)] + [0] * 324
    assert not world.memory.refcount[host].any() and world.mm.rss["anon"] == 1024
    world.check()
    assert world.home(vma).cpages == 1024
    kind, bits, frame = world.entries(vma)
    assert (kind == Kind.PRESENT).all() and (bits & Bit.WRITABLE).all() and not world.memory.pgmap[frame].any()
    assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(700)] + [0] * 324
    assert len(world.device.free) == 4096 - 1024
    world.check()


def test_hole_insertion_notifies_once_from_the_first_hole_on():
    world = World()
    vma = world.area(16)
    world.fill(vma, 0, 5)
    world.to_device(vma)
    assert [e[:3] for e in world.log] == [("MIGRATE", FIRST, FIRST + 16), ("MIGRATE", FIRST + 5, FIRST + 16)]
    assert all(e[3] is world.device for e in world.log)


def test_holes_in_a_read_only_area_become_readable_private_entries():
    world = World()
    vma = world.area(4, VM_READ)
    world.to_device(vma)
    kind, bits, _ = world.entries(vma)
    assert (kind == Kind.DEVICE_PRIVATE).all() and not (bits & Bit.WRITABLE).any()


def test_zero_page_is_a_hole_for_the_system_selection_only():
    world = World()
    vma = world.area(2)
    slots = world.mm.table.slots(FIRST, 2, create=True)
    world.mm.table.set_entries(slots, Kind.PRESENT, Bit.SPECIAL | Bit.YOUNG, 0)
    args = world.migration(vma, flags=PRIVATE)
    assert world.setup(args) == 0 and flags(args.src) == [0, 0] and args.cpages == 0
    args = world.to_device(vma)
    assert flags(args.src) == [MIGRATE] * 2
    assert (world.entries(vma)[0] == Kind.DEVICE_PRIVATE).all() and world.content(vma).tolist() == [0, 0]
    assert world.memory.refcount[0] == 1
    world.check()


def test_lost_race_for_a_hole_clears_migrate():
    world = World()
    vma = world.area(4)
    args = world.migration(vma)
    world.setup(args)
    world.device.take(args)
    world.fill(vma, 1, 1)  # the CPU was quicker
    world.finish(args)
    assert flags(args.src) == [MIGRATE, 0, MIGRATE, MIGRATE]
    assert world.entries(vma)[0].tolist() == [Kind.DEVICE_PRIVATE, Kind.PRESENT] + [Kind.DEVICE_PRIVATE] * 2
    assert world.content(vma, 1, 1).tolist() == [1001 + FIRST]
    world.check()


@pytest.mark.parametrize("kind", [Kind.SWAP, Kind.MIGRATION, Kind.DEVICE_EXCLUSIVE, Kind.HWPOISON, Kind.MARKER])
def test_other_entries_are_left_alone(kind):
    world = World()
    vma = world.area(1)
    world.mm.table.set_entries(world.mm.table.slots(FIRST, 1, create=True), kind, 0, 5)
    args = world.migration(vma)
    assert world.setup(args) == 0
    assert (args.cpages, flags(args.src)) == (0, [0])
    assert [x.tolist() for x in world.entries(vma)] == [[kind], [0], [5]]


def test_locked_and_pinned_pages_stay_and_the_others_go():
    world = World()
    vma = world.area(6)
    pfns = world.fill(vma, 0, 6)
    world.memory.trylock(pfns[:1])
    world.memory.pin(pfns[2:3])
    world.memory.get(pfns[4:5])  # a reference that nobody explains
    args = world.to_device(vma)
    assert flags(args.src) == [0, 11, 0, 11, 0, 11] and args.cpages == 3
    private, present = Kind.DEVICE_PRIVATE, Kind.PRESENT
    assert world.entries(vma)[0].tolist() == [present, private] * 3
    assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(6)]
    assert world.memory.flags[pfns[2]] & ANON_EXCLUSIVE and world.memory.flags[pfns[4]] & ANON_EXCLUSIVE
    world.memory.unlock(pfns[:1])
    world.memory.unpin(pfns[2:3])
    world.memory.put(pfns[4:5])
    world.check()


def test_page_that_is_taken_between_setup_and_pages_fails_late():
    world = World()
    vma = world.area(3)
    pfns = world.fill(vma, 0, 3)
    args = world.migration(vma)
    world.setup(args)
    world.memory.get(pfns[1:2])
    world.device.take(args)
    world.finish(args)
    assert flags(args.src) == [11, 9, 11]
    assert world.entries(vma)[2][1] == pfns[1] and world.content(vma).tolist() == [1000 + FIRST + i for i in range(3)]
    world.memory.put(pfns[1:2])
    world.check()


def test_driver_may_skip_pages():
    world = World()
    vma = world.area(8)
    world.fill(vma, 0, 4)
    args = world.to_device(vma, chosen=[0, 2, 5])
    assert [bool(f & MIGRATE) for f in flags(args.src)] == [True, False, True, False, False, True, False, False]
    assert world.entries(vma)[0].tolist() == [4, 1, 4, 1, 0, 4, 0, 0]
    world.check()


def test_only_the_owners_private_pages_come_home():
    world = World()
    vma = world.area(4)
    world.fill(vma, 0, 4)
    world.to_device(vma)
    args = world.migration(vma, flags=PRIVATE)
    args.pgmap_owner = "somebody else"
    assert world.setup(args) == 0 and args.cpages == 0
    args = world.migration(vma, flags=SYSTEM)
    assert world.setup(args) == 0 and args.cpages == 0


def test_coherent_pages_are_mapped_and_selected_by_their_own_flag():
    world = World(kind=DEVICE_COHERENT)
    vma = world.area(4)
    world.fill(vma, 0, 2)
    world.to_device(vma)
    kind, bits, frame = world.entries(vma)
    assert (kind == Kind.PRESENT).all() and (world.memory.pgmap[frame] > 0).all() and (bits & Bit.WRITABLE).all()
    world.check()
    for chosen in (SYSTEM, PRIVATE):
        args = world.migration(vma, flags=chosen)
        assert world.setup(args) == 0 and args.cpages == 0
    assert world.home(vma, flags=COHERENT).cpages == 4
    assert world.content(vma).tolist() == [1000 + FIRST, 1001 + FIRST, 0, 0]
    world.check()


def test_coherent_folio_goes_home_for_a_long_term_pin():
    world = World(kind=DEVICE_COHERENT)
    vma = world.area(1)
    world.fill(vma, 0, 1)
    world.to_device(vma)
    pfn = int(world.entries(vma)[2][0])
    world.memory.get(pfn)
    assert world.run(migrate_device_coherent_folio(world.memory, world.thread, pfn)) == 0
    assert world.memory.pgmap[world.entries(vma)[2][0]] == 0 and world.content(vma).tolist() == [1000 + FIRST]
    world.check()


@pytest.mark.parametrize(
    "what", ["none", "hugetlb", "pfnmap", "empty", "before", "after", "no page", "host", "unlocked"]
)
def test_impossible_requests_are_einval(what):
    world = World()
    vma = world.area(8)
    pfns = world.fill(vma, 0, 8)
    args = world.migration(vma)
    if what == "none":
        args.vma = None
    elif what in ("hugetlb", "pfnmap"):
        vma.flags |= VM_HUGETLB if what == "hugetlb" else VM_PFNMAP
    elif what == "empty":
        args.end = args.start + 4095
    elif what == "before":
        args.start -= 4096
    elif what == "after":
        args.end += 4096
    elif what == "no page":
        args.src = args.src[:3]
    elif what == "host":
        world.memory.trylock(pfns[:1])
        args.fault_page = int(pfns[0])
    else:
        args.fault_page = world.device.pgmap.first_pfn
    assert world.setup(args) == -EINVAL
    assert world.log == [] and (world.entries(vma)[0] == Kind.PRESENT).all()


def test_fault_page_stays_locked_and_held_by_the_fault():
    world = World()
    vma = world.area(2)
    world.fill(vma, 0, 2)
    world.to_device(vma)
    pfn = int(world.entries(vma)[2][0])
    world.memory.trylock(np.array([pfn]))  # do_swap_page
    world.memory.get(pfn)
    args = world.migration(vma, 0, 2, flags=PRIVATE, fault_page=pfn)
    assert world.setup(args) == 0 and args.cpages == 2
    new = world.memory.alloc_pages(2)
    world.memory.trylock(new)
    world.memory.copy(migrate_pfn_to_pfn(args.src), new)
    args.dst[:] = migrate_pfn(new)
    world.finish(args)
    assert world.memory.locked(pfn) and world.memory.refcount[pfn] == 1
    assert (world.entries(vma)[0] == Kind.PRESENT).all()
    world.memory.unlock(pfn)
    world.memory.put(pfn)
    assert world.content(vma).tolist() == [1000 + FIRST, 1001 + FIRST]
    world.check()


def test_device_range_brings_home_what_is_mapped_anywhere():
    world = World()
    vma = world.area(600)
    world.fill(vma, 0, 600)
    world.to_device(vma)
    memory, pgmap = world.memory, world.device.pgmap
    src = np.zeros(pgmap.pages, dtype=np.uint64)
    assert world.run(migrate_device_range(memory, world.thread, src, pgmap.first_pfn, pgmap.pages)) == 0
    at = np.flatnonzero(src & MIGRATE)
    assert len(at) == 600 and (world.entries(vma)[0] == Kind.MIGRATION).all()
    dst, new = np.zeros_like(src), memory.alloc_pages(600)
    memory.trylock(new)
    dst[at] = migrate_pfn(new)
    memory.copy(migrate_pfn_to_pfn(src[at]), new)
    world.run(migrate_device_pages(memory, world.thread, src, dst))
    world.run(migrate_device_finalize(memory, world.thread, src, dst))
    assert (world.entries(vma)[0] == Kind.PRESENT).all()
    assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(600)]
    assert "CLEAR" in {e[0] for e in world.log}
    world.check()
    assert world.run(memunmap_pages(memory, world.thread, pgmap)) == 0 and memory.pgmaps[1] is None


def test_unplugged_frames_are_given_out_again():
    world = World()
    memory, thread = world.memory, world.thread
    first = world.device.pgmap.first_pfn
    other = DevPagemap(DEVICE_COHERENT, "b", world.device, 512, 4)
    assert memremap_pages(memory, thread, other) == 0 and other.first_pfn == first + 4096 and other.index == 2
    assert world.run(memunmap_pages(memory, thread, world.device.pgmap)) == 0
    again = DevPagemap(DEVICE_COHERENT, "c", world.device, 1024, 4)
    assert memremap_pages(memory, thread, again) == 0 and (again.first_pfn, again.index) == (first, 1)
    assert memremap_pages(memory, thread, DevPagemap(DEVICE_COHERENT, "d", world.device, 1 << 20, 4)) == -12


# 2 MiB folios


def test_huge_page_moves_whole_and_counts_once():
    world = World()
    vma = world.area(1024)
    head = world.fill_huge(vma, 0)
    args = world.to_device(vma, 0, 512, SYSTEM | HUGE)
    assert args.cpages == 1 and flags(args.src[:2]) == [VALID | MIGRATE | WRITE | COMPOUND, 0]
    kind, _bits, frame = world.entries(vma, 0, 512)
    assert (kind == Kind.DEVICE_PRIVATE).all() and (np.diff(frame) == 1).all()
    assert (
        world.mm.table.leaf_level[world.mm.table.row_of(FIRST >> 9)] == Leaf.PMD and world.memory.order[frame[0]] == 9
    )
    assert world.memory.refcount[head] == 0
    assert world.content(vma, 0, 512).tolist() == [1000 + FIRST + i for i in range(512)]
    world.check()
    args = world.home(vma, 0, 512, PRIVATE | HUGE)
    assert args.cpages == 1 and world.mm.table.leaf_level[world.mm.table.row_of(FIRST >> 9)] == Leaf.PMD
    assert world.content(vma, 0, 512).tolist() == [1000 + FIRST + i for i in range(512)]
    assert len(world.device.blocks) == 2
    world.check()


def test_huge_page_is_split_without_the_compound_flag_or_when_the_range_cuts_it():
    for first, pages, chosen in ((0, 512, SYSTEM), (0, 256, SYSTEM | HUGE), (100, 50, SYSTEM | HUGE)):
        world = World()
        vma = world.area(512)
        world.fill_huge(vma, 0)
        args = world.to_device(vma, first, pages, chosen)
        assert args.cpages == pages and flags(args.src) == [VALID | MIGRATE | WRITE] * pages
        kind = world.entries(vma)[0]
        assert (kind[first : first + pages] == Kind.DEVICE_PRIVATE).all()
        assert np.count_nonzero(kind == Kind.PRESENT) == 512 - pages
        assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(512)]
        world.check()


def test_large_folio_mapped_by_ptes_is_split_first():
    world = World()
    vma = world.area(512)
    world.fill_huge(vma, 0)
    world.run(__split_huge_pmd(world.mm, world.thread, FIRST >> 9))
    args = world.to_device(vma, 0, 10)
    assert args.cpages == 10 and world.content(vma).tolist() == [1000 + FIRST + i for i in range(512)]
    assert np.bincount(world.entries(vma)[0]).tolist() == [0, 502, 0, 0, 10]
    world.check()


def test_pinned_huge_page_does_not_move_at_all():
    for chosen in (SYSTEM | HUGE, SYSTEM):
        world = World()
        vma = world.area(512)
        head = world.fill_huge(vma, 0)
        world.memory.pin(np.array([head]))
        args = world.to_device(vma, 0, 512, chosen)
        assert args.cpages == 0 and (world.entries(vma)[0] == Kind.PRESENT).all()
        world.memory.unpin(np.array([head]))
        world.check()


def test_huge_source_with_small_destinations_is_split():
    world = World()
    vma = world.area(512)
    world.fill_huge(vma, 0)
    args = world.migration(vma, flags=SYSTEM | HUGE)
    world.setup(args)
    head = migrate_pfn_to_pfn(args.src[:1])[0]
    small = world.migration(vma)
    small.src[:] = MIGRATE
    world.device.take(small)
    args.dst[:500] = small.dst[:500]  # and twelve pages stay at home
    unused = migrate_pfn_to_pfn(small.dst[500:])
    world.memory.copy(np.arange(head, head + 500), migrate_pfn_to_pfn(args.dst[:500]))
    world.finish(args)
    world.memory.unlock(unused)
    world.memory.put(unused)
    assert flags(args.src[:500]) == [VALID | MIGRATE | WRITE] * 500 and flags(args.src[500:]) == [VALID | WRITE] * 12
    assert np.bincount(world.entries(vma)[0]).tolist() == [0, 12, 0, 0, 500]
    assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(512)]
    world.check()


def test_huge_hole_is_one_entry_filled_by_one_huge_page():
    world = World()
    vma = world.area(512)
    args = world.migration(vma, flags=SYSTEM | HUGE)
    world.setup(args)
    assert args.cpages == 1 and flags(args.src[:2]) == [MIGRATE | COMPOUND, 0]
    world.device.take(args)
    world.finish(args)
    assert flags(args.src[:2]) == [MIGRATE | COMPOUND, 0]
    assert (world.entries(vma)[0] == Kind.DEVICE_PRIVATE).all() and not world.content(vma).any()
    world.check()


def test_huge_hole_filled_page_by_page():
    world = World()
    vma = world.area(512)
    args = world.migration(vma, flags=SYSTEM | HUGE)
    world.setup(args)
    small = world.migration(vma)
    small.src[:] = MIGRATE
    world.device.take(small)
    args.dst[:] = small.dst
    world.finish(args)
    assert flags(args.src) == [MIGRATE] * 512 and (world.entries(vma)[0] == Kind.DEVICE_PRIVATE).all()
    assert world.mm.table.leaf_level[world.mm.table.row_of(FIRST >> 9)] == Leaf.PTE
    world.check()


def test_small_source_with_a_huge_destination_fails():
    world = World()
    vma = world.area(512)
    world.fill(vma, 0, 1)
    args = world.migration(vma, 0, 1)
    world.setup(args)
    other = world.migration(vma, 0, 1)
    other.src[0] = MIGRATE | COMPOUND
    world.device.take(other)
    args.dst[0] = other.dst[0]
    world.finish(args)
    assert flags(args.src) == [VALID | WRITE] and world.entries(vma)[0][0] == Kind.PRESENT
    world.check()


def test_two_migrations_of_the_same_pages_share_them_out():
    """Page locks decide; nobody waits for ever and nothing is lost."""
    world = World()
    vma = world.area(2048)
    world.fill(vma, 0, 2048)
    one, two = world.migration(vma, 0, 1500), world.migration(vma, 500, 1548)
    threads = [world.engine.thread("one"), world.engine.thread("two")]

    def go(args, thread):
        from kit.memory.device.migrate_device import migrate_vma_setup

        yield from migrate_vma_setup(args, thread)
        thread.charge(5.0)
        yield from thread.sync()
        world.device.take(args)
        yield from migrate_vma_pages(args, thread)
        yield from migrate_vma_finalize(args, thread)

    world.mm.costs.migrate_entry = 0.1
    world.run(*(go(args, thread) for args, thread in zip((one, two), threads, strict=True)))
    assert one.cpages + two.cpages == 2048 and one.cpages == 1500
    assert (world.entries(vma)[0] == Kind.DEVICE_PRIVATE).all()
    assert world.content(vma).tolist() == [1000 + FIRST + i for i in range(2048)]
    world.check()


def test_moves_say_where_pages_were():
    world = World()
    vma = world.area(8)
    world.fill(vma, 0, 4)
    world.to_device(vma, 0, 6)
    world.home(vma, 0, 6)
    moves = world.engine.trace.moves
    rows = list(
        zip(*(moves.column(c).astype(int).tolist() for c in ("first_page", "pages", "src", "dst")), strict=True)
    )
    assert rows == [(FIRST + 4, 2, 0, 2), (FIRST, 4, 1, 2), (FIRST, 6, 2, 1)]


def test_holes_of_what_is_not_anonymous_are_not_filled():
    world = World()
    vma = world.area(4, RW, ops=object())
    args = world.migration(vma)
    assert world.setup(args) == 0 and args.cpages == 0 and not args.src.any()
