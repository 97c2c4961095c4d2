"""Resident touches: a kernel over mapped pages against one bare numpy gather over the same stream."""

from __future__ import annotations

import numpy as np

from benchmarks.figure import Figure, best, timed
from kit.drivers.uvm.sm import launch
from kit.drivers.uvm.stream import StreamKernel
from kit.flows.cuda_demand_paging.accesses import Accesses, stream_kernel
from kit.flows.cuda_demand_paging.flow import FLOW
from kit.flows.cuda_demand_paging.session import CudaSession

__all__ = ["measure"]

BUFFER = 1 << 30
TOUCHES = 1 << 24
REPEATS = 5


def measure() -> list[Figure]:
    """Return one figure for a stream that only reads, one for a stream that also writes."""
    session = FLOW.open(FLOW.Parameters.check({"program": "stream", "buffer_bytes": BUFFER, "prefetch": "to_gpu"}))
    session.allocate().first_touch().kernel()
    page = np.random.default_rng(0).integers(0, BUFFER // 4096, TOUCHES)
    writes = np.random.default_rng(1).random(TOUCHES) < 0.3
    reads = np.zeros(TOUCHES, dtype=bool)
    return [
        _figure(session, "resident touches, reads", Accesses.of(page, reads)),
        _figure(session, "resident touches, 30 % writes", Accesses.of(page, writes)),
    ]


def _figure(session: CudaSession, name: str, accesses: Accesses) -> Figure:
    base = session.allocations[0].va // 4096
    rights = session.gpu.table.rights.reshape(-1)
    slots = _kernel(session, accesses, base).slots.astype(np.intp)  # what numpy gathers by the fastest
    gather = TOUCHES / best(REPEATS, lambda: timed(lambda: rights[slots])) / 1e6
    touch = TOUCHES / best(REPEATS, lambda: _run(session, _kernel(session, accesses, base))) / 1e6
    beside = f"half of one bare gather of {TOUCHES:,} touches: {gather:,.4g} M/s"
    return Figure(name, touch, gather / 2, "M touches/s", True, beside)


def _kernel(session: CudaSession, accesses: Accesses, base: int) -> StreamKernel:
    return stream_kernel("touches", accesses, base, session.gpu, 0)


def _run(session: CudaSession, kernel: StreamKernel) -> float:
    """Launch and wait, as a session does; making the stream is not part of the touch."""
    engine = session.engine
    return timed(lambda: engine.run(engine.start(launch(session.va_space, kernel))))
