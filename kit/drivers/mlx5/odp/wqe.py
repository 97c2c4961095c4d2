"""odp.c: faults of a work request: of a requester's, or of a receive that a message has come for."""

from __future__ import annotations

from errno import EAGAIN, EFAULT
from typing import TYPE_CHECKING

from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.adapter.queues import Srq
from kit.drivers.mlx5.descriptors import Seg, WqeImage
from kit.drivers.mlx5.enums import INVALID_LKEY, PAGE, PageFaultType, PageRequest, QpType, WrOpcode
from kit.drivers.mlx5.odp.fault import BytesMapped
from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_page_fault_resume
from kit.drivers.mlx5.odp.segment import pagefault_single_data_segment
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = ["mlx5_ib_mr_wqe_pfault_handler", "odp_get_rsc", "pagefault_data_segments"]

DS_UNITS = 16  # MLX5_WQE_DS_UNITS
TWO_GIB = 1 << 31
# The driver's list has no FLUSH and no ATOMIC_WRITE, which no mlx5 device does; here they have the segment too.
RDMA = (
    WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM, WrOpcode.RDMA_READ, WrOpcode.FLUSH, WrOpcode.ATOMIC_WRITE,
)  # fmt: skip
ATOMIC = (WrOpcode.ATOMIC_CMP_AND_SWP, WrOpcode.ATOMIC_FETCH_AND_ADD)


@waiting_step
def mlx5_ib_mr_wqe_pfault_handler(pfault: Pagefault, thread: Thread) -> Wait:
    """Read the work request from the user's queue and fault all of its segments in one go (odp.c)."""
    dev = pfault.dev
    thread.note(value=pfault.wq_num)
    res = odp_get_rsc(dev, thread, pfault.wq_num, pfault.type)
    if res is None:
        thread.note(status="no such queue")
        return  # nobody to resume
    good = yield from serve(pfault, thread, res)
    yield from mlx5_ib_page_fault_resume(pfault, thread, 0 if good else 1)


def serve(pfault: Pagefault, thread: Thread, res: Qp | Srq) -> Wait:
    """Return whether the hardware may try again."""
    dev = pfault.dev
    if dev.inject.hit("wqe_page"):
        return False
    sq = bool(pfault.type & PageFaultType.REQUESTOR)
    thread.charge(dev.costs.read_wqe)
    image = None if dev.inject.hit("read_wqe") else dev.hca.read_wqe(pfault.wq_num, pfault.wqe_index, sq)
    if image is None:
        thread.note(status="the work request cannot be read")
        return False
    segments: list[Seg] | Errno
    if isinstance(res, Srq):
        segments = mlx5_ib_mr_responder_pfault_handler_srq(pfault, thread, image)
    elif sq:
        segments = mlx5_ib_mr_initiator_pfault_handler(pfault, thread, image)
    else:
        segments = mlx5_ib_mr_responder_pfault_handler_rq(pfault, thread, image)
    if isinstance(segments, Errno) or not segments:
        return False
    mapped = BytesMapped()
    ret, total = yield from pagefault_data_segments(pfault, thread, segments, mapped, not sq)
    if ret == -EAGAIN:
        return True
    return ret >= 0 and total <= mapped.value


@step
def odp_get_rsc(dev: Mlx5IbDev, thread: Thread, wq_num: int, pf_type: int) -> Qp | Srq | None:
    """Find the queue: a shared receive queue for RMP, else a queue pair (odp.c)."""
    res = dev.hca.get_rsc(wq_num)
    if pf_type == PageRequest.RMP:
        return res if isinstance(res, Srq) else None
    if pf_type in (PageRequest.REQ_SEND_OR_WRITE, PageRequest.RESP, PageRequest.REQ_READ_OR_ATOMIC):
        return res if isinstance(res, Qp) else None
    return None


@step
def mlx5_ib_mr_initiator_pfault_handler(
    pfault: Pagefault, thread: Thread, image: WqeImage
) -> list[Seg] | Errno:  # fmt: skip
    """Skip the headers of a send request, by transport and opcode; return what follows (odp.c)."""
    name = "mlx5_ib_mr_initiator_pfault_handler"
    if image.ds * DS_UNITS > image.bytes_read:
        return Errno(EFAULT, name, f"{image.ds} x 16 bytes, but only {image.bytes_read} could be read")
    if image.ds == 0:
        return Errno(EFAULT, name, "the work request is empty")
    expected = ["ctrl"]
    if image.qp_type == QpType.XRC_SEND:
        expected.append("xrc")
    if image.qp_type in (QpType.UD, QpType.DC):
        expected.append("av")
    if image.opcode in RDMA:
        expected.append("raddr")
    elif image.opcode in ATOMIC:
        expected += ["raddr", "atomic"]
    return skip(image, expected)


def skip(image: WqeImage, expected: list[str]) -> list[Seg]:
    """Drop the headers by their size; headers that the driver does not know would be taken for data."""
    headers = 0
    for seg in image.segments:
        if headers == len(expected) or seg.kind != expected[headers]:
            break
        headers += 1
    return image.segments[headers:]


@step
def mlx5_ib_mr_responder_pfault_handler_rq(
    pfault: Pagefault, thread: Thread, image: WqeImage
) -> list[Seg] | Errno:  # fmt: skip
    """A receive of the queue pair's own queue is all data segments (odp.c)."""
    name = "mlx5_ib_mr_responder_pfault_handler_rq"
    if image.signature:
        return Errno(EFAULT, name, "work requests with signatures are not supported")
    if image.ds * DS_UNITS > image.bytes_read:
        return Errno(EFAULT, name, "the receive could not be read whole")
    return image.segments


@step
def mlx5_ib_mr_responder_pfault_handler_srq(
    pfault: Pagefault, thread: Thread, image: WqeImage
) -> list[Seg] | Errno:  # fmt: skip
    """A receive of a shared queue has a link in front (odp.c)."""
    if min(image.ds * DS_UNITS, PAGE) > image.bytes_read:
        return Errno(EFAULT, "mlx5_ib_mr_responder_pfault_handler_srq", "the receive could not be read whole")
    return [seg for seg in image.segments if seg.kind in ("data", "inline")]


@waiting_step
def pagefault_data_segments(
    pfault: Pagefault, thread: Thread, segments: list[Seg], bytes_mapped: BytesMapped, receive_queue: bool
) -> Wait:
    """Fault segment after segment until one fails; return its pages or errno, and its bytes still to come (odp.c)."""
    dev, npages, total, ret = pfault.dev, 0, 0, 0
    for seg in segments:
        inline, bcnt = seg.kind == "inline", seg.byte_count
        if receive_queue and not bcnt and seg.lkey == terminator(dev) and not seg.addr:
            break
        if not inline:
            total += bcnt - min(bcnt, pfault.bytes_committed)
        if not bcnt:
            bcnt = TWO_GIB  # what length 0 means
        if inline or bcnt <= pfault.bytes_committed:
            pfault.bytes_committed -= min(bcnt, pfault.bytes_committed)
            continue
        committed, pfault.bytes_committed = pfault.bytes_committed, 0
        ret = yield from pagefault_single_data_segment(
            dev, thread, seg.lkey, seg.addr, bcnt, committed, bytes_mapped
        )  # fmt: skip
        if ret < 0:
            break
        npages += ret
    return (ret if ret < 0 else npages), total


def terminator(dev: Mlx5IbDev) -> int:
    """The key that ends a receive list early."""
    return dev.caps.terminate_scatter_list_mkey or INVALID_LKEY
