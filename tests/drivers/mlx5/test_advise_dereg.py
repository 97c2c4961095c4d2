"""Fetching ahead, and deregistering while faults, prefetches and invalidations run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers.mlx5.odp_rig import ODP, PINNED, Rig, failed, steps

from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.device import UMR_ACTIVE
from kit.drivers.mlx5.enums import PAGE, Access, Era
from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr
from kit.drivers.mlx5.objects import MKEY_MW, IbPd, Mlx5IbMkey
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH, PREFETCH_NO_FAULT, PREFETCH_WRITE, ib_uverbs_advise_mr
from kit.memory.syscalls.madvise import madvise
from kit.memory.types import MADV_DONTNEED

ERAS = [Era.OLD, Era.MID, Era.NEW]


def advise(rig: Rig, advice: int, flags: int, *sges: Sge, pd: IbPd | None = None) -> Any:
    return rig.run(ib_uverbs_advise_mr(pd or rig.pd, rig.thread, advice, flags, sges))


def region(rig: Rig, pages: int, access: int = ODP, resident: bool = False) -> Any:
    return rig.reg(rig.mmap(pages, resident=resident), pages * PAGE, access)


def sge(mr: Any, page: int, pages: int, key: int | None = None) -> Sge:
    return Sge(mr.iova + page * PAGE, pages * PAGE, mr.lkey if key is None else key)


def bits(rig: Rig, mr: Any, pages: int) -> list[int]:
    return (rig.hca.mkeys.mkeys[mr.mmkey.key >> 8].xlt[:pages] & np.uint64(3)).tolist()


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("advice", "right"), [(PREFETCH, 1), (PREFETCH_WRITE, 3)])
def test_prefetch_while_the_caller_waits(era, advice, right):
    rig = Rig(era)
    mr = region(rig, 16)
    assert advise(rig, advice, ADVISE_FLUSH, sge(mr, 0, 4), sge(mr, 8, 2)) == 0
    assert bits(rig, mr, 16) == [right] * 4 + [0] * 4 + [right] * 2 + [0] * 6
    assert (mr.odp_stats.prefetch, mr.odp_stats.faults) == (6, 0) and mr.mmkey.usecount == 1
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_read_only_prefetch_takes_a_right_away(era):
    rig = Rig(era)
    mr = region(rig, 8)
    assert not rig.fault(mr.rkey, mr.iova, 8 * PAGE)
    assert advise(rig, PREFETCH, ADVISE_FLUSH, sge(mr, 0, 2)) == 0
    # newer drivers write all eight entries of the unit again, without the right
    assert bits(rig, mr, 8) == ([1] * 8 if era == Era.NEW else [1, 1, 3, 3, 3, 3, 3, 3])
    assert not rig.fault(mr.rkey, mr.iova, 64)
    assert bits(rig, mr, 1) == [3]


@pytest.mark.parametrize("era", ERAS)
def test_prefetch_without_faults(era):
    rig = Rig(era)
    mr = region(rig, 8)
    rig.populate(mr.iova + 2 * PAGE, 2)
    assert advise(rig, PREFETCH_NO_FAULT, ADVISE_FLUSH, sge(mr, 0, 8)) == 0
    assert bits(rig, mr, 8) == [0, 0, 3, 3, 0, 0, 0, 0] and mr.umem.npages == 2
    assert mr.odp_stats.prefetch == 8  # also pages that are not there


def test_errors():
    rig = Rig()
    mr, readable, pinned = region(rig, 8), region(rig, 8, Access.ON_DEMAND | Access.REMOTE_READ), region(rig, 8, PINNED)
    other = IbPd(rig.dev, 99, rig.mm)
    flush = ADVISE_FLUSH
    assert failed(advise(rig, 3, flush, sge(mr, 0, 1))) == ("EOPNOTSUPP", "mlx5_ib_advise_mr")
    assert failed(advise(rig, PREFETCH, 2, sge(mr, 0, 1))) == ("EINVAL", "ib_uverbs_advise_mr")
    for flags in (0, flush):
        assert failed(advise(rig, PREFETCH, flags, sge(pinned, 0, 1))) == ("ENOENT", "get_prefetchable_mr")
        assert failed(advise(rig, PREFETCH, flags, sge(mr, 0, 1, mr.lkey ^ 1))) == ("ENOENT", "get_prefetchable_mr")
        assert failed(advise(rig, PREFETCH, flags, sge(mr, 0, 1), pd=other)) == ("EPERM", "get_prefetchable_mr")
        assert failed(advise(rig, PREFETCH_WRITE, flags, sge(readable, 0, 1))) == ("EPERM", "get_prefetchable_mr")
    window = Mlx5IbMkey(0x77700, MKEY_MW, 0, 1)
    rig.dev.odp_mkeys[0x77700] = window
    assert failed(advise(rig, PREFETCH, flush, Sge(0, 8, 0x77700))) == ("EINVAL", "get_prefetchable_mr")
    assert failed(advise(rig, PREFETCH, flush, sge(mr, 7, 2))) == ("EFAULT", "pagefault_mr")
    rig.dev.inject.fail("prefetch_work")
    assert failed(advise(rig, PREFETCH, 0, sge(mr, 0, 1))) == ("ENOMEM", "mlx5_ib_advise_mr_prefetch")
    assert mr.odp_stats.prefetch == 0 and mr.mmkey.usecount == readable.mmkey.usecount == 1


def test_the_first_error_ends_a_prefetch_that_is_waited_for():
    rig = Rig()
    mr = region(rig, 8)
    assert failed(advise(rig, PREFETCH, ADVISE_FLUSH, sge(mr, 0, 2), sge(mr, 9, 1), sge(mr, 4, 1)))[0] == "EFAULT"
    assert mr.odp_stats.prefetch == 2


def test_in_the_background_the_rest_still_runs():
    rig = Rig()
    mr = region(rig, 8)
    assert advise(rig, PREFETCH, 0, sge(mr, 0, 2), sge(mr, 9, 1), sge(mr, 4, 1)) == 0
    rig.settle(10.0)
    assert mr.odp_stats.prefetch == 3 and mr.mmkey.usecount == 1
    assert steps(rig).count("mlx5_ib_prefetch_mr_work") == 1
    assert failed(advise(rig, PREFETCH, 0, sge(mr, 0, 2), sge(mr, 0, 1, 5))) == ("ENOENT", "get_prefetchable_mr")
    assert mr.mmkey.usecount == 1 and mr.odp_stats.prefetch == 3


@pytest.mark.parametrize("era", [Era.MID, Era.NEW])
def test_prefetch_holds_a_deregistration_up(era):
    rig = Rig(era, cost=1.0)
    mr = region(rig, 8)
    rig.costs.umr_wqe = 500.0
    assert advise(rig, PREFETCH_WRITE, 0, sge(mr, 0, 8)) == 0
    start = rig.engine.now
    assert rig.dereg(mr) == 0
    assert rig.engine.now - start > 1000.0  # its request, then the revoke
    assert mr.odp_stats.prefetch == 8 and mr.dead and rig.hca.dma.live == 0


# -- deregistration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", [Era.MID, Era.NEW])
def test_order_of_deregistration(era):
    rig = Rig(era)
    mr = region(rig, 8, resident=True)
    since = len(rig.engine.trace.spans)
    assert rig.dereg(mr) == 0
    entered = steps(rig, since)
    names = ["mlx5_ib_dereg_mr", "xa_erase", "mlx5r_deref_wait_odp_mkey", "mlx5r_umr_revoke_mr", "push_mkey_locked",
             "ib_umem_release", "ib_umem_odp_release", "ib_umem_odp_unmap_dma_pages", "mmu_interval_notifier_remove",
             "mlx5_ib_free_odp_mr"]  # fmt: skip
    assert [entered.index(n) for n in names] == sorted(entered.index(n) for n in names)
    assert not rig.dev.odp_mkeys and mr.mmkey.usecount == 0 and rig.hca.dma.live == 0
    assert not rig.mm.notifier_subscriptions.itree.overlapping(0, 1 << 64)


def test_a_running_fault_holds_a_deregistration_up_and_later_ones_find_nothing():
    rig = Rig(cost=1.0)
    mr = region(rig, 64)
    rig.costs.umr_wqe = 500.0
    running = rig.post(rig.rdma_event(mr.rkey, mr.iova, PAGE))
    rig.settle(100.0)
    assert mr.mmkey.usecount == 2
    done = rig.engine.start(mlx5_ib_dereg_mr(mr, rig.thread))
    late = rig.post(rig.rdma_event(mr.rkey, mr.iova + 32 * PAGE, PAGE))
    rig.settle(5000.0)
    assert not running.value and late.value and done.processed and mr.odp_stats.faults == 1
    assert rig.hca.dma.live == 0 and not rig.hca.dma.stale


def test_before_use_counts_every_deregistration_waits_for_a_grace_period():
    rig = Rig(Era.OLD)
    rig.costs.srcu_grace_period = 1960.0
    mr = region(rig, 8)
    start = rig.engine.now
    assert rig.dereg(mr) == 0
    assert rig.engine.now - start >= 1960.0
    assert "synchronize_srcu" in steps(rig) and "mlx5r_deref_wait_odp_mkey" not in steps(rig)
    plain = region(rig, 8, PINNED)
    start = rig.engine.now
    assert rig.dereg(plain) == 0
    assert rig.engine.now - start < 1960.0


def race(**options: object) -> tuple[Rig, Any]:
    """An invalidation that comes between the revoke and the release."""
    rig = Rig(Era.MID, cost=1.0, **options)
    va = rig.mmap(8, resident=True)
    mr = rig.reg(va, 8 * PAGE)
    rig.costs.umr_wqe = 100.0

    def invalidate():
        thread = rig.engine.thread("other")
        thread.charge(50.0)
        yield from madvise(rig.mm, thread, va, 8 * PAGE, MADV_DONTNEED)

    both = rig.engine.start(mlx5_ib_dereg_mr(mr, rig.thread)) & rig.engine.start(invalidate())
    rig.engine.run(both)
    return rig, mr


def test_a_zap_after_the_revoke_breaks_the_umr_queue_pair():
    rig, _ = race()
    assert "mlx5r_umr_recover" in steps(rig)  # the key was free already
    assert rig.dev.umrc.state == UMR_ACTIVE


def test_revoking_under_the_lock_prevents_that():
    rig, mr = race(revoke_under_lock=True)
    assert "mlx5r_umr_recover" not in steps(rig)
    assert mr.dead and rig.hca.dma.live == 0 and rig.hca.dma.errors == 0


@pytest.mark.parametrize("era", ERAS)
def test_keys_are_used_again_with_a_clean_table(era):
    rig = Rig(era)
    mr = region(rig, 8, resident=True)
    key = mr.mmkey.key
    assert rig.dereg(mr) == 0
    again = region(rig, 8)
    assert again.mmkey.key == key and bits(rig, again, 8) == [0] * 8
