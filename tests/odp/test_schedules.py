"""Seeded schedules of two hosts: nothing lost, nothing left, nobody waiting for ever; and what missing fixes do.

``FARFAULT_ODP_SCHEDULES`` says how many seeds are run, ``FARFAULT_ODP_SCHEDULE`` replays one and prints its course.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from drivers.mlx5.odp_rig import ODP, Rig
from odp.checks import Broken
from odp.schedules import FIXES, UPSTREAM, Schedule
from seeds import Seeds

from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import NOTHING, Translation, Verdict
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.enums import PAGE, Era
from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr
from kit.drivers.mlx5.odp import invalidate as odp_invalidate
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH, ib_uverbs_advise_mr
from kit.memory.faults.load_store import load, store

SEEDS = Seeds(Schedule, "FARFAULT_ODP_SCHEDULE", 5000, "tests/odp/test_schedules.py")
UNFIXED = max(SEEDS.blocks // 10, 1)  # of these, blocks in which older kernels lack the fixes that the newest has
OWN = tuple(name for name in FIXES if name not in UPSTREAM)
HANGS = ("someone waits for ever", "uses are left", "a key is in the cache twice", "keys are left in odp_mkeys")
REFUSED = "a UMR request was refused"


@pytest.mark.parametrize("block", range(max(SEEDS.blocks - UNFIXED, 1)))
def test_schedules(block: int) -> None:
    SEEDS.run(block)


@pytest.mark.parametrize("block", range(UNFIXED))
def test_schedules_of_older_kernels_without_their_later_fixes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass, or break in one of the two known ways, and then pass with the fixes."""
    twice = watch_destroyed(monkeypatch)
    for seed in SEEDS.block(block):
        twice.clear()
        schedule = Schedule(seed, Era(seed % 2), OWN)
        try:
            schedule.run()
        except Broken as error:
            # What follows differs: a refused request fails a fault, and in the oldest kernel every later one too.
            assert max(twice.values(), default=0) > 1 or "the key is free" in refusals(schedule), (seed, error)
            Schedule(seed, Era(seed % 2)).run()


def watch_destroyed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count how often each child is handed to its destruction."""
    counted: Counter[int] = Counter()
    kept = []
    destroy = odp_invalidate.destroy_unused_implicit_child_mr

    def counting(mr: Any, thread: Any) -> None:
        kept.append(mr)  # alive, so that its id stays its own
        counted[id(mr)] += mr.parent.mmkey.usecount > 0
        destroy(mr, thread)

    monkeypatch.setattr(odp_invalidate, "destroy_unused_implicit_child_mr", counting)
    return counted


def refusals(schedule: Schedule) -> set[str]:
    """Why the adapters refused UMR requests."""
    trace = schedule.engine.trace
    rows = trace.spans.column("step") == trace.steps.ids.get("umr", -1)
    causes = np.unique(trace.spans.column("cause")[rows])
    return {trace.causes.words[int(number)] for number in causes} - {""}


def first_broken(fixes: Collection[str], symptoms: Collection[str], **how: Any) -> Schedule:
    """Return the first schedule that breaks in one of the ways; none breaks in another."""
    for seed in range(600):
        schedule = Schedule(seed, fixes=fixes, **how)
        try:
            schedule.run()
        except Broken as error:
            assert str(error).startswith(tuple(symptoms)), (seed, error)
            return schedule
    raise AssertionError("no schedule broke")


@pytest.mark.parametrize("era", [Era.OLD, Era.MID])
def test_an_unused_child_is_freed_twice_without_its_fix(era: Era, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-21714: emptied, filled by a fault that held it, emptied again: its second end waits for ever."""
    twice = watch_destroyed(monkeypatch)
    fixes = [name for name in FIXES if name != "child_cmpxchg"]
    broken = first_broken(fixes, HANGS, era=era, implicit_only=True)
    assert max(twice.values()) == 2
    twice.clear()
    Schedule(broken.seed, era, implicit_only=True).run()
    assert max(twice.values(), default=0) >= 1  # it came to that point again; the second attempt was turned away


@pytest.mark.parametrize("era", [Era.OLD, Era.MID])
def test_a_zap_meets_a_revoked_key_without_its_fix(era: Era) -> None:
    """CVE-2025-21732: dereg revokes without the umem's lock, and an invalidation still writes to the key."""
    fixes = [name for name in FIXES if name != "revoke_under_lock"]
    # The oldest kernel does not bring the UMR queue pair back, so that whatever comes next fails as well.
    after = ("failed without cause", "registration failed") if era == Era.OLD else ()
    broken = first_broken(fixes, (REFUSED, *after), era=era)
    assert refusals(broken) == {"the key is free"}
    Schedule(broken.seed, era).run()


def memory_rig(**options: bool) -> Rig:
    return Rig(Era.NEW, caps=HcaCaps(mem_page_fault=True, page_prefetch=True), cost=1.0, **options)


def lost(key: int, va: int) -> Translation:
    return Translation(Verdict.FAULT, NOTHING, 0, 0, key, va, PAGE)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_neighbours_fault_programs_what_nobody_checked(fixed: bool) -> None:
    """7.0: an entry that a failed fault left valid, and that has changed since, is programmed with its neighbour's.

    The range fault writes into the region's own list, an invalidation of a region with no mapped page clears nothing,
    and translations are made from that list for whole units of 64 bytes. Found by these schedules.
    """
    rig = Rig(Era.NEW, private_hmm_pfns=fixed)
    va = rig.mmap(3)
    mr = rig.reg(va, 3 * PAGE, ODP)
    page = va // PAGE + 1
    rig.run(load(rig.mm, rig.thread, np.array([page])))  # the zero page
    rig.munmap(va + 2 * PAGE, 1)
    ret = rig.run(ib_uverbs_advise_mr(rig.pd, rig.thread, PREFETCH, ADVISE_FLUSH, [Sge(va + PAGE, 2 * PAGE, mr.lkey)]))
    assert ret == -14 and mr.umem.npages == 0
    rig.run(store(rig.mm, rig.thread, np.array([page]), 77))  # a page of its own: the zero page is gone from the table
    assert not rig.fault(mr.rkey, va, PAGE)
    walk = rig.walk(mr.rkey, va + PAGE, PAGE, Need.REMOTE_READ)
    if fixed:
        assert walk.verdict == Verdict.FAULT
        return
    assert walk.verdict == Verdict.OK
    (pfn,), _ = rig.hca.dma.resolve(walk.addresses)
    assert rig.memory.payload[pfn, 0] == 0  # what a remote reader gets
    assert rig.run(load(rig.mm, rig.thread, np.array([page])))[0] == 77


@pytest.mark.parametrize("fixed", [False, True])
def test_deregistering_does_not_wait_for_a_fault_of_the_null_key(fixed: bool) -> None:
    """7.0, memory scheme: the fault uses the null key, dereg waits for the region's. Found by these schedules."""
    rig = memory_rig(memory_fault_holds_parent=fixed)
    va, mr = rig.mmap(1), rig.implicit()
    done = rig.post(rig.rdma_event(mr.rkey, va, PAGE), lost(mr.null_mmkey.key, va))
    while not mr.null_mmkey.usecount > 1:
        rig.settle(0.25)
    rig.dereg(mr)
    rig.settle()
    assert done.triggered
    refused = "MW_BIND_ERR" in rig.engine.trace.statuses.ids
    # The child that the fault made belongs to nobody any more: its page stays mapped for the device.
    assert (refused, rig.hca.dma.live) == ((False, 0) if fixed else (True, 1))


def test_a_memory_event_of_a_child_that_is_going_fails_the_access() -> None:
    """7.0, memory scheme: a child's key leaves the table with its last page, its slot is emptied later.

    Until then the hardware names a key that the driver does not know any more, and an unknown key is an error
    whatever the flags: the queue pair of a program that did nothing wrong fails. It is what the source says;
    whether firmware reports such an access again is not known.
    """
    rig = memory_rig()
    va, mr = rig.mmap(1), rig.implicit()
    assert not rig.engine.run(rig.post(rig.rdma_event(mr.rkey, va, PAGE), lost(mr.null_mmkey.key, va)))
    (child,) = mr.implicit_children.values()
    rig.dontneed(va, 1)
    walk = rig.walk(mr.rkey, va, PAGE)
    assert walk.verdict == Verdict.FAULT and walk.key == child.lkey  # the slot has not been written yet
    assert rig.engine.run(rig.post(rig.rdma_event(mr.rkey, va, PAGE), walk)) is True
    assert "unknown key" in rig.engine.trace.statuses.ids
    rig.settle()
    assert rig.dereg(mr) == 0


def test_a_region_that_goes_while_a_fault_of_it_runs() -> None:
    """The ordinary case of the same race: the use count holds the deregistration up."""
    for scheme in (False, True):
        rig = memory_rig() if scheme else Rig(Era.NEW, cost=1.0)
        va = rig.mmap(4)
        mr = rig.reg(va, 4 * PAGE, ODP)
        done = rig.post(rig.rdma_event(mr.rkey, va, PAGE), lost(mr.rkey, va))
        while not mr.mmkey.usecount > 1:
            rig.settle(0.25)
        assert rig.run(mlx5_ib_dereg_mr(mr, rig.thread)) == 0
        rig.settle()
        assert done.triggered and "MW_BIND_ERR" not in rig.engine.trace.statuses.ids and rig.hca.dma.live == 0


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed is the same schedule, step for step."""
    first, again = SEEDS.replay(capsys)
    assert np.array_equal(first.engine.trace.spans.array(), again.engine.trace.spans.array())
