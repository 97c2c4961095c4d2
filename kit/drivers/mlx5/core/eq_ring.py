"""The ring of an event queue: what the hardware writes, when it waits for room, when it interrupts.

The hardware never overwrites an entry: with the ring full, page faults wait, and the work that faulted with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.drivers.mlx5.descriptors import PageFaultEqe

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.sim.engine import Thread, Wait

__all__ = ["Eq", "NotifierCall"]

NotifierCall = Callable[["Thread"], Any]


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
