"""Hand-made runs: traces written row by row, so that the reports are tested without any driver."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.flows.run import Allocation, Integrity, Run
from kit.sim.machine import Machine
from kit.sim.trace import Trace

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096
BASE = 0x7F26_0000_0000
PC_INIT, PC_CHECK = 0x55D4_0000_1000, 0x55D4_0000_2000
GROWTH = [(0, 64), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024)]
"""KiB that each of the six faults of a sequentially touched 2 MiB block brings: first KiB, size."""


def _run(trace: Trace, device: str = "GPU", size: int = 8 * MIB, **parameters: Any) -> Run:
    machine = Machine("handmade", "A hand-made machine", "pascal", {}, {}, [{"id": "gpu0", "name": device}])
    conformance: Any = SimpleNamespace(steps_reached=[], steps_documented=[], violations=[])
    given = {"program": "vector_add", "grid": 1, "block": 1, **parameters}
    allocations = [Allocation("x", BASE, size)]
    metrics = {"kernel_us": 1.5, "cpu_faults": 3}
    names, proof = ("cuda_demand_paging", "handmade"), Integrity(0, 0)
    return Run(*names, given, metrics, trace, conformance, proof, machine, allocations, [])


def _times(count: int, total_us: float) -> list[float]:
    """Durations that add up to a recorded total: all equal, in whole nanoseconds, but the last."""
    each = int(total_us * 1000) // count / 1000
    return [each] * (count - 1) + [round(total_us - each * (count - 1), 3)]


def _copy_pair(trace: Trace, engine: str, va: int, kib: int, start: float, times: list[float]) -> float:
    """Append a fault's two copies: the faulting page, then what prefetch added."""
    source, target = (1, 2) if engine == "copy HtoD" else (2, 1)
    for offset, size, cause in ((0, PAGE, "coherence"), (PAGE, kib * KIB - PAGE, "prefetch")):
        end = start + times.pop(0)
        at, pages = va + offset, size // PAGE
        trace.span("UvmEventTypeMigration", engine, start, end, va=at, pages=pages, bytes=size, cause=cause)
        trace.move(start, end, at // PAGE, pages, source, target, cause)
        start = end
    return start


def _vector_add() -> Run:
    """y = x + y, 2**20 floats each, one GPU thread: counts of every posted run of it, times of an RTX 2060 Max-Q."""
    trace, blocks = Trace(), [BASE + i * 2 * MIB for i in range(4)]
    for block in blocks:
        for first, kib in GROWTH:
            va = block + first * KIB
            trace.span("UvmEventTypeCpuFault", "cpu", 1.0, 1.0, va=va, cause="write", value=PC_INIT)
            trace.move(1.0, 1.0, va // PAGE, kib * KIB // PAGE, 0, 1, "coherence")
    trace.span("kernel", "gpu", 100.0, 156_380.0, cause="add(int, float*, float*)")
    htod, groups, now = _times(48, 1421.896), _times(12, 2820.396), 200.0
    for pair in (blocks[0::2], blocks[1::2]):
        for first, kib in GROWTH:
            length = groups.pop(0)
            va, at = pair[0] + first * KIB, now + 10
            trace.span("UvmEventTypeGpuFault", "gpu", now, now + length, va=va, pages=2, cause="read", value=1)
            for block in pair:
                at = _copy_pair(trace, "copy HtoD", block + first * KIB, kib, at, htod)
            now += 400
    dtoh, now = _times(24, 656.822), 160_000.0
    for block in blocks[2:]:
        for first, kib in GROWTH:
            va = block + first * KIB
            trace.span("UvmEventTypeCpuFault", "cpu", now, now, va=va, cause="read", value=PC_CHECK)
            now = _copy_pair(trace, "copy DtoH", va, kib, now + 5, dtoh) + 10
    return _run(trace, "GeForce RTX 2060 with Max-Q Design")


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """Make a run of a trace: ``make_run(trace, device="Tesla V100-SXM2-16GB", **parameters)``."""
    return _run


@pytest.fixture(scope="session")
def vector_add_run() -> Run:
    return _vector_add()


@pytest.fixture
def empty_run() -> Run:
    return _run(Trace())


@pytest.fixture(scope="session")
def random_run() -> Run:
    """Events of every sort, in no order, many on the same addresses."""
    rng, trace = np.random.default_rng(7), Trace()
    for _ in range(3000):
        start, va = float(rng.uniform(0, 1e5)), BASE + int(rng.integers(0, 40)) * PAGE
        end, size = start + float(rng.uniform(0.5, 90)), int(rng.integers(1, 512)) * PAGE
        cause = str(rng.choice(["user", "coherence", "prefetch", "eviction"]))
        access = str(rng.choice(["read", "write", "atomic"]))
        match int(rng.integers(0, 5)):
            case 0:
                pc = int(rng.integers(1, 5)) << 20
                trace.span("UvmEventTypeCpuFault", "cpu", start, start, va=va, cause=access, value=pc)
            case 1:
                count = int(rng.integers(1, 300))
                trace.span("UvmEventTypeGpuFault", "gpu", start, end, va=va, cause=access, value=count)
            case 2:
                trace.span("service_fault_batch", "UVM GPU0 BH", start, end, va=va)
            case way:
                engine = "copy HtoD" if way == 3 else "copy DtoH"
                trace.span("UvmEventTypeMigration", engine, start, end, va=va, bytes=size, cause=cause)
    return _run(trace)
