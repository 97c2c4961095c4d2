"""Streams that fault: batches a second, and simulated time over wall-clock time."""

from __future__ import annotations

import resource
from typing import Any

from benchmarks.figure import Figure, timed
from kit.flows.cuda_demand_paging.flow import FLOW
from kit.flows.run import Run

__all__ = ["oversubscribed", "random", "sequential"]

GIB = 1 << 30


def sequential() -> list[Figure]:
    """1 GiB, cold, sequential, prefetch on, trace on: one miss at a time, then as many as the GPU keeps in flight."""
    found = []
    for words, lanes in (("one miss at a time", 1), ("all misses in flight", 0)):
        wall, run = _fastest(5, program="stream", buffer_bytes=GIB, lanes=lanes)
        batches, hardware = run.metrics["gpu_fault_groups"], run.metrics["kernel_us"] / 1e6
        beside = f"the aim; the modelled hardware takes {batches / hardware:,.0f}/s, {run.metrics['spans']:,} spans"
        found.append(Figure(f"1 GiB sequential, {words}", batches / wall, 10_000, "batches/s", True, beside))
        found.append(_against_hardware(f"1 GiB sequential, {words}", wall, run))
    return found


def random() -> list[Figure]:
    """20,000 random touches with memory for four fifths of the buffer: in a small one nearly every service evicts."""
    found = []
    for words, size in (("64 MiB", GIB // 16), ("1 GiB", GIB)):
        given = {"pattern": "random", "buffer_bytes": size, "touches": 20_000, "oversubscription": 1.25}
        wall, run = _fastest(3, program="stream", **given)
        found.append(_against_hardware(f"random at 125 % oversubscription, {words}", wall, run))
    return found


def oversubscribed() -> list[Figure]:
    """16 GiB of GPU memory, 20 GiB touched by the CPU, then by the GPU."""
    found: list[Run] = []
    parameters = FLOW.Parameters.check({"program": "stream", "buffer_bytes": 20 * GIB, "gpu_memory_bytes": 16 * GIB})
    wall = timed(lambda: found.append(FLOW.run(parameters)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    pages, lost = found[0].metrics["pages_checked"], found[0].metrics["lost_pages"]
    name = "20 GiB on a 16 GiB GPU, 4 KiB pages"
    return [
        Figure(name, wall, 30, "s", False, f"whole run and result; {pages:,} pages checked, {lost:,} lost"),
        Figure(name, peak, 2, "GB", False, f"most memory held; the pages' stamps are {16 * pages / 1e9:.2f} GB"),
    ]


def _fastest(times: int, **parameters: Any) -> tuple[float, Run]:
    """Return the seconds of the kernel stage, the fastest of several runs, and the last run's result."""
    walls = []
    for _ in range(times):
        session = FLOW.open(FLOW.Parameters.check(parameters))
        session.allocate().first_touch()
        walls.append(timed(session.kernel))
    return min(walls), session.finish()


def _against_hardware(name: str, wall: float, run: Run) -> Figure:
    simulated = run.metrics["kernel_us"] / 1e6
    beside = f"faster than the hardware: {simulated:.3f} s simulated in {wall:.3f} s"
    return Figure(name, simulated / wall, 1, "x hardware", True, beside)
