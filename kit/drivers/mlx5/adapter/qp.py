"""Queue pairs: the state that the adapter keeps of them, and work requests as they lie in the user's queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.queues import Cq, RecvWqe, SendWqe, Srq
from kit.drivers.mlx5.descriptors import Seg, Wc, WqeImage
from kit.drivers.mlx5.enums import PAGE, QpState, QpType, SendFlags, WcOpcode, WcStatus, WrOpcode

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.memory.space.mm import Mm

__all__ = ["ATOMICS", "READS", "RNR_TIMER", "Qp", "Responder", "srq_image"]

# Minimum RNR NAK timer, microseconds, by its 5-bit code (drivers/infiniband/sw/rdmavt/qp.c @ 7.0).
RNR_TIMER = (
    655360, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1280, 1920, 2560, 3840, 5120, 7680, 10240,
    15360, 20480, 30720, 40960, 61440, 81920, 122880, 163840, 245760, 327680, 491520,
)  # fmt: skip
ATOMICS = frozenset((WrOpcode.ATOMIC_CMP_AND_SWP, WrOpcode.ATOMIC_FETCH_AND_ADD))
READS = ATOMICS | {WrOpcode.RDMA_READ}  # operations whose answer carries data
_WC = {
    WrOpcode.RDMA_WRITE: WcOpcode.RDMA_WRITE,
    WrOpcode.RDMA_WRITE_WITH_IMM: WcOpcode.RDMA_WRITE,
    WrOpcode.SEND: WcOpcode.SEND,
    WrOpcode.SEND_WITH_IMM: WcOpcode.SEND,
    WrOpcode.RDMA_READ: WcOpcode.RDMA_READ,
    WrOpcode.ATOMIC_CMP_AND_SWP: WcOpcode.COMP_SWAP,
    WrOpcode.ATOMIC_FETCH_AND_ADD: WcOpcode.FETCH_ADD,
    WrOpcode.FLUSH: WcOpcode.FLUSH,
    WrOpcode.ATOMIC_WRITE: WcOpcode.ATOMIC_WRITE,
}
_WITH_ADDRESS = READS | {WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM, WrOpcode.FLUSH, WrOpcode.ATOMIC_WRITE}


@dataclass(eq=False, slots=True)
class Responder:
    """What a responder knows of one requester.

    Attributes
    ----------
    expected : int or None
        Sequence number of the next message.
    committed : int
        Bytes of that message which have reached memory.
    recv : RecvWqe or None
        The receive that it has taken.
    fault : bool
        A page fault of it is being handled: whatever arrives gets an RNR NAK.
    results : dict of int to ndarray
        Answers to atomics, for repeated requests.
    """

    expected: int | None = None
    committed: int = 0
    recv: RecvWqe | None = None
    fault: bool = False
    nak_sent: bool = False
    results: dict[int, NDArray[np.uint8]] = field(default_factory=dict)


class Qp:
    """A queue pair.

    Attributes
    ----------
    dest : int
        Number of the connected queue pair.
    timeout, retry_cnt, rnr_retry, min_rnr_timer : int
        Codes as in ibv_qp_attr; rnr_retry 7 is without limit.
    epoch : int
        Grows with every reset: what is on its way to an older one is void.
    """

    kind = "qp"

    def __init__(
        self, hca: Hca, qpn: int, qp_type: int, pdn: int, send_cq: Cq, recv_cq: Cq, srq: Srq | None = None,
        max_send_wr: int = 128, max_recv_wr: int = 128, max_sge: int = 16, max_inline_data: int = 0,
        sq_sig_all: bool = False,
    ) -> None:  # fmt: skip
        self.hca, self.qpn, self.type, self.pdn = hca, qpn, QpType(qp_type), pdn
        self.send_cq, self.recv_cq, self.srq = send_cq, recv_cq, srq
        self.max_send_wr, self.max_recv_wr, self.max_sge = max_send_wr, max_recv_wr, max_sge
        self.max_inline_data, self.sq_sig_all = max_inline_data, sq_sig_all
        self.mm: Mm | None = None  # of the process that posts; only the library's inline copies need it
        self.state = QpState.RESET
        self.dest = -1
        self.timeout, self.retry_cnt, self.rnr_retry, self.min_rnr_timer = 14, 7, 7, 12
        self.epoch = 0
        self.rnr_naks = self.retries = 0  # sent back to us, and time-outs of ours
        self.clear()

    def clear(self) -> None:
        """Forget all work (state RESET)."""
        self.epoch += 1
        self.sq: dict[int, SendWqe] = {}
        self.rq: deque[RecvWqe] = deque()
        self.head = self.next = self.tail = 0
        self.recv_tail = 0
        self.acked = -1  # last message that the responder has acknowledged
        self.faults: set[int] = set()  # messages that wait for a local page
        self.rnr_wait = self.timer = False
        self.rnr_paging = False  # the wait is for a page of the responder
        self.dammed: set[int] = set()  # messages that are taken for sent until the loss is noticed
        self.progressed = 0.0  # when a message last completed
        self.lost = -1  # last message that nobody will answer
        self.kick_due = -1.0
        self.retry_left, self.rnr_left = self.retry_cnt, self.rnr_retry
        self.responders: dict[int, Responder] = {}

    @property
    def paging(self) -> bool:
        """Whether a message of it waits for a page, here or at the responder."""
        return bool(self.faults) or self.rnr_paging

    def responder(self, source: int) -> Responder:
        """Return what is known of requester `source`: one for a connection, many for DC."""
        found = self.responders.get(source)
        if found is None:
            first = None if self.type == QpType.DC else 0
            found = self.responders[source] = Responder(first)
        return found

    def complete(self, wqe: SendWqe, status: WcStatus) -> None:
        """Take a finished send off the queue, with a completion if one is due."""
        now = self.progressed = self.hca.engine.now
        del self.sq[wqe.index]
        self.head = wqe.index + 1
        self.next = max(self.next, self.head)
        if status or self.sq_sig_all or wqe.wr.send_flags & SendFlags.SIGNALED:
            opcode = _WC[WrOpcode(wqe.wr.opcode)]
            self.send_cq.push(Wc(wqe.wr.wr_id, status, opcode, self.qpn, wqe.length if not status else 0))
        self.hca.engine.trace.span(
            "rdma_message", self.hca.name, wqe.posted, now, va=wqe.wr.remote_addr or -1, bytes=wqe.length,
            cause=WrOpcode(wqe.wr.opcode).name, status=status.name if status else "ok",
        )  # fmt: skip

    def received(
        self, recv: RecvWqe, status: WcStatus, length: int = 0, imm: int = -1, source: int = 0, with_rdma: bool = False
    ) -> None:
        """Write the completion of a receive."""
        if self.srq is not None:
            self.srq.taken.pop(recv.index, None)
        cq = self.srq.cq if self.srq is not None and self.srq.cq is not None else self.recv_cq
        opcode = WcOpcode.RECV_RDMA_WITH_IMM if with_rdma else WcOpcode.RECV
        cq.push(Wc(recv.wr.wr_id, status, opcode, self.qpn, length, imm, source))

    def to_error(self) -> None:
        """Enter ERR: everything posted completes as flushed."""
        if self.state == QpState.ERR:
            return
        self.state = QpState.ERR
        self.flush()

    def flush(self) -> None:
        """Complete what is posted with WR_FLUSH_ERR."""
        for wqe in list(self.sq.values()):
            self.complete(wqe, WcStatus.WR_FLUSH_ERR)
        for responder in self.responders.values():
            if responder.recv is not None:
                recv, responder.recv = responder.recv, None
                self.received(recv, WcStatus.WR_FLUSH_ERR)
        while self.rq:
            self.received(self.rq.popleft(), WcStatus.WR_FLUSH_ERR)

    def image(self, wqe_index: int, requestor: bool) -> WqeImage | None:
        """Return a work request as it lies in the user's queue, or None when it is not there any more."""
        if not requestor:
            for responder in self.responders.values():
                recv = responder.recv
                if recv is not None and recv.index & 0xFFFF == wqe_index:
                    return _receive_image(self, recv, self.max_sge, False)
            return None
        wqe = self.sq.get(self.head + ((wqe_index - self.head) & 0xFFFF))
        if wqe is None:
            return None
        segments = [Seg("ctrl", 1)]
        if self.type == QpType.XRC_SEND:
            segments.append(Seg("xrc", 1))
        if self.type in (QpType.UD, QpType.DC):
            segments.append(Seg("av", 3))
        if wqe.wr.opcode in _WITH_ADDRESS:
            segments.append(Seg("raddr", 1))
        if wqe.wr.opcode in ATOMICS:
            segments.append(Seg("atomic", 1))
        if wqe.wr.inline_data is not None:
            size = len(wqe.wr.inline_data)
            segments.append(Seg("inline", -(-(4 + size) // 16), size))
        else:
            segments += [Seg("data", 1, s.length, s.lkey, s.addr) for s in wqe.wr.sg_list]
        octowords = sum(s.octowords for s in segments)
        return WqeImage(wqe.wr.opcode, self.type, octowords, min(16 * octowords, PAGE), segments)


def srq_image(srq: Srq, wqe_index: int) -> WqeImage | None:
    """Return a receive of a shared queue that a message has taken."""
    for recv in srq.taken.values():
        if recv.index & 0xFFFF == wqe_index:
            return _receive_image(None, recv, srq.max_sge, True)
    return None


def _receive_image(qp: Qp | None, recv: RecvWqe, max_sge: int, shared: bool) -> WqeImage:
    segments = [Seg("srq_next", 1)] if shared else []
    segments += [Seg("data", 1, s.length, s.lkey, s.addr) for s in recv.wr.sg_list]
    if len(recv.wr.sg_list) < max_sge:
        lkey = qp.hca.caps.terminate_scatter_list_mkey if qp is not None else 0x100
        segments.append(Seg("data", 1, 0, lkey, 0))
    octowords = len(segments)
    return WqeImage(None, qp.type if qp is not None else QpType.RC, octowords, min(16 * octowords, PAGE), segments)
