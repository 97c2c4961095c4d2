"""What the transport makes of page faults when packets get lost: damming and flood, both off by default."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.rig import PAGE, Pair, Region, noise

from kit.drivers.mlx5.adapter.hca import HcaParameters
from kit.drivers.mlx5.adapter.qp import RNR_TIMER, Qp
from kit.drivers.mlx5.adapter.retries import timeout_of
from kit.drivers.mlx5.descriptors import SendWr, Sge, Wc
from kit.drivers.mlx5.enums import QpState, WcStatus, WrOpcode
from kit.drivers.mlx5.verbs_post import post_send, wait_cq

FAULT = 5000.0  # microseconds that a fault takes, so that it is not over when the RNR timer is
DAMMED, FLOODED = HcaParameters(packet_damming=True), HcaParameters(packet_flood=True)


def world(params: HcaParameters | None = None, **costs: float) -> Pair:
    return Pair(params=params, hw_fault_detect=FAULT, **costs)


def post(pair: Pair, qp: Qp, src: Region, dst: Region, page: int, opcode: WrOpcode = WrOpcode.RDMA_WRITE) -> None:
    wr = SendWr(
        page, opcode, (Sge(src.va + page * PAGE, PAGE, src.key),), remote_addr=dst.va + page * PAGE, rkey=dst.key
    )  # fmt: skip
    assert pair.run(post_send(qp, pair.thread, wr)) == 0


def pass_time(pair: Pair, us: float) -> None:
    pair.engine.run(pair.engine.env.timeout(us))


def finish(pair: Pair, qp: Qp, count: int) -> list[Wc]:
    done: list[Wc] = pair.run(wait_cq(qp.send_cq, pair.thread, count))
    return done


def two_writes(pair: Pair, qp: Qp, between: float) -> tuple[list[Wc], float, bool]:
    """Write a missing page and, `between` microseconds later, one that is there; how that ended, when, and intact."""
    src, dst = pair.left.region(2), pair.right.region(2, missing=True)
    dst.map(1, 1)
    src.fill(noise(2))
    begin = pair.engine.now
    post(pair, qp, src, dst, 0)
    pass_time(pair, between)
    post(pair, qp, src, dst, 1)
    done = finish(pair, qp, 2)
    return done, pair.engine.now - begin, np.array_equal(src.bytes, dst.bytes)


def test_a_message_posted_while_another_waits_for_a_page_is_seen_missing_at_the_time_out() -> None:
    """Closed form: 16 RNR waits cover the fault's 10.1 ms, give or take; then 67.1 ms, and both come through."""
    for params, dammed in ((None, 0), (DAMMED, 1)):
        pair = world(params)
        qp, _ = pair.rc(timeout=14, min_rnr_timer=12)
        done, took, intact = two_writes(pair, qp, 100.0)
        assert [wc.status for wc in done] == [WcStatus.SUCCESS] * 2 and intact
        assert pair.left.hca.counters.dammed == dammed and qp.retries == dammed
        waits = -(-(FAULT + 5.0 + 50.0) // RNR_TIMER[12]) * RNR_TIMER[12]
        assert took == pytest.approx(waits + dammed * 4.096 * (1 << 14), rel=0.01)


@pytest.mark.parametrize(("code", "floor"), [(14, 0.0), (10, 30e3), (14, 500e3), (18, 500e3)])
def test_about_a_hundred_times_a_faults_time_with_the_reported_smallest_time_outs(code: int, floor: float) -> None:
    """RNR waits of 1.28 ms that really take 4.5 ms, as reported; the time-out is the code's or the adapter's smallest."""
    took = {}
    for damming in (False, True):
        params = HcaParameters(packet_damming=damming, rnr_scale=3.5, timeout_floor=floor)
        pair = Pair(params=params)
        qp, _ = pair.rc(timeout=code, min_rnr_timer=14)
        assert timeout_of(qp) == max(4.096 * 2**code, floor)
        _, took[damming], intact = two_writes(pair, qp, 100.0)
        assert intact
    assert took[False] == pytest.approx(4480.0, rel=0.01)
    assert took[True] - took[False] == pytest.approx(max(4.096 * 2**code, floor), rel=0.001)
    if floor == 500e3 and code == 14:
        assert 100 < took[True] / took[False] < 120


@pytest.mark.parametrize("between", [0.0, 20_000.0])
def test_what_is_posted_with_the_faulting_message_or_after_it_is_not_lost(between: float) -> None:
    pair = world(DAMMED)
    qp, _ = pair.rc()
    done, took, intact = two_writes(pair, qp, between)
    assert [wc.status for wc in done] == [WcStatus.SUCCESS] * 2 and intact
    assert pair.left.hca.counters.dammed == qp.retries == 0 and took < 4.096 * (1 << 14)


def test_a_later_message_shows_the_gap_at_once() -> None:
    pair = world(DAMMED)
    qp, _ = pair.rc()
    src, dst = pair.left.region(3), pair.right.region(3, missing=True)
    dst.map(1, 2)
    src.fill(noise(3))
    post(pair, qp, src, dst, 0)
    pass_time(pair, 100.0)
    post(pair, qp, src, dst, 1)
    pass_time(pair, 3 * FAULT)
    assert len(qp.send_cq.entries) == 1 and pair.left.hca.counters.dammed == 1
    post(pair, qp, src, dst, 2)
    assert [wc.wr_id for wc in finish(pair, qp, 3)] == [0, 1, 2]
    assert qp.retries == 0 and np.array_equal(src.bytes, dst.bytes) and pair.engine.now < 4 * FAULT


def test_a_fault_of_the_requesters_own_dams_too() -> None:
    pair = world(DAMMED)
    qp, _ = pair.rc()
    src, dst = pair.left.region(2, missing=True), pair.right.region(2)
    src.map(1, 1)
    src.fill(noise(2))
    post(pair, qp, src, dst, 0)
    pass_time(pair, 100.0)
    post(pair, qp, src, dst, 1)
    assert [wc.status for wc in finish(pair, qp, 2)] == [WcStatus.SUCCESS] * 2
    assert qp.retries == 1 and np.array_equal(src.bytes, dst.bytes)


@pytest.mark.parametrize("retry_cnt", [0, 1])
def test_without_retries_left_the_lost_message_fails(retry_cnt: int) -> None:
    pair = world(DAMMED)
    qp, _ = pair.rc(retry_cnt=retry_cnt, timeout=10)
    done, _, _ = two_writes(pair, qp, 100.0)
    wanted = WcStatus.RETRY_EXC_ERR if retry_cnt == 0 else WcStatus.SUCCESS
    assert [wc.status for wc in done] == [WcStatus.SUCCESS, wanted]
    assert (qp.state == QpState.ERR) == (retry_cnt == 0)


def test_without_a_time_out_nobody_notices() -> None:
    """Code 0 is no limit: the message stays unacknowledged until another follows."""
    pair = world(DAMMED)
    qp, _ = pair.rc(timeout=0)
    src, dst = pair.left.region(3), pair.right.region(3, missing=True)
    dst.map(1, 2)
    post(pair, qp, src, dst, 0)
    pass_time(pair, 100.0)
    post(pair, qp, src, dst, 1)
    pass_time(pair, 60e6)
    assert len(qp.send_cq.entries) == 1
    post(pair, qp, src, dst, 2)
    assert len(finish(pair, qp, 3)) == 3


def test_a_missing_receive_dams_nothing() -> None:
    """Only a page does: a receiver that is not ready for want of a receive is as it always was."""
    pair = world(DAMMED)
    qp, _ = pair.rc(min_rnr_timer=12)
    src = pair.left.region(1)
    for at in range(2):
        wr = SendWr(at, WrOpcode.SEND, (Sge(src.va, PAGE, src.key),))
        assert pair.run(post_send(qp, pair.thread, wr)) == 0
        pass_time(pair, 100.0)
    assert qp.rnr_wait and not qp.dammed and pair.left.hca.counters.dammed == 0


# -- flood


def reads(pair: Pair, qps: int) -> tuple[int, int, bool]:
    """Read a page into a missing one over each queue pair: requests sent again, bytes on the wire, and intact."""
    src, dst = pair.left.region(qps, missing=True), pair.right.region(qps)
    dst.fill(noise(qps))
    made = [pair.rc()[0] for _ in range(qps)]
    for at, qp in enumerate(made):
        post(pair, qp, src, dst, at, WrOpcode.RDMA_READ)
    for qp in made:
        assert finish(pair, qp, 1)[0].status == WcStatus.SUCCESS
    pass_time(pair, 1e4)
    counters = pair.left.hca.counters
    return counters.flooded, pair.right.hca.counters.bytes, np.array_equal(src.bytes, dst.bytes)


@pytest.mark.parametrize("qps", [1, 4, 16])
def test_reads_are_asked_for_again_every_half_millisecond_and_answered(qps: int) -> None:
    """Closed form: floor(5.06 ms / 0.5 ms) = 10 requests a queue pair in vain, each answered with all of its data."""
    quiet, once, intact = reads(world(resend_interval=500.0), qps)
    assert quiet == 0 and intact
    flooded, sent, intact = reads(world(FLOODED, resend_interval=500.0), qps)
    assert intact and flooded == 10 * qps
    assert sent == once + flooded * PAGE


def test_a_flood_needs_an_interval_and_ends_with_the_queue_pair() -> None:
    assert reads(world(FLOODED, resend_interval=0.0), 2)[0] == 0
    pair = world(FLOODED, resend_interval=500.0)
    pair.left.error = True
    qp, _ = pair.rc()
    src, dst = pair.left.region(1, missing=True), pair.right.region(1)
    post(pair, qp, src, dst, 0, WrOpcode.RDMA_READ)
    assert finish(pair, qp, 1)[0].status == WcStatus.LOC_PROT_ERR
    before = pair.left.hca.counters.flooded
    pass_time(pair, 1e5)
    assert pair.left.hca.counters.flooded == before == 10


# -- anything at once


def storm(seed: int) -> tuple[int, int, int]:
    """Random messages at random moments over missing pages of both sides; what was lost, missed and asked again."""
    rng = np.random.default_rng(seed)
    params = HcaParameters(packet_damming=True, packet_flood=True)
    pair = Pair(params=params, seed=seed, jitter=float(rng.choice([0.0, 2.0])), resend_interval=50.0)
    made = []
    for _ in range(int(rng.integers(1, 4))):
        pages = int(rng.integers(4, 20))
        qp, _peer = pair.rc(timeout=8, min_rnr_timer=int(rng.choice([1, 12])))
        src, dst = pair.left.region(pages, missing=True), pair.right.region(pages, missing=True)
        for region in (src, dst):
            for page in np.flatnonzero(rng.random(pages) < 0.5).tolist():
                region.map(page, 1)
        src.fill(noise(pages, seed))
        dst.fill(noise(pages, seed + 1))
        made.append((qp, src, dst, rng.random(pages) < 0.4, src.bytes.copy(), dst.bytes.copy()))
    for page in range(20):
        for qp, src, dst, read, _, _ in made:
            if page < src.pages:
                post(pair, qp, src, dst, page, WrOpcode.RDMA_READ if read[page] else WrOpcode.RDMA_WRITE)
                pass_time(pair, float(rng.exponential(rng.choice([1.0, 100.0, 1000.0]))))
    for qp, src, dst, read, before, there in made:
        done = finish(pair, qp, src.pages)
        assert [(wc.wr_id, wc.status) for wc in done] == [(at, WcStatus.SUCCESS) for at in range(src.pages)]
        whole = np.repeat(read, PAGE)
        assert np.array_equal(src.bytes, np.where(whole, there, before)), "READs brought what was there"
        assert np.array_equal(dst.bytes, np.where(whole, there, before)), "WRITEs left what they carried"
    for host in (pair.left, pair.right):
        assert not host.hca.dma.stale and not host.hca.outstanding_faults
    counters = pair.left.hca.counters
    return counters.dammed, sum(qp.retries for qp, *_ in made), counters.flooded


def test_whatever_gets_lost_comes_through_in_the_end() -> None:
    lost = np.array([storm(seed) for seed in range(60)])
    assert (lost.sum(axis=0) > (60, 10, 10)).all(), "each pitfall has been there, often"
