"""odp.c: one page fault: which handler serves it, and how it is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kit.drivers.mlx5.enums import Era, PageFaultSubtype
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = ["Pagefault", "mlx5_ib_page_fault_resume", "mlx5_ib_pfault"]

UNUSED = -1


@dataclass(eq=False)
class Pagefault:
    """Struct mlx5_pagefault: one decoded event; which fields count depends on `event_subtype`.

    Attributes
    ----------
    wq_num, wqe_index : int
        WQE: the queue and the work request.
    r_key, rdma_op_len, rdma_va : int
        RDMA: the remote operation.
    packet_size : int
        Both: bytes needed to make progress.
    va, mkey, fault_byte_count, prefetch_before_byte_count, prefetch_after_byte_count, flags : int
        MEMORY.
    resumed : int
        PAGE_FAULT_RESUME commands sent for it.
    """

    dev: Mlx5IbDev
    event_subtype: int
    bytes_committed: int = 0
    type: int = 0
    token: int = 0
    wq_num: int = UNUSED
    wqe_index: int = 0
    packet_size: int = 0
    r_key: int = 0
    rdma_op_len: int = 0
    rdma_va: int = 0
    va: int = 0
    mkey: int = 0
    fault_byte_count: int = 0
    prefetch_before_byte_count: int = 0
    prefetch_after_byte_count: int = 0
    flags: int = 0
    resumed: int = 0


@waiting_step
def mlx5_ib_pfault(pfault: Pagefault, thread: Thread) -> Wait:
    """Serve a fault by its kind; an unknown one is resumed with an error (odp.c)."""
    from kit.drivers.mlx5.odp.memory_scheme import mlx5_ib_mr_memory_pfault_handler
    from kit.drivers.mlx5.odp.rdma import mlx5_ib_mr_rdma_pfault_handler
    from kit.drivers.mlx5.odp.wqe import mlx5_ib_mr_wqe_pfault_handler

    dev, old = pfault.dev, pfault.dev.era == Era.OLD
    dev.srcu_readers += old
    if pfault.event_subtype == PageFaultSubtype.WQE:
        yield from mlx5_ib_mr_wqe_pfault_handler(pfault, thread)
    elif pfault.event_subtype == PageFaultSubtype.RDMA:
        yield from mlx5_ib_mr_rdma_pfault_handler(pfault, thread)
    elif pfault.event_subtype == PageFaultSubtype.MEMORY and dev.era == Era.NEW:
        yield from mlx5_ib_mr_memory_pfault_handler(pfault, thread)
    else:
        yield from mlx5_ib_page_fault_resume(pfault, thread, 1)
    if old:
        dev.srcu_readers -= 1
        dev.srcu.wake_up()


@waiting_step
def mlx5_ib_page_fault_resume(pfault: Pagefault, thread: Thread, error: int) -> Wait:
    """Let the hardware try again, or give up; that the command failed is only logged (odp.c)."""
    wq_num = pfault.wq_num if pfault.event_subtype == PageFaultSubtype.WQE else pfault.token
    thread.note(value=pfault.token, cause="error" if error else "replay", status="error" if error else "ok")
    pfault.resumed += 1
    ret = yield from pfault.dev.hca.page_fault_resume(thread, pfault.type, pfault.token, wq_num, int(bool(error)))
    if ret:
        thread.note(status=repr(ret))
