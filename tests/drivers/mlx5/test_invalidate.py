"""What a change of the CPU's page table does to the hardware's entries, and how it is counted."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.odp_rig import GIB, ODP, Rig, steps
from hypothesis import given
from hypothesis import strategies as st

from kit.drivers.mlx5.adapter.mkey_table import Verdict
from kit.drivers.mlx5.enums import PAGE, Access, Era
from kit.drivers.mlx5.mr.restrack import fill_stat_mr_entry
from kit.drivers.mlx5.odp.invalidate import blocks_to_zap
from kit.memory.notifier.mmu_notifier import (
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_invalidate_range_start_nonblock,
)
from kit.memory.notifier.mmu_notifier_types import EVENTS, MmuNotifierRange
from kit.memory.types import PG

ERAS = [Era.MID, Era.NEW]


def scan(mapped, low, fixed):
    """The documented loop, page by page."""
    blocks, in_block, start, counted, idx = [], False, 0, 0, low
    for at, there in enumerate(mapped):
        idx = low + at
        if there:
            if not in_block:
                start, in_block, counted = idx, True, 0
            if not fixed:
                counted += idx - start + 1
        elif in_block and idx % 8 == 0:
            blocks.append((start, idx - start, counted + (idx - start + 1 if fixed else 0)))
            in_block = False
    if in_block:
        blocks.append((start, idx - start + 1, counted + (idx - start + 1 if fixed else 0)))
    return blocks


@given(st.lists(st.booleans(), max_size=80), st.integers(0, 20), st.booleans())
def test_blocks_are_those_of_the_documented_loop(mapped, low, fixed):
    assert blocks_to_zap(np.array(mapped, dtype=bool), low, fixed) == scan(mapped, low, fixed)


def test_closed_forms():
    full = np.ones(512, dtype=bool)
    assert blocks_to_zap(full, 0, True) == [(0, 512, 512)]
    assert blocks_to_zap(full, 0, False) == [(0, 512, 512 * 513 // 2)]  # n(n+1)/2
    one = np.zeros(64, dtype=bool)
    one[1] = True
    assert blocks_to_zap(one, 0, True) == [(1, 7, 8)]  # closed in mid-scan: one too many
    assert blocks_to_zap(one, 0, False) == [(1, 7, 1)]
    holes = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    assert blocks_to_zap(holes, 0, True) == [(0, 16, 17)]  # small holes are bridged
    assert len(blocks_to_zap(np.tile([True] + [False] * 15, 8), 0, True)) == 8


def resident(era: Era, pages: int = 64, **options: object) -> tuple[Rig, int, object]:
    rig = Rig(era, **options)
    va = rig.mmap(pages, resident=True)
    return rig, va, rig.reg(va, pages * PAGE)


@pytest.mark.parametrize("era", ERAS)
def test_zap_then_unmap_then_dirty(era):
    rig, va, mr = resident(era)
    pfns = rig.hca.dma.resolve(rig.walk(mr.rkey, va, 64 * PAGE).addresses)[0]
    rig.memory.flags[pfns] &= ~np.uint16(PG.DIRTY)
    before, since = rig.umrs(), len(rig.engine.trace.spans)
    rig.dontneed(va, 64)
    names = steps(rig, since)
    assert rig.umrs() - before == 1 and rig.hca.dma.live == 0
    assert (
        names.index("mlx5r_umr_update_xlt") < names.index("ib_umem_odp_unmap_dma_pages") < names.index("set_page_dirty")
    )
    assert rig.walk(mr.rkey, va, PAGE).verdict == Verdict.FAULT
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_neighbours_in_the_same_64_bytes_are_zapped_too(era):
    rig, va, mr = resident(era)
    rig.dontneed(va + 11 * PAGE, 1)
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8].xlt
    assert np.flatnonzero(hw[:64] == 0).tolist() == list(range(8, 16))
    assert mr.umem.npages == 63 and mr.umem.mapped(0, 64).sum() == 63
    before = mr.odp_stats.faults
    assert not rig.fault(mr.rkey, va + 8 * PAGE, PAGE)  # mapped, but not for the hardware
    assert mr.odp_stats.faults - before == 1
    live = 63
    assert rig.hca.dma.live == live
    assert np.flatnonzero(hw[:64] == 0).tolist() == [11]
    rig.check(mr)


@pytest.mark.parametrize(
    ("era", "options", "counted", "handled"),
    [
        (Era.MID, {}, 512 * 513 // 2, None),
        (Era.MID, {"invalidations_fixed": True}, 512, None),
        (Era.MID, {"invalidations_fixed": True, "handled_counters": True}, 512, 1),
        (Era.NEW, {}, 512, 1),
    ],
)
def test_counters(era, options, counted, handled):
    rig, va, mr = resident(era, 512, **options)
    rig.dontneed(va, 512)
    rows = fill_stat_mr_entry(mr)
    assert rows["page_invalidations"] == counted
    assert rows.get("page_invalidations_handled") == handled
    names = ["page_faults", "page_faults_handled", "page_invalidations", "page_invalidations_handled", "page_prefetch"]
    assert list(rows) == (names if handled else names[::2])


@pytest.mark.parametrize(("options", "counted"), [({}, 1), ({"invalidations_fixed": True}, 8)])
def test_one_page_in_a_wide_unmap(options, counted):
    rig = Rig(**options)
    va = rig.mmap(64)
    mr = rig.reg(va, 64 * PAGE)
    assert not rig.fault(mr.rkey, va + PAGE, PAGE)
    rig.munmap(va, 64)
    assert mr.odp_stats.invalidations == counted


def test_a_huge_entry_counts_once():
    from kit.memory.syscalls.mmap import mmap
    from kit.memory.types import MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, PROT_READ, PROT_WRITE

    rig = Rig(Era.NEW)
    rig.memory.set_hugetlb_pool(9, 2)
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB
    va = rig.run(mmap(rig.mm, rig.thread, 2 << 20, PROT_READ | PROT_WRITE, flags))
    mr = rig.reg(va, 2 << 20, ODP | Access.HUGETLB)
    assert not rig.fault(mr.rkey, va, PAGE)
    rig.munmap(va, 512)
    assert fill_stat_mr_entry(mr) == {
        "page_faults": 512, "page_faults_handled": 1, "page_invalidations": 1, "page_invalidations_handled": 1,
        "page_prefetch": 0,
    }  # fmt: skip


def test_every_event_zaps():
    for event in EVENTS:
        rig, va, mr = resident(Era.MID)
        range_ = MmuNotifierRange(rig.mm, va, va + 8 * PAGE, event, owner=rig.dev)
        assert rig.run(mmu_notifier_invalidate_range_start(range_, rig.thread)) == 0
        rig.run(mmu_notifier_invalidate_range_end(range_, rig.thread))
        assert mr.umem.npages == 56
        rig.check(mr)


def test_a_range_that_must_not_block_is_refused():
    rig, va, mr = resident(Era.MID)
    range_ = MmuNotifierRange(rig.mm, va, va + PAGE, EVENTS.CLEAR, blockable=False)
    assert rig.run(mmu_notifier_invalidate_range_start_nonblock(range_, rig.thread)) == -11
    assert mr.umem.npages == 64


@pytest.mark.parametrize("era", ERAS)
def test_the_sequence_moves_even_when_nothing_is_mapped(era):
    rig = Rig(era)
    va = rig.mmap(8)
    mr = rig.reg(va, 8 * PAGE)
    seq, before = mr.umem.notifier.invalidate_seq, rig.umrs()
    rig.dontneed(va, 8)
    assert rig.umrs() == before
    range_ = MmuNotifierRange(rig.mm, va, va + PAGE, EVENTS.CLEAR)
    rig.run(mmu_notifier_invalidate_range_start(range_, rig.thread))
    assert mr.umem.notifier.invalidate_seq != seq
    rig.run(mmu_notifier_invalidate_range_end(range_, rig.thread))
    assert mr.odp_stats.invalidations == 0 and rig.umrs() == before


@pytest.mark.parametrize("era", ERAS)
def test_munmap_of_the_whole_and_of_more(era):
    rig, va, mr = resident(era)
    rig.mmap(1, at=va - 4 * PAGE)
    rig.munmap(va - 4 * PAGE, 80)
    assert rig.hca.dma.live == 0 and mr.umem.npages == 0
    assert rig.fault(mr.rkey, va, PAGE)


def test_the_newest_driver_counts_written_entries_as_pages():
    """Entries that are written again are counted again, so an empty region can seem to hold pages."""
    rig = Rig(Era.NEW)
    va = rig.mmap(8)
    mr = rig.reg(va, 8 * PAGE)
    for page in range(3):
        assert not rig.fault(mr.rkey, va + page * PAGE, PAGE)
    assert mr.umem.npages == 1 + 2 + 3 and rig.hca.dma.live == 3
    rig.dontneed(va, 8)
    assert mr.umem.npages == 3 and rig.hca.dma.live == 0
    old = Rig(Era.MID)
    va = old.mmap(8)
    mr = old.reg(va, 8 * PAGE)
    for page in range(3):
        assert not old.fault(mr.rkey, va + page * PAGE, PAGE)
    assert mr.umem.npages == 3


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("seed", range(4))
def test_faults_race_invalidations(era, seed):
    """Whatever the interleaving: no stale DMA, no entry without a mapping, everything is resumed."""
    rig = Rig(era, seed=seed, jitter=0.9, cost=1.0)
    va = rig.mmap(64)
    mr = rig.reg(va, 64 * PAGE)
    rng = np.random.default_rng(seed)
    from kit.memory.syscalls.madvise import madvise
    from kit.memory.types import MADV_DONTNEED

    def storm():
        thread = rig.engine.thread("storm")
        for _ in range(40):
            thread.charge(float(rng.integers(1, 60)))
            first, count = int(rng.integers(0, 56)), int(rng.integers(1, 8))
            yield from madvise(rig.mm, thread, va + first * PAGE, count * PAGE, MADV_DONTNEED)

    def nic():
        done = []
        for _ in range(60):
            yield rig.engine.env.timeout(float(rng.integers(1, 40)))
            first, count = int(rng.integers(0, 56)), int(rng.integers(1, 8))
            done.append(rig.post(rig.rdma_event(mr.rkey, va + first * PAGE, count * PAGE)))
            walked = rig.walk(mr.rkey, va + first * PAGE, count * PAGE)
            rig.hca.dma.access(walked.addresses, True, rig.engine.now)
        for event in done:
            if not event.processed:
                yield event
        assert not any(event.value for event in done)

    both = rig.engine.start(storm()) & rig.engine.start(nic())
    rig.engine.run(both)
    rig.settle(1000.0)
    rig.check(mr)
    assert not rig.hca.outstanding_faults and mr.mmkey.usecount == 1
    assert rig.dereg(mr) == 0 and rig.hca.dma.live == 0


def test_child_regions_are_watched_on_their_own():
    rig = Rig()
    rig.mmap(2, at=5 * GIB - PAGE)
    imr = rig.implicit()
    assert not rig.fault(imr.rkey, 5 * GIB - PAGE, 2 * PAGE)
    low, high = imr.implicit_children[4], imr.implicit_children[5]
    rig.dontneed(5 * GIB, 1)
    rig.settle(10.0)
    assert (
        sorted(imr.implicit_children) == [4] and high.odp_stats.invalidations == 1 and low.odp_stats.invalidations == 0
    )
