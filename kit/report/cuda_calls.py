"""The CUDA runtime calls that a run's program made, as CUPTI records them: taken from the spans that they left.

A call is here when it reached the driver. The runtime library's own time is no documented step, so a launch takes none
unless the driver moves ranges for it (before Pascal), and a program waits in `cudaDeviceSynchronize` from its launch,
or from the last page that it touched meanwhile, to the kernel's end. Nothing frees memory before the run ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kit.report.cupti import Kernel, kernels
from kit.report.events import COLUMN, nanoseconds, picked

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["RuntimeCall", "runtime_calls"]

_MALLOC, _PREFETCH, _ADVISE = "cudaMallocManaged_v6000", "cudaMemPrefetchAsync_v8000", "cudaMemAdvise_v8000"
_LAUNCH, _SYNCHRONIZE = "cudaLaunchKernel_v7000", "cudaDeviceSynchronize_v3020"
_ENTRIES = {
    "uvm_mmap": _MALLOC,
    "uvm_api_migrate": _PREFETCH,
    "uvm_api_enable_read_duplication": _ADVISE,
    "uvm_api_set_preferred_location": _ADVISE,
    "uvm_api_set_accessed_by": _ADVISE,
    # What the library adds to a call on a GPU without page faults.
    "uvm_api_set_range_group": "",
    "uvm_api_prevent_migration_range_groups": _LAUNCH,
    "uvm_api_allow_migration_range_groups": _SYNCHRONIZE,
}
_FAULTS = {"uvm_vm_fault": 1, "UvmEventTypeCpuFault": 2}
_ILLEGAL_ADDRESS = 700  # cudaErrorIllegalAddress: what the wait for a kernel returns that a fatal fault has ended


@dataclass(frozen=True)
class RuntimeCall:
    """One call: CUPTI's name with its version, nanoseconds, cudaError_t, and the kernel that it launched."""

    name: str
    start: int
    end: int
    result: int = 0
    kernel: Kernel | None = None


def runtime_calls(run: Run) -> list[RuntimeCall]:
    """Return the program's calls by start time; its one thread makes one at a time."""
    entries = list(_ENTRIES)
    rows, code = picked(run.trace, {step: at for at, step in enumerate(entries, start=1)})
    starts, ends = nanoseconds(rows[:, COLUMN["start"]]), nanoseconds(rows[:, COLUMN["end"]])
    calls: list[RuntimeCall] = []
    before: list[int] = []  # starts of what the library did before launches
    after: dict[int, int] = {}  # ends of what it did after kernels, by start
    found = zip(starts.tolist(), ends.tolist(), (code - 1).tolist(), rows[:, COLUMN["parent"]].tolist(), strict=True)
    for start, end, at, parent in sorted(found):
        name = _ENTRIES[entries[at]]
        if parent >= 0:
            continue  # the driver's own, inside another call
        if name == _LAUNCH:
            before.append(start)
        elif name == _SYNCHRONIZE:
            after[start] = end
        elif name:
            calls.append(RuntimeCall(name, start, end))
        elif calls:
            calls[-1] = replace(calls[-1], end=end)
    calls += _launches(run, before, after)
    return sorted(calls, key=lambda call: (call.start, call.end))


def _launches(run: Run, before: list[int], after: dict[int, int]) -> list[RuntimeCall]:
    """Return, for each kernel, the launch and the wait for its end."""
    rows, _ = picked(run.trace, _FAULTS)
    begun, over = nanoseconds(rows[:, COLUMN["start"]]), nanoseconds(rows[:, COLUMN["end"]])
    calls: list[RuntimeCall] = []
    executed = kernels(run)
    for number, kernel in enumerate(executed):
        start = before[number] if number < len(before) else kernel.start
        calls.append(RuntimeCall(_LAUNCH, start, kernel.start, kernel=kernel))
        beside = over[(begun >= kernel.start) & (begun < kernel.end)]
        waits = max(kernel.start, int(beside.max())) if len(beside) else kernel.start
        killed = number == len(executed) - 1 and any("fatal GPU fault" in error for error in run.errors)
        end = max(after.get(kernel.end, kernel.end), waits)
        calls.append(RuntimeCall(_SYNCHRONIZE, waits, end, _ILLEGAL_ADDRESS if killed else 0))
    return calls
