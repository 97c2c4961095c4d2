"""When a requester sends again: told to wait, told of a gap, not told anything, and when it need not have.

The transport timer runs only for messages that nobody will answer: any other is acknowledged or refused in time.
"""

from __future__ import annotations

from kit.drivers.mlx5.adapter.message import Message, transmit
from kit.drivers.mlx5.adapter.qp import READS, RNR_TIMER, Qp
from kit.drivers.mlx5.adapter.queues import SendWqe
from kit.drivers.mlx5.adapter.requester import advance, kick, negative, rewind
from kit.drivers.mlx5.enums import QpState, QpType, WcStatus

__all__ = ["flood", "not_ready", "sequence_error", "timeout_of", "unacknowledged", "unanswered"]

TIMEOUT_UNIT = 4.096  # microseconds; the transport timeout is this times 2 ** code


def not_ready(qp: Qp, epoch: int, index: int, code: int, committed: int, paging: bool = False) -> None:
    """An RNR NAK: wait as long as its timer says, then send again from message `index`; `paging`: for a page."""
    if qp.epoch != epoch or qp.state != QpState.RTS or index < qp.head or qp.rnr_wait:
        return
    hca = qp.hca
    qp.rnr_naks += 1
    if qp.rnr_left == 0:
        negative(qp, epoch, index, WcStatus.RNR_RETRY_EXC_ERR)
        return
    if qp.rnr_left != 7:
        qp.rnr_left -= 1
    if index > qp.head:
        qp.acked = max(qp.acked, index - 1)
    wqe = qp.sq[index]
    if wqe.wr.opcode not in READS:
        wqe.acked = max(wqe.acked, committed)
    wqe.data = None
    qp.rnr_wait, qp.rnr_paging = True, paging
    rewind(qp, index)
    wait = RNR_TIMER[code & 31] * hca.params.rnr_scale
    now = hca.engine.now
    hca.engine.trace.span("rnr_wait", hca.name, now, now + wait, va=wqe.wr.remote_addr or -1, value=code)
    advance(qp)

    def over() -> None:
        if qp.epoch == epoch:
            qp.rnr_wait = qp.rnr_paging = False
            kick(qp)

    hca.after(wait, over)


def sequence_error(qp: Qp, epoch: int, index: int) -> None:
    """A NAK for a gap: send again from message `index`."""
    if qp.epoch == epoch and qp.state == QpState.RTS:
        qp.dammed.clear()
        rewind(qp, index)
        kick(qp)


def unanswered(message: Message) -> None:
    """Nobody answers a message: sooner or later the transport timer runs out."""
    qp = message.qp
    if qp.epoch == message.epoch and qp.type != QpType.UD:
        unacknowledged(qp, message.index)


def unacknowledged(qp: Qp, index: int) -> None:
    """No acknowledgement of a message will ever come: the timer, if there is one, has to notice."""
    if qp.timeout:  # code 0: no limit
        qp.lost = max(qp.lost, index)
        if not qp.timer:
            _arm(qp, timeout_of(qp))


def timeout_of(qp: Qp) -> float:
    """Local ACK timeout of a queue pair, microseconds: 4.096 us times two to its code, or the adapter's smallest."""
    return max(TIMEOUT_UNIT * (1 << qp.timeout), qp.hca.params.timeout_floor)


def _arm(qp: Qp, delay: float) -> None:
    """Start the transport timer: without progress for so long everything is sent again, `retry_cnt` times."""
    epoch = qp.epoch
    qp.timer = True

    def expired() -> None:
        if qp.epoch != epoch or qp.state != QpState.RTS:
            return
        qp.timer = False
        if qp.head > qp.lost:
            return
        rest = qp.progressed + timeout_of(qp) - qp.hca.engine.now
        if rest > 0 or qp.rnr_wait or qp.faults:
            _arm(qp, rest if rest > 0 else timeout_of(qp))
            return
        if qp.retry_left == 0:
            negative(qp, epoch, qp.head, WcStatus.RETRY_EXC_ERR)
            return
        qp.retry_left -= 1
        qp.retries += 1
        qp.lost = -1
        qp.dammed.clear()
        rewind(qp, qp.head)
        kick(qp)

    qp.hca.after(delay, expired)


def flood(qp: Qp, wqe: SendWqe, served: list[bool]) -> None:
    """Ask for a READ's data again and again until its page fault is `served` (packet flood)."""
    hca, epoch = qp.hca, qp.epoch

    def again() -> None:
        if qp.epoch != epoch or qp.state != QpState.RTS or served:
            return
        now, network = hca.engine.now, hca.network
        hca.counters.flooded += 1
        hca.engine.trace.span("retransmit", hca.name, now, now, va=wqe.wr.remote_addr or -1, cause="flood")
        _, arrived = transmit(hca, 0, "flood")
        dest = wqe.wr.ah_qp if qp.type == QpType.DC else qp.dest
        message = Message(qp, epoch, dest, wqe.index, wqe.wr, wqe.acked, wqe.length, None)
        hca.after(arrived, lambda: network.deliver(message))
        hca.after(hca.costs.resend_interval, again)

    if hca.costs.resend_interval:
        hca.after(hca.costs.resend_interval, again)
