"""Metrics and the content check of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.drivers.uvm.types import CPU, GPU, VaSpace
from kit.drivers.uvm.va_block_copy import block_settle
from kit.flows.metrics import SpanColumns, conformance_metrics, integrity_metrics, time_metrics
from kit.flows.run import Integrity
from kit.memory.table.pagemask import bools, run_of

if TYPE_CHECKING:
    from kit.flows.cuda_demand_paging.session import CudaSession
    from kit.flows.documented import Conformance

__all__ = ["integrity", "metrics"]


def integrity(va_space: VaSpace) -> Integrity:
    """Compare every copy of every page that exists with what the program last wrote to it."""
    checked = lost = 0
    for va_range in va_space.ranges:
        for block in va_range.blocks.values():
            stamps = va_space.content.stamps[block.slot[GPU] : block.slot[GPU] + block.pages]
            good, nowhere = np.ones(block.pages, dtype=bool), block.all_pages
            for processor, pool in ((CPU, va_space.host), (GPU, va_space.gpu.frames)):
                held = block.resident[processor]
                if held:
                    block_settle(block, processor, held)
                    run = run_of(held)
                    at = bools(held, block.pages) if run is None else run
                    good[at] &= pool.intact(block.frames_at(processor, at), stamps[at])
                    good[at] &= block.frames[processor][at] >= 0
                    nowhere &= ~held
            checked += block.pages
            if nowhere:
                # A page that was written but is resident nowhere has lost its content.
                empty = bools(nowhere, block.pages) & (stamps == 0)
                good[bools(nowhere, block.pages) & ~empty] = False
                checked -= int(np.count_nonzero(empty))
            lost += block.pages - int(np.count_nonzero(good))
        # Writes that never reached a block at all would stay marked.
        lost += int(va_space.content.dirty[va_range.slot : va_range.slot + va_range.pages].sum())
    return Integrity(checked, lost)


def metrics(session: CudaSession, conformance: Conformance, checked: Integrity) -> dict[str, float]:
    """Return flat names and numbers, all derived from the trace but the memory gauges."""
    trace, gpu = session.engine.trace, session.gpu
    spans = SpanColumns(trace)
    duration, copies = spans.duration, spans.of("UvmEventTypeMigration")
    found = time_metrics(session)
    kernels = duration[spans.of("kernel")]
    found["kernels"], found["kernel_us"] = len(kernels), float(kernels.sum())
    if len(kernels):
        found["kernel_min_us"], found["kernel_max_us"] = float(kernels.min()), float(kernels.max())
    for direction in ("HtoD", "DtoH"):
        which, key = copies & spans.by(f"copy {direction}"), direction.lower()
        found[f"{key}_count"], found[f"{key}_bytes"] = int(which.sum()), spans.total("bytes", which)
        found[f"{key}_us"] = float(duration[which].sum())
    for why in ("coherence", "prefetch", "eviction", "user"):
        found[f"{why}_bytes"] = spans.total("bytes", copies & spans.because(why))
    groups = spans.of("UvmEventTypeGpuFault")
    found["cpu_faults"] = spans.count("UvmEventTypeCpuFault")
    found["gpu_fault_groups"], found["gpu_fault_us"] = int(groups.sum()), float(duration[groups].sum())
    found["gpu_faulting_pages"] = spans.total("pages", groups)
    found["replays"], found["evictions"] = spans.count("UvmEventTypeGpuFaultReplay"), gpu.pmm.evictions
    found["faults_dropped"] = gpu.fault_buffer.dropped
    for name, event in (
        ("thrashing_pages", "ThrashingDetected"), ("throttles", "ThrottlingStart"), ("remote_maps", "MapRemote"),
        ("read_duplicates", "ReadDuplicate"), ("fatal_faults", "FatalFault"),
    ):  # fmt: skip
        found[name] = spans.count(f"UvmEventType{event}")
    found["host_peak_bytes"], found["gpu_used_bytes"] = session.va_space.host.used * 4096, _gpu_used(session)
    return {**found, **conformance_metrics(trace, conformance), **integrity_metrics(checked)}


def _gpu_used(session: CudaSession) -> int:
    chunks = [c.pages for r in session.va_space.ranges for b in r.blocks.values() for c in b.gpu_chunks.values()]
    return sum(chunks) * 4096
