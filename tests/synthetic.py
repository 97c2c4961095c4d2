"""Hand-made runs, independent of the simulator: what a sequential kernel over 2 MiB blocks looks like."""

from __future__ import annotations

from typing import Any

import numpy as np

from kit.flows.documented import Conformance
from kit.flows.run import Allocation, Integrity, Run
from kit.sim.trace import Trace

PAGE, BLOCK = 4096, 512
BASE = 0x7F00_0000_0000
GROWTH = (16, 16, 32, 64, 128, 256)  # pages that each fault on a block brings in: they add up to a block


def make_run(trace: Trace, allocations: list[Allocation], stages: list[tuple[str, float, float]], **more: Any) -> Run:
    """Return a run around a trace."""
    facts: dict[str, Any] = {
        "flow": "cuda_demand_paging", "scenario": "", "parameters": {}, "metrics": {},
        "conformance": Conformance([], 0, [], {}), "integrity": Integrity(0, 0), "machine": None,
    }  # fmt: skip
    return Run(trace=trace, allocations=allocations, stages=stages, **{**facts, **more})


def empty_run() -> Run:
    """Return a run in which nothing has happened yet."""
    return make_run(Trace(), [Allocation("x", BASE, 4 * BLOCK * PAGE)], [])


def sequential_run(blocks: int = 6, gpu_blocks: int = 4) -> Run:
    """Return a run of `blocks` 2 MiB blocks: first touch, migration in growing copies with eviction, read-back."""
    trace, t = Trace(), 20.0
    first = BASE // PAGE
    allocate = ("allocate", 0.0, t)
    for block in range(blocks):
        for at, count in _growth():
            va = (first + block * BLOCK + at) * PAGE
            trace.span("UvmEventTypeCpuFault", "cpu", t, t, va=va, cause="write", value=0x401000)
            trace.span("uvm_vm_fault", "cpu", t, t + 4)
            trace.move(t + 4, t + 4, first + block * BLOCK + at, count, 0, 1)
            t += 12
    touch = ("first_touch", 20.0, t)
    t, began = t + 30, t + 30
    resident: list[int] = []
    for block in range(blocks):
        for at, count in _growth():
            evict = resident.pop(0) if at == 0 and len(resident) == gpu_blocks else None
            t = _batch(trace, t, first, block, at, count, evict)
        resident.append(block)
    kernel = ("kernel", began, t)
    trace.span("kernel", "gpu", began, t)
    t, back = t + 30, t + 30
    for block in resident:
        trace.span("UvmEventTypeCpuFault", "cpu", t, t, va=(first + block * BLOCK) * PAGE, cause="read", value=0x401000)
        trace.span("uvm_vm_fault", "cpu", t, t + 60)
        _copy(trace, t + 4, 50, first + block * BLOCK, BLOCK, 2, 1, "coherence")
        t += 80
    stages = [allocate, touch, kernel, ("read_back", back, t)]
    for name, start, end in stages:
        trace.span("host_program", "cpu", start, end, cause=name)
    return make_run(trace, [Allocation("x", BASE, blocks * BLOCK * PAGE)], stages)


def _growth() -> list[tuple[int, int]]:
    return list(zip(np.cumsum((0, *GROWTH[:-1])).tolist(), GROWTH, strict=True))


def _batch(trace: Trace, t: float, first: int, block: int, at: int, count: int, evict: int | None) -> float:
    page = first + block * BLOCK + at
    length = 20 + count * 0.4 + (80 if evict is not None else 0)
    trace.span("gpu_stall", "gpu", t, t + length, value=32)
    trace.span("UvmEventTypeGpuFault", "gpu", t, t + length, va=page * PAGE, pages=1, cause="read", value=3)
    service = trace.span("uvm_parent_gpu_service_replayable_faults", "UVM GPU0 BH", t, t + length)
    trace.span("fetch_fault_buffer_entries", "UVM GPU0 BH", t, t + 4, parent=service)
    trace.span("preprocess_fault_batch", "UVM GPU0 BH", t + 4, t + 6, parent=service)
    batch = trace.span("service_fault_batch", "UVM GPU0 BH", t + 6, t + length - 2, parent=service)
    start = t + 10
    if evict is not None:
        trace.span("evict_root_chunk", "UVM GPU0 BH", start, start + 80, parent=batch)
        _copy(trace, start, 80, first + evict * BLOCK, BLOCK, 2, 1, "eviction")
        start += 80
    _copy(trace, start, count * 0.4, page, count, 1, 2, "coherence")
    return t + length + 6


def _copy(trace: Trace, t: float, length: float, page: int, count: int, src: int, dst: int, cause: str) -> None:
    actor = "copy HtoD" if dst == 2 else "copy DtoH"
    trace.span(
        "UvmEventTypeMigration", actor, t, t + length, va=page * PAGE, pages=count, bytes=count * PAGE, cause=cause
    )
    trace.move(t, t + length, page, count, src, dst, cause)


def random_run(moves: int, pages: int = 1 << 20, seed: int = 1) -> Run:
    """Return a run of `moves` random, consistent moves: every page goes from where it is to the other side."""
    rng = np.random.default_rng(seed)
    trace = Trace()
    first = BASE // PAGE
    where = np.zeros(pages // 16, dtype=np.int64)
    units = rng.integers(0, pages // 16, moves)
    rows = np.empty((moves, 7))
    for i, unit in enumerate(units.tolist()):
        src = where[unit]
        dst = 1 if src in (0, 2) else 2
        where[unit] = dst
        rows[i] = (i * 10.0, i * 10.0 + (0 if src == 0 else 6), first + unit * 16, 16, src, dst, 0)
    trace.moves.rows.put(rows)
    return make_run(trace, [Allocation("a", BASE, pages * PAGE)], [("kernel", 0.0, moves * 10.0)])
