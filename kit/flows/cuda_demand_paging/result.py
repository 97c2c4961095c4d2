"""Metrics and the content check of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.drivers.uvm.types import CPU, GPU, VaSpace
from kit.drivers.uvm.va_block_copy import block_settle
from kit.flows.run import Integrity
from kit.memory.pagemask import bools, selection

if TYPE_CHECKING:
    from kit.flows.cuda_demand_paging.session import Session
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
                    at = selection(held, block.pages)
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


def metrics(session: Session, conformance: Conformance, checked: Integrity) -> dict[str, float]:
    """Return flat names and numbers, all derived from the trace but the memory gauges."""
    trace, gpu = session.engine.trace, session.gpu
    column = trace.spans.column
    step, nbytes, actor, cause = column("step"), column("bytes"), column("actor"), column("cause")
    duration = column("end") - column("start")

    def of(name: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.asarray(step == trace.steps.ids.get(name, -1))

    copies = of("UvmEventTypeMigration")
    found: dict[str, float] = {"simulated_us": session.engine.now}
    for name, started, ended in session.stages:
        found[f"{name}_us"] = ended - started
    kernels = duration[of("kernel")]
    found["kernels"], found["kernel_us"] = len(kernels), float(kernels.sum())
    if len(kernels):
        found["kernel_min_us"], found["kernel_max_us"] = float(kernels.min()), float(kernels.max())
    for direction in ("HtoD", "DtoH"):
        which = copies & (actor == trace.actors.ids.get(f"copy {direction}", -1))
        key = direction.lower()
        found[f"{key}_count"], found[f"{key}_bytes"] = int(which.sum()), int(nbytes[which].sum())
        found[f"{key}_us"] = float(duration[which].sum())
    for why in ("coherence", "prefetch", "eviction", "user"):
        found[f"{why}_bytes"] = int(nbytes[copies & (cause == trace.causes.ids.get(why, -1))].sum())
    groups = of("UvmEventTypeGpuFault")
    found["cpu_faults"] = int(of("UvmEventTypeCpuFault").sum())
    found["gpu_fault_groups"], found["gpu_fault_us"] = int(groups.sum()), float(duration[groups].sum())
    found["gpu_faulting_pages"] = int(column("pages")[groups].sum())
    found["replays"], found["evictions"] = int(of("UvmEventTypeGpuFaultReplay").sum()), gpu.pmm.evictions
    found["faults_dropped"] = gpu.fault_buffer.dropped
    for name, event in (
        ("thrashing_pages", "ThrashingDetected"), ("throttles", "ThrottlingStart"), ("remote_maps", "MapRemote"),
        ("read_duplicates", "ReadDuplicate"), ("fatal_faults", "FatalFault"),
    ):  # fmt: skip
        found[name] = int(of(f"UvmEventType{event}").sum())
    found["host_peak_bytes"], found["gpu_used_bytes"] = session.va_space.host.used * 4096, _gpu_used(session)
    found["spans"], found["moves"] = len(trace.spans), len(trace.moves)
    found["steps_reached"], found["steps_documented"] = len(conformance.steps_reached), conformance.steps_documented
    found["pages_checked"], found["lost_pages"] = checked.pages_checked, checked.lost
    return found


def _gpu_used(session: Session) -> int:
    chunks = [c.pages for r in session.va_space.ranges for b in r.blocks.values() for c in b.gpu_chunks.values()]
    return sum(chunks) * 4096
