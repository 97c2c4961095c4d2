"""Implicit regions: the documented worked trace, count by count, and races between making and freeing children."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.odp_rig import GIB, ODP, Rig, failed, steps

from kit.drivers.mlx5.adapter.mkey_table import Verdict
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Era

ERAS = [Era.MID, Era.NEW]
AT = 5 * GIB + PAGE


def slots(rig, imr):
    return rig.hca.mkeys.mkeys[imr.mmkey.key >> 8].xlt


@pytest.mark.parametrize(
    ("era", "options", "invalidations"),
    [(Era.MID, {}, 3), (Era.MID, {"invalidations_fixed": True}, 2), (Era.NEW, {}, 2)],
)
def test_worked_trace(era, options, invalidations):
    rig = Rig(era, **options)
    rig.mmap(4, at=5 * GIB)

    def misses():
        return sum(e.miss for e in rig.dev.cache.ents.values())

    # 1. register
    imr = rig.implicit()
    assert rig.umrs() == 3 and misses() == 1
    xlt = slots(rig, imr)
    assert len(xlt) == 131_072 and (xlt["key"] == rig.hca.null_mkey).all() and (xlt["va"] == 0).all()
    assert list(rig.dev.odp_mkeys.values()) == [imr.mmkey]
    # 2. the hardware finds nothing there
    assert rig.walk(imr.rkey, AT, 8192).verdict == Verdict.FAULT
    # 3. to 5. one fault: a child, two pages, one slot
    before, resumes = rig.umrs(), rig.hca.counters.resumes
    assert not rig.fault(imr.rkey, AT, 8192)
    assert rig.umrs() - before == 3 + 1 + 1 and misses() == 2
    child = imr.implicit_children[5]
    assert child.umem.npages == 2 and child.mmkey.usecount == 1 and child.parent is imr
    assert (child.umem.notifier.start, child.umem.notifier.last) == (5 * GIB, 6 * GIB - 1)
    assert int(xlt["key"][5]) == child.lkey and int(xlt["va"][5]) == 5 * GIB
    assert (np.delete(xlt["key"], 5) == rig.hca.null_mkey).all()
    assert imr.odp_stats.faults == 2 and imr.odp_stats.faults_handled == (1 if era == Era.NEW else 0)
    assert child.odp_stats.faults == 0 and rig.hca.counters.resumes - resumes == 1
    assert list(rig.dev.odp_mkeys.values()) == [imr.mmkey]  # children cannot be found by key
    assert rig.walk(imr.rkey, AT, 8192).verdict == Verdict.OK
    rig.check(child)
    # 6. the pages go, and with them the child
    before = rig.umrs()
    rig.dontneed(AT, 2)
    rig.settle(100.0)
    assert rig.umrs() - before == 1 + 1 + 1  # zap, slot, revoke
    assert child.odp_stats.invalidations == invalidations and imr.odp_stats.invalidations == 0
    assert child.dead and not imr.implicit_children and child.umem.npages == 0
    assert (xlt["key"] == rig.hca.null_mkey).all() and imr.mmkey.usecount == 1
    assert child.mmkey.cache_ent.ci == 1  # its key waits for the next child
    assert len(child.umem.pfn_list) == 0
    # again: the key is used again
    assert not rig.fault(imr.rkey, AT, 8192) and misses() == 2
    # 7. deregister
    before = rig.umrs()
    assert rig.dereg(imr) == 0
    assert rig.umrs() - before == 2  # parent and child are revoked
    assert not rig.dev.odp_mkeys and rig.hca.dma.live == 0 and rig.hca.dma.errors == 0


def test_a_child_that_was_never_filled_stays():
    rig = Rig()
    rig.mmap(1, at=5 * GIB)
    imr = rig.implicit()
    assert rig.fault(imr.rkey, 6 * GIB, 8)  # no memory there
    child = imr.implicit_children[6]
    assert child.umem.npages == 0 and int(slots(rig, imr)["key"][6]) == child.lkey  # the slot is written all the same
    rig.mmap(1, at=6 * GIB)
    rig.munmap(6 * GIB, 1)
    rig.settle(10.0)
    assert imr.implicit_children[6] is child
    assert rig.dereg(imr) == 0 and child.dead


@pytest.mark.parametrize("era", ERAS)
def test_an_access_over_several_children(era):
    rig = Rig(era)
    rig.mmap(6, at=7 * GIB - 3 * PAGE)
    imr = rig.implicit()
    before = rig.umrs()
    assert not rig.fault(imr.rkey, 7 * GIB - 2 * PAGE, 5 * PAGE)
    assert sorted(imr.implicit_children) == [6, 7] and imr.odp_stats.faults == 5
    assert rig.umrs() - before == 2 * (3 + 1) + 1  # both slots lie in one request... 4 to 7
    assert rig.walk(imr.rkey, 7 * GIB - 2 * PAGE, 5 * PAGE).verdict == Verdict.OK


def test_beyond_the_table():
    rig = Rig()
    imr = rig.implicit()
    end = 131_072 * GIB
    assert rig.fault(imr.rkey, end, 8)
    assert rig.fault(imr.rkey, end - 8, 16)
    assert not imr.implicit_children


@pytest.mark.parametrize("era", ERAS)
def test_two_faults_make_one_child(era):
    rig = Rig(era, cost=0.5)
    rig.mmap(16, at=5 * GIB)
    imr = rig.implicit()
    rig.settle()
    events = [rig.post(rig.rdma_event(imr.rkey, 5 * GIB + i * PAGE, PAGE)) for i in range(3)]
    rig.settle(1e7)
    assert [bool(e.value) for e in events] == [False] * 3
    child = imr.implicit_children[5]
    made = steps(rig).count("ib_umem_odp_alloc_child")
    assert made > 1, "the race did not happen"
    assert child.mmkey.usecount == 1 and rig.hca.mkeys.get(child.lkey) is not None
    assert rig.dev.cache.ents[child.mmkey.rb_key].ci == made - 1  # the losers' keys went back
    assert imr.odp_stats.faults == 3
    assert rig.walk(imr.rkey, 5 * GIB, 3 * PAGE).verdict == Verdict.OK
    rig.check(child)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("seed", range(4))
def test_children_come_and_go_under_faults(era, seed):
    """The slot names a child exactly when the child is there, whatever raced."""
    from kit.memory.syscalls.madvise import madvise
    from kit.memory.types import MADV_DONTNEED

    rig = Rig(era, seed=seed, jitter=0.9, cost=0.02, child_cmpxchg=True)
    rig.mmap(4, at=5 * GIB)
    imr = rig.implicit()
    rig.settle()
    rng = np.random.default_rng(seed)

    def storm():
        thread = rig.engine.thread("storm")
        for _ in range(12):
            thread.charge(float(rng.integers(1, 30_000)))
            yield from madvise(rig.mm, thread, 5 * GIB, 4 * PAGE, MADV_DONTNEED)

    def nic():
        for _ in range(25):
            yield rig.engine.env.timeout(float(rng.integers(1, 20_000)))
            event = rig.post(rig.rdma_event(imr.rkey, 5 * GIB + int(rng.integers(0, 4)) * PAGE, 64))
            if rng.integers(0, 2):
                assert not (yield event)

    rig.engine.run(rig.engine.start(storm()) & rig.engine.start(nic()))
    rig.settle(1e6)
    xlt = slots(rig, imr)
    assert not rig.hca.outstanding_faults
    for idx in range(4, 8):
        child = imr.implicit_children.get(idx)
        assert int(xlt["key"][idx]) == (child.lkey if child else rig.hca.null_mkey)
        if child:
            rig.check(child)
    assert imr.mmkey.usecount == 1
    assert rig.dereg(imr) == 0 and rig.hca.dma.live == 0 and not rig.hca.dma.stale


def test_no_memory_for_a_child():
    for site in ("umem_odp", "pfn_list", "dma_list", "notifier_insert", "mr", "create_mkey_in", "xlt_dma_map"):
        rig = Rig()
        rig.mmap(1, at=5 * GIB)
        imr = rig.implicit()
        rig.dev.inject.fail(site)
        assert rig.fault(imr.rkey, 5 * GIB, 8), site
        assert not imr.implicit_children and imr.mmkey.usecount == 1
        assert not rig.fault(imr.rkey, 5 * GIB, 8)


@pytest.mark.parametrize("site", ["umem_odp", "mr", "create_mkey_in", "xlt_dma_map", "odp_mkeys"])
def test_no_memory_for_a_parent(site):
    rig = Rig()
    rig.dev.inject.fail(site)
    assert failed(rig.implicit())[0] == "ENOMEM"
    assert not rig.dev.odp_mkeys
    assert rig.implicit().lkey


def test_a_dead_owner():
    rig = Rig()
    rig.mmap(1, at=5 * GIB)
    imr = rig.implicit()
    assert not rig.fault(imr.rkey, 5 * GIB, 8)
    from kit.memory.syscalls.exit import mmput

    rig.run(mmput(rig.mm, rig.thread))
    rig.settle(100.0)
    assert not imr.implicit_children and rig.hca.dma.live == 0
    assert rig.fault(imr.rkey, 5 * GIB, 8)  # no child can be made: -EFAULT
    assert rig.fault(imr.rkey, 6 * GIB, 8)
    assert rig.dereg(imr) == 0


# -- the memory scheme -----------------------------------------------------------------------------------------------


def scheme(**caps) -> Rig:
    return Rig(Era.NEW, caps=HcaCaps(mem_page_fault=True, page_prefetch=True, **caps))


def test_both_capabilities_are_needed():
    assert not Rig(Era.NEW, caps=HcaCaps(mem_page_fault=True)).hca.memory_scheme
    assert not Rig(Era.MID, caps=HcaCaps(mem_page_fault=True, page_prefetch=True)).hca.memory_scheme
    assert scheme().hca.memory_scheme


def memory_fault(rig, imr, va, length):
    lost = rig.walk(imr.rkey, va, length)
    assert lost.verdict == Verdict.FAULT
    error = rig.engine.run(rig.post(rig.rdma_event(imr.rkey, va, length), lost))
    rig.settle(10.0)
    return bool(error)


def test_memory_scheme_parent_has_a_null_key_of_its_own():
    rig = scheme()
    rig.mmap(8, at=5 * GIB)
    imr = rig.implicit()
    null = imr.null_mmkey.key
    assert null and len(rig.dev.odp_mkeys) == 2
    xlt = slots(rig, imr)
    assert (xlt["key"] == null).all() and (xlt["va"] == np.arange(131_072, dtype=np.uint64) * np.uint64(GIB)).all()
    assert not memory_fault(rig, imr, AT, 8192)
    child = imr.implicit_children[5]
    assert rig.dev.odp_mkeys[child.mmkey.key & ~0xFF] is child.mmkey  # here children are found by key
    assert imr.odp_stats.faults == 2 and imr.odp_stats.faults_handled == 1
    assert not memory_fault(rig, imr, 5 * GIB + 4 * PAGE, PAGE)  # reported for the child's key
    assert imr.odp_stats.faults == 3
    rig.dontneed(5 * GIB, 8)
    rig.settle(100.0)
    keys = len(rig.hca.mkeys.mkeys)
    assert rig.dereg(imr) == 0 and not rig.dev.odp_mkeys
    assert len(rig.hca.mkeys.mkeys) == keys - 1


def test_memory_scheme_error_and_last():
    rig = scheme()
    imr = rig.implicit()
    assert memory_fault(rig, imr, 9 * GIB, 8)
    from kit.drivers.mlx5.objects import OdpStats
    from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_pfault

    assert imr.odp_stats == OdpStats()
    rig.mmap(4, at=5 * GIB)
    pfault = Pagefault(rig.dev, 2, va=5 * GIB, mkey=imr.null_mmkey.key, fault_byte_count=PAGE, flags=0)
    rig.run(mlx5_ib_pfault(pfault, rig.thread))
    assert pfault.resumed == 0 and imr.odp_stats.faults == 1  # only the last event of an operation is resumed
    unknown = Pagefault(rig.dev, 2, va=5 * GIB, mkey=0x999900, fault_byte_count=PAGE, flags=0)
    rig.run(mlx5_ib_pfault(unknown, rig.thread))
    assert unknown.resumed == 1


def test_memory_scheme_looks_around_and_falls_back():
    from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_pfault

    rig = scheme()
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)

    def fault(page, before, after):
        pfault = Pagefault(
            rig.dev, 2, va=va + page * PAGE, mkey=mr.rkey, fault_byte_count=PAGE, flags=128,
            prefetch_before_byte_count=before * PAGE, prefetch_after_byte_count=after * PAGE,
        )  # fmt: skip
        faults = mr.odp_stats.faults
        rig.run(mlx5_ib_pfault(pfault, rig.thread))
        assert pfault.resumed == 1
        return mr.odp_stats.faults - faults

    assert fault(4, 1, 2) == 4
    assert fault(14, 0, 8) == 2  # clamped at the end
    assert fault(1, 4, 0) == 5  # below the start the window slides up
    rig.munmap(va + 9 * PAGE, 1)
    assert fault(8, 2, 3) == 1  # the window cannot be had: the page alone
    assert U64_MAX and ODP
