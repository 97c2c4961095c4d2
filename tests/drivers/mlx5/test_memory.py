"""On-demand regions and the rest of the memory system: copy on write, swap, protection, device memory, long ranges."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.odp_rig import GIB, ODP, Rig, failed, steps

from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import Verdict
from kit.drivers.mlx5.core.waiting import DelayedWork, Semaphore, WaitQueue, Workqueue
from kit.drivers.mlx5.costs import COSTS, make_costs
from kit.drivers.mlx5.enums import PAGE, Access, Era
from kit.errors import ParameterError
from kit.memory.faults.load_store import load, store
from kit.memory.syscalls.fork import fork
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap
from kit.memory.syscalls.mprotect import mprotect
from kit.memory.types import MADV_PAGEOUT, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, VM_IO, VM_PFNMAP
from kit.sim.engine import Engine

ERAS = [Era.MID, Era.NEW]


def numbers(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int64)


def through(rig: Rig, mr, va: int, pages: int) -> np.ndarray:
    """What the hardware reads: the stamp of each page."""
    walked = rig.walk(mr.rkey, va, pages * PAGE, Need.REMOTE_READ)
    assert walked.verdict == Verdict.OK
    pfns, stale = rig.hca.dma.access(walked.addresses, False, rig.engine.now)
    assert not stale
    return rig.memory.payload[pfns, 0]


@pytest.mark.parametrize("era", ERAS)
def test_copy_on_write_keeps_process_and_hardware_together(era):
    rig = Rig(era)
    va = rig.mmap(8)
    rig.run(store(rig.mm, rig.thread, numbers(va // PAGE, 8), np.arange(8, dtype=np.uint64) + np.uint64(100)))
    mr = rig.reg(va, 8 * PAGE)
    child = rig.run(fork(rig.mm, rig.thread))
    assert mr.umem.npages == 0 and rig.walk(mr.rkey, va, PAGE).verdict == Verdict.FAULT  # write protection zaps
    since = len(rig.engine.trace.spans)
    assert not rig.fault(mr.rkey, va, 8 * PAGE)  # breaks the sharing
    entered = steps(rig, since)
    assert entered.count("mlx5_ib_invalidate_range") > 0  # the copy notifies the very region that faults
    assert entered.count("mmu_interval_read_begin") == 2  # and so the fault starts once more
    assert through(rig, mr, va, 8).tolist() == list(range(100, 108))
    walked = rig.walk(mr.rkey, va, 8 * PAGE)
    rig.memory.payload[rig.hca.dma.resolve(walked.addresses)[0], 0] = 7
    assert (rig.run(load(rig.mm, rig.thread, numbers(va // PAGE, 8))) == 7).all()
    assert rig.run(load(child, rig.thread, numbers(va // PAGE, 8))).tolist() == list(range(100, 108))
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_pages_on_swap_stay_there_until_they_are_needed(era):
    rig = Rig(era)
    rig.memory.swap = type(rig.memory.swap)(64, rig.memory.words)
    va = rig.mmap(8)
    rig.run(store(rig.mm, rig.thread, numbers(va // PAGE, 8), np.arange(8, dtype=np.uint64) + np.uint64(5)))
    first = rig.reg(va, 8 * PAGE)
    assert first.umem.npages == 8
    rig.run(madvise(rig.mm, rig.thread, va, 8 * PAGE, MADV_PAGEOUT))
    assert first.umem.npages == 0 and rig.mm.rss["swap"] == 8
    second = rig.reg(va, 8 * PAGE)
    assert second.umem.npages == 0 and rig.mm.rss["swap"] == 8  # a pinned region would have read them back
    assert not rig.fault(second.rkey, va + 2 * PAGE, 2 * PAGE)
    assert rig.mm.rss["swap"] == 6 and second.umem.npages == 2
    assert through(rig, second, va + 2 * PAGE, 2).tolist() == [7, 8]
    rig.check(first, second)


@pytest.mark.parametrize("era", ERAS)
def test_a_read_only_area_refuses_a_writable_region(era):
    rig = Rig(era)
    va = rig.mmap(4)
    mr = rig.reg(va, 4 * PAGE)
    assert not rig.fault(mr.rkey, va, PAGE)
    assert rig.run(mprotect(rig.mm, rig.thread, va, 4 * PAGE, PROT_READ)) == 0
    assert mr.umem.npages == 0
    assert rig.fault(mr.rkey, va, PAGE)  # -EPERM
    readable = rig.reg(va, 4 * PAGE, Access.ON_DEMAND | Access.REMOTE_READ)
    assert not rig.fault(readable.rkey, va, PAGE)
    assert rig.walk(readable.rkey, va, PAGE, Need.REMOTE_READ).verdict == Verdict.OK


def test_areas_of_devices_cannot_be_faulted():
    rig = Rig()
    flags = MAP_PRIVATE | MAP_ANONYMOUS
    va = rig.run(mmap(rig.mm, rig.thread, 4 * PAGE, PROT_READ | PROT_WRITE, flags, vm_flags=VM_IO | VM_PFNMAP))
    mr = rig.reg(va, 4 * PAGE)
    assert mr.umem.npages == 0 and rig.fault(mr.rkey, va, PAGE)


@pytest.mark.parametrize("era", ERAS)
def test_a_hole_stops_a_fault_that_reaches_it(era):
    rig = Rig(era)
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)
    rig.munmap(va + 8 * PAGE, 1)
    assert not rig.fault(mr.rkey, va, 8 * PAGE)
    assert rig.fault(mr.rkey, va + 7 * PAGE, 2 * PAGE)
    assert not rig.fault(mr.rkey, va + 9 * PAGE, PAGE)
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_huge_pages_of_the_cpu_are_mapped_piece_by_piece(era):
    rig = Rig(era)
    rig.memory.thp = "always"
    at = 4 * GIB
    rig.mmap(1024, at=at)
    mr = rig.reg(at, 1024 * PAGE)
    assert not rig.fault(mr.rkey, at, PAGE)
    assert mr.umem.npages == 1  # the CPU has 512
    assert not rig.fault(mr.rkey, at, 1024 * PAGE)
    walked = rig.walk(mr.rkey, at, 1024 * PAGE)
    pfns = rig.hca.dma.resolve(walked.addresses)[0]
    assert (np.diff(pfns[:512]) == 1).all() and (rig.memory.order[pfns] == 9).all()
    rig.dontneed(at + PAGE, 1)  # splits it
    rig.check(mr)


def test_reclaim_that_must_not_sleep_skips_the_region():
    from kit.memory.syscalls.exit import oom_reap_task_mm

    rig = Rig()
    va = rig.mmap(8, resident=True)
    mr = rig.reg(va, 8 * PAGE)
    rig.run(oom_reap_task_mm(rig.mm, rig.thread))
    assert mr.umem.npages == 8 and rig.walk(mr.rkey, va, 8 * PAGE).verdict == Verdict.OK


@pytest.mark.parametrize("era", ERAS)
def test_registration_of_512_mib_and_more_in_several_requests(era):
    """The second request's missing pages are missing, although the buffer has carried others before."""
    rig = Rig(era, frames=1 << 10)
    pages = 140_000
    va = rig.mmap(pages)
    rig.populate(va, 64)
    mr = rig.reg(va, pages * PAGE)
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8].xlt[:pages]
    assert np.flatnonzero(hw).tolist() == list(range(64))
    assert rig.umrs() == 2
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_pages_in_device_memory_come_home_for_a_fault_and_only_for_a_fault(era):
    from kit.drivers import dmirror_types as driver
    from kit.drivers.dmirror import dmirror_device_init, dmirror_fops_open
    from kit.drivers.dmirror_ioctl import dmirror_fops_unlocked_ioctl
    from kit.drivers.mlx5.descriptors import Sge
    from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH_NO_FAULT, ib_uverbs_advise_mr

    rig = Rig(era, device_frames=1 << 14)
    device = driver.DmirrorDevice(rig.memory, 0, chunk_pages=1024)
    assert dmirror_device_init(device, rig.thread) == 0
    opened = rig.run(dmirror_fops_open(device, rig.thread, rig.mm))
    va = rig.mmap(16)
    rig.run(store(rig.mm, rig.thread, numbers(va // PAGE, 16), np.arange(16, dtype=np.uint64) + np.uint64(50)))
    follows = rig.reg(va, 16 * PAGE)
    assert follows.umem.npages == 16
    cmd = driver.HmmDmirrorCmd(va, np.zeros(16, dtype=np.uint64), 16)
    command = driver.HMM_DMIRROR_MIGRATE_TO_DEV
    assert rig.run(dmirror_fops_unlocked_ioctl(opened, rig.thread, command, cmd)) == 0

    def away() -> int:
        return int((rig.memory.pgmap[rig.mm.table.frame[rig.mm.table.slots_of(numbers(va // PAGE, 16))]] > 0).sum())

    assert away() == 16 and follows.umem.npages == 0  # zapped before the copy
    late = rig.reg(va, 16 * PAGE)
    sge = Sge(va, 16 * PAGE, late.lkey)
    assert rig.run(ib_uverbs_advise_mr(rig.pd, rig.thread, PREFETCH_NO_FAULT, ADVISE_FLUSH, [sge])) == 0
    assert away() == 16 and late.umem.npages == 0
    assert not rig.fault(follows.rkey, va + 4 * PAGE, 2 * PAGE)
    assert away() == 14 and follows.umem.npages == 2
    assert through(rig, follows, va + 4 * PAGE, 2).tolist() == [54, 55]
    rig.check(follows, late)


# -- the small parts -------------------------------------------------------------------------------------------------


def test_costs_are_complete_and_known():
    assert make_costs(None).umr_wqe == 0
    assert make_costs(dict.fromkeys(COSTS, 2.0)).cmd_resume == 2.0
    with pytest.raises(ParameterError, match="umr_wqee"):
        make_costs({**dict.fromkeys(COSTS, 1.0), "umr_wqee": 1.0})
    with pytest.raises(ParameterError, match="has none"):
        make_costs({"umr_wqe": 1.0})


def test_a_semaphore_hands_over_in_order():
    engine, sem, seen = Engine(), Semaphore(2), []

    def work(name: int):
        thread = engine.thread(f"t{name}")
        yield from sem.down(thread)
        seen.append((name, engine.now))
        thread.charge(10.0)
        yield from sem.up(thread)

    for name in range(5):
        engine.start(work(name))
    engine.run()
    assert seen == [(0, 0), (1, 0), (2, 10), (3, 10), (4, 20)] and sem.count == 2


def test_work_queues_keep_order_and_limit():
    engine = Engine()
    wq, seen = Workqueue(engine, "wq", 2, dispatch=1.0), []
    thread = engine.thread("t")

    def item(name: int):
        def run(worker):
            seen.append((name, worker.name, worker.now))
            worker.charge(10.0)
            yield from worker.sync()

        return run

    for name in range(4):
        wq.queue_work(thread, item(name))
    engine.run(engine.start(wq.flush(thread)))
    assert seen == [(0, "wq/0", 1), (1, "wq/1", 1), (2, "wq/0", 11), (3, "wq/1", 11)]
    assert wq.most_active == 2 and wq.active == 0


def test_delayed_work():
    engine = Engine()
    wq, seen = Workqueue(engine, "wq", 1), []
    thread = engine.thread("t")

    def run(worker):
        seen.append(engine.now)
        yield from worker.sync()

    work = DelayedWork(wq, run)
    work.queue(thread, 50.0)
    work.queue(thread, 5.0)  # is pending already
    engine.run(engine.env.timeout(20.0))
    assert not seen and work.pending
    thread.now = engine.now
    work.mod(thread, 100.0)
    engine.run()
    assert seen == [120.0] and not work.pending
    thread.now = engine.now
    work.queue(thread, 10.0)
    work.cancel()
    engine.run()
    assert seen == [120.0]
    work.queue(thread, 0)
    work.mod(thread, 0)
    engine.run()
    assert len(seen) == 2


def test_wait_queues_look_again():
    engine, queue, state = Engine(), WaitQueue(), {"n": 2}
    thread = engine.thread("t")

    def drop():
        for _ in range(2):
            yield engine.env.timeout(5.0)
            state["n"] -= 1
            queue.wake_up()

    engine.start(drop())
    engine.run(engine.start(queue.wait_event(thread, lambda: state["n"] == 0)))
    assert engine.now == 10.0


def test_injection_knows_its_sites():
    rig = Rig(cache=False)
    with pytest.raises(KeyError, match="nowhere"):
        rig.dev.inject.fail("nowhere")
    rig.dev.inject.fail("umr", times=2, after=1)
    assert [rig.dev.inject.hit("umr") for _ in range(4)] == [False, True, True, False]


def test_flags_of_access():
    rig = Rig()
    assert failed(rig.reg(rig.mmap(1), PAGE, ODP | 1 << 30)) == ("EINVAL", "ib_check_mr_access")
