"""The responder of a queue pair: executes what arrives, in order, on its own memory.

A page fault here is answered with RNR NAKs until the driver has resumed it and the requester sends again.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from kit.drivers.mlx5.adapter.dataflow import EMPTY, access, write_list
from kit.drivers.mlx5.adapter.message import Message
from kit.drivers.mlx5.adapter.mkey import Need
from kit.drivers.mlx5.adapter.mkey_table import Verdict
from kit.drivers.mlx5.adapter.qp import ATOMICS, Qp, Responder
from kit.drivers.mlx5.adapter.queues import RecvWqe, Srq
from kit.drivers.mlx5.adapter.replies import ack, back, done, fault, nak, rdma_fault, reply, rnr
from kit.drivers.mlx5.adapter.retries import sequence_error
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.enums import (
    PageFaultSubtype,
    PageRequest,
    QpType,
    WcStatus,
    WrOpcode,
)  # fmt: skip

__all__ = ["arrive"]

GRH = 40  # bytes in front of a datagram's payload
KEPT_RESULTS = 256


def arrive(qp: Qp, message: Message) -> None:
    """Take a request from the link."""
    if qp.type == QpType.UD:
        _datagram(qp, message)
        return
    known = qp.responder(message.qp.qpn)
    if known.expected is None:
        known.expected = message.index
    if message.index != known.expected:
        _out_of_order(qp, known, message)
    elif known.fault:
        rnr(qp, known, message)
    else:
        known.nak_sent = False
        _execute(qp, known, message)


def _out_of_order(qp: Qp, known: Responder, message: Message) -> None:
    """A repeated request is answered again; after a gap, one NAK asks for the missing one."""
    expected = known.expected or 0
    if message.index > expected:
        if not known.nak_sent and not known.fault:
            known.nak_sent = True
            back(qp, lambda: sequence_error(message.qp, message.epoch, expected))
        return
    opcode = message.wr.opcode
    if opcode == WrOpcode.RDMA_READ and known.fault:
        rnr(qp, known, message)
    elif opcode == WrOpcode.RDMA_READ:
        _read(qp, known, message, repeated=True)
    elif opcode in ATOMICS:
        result = known.results.get(message.index)
        if result is not None:
            reply(qp, message, result)
    else:
        ack(qp, message)


def _execute(qp: Qp, known: Responder, message: Message) -> None:
    opcode = message.wr.opcode
    if opcode in (WrOpcode.SEND, WrOpcode.SEND_WITH_IMM):
        _send(qp, known, message)
    elif opcode == WrOpcode.RDMA_READ:
        _read(qp, known, message, repeated=False)
    elif opcode in ATOMICS:
        _atomic(qp, known, message)
    elif opcode == WrOpcode.FLUSH:
        _flush(qp, known, message)
    else:
        _write(qp, known, message)


def _take(qp: Qp, message: Message) -> RecvWqe | None:
    """Take the next receive, of the queue pair or of its shared queue."""
    srq = _srq(qp, message)
    if srq is None:
        return qp.rq.popleft() if qp.rq else None
    queue: deque[RecvWqe] = srq.queue
    if not queue:
        return None
    recv = queue.popleft()
    srq.taken[recv.index] = recv
    return recv


def _srq(qp: Qp, message: Message) -> Srq | None:
    if qp.type == QpType.XRC_RECV:
        qp.srq = qp.hca.srqs.get(message.wr.ah_qp)  # each message names its queue
    return qp.srq


def _give_back(qp: Qp, recv: RecvWqe) -> None:
    if qp.srq is None:
        qp.rq.appendleft(recv)
    else:
        del qp.srq.taken[recv.index]
        qp.srq.queue.appendleft(recv)


def _pdn(qp: Qp) -> int:
    """Protection domain of the receive's memory: a shared queue has its own."""
    return qp.pdn if qp.srq is None else qp.srq.pdn


def _send(qp: Qp, known: Responder, message: Message) -> None:
    """SEND: into the receive's list."""
    if known.recv is None:
        known.recv = _take(qp, message)
        if known.recv is None:
            rnr(qp, known, message)
            return
    recv = known.recv
    if message.length > sum(s.length for s in recv.wr.sg_list):
        known.recv = None
        qp.received(recv, WcStatus.LOC_LEN_ERR)
        nak(qp, message, WcStatus.REM_INV_REQ_ERR)
        return
    assert message.data is not None
    rest = message.data[known.committed - message.offset :]
    verdict, written, lost = write_list(qp.hca, _pdn(qp), recv.wr.sg_list, known.committed, rest)
    if verdict == Verdict.FAULT:
        known.committed = _whole_packets(qp, known.committed + written, known.committed)
        number, kind = (qp.qpn, PageRequest.RESP) if qp.srq is None else (qp.srq.srqn, PageRequest.RMP)
        eqe = PageFaultEqe(
            PageFaultSubtype.WQE, bytes_committed=known.committed, wqe_index=recv.index & 0xFFFF,
            packet_length=min(qp.hca.params.mtu, message.length - known.committed), pftype_wq=kind << 24 | number,
        )  # fmt: skip
        fault(qp, known, message, lost, eqe, qp.hca.params.send_fault_error)
        return
    known.recv = None
    if verdict == Verdict.ERROR:
        qp.received(recv, WcStatus.LOC_PROT_ERR)
        nak(qp, message, WcStatus.REM_OP_ERR)
        return
    imm = message.wr.imm_data if message.wr.opcode == WrOpcode.SEND_WITH_IMM else -1
    qp.received(recv, WcStatus.SUCCESS, message.length, imm, message.qp.qpn)
    done(qp, known, message)


def _whole_packets(qp: Qp, reached: int, before: int) -> int:
    return max(reached - reached % qp.hca.params.mtu, before)


def _write(qp: Qp, known: Responder, message: Message) -> None:
    """RDMA WRITE, with or without immediate data, and ATOMIC WRITE."""
    wr = message.wr
    if wr.opcode == WrOpcode.ATOMIC_WRITE and (wr.remote_addr % 8 or message.length != 8):
        nak(qp, message, WcStatus.REM_INV_REQ_ERR)
        return
    if message.length > known.committed:
        assert message.data is not None
        rest = message.data[known.committed - message.offset :]
        at = wr.remote_addr + known.committed
        found, _ = access(qp.hca, qp.pdn, wr.rkey, at, len(rest), Need.REMOTE_WRITE, rest)
        if found.verdict == Verdict.ERROR:
            nak(qp, message, WcStatus.REM_ACCESS_ERR)
            return
        if found.verdict == Verdict.FAULT:
            known.committed = _whole_packets(qp, known.committed + found.good, known.committed)
            rdma_fault(qp, known, message, found, True, message.length, known.committed)
            return
        known.committed = message.length
    if wr.opcode == WrOpcode.RDMA_WRITE_WITH_IMM:
        recv = _take(qp, message)
        if recv is None:
            rnr(qp, known, message)
            return
        qp.received(recv, WcStatus.SUCCESS, message.length, wr.imm_data, message.qp.qpn, with_rdma=True)
    done(qp, known, message)


def _read(qp: Qp, known: Responder, message: Message, repeated: bool) -> None:
    """RDMA READ: all of what is still wanted is answered at once."""
    wr = message.wr
    data = EMPTY
    if message.length > message.offset:
        at = wr.remote_addr + message.offset
        found, data = access(qp.hca, qp.pdn, wr.rkey, at, message.length - message.offset, Need.REMOTE_READ)
        if found.verdict == Verdict.ERROR:
            nak(qp, message, WcStatus.REM_ACCESS_ERR)
            return
        if found.verdict == Verdict.FAULT:
            committed = _whole_packets(qp, message.offset + found.good, message.offset)
            rdma_fault(qp, known, message, found, False, message.length, committed)
            return
    if repeated:
        reply(qp, message, data)
    else:
        done(qp, known, message, data)


def _atomic(qp: Qp, known: Responder, message: Message) -> None:
    """Compare-and-swap, fetch-and-add: 8 aligned bytes, once."""
    wr = message.wr
    if wr.remote_addr % 8:
        nak(qp, message, WcStatus.REM_INV_REQ_ERR)
        return
    found, _ = access(qp.hca, qp.pdn, wr.rkey, wr.remote_addr, 8, Need.REMOTE_ATOMIC, EMPTY)
    if found.verdict == Verdict.ERROR:
        nak(qp, message, WcStatus.REM_ACCESS_ERR)
        return
    if found.verdict == Verdict.FAULT:
        rdma_fault(qp, known, message, found, True, 8)
        return
    pfn = int(qp.hca.dma.resolve(found.addresses)[0][0])
    word = qp.hca.memory.payload[pfn : pfn + 1].view(np.uint64).reshape(-1)[found.offset // 8 :][:1]
    before = int(word[0]) if len(word) else 0
    if wr.opcode == WrOpcode.ATOMIC_FETCH_AND_ADD:
        after = (before + wr.compare_add) & 0xFFFF_FFFF_FFFF_FFFF
    else:
        after = wr.swap if before == wr.compare_add else before
    word[:] = np.uint64(after)
    result = np.array([before], dtype=np.uint64).view(np.uint8)
    known.results[message.index] = result
    if len(known.results) > KEPT_RESULTS:
        del known.results[next(iter(known.results))]
    done(qp, known, message, result)


def _flush(qp: Qp, known: Responder, message: Message) -> None:
    """FLUSH: whatever was written is in memory at once here, so only the range has to be valid and present."""
    wr = message.wr
    if wr.length:
        found = qp.hca.mkeys.translate(wr.rkey, wr.remote_addr, wr.length, Need.REMOTE_WRITE, qp.pdn)
        if found.verdict == Verdict.FAULT:
            rdma_fault(qp, known, message, found, True, wr.length)
            return
        if found.verdict == Verdict.ERROR:
            nak(qp, message, WcStatus.REM_ACCESS_ERR)
            return
    else:
        mkey = qp.hca.mkeys.get(wr.rkey)
        if mkey is None or mkey.refuses(wr.rkey, mkey.mkc.start_addr, 0, Need.REMOTE_WRITE, qp.pdn):
            nak(qp, message, WcStatus.REM_ACCESS_ERR)
            return
    done(qp, known, message)


def _datagram(qp: Qp, message: Message) -> None:
    """UD: there or dropped; the first 40 bytes of the buffer are for the routing header."""
    recv = _take(qp, message)
    if recv is None:
        qp.hca.counters.dropped += 1
        return
    assert message.data is not None
    total = message.length + GRH
    if total > sum(s.length for s in recv.wr.sg_list):
        qp.received(recv, WcStatus.LOC_LEN_ERR)
        return
    verdict, _, _ = write_list(qp.hca, _pdn(qp), recv.wr.sg_list, GRH, message.data)
    if verdict == Verdict.FAULT:  # no transport that could ask for it again: the datagram is gone
        qp.hca.counters.dropped += 1
        _give_back(qp, recv)
    elif verdict == Verdict.ERROR:
        qp.received(recv, WcStatus.LOC_PROT_ERR)
        qp.to_error()
    else:
        imm = message.wr.imm_data if message.wr.opcode == WrOpcode.SEND_WITH_IMM else -1
        qp.received(recv, WcStatus.SUCCESS, total, imm, message.qp.qpn)
