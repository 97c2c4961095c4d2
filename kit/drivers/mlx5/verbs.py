"""What a program calls: the verbs of libibverbs, without their prefix.

Every function that takes a `Thread` is a generator, used with ``yield from``. Registration returns what the driver
returns: an object, or an `Errno`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from kit.drivers.mlx5.adapter.qp import ATOMICS, Cq, Qp, RecvWqe, SendWqe, Srq
from kit.drivers.mlx5.adapter.requester import kick
from kit.drivers.mlx5.descriptors import OdpCaps, RecvWr, SendWr, Sge, Wc
from kit.drivers.mlx5.enums import Era, QpState, SendFlags, WcStatus, WrOpcode
from kit.drivers.mlx5.objects import IbPd
from kit.errors import Errno

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = [
    "Context", "DeviceAttrEx", "Dmah", "advise_mr", "alloc_pd", "connect", "create_cq", "create_qp", "create_srq",
    "dereg_mr", "destroy_qp", "modify_qp", "open_device", "poll_cq", "post_recv", "post_send", "post_srq_recv",
    "query_device_ex", "reg_dmabuf_mr", "reg_mr", "reg_mr_ex", "wait_cq",
]  # fmt: skip


@dataclass(eq=False)
class Context:
    """An open device of a process (struct ibv_context)."""

    dev: Mlx5IbDev
    mm: Mm
    pds: int = 0


@dataclass
class DeviceAttrEx:
    """Struct ibv_device_attr_ex, as far as it concerns paging."""

    odp_caps: OdpCaps


@dataclass(frozen=True)
class Dmah:
    """A DMA handle (struct ibv_dmah): hints for where the PCIe root puts what the device writes; no data depends on it.

    Attributes
    ----------
    ph : int
        Processing hint, 0 to 3.
    """

    ph: int = 0


def open_device(dev: Mlx5IbDev, mm: Mm) -> Context:
    """Open a device for the process that owns `mm`."""
    return Context(dev, mm)


def query_device_ex(context: Context, thread: Thread) -> Wait:
    """Return what the device offers."""
    yield from _verb(context.dev, thread)
    return DeviceAttrEx(context.dev.odp_caps)


def alloc_pd(context: Context, thread: Thread) -> Wait:
    """Return a new protection domain."""
    yield from _verb(context.dev, thread)
    return IbPd(context.dev, _number(context.dev), context.mm)


def create_cq(context: Context, thread: Thread, cqe: int) -> Wait:
    """Return a completion queue of `cqe` entries."""
    yield from _verb(context.dev, thread)
    return Cq(_number(context.dev), cqe)


def create_srq(pd: IbPd, thread: Thread, max_wr: int = 128, max_sge: int = 16, xrc_cq: Cq | None = None) -> Wait:
    """Return a shared receive queue; with `xrc_cq` it is an XRC one."""
    yield from _verb(pd.dev, thread)
    srq = Srq(_number(pd.dev), pd.pdn, max_sge, max_wr, xrc_cq)
    pd.dev.hca.srqs[srq.srqn] = srq
    return srq


def create_qp(
    pd: IbPd, thread: Thread, qp_type: int, send_cq: Cq, recv_cq: Cq, srq: Srq | None = None, max_send_wr: int = 128,
    max_recv_wr: int = 128, max_sge: int = 16, max_inline_data: int = 0, sq_sig_all: bool = False,
) -> Wait:  # fmt: skip
    """Return a queue pair in RESET."""
    yield from _verb(pd.dev, thread)
    hca = pd.dev.hca
    qp = Qp(
        hca, _number(pd.dev), qp_type, pd.pdn, send_cq, recv_cq, srq, max_send_wr, max_recv_wr, max_sge,
        max_inline_data, sq_sig_all,
    )  # fmt: skip
    qp.mm = pd.mm
    hca.qps[qp.qpn] = qp
    return qp


def modify_qp(qp: Qp, thread: Thread, state: QpState, **attributes: int) -> Wait:
    """Move a queue pair to another state, setting attributes of ibv_qp_attr; returns 0 or -EINVAL.

    Parameters
    ----------
    attributes : int
        ``dest_qp_num``, ``timeout``, ``retry_cnt``, ``rnr_retry``, ``min_rnr_timer``.
    """
    hca = qp.hca
    thread.charge(hca.costs.cmd_modify_qp)
    yield from thread.sync()
    steps = {QpState.RESET: QpState.INIT, QpState.INIT: QpState.RTR, QpState.RTR: QpState.RTS}
    anytime = (QpState.RESET, QpState.ERR)
    if state not in anytime and steps.get(qp.state) != state and state != qp.state:
        return Errno(errno.EINVAL, "modify_qp", f"{qp.state.name} to {state.name}")
    unknown = set(attributes) - {"dest_qp_num", "timeout", "retry_cnt", "rnr_retry", "min_rnr_timer"}
    if unknown:
        return Errno(errno.EINVAL, "modify_qp", f"unknown attributes {sorted(unknown)}")
    qp.dest = attributes.pop("dest_qp_num", qp.dest)
    for name, value in attributes.items():
        setattr(qp, name, value)
    if state == QpState.ERR:
        qp.to_error()
    elif state == QpState.RESET:
        qp.clear()
    qp.retry_left, qp.rnr_left = qp.retry_cnt, qp.rnr_retry
    qp.state = state
    return 0


def connect(thread: Thread, left: Qp, right: Qp, **attributes: int) -> Wait:
    """Bring two queue pairs from RESET to RTS, connected to each other; returns 0 or a negative errno."""
    for state in (QpState.INIT, QpState.RTR, QpState.RTS):
        for qp, other in ((left, right), (right, left)):
            ret = yield from modify_qp(qp, thread, state, dest_qp_num=other.qpn, **attributes)
            if ret:
                return ret
    return 0


def destroy_qp(qp: Qp, thread: Thread) -> Wait:
    """Destroy a queue pair; what it waits for is forgotten."""
    yield from _verb_of(qp, thread)
    qp.state = QpState.RESET
    qp.clear()
    qp.hca.qps.pop(qp.qpn, None)
    return 0


def reg_mr(pd: IbPd, thread: Thread, addr: int, length: int, access: int, iova: int | None = None) -> Wait:
    """Register memory; returns the region (``lkey``, ``rkey``) or an `Errno`.

    ``addr`` 0 with ``length`` 2**64 - 1 and ON_DEMAND is the whole address space.
    """
    from kit.drivers.mlx5.mr.reg import ib_uverbs_reg_mr

    return (yield from ib_uverbs_reg_mr(pd.dev, thread, pd, addr, length, addr if iova is None else iova, access))


def reg_mr_ex(
    pd: IbPd, thread: Thread, addr: int, length: int, access: int, iova: int | None = None, dmah: Dmah | None = None
) -> Wait:  # fmt: skip
    """`reg_mr` with all that it may be given (ibv_reg_mr_ex); a DMA handle needs a 7.0 kernel and pinned memory.

    Older kernels have no such call: the library takes the old one, which cannot carry a handle (-EOPNOTSUPP).
    """
    from kit.drivers.mlx5.mr.reg import ib_uverbs_reg_mr

    if dmah is not None and pd.dev.era < Era.NEW:
        return Errno(errno.EOPNOTSUPP, "ibv_cmd_reg_mr_ex", "the kernel does not know DMA handles")
    at = addr if iova is None else iova
    return (yield from ib_uverbs_reg_mr(pd.dev, thread, pd, addr, length, at, access, dmah))


def reg_dmabuf_mr(pd: IbPd, thread: Thread, offset: int, length: int, iova: int, fd: int, access: int) -> Wait:
    """Register part of a buffer that another driver exports; returns the region or an `Errno`.

    Parameters
    ----------
    offset, length : int
        Bytes of the buffer.
    iova : int
        What its first byte is to be called in work requests.
    fd : int
        The process's descriptor of the dma-buf.
    """
    from kit.drivers.mlx5.mr.dmabuf import ib_uverbs_handler_UVERBS_METHOD_REG_DMABUF_MR as handler

    return (yield from handler(pd.dev, thread, pd, offset, length, iova, fd, access))


def dereg_mr(mr: Mlx5IbMr, thread: Thread) -> Wait:
    """Deregister; returns 0 or a negative errno."""
    from kit.drivers.mlx5.mr.dereg import mlx5_ib_dereg_mr

    thread.charge(mr.dev.costs.verb)
    return (yield from mlx5_ib_dereg_mr(mr, thread))


def advise_mr(pd: IbPd, thread: Thread, advice: int, flags: int, sg_list: Sequence[Sge]) -> Wait:
    """Prefetch ranges of on-demand regions; returns 0 or a negative errno."""
    from kit.drivers.mlx5.odp.advise import ib_uverbs_advise_mr

    return (yield from ib_uverbs_advise_mr(pd, thread, advice, flags, sg_list))


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


def _verb(dev: Mlx5IbDev, thread: Thread) -> Wait:
    thread.charge(dev.costs.verb)
    yield from thread.sync()


def _verb_of(qp: Qp, thread: Thread) -> Wait:
    thread.charge(qp.hca.costs.verb)
    yield from thread.sync()


def _number(dev: Mlx5IbDev) -> int:
    return dev.hca.network.number(dev.hca)
