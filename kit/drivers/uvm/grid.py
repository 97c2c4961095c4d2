"""A grid of thread blocks: warps in flight on the SMs, each with its own loop over the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.grid_accesses import ELEMENT, GridAccesses, Shape
from kit.drivers.uvm.sm import Misses
from kit.drivers.uvm.types import READ, WRITE
from kit.memory.physical.content import Content
from kit.memory.table.pagetable import PageTable
from kit.sim.costs import Costs
from kit.sim.machine import Machine

__all__ = ["GridKernel"]

WARP: Final = 32
LINE: Final = 128  # bytes of a cache line


@dataclass(frozen=True)
class Stall:
    """Warps that missed together: on their loads or on their stores, and how long after the call."""

    lanes: NDArray[np.int64]
    storing: bool
    delay: float


class GridKernel:
    """A grid-stride loop, warp by warp.

    A warp's loads of one iteration are all issued before it waits; its stores follow when the loads
    have come back (`GridAccesses` keeps what has been made). Iterations on the same pages are folded
    into one step, which asks for each of its pages once: with fewer root chunks than arrays, where
    every iteration would fault again, a step still faults once for each page. Thread blocks are
    handed to SMs in order, as many at a time as fit, a new one when an old one ends.

    Parameters
    ----------
    late : tuple of int
        Input pages (virtual page numbers) whose first load reaches the fault buffer only after the
        first batch was fetched, and is flushed: an input, because no documented rule orders warps.
    seed : int
        Seed of the drift between warps.
    """

    def __init__(
        self, name: str, shape: Shape, table: PageTable, machine: Machine, costs: Costs,
        late: tuple[int, ...] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        self.rng, self.spread = np.random.default_rng([seed, 2]), float(machine["warp_spread"])
        self.interval = float(machine["fault_interval"])
        self.name, self.shape, self.late = name, shape, set(late)
        threads = min(shape.block, WARP)
        self.warps_per_cta = -(-shape.block // WARP)
        self.warps = self.warps_per_cta * shape.grid
        self.span = threads * ELEMENT  # bytes that a warp touches in one iteration
        self.stride = shape.grid * shape.block * ELEMENT
        self.bytes = shape.n * ELEMENT
        self.warps = min(self.warps, -(-self.bytes // self.span))
        self.fold = max(1, 4096 // self.stride) if 4096 % self.stride == 0 else 1
        per_sm = max(
            1, min(int(machine["max_ctas_per_sm"]), int(machine["max_threads_per_sm"]) // max(shape.block, WARP))
        )
        self.sms, self.utlbs = int(machine["sms"]), int(machine["tpcs"])
        self.lanes = min(self.warps, self.sms * per_sm * self.warps_per_cta)
        self.merge_load, self.merge_store = int(machine["load_merge_warps"]), int(machine["store_merge_warps"])
        hit, miss = float(costs.thread_hit), float(costs.thread_miss)
        lines = max(1.0, self.fold * self.span / LINE) if self.fold > 1 else 1.0
        self.step_us = self.fold * hit + lines * (miss - hit)
        self.bandwidth = float(machine["memory_bandwidth"])  # bytes in a microsecond
        self.accesses = GridAccesses(shape, table, self.lanes)
        self.next_warp = self.lanes
        self.warp = np.arange(self.lanes, dtype=np.int64)
        self.step = np.zeros(self.lanes, dtype=np.int64)
        self.asleep = np.zeros(self.lanes, dtype=bool)
        self.alive = np.ones(self.lanes, dtype=bool)
        self.progress = 0

    @property
    def stalled(self) -> int:
        """Warps that wait for a replay."""
        return int(self.asleep.sum())

    @property
    def blocked(self) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.blocked`."""
        return bool(self.asleep.any()) and not (self.alive & ~self.asleep).any()

    @property
    def done(self) -> bool:
        """Every warp has ended."""
        return not self.alive.any()

    def advance(
        self, rights: NDArray[np.uint8], content: Content, horizon: float, retry: bool
    ) -> tuple[float, Misses | None]:
        """See `kit.drivers.uvm.sm.Kernel.advance`."""
        spent = 0.0
        found: list[Stall] = []
        if retry:
            self.asleep[:] = False
        while spent < horizon:
            lanes = np.flatnonzero(self.alive & ~self.asleep)
            if not len(lanes):
                break
            spent += self._run(lanes, rights, content, horizon - spent, found, spent)
        return spent, self._faults(found) if found else None

    def _run(
        self, lanes: NDArray[np.int64], rights: NDArray[np.uint8], content: Content, left: float,
        found: list[Stall], spent: float,
    ) -> float:  # fmt: skip
        """Let runnable warps go up to a window of steps; return the time of the longest."""
        ahead = int(min(max(1, 8192 // len(lanes)), max(1, left // self.step_us)))
        start = self._offset(lanes)[:, None] + np.arange(ahead)[None, :] * self._advance_bytes
        inside = start < self.bytes
        loads = self.accesses.granted(lanes, rights, start, inside, READ)
        passed = loads & self.accesses.granted(lanes, rights, start, inside, WRITE)
        stop = np.where(passed.all(axis=1), ahead, passed.argmin(axis=1))
        self.accesses.passed(lanes, start, inside & (np.arange(ahead)[None, :] < stop[:, None]), content)
        self.step[lanes] += stop
        rows = np.arange(len(lanes))
        blocked = stop < ahead
        where = np.minimum(stop, ahead - 1)
        over = blocked & ~inside[rows, where]
        self._retire(lanes[over | (~blocked & (self._offset(lanes) >= self.bytes))])
        blocked &= ~over
        self.asleep[lanes[blocked]] = True
        storing = blocked & loads[rows, where]
        stuck = lanes[blocked]
        self.progress += int(stop.sum()) + self.accesses.wait(stuck, self._offset(stuck), rights, content)
        for kind, which in ((False, blocked & ~storing), (True, storing)):
            if which.any():
                found.append(Stall(lanes[which], kind, spent + float(stop[which].max()) * self.step_us))
        traffic = float(stop.sum()) * self.fold * self.span * len(self.shape.reads + self.shape.writes)
        return max(float(stop.max()) * self.step_us, traffic / self.bandwidth)

    @property
    def _advance_bytes(self) -> int:
        return self.stride * self.fold

    def _offset(self, lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Byte offset into the arrays of the present step of `lanes`; past the end when the loop is over."""
        return self.warp[lanes] * self.span + self.step[lanes] * self._advance_bytes

    def _retire(self, lanes: NDArray[np.int64]) -> None:
        """Warps at their end make room for the next ones."""
        more = min(len(lanes), self.warps - self.next_warp)
        self.warp[lanes[:more]] = np.arange(self.next_warp, self.next_warp + more)
        self.step[lanes[:more]] = 0
        self.next_warp += more
        self.alive[lanes[more:]] = False

    def _faults(self, found: list[Stall]) -> Misses:
        """Turn stalled warps into fault-buffer entries, merged per SM, page and access."""
        pages, kinds, sms, delays, turns = [], [], [], [], []
        for stall in found:
            kind, arrays = (WRITE, self.shape.writes) if stall.storing else (READ, self.shape.reads)
            for turn, address in enumerate(arrays):
                lanes = stall.lanes[~self.accesses.made(stall.lanes, kind, turn)]
                pages.append(self.accesses.pages(address, self._offset(lanes)))
                kinds.append(np.full(len(lanes), kind, dtype=np.int8))
                sms.append(self._merge_groups(lanes, stall.storing))
                delays.append(np.full(len(lanes), stall.delay))
                turns.append(lanes * len(arrays) + turn)
        page, group, delay = np.concatenate(pages), np.concatenate(sms), np.concatenate(delays)
        access, issue = np.concatenate(kinds), np.concatenate(turns)
        # Misses leave warp by warp, the loads of one warp together.
        issued = np.lexsort((issue, delay))
        page, group, delay, access = page[issued], group[issued], delay[issued], access[issued]
        key = (page * (1 << 24) + group) * 2 + (access == WRITE)
        order = np.argsort(key, kind="stable")
        head = np.ones(len(order), dtype=bool)
        head[1:] = key[order][1:] != key[order][:-1]
        keep = np.sort(order[head])
        if len(keep) > 1:  # warps drift apart: on their way to the fault buffer their misses mix
            drift = self.interval * np.arange(len(keep)) + self.spread * self.rng.random(len(keep))
            delay[keep] += drift
            keep = keep[np.argsort(delay[keep], kind="stable")]
        if self.late:
            late = np.isin(page[keep], np.fromiter(self.late, dtype=np.int64))
            self.late.clear()
            keep = keep[~late]
        sm = (group[keep] >> 8) % self.sms
        return Misses(page[keep], access[keep], sm % self.utlbs, delay[keep])

    def _merge_groups(self, lanes: NDArray[np.int64], storing: bool) -> NDArray[np.int64]:
        """SM of each warp, and which of its miss entries: one entry merges so many warps of a thread block."""
        warp = self.warp[lanes]
        sm = (warp // self.warps_per_cta) % self.sms
        entry = (warp % self.warps_per_cta) // (self.merge_store if storing else self.merge_load)
        return (sm << 8) | np.minimum(entry, 255)

    def cancel(self, pages: set[int], everything: bool) -> bool:
        """See `kit.drivers.uvm.sm.Kernel.cancel`."""
        if everything:
            hit = bool(self.asleep.any())
        else:
            lanes = np.flatnonzero(self.asleep)
            offset = self._offset(lanes)
            dead = np.zeros(len(lanes), dtype=bool)
            for address in self.shape.reads + self.shape.writes:
                page = self.accesses.pages(address, offset)
                dead |= np.isin(page, np.fromiter(pages, dtype=np.int64))
            hit = bool(dead.any())
        if hit:
            self.alive[:] = False
        return hit
