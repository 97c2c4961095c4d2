"""Documented behaviour of faults, copy on write, reclaim, pins and huge pages, with the counts that follow from it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from kit.errors import DriverError, Errno
from kit.memory.costs import COSTS, make_costs
from kit.memory.device.exclusive import make_device_exclusive
from kit.memory.faults.access import touch
from kit.memory.faults.gup import get_user_pages, pin_user_pages, pin_user_pages_fast, unpin_user_pages
from kit.memory.faults.load_store import load, read_bytes, store, write_bytes
from kit.memory.files.file import File
from kit.memory.files.filemap import fsync, pread, pwrite, truncate
from kit.memory.invariants import check_invariants
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_notifier_insert
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier, MmuIntervalNotifierOps
from kit.memory.physical.pages import ZERO_PFN, PhysicalMemory
from kit.memory.reclaim.rmap import remove_migration_ptes, try_to_migrate
from kit.memory.space.mm import Mm
from kit.memory.syscalls.exit import exit_mmap, oom_reap_task_mm
from kit.memory.syscalls.fork import fork
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap, mprotect, mremap, munmap
from kit.memory.types import (
    FOLL_LONGTERM,
    FOLL_WRITE,
    MADV_COLD,
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_HWPOISON,
    MADV_PAGEOUT,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_POPULATE,
    MAP_PRIVATE,
    MAP_SHARED,
    MREMAP_MAYMOVE,
    PAGE,
    PG,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Bit,
    Kind,
)  # fmt: skip
from kit.sim.engine import Engine
from kit.sim.locks import RwLock

RW, ANON, SHARED = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, MAP_SHARED | MAP_ANONYMOUS
HUGE = 512 * PAGE
Program = Generator[Any, Any, Any]


class World:
    def __init__(self, frames: int = 1 << 14, payload: int = 8, swap: int = 1 << 13, costs: dict | None = None) -> None:
        self.engine = Engine()
        self.memory = PhysicalMemory(self.engine, frames, payload_bytes=payload, swap_slots=swap)
        self.thread = self.engine.thread("cpu")
        self.costs = make_costs(costs)
        self.mm = Mm(self.memory, self.engine, self.costs)
        self.mms = [self.mm]
        self.events: list[tuple[str, int, int, object]] = []

    def run(self, program: Program) -> Any:
        process = self.engine.start(program)
        self.engine.run(process)
        return process.value

    def map(self, size: int, prot: int = RW, flags: int = ANON, **more: Any) -> np.ndarray:
        start = self.run(mmap(self.mm, self.thread, size, prot, flags, **more))
        assert start > 0
        return np.arange(start // PAGE, start // PAGE + -(-size // PAGE))

    def fork(self) -> Mm:
        child = self.run(fork(self.mm, self.thread))
        self.mms.append(child)
        return child

    def exit(self, mm: Mm) -> None:
        self.run(exit_mmap(mm, self.thread))
        self.mms.remove(mm)

    def store(self, pages: np.ndarray, stamps: Any, mm: Mm | None = None) -> None:
        self.run(store(mm or self.mm, self.thread, pages, stamps))

    def load(self, pages: np.ndarray, mm: Mm | None = None) -> list[int]:
        return self.run(load(mm or self.mm, self.thread, pages)).tolist()

    def advise(self, pages: np.ndarray, advice: int) -> int:
        return self.run(madvise(self.mm, self.thread, int(pages[0]) * PAGE, len(pages) * PAGE, advice))

    def frames(self, pages: np.ndarray, mm: Mm | None = None) -> np.ndarray:
        table = (mm or self.mm).table
        return table.frame[table.slots_of(pages)]

    def kinds(self, pages: np.ndarray, mm: Mm | None = None) -> set[int]:
        table = (mm or self.mm).table
        return set(table.kind[table.slots_of(pages)].tolist())

    def watch(self) -> None:
        def invalidate(sub: Any, thread: Any, range: Any, seq: int) -> Program:
            sub.invalidate_seq = seq
            self.events.append((range.event.name, range.start // PAGE, range.end // PAGE, range.owner))
            return True
            yield

        sub = MmuIntervalNotifier()
        ops = MmuIntervalNotifierOps(invalidate)
        assert self.run(mmu_interval_notifier_insert(sub, self.thread, self.mm, 0, 1 << 48, ops)) == 0

    def told(self) -> list[tuple[str, int, int]]:
        said, self.events = [event[:3] for event in self.events], []
        return said

    def check(self, extra: dict[int, int] | None = None) -> None:
        check_invariants(self.memory, self.mms, extra)


@pytest.fixture
def world() -> World:
    return World()


def test_reads_share_the_zero_page_and_the_first_write_replaces_it(world: World) -> None:
    world.watch()
    pages = world.map(16 * PAGE)
    assert world.load(pages) == [0] * 16
    assert set(world.frames(pages).tolist()) == {ZERO_PFN} and world.mm.rss["anon"] == 0
    assert world.told() == []  # nothing was there that a mirror could hold
    world.store(pages[3:5], [7, 8])
    assert world.told() == [("CLEAR", pages[3], pages[5])]
    assert world.mm.rss["anon"] == 2 and world.load(pages)[2:6] == [0, 7, 8, 0]
    world.check()


def test_fork_write_protects_both_and_the_last_owner_reuses(world: World) -> None:
    pages = world.map(4 * PAGE)
    world.store(pages, [1, 2, 3, 4])
    world.watch()
    child = world.fork()
    assert world.told() == [("PROTECTION_PAGE", pages[0], pages[0] + 4)]
    before = world.frames(pages)
    assert (world.memory.mapcount[before] == 2).all() and (world.memory.refcount[before] == 2).all()
    world.store(pages[:1], 9)
    assert world.told() == [("CLEAR", pages[0], pages[1])]
    assert world.frames(pages)[0] != before[0] and world.load(pages, child) == [1, 2, 3, 4]
    world.exit(child)
    world.store(pages[1:2], 9)
    assert world.told() == [] and world.frames(pages)[1] == before[1]  # reused: an upgrade is no invalidation
    world.check()


def test_shared_memory_stays_shared_after_fork(world: World) -> None:
    pages = world.map(4 * PAGE, flags=SHARED)
    world.store(pages[:2], [1, 2])
    child = world.fork()
    world.store(pages[2:], [3, 4], child)
    assert world.load(pages) == [1, 2, 3, 4]
    assert world.mm.rss["shmem"] == 4
    world.check()
    world.exit(child)
    world.exit(world.mm)
    assert world.memory.free_pages == world.memory.system_frames - 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda w, p: munmap(w.mm, w.thread, int(p[8]) * PAGE, 8 * PAGE), [("UNMAP", 8, 16)]),
        (lambda w, p: madvise(w.mm, w.thread, int(p[8]) * PAGE, 8 * PAGE, MADV_DONTNEED), [("CLEAR", 8, 16)]),
        (lambda w, p: madvise(w.mm, w.thread, int(p[8]) * PAGE, 8 * PAGE, MADV_FREE), [("CLEAR", 8, 16)]),
        (lambda w, p: mprotect(w.mm, w.thread, int(p[8]) * PAGE, 8 * PAGE, PROT_READ), [("PROTECTION_VMA", 8, 16)]),
        (lambda w, p: madvise(w.mm, w.thread, int(p[8]) * PAGE, 8 * PAGE, MADV_PAGEOUT), [("CLEAR", 8, 16)]),
        (lambda w, p: fork(w.mm, w.thread), [("PROTECTION_PAGE", 0, 32)]),
    ],
)  # fmt: skip
def test_what_is_told_before_entries_change(world: World, change: Any, wanted: list) -> None:
    pages = world.map(32 * PAGE)
    world.store(pages, np.arange(32))
    world.watch()
    world.run(change(world, pages))
    assert [(event, first - pages[0], end - pages[0]) for event, first, end in world.told()] == wanted


def test_a_range_without_tables_is_protected_silently(world: World) -> None:
    pages = world.map(512 * PAGE)
    world.watch()
    assert world.run(mprotect(world.mm, world.thread, int(pages[0]) * PAGE, 512 * PAGE, PROT_READ)) == 0
    assert world.told() == []


def test_protection_comes_and_goes_without_losing_content(world: World) -> None:
    pages = world.map(8 * PAGE)
    start = int(pages[0]) * PAGE
    world.store(pages, np.arange(8))
    world.run(mprotect(world.mm, world.thread, start + 2 * PAGE, 2 * PAGE, PROT_NONE))
    assert len(world.mm.vmas) == 3
    with pytest.raises(DriverError, match="SIGSEGV"):
        world.run(touch(world.mm, world.thread, pages[2:3], False))
    world.run(mprotect(world.mm, world.thread, start + 2 * PAGE, 2 * PAGE, RW))
    assert len(world.mm.vmas) == 1
    faults = world.mm.faults
    world.store(pages, np.arange(8) + 1)
    assert world.mm.faults == faults  # exclusive pages are writable again at once
    assert world.run(mprotect(world.mm, world.thread, start, 9 * PAGE, PROT_READ)) == -12
    world.check()


def test_huge_pages_fault_once_and_are_split_by_what_covers_a_part(world: World) -> None:
    pages = world.map(2 * HUGE)
    world.advise(pages, MADV_HUGEPAGE)
    world.store(pages, pages)
    assert world.mm.faults == 2 and world.mm.table.leaf_level[:2].tolist() == [1, 1]
    head = int(world.frames(pages)[0])
    assert (world.memory.refcount[head], world.memory.mapcount[head]) == (1, 1)
    world.watch()
    world.run(munmap(world.mm, world.thread, int(pages[100]) * PAGE, 10 * PAGE))
    first = pages[0]
    assert world.told() == [("CLEAR", first, first + 512), ("UNMAP", first + 100, first + 110)]
    assert (world.memory.refcount[head], world.memory.mapcount[head]) == (502, 502)
    assert world.load(pages[110:600]) == pages[110:600].tolist()
    world.check()
    world.run(munmap(world.mm, world.thread, int(first) * PAGE, 2 * HUGE))
    world.check()
    assert len(world.mm.table.leaves(0, 1 << 36)[0]) == 0


def test_the_huge_zero_page_is_written_away(world: World) -> None:
    pages = world.map(HUGE)
    world.advise(pages, MADV_HUGEPAGE)
    assert world.load(pages[5:6]) == [0] and world.memory.huge_zero >= 0
    assert world.frames(pages)[0] == world.memory.huge_zero
    world.watch()
    world.store(pages[5:6], 1)
    assert world.told() == [("CLEAR", pages[0], pages[0] + 512)]
    assert world.mm.rss["anon"] == 512 and world.load(pages[4:7]) == [0, 1, 0]
    world.check()


@pytest.mark.parametrize("prot", [PROT_NONE, PROT_READ])
def test_a_part_of_the_huge_zero_page_keeps_the_rights_of_the_whole(world: World, prot: int) -> None:
    pages = world.map(HUGE)
    world.advise(pages, MADV_HUGEPAGE)
    world.load(pages)
    world.run(mprotect(world.mm, world.thread, int(pages[0]) * PAGE, HUGE, prot))
    world.run(munmap(world.mm, world.thread, int(pages[0]) * PAGE, PAGE))
    assert world.frames(pages[1:2])[0] == ZERO_PFN
    if prot == PROT_READ:
        assert world.load(pages[1:]) == [0] * 511
    else:
        with pytest.raises(DriverError, match="SIGSEGV"):
            world.load(pages[1:2])
    with pytest.raises(DriverError, match="SIGSEGV"):
        world.store(pages[1:2], 1)
    world.check()


def test_collapse_copies_small_pages_into_a_huge_one(world: World) -> None:
    pages = world.map(HUGE)
    world.store(pages[:300], pages[:300])
    assert world.advise(pages, MADV_COLLAPSE) == 0
    assert world.mm.table.leaf_level[world.mm.table.row_of(int(pages[0]) >> 9)] == 1
    assert world.load(pages) == pages[:300].tolist() + [0] * 212
    world.check()
    pinned = world.map(HUGE)
    world.store(pinned, 1)
    held = world.run(pin_user_pages(world.mm, world.thread, int(pinned[7]) * PAGE, 1, FOLL_WRITE))
    assert world.advise(pinned, MADV_COLLAPSE) == -11
    unpin_user_pages(world.memory, held)


@pytest.mark.parametrize("delta", [0, 7])
def test_mremap_keeps_content_and_the_linear_index(world: World, delta: int) -> None:
    pages = world.map(2 * HUGE)
    world.advise(pages, MADV_HUGEPAGE)
    world.store(pages, pages)
    to = int(pages[0]) - 8 * 512 + delta
    moved = world.run(mremap(world.mm, world.thread, int(pages[0]) * PAGE, HUGE, HUGE, MREMAP_MAYMOVE | 2, to * PAGE))
    assert moved == to * PAGE
    there = np.arange(to, to + 512)
    assert world.mm.table.leaf_level[world.mm.table.row_of(to >> 9)] == (0 if delta else 1)
    assert world.load(there) == pages[:512].tolist()
    frames = np.sort(world.frames(there))
    heads = world.memory.head(frames[:1])
    world.memory.get(heads)
    world.memory.trylock(heads)
    world.run(try_to_migrate(world.memory, world.thread, heads))  # rmap still finds it
    assert world.kinds(there) == {Kind.MIGRATION} and world.memory.mapcount[heads[0]] == 0
    restored = world.run(remove_migration_ptes(world.memory, world.thread, heads, heads))
    assert restored == 512
    world.memory.unlock(heads)
    world.memory.put(heads)
    assert world.load(there) == pages[:512].tolist()
    world.check()


def test_swapped_pages_keep_content_and_exclusiveness(world: World) -> None:
    pages = world.map(64 * PAGE)
    world.store(pages, pages)
    assert world.advise(pages, MADV_PAGEOUT) == 0
    assert world.kinds(pages) == {Kind.SWAP} and world.mm.rss == {"anon": 0, "file": 0, "shmem": 0, "swap": 64}
    assert world.memory.free_pages == world.memory.system_frames - 1
    assert world.load(pages) == pages.tolist()
    faults = world.mm.faults
    world.store(pages, 1)
    assert world.mm.faults == faults  # the swap entries knew that nobody else had the pages
    assert world.memory.swap.free == world.memory.swap.slots
    world.check()


def test_a_swapped_page_of_two_processes_is_read_once_and_copied_on_write(world: World) -> None:
    pages = world.map(4 * PAGE)
    world.store(pages, [1, 2, 3, 4])
    world.advise(pages, MADV_PAGEOUT)
    child = world.fork()
    assert (world.memory.swap.count[world.frames(pages)] == 2).all()
    assert world.load(pages) == [1, 2, 3, 4]
    world.store(pages[:2], [8, 9], child)
    assert world.load(pages) == [1, 2, 3, 4] and world.load(pages, child) == [8, 9, 3, 4]
    assert world.memory.vm_events["pswpin"] == 4
    world.check()
    world.exit(child)
    world.exit(world.mm)
    assert world.memory.swap.free == world.memory.swap.slots
    world.check()


def test_shared_memory_swaps_too(world: World) -> None:
    pages = world.map(32 * PAGE, flags=SHARED)
    world.store(pages, pages)
    assert world.advise(pages, MADV_PAGEOUT) == 0
    assert world.kinds(pages) == {Kind.NONE} and world.memory.swap.free == world.memory.swap.slots - 32
    world.check()
    assert world.load(pages) == pages.tolist()
    world.check()


def test_memory_that_is_short_goes_to_swap_and_out_of_swap_is_out(world: World) -> None:
    small = World(frames=1024, swap=2048)
    pages = small.map(2048 * PAGE)
    small.store(pages, pages)
    small.check()
    assert small.load(pages) == pages.tolist()
    small.check()
    more = small.map(4096 * PAGE)
    with pytest.raises(DriverError, match="OOM-kill"):
        small.store(more, 1)


def test_locked_and_pinned_pages_stay(world: World) -> None:
    locked = world.map(8 * PAGE, flags=ANON | MAP_LOCKED)
    pages = world.map(8 * PAGE)
    world.store(pages, 1)
    pins = world.run(pin_user_pages(world.mm, world.thread, int(pages[0]) * PAGE, 4, FOLL_WRITE))
    assert world.kinds(locked) == {Kind.PRESENT}
    assert world.advise(locked, MADV_PAGEOUT) == -22
    world.advise(pages, MADV_PAGEOUT)
    assert world.kinds(pages[:4]) == {Kind.PRESENT} and world.kinds(pages[4:]) == {Kind.SWAP}
    child = world.fork()
    assert (world.frames(pages[:4], child) != world.frames(pages[:4])).all()  # copied, not shared
    world.store(pages[:4], 5)
    assert (world.frames(pages[:4]) == pins).all() and world.load(pages[:4], child) == [1] * 4
    unpin_user_pages(world.memory, pins)
    world.check()


def test_a_read_pin_of_a_shared_page_takes_its_own_copy(world: World) -> None:
    pages = world.map(2 * PAGE)
    world.store(pages, [1, 2])
    child = world.fork()
    pins = world.run(pin_user_pages(world.mm, world.thread, int(pages[0]) * PAGE, 2))
    assert (world.frames(pages, child) != pins).all()
    assert (world.memory.flags[pins] & PG.ANON_EXCLUSIVE).all()
    world.store(pages, [3, 4])
    assert world.memory.payload[pins, 0].tolist() == [3, 4]  # the device sees what the program writes
    unpin_user_pages(world.memory, pins)
    plain = world.run(get_user_pages(child, world.thread, int(pages[0]) * PAGE, 2))
    world.memory.put(plain)
    world.check()


def test_gup_errors_and_the_zero_page(world: World) -> None:
    pages = world.map(4 * PAGE, prot=PROT_READ)
    start = int(pages[0]) * PAGE
    got = world.run(get_user_pages(world.mm, world.thread, start, 4))
    assert got.tolist() == [ZERO_PFN] * 4
    world.memory.put(got)
    refused = world.run(get_user_pages(world.mm, world.thread, start, 4, FOLL_WRITE))
    assert isinstance(refused, Errno) and refused == -14
    assert len(world.run(pin_user_pages_fast(world.mm, world.thread, start, 8))) == 4  # short: the rest is not mapped
    held = world.run(pin_user_pages(world.mm, world.thread, start, 1, FOLL_LONGTERM))
    assert held[0] != ZERO_PFN  # a long-term pin breaks copy on write beforehand
    unpin_user_pages(world.memory, held)
    assert world.memory.refcount[ZERO_PFN] == 1
    world.check()


def test_device_exclusive_page_comes_back_on_cpu_access(world: World) -> None:
    pages = world.map(HUGE)
    world.advise(pages, MADV_HUGEPAGE)
    world.store(pages, pages)
    world.watch()
    owner = object()
    pfn = world.run(make_device_exclusive(world.mm, world.thread, int(pages[3]) * PAGE, owner))
    assert world.events[-1] == ("EXCLUSIVE", pages[3], pages[4], owner)
    assert world.kinds(pages[3:4]) == {Kind.DEVICE_EXCLUSIVE}
    world.memory.unlock(pfn)
    world.memory.put(pfn)
    world.check()
    world.told()
    assert world.load(pages[3:4]) == [pages[3]]
    assert world.told() == [("CLEAR", pages[3], pages[4])]
    faults = world.mm.faults
    world.store(pages[3:4], 1)
    assert world.mm.faults == faults  # it came back writable
    shared = world.map(PAGE, flags=SHARED)
    refused = world.run(make_device_exclusive(world.mm, world.thread, int(shared[0]) * PAGE, owner))
    assert refused == -95
    world.check()


def test_file_mappings(world: World) -> None:
    content = np.arange(64, dtype=np.uint64)[:, None] + 100
    file = File(world.memory, 64, content.copy())
    shared = world.map(64 * PAGE, flags=MAP_SHARED, file=file, align=16 * PAGE)
    private = world.map(32 * PAGE, flags=MAP_PRIVATE, file=file, offset=16 * PAGE)
    assert world.load(shared[:1]) == [100]
    assert world.mm.rss["file"] == 1 and int((file.cache >= 0).sum()) == 32  # readahead fills the cache, not the table
    assert world.load(shared[1:2]) == [101] and world.mm.rss["file"] == 16  # fault-around
    assert world.load(shared) == (np.arange(64) + 100).tolist()
    world.store(private[:2], [1, 2])
    assert world.load(shared[16:18]) == [116, 117] and world.load(private[:3]) == [1, 2, 118]
    world.store(shared[18:19], 5)
    assert world.load(private[2:3]) == [5] and file.data[18, 0] == 118
    world.watch()
    world.run(fsync(file, world.thread, world.mm))
    assert file.data[18, 0] == 5 and ("PROTECTION_PAGE", shared[18], shared[19]) in world.told()
    assert world.run(pwrite(file, world.thread, world.mm, 20, np.array([[77]], dtype=np.uint64))) == 1
    assert world.load(shared[20:21]) == [77] and world.run(pread(file, world.thread, world.mm, 20, 1))[0, 0] == 77
    world.check()
    assert world.advise(shared, MADV_PAGEOUT) == 0
    assert world.load(shared[18:21]) == [5, 119, 77]
    world.check()
    world.run(truncate(file, world.thread, 17))
    with pytest.raises(DriverError, match="SIGBUS"):
        world.load(private[1:2])
    assert world.load(private[:1]) == [1]
    world.check()


@pytest.mark.parametrize(("order", "size"), [(9, 2 << 20), (18, 1 << 30)])
def test_hugetlb_pages_come_from_their_pool(order: int, size: int) -> None:
    world = World(frames=(4 << order) + 8192)
    flags = ANON | MAP_HUGETLB
    assert world.run(mmap(world.mm, world.thread, size, RW, flags, hugetlb=size)) == -12
    assert world.memory.set_hugetlb_pool(order, 2) == 2
    pages = world.map(size, flags=flags, hugetlb=size)
    assert pages[0] % (1 << order) == 0
    assert world.run(mmap(world.mm, world.thread, 2 * size, RW, flags, hugetlb=size)) == -12  # reserved
    world.store(pages[:5], [1, 2, 3, 4, 5])
    assert world.mm.faults == 1 and len(world.memory.hugetlb_free[order]) == 1
    assert world.mm.table.leaf_level[world.mm.table.row_of(int(pages[0]) >> 9)] == (1 if order == 9 else 2)
    child = world.fork()
    world.store(pages[:1], 9, child)
    assert world.load(pages[:2]) == [1, 2] and world.load(pages[:2], child) == [9, 2]
    world.check()
    assert world.run(munmap(world.mm, world.thread, int(pages[1]) * PAGE, PAGE)) == -22
    world.exit(child)
    world.exit(world.mm)
    world.check()
    assert len(world.memory.hugetlb_free[order]) == 2 and world.memory.hugetlb_reserved[order] == 0


def test_poisoned_page_kills_whoever_touches_it(world: World) -> None:
    pages = world.map(4 * PAGE)
    world.store(pages, 1)
    assert world.advise(pages[1:2], MADV_HWPOISON) == 0
    assert world.kinds(pages[1:2]) == {Kind.HWPOISON}
    with pytest.raises(DriverError, match="SIGBUS"):
        world.load(pages[1:2])
    assert world.load(pages[2:]) == [1, 1]
    world.check()


def test_the_oom_reaper_takes_private_memory_and_populate_fills_it(world: World) -> None:
    pages = world.map(600 * PAGE, flags=ANON | MAP_POPULATE)
    assert world.kinds(pages) == {Kind.PRESENT} and world.mm.rss["anon"] == 600
    assert world.run(oom_reap_task_mm(world.mm, world.thread)) is True
    assert world.mm.rss["anon"] == 0
    world.check()


def test_bytes_across_pages() -> None:
    world = World(payload=4096)
    pages = world.map(4 * PAGE)
    start = int(pages[0]) * PAGE + 4000
    data = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8)
    world.run(write_bytes(world.mm, world.thread, start, data))
    assert np.array_equal(world.run(read_bytes(world.mm, world.thread, start - 10, 5020))[10:5010], data)


def test_addresses_go_down_from_the_top_and_come_back() -> None:
    world = World()
    first, second = world.map(PAGE), world.map(3 * PAGE)
    assert second[0] == first[0] - 3
    world.run(munmap(world.mm, world.thread, int(second[0]) * PAGE, 3 * PAGE))
    assert world.map(3 * PAGE)[0] == second[0]
    assert world.map(2 * HUGE)[0] % 512 == 0
    assert world.map(16 * PAGE, align=HUGE)[0] % 512 == 0


def test_time_is_the_sum_of_its_costs() -> None:
    names = dict.fromkeys(COSTS, 0.0)
    world = World(costs=names | {"fault_entry": 1.0, "handle_mm_fault": 0.5, "page_alloc": 0.25, "page_zero": 0.125})
    pages = world.map(100 * PAGE)
    world.store(pages, 1)
    assert world.thread.now == pytest.approx(100 * 1.875)
    world.store(pages, 2)
    assert world.thread.now == pytest.approx(100 * 1.875)


def test_rw_lock_is_fair() -> None:
    engine, lock, order = Engine(), RwLock(), []
    threads = [engine.thread(name) for name in "abcd"]

    def reader(thread: Any, start: float, hold: float) -> Program:
        thread.charge(start)
        yield from lock.read_acquire(thread)
        order.append((thread.name, thread.now))
        thread.charge(hold)
        yield from lock.read_release(thread)

    def writer(thread: Any, start: float, hold: float) -> Program:
        thread.charge(start)
        yield from lock.write_acquire(thread)
        order.append((thread.name, thread.now))
        thread.charge(hold)
        yield from lock.write_release(thread)

    engine.start(reader(threads[0], 0, 10))
    engine.start(writer(threads[1], 1, 5))
    engine.start(reader(threads[2], 2, 10))  # behind the writer, although a reader is in
    engine.start(reader(threads[3], 3, 10))
    engine.run()
    assert order == [("a", 0), ("b", 10), ("c", 15), ("d", 15)]
    assert lock.readers == 0 and lock.writer is None


def test_threads_that_fault_while_a_page_migrates_wait_for_it(world: World) -> None:
    pages = world.map(2 * PAGE)
    world.store(pages, [1, 2])
    pfn = world.frames(pages)[:1]
    other = world.engine.thread("other")

    def migrate() -> Program:
        world.memory.get(pfn)
        world.memory.trylock(pfn)
        yield from try_to_migrate(world.memory, world.thread, pfn)
        world.thread.charge(50.0)
        yield from world.thread.sync()
        yield from remove_migration_ptes(world.memory, world.thread, pfn, pfn)
        world.memory.unlock(pfn)
        world.memory.put(pfn)

    world.engine.start(migrate())
    reading = world.engine.start(load(world.mm, other, pages))
    world.engine.run()
    assert reading.value.tolist() == [1, 2] and other.now == 50.0
    assert int(world.mm.table.bits[world.mm.table.slots_of(pages[:1])][0]) & Bit.WRITABLE
    world.check()


@pytest.mark.parametrize("advice", [MADV_COLD, MADV_FREE])
def test_advice_on_part_of_a_huge_page_leaves_one_entry_alike(world: World, advice: int) -> None:
    pages = world.map(HUGE)
    world.advise(pages, MADV_HUGEPAGE)
    world.store(pages, pages)
    held = world.run(pin_user_pages(world.mm, world.thread, int(pages[0]) * PAGE, 1, FOLL_WRITE))
    assert world.advise(pages[:100], advice) == 0  # pinned, so it cannot be split
    world.check()
    unpin_user_pages(world.memory, held)
    assert world.load(pages) == pages.tolist()
