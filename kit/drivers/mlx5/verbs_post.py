"""What a program posts and polls: the verbs of the data path, without their prefix.

Every function is a generator, used with ``yield from``.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from kit.drivers.mlx5.adapter.qp import ATOMICS, Qp
from kit.drivers.mlx5.adapter.queues import Cq, RecvWqe, SendWqe, Srq
from kit.drivers.mlx5.adapter.requester import kick
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Wc
from kit.drivers.mlx5.enums import QpState, SendFlags, WcStatus, WrOpcode
from kit.errors import Errno

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["poll_cq", "post_recv", "post_send", "post_srq_recv", "wait_cq"]


def post_send(qp: Qp, thread: Thread, *requests: SendWr) -> Wait:
    """Post sends in order and ring the doorbell; returns 0, or -EINVAL or -ENOMEM at the first that does not fit."""
    yield from thread.sync()
    if qp.state not in (QpState.RTS, QpState.ERR):
        return Errno(errno.EINVAL, "post_send", f"the queue pair is in {qp.state.name}")
    for wr in requests:
        if qp.tail - qp.head >= qp.max_send_wr:
            kick(qp)
            return Errno(errno.ENOMEM, "post_send", f"{qp.max_send_wr} requests are posted")
        if len(wr.sg_list) > qp.max_sge:
            return Errno(errno.EINVAL, "post_send", f"{len(wr.sg_list)} entries, at most {qp.max_sge}")
        if wr.send_flags & SendFlags.INLINE:
            wr = yield from _inline(qp, thread, wr)
            if isinstance(wr, Errno):
                return wr
        length = sum(s.length for s in wr.sg_list) if wr.inline_data is None else len(wr.inline_data)
        if wr.opcode in ATOMICS and length != 8:
            return Errno(errno.EINVAL, "post_send", f"an atomic answers with 8 bytes, not {length}")
        if wr.opcode == WrOpcode.FLUSH:
            length = 0
        qp.sq[qp.tail] = SendWqe(wr, qp.tail, length, thread.now)
        if qp.paging and qp.hca.params.packet_damming:
            qp.dammed.add(qp.tail)
        qp.tail += 1
    if qp.state == QpState.ERR:
        qp.flush()
    else:
        kick(qp)
    return 0


def _inline(qp: Qp, thread: Thread, wr: SendWr) -> Wait:
    """Copy the payload into the work request, as the library does: by the CPU, with no key."""
    data = wr.inline_data
    if data is None:
        from kit.memory.faults.load_store import read_bytes

        data = np.zeros(sum(s.length for s in wr.sg_list), dtype=np.uint8)
        at = 0
        for sge in wr.sg_list:
            data[at : at + sge.length] = yield from read_bytes(cast("Mm", qp.mm), thread, sge.addr, sge.length)
            at += sge.length
    if len(data) > qp.max_inline_data:
        return Errno(errno.EINVAL, "post_send", f"{len(data)} bytes inline, at most {qp.max_inline_data}")
    yield from thread.sync()
    return replace(wr, inline_data=data, sg_list=())


def post_recv(qp: Qp, thread: Thread, *requests: RecvWr) -> Wait:
    """Post receives; returns 0, or -EINVAL or -ENOMEM at the first that does not fit."""
    yield from thread.sync()
    if qp.srq is not None or qp.state == QpState.RESET:
        return Errno(errno.EINVAL, "post_recv", "the queue pair receives through a shared queue, or is in RESET")
    for wr in requests:
        if len(qp.rq) >= qp.max_recv_wr:
            return Errno(errno.ENOMEM, "post_recv", f"{qp.max_recv_wr} receives are posted")
        if len(wr.sg_list) > qp.max_sge:
            return Errno(errno.EINVAL, "post_recv", f"{len(wr.sg_list)} entries, at most {qp.max_sge}")
        recv = RecvWqe(wr, qp.recv_tail)
        qp.recv_tail += 1
        if qp.state == QpState.ERR:
            qp.received(recv, WcStatus.WR_FLUSH_ERR)
        else:
            qp.rq.append(recv)
    return 0


def post_srq_recv(srq: Srq, thread: Thread, *requests: RecvWr) -> Wait:
    """Post receives to a shared queue; returns 0 or -ENOMEM."""
    yield from thread.sync()
    for wr in requests:
        if len(srq.queue) + len(srq.taken) >= srq.max_wr:
            return Errno(errno.ENOMEM, "post_srq_recv", f"{srq.max_wr} receives are posted")
        srq.queue.append(RecvWqe(wr, srq.next_index))
        srq.next_index += 1
    return 0


def poll_cq(cq: Cq, thread: Thread, count: int = 16) -> Wait:
    """Return up to `count` completions that are there now (list of `Wc`)."""
    yield from thread.sync()
    found: list[Wc] = []
    while cq.entries and len(found) < count:
        found.append(cq.entries.popleft())
    return found


def wait_cq(cq: Cq, thread: Thread, count: int = 1, cqe: float = 0.0) -> Wait:
    """Poll until `count` completions have come; returns them.

    Parameters
    ----------
    cqe : float
        Microseconds from a completion's being written until the program sees it.
    """
    found: list[Wc] = yield from poll_cq(cq, thread, count)
    while len(found) < count:
        event = thread.engine.env.event()
        cq.waiting.append(event)
        yield from thread.wait(event)
        more: list[Wc] = yield from poll_cq(cq, thread, count - len(found))
        found += more
    thread.charge(cqe)
    return found
