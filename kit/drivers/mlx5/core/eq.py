"""Event queues (mellanox/mlx5/core/eq.c @ 6.9): a ring that the hardware fills and a driver drains.

The hardware never overwrites an entry: with the ring full, page faults wait, and the work that faulted with them.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.drivers.mlx5.core.cmd import mlx5_cmd_exec
from kit.drivers.mlx5.descriptors import PageFaultEqe
from kit.drivers.mlx5.enums import EQ_SPARE, EqeType
from kit.errors import Errno
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.sim.engine import Thread, Wait

__all__ = [
    "Eq", "EqParam", "mlx5_eq_create_generic", "mlx5_eq_destroy_generic", "mlx5_eq_disable", "mlx5_eq_enable",
    "mlx5_eq_get_eqe", "mlx5_eq_update_cc", "mlx5_eq_update_ci",
]  # fmt: skip

NotifierCall = Callable[["Thread"], Any]
MLX5_EQE_SIZE = 64


@dataclass
class EqParam:
    """Struct mlx5_eq_param: wanted entries and the mask of event types."""

    nent: int = 0x1000  # MLX5_IB_NUM_PF_EQE
    mask: int = 1 << EqeType.PAGE_FAULT
    irq: int = 0


@dataclass
class Eq:
    """Struct mlx5_eq, with what the hardware keeps about it.

    Attributes
    ----------
    size : int
        Entries: nent + 0x80, rounded up to a power of two.
    ring : list of PageFaultEqe or None
    cons_index : int
        The driver's; never wraps here.
    doorbell_ci : int
        Consumer index that the hardware knows.
    prod_index : int
    armed : bool
        The next entry raises the interrupt, which disarms.
    waiting : deque of PageFaultEqe
        Faults for which the ring has no room.
    most : int
        Largest number of entries that were not consumed.
    """

    hca: Hca
    nent: int
    size: int = 0
    eqn: int = 0
    mask: int = 0
    irq: int = 0
    ring: list[PageFaultEqe | None] = field(default_factory=list, repr=False)
    cons_index: int = 0
    doorbell_ci: int = 0
    prod_index: int = 0
    armed: bool = False
    notifier_call: NotifierCall | None = None
    waiting: deque[PageFaultEqe] = field(default_factory=deque, repr=False)
    interrupts: int = 0
    most: int = 0

    @property
    def depth(self) -> int:
        """Entries that the hardware has not seen consumed."""
        return self.prod_index - self.doorbell_ci

    @property
    def stalled(self) -> int:
        """Faults that wait for room."""
        return len(self.waiting)

    def write(self, eqe: PageFaultEqe) -> None:
        """Append an event now, or make it wait for room."""
        if self.waiting or self.depth >= self.size:
            self.waiting.append(eqe)
            return
        self._append(eqe)
        self.interrupt()

    def _append(self, eqe: PageFaultEqe) -> None:
        engine = self.hca.engine
        eqe.time = engine.now
        self.ring[self.prod_index & (self.size - 1)] = eqe
        self.prod_index += 1
        self.most = max(self.most, self.depth)
        engine.trace.span(
            "eqe", self.hca.name, engine.now, engine.now, va=eqe.rdma_va or eqe.va or -1, value=self.depth
        )  # fmt: skip

    def doorbell(self, now: float, arm: bool) -> None:
        """Write the consumer index: room for faults that waited, and, armed, an interrupt if entries are left."""
        self.doorbell_ci = self.cons_index
        while self.waiting and self.depth < self.size:
            self._append(self.waiting.popleft())
        self.armed = self.armed or arm
        self.interrupt(now)

    def interrupt(self, now: float = 0.0) -> None:
        """Raise the interrupt if the queue is armed and holds entries (mlx5_irq's atomic notifier chain)."""
        if not self.armed or self.prod_index == self.doorbell_ci or self.notifier_call is None:
            return
        self.armed = False
        self.interrupts += 1
        self.hca.engine.start(_irq(self, self.notifier_call, now))


def _irq(eq: Eq, notifier_call: NotifierCall, now: float) -> Wait:
    thread = eq.hca.engine.thread(f"{eq.hca.name} irq")
    thread.now = max(thread.now, now)
    thread.charge(eq.hca.costs.irq)
    yield from thread.sync()
    if eq.notifier_call is not notifier_call:
        return  # detached in the meantime
    result = notifier_call(thread)
    if hasattr(result, "__iter__"):
        yield from result
    yield from thread.sync()


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
