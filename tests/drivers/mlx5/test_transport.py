"""Queue pairs on real page tables: what arrives, when a page is missing, when something is lost, when it fails."""

from __future__ import annotations

import numpy as np
import pytest
from drivers.mlx5.rig import PD, Pair, noise

from kit.drivers.mlx5.adapter.hca import HcaParameters
from kit.drivers.mlx5.adapter.qp import RNR_TIMER
from kit.drivers.mlx5.adapter.queues import Srq
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Sge
from kit.drivers.mlx5.enums import (  # fmt: skip
    PAGE,
    Access,
    PageFaultSubtype,
    PageRequest,
    QpState,
    QpType,
    SendFlags,
    WcOpcode,
    WcStatus,
    WrOpcode,
)
from kit.drivers.mlx5.verbs import modify_qp
from kit.drivers.mlx5.verbs_post import poll_cq, post_recv, post_send, post_srq_recv, wait_cq


def sge(region, offset=0, length=None):
    return Sge(region.va + offset, region.pages * PAGE - offset if length is None else length, region.key)


def finish(pair, cq, n=1):
    return pair.run(wait_cq(cq, pair.thread, n))


@pytest.mark.parametrize(("offset", "length"), [(0, 8 * PAGE), (100, 5000), (4095, 2), (4090, PAGE), (8, 1), (0, 0)])
@pytest.mark.parametrize("skew", [0, 13])
def test_send_arrives_byte_for_byte(offset, length, skew):
    pair = Pair()
    qp, peer = pair.rc()
    src, dst = pair.left.region(9), pair.right.region(10)
    data = noise(9)
    src.fill(data)
    pair.run(post_recv(peer, pair.thread, RecvWr(5, (sge(dst, skew),))))
    pair.run(post_send(qp, pair.thread, SendWr(6, WrOpcode.SEND_WITH_IMM, (sge(src, offset, length),), imm_data=77)))
    (sent,), (got,) = finish(pair, qp.send_cq), finish(pair, peer.recv_cq)
    assert (sent.wr_id, sent.status, sent.opcode) == (6, WcStatus.SUCCESS, WcOpcode.SEND)
    assert (got.wr_id, got.byte_len, got.imm_data, got.src_qp) == (5, length, 77, qp.qpn)
    assert np.array_equal(dst.bytes[skew : skew + length], data[offset : offset + length])
    assert not dst.bytes[:skew].any() and not dst.bytes[skew + length :].any()


def test_rdma_write_and_read_with_several_segments():
    pair = Pair()
    qp, _ = pair.rc()
    a, b, remote = pair.left.region(2), pair.left.region(3, va=0x900000), pair.right.region(8, va=0x7000)
    a.fill(noise(2, 1)), b.fill(noise(3, 2))
    want = np.concatenate([a.bytes[10:5000], b.bytes[4000:12000]])
    parts = (sge(a, 10, 4990), sge(b, 4000, 8000))
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.RDMA_WRITE, parts, remote_addr=0x7003, rkey=remote.key)))
    finish(pair, qp.send_cq)
    assert np.array_equal(remote.bytes[3 : 3 + len(want)], want)
    a.fill(np.zeros(2 * PAGE, np.uint8)), b.fill(np.zeros(3 * PAGE, np.uint8))
    pair.run(post_send(qp, pair.thread, SendWr(2, WrOpcode.RDMA_READ, parts, remote_addr=0x7003, rkey=remote.key)))
    (wc,) = finish(pair, qp.send_cq)
    assert wc.opcode == WcOpcode.RDMA_READ
    assert np.array_equal(np.concatenate([a.bytes[10:5000], b.bytes[4000:12000]]), want)
    assert not pair.left.hca.dma.stale and not pair.right.hca.dma.stale


OPERATIONS = [WrOpcode.SEND, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM, WrOpcode.RDMA_READ]


@pytest.mark.parametrize("opcode", OPERATIONS)
@pytest.mark.parametrize("holes", [(0,), (3, 9), tuple(range(16))])
@pytest.mark.parametrize("memory_scheme", [False, True])
def test_missing_pages_on_both_sides_are_brought_and_no_byte_is_lost(opcode, holes, memory_scheme):
    pair = Pair()
    for host in (pair.left, pair.right):
        host.hca.memory_scheme = memory_scheme
    qp, peer = pair.rc()
    local, remote = pair.left.region(16), pair.right.region(16, va=0x40000)
    source, sink = (remote, local) if opcode == WrOpcode.RDMA_READ else (local, remote)
    data = noise(16)
    source.fill(data)
    for hole in holes:
        local.unmap(hole, 1), remote.unmap(hole, 1)
    size = 16 * PAGE - 123
    pair.run(
        post_recv(
            peer, pair.thread, RecvWr(1, (sge(remote, 100, size - 50), Sge(remote.va + size + 50, 73, remote.key)))
        )
    )
    pair.run(
        post_send(
            qp, pair.thread, SendWr(2, opcode, (sge(local, 100, size),), remote_addr=remote.va + 100, rkey=remote.key)
        )
    )
    (wc,) = finish(pair, qp.send_cq)
    assert wc.status == WcStatus.SUCCESS
    assert np.array_equal(sink.bytes[100 : 100 + size], data[100 : 100 + size])
    assert pair.left.events and pair.right.events and not pair.left.hca.outstanding_faults
    assert not pair.left.hca.dma.stale and not pair.right.hca.dma.stale
    if memory_scheme:
        assert {e.sub_type for e in pair.left.events + pair.right.events} == {PageFaultSubtype.MEMORY}
        return
    assert len(pair.left.events) == len(pair.right.events) == 1  # one event brings the whole rest
    mine, theirs = pair.left.events[0], pair.right.events[0]
    first = max((holes[0] * PAGE - 100) // 4096 * 4096, 0)
    assert mine.bytes_committed == theirs.bytes_committed == first
    kind = PageRequest.REQ_READ_OR_ATOMIC if opcode == WrOpcode.RDMA_READ else PageRequest.REQ_SEND_OR_WRITE
    assert mine.pftype_wq == kind << 24 | qp.qpn
    if opcode == WrOpcode.SEND:
        assert theirs.pftype_wq == PageRequest.RESP << 24 | peer.qpn
    else:
        assert (theirs.rdma_va, theirs.rdma_op_len, theirs.r_key) == (remote.va + 100, size, remote.key)


def test_responder_fault_costs_rnr_waits_of_the_programmed_timer():
    times = {}
    for code in (1, 12, 14):
        pair = Pair()
        qp, _ = pair.rc(min_rnr_timer=code)
        src, dst = pair.left.region(1), pair.right.region(1, missing=True)
        begin = pair.engine.now
        pair.run(
            post_send(qp, pair.thread, SendWr(1, WrOpcode.RDMA_WRITE, (sge(src),), remote_addr=dst.va, rkey=dst.key))
        )
        finish(pair, qp.send_cq)
        times[code] = pair.engine.now - begin
        handling = 100 + 5 + 50
        assert qp.rnr_naks == -(-handling // (RNR_TIMER[code] + 2))  # an attempt takes 2 us there and back, or more
    assert times[12] - 640 == pytest.approx(times[14] - 1280, abs=1e-6)
    assert times[1] < times[12]


def test_rnr_retries_run_out():
    pair = Pair()
    qp, peer = pair.rc(rnr_retry=2, min_rnr_timer=1)
    src = pair.left.region(1)
    pair.run(
        post_send(
            qp, pair.thread, SendWr(1, WrOpcode.SEND, (sge(src),)), SendWr(2, WrOpcode.SEND, (sge(src),), send_flags=0)
        )
    )
    first, second = finish(pair, qp.send_cq, 2)
    assert (first.status, second.status) == (WcStatus.RNR_RETRY_EXC_ERR, WcStatus.WR_FLUSH_ERR)
    assert qp.state == QpState.ERR and peer.state == QpState.RTS and qp.rnr_naks == 3


def test_lost_messages_time_out_and_are_sent_again():
    pair = Pair()
    qp, _ = pair.rc(timeout=4)
    src, dst = pair.left.region(4), pair.right.region(4)
    src.fill(noise(4))
    seen = []
    pair.fabric.drop = lambda message: seen.append(message.index) or len(seen) in (1, 4)
    for i in range(4):
        wr = SendWr(i, WrOpcode.RDMA_WRITE, (sge(src, i * PAGE, PAGE),), remote_addr=dst.va + i * PAGE, rkey=dst.key)
        pair.run(post_send(qp, pair.thread, wr))
    done = finish(pair, qp.send_cq, 4)
    assert [wc.wr_id for wc in done] == [0, 1, 2, 3] and all(wc.status == WcStatus.SUCCESS for wc in done)
    assert np.array_equal(src.bytes, dst.bytes)
    pair.fabric.drop = lambda message: True
    begin = pair.engine.now
    pair.run(post_send(qp, pair.thread, SendWr(9, WrOpcode.SEND, ())))
    (wc,) = finish(pair, qp.send_cq)
    assert wc.status == WcStatus.RETRY_EXC_ERR and pair.engine.now - begin >= 8 * 4.096 * 16


def test_atomics_return_what_was_there_and_happen_once():
    pair = Pair()
    qp, _ = pair.rc(timeout=1)
    back, remote = pair.left.region(1, missing=True), pair.right.region(1, missing=True)
    remote.host.hca.memory.payload[remote.pfns[0], 3] = 41

    def atomic(opcode, add, swap=0):
        wr = SendWr(
            1, opcode, (sge(back, 16, 8),), remote_addr=remote.va + 24, rkey=remote.key, compare_add=add, swap=swap
        )
        pair.run(post_send(qp, pair.thread, wr))
        (wc,) = finish(pair, qp.send_cq)
        return wc.status, int(back.bytes[16:24].view(np.uint64)[0]), int(remote.bytes[24:32].view(np.uint64)[0])

    assert atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, 1) == (
        WcStatus.SUCCESS,
        41,
        42,
    )  # both sides faulted: replayed, not repeated
    assert len(pair.left.events) == len(pair.right.events) == 1
    assert atomic(WrOpcode.ATOMIC_CMP_AND_SWP, 5, 9) == (WcStatus.SUCCESS, 42, 42)
    assert atomic(WrOpcode.ATOMIC_CMP_AND_SWP, 42, 9) == (WcStatus.SUCCESS, 42, 9)
    assert atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, (1 << 64) - 1)[2] == 8


def test_atomic_write_flush_and_inline():
    pair = Pair()
    qp, _ = pair.rc()
    qp.max_inline_data = 64
    remote = pair.right.region(2, missing=True)
    word = np.arange(8, dtype=np.uint8)
    inline = SendFlags.INLINE | SendFlags.SIGNALED
    pair.run(
        post_send(
            qp,
            pair.thread,
            SendWr(
                1,
                WrOpcode.ATOMIC_WRITE,
                remote_addr=remote.va + 8,
                rkey=remote.key,
                inline_data=word,
                send_flags=inline,
            ),
        )
    )
    pair.run(
        post_send(qp, pair.thread, SendWr(2, WrOpcode.FLUSH, remote_addr=remote.va, rkey=remote.key, length=2 * PAGE))
    )
    pair.run(post_send(qp, pair.thread, SendWr(3, WrOpcode.FLUSH, rkey=remote.key)))
    done = finish(pair, qp.send_cq, 3)
    assert [(w.status, w.opcode) for w in done] == [
        (0, WcOpcode.ATOMIC_WRITE),
        (0, WcOpcode.FLUSH),
        (0, WcOpcode.FLUSH),
    ]
    assert np.array_equal(remote.bytes[8:16], word) and len(pair.right.events) == 2
    pair.run(
        post_send(
            qp,
            pair.thread,
            SendWr(
                4,
                WrOpcode.ATOMIC_WRITE,
                remote_addr=remote.va + 4,
                rkey=remote.key,
                inline_data=word,
                send_flags=inline,
            ),
        )
    )
    assert finish(pair, qp.send_cq)[0].status == WcStatus.REM_INV_REQ_ERR


def test_ud_datagrams_need_no_connection_and_leave_room_for_the_header():
    pair = Pair()
    qp, peer = pair.rc((QpType.UD, QpType.UD))
    src, dst = pair.left.region(1, missing=True), pair.right.region(1)
    src.fill(noise(1))
    pair.run(post_recv(peer, pair.thread, RecvWr(1, (sge(dst),))))
    for _ in range(2):  # the second finds no receive and is gone
        pair.run(post_send(qp, pair.thread, SendWr(2, WrOpcode.SEND, (sge(src, 0, 1000),), ah_qp=peer.qpn)))
    assert [wc.status for wc in finish(pair, qp.send_cq, 2)] == [0, 0]
    (got,) = finish(pair, peer.recv_cq)
    assert got.byte_len == 1040 and np.array_equal(dst.bytes[40:1040], src.bytes[:1000])
    pair.engine.run()
    assert pair.right.hca.counters.dropped == 1 and len(pair.left.events) == 1


def test_xrc_and_dc_receive_through_a_shared_queue():
    for kinds in ((QpType.XRC_SEND, QpType.XRC_RECV), (QpType.DC, QpType.DC)):
        pair = Pair()
        cq = pair.cq()
        srq = Srq(pair.fabric.number(pair.right.hca), PD, 2, 16, cq if kinds[0] == QpType.XRC_SEND else None)
        pair.right.hca.srqs[srq.srqn] = srq
        qp, peer = pair.rc(kinds, srq if kinds[0] == QpType.DC else None)
        src, dst = pair.left.region(2, missing=True), pair.right.region(2, missing=True)
        src.fill(noise(2))
        pair.run(post_srq_recv(srq, pair.thread, *(RecvWr(i, (sge(dst, i * PAGE, PAGE),)) for i in range(2))))
        to = peer.qpn if kinds[0] == QpType.DC else srq.srqn
        pair.run(
            post_send(
                qp, pair.thread, *(SendWr(i, WrOpcode.SEND, (sge(src, i * PAGE, PAGE),), ah_qp=to) for i in range(2))
            )
        )
        got = finish(pair, cq if srq.cq else peer.recv_cq, 2)
        assert [wc.wr_id for wc in got] == [0, 1] and np.array_equal(src.bytes, dst.bytes)
        assert {e.pftype_wq for e in pair.right.events} == {PageRequest.RMP << 24 | srq.srqn}
        assert len(pair.right.events) == 2 and not srq.taken


def attempt(make, opcode=WrOpcode.RDMA_WRITE, receive=None):
    """One request that must fail: its status, the responder's state, the statuses of the responder's receives."""
    pair = Pair()
    qp, peer = pair.rc()
    local, remote = pair.left.region(2), pair.right.region(2, va=0x40000)
    if receive:
        pair.run(post_recv(peer, pair.thread, RecvWr(1, (receive(pair.right, remote),))))
    fields = {"sg_list": (sge(local),), "remote_addr": remote.va, "rkey": remote.key} | make(pair, local, remote)
    pair.run(post_send(qp, pair.thread, SendWr(1, opcode, **fields)))
    (wc,) = finish(pair, qp.send_cq)
    pair.engine.run()
    assert qp.state == QpState.ERR
    got = pair.run(poll_cq(peer.recv_cq, pair.thread))
    return wc.status, peer.state, [w.status for w in got]


BAD = {
    "past the end": (lambda pair, a, b: {"remote_addr": b.va + 1}, WcStatus.REM_ACCESS_ERR),
    "variant": (lambda pair, a, b: {"rkey": b.key + 1}, WcStatus.REM_ACCESS_ERR),
    "no such rkey": (lambda pair, a, b: {"rkey": b.key + 0x1000}, WcStatus.REM_ACCESS_ERR),
    "no such lkey": (lambda pair, a, b: {"sg_list": (Sge(a.va, PAGE, a.key + 0x1000),)}, WcStatus.LOC_PROT_ERR),
    "no remote write": (
        lambda pair, a, b: {"rkey": pair.right.region(2, b.va, access=Access.LOCAL_WRITE).key}, WcStatus.REM_ACCESS_ERR,
    ),
    "no paging": (
        lambda pair, a, b: {"rkey": pair.right.region(2, b.va, missing=True, pg=False).key}, WcStatus.REM_ACCESS_ERR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_keys_rights_and_ranges_fail_with_the_right_status(name):
    make, status = BAD[name]
    got, peer, _ = attempt(make)
    assert got == status
    assert peer == (QpState.RTS if status == WcStatus.LOC_PROT_ERR else QpState.ERR)


def test_bad_receives_fail_on_both_sides():
    def same(pair, a, b):
        return {}

    def no_write(pair, a, b):
        return {"sg_list": (sge(pair.left.region(2, access=0)),)}

    assert attempt(no_write, WrOpcode.RDMA_READ)[0] == WcStatus.LOC_PROT_ERR
    short = attempt(same, WrOpcode.SEND, lambda host, region: sge(region, 0, PAGE))
    assert short == (WcStatus.REM_INV_REQ_ERR, QpState.ERR, [WcStatus.LOC_LEN_ERR])
    readonly = attempt(same, WrOpcode.SEND, lambda host, region: sge(host.region(2, region.va, access=0)))
    assert readonly == (WcStatus.REM_OP_ERR, QpState.ERR, [WcStatus.LOC_PROT_ERR])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("opcode", [WrOpcode.SEND, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ])
def test_a_fault_resumed_with_an_error_fails_the_queue_pair(side, opcode):
    params = HcaParameters()
    pair = Pair(params=params)
    qp, peer = pair.rc()
    local = pair.left.region(1, missing=side == "left")
    remote = pair.right.region(1, va=0x40000, missing=side == "right")
    getattr(pair, side).error = True
    pair.run(post_recv(peer, pair.thread, RecvWr(1, (sge(remote),))))
    wr = SendWr(2, opcode, (sge(local),), remote_addr=remote.va, rkey=remote.key)
    pair.run(post_send(qp, pair.thread, wr, SendWr(3, opcode, (sge(local),), remote_addr=remote.va, rkey=remote.key)))
    first, second = finish(pair, qp.send_cq, 2)
    remote_status = params.send_fault_error if opcode == WrOpcode.SEND else params.rdma_fault_error
    assert first.status == (params.requester_fault_error if side == "left" else remote_status)
    assert second.status == WcStatus.WR_FLUSH_ERR and qp.state == QpState.ERR
    assert getattr(pair, side).hca.counters.resumes_in_error == 1
    if side == "right":
        assert peer.state == QpState.ERR
        (got,) = finish(pair, peer.recv_cq)
        assert got.status == (params.recv_fault_error if opcode == WrOpcode.SEND else WcStatus.WR_FLUSH_ERR)


def test_a_dma_through_an_unmapped_address_is_recorded():
    pair = Pair()
    qp, _ = pair.rc()
    src, dst = pair.left.region(4), pair.right.region(4)
    dst.unmap(2, 1, zap=False)  # the bug: the translation outlives the mapping
    dst.host.hca.dma.map_pages(dst.pfns[2:3])  # and the page is mapped again for somebody else
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.RDMA_WRITE, (sge(src),), remote_addr=dst.va, rkey=dst.key)))
    finish(pair, qp.send_cq)
    (stale,) = pair.right.hca.dma.stale
    assert stale.write and stale.pfn == dst.pfns[2] and not pair.left.hca.dma.stale
    assert "dma_stale" in pair.engine.trace.steps.words


def test_reset_while_a_fault_is_pending_forgets_it():
    pair = Pair()
    qp, _ = pair.rc()
    src = pair.left.region(1, missing=True)
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.SEND, (sge(src),))))
    pair.run(modify_qp(qp, pair.thread, QpState.RESET))
    pair.engine.run()
    assert pair.left.hca.counters.resumes == 1 and not qp.sq and not qp.send_cq.entries


def test_many_messages_in_flight_complete_in_order_with_random_holes():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pair = Pair(seed=seed, jitter=0.3, resend_interval=float(rng.integers(0, 2) * 512))
        qp, peer = pair.rc(min_rnr_timer=int(rng.integers(1, 14)))
        out, back = pair.left.region(64), pair.left.region(64, va=0x900000)
        there = pair.right.region(64, va=0x4000000)
        out.fill(noise(64, seed))
        for page in rng.permutation(64)[: rng.integers(0, 64)]:
            for region in (out, back, there):
                if rng.random() < 0.5:
                    region.unmap(int(page), 1)
        requests = []
        for i in range(32):
            at, size = 2 * i * PAGE + int(rng.integers(0, 4000)), int(rng.integers(1, 4000))
            opcode = (WrOpcode.SEND, WrOpcode.RDMA_WRITE)[int(rng.integers(2))]
            pair.run(
                post_recv(peer, pair.thread, RecvWr(i, (sge(there, at, size),)))
            ) if opcode == WrOpcode.SEND else None
            requests.append(SendWr(2 * i, opcode, (sge(out, at, size),), remote_addr=there.va + at, rkey=there.key))
            requests.append(
                SendWr(2 * i + 1, WrOpcode.RDMA_READ, (sge(back, at, size),), remote_addr=there.va + at, rkey=there.key)
            )
        pair.run(post_send(qp, pair.thread, *requests))
        done = finish(pair, qp.send_cq, 64)
        assert [wc.wr_id for wc in done] == list(range(64)) and all(wc.status == 0 for wc in done), (seed, done)
        for wr in requests[::2]:
            at, size = wr.remote_addr - there.va, wr.sg_list[0].length
            assert np.array_equal(out.bytes[at : at + size], there.bytes[at : at + size]), seed
            assert np.array_equal(out.bytes[at : at + size], back.bytes[at : at + size]), seed
        assert not pair.left.hca.outstanding_faults and not pair.right.hca.outstanding_faults
        assert not pair.left.hca.dma.stale and not pair.right.hca.dma.stale


def test_stamps_travel_too():
    pair = Pair(payload=8)
    qp, _ = pair.rc()
    src, dst = pair.left.region(64), pair.right.region(64)
    stamps = np.arange(1, 65, dtype=np.uint64)
    pair.left.memory.payload[src.pfns, 0] = stamps
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.RDMA_WRITE, (sge(src),), remote_addr=dst.va, rkey=dst.key)))
    finish(pair, qp.send_cq)
    assert np.array_equal(pair.right.memory.payload[dst.pfns, 0], stamps)


def test_large_messages_take_the_time_of_the_wire():
    pair = Pair(frames=1 << 12)
    qp, _ = pair.rc()
    src, dst = pair.left.region(1024), pair.right.region(1024)
    src.fill(noise(1024))
    begin = pair.engine.now
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.RDMA_WRITE, (sge(src),), remote_addr=dst.va, rkey=dst.key)))
    finish(pair, qp.send_cq)
    assert pair.engine.now - begin == pytest.approx(0.5 + (4 << 20) / 12500 + 2)
    assert np.array_equal(src.bytes, dst.bytes)


def test_what_is_unverified_is_a_parameter():
    def cold(local_missing, params=None, **costs):
        pair = Pair(params=params, **costs)
        qp, _ = pair.rc(min_rnr_timer=12)
        src, dst = pair.left.region(1, missing=local_missing), pair.right.region(1, missing=not local_missing)
        begin = pair.engine.now
        pair.run(
            post_send(qp, pair.thread, SendWr(1, WrOpcode.RDMA_WRITE, (sge(src),), remote_addr=dst.va, rkey=dst.key))
        )
        (wc,) = finish(pair, qp.send_cq)
        return pair.engine.now - begin, wc.status

    wire = 0.5 + 4096 / 12500 + 2
    assert cold(True)[0] == pytest.approx(155 + wire)  # detection, interrupt, resume
    assert cold(True, resend_interval=500.0)[0] == pytest.approx(500 + wire)
    assert cold(False)[0] == pytest.approx(640 + 2 * wire)
    assert cold(False, HcaParameters(rnr_scale=4.0))[0] == pytest.approx(4 * 640 + 2 * wire)

    pair = Pair(params=HcaParameters(requester_fault_error=WcStatus.GENERAL_ERR))
    pair.left.error = True
    qp, _ = pair.rc()
    src = pair.left.region(1, missing=True)
    pair.run(post_send(qp, pair.thread, SendWr(1, WrOpcode.SEND, (sge(src),))))
    assert finish(pair, qp.send_cq)[0].status == WcStatus.GENERAL_ERR


def test_the_memory_scheme_asks_for_whole_pages_around_the_missing_ones():
    pair = Pair(params=HcaParameters(prefetch_before=2, prefetch_after=3))
    pair.right.hca.memory_scheme = True
    qp, _ = pair.rc()
    src, dst = pair.left.region(8), pair.right.region(8, missing=True)
    wr = SendWr(1, WrOpcode.RDMA_WRITE, (sge(src, 0, 5000),), remote_addr=dst.va + 4090, rkey=dst.key)
    pair.run(post_send(qp, pair.thread, wr))
    finish(pair, qp.send_cq)
    (eqe,) = pair.right.events
    assert (eqe.mkey, eqe.va, eqe.demand_fault_pages, eqe.flags) == (dst.key, dst.va, 3 << 12, 1 << 7)
    assert (eqe.pre_demand_fault_pages, eqe.post_demand_fault_pages) == (2, 3)
