"""Event queues as a driver makes, arms and drains them (mellanox/mlx5/core/eq.c @ 6.9)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kit.drivers.mlx5.core.cmd import mlx5_cmd_exec
from kit.drivers.mlx5.core.eq_ring import Eq, NotifierCall
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.enums import EQ_SPARE, EqeType
from kit.errors import Errno
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.sim.engine import Thread, Wait

__all__ = [
    "EqParam", "mlx5_eq_create_generic", "mlx5_eq_destroy_generic", "mlx5_eq_disable", "mlx5_eq_enable",
    "mlx5_eq_get_eqe", "mlx5_eq_update_cc", "mlx5_eq_update_ci",
]  # fmt: skip

MLX5_EQE_SIZE = 64


@dataclass
class EqParam:
    """Struct mlx5_eq_param: wanted entries and the mask of event types."""

    nent: int = 0x1000  # MLX5_IB_NUM_PF_EQE
    mask: int = 1 << EqeType.PAGE_FAULT
    irq: int = 0


@waiting_step
def mlx5_eq_create_generic(hca: Hca, thread: Thread, param: EqParam) -> Wait:
    """Create an event queue (core/eq.c); returns the `Eq` or a negative errno."""
    eq = Eq(hca, param.nent)
    ret = yield from create_async_eq(hca, thread, eq, param)
    return ret if ret else eq


@waiting_step
def create_async_eq(hca: Hca, thread: Thread, eq: Eq, param: EqParam) -> Wait:
    """Create an event queue under the table's lock (core/eq.c)."""
    yield from hca.eq_table_lock.acquire(thread)
    ret = yield from create_map_eq(hca, thread, eq, param)
    yield from hca.eq_table_lock.release(thread)
    return ret


@waiting_step
def create_map_eq(hca: Hca, thread: Thread, eq: Eq, param: EqParam) -> Wait:
    """Allocate the ring and hand it to the firmware (core/eq.c)."""
    log_eq_size = (param.nent + EQ_SPARE - 1).bit_length()  # order_base_2
    eq.cons_index = 0
    ret = mlx5_frag_buf_alloc_node(eq, thread, MLX5_EQE_SIZE << log_eq_size)
    if ret:
        return ret
    mlx5_init_fbc(eq, thread, log_eq_size)
    init_eq_buf(eq, thread)
    eq.irq = mlx5_irq_get_index(eq, thread, param)
    mlx5_fill_page_frag_array(eq, thread)
    ret = yield from mlx5_cmd_exec(hca, thread, hca.costs.cmd_create_eq)
    if ret:
        return ret
    hca.next_eqn += 1
    eq.eqn, eq.mask = hca.next_eqn, param.mask
    if param.mask & 1 << EqeType.PAGE_FAULT:
        hca.pf_eq = eq
    return mlx5_debug_eq_add(eq, thread)


@step
def mlx5_frag_buf_alloc_node(eq: Eq, thread: Thread, size: int) -> int:
    """Allocate the ring's buffer (core/alloc.c); -ENOMEM when an allocation failure is injected."""
    thread.note(bytes=size)
    if eq.hca.fail_eq_buffer:
        eq.hca.fail_eq_buffer = False
        return Errno(errno.ENOMEM, "mlx5_frag_buf_alloc_node", "no memory for the event queue")
    return 0


@step
def mlx5_init_fbc(eq: Eq, thread: Thread, log_sz: int) -> None:
    """Note the ring's shape (include/linux/mlx5/driver.h)."""
    eq.size = 1 << log_sz


@step
def init_eq_buf(eq: Eq, thread: Thread) -> None:
    """Give every entry to the hardware (core/eq.c)."""
    eq.ring = [None] * eq.size


@step
def mlx5_irq_get_index(eq: Eq, thread: Thread, param: EqParam) -> int:
    """Interrupt vector of the queue (core/pci_irq.c)."""
    return param.irq


@step
def mlx5_fill_page_frag_array(eq: Eq, thread: Thread) -> None:
    """List the buffer's pages for the command (core/alloc.c)."""
    thread.note(pages=eq.size * MLX5_EQE_SIZE // 4096)


@step
def mlx5_debug_eq_add(eq: Eq, thread: Thread) -> int:
    """Enter the queue in debugfs (core/debugfs.c)."""
    eq.hca.eqs[eq.eqn] = eq
    return 0


@step
def mlx5_eq_enable(hca: Hca, thread: Thread, eq: Eq, notifier_call: NotifierCall) -> int:
    """Connect the interrupt and arm the queue (core/eq.c); returns 0."""
    eq.notifier_call = notifier_call
    eq.doorbell(thread.now, arm=True)
    return 0


@step
def mlx5_eq_disable(hca: Hca, thread: Thread, eq: Eq) -> None:
    """Disconnect the interrupt (core/eq.c)."""
    eq.notifier_call = None


@waiting_step
def mlx5_eq_destroy_generic(hca: Hca, thread: Thread, eq: Eq) -> Wait:
    """Destroy an event queue (core/eq.c); returns 0 or a negative errno."""
    return (yield from destroy_async_eq(hca, thread, eq))


@waiting_step
def destroy_async_eq(hca: Hca, thread: Thread, eq: Eq) -> Wait:
    """Destroy an event queue under the table's lock (core/eq.c)."""
    yield from hca.eq_table_lock.acquire(thread)
    ret = yield from destroy_unmap_eq(hca, thread, eq)
    yield from hca.eq_table_lock.release(thread)
    return ret


@waiting_step
def destroy_unmap_eq(hca: Hca, thread: Thread, eq: Eq) -> Wait:
    """Take the ring back from the firmware (core/eq.c); a failure is only logged, the buffer goes anyway."""
    hca.eqs.pop(eq.eqn, None)
    ret = yield from mlx5_cmd_destroy_eq(hca, thread, eq)
    if hca.pf_eq is eq:
        hca.pf_eq = None
    return ret


@waiting_step
def mlx5_cmd_destroy_eq(hca: Hca, thread: Thread, eq: Eq) -> Wait:
    """DESTROY_EQ (core/eq.c)."""
    return (yield from mlx5_cmd_exec(hca, thread, hca.costs.cmd_create_eq))


@step
def mlx5_eq_get_eqe(eq: Eq, thread: Thread, cc: int) -> PageFaultEqe | None:
    """Return entry `cc` past the consumer index if the hardware has written it (core/eq.c)."""
    at = eq.cons_index + cc
    return eq.ring[at & (eq.size - 1)] if at < eq.prod_index else None


@step
def mlx5_eq_update_cc(eq: Eq, thread: Thread, cc: int) -> int:
    """Write the consumer index unarmed every 0x80 entries; return the new count (include/linux/mlx5/eq.h)."""
    if cc >= EQ_SPARE:
        mlx5_eq_update_ci(eq, thread, cc, False)
        return 0
    return cc


@step
def mlx5_eq_update_ci(eq: Eq, thread: Thread, cc: int, arm: bool) -> None:
    """Move the consumer index by `cc` and tell the hardware, arming the queue or not (core/eq.c)."""
    eq.cons_index += cc
    eq.doorbell(thread.now, arm)
