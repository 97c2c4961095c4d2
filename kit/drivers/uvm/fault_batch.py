"""uvm_gpu_replayable_faults.c, fetching: raw entries become a sorted batch of representatives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.fault_buffer import FaultBuffer
from kit.drivers.uvm.gpu import Gpu
from kit.sim.engine import Thread
from kit.sim.trace import step

__all__ = ["FaultBatch", "fetch_fault_buffer_entries", "preprocess_fault_batch"]


@dataclass
class FaultBatch:
    """uvm_fault_service_batch_context_t: one batch, its columns sorted by address, strongest access first.

    ``instances`` counts the raw entries merged into a representative while fetching; same-page
    entries that remain after the sort are duplicates of the first.
    """

    id: int = 0
    page: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    access: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    access_mask: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    instances: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    utlb: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    fatal_type: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    first_time: float = 0.0
    num_cached: int = 0
    num_duplicates: int = 0
    num_invalid_prefetch: int = 0
    num_replays: int = 0
    has_throttled: bool = False
    fatal: dict[int, str] = field(default_factory=dict)
    tracker: float = 0.0
    copies_end: float = 0.0

    def __len__(self) -> int:
        return len(self.page)


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
    raw = buffer.read(limit)
    page, access = raw["page"].astype(np.int64), raw["access"].astype(np.int8)
    batch.first_time = float(raw["time"].min())
    coalesce = module.fault_coalesce and not (everything and not gpu.hal.cancel_by_address)
    keep, instances, mask = _merge(page, access, raw["utlb"], raw["fatal"]) if coalesce and limit > 1 else _all(access)
    batch.page, batch.access, batch.access_mask = page[keep], access[keep], mask
    batch.utlb = raw["utlb"][keep].astype(np.int32)
    batch.fatal_type, batch.instances = raw["fatal"][keep].astype(np.int8), instances
    thread.note(pages=len(keep), value=limit)


def _all(access: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    count = len(access)
    return np.arange(count), np.ones(count, dtype=np.int64), np.int32(1) << access.astype(np.int32)


def _merge(
    page: NDArray[np.int64], access: NDArray[np.int8], utlb: NDArray[np.generic], fatal: NDArray[np.generic]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Merge by the two documented rules; return representatives, instances and access masks.

    (a) with the last representative of the same uTLB when the page is the same; a stronger access
    makes the new entry the representative. (b) otherwise with the last representative of the batch
    when the page is the same and the access is not stronger. At most a batch of entries: the rules
    are sequential, so they are followed one by one.
    """
    last_of: dict[int, int] = {}  # uTLB -> group of its last representative
    heads: list[int] = []  # group -> representative's raw index
    counts: list[int] = []
    masks: list[int] = []
    last = -1
    rows = zip(page.tolist(), access.tolist(), utlb.tolist(), fatal.tolist(), strict=True)
    pages, kinds = page.tolist(), access.tolist()
    for index, (where, kind, source, bad) in enumerate(rows):
        group = -1
        if not bad:
            own = last_of.get(source, -1)
            if own >= 0 and pages[heads[own]] == where:
                group = own
                if kind > kinds[heads[own]]:
                    heads[own] = index
            elif last >= 0 and pages[heads[last]] == where and kind <= kinds[heads[last]]:
                group = last
        if group >= 0:
            counts[group] += 1
            masks[group] |= 1 << kind
            continue
        last = last_of[source] = len(heads)
        heads.append(index)
        counts.append(1)
        masks.append(1 << kind)
    return np.array(heads), np.array(counts, dtype=np.int64), np.array(masks, dtype=np.int32)


@step
def preprocess_fault_batch(gpu: Gpu, thread: Thread, batch: FaultBatch) -> None:
    """Sort by address, strongest access first; one channel, so one instance pointer (uvm_gpu_replayable_faults.c)."""
    count = len(batch)
    thread.charge(count * gpu.costs.preprocess_entry)
    if count > 1:
        order = np.lexsort((-batch.access, batch.page))
        for name in ("page", "access", "access_mask", "instances", "utlb", "fatal_type"):
            setattr(batch, name, getattr(batch, name)[order])


def flush(buffer: FaultBuffer, now: float, update_put: bool) -> int:
    """Throw entries away up to the cached PUT, or up to a fresh one; return how many."""
    if update_put:
        buffer.cached_put = buffer.arrived(now)
    dropped = buffer.cached_put - buffer.get
    buffer.advance(buffer.cached_put)
    return dropped
