"""What of a run is exact and what would come out otherwise on hardware or with another seed, in words."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kit.flows.cuda_demand_paging.parameters import CudaParameters
    from kit.flows.cuda_demand_paging.session import CudaSession

__all__ = ["exactness"]

_WIDTH = 88  # characters of a line: fits a notebook's output at any width that a notebook is read at
_JITTER = " Latencies are drawn from the seed as well (jitter), so times are those of this seed."
_LITE = (
    "This GPU cannot fault: what is copied when the kernel is launched and what the CPU faults back follows from the "
    "addresses alone, whatever the order of the threads. Every count and every address is exact and the same for "
    "every seed."
)
_GRID = (
    "Many thread blocks run at once, and no source says whose miss reaches the fault buffer first. The kit lets warps "
    "drift apart by up to {spread:g} us, drawn from the seed: the bytes that the program needs are exact, the number "
    "of copies and of fault groups is this seed's, as it varies from run to run on hardware."
)
_BLOCK = (
    "One thread block: few misses are outstanding at a time, and the program fixes their order. Every count and every "
    "address is exact and the same for every seed; how far warps drift apart, and with it the time of the kernel, is "
    "drawn from the seed."
)
_SERIAL = (
    "One access at a time, in the order that the program fixes: every count and every address is exact and the same "
    "for every seed."
)
_DRAWN = (
    "One access at a time, in the order of a list. {source} For the list that this seed gives every count and every "
    "address is what hardware would show."
)
_LIST = (
    "{source} The GPU keeps {lanes}, and they reach the fault buffer in the order of the list. "
    "Hardware promises no such order: which faults share a batch, and so the number of copies and of fault groups"
    "{more}, would vary there from run to run."
)
_NO_FAULT = (
    "No access of the kernel faulted in this run, so the order of its threads does not matter: every count and every "
    "address is exact."
)
_SEEDED = "The list of accesses is drawn from the seed: another seed touches other pages and gives other counts."
_WRITES = "The pages come in a fixed order; which touches write is drawn from the seed."
_FIXED = "The list of accesses is fixed."
_BESIDE = (
    " The CPU touches the same pages meanwhile: who of the two comes first each time is the kit's timing, and the "
    "counts with it."
)


def _source(p: CudaParameters) -> str:
    """Say where the list of accesses comes from."""
    if p.program == "stream" and p.pattern in ("random", "zipf"):
        return _SEEDED
    return _WRITES if p.program == "stream" and 0 < p.write_fraction < 1 else _FIXED


def exactness(session: CudaSession) -> str:
    """Return what of the session's run is exact and what depends on the seed or on scheduling, in lines of text."""
    p = session.parameters
    trace = session.engine.trace
    if not session.gpu.hal.replayable_faults:
        words = _LITE
    elif "kernel" in trace.steps.ids and "UvmEventTypeGpuFault" not in trace.steps.ids:
        words = _NO_FAULT
    elif p.program == "vector_add":
        words = _GRID if p.grid > 1 else _BLOCK if p.block > 1 else _SERIAL
        words = words.format(spread=session.machine["warp_spread"])
    elif p.program in ("stream", "trace") and p.lanes == 1:
        source = _source(p)
        words = _SERIAL if source == _FIXED else _DRAWN.format(source=source)
    elif p.program in ("stream", "trace", "three_lines"):
        source = _source(p)
        lanes = f"{p.lanes:,} misses outstanding" if p.lanes else "as many misses outstanding as this machine can"
        evicts = session.gpu_memory < sum(size for _, size in session.program.sizes)
        words = _LIST.format(source=source, lanes=lanes, more=", and what is evicted when" if evicts else "")
    else:
        words = _SERIAL
    words += _BESIDE if p.cpu_touches and p.program == "stream" else ""
    return fill(words + (_JITTER if p.jitter else ""), _WIDTH)
