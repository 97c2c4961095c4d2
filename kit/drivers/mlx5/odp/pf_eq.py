"""odp.c: the page-fault event queue: interrupt, decoding, reserve of descriptors, workers."""

from __future__ import annotations

from dataclasses import dataclass
from errno import ENOMEM
from typing import TYPE_CHECKING

from kit.drivers.mlx5.core.eq import (
    EqParam,
    mlx5_eq_create_generic,
    mlx5_eq_destroy_generic,
    mlx5_eq_disable,
    mlx5_eq_enable,
    mlx5_eq_get_eqe,
    mlx5_eq_update_cc,
    mlx5_eq_update_ci,
)
from kit.drivers.mlx5.core.linux import (
    Mempool,
    alloc_workqueue,
    mempool_alloc,
    mempool_create_kmalloc_pool,
    mempool_free,
    queue_work,
    schedule_work,
)
from kit.drivers.mlx5.core.waiting import DelayedWork, Workqueue
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.enums import Era, PageFaultSubtype
from kit.drivers.mlx5.odp.page_fault import Pagefault, mlx5_ib_pfault
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.locks import Lock
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.core.eq_ring import Eq
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = ["PfEq", "mlx5_ib_odp_destroy_eq", "mlx5r_odp_create_eq"]

MLX5_IB_NUM_PF_EQE = 0x1000
GRANULARITY = 4096  # MEMORY_SCHEME_PAGE_FAULT_GRANULARITY
BITS_24, BITS_48 = (1 << 24) - 1, (1 << 48) - 1


@dataclass(eq=False)
class PfEq:
    """Struct mlx5_ib_pf_eq.

    Attributes
    ----------
    core : Eq or None
        The event queue; None until it has been created.
    lock : Lock
        Only one drains the queue at a time.
    work : DelayedWork
        Refills the reserve and drains, where sleeping is allowed.
    """

    dev: Mlx5IbDev
    pool: Mempool
    wq: Workqueue
    lock: Lock
    core: Eq | None = None
    work: DelayedWork | None = None
    events: int = 0


@waiting_step
def mlx5r_odp_create_eq(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Make the page-fault queue, once a device, with the first region that needs it (odp.c)."""
    yield from dev.odp_eq_mutex.acquire(thread)
    ret = 0
    if dev.odp_pf_eq is None:
        ret = yield from create_eq(dev, thread)
    yield from dev.odp_eq_mutex.release(thread)
    return ret


def create_eq(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Reserve, workers, queue, interrupt, in this order; whatever fails undoes what came before."""
    inject, options = dev.inject, dev.options
    pool = mempool_create_kmalloc_pool(dev, thread, options.pf_reserve)
    if pool is None:
        return Errno(ENOMEM, "mlx5r_odp_create_eq", "the reserve of fault descriptors")
    wq = alloc_workqueue(dev, thread, "mlx5_ib_page_fault", options.pf_max_active)
    if wq is None:
        return Errno(ENOMEM, "mlx5r_odp_create_eq", "the work queue mlx5_ib_page_fault")
    eq = PfEq(dev, pool, wq, Lock())
    eq.work = DelayedWork(dev.system_wq, lambda worker: mlx5_ib_eq_pf_action(eq, worker))
    if inject.hit("eq_create"):
        return Errno(ENOMEM, "mlx5_eq_create_generic", "injected")
    core = yield from mlx5_eq_create_generic(dev.hca, thread, EqParam(nent=MLX5_IB_NUM_PF_EQE))
    if isinstance(core, Errno):
        return core
    eq.core = core
    if inject.hit("eq_enable"):
        ret: int = Errno(ENOMEM, "mlx5_eq_enable", "injected")
    else:
        ret = mlx5_eq_enable(dev.hca, thread, core, lambda irq: mlx5_ib_eq_pf_int(eq, irq))
    if ret:
        yield from mlx5_eq_destroy_generic(dev.hca, thread, core)
        return ret
    dev.odp_pf_eq = eq
    return 0


@waiting_step
def mlx5_ib_odp_destroy_eq(dev: Mlx5IbDev, thread: Thread) -> Wait:
    """Take the page-fault queue down with the device (odp.c)."""
    eq = dev.odp_pf_eq
    if eq is None or eq.core is None or eq.work is None:
        return 0
    mlx5_eq_disable(dev.hca, thread, eq.core)
    ret = yield from mlx5_eq_destroy_generic(dev.hca, thread, eq.core)
    eq.work.cancel()
    yield from eq.wq.flush(thread)
    dev.odp_pf_eq = None
    return ret


@waiting_step
def mlx5_ib_eq_pf_int(eq: PfEq, thread: Thread) -> Wait:
    """The interrupt: drain now, or leave it to the work item if somebody is at it (odp.c)."""
    yield from thread.sync()
    if eq.lock.holder is None:
        yield from eq.lock.acquire(thread)
        mlx5_ib_eq_pf_process(eq, thread)
        yield from eq.lock.release(thread)
    else:
        schedule(eq, thread)


def schedule(eq: PfEq, thread: Thread) -> None:
    """Queue the draining work item, unless it is queued already (schedule_work)."""
    if eq.work is not None:
        schedule_work(eq.work, thread)


@step
def mlx5_ib_eq_pf_process(eq: PfEq, thread: Thread) -> None:
    """Turn events into work items; without a descriptor the rest stay in the queue (odp.c)."""
    core, cc = eq.core, 0
    if core is None:
        return
    while (eqe := mlx5_eq_get_eqe(core, thread, cc)) is not None:
        if not mempool_alloc(eq.pool, thread):
            schedule(eq, thread)
            break
        thread.charge(eq.dev.costs.eqe)
        queue_fault(eq, thread, decode(eq.dev, eqe))
        cc = mlx5_eq_update_cc(core, thread, cc + 1)
    mlx5_eq_update_ci(core, thread, cc, True)


def queue_fault(eq: PfEq, thread: Thread, pfault: Pagefault) -> None:
    """Hand one fault to the workers (INIT_WORK, queue_work)."""
    eq.events += 1
    queue_work(eq.wq, thread, lambda worker: mlx5_ib_eqe_pf_action(pfault, worker, eq))


def decode(dev: Mlx5IbDev, eqe: PageFaultEqe) -> Pagefault:
    """Read one event; an unknown kind is passed on too, so that it gets resumed."""
    pfault = Pagefault(dev, eqe.sub_type)
    if eqe.sub_type == PageFaultSubtype.RDMA:
        pfault.bytes_committed = eqe.bytes_committed
        pfault.type, pfault.token = eqe.pftype_token >> 24, eqe.pftype_token & BITS_24
        pfault.r_key, pfault.packet_size = eqe.r_key, eqe.packet_length
        pfault.rdma_op_len, pfault.rdma_va = eqe.rdma_op_len, eqe.rdma_va
    elif eqe.sub_type == PageFaultSubtype.WQE:
        pfault.bytes_committed = eqe.bytes_committed
        pfault.type, pfault.token = eqe.pftype_wq >> 24 & 7, eqe.token
        pfault.wq_num, pfault.wqe_index = eqe.pftype_wq & BITS_24, eqe.wqe_index
        pfault.packet_size = eqe.packet_length
    elif eqe.sub_type == PageFaultSubtype.MEMORY and dev.era == Era.NEW:
        pfault.token = eqe.token31_0 | eqe.token47_32 << 32
        pfault.va, pfault.mkey, pfault.flags = eqe.va, eqe.mkey, eqe.flags
        pfault.fault_byte_count = (eqe.demand_fault_pages >> 12) * GRANULARITY
        pfault.prefetch_before_byte_count = eqe.pre_demand_fault_pages * GRANULARITY
        pfault.prefetch_after_byte_count = eqe.post_demand_fault_pages * GRANULARITY
    else:
        pfault.token = eqe.token or eqe.pftype_token & BITS_24
    return pfault


@waiting_step
def mlx5_ib_eqe_pf_action(pfault: Pagefault, thread: Thread, eq: PfEq) -> Wait:
    """One fault, on one worker (odp.c)."""
    yield from mlx5_ib_pfault(pfault, thread)
    mempool_free(eq.pool, thread)


@waiting_step
def mlx5_ib_eq_pf_action(eq: PfEq, thread: Thread) -> Wait:
    """Refill the reserve where sleeping is allowed, then drain what is left (odp.c)."""
    yield from mempool_refill(eq, thread)
    yield from eq.lock.acquire(thread)
    mlx5_ib_eq_pf_process(eq, thread)
    yield from eq.lock.release(thread)


@waiting_step
def mempool_refill(eq: PfEq, thread: Thread) -> Wait:
    """Allocate and give back until the reserve is full.

    Each allocation tries without reclaim, then takes from the reserve itself, so this gains ground only while plain
    kmalloc works; on an empty reserve it waits for memory (odp.c).
    """
    pool = eq.pool
    while pool.curr_nr < pool.min_nr:
        if mempool_alloc(pool, thread):
            mempool_free(pool, thread)
        else:
            yield from eq.dev.engine.pause(1000.0)  # direct reclaim; the next try may succeed
            thread.now = max(thread.now, float(eq.dev.engine.now))
