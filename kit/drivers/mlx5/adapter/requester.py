"""The requester of a queue pair: reads local memory, sends, retries, completes.

Messages leave in order and are acknowledged in order. When the responder is not ready (RNR NAK), when one is lost, or
when an answer found no page to be written to, sending starts again at that message.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.dataflow import read_list, write_list
from kit.drivers.mlx5.adapter.message import Message, transmit
from kit.drivers.mlx5.adapter.mkey_table import Translation, Verdict
from kit.drivers.mlx5.adapter.qp import READS, Qp
from kit.drivers.mlx5.adapter.queues import SendWqe
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.enums import (
    PageFaultSubtype,
    PageRequest,
    QpState,
    QpType,
    WcStatus,
    WrOpcode,
)  # fmt: skip

__all__ = ["acknowledge", "advance", "answer", "kick", "negative", "rewind"]


def kick(qp: Qp) -> None:
    """Send what is posted, as far as the state of the queue pair allows."""
    while qp.state == QpState.RTS and not qp.faults and not qp.rnr_wait and qp.next < qp.tail:
        wqe = qp.sq[qp.next]
        settled = wqe.index <= qp.acked and (wqe.answered or wqe.wr.opcode not in READS)
        if settled:
            qp.next += 1
            continue
        if wqe.index in qp.dammed:
            _lose(qp, wqe)
            continue
        if qp.type == QpType.UD and wqe.length > qp.hca.params.mtu:
            negative(qp, qp.epoch, wqe.index, WcStatus.LOC_LEN_ERR)
            return
        window = 1 if qp.type == QpType.DC else qp.hca.params.window
        if qp.next - qp.head >= window or not _send(qp, wqe):
            return
        if qp.next < qp.tail:
            _kick_later(qp)
            return


def _lose(qp: Qp, wqe: SendWqe) -> None:
    """Take a message for sent that has never left, as often as those before it are sent again (packet damming)."""
    from kit.drivers.mlx5.adapter.retries import unacknowledged

    hca, now = qp.hca, qp.hca.engine.now
    qp.next = wqe.index + 1
    if not wqe.sent:
        hca.counters.dammed += 1
        hca.engine.trace.span("packet_lost", hca.name, now, now, va=wqe.wr.remote_addr or -1, bytes=wqe.length)
    wqe.sent += 1
    unacknowledged(qp, wqe.index)


def _kick_later(qp: Qp) -> None:
    """Come back when the link can take the next message."""
    hca, epoch = qp.hca, qp.epoch
    due = max(hca.engine.now, hca.tx_free - hca.costs.wqe_fetch)
    if qp.kick_due >= hca.engine.now:
        return
    qp.kick_due = due

    def again() -> None:
        if qp.epoch == epoch:
            qp.kick_due = -1.0
            kick(qp)

    hca.after(due - hca.engine.now, again)


def _send(qp: Qp, wqe: SendWqe) -> bool:
    """Send one message; return False when it has to wait for a page or failed."""
    hca, wr = qp.hca, wqe.wr
    outgoing = wr.opcode not in READS and wr.opcode != WrOpcode.FLUSH
    data: NDArray[np.uint8] | None = None
    if outgoing:
        if not _read_local(qp, wqe):
            return False
        data, wqe.data = wqe.data, None
    qp.next = wqe.index + 1
    wqe.sent += 1
    if wqe.sent > 1:
        hca.engine.trace.span("retransmit", hca.name, hca.engine.now, hca.engine.now, va=wr.remote_addr or -1)
    size = len(data) if data is not None else 0
    left, arrived = transmit(hca, size, WrOpcode(wr.opcode).name)
    dest = wr.ah_qp if qp.type in (QpType.UD, QpType.DC) else qp.dest
    message = Message(qp, qp.epoch, dest, wqe.index, wr, wqe.acked, wqe.length, data)
    if qp.type == QpType.UD:
        hca.after(left, lambda: _left(qp, message))
    network = hca.network
    hca.after(arrived, lambda: network.deliver(message))
    return True


def _left(qp: Qp, message: Message) -> None:
    """A datagram is done when it has left."""
    if qp.epoch == message.epoch and qp.state == QpState.RTS:
        qp.acked = max(qp.acked, message.index)
        advance(qp)


def _read_local(qp: Qp, wqe: SendWqe) -> bool:
    """Read the rest of the message from memory into ``wqe.data``; False when a page is missing or on an error."""
    if wqe.data is None:
        wqe.read = wqe.acked
    if wqe.wr.inline_data is not None:
        wqe.data, wqe.read = wqe.wr.inline_data[wqe.acked :], wqe.length
        return True
    result, data, lost = read_list(qp.hca, qp.pdn, wqe.wr.sg_list, wqe.read)
    if wqe.data is not None and len(wqe.data):
        data = np.concatenate([wqe.data, data])
    if result == Verdict.OK:
        wqe.data, wqe.read = data, wqe.length
        return True
    if result == Verdict.FAULT:
        reached = wqe.acked + len(data)
        wqe.read = max(reached - reached % qp.hca.params.mtu, wqe.acked)
        wqe.data = data[: wqe.read - wqe.acked]
        return _fault(qp, wqe, PageRequest.REQ_SEND_OR_WRITE, wqe.read, lost)
    negative(qp, qp.epoch, wqe.index, WcStatus.LOC_PROT_ERR)
    return False


def _fault(qp: Qp, wqe: SendWqe, kind: PageRequest, committed: int, lost: Translation) -> bool:
    """Report a missing local page and stop sending until it is resumed; returns False."""
    hca, epoch, start = qp.hca, qp.epoch, qp.hca.engine.now
    eqe = PageFaultEqe(
        PageFaultSubtype.WQE, bytes_committed=committed, wqe_index=wqe.index & 0xFFFF,
        packet_length=min(hca.params.mtu, wqe.length - committed), pftype_wq=kind << 24 | qp.qpn,
    )  # fmt: skip

    served: list[bool] = []

    def resume(error: bool) -> None:
        served.append(not error)
        if qp.epoch != epoch or qp.state != QpState.RTS:
            return
        if error:
            negative(qp, epoch, wqe.index, hca.params.requester_fault_error)
            return
        interval = hca.costs.resend_interval
        delay = -(hca.engine.now - start) % interval if interval else 0.0
        if delay:
            hca.after(delay, again)
        else:
            again()

    def again() -> None:
        if qp.epoch == epoch:
            qp.faults.discard(wqe.index)
            kick(qp)

    qp.faults.add(wqe.index)
    rewind(qp, wqe.index)
    if hca.params.packet_flood and kind == PageRequest.REQ_READ_OR_ATOMIC:
        from kit.drivers.mlx5.adapter.retries import flood

        flood(qp, wqe, served)
    if not hca.raise_fault("requester", lost.va, eqe, lost, resume):
        negative(qp, epoch, wqe.index, WcStatus.LOC_PROT_ERR)
    return False


def rewind(qp: Qp, index: int) -> None:
    """Send again from message `index`, once nothing keeps the queue pair from sending."""
    qp.next = max(min(qp.next, index), qp.head)


def acknowledge(qp: Qp, epoch: int, index: int) -> None:
    """The responder has executed every message up to `index`."""
    if qp.epoch != epoch or qp.state != QpState.RTS or index < qp.head:
        return
    qp.acked = max(qp.acked, index)
    qp.retry_left, qp.rnr_left = qp.retry_cnt, qp.rnr_retry
    advance(qp)


def answer(qp: Qp, epoch: int, index: int, offset: int, data: NDArray[np.uint8]) -> None:
    """The answer to a read or an atomic: write it to local memory."""
    wqe = qp.sq.get(index)
    if qp.epoch != epoch or qp.state != QpState.RTS or wqe is None or wqe.answered:
        return
    if offset != wqe.acked or any(at <= index for at in qp.faults):
        return  # to an earlier request; or a page is missing for one before it, and all will be asked for again
    result, written, lost = write_list(qp.hca, qp.pdn, wqe.wr.sg_list, wqe.acked, data)
    if result == Verdict.OK:
        wqe.answered = True
        acknowledge(qp, epoch, index)
    elif result == Verdict.FAULT:
        reached = wqe.acked + written
        wqe.acked = max(reached - reached % qp.hca.params.mtu, wqe.acked)
        _fault(qp, wqe, PageRequest.REQ_READ_OR_ATOMIC, wqe.acked, lost)
    else:
        negative(qp, epoch, index, WcStatus.LOC_PROT_ERR)


def advance(qp: Qp) -> None:
    """Complete, in order, what is acknowledged and answered."""
    while qp.head < qp.tail and qp.head <= qp.acked:
        wqe = qp.sq[qp.head]
        if wqe.wr.opcode in READS and not wqe.answered:
            break
        qp.complete(wqe, WcStatus.SUCCESS)
    kick(qp)


def negative(qp: Qp, epoch: int, index: int, status: WcStatus) -> None:
    """Message `index` failed: complete it with `status`, everything after it as flushed."""
    if qp.epoch != epoch or qp.state != QpState.RTS or index < qp.head:
        return
    qp.acked = max(qp.acked, index - 1)
    for earlier in range(qp.head, index):
        unread = qp.sq[earlier].wr.opcode in READS and not qp.sq[earlier].answered
        qp.complete(qp.sq[earlier], WcStatus.WR_FLUSH_ERR if unread else WcStatus.SUCCESS)
    qp.complete(qp.sq[index], status)
    qp.to_error()
