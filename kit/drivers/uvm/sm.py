"""The GPU side: streaming multiprocessors with many outstanding misses, uTLBs, stalls until replay.

A kernel is something that can `advance`: run as far as the page table lets it within a time
horizon, and say which accesses now miss. Misses of one uTLB on one page are merged before they
reach the fault buffer; an access that misses stalls until a replay wakes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.fault_buffer import Column
from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.replays import BATCH_FLUSH, ONCE
from kit.drivers.uvm.types import PAGE_SHIFT, PREFETCH, VaSpace
from kit.drivers.uvm.va_block_copy import settle_late
from kit.drivers.uvm.watchdog import Watchdog
from kit.memory.physical.content import Content
from kit.sim.engine import Wait

__all__ = ["FOREVER", "Kernel", "Misses", "launch"]

HORIZON: Final = 20.0  # microseconds that running lanes advance at a time while others are stalled or being served
FOREVER: Final = 1e12


@dataclass
class Misses:
    """Accesses that fault, in order of arrival: page, access type, uTLB, delay after the call (microseconds).

    There may be one delay for all. ``prefetches`` says that some may be prefetch instructions, which nobody waits for.
    """

    page: Column
    access: Column
    utlb: Column
    delay: Column
    prefetches: bool = False

    def without_prefetches(self) -> Misses:
        """Return the others: where prefetches do not fault, they are dropped."""
        keep = np.asarray(self.access) != PREFETCH
        page, access, utlb = (np.asarray(column)[keep] for column in (self.page, self.access, self.utlb))
        return Misses(page, access, utlb, self.delay if len(self.delay) == 1 else np.asarray(self.delay)[keep])


class Kernel(Protocol):
    """What runs on the GPU, of which up to ``lanes`` accesses or warps can wait at once."""

    name: str
    lanes: int

    @property
    def progress(self) -> int:
        """A number that grows whenever an access is made."""
        ...

    @property
    def blocked(self) -> bool:
        """Something waits for a replay, and nothing can run before it."""
        ...

    @property
    def done(self) -> bool:
        """Nothing is left to run."""
        ...

    @property
    def stalled(self) -> int:
        """What waits for a replay."""
        ...

    def advance(
        self, rights: NDArray[np.uint8], content: Content, horizon: float, retry: bool
    ) -> tuple[float, Misses | None]:
        """Run; return the time it took and the misses that stalled on the way.

        Parameters
        ----------
        rights : ndarray of uint8
            What the GPU finds in its page table, by slot (`Gpu.rights_at`).
        horizon : float
            Microseconds to run at most while it is not stalled.
        retry : bool
            A replay has happened: stalled accesses try again.
        """
        ...

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """Drop stalled accesses to cancelled pages; return whether there were any."""
        ...


def launch(va_space: VaSpace, kernel: Kernel, alone: bool = True) -> Wait:
    """Run a kernel to its end; returns None, or the reason why it was killed.

    A cancelled access kills its kernel: what has not run yet is not run. So does any fault of a GPU whose faults
    cannot be replayed: its channel is torn down. When it is not `alone`, other processors may take pages away at any
    time, and it must not run far ahead of them. Misses that nothing serves are an error (`Watchdog`).
    """
    gpu: Gpu = va_space.gpu
    engine, trace = gpu.engine, gpu.engine.trace
    start = engine.now
    yield from engine.pause(gpu.costs.launch)
    replays, killed, watchdog = gpu.replays, None, Watchdog(kernel, gpu)
    while not kernel.done:
        if gpu.cancelled or gpu.cancelled_all:
            reason = gpu.cancelled_all or next(iter(gpu.cancelled.values()))
            if kernel.cancel(set(gpu.cancelled), bool(gpu.cancelled_all)):
                killed = reason
                break
        retry, replays, stalled = replays != gpu.replays, gpu.replays, kernel.stalled
        # A single lane that tries again is not stalled any more, or runs no further.
        running = not stalled or (retry and kernel.lanes == 1)
        quiet = alone and running and gpu.fault_buffer.get == gpu.fault_buffer.put
        horizon = FOREVER if quiet else HORIZON
        spent, misses = kernel.advance(gpu.rights_at(engine.now), va_space.content, horizon, retry)
        if va_space.duplicates:
            for pages in gpu.written_late(va_space.content):
                settle_late(va_space, pages)
        if misses is not None:
            if not gpu.hal.replayable_faults and (killed := _mmu_fault(misses)):
                yield from engine.pause(spent + gpu.costs.interrupt)
                break
            watchdog.look(misses)
            _fault(gpu, misses)
        # When all that stalls has missed at the end of this run, nothing can concern the kernel before a replay.
        at_end = misses is not None and misses.delay[0] >= spent and (retry or not stalled)
        if spent and not (at_end and kernel.blocked):
            yield from engine.pause(spent)
        elif not kernel.done:
            stall = engine.now + spent
            if replays == gpu.replays:
                if gpu.module.fault_replay_policy in (BATCH_FLUSH, ONCE):
                    gpu.unwatched = gpu.bottom_half  # its replay comes behind all that it pushes
                yield gpu.replay_event
                gpu.unwatched = None
            if engine.now < stall:
                yield engine.env.at(stall)
            else:
                trace.span("gpu_stall", "gpu", stall, engine.now, value=kernel.stalled)
    gpu.cancelled.clear()
    gpu.cancelled_all = ""
    status = f"killed: {killed}" if killed else "ok"
    trace.span("kernel", "gpu", start, engine.now, cause=kernel.name, status=status)
    return killed


def _mmu_fault(misses: Misses) -> str | None:
    """Return why misses are the end of a context: before Pascal nothing replays them, and UVM does not even see them.

    Prefetch instructions are dropped.
    """
    pages = np.asarray(misses.page)[np.asarray(misses.access) != PREFETCH]
    return f"InvalidAddress, MMU fault at {int(pages[0]) << PAGE_SHIFT:#x}" if len(pages) else None


def _fault(gpu: Gpu, misses: Misses) -> None:
    """Write misses into the fault buffer as they arrive, one entry after the other."""
    if misses.prefetches and not gpu.prefetch_faults_enabled:
        misses = misses.without_prefetches()
    now, last, interval = gpu.engine.now, gpu.fault_buffer.last_time, gpu.costs.fault_interval
    arrival: Column
    if len(misses.page) == 1:
        arrival = [max(now + misses.delay[0], last) + interval]
    else:
        delay = misses.delay
        start = max(now + delay[0], last) if len(delay) == 1 else np.maximum(now + np.asarray(delay), last)
        arrival = start + _spacing(interval, len(misses.page))
    gpu.fault_buffer.write(arrival, misses.page, misses.access, misses.utlb)


@lru_cache(maxsize=1 << 8)
def _spacing(interval: float, count: int) -> NDArray[np.float64]:
    """Return how much later than the start each of `count` entries arrives."""
    return np.arange(1, count + 1) * np.float64(interval)
