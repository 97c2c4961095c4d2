"""Reservation objects: the lock of a shared buffer, and the fences of work on it that is still under way.

A driver that moves a buffer need not wait for its copy engine: it adds a fence, unlocks, and whoever wants to use the
content waits for that (drivers/dma-buf/dma-resv.c @ 6.9).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import simpy

from kit.sim.locks import Lock
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Engine, Thread, Wait

__all__ = [
    "DMA_RESV_USAGE_KERNEL", "DMA_RESV_USAGE_WRITE", "DmaFence", "DmaResv", "dma_resv_add_fence",
    "dma_resv_wait_timeout",
]  # fmt: skip

DMA_RESV_USAGE_KERNEL, DMA_RESV_USAGE_WRITE = range(2)  # enum dma_resv_usage; a wait for one includes those before it


class DmaFence:
    """Work of a device that will have ended some time (struct dma_fence)."""

    def __init__(self, engine: Engine) -> None:
        self.done: simpy.Event = engine.env.event()

    @property
    def signaled(self) -> bool:
        """Whether the work has ended (dma_fence_is_signaled)."""
        return self.done.triggered

    def signal(self) -> None:
        """The work has ended (dma_fence_signal)."""
        self.done.succeed()


class DmaResv:
    """The lock and the fences of one buffer (struct dma_resv).

    Attributes
    ----------
    fences : list of (DmaFence, int)
        With the usage that each was added for; what has ended is dropped when the next is added.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.fences: list[tuple[DmaFence, int]] = []

    def lock(self, thread: Thread) -> Iterable[simpy.Event]:
        """Take the lock (dma_resv_lock)."""
        return self._lock.acquire(thread)

    def unlock(self, thread: Thread) -> Iterable[simpy.Event]:
        """Give it up (dma_resv_unlock)."""
        return self._lock.release(thread)

    @property
    def holder(self) -> Thread | None:
        """Who has the lock."""
        return self._lock.holder

    def assert_held(self, thread: Thread) -> None:
        """Raise unless `thread` has the lock (dma_resv_assert_held)."""
        if self._lock.holder is not thread:
            holder = self._lock.holder
            raise RuntimeError(f"{thread.name} needs a reservation that {holder.name if holder else 'nobody'} holds")

    def busy(self, usage: int) -> list[DmaFence]:
        """Return the work of a usage, or one before it, that is still under way."""
        return [fence for fence, kind in self.fences if kind <= usage and not fence.signaled]


@step
def dma_resv_add_fence(resv: DmaResv, thread: Thread, fence: DmaFence, usage: int) -> None:
    """Let who looks at the reservation know of work under way; the lock is held (dma-resv.c)."""
    resv.assert_held(thread)
    resv.fences = [(each, kind) for each, kind in resv.fences if not each.signaled]
    resv.fences.append((fence, usage))


@waiting_step
def dma_resv_wait_timeout(resv: DmaResv, thread: Thread, usage: int) -> Wait:
    """Wait for the work of a usage, however long it takes; return what is left of the time, 1 (dma-resv.c)."""
    yield from thread.sync()
    for fence in resv.busy(usage):
        yield from thread.wait(fence.done)
    return 1
