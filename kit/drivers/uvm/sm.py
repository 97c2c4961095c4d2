"""The GPU side: streaming multiprocessors with many outstanding misses, uTLBs, stalls until replay.

A kernel is something that can `advance`: run as far as the page table lets it within a time
horizon, and say which accesses now miss. Misses of one uTLB on one page are merged before they
reach the fault buffer; an access that misses stalls until a replay wakes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.fault_buffer import Column
from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.types import PREFETCH, VaSpace
from kit.memory.physical.content import Content
from kit.sim.engine import Wait

__all__ = ["Kernel", "Misses", "StreamKernel", "launch"]

HORIZON = 20.0  # microseconds that running lanes advance at a time while others are stalled or being served
FOREVER = 1e12
NEVER = np.uint8(255)  # a right that no page gives


@dataclass
class Misses:
    """Accesses that fault, in order of arrival: page, access type, uTLB, delay after the call (microseconds).

    ``prefetches`` says that some may be prefetch instructions, which nobody waits for.
    """

    page: Column
    access: Column
    utlb: Column
    delay: Column
    prefetches: bool = False

    def without_prefetches(self) -> Misses:
        """Return the others: where prefetches do not fault, they are dropped."""
        keep = np.asarray(self.access) != PREFETCH
        return Misses(*(np.asarray(column)[keep] for column in (self.page, self.access, self.utlb, self.delay)))


class Kernel(Protocol):
    """What runs on the GPU."""

    name: str

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
            The GPU page table's rights by slot.
        horizon : float
            Microseconds to run at most while it is not stalled.
        retry : bool
            A replay has happened: stalled accesses try again.
        """
        ...

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """Drop stalled accesses to cancelled pages; return whether there were any."""
        ...


class StreamKernel:
    """Accesses of many threads as one stream, with a bounded number of misses outstanding.

    A massively threaded processor runs on past a miss until its miss slots are used up; a resident
    touch costs one gather and nothing else.

    Parameters
    ----------
    name : str
    slots : ndarray of int, shape (n,)
        Page-table slot of each access, -1 where nothing is mapped and never will be.
    pages : ndarray of int64, shape (n,)
        Virtual page number of each access.
    access : ndarray of int8, shape (n,)
        Access types.
    need : ndarray of uint8, shape (n,)
        Right that each access needs.
    lanes : int
        Misses that can be outstanding; one lane runs one access after the other.
    utlbs : int
        uTLBs that the lanes share.
    touch_us : float
        Time of one resident access, lanes overlapping.
    pause_us : float
        Pause after each access (single-thread programs that wait between touches).
    """

    def __init__(
        self, name: str, slots: NDArray[np.integer], pages: NDArray[np.int64], access: NDArray[np.int8],
        need: NDArray[np.uint8], lanes: int, utlbs: int, touch_us: float, pause_us: float = 0.0,
    ) -> None:  # fmt: skip
        self.name, self.slots, self.pages, self.access = name, slots, pages, access
        self.need = np.where(slots < 0, NEVER, need)
        self.lanes, self.utlbs = lanes, utlbs
        self.utlb = np.resize(np.arange(lanes, dtype=np.int32) % utlbs, len(slots))  # access after access, lane by lane
        self.cost_us = touch_us / lanes + pause_us
        self.position, self.count = 0, len(slots)
        self.waiting = np.zeros(0, dtype=np.int64)
        self.window = 4 * lanes
        self.write_at = np.flatnonzero(need > 1)  # accesses that write, their slots, and how many of them are behind
        self.write_slots, self.written = slots[self.write_at], 0
        prefetch = access == PREFETCH
        self.prefetch = prefetch if prefetch.any() else None  # instructions that do not wait for their data

    @property
    def stalled(self) -> int:
        """Lanes that wait for a replay."""
        return len(self.waiting)

    @property
    def blocked(self) -> bool:
        """See `Kernel.blocked`."""
        waiting = len(self.waiting)
        return waiting == self.lanes or (waiting > 0 and self.position == self.count)

    @property
    def done(self) -> bool:
        """Every access has been made."""
        return self.position == self.count and not len(self.waiting)

    def advance(
        self, rights: NDArray[np.uint8], content: Content, horizon: float, retry: bool
    ) -> tuple[float, Misses | None]:
        """See `Kernel.advance`."""
        missed: list[NDArray[np.int64]] = []
        spent, again = 0.0, 0
        if retry and len(self.waiting):
            spent = self._retry(rights, content)
            again = len(self.waiting)
            if again:
                missed.append(self.waiting)
        while self.position < self.count and len(self.waiting) < self.lanes and spent < horizon:
            spent += self._run_window(rights, content, missed)
        if not missed:
            return spent, None
        return spent, self._faults(missed[0] if len(missed) == 1 else np.concatenate(missed), again, spent)

    def _retry(self, rights: NDArray[np.uint8], content: Content) -> float:
        """Let stalled accesses try again; return the time of those that go through."""
        at = self.waiting
        slots, need = self.slots[at], self.need[at]
        hit = rights[slots] >= need
        self.waiting = at[~hit]
        content.write(slots[hit & (need > 1)])
        return (len(at) - len(self.waiting)) * self.cost_us

    def _run_window(self, rights: NDArray[np.uint8], content: Content, fresh: list[NDArray[np.int64]]) -> float:
        """Touch the next window of the stream, up to as many misses as lanes are free; return the time."""
        start, free = self.position, self.lanes - len(self.waiting)
        stop = min(start + self.window, self.count)
        miss = self._missing(rights, start, min(start + free, stop))
        if len(miss) < stop - start and not miss.all():  # else the first ones take all free lanes
            miss = self._missing(rights, start, stop)
        if not miss.any():
            self.window = min(2 * self.window, 1 << 18)
            self._write(stop, start, None, content)
            self.position = stop
            return (stop - start) * self.cost_us
        self.window = max(4 * self.lanes, 64)
        at = miss.nonzero()[0][:free] + start
        if len(at) == free:
            stop = int(at[-1]) + 1
        fresh.append(at)
        at = at if self.prefetch is None else at[~self.prefetch[at]]
        self.waiting = np.concatenate([self.waiting, at]) if len(self.waiting) else at
        self._write(stop, start, miss, content)
        self.position = stop
        return (stop - start - len(at)) * self.cost_us

    def _missing(self, rights: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.bool_]:
        """Return which accesses from `start` on, before `stop`, have not the right that they need."""
        return np.asarray(rights[self.slots[start:stop]] < self.need[start:stop])

    def _write(self, stop: int, start: int, miss: NDArray[np.bool_] | None, content: Content) -> None:
        """Accesses before `stop` have been made, less those that missed in the window from `start`."""
        first, self.written = self.written, int(self.write_at.searchsorted(stop))
        if first == self.written:
            return
        slots = self.write_slots[first : self.written]
        if miss is not None:
            slots = slots[~miss[self.write_at[first : self.written] - start]]
        content.write(slots)

    def _faults(self, missed: NDArray[np.int64], again: int, spent: float) -> Misses:
        """Merge misses of one uTLB on one page with the same access; those that tried again come first."""
        prefetches = self.prefetch is not None
        utlbs, pages = self.utlb[missed], self.pages[missed]
        delay = np.zeros(len(missed))
        delay[again:] = spent
        if (pages[1:] > pages[:-1]).all():  # each page once: nothing to merge
            return Misses(pages, self.access[missed], utlbs, delay, prefetches)
        key = (pages * self.utlbs + utlbs) * 8 + self.access[missed]
        order = np.argsort(key, kind="stable")
        head = np.ones(len(order), dtype=bool)
        head[1:] = key[order][1:] != key[order][:-1]
        first = np.sort(order[head])
        keep = missed[first]
        return Misses(self.pages[keep], self.access[keep], utlbs[first], delay[first], prefetches)

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """See `Kernel.cancel`."""
        dead = np.ones(len(self.waiting), dtype=bool)
        if not everything:
            dead = np.isin(self.pages[self.waiting], np.fromiter(pages, dtype=np.int64))
        self.waiting = self.waiting[~dead]
        return bool(dead.any())


def launch(va_space: VaSpace, kernel: Kernel, alone: bool = True) -> Wait:
    """Run a kernel to its end; returns None, or the reason why it was killed.

    A cancelled access kills its kernel: what has not run yet is not run. When it is not `alone`,
    other processors may take pages away at any time, and it must not run far ahead of them.
    """
    gpu: Gpu = va_space.gpu
    engine, trace = gpu.engine, gpu.engine.trace
    start = engine.now
    yield from engine.pause(gpu.costs.launch)
    replays, killed = gpu.replays, None
    while not kernel.done:
        if gpu.cancelled or gpu.cancelled_all:
            reason = gpu.cancelled_all or next(iter(gpu.cancelled.values()))
            if kernel.cancel(set(gpu.cancelled), bool(gpu.cancelled_all)):
                killed = reason
                break
        retry, replays, stalled = replays != gpu.replays, gpu.replays, kernel.stalled
        quiet = alone and not stalled and gpu.fault_buffer.get == gpu.fault_buffer.put
        horizon = FOREVER if quiet else HORIZON
        spent, misses = kernel.advance(gpu.table.rights, va_space.content, horizon, retry)
        if misses is not None:
            _fault(gpu, misses)
        # When all that stalls has missed at the end of this run, nothing can concern the kernel before a replay.
        at_end = misses is not None and misses.delay[0] >= spent and (retry or not stalled)
        if spent and not (at_end and kernel.blocked):
            yield from engine.pause(spent)
        elif not kernel.done:
            stall = engine.now + spent
            if replays == gpu.replays:
                yield gpu.replay_event
            if engine.now < stall:
                yield engine.env.at(stall)
            else:
                trace.span("gpu_stall", "gpu", stall, engine.now, value=kernel.stalled)
    gpu.cancelled.clear()
    gpu.cancelled_all = ""
    status = f"killed: {killed}" if killed else "ok"
    trace.span("kernel", "gpu", start, engine.now, cause=kernel.name, status=status)
    return killed


def _fault(gpu: Gpu, misses: Misses) -> None:
    """Write misses into the fault buffer as they arrive, one entry after the other."""
    if misses.prefetches and not gpu.prefetch_faults_enabled:
        misses = misses.without_prefetches()
    now, last, interval = gpu.engine.now, gpu.fault_buffer.last_time, gpu.costs.fault_interval
    arrival: Column
    if len(misses.page) == 1:
        arrival = [max(now + misses.delay[0], last) + interval]
    else:
        arrival = np.maximum(now + np.asarray(misses.delay), last) + interval * np.arange(1, len(misses.delay) + 1)
    gpu.fault_buffer.write(arrival, misses.page, misses.access, misses.utlb)
