"""What a responder sends back, and how it reports a page that it lacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.message import Message, transmit
from kit.drivers.mlx5.adapter.mkey_table import Translation
from kit.drivers.mlx5.adapter.qp import Qp, Responder
from kit.drivers.mlx5.adapter.requester import acknowledge, answer, negative
from kit.drivers.mlx5.adapter.retries import not_ready
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.enums import PageFaultSubtype, PageFaultType, QpState, QpType, WcStatus

__all__ = ["ack", "back", "done", "fault", "nak", "rdma_fault", "reply", "rnr"]


def back(qp: Qp, act: Callable[[], None]) -> None:
    """Let something without payload reach the requester."""
    qp.hca.after(qp.hca.costs.wire_latency, act)


def ack(qp: Qp, message: Message) -> None:
    """Acknowledge everything up to a message."""
    back(qp, lambda: acknowledge(message.qp, message.epoch, message.index))


def reply(qp: Qp, message: Message, data: NDArray[np.uint8]) -> None:
    """Send the answer of a read or an atomic."""
    _, arrived = transmit(qp.hca, len(data), "response")
    qp.hca.after(arrived, lambda: answer(message.qp, message.epoch, message.index, message.offset, data))


def done(qp: Qp, known: Responder, message: Message, data: NDArray[np.uint8] | None = None) -> None:
    """A message has been executed: expect the next one."""
    known.expected = message.index + 1
    known.committed = 0
    if data is None:
        ack(qp, message)
    else:
        reply(qp, message, data)


def rnr(qp: Qp, known: Responder, message: Message) -> None:
    """Receiver not ready: a receive or a page is missing."""
    qp.hca.counters.rnr_naks += 1
    code, committed, paging = qp.min_rnr_timer, known.committed, known.fault
    back(qp, lambda: not_ready(message.qp, message.epoch, message.index, code, committed, paging))


def nak(qp: Qp, message: Message, status: WcStatus) -> None:
    """Refuse a request: it fails at the requester, and the connection is over here too."""
    back(qp, lambda: negative(message.qp, message.epoch, message.index, status))
    if qp.type == QpType.DC:
        qp.responders.pop(message.qp.qpn, None)  # a DC target serves others
    else:
        qp.to_error()


def fault(qp: Qp, known: Responder, message: Message, lost: Translation, eqe: PageFaultEqe, failed: WcStatus) -> None:
    """Report a missing page; the requester hears RNR until it is resumed."""
    epoch = qp.epoch

    def resume(error: bool) -> None:
        if qp.epoch != epoch or qp.state not in (QpState.RTR, QpState.RTS):
            return
        known.fault = False
        if error:
            if known.recv is not None:
                recv, known.recv = known.recv, None
                qp.received(recv, qp.hca.params.recv_fault_error)
            nak(qp, message, failed)

    known.fault = True
    if qp.hca.raise_fault("responder", lost.va, eqe, lost, resume):
        rnr(qp, known, message)
    else:
        known.fault = False
        nak(qp, message, failed)


def rdma_fault(
    qp: Qp, known: Responder, message: Message, lost: Translation, write: bool, length: int, committed: int = 0
) -> None:  # fmt: skip
    """Report a page that a one-sided operation lacks, with `length` bytes in all of which `committed` are done."""
    params, wr = qp.hca.params, message.wr
    kind = PageFaultType.RDMA | (PageFaultType.WRITE if write else 0)
    eqe = PageFaultEqe(
        PageFaultSubtype.RDMA, bytes_committed=committed, r_key=wr.rkey, rdma_va=wr.remote_addr,
        packet_length=min(params.mtu, length - committed), pftype_token=int(kind) << 24,
        rdma_op_len=length if params.rdma_op_len_known else 0,
    )  # fmt: skip
    fault(qp, known, message, lost, eqe, params.rdma_fault_error)
