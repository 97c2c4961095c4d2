"""uvm_gpu_replayable_faults.c, fetching: raw entries become a sorted batch of representatives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.fault_buffer import Column, FaultBuffer, plain
from kit.drivers.uvm.gpu import Gpu
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["FaultBatch", "fetch_fault_buffer_entries", "preprocess_fault_batch"]


class FaultBatch:
    """uvm_fault_service_batch_context_t: one batch, its columns sorted by address, strongest access first.

    ``instances`` counts the raw entries merged into a representative while fetching; same-page
    entries that remain after the sort are duplicates of the first. ``ascending`` holds pages and
    accesses as arrays when they came in that order, each page once.
    """

    ascending: tuple[NDArray[np.int64], NDArray[np.int8]] | None = None
    first_time = 0.0
    num_cached = 0
    num_duplicates = 0
    num_invalid_prefetch = 0
    num_replays = 0
    reported = 0  # faults that are in a group that tools have been told of
    has_throttled = False
    tracker = 0.0
    copies_end = 0.0

    def __init__(self) -> None:
        self.page: list[int] = []
        self.access: list[int] = []
        self.instances: list[int] = []
        self.utlb: Column = []
        self.fatal_type: list[int] = []
        self.fatal: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.page)

    def pick(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        utlb = plain(self.utlb)
        self.page = [self.page[row] for row in rows]
        self.access = [self.access[row] for row in rows]
        self.instances = [self.instances[row] for row in rows]
        self.utlb = [utlb[row] for row in rows]
        self.fatal_type = [self.fatal_type[row] for row in rows]


@step
def fetch_fault_buffer_entries(gpu: Gpu, thread: Thread, batch: FaultBatch, everything: bool = False) -> None:
    """Read raw entries up to the batch limit, merging duplicates on the way (uvm_gpu_replayable_faults.c).

    PUT is read from the GPU only when all entries up to the cached one are consumed. `everything`
    is FAULT_FETCH_MODE_ALL, in which Pascal does not coalesce.
    """
    buffer, module, costs = gpu.fault_buffer, gpu.module, gpu.costs
    if buffer.get == buffer.cached_put or everything:
        buffer.cached_put = buffer.arrived(thread.now)
    ready = buffer.cached_put - buffer.get
    limit = ready if everything else min(ready, module.fault_batch_count, buffer.entries)
    thread.charge(costs.fetch_batch + limit * costs.fetch_entry)
    batch.num_cached = limit
    if not limit:
        return
    time, *columns = buffer.read(limit)
    page, access, batch.utlb, fatal = columns
    batch.page, batch.access, batch.fatal_type = plain(page), plain(access), plain(fatal)
    batch.first_time = float(time[0])
    batch.instances = [1] * limit
    if isinstance(page, np.ndarray) and isinstance(access, np.ndarray) and _ascends(page):
        batch.ascending = page, access
    coalesce = module.fault_coalesce and not (everything and not gpu.hal.cancel_by_address)
    if limit > 1 and coalesce and batch.ascending is None and _may_merge(np.asarray(page), np.asarray(batch.utlb)):
        _merge(batch)
    thread.note(pages=len(batch.page), value=limit)


def _ascends(page: NDArray[np.int64]) -> bool:
    return bool(np.count_nonzero(page[1:] > page[:-1]) == len(page) - 1)


def _may_merge(page: NDArray[np.int64], utlb: NDArray[np.integer]) -> bool:
    """Whether an entry has the page of the one before it, in the batch or of its uTLB: without, nothing merges."""
    if (page[1:] == page[:-1]).any():
        return True
    order = utlb.argsort(kind="stable")
    page, utlb = page[order], utlb[order]
    return bool(((page[1:] == page[:-1]) & (utlb[1:] == utlb[:-1])).any())


def _merge(batch: FaultBatch) -> None:
    """Leave the representatives by the two documented rules, each with its number of instances.

    (a) with the last representative of the same uTLB when the page is the same; a stronger access
    makes the new entry the representative. (b) otherwise with the last representative of the batch
    when the page is the same and the access is not stronger. At most a batch of entries: the rules
    are sequential, so they are followed one by one.
    """
    last_of: dict[int, int] = {}  # uTLB -> its last representative
    heads: list[int] = []  # where in the batch each representative is
    counts: list[int] = []
    last, last_access = -1, 0  # the driver does not follow when the last representative is replaced under rule (a)
    pages, kinds, utlbs = batch.page, batch.access, plain(batch.utlb)
    for at, (page, access, utlb, fatal) in enumerate(zip(pages, kinds, utlbs, batch.fatal_type, strict=True)):
        found = -1
        if not fatal:
            own = last_of.get(utlb, -1)
            if own >= 0 and pages[heads[own]] == page:
                found = own
                if access > kinds[heads[own]]:
                    heads[own] = at
            elif last >= 0 and pages[heads[last]] == page and access <= last_access:
                found = last
        if found >= 0:
            counts[found] += 1
            continue
        last, last_access = len(heads), access
        last_of[utlb] = last
        heads.append(at)
        counts.append(1)
    batch.pick(heads)
    batch.instances = counts


@step
def preprocess_fault_batch(gpu: Gpu, thread: Thread, batch: FaultBatch) -> None:
    """Sort by address, strongest access first; one channel, so one instance pointer (uvm_gpu_replayable_faults.c)."""
    count = len(batch.page)
    thread.charge(count * gpu.costs.preprocess_entry)
    if batch.ascending is None and not _in_order(batch.page):
        rank = (np.array(batch.page, np.int64) << 3) - np.array(batch.access, np.int64)
        batch.pick(rank.argsort(kind="stable").tolist())


def _in_order(pages: Sequence[int]) -> bool:
    """Whether each page is above the one before."""
    before = -1
    for page in pages:
        if page <= before:
            return False
        before = page
    return True


def flush(buffer: FaultBuffer, now: float, update_put: bool) -> int:
    """Throw entries away up to the cached PUT, or up to a fresh one; return how many."""
    if update_put:
        buffer.cached_put = buffer.arrived(now)
    dropped = buffer.cached_put - buffer.get
    buffer.advance(buffer.cached_put)
    return dropped
