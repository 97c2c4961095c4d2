"""odp.c: faults of a remote operation at the responder: first what is needed, then a look ahead."""

from __future__ import annotations

from errno import EAGAIN

from kit.drivers.mlx5.enums import Era
from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_page_fault_resume
from kit.drivers.mlx5.odp.segment import pagefault_single_data_segment, pages_in_range
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

__all__ = ["mlx5_ib_mr_rdma_pfault_handler"]


@waiting_step
def mlx5_ib_mr_rdma_pfault_handler(pfault: Pagefault, thread: Thread) -> Wait:
    """Fault all that is left of the operation, resume, and only then look ahead (odp.c).

    When the hardware does not know the length, one packet is faulted, and what is looked ahead for is as long as
    what has come of the message so far, 4 MiB at most.
    """
    dev, rkey = pfault.dev, pfault.r_key
    prefetch_len = pfault.bytes_committed
    pfault.rdma_va += pfault.bytes_committed
    pfault.rdma_op_len -= min(pfault.bytes_committed, pfault.rdma_op_len)
    pfault.bytes_committed = 0
    address, length = pfault.rdma_va, pfault.rdma_op_len
    prefetch_activated = not length
    if prefetch_activated:
        length = pfault.packet_size
        prefetch_len = min(dev.options.max_prefetch_len, prefetch_len)
    thread.note(va=address, bytes=length, value=rkey)
    ret = yield from pagefault_single_data_segment(dev, thread, rkey, address, length, 0, None)
    if ret == -EAGAIN:
        prefetch_activated = False
    elif ret < 0 or (dev.era < Era.NEW and pages_in_range(address, length) > ret):
        yield from mlx5_ib_page_fault_resume(pfault, thread, 1)
        return
    yield from mlx5_ib_page_fault_resume(pfault, thread, 0)
    if prefetch_activated:
        yield from pagefault_single_data_segment(dev, thread, rkey, address, prefetch_len, 0, None)
