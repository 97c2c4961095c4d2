"""The GPU side with a list of accesses: what kernels of many lanes and of one have in common, and the former.

A resident access costs one look at the page table. Accesses of neighbouring pages in a row, which most are, are looked
at without a gather.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.fault_buffer import Column
from kit.drivers.uvm.sm import Misses
from kit.drivers.uvm.types import PREFETCH
from kit.memory.columns import count_below
from kit.memory.physical.content import Content

__all__ = ["Stream", "StreamKernel"]

NEVER: Final = np.uint8(255)  # a right that no page gives
NOTHING: Final = np.zeros(0, dtype=np.int64)


class Stream:
    """Accesses in order, and how far they have been made.

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
    cost_us : float
        Time that a resident access takes of the whole kernel's.
    """

    def __init__(
        self, name: str, slots: NDArray[np.integer], pages: NDArray[np.int64], access: NDArray[np.int8],
        need: NDArray[np.uint8], cost_us: float,
    ) -> None:  # fmt: skip
        self.name, self.pages, self.access, self.cost_us = name, pages, access, cost_us
        # 32 bits are enough below 8 TiB: half as many bytes to read for each touch.
        narrow = slots.max(initial=0) <= np.iinfo(np.int32).max
        self.slots: NDArray[np.signedinteger] = np.ascontiguousarray(slots, np.int32 if narrow else np.int64)
        self.need = np.where(slots < 0, NEVER, need)
        self.position, self.count = 0, len(slots)
        # How often, up to each access, the next page was not the next access's: equal numbers mean neighbours.
        self.jumps = np.zeros(self.count, dtype=np.int32)
        jump = (np.diff(slots) != 1) | (np.diff(pages) != 1) | (slots[:-1] < 0)
        np.cumsum(jump, out=self.jumps[1:])
        writes = need > 1
        self.writes = np.zeros(self.count + 1, dtype=np.int32)  # how many of the accesses before each one write
        np.cumsum(writes, out=self.writes[1:])
        self.write_at = writes.nonzero()[0]
        self.write_slots = self.slots[self.write_at]

    def neighbours(self, start: int, stop: int) -> bool:
        """Whether accesses from `start` on, before `stop`, are of neighbouring pages in a row."""
        return self.jumps.item(start) == self.jumps.item(stop - 1) and self.slots.item(start) >= 0

    def missing(self, rights: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.bool_]:
        """Return which accesses from `start` on, before `stop`, have not the right that they need."""
        if self.neighbours(start, stop):
            first = self.slots.item(start)
            found = rights[first : first + stop - start]
        else:
            found = rights[self.slots[start:stop]]
        return np.less(found, self.need[start:stop])

    def granted(self, rights: NDArray[np.uint8], start: int, stop: int) -> bool:
        """Whether all accesses from `start` on, before `stop`, have the right that they need."""
        if self.neighbours(start, stop):
            return not self.missing(rights, start, stop).any()
        return not count_below(rights, self.slots[start:stop], self.need[start:stop])

    def wrote(self, start: int, stop: int, content: Content, miss: NDArray[np.bool_] | None = None) -> None:
        """Accesses from `start` on, before `stop`, have been made, less those that `miss` marks."""
        first, last = self.writes.item(start), self.writes.item(stop)
        if first == last:
            return
        slots = self.write_slots[first:last]
        if miss is not None:
            slots = slots[~miss[self.write_at[first:last] - start]]
        content.write(slots)


class StreamKernel(Stream):
    """Accesses of many threads as one stream, with a bounded number of misses outstanding.

    A massively threaded processor runs on past a miss until its miss slots are used up; a resident
    touch costs one gather and nothing else.

    Parameters
    ----------
    name, slots, pages, access, need
        As in `Stream`.
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
        super().__init__(name, slots, pages, access, need, touch_us / lanes + pause_us)
        self.lanes, self.utlbs = lanes, utlbs
        self.utlb = np.resize(np.arange(lanes, dtype=np.int32) % utlbs, len(slots))  # access after access, lane by lane
        self.waiting, self.window = NOTHING, 4 * lanes
        prefetch = access == PREFETCH
        self.prefetch = prefetch if prefetch.any() else None  # instructions that do not wait for their data

    @property
    def stalled(self) -> int:
        """Lanes that wait for a replay."""
        return len(self.waiting)

    @property
    def progress(self) -> int:
        """See `kit.drivers.uvm.sm.Kernel.progress`."""
        return self.position - self.stalled

    @property
    def blocked(self) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.blocked`."""
        waiting = len(self.waiting)
        return waiting == self.lanes or (waiting > 0 and self.position == self.count)

    @property
    def done(self) -> bool:
        """Every access has been made."""
        return self.position == self.count and not len(self.waiting)

    def advance(
        self, rights: NDArray[np.uint8], content: Content, horizon: float, retry: bool
    ) -> tuple[float, Misses | None]:
        """See `kit.drivers.uvm.sm.Kernel.advance`."""
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
        at, count, chosen = self.waiting, len(self.waiting), _run(self.waiting)
        if isinstance(chosen, slice):
            miss = self.missing(rights, chosen.start, chosen.stop)
            failed = int(np.count_nonzero(miss))
            if failed < count:
                self.wrote(chosen.start, chosen.stop, content, miss if failed else None)
        else:
            slots, need = self.slots[at], self.need[at]
            miss = rights[slots] < need
            failed = int(np.count_nonzero(miss))
            content.write(slots[~miss & (need > 1)])
        self.waiting = at if failed == count else at[miss.nonzero()[0]] if failed else NOTHING
        return (count - failed) * self.cost_us

    def _run_window(self, rights: NDArray[np.uint8], content: Content, fresh: list[NDArray[np.int64]]) -> float:
        """Touch the next window of the stream, up to as many misses as lanes are free; return the time."""
        start, free = self.position, self.lanes - len(self.waiting)
        stop = min(start + self.window, self.count)
        if self.window > 4 * self.lanes and self.granted(rights, start, stop):  # as all of the window before
            return self._pass(start, stop, content)
        look = min(start + free, stop)
        miss = self.missing(rights, start, look)
        missed = int(np.count_nonzero(miss))
        if missed < look - start and look < stop:  # else the first ones take all free lanes
            miss = self.missing(rights, start, stop)
            missed = int(np.count_nonzero(miss))
        if not missed:
            return self._pass(start, stop, content)
        self.window = max(4 * self.lanes, 64)
        at = miss.nonzero()[0][:free] + start
        if len(at) == free:
            stop = at.item(-1) + 1
        first = at.item(0)
        if stop - first == len(at):  # those before have been made, and none after
            self.wrote(start, first, content)
        else:
            self.wrote(start, stop, content, miss)
        fresh.append(at)
        at = at if self.prefetch is None else at[~self.prefetch[at]]
        self.waiting = np.concatenate([self.waiting, at]) if len(self.waiting) else at
        self.position = stop
        return (stop - start - len(at)) * self.cost_us

    def _pass(self, start: int, stop: int, content: Content) -> float:
        """All accesses of a window have been made; return the time."""
        self.window = min(2 * self.window, 1 << 18)
        self.wrote(start, stop, content)
        self.position = stop
        return (stop - start) * self.cost_us

    def _faults(self, missed: NDArray[np.int64], again: int, spent: float) -> Misses:
        """Merge misses of one uTLB on one page with the same access; those that tried again come first."""
        prefetches, count, chosen = self.prefetch is not None, len(missed), _run(missed)
        utlbs, pages = self.utlb[chosen], self.pages[chosen]
        delay: Column = [spent if again == 0 else 0.0]
        if 0 < again < count:
            delay = np.full(count, spent)
            delay[:again] = 0.0
        if np.count_nonzero(pages[1:] > pages[:-1]) == count - 1:  # each page once: nothing to merge
            return Misses(pages, self.access[chosen], utlbs, delay, prefetches)
        key = (pages * self.utlbs + utlbs) * 8 + self.access[missed]
        order = np.argsort(key, kind="stable")
        head = np.ones(len(order), dtype=bool)
        head[1:] = key[order][1:] != key[order][:-1]
        first = np.sort(order[head])
        keep = missed[first]
        return Misses(
            self.pages[keep], self.access[keep], utlbs[first], delay[first] if len(delay) > 1 else delay, prefetches
        )

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.cancel`."""
        dead = np.ones(len(self.waiting), dtype=bool)
        if not everything:
            dead = np.isin(self.pages[self.waiting], np.fromiter(pages, dtype=np.int64))
        self.waiting = self.waiting[~dead]
        return bool(dead.any())


def _run(at: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Return ascending numbers as a slice where there is no gap between them: a slice takes without a gather."""
    first, last = at.item(0), at.item(-1)
    return slice(first, last + 1) if last - first == len(at) - 1 else at
