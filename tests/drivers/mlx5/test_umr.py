"""UMR work requests: how many, how large, what they check, and what happens when one fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers.mlx5.odp_rig import GIB, ODP, Rig, failed, steps

from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.device import UMR_ACTIVE, UMR_ERR
from kit.drivers.mlx5.enums import PAGE, Era, MkeyMask, QpState, UmrFlags
from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_xlt
from kit.drivers.mlx5.mr.umr_post import mlx5r_umr_revoke_mr
from kit.drivers.mlx5.mr.umr_xlt import MLX5_MAX_UMR_CHUNK, MLX5_SPARE_UMR_CHUNK
from kit.drivers.mlx5.objects import UPD_XLT_ATOMIC, UPD_XLT_INDIRECT, UPD_XLT_ZAP

ERAS = [Era.MID, Era.NEW]


def watch(rig: Rig) -> list[Any]:
    """Every request that reaches the hardware: (flags, mask, first entry, entries)."""
    seen: list[Any] = []

    def look(wqe: Any) -> bool:
        size = wqe.xlt.itemsize if wqe.xlt is not None else 1
        seen.append((wqe.flags, wqe.mkey_mask, wqe.xlt_offset * 16 // size, wqe.xlt_octowords * 16 // size))
        return rig.dev.inject.hit("umr")

    rig.hca.inject_umr = look
    return seen


def test_chunk_sizes():
    assert MLX5_MAX_UMR_CHUNK == 1_048_512
    assert (MLX5_MAX_UMR_CHUNK // 8, MLX5_MAX_UMR_CHUNK // 16) == (131_064, 65_532)
    assert MLX5_SPARE_UMR_CHUNK // 8 == 8192


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("pages", "wqes"), [(1, 1), (1024, 1), (8192, 1)])
def test_a_fault_takes_one_request(era, pages, wqes):
    rig = Rig(era, frames=1 << 15)
    va = rig.mmap(pages)
    mr = rig.reg(va, pages * PAGE)
    before = rig.umrs()
    assert not rig.fault(mr.rkey, va, pages * PAGE)
    assert rig.umrs() - before == wqes
    rig.check(mr)


@pytest.mark.parametrize("era", ERAS)
def test_parent_and_child_take_three_requests_each(era):
    rig = Rig(era)
    imr = rig.implicit()
    assert rig.umrs() == 3  # 131,072 slots, 65,532 a request
    rig.mmap(1, at=5 * GIB)
    seen = watch(rig)
    assert not rig.fault(imr.rkey, 5 * GIB, 64)
    child = seen[:3]  # 262,144 translations, 131,064 a request
    assert [entries for _, _, _, entries in child] == [131_064, 131_064, 16]
    assert [first for _, _, first, _ in child] == [0, 131_064, 262_128]
    # only the last one also enables the key
    assert [bool(mask & MkeyMask.FREE) for _, mask, _, _ in child] == [False, False, True]
    assert all(flags & UmrFlags.CHECK_NOT_FREE for flags, _, _, _ in child)
    assert seen[3][2:] == (0, 8) and seen[3][0] & UmrFlags.CHECK_FREE  # the page: 64 bytes
    assert seen[4][2:] == (4, 4)  # slots 4 to 7 of the parent
    assert len(seen) == 5


def test_entries_are_rounded_to_64_bytes_and_clipped_to_the_region():
    rig = Rig()
    va = rig.mmap(11)
    mr = rig.reg(va, 11 * PAGE)
    seen = watch(rig)
    assert not rig.fault(mr.rkey, va + 7 * PAGE, 2 * PAGE)
    assert seen[-1][2:] == (0, 16)  # 7..8: units 0 and 1; the driver fills 11 entries, the hardware takes 16
    assert not rig.fault(mr.rkey, va + 9 * PAGE, PAGE)
    assert seen[-1][2:] == (8, 8)


@pytest.mark.parametrize(
    ("fail", "wqes"),
    [((), 2), (("xlt_max",), 20), (("xlt_max", "xlt_spare"), 320), (("xlt_max", "xlt_spare", "xlt_page"), 320)],
)
def test_allocation_ladder(fail, wqes):
    """163,840 entries: 131,064 a request, else 8,192, else 512 of a page."""
    rig = Rig(frames=1 << 8)
    va = rig.mmap(163_840)
    for site in fail:
        rig.dev.inject.fail(site)
    mr = rig.reg(va, 163_840 * PAGE)
    assert rig.umrs() == wqes
    assert rig.dev.xlt_emergency_page_mutex.holder is None
    rig.check(mr)


def test_the_emergency_page_serialises():
    rig = Rig(cost=1.0)
    va = rig.mmap(64)
    a, b = rig.reg(va, 32 * PAGE), rig.reg(va + 32 * PAGE, 32 * PAGE)
    rig.dev.inject.fail("xlt_max", 2)
    rig.dev.inject.fail("xlt_page", 2)
    first, second = (rig.post(rig.rdma_event(mr.rkey, mr.iova, PAGE)) for mr in (a, b))
    rig.engine.run(first & second)
    assert rig.dev.inject.hits == {"xlt_max": 2, "xlt_page": 2}
    assert rig.dev.xlt_emergency_page_mutex.holder is None
    rig.check(a, b)


def test_small_buffers_go_straight_to_a_page():
    """64 KiB is only tried when more was wanted."""
    rig = Rig()
    rig.dev.inject.fail("xlt_max")
    rig.dev.inject.fail("xlt_spare")
    va = rig.mmap(1024)
    mr = rig.reg(va, 1024 * PAGE)
    assert rig.umrs() == 2 and "xlt_spare" not in rig.dev.inject.hits
    rig.check(mr)


def test_dma_map_of_the_buffer_fails():
    rig = Rig()
    va = rig.mmap(4)
    rig.dev.inject.fail("xlt_dma_map")
    ret = rig.reg(va, 4 * PAGE)
    assert failed(ret) == ("ENOMEM", "mlx5r_umr_create_xlt")
    assert not rig.dev.odp_mkeys and rig.hca.dma.live == 0


@pytest.mark.parametrize("era", ERAS)
def test_a_failed_request_recovers_the_queue_pair(era):
    rig = Rig(era, cost=1.0)
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)
    rig.dev.inject.fail("umr")
    before = len(rig.engine.trace.spans)
    assert rig.fault(mr.rkey, va, PAGE)  # resumed with an error
    assert "mlx5r_umr_recover" in steps(rig, before)
    assert rig.dev.umrc.state == UMR_ACTIVE and rig.hca.umr_qp_state == QpState.RTS
    assert not rig.fault(mr.rkey, va, PAGE)


@pytest.mark.parametrize("era", ERAS)
def test_others_poll_while_it_recovers_and_are_served_after(era):
    rig = Rig(era, cost=1.0)
    va = rig.mmap(64)
    mrs = [rig.reg(va + i * 16 * PAGE, 16 * PAGE) for i in range(4)]
    rig.dev.inject.fail("umr")
    events = [rig.post(rig.rdma_event(mr.rkey, mr.iova, PAGE)) for mr in mrs]
    rig.settle(1e5)
    assert sorted(bool(e.value) for e in events) == [False, False, False, True]
    assert rig.dev.umrc.sem.count == 128
    rig.check(*mrs)


@pytest.mark.parametrize("era", ERAS)
def test_a_failed_recovery_is_final(era):
    rig = Rig(era)
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)
    rig.dev.inject.fail("umr")
    rig.dev.inject.fail("umr_recover")
    assert rig.fault(mr.rkey, va, PAGE)
    assert rig.dev.umrc.state == UMR_ERR
    assert rig.fault(mr.rkey, va, PAGE)
    ret = rig.reg(va, 16 * PAGE)
    assert failed(ret) == ("EFAULT", "mlx5r_umr_post_send_wait")


def test_before_recovery_existed_every_later_request_fails():
    rig = Rig(Era.OLD)
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)
    rig.dev.inject.fail("umr")
    assert rig.fault(mr.rkey, va, PAGE)
    assert rig.fault(mr.rkey, va, PAGE)
    assert "mlx5r_umr_recover" not in steps(rig)


def test_an_enabled_key_cannot_be_enabled_and_a_free_one_not_written():
    rig = Rig()
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)
    assert rig.run(mlx5r_umr_update_xlt(mr, rig.thread, 0, 8, 12, 2)) == -14  # ENABLE
    assert rig.run(mlx5r_umr_revoke_mr(mr, rig.thread)) == 0
    assert rig.run(mlx5r_umr_update_xlt(mr, rig.thread, 0, 8, 0, UPD_XLT_ZAP | UPD_XLT_ATOMIC)) == -14


@pytest.mark.parametrize(
    ("caps", "errno"),
    [
        ({"umr_modify_atomic_disabled": True, "atomic": True}, "EPERM"),
        ({"umr_modify_atomic_disabled": True, "atomic": False}, None),
    ],
)
def test_masks_that_the_device_refuses(caps, errno):
    rig = Rig(caps=HcaCaps(**caps))
    va = rig.mmap(4)
    ret = rig.reg(va, 4 * PAGE)
    assert getattr(ret, "name", None) == errno
    if errno:
        assert ret.step == "umr_check_mkey_mask"


def test_indirect_keys_need_the_capability():
    rig = Rig()
    imr = rig.implicit()
    rig.hca.caps.umr_indirect_mkey_disabled = True
    ret = rig.run(mlx5r_umr_update_xlt(imr, rig.thread, 0, 4, 0, UPD_XLT_INDIRECT))
    assert failed(ret) == ("EPERM", "mlx5r_umr_update_xlt")


def test_a_dead_device():
    rig = Rig()
    va = rig.mmap(16)
    mr = rig.reg(va, 16 * PAGE)
    rig.hca.internal_error = True
    ret = rig.run(mlx5r_umr_update_xlt(mr, rig.thread, 0, 8, 0, UPD_XLT_ZAP))
    assert failed(ret) == ("EIO", "mlx5r_umr_post_send")
    assert rig.run(mlx5r_umr_revoke_mr(mr, rig.thread)) == 0  # nothing to fence


def test_at_most_128_requests_are_in_flight():
    rig = Rig(cost=1.0, frames=1 << 15, pf_max_active=200)
    va = rig.mmap(200 * 16)
    mrs = [rig.reg(va + i * 16 * PAGE, 16 * PAGE) for i in range(200)]
    rig.costs.umr_wqe = 10_000.0
    least = [128]
    down = rig.dev.umrc.sem.up

    def up(thread: Any) -> Any:
        least[0] = min(least[0], rig.dev.umrc.sem.count)
        return down(thread)

    rig.dev.umrc.sem.up = up
    events = [rig.post(rig.rdma_event(mr.rkey, mr.iova, PAGE)) for mr in mrs]
    for event in events:
        rig.engine.run(event)
    assert least[0] == 0
    assert rig.dev.odp_pf_eq.wq.most_active == 200
    assert rig.dev.umrc.sem.count == 128


def test_revoked_keys_are_free_and_the_kernels():
    rig = Rig()
    va = rig.mmap(16, resident=True)
    mr = rig.reg(va, 16 * PAGE, ODP)
    hw = rig.hca.mkeys.mkeys[mr.mmkey.key >> 8]
    assert not hw.mkc.free and hw.mkc.pd == 7
    assert np.count_nonzero(hw.xlt) == 16
    rig.run(mlx5r_umr_revoke_mr(mr, rig.thread))
    assert hw.mkc.free and hw.mkc.pd == 0
