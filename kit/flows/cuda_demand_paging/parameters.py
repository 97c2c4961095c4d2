"""Parameters of the CUDA demand-paging flow."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import create_model

from kit.drivers.uvm.hal import FAMILIES
from kit.drivers.uvm.module import ModuleParameters
from kit.errors import ParameterError
from kit.flows.parameters import Parameters, parameter
from kit.sim.machine import load_machine

__all__ = ["PROGRAMS", "CudaParameters"]

PROGRAMS = ("three_lines", "vector_add", "unit_touch", "stream", "trace")
MIB = 1 << 20


def _driver_policy() -> dict[str, Any]:
    """The driver's own list of module parameters, as fields of the model."""
    return {
        f.name: (
            type(f.default),
            parameter(
                f.default, f.metadata["help"], unit=f.metadata["unit"], group="Driver policy",
                choices=f.metadata["choices"], documented=f.metadata["documented"], **f.metadata["bounds"],
            ),
        )
        for f in fields(ModuleParameters)
    }  # fmt: skip


if TYPE_CHECKING:
    _DriverPolicy = Parameters
else:
    _DriverPolicy = create_model("_DriverPolicy", __base__=Parameters, **_driver_policy())


class CudaParameters(_DriverPolicy):
    """Everything that a scenario of this flow may set.

    Driver parameters have their documented names without the ``uvm_perf_`` or ``uvm_`` prefix.
    """

    flow: ClassVar[str] = "cuda_demand_paging"

    program: str = parameter("vector_add", "what runs", choices=PROGRAMS)
    machine: str = parameter("gtx1080ti_pcie3", "machine profile", group="Machine")
    # vector_add
    n: int = parameter(1 << 20, "elements (4 B floats) in each array", programs=("vector_add",), ge=1, le=1 << 34)
    arrays: int = parameter(2, "managed arrays; 2: y = x + y, 3: c = a + b", programs=("vector_add",), ge=1, le=16)
    outputs: int = parameter(1, "arrays, from the last, that the kernel writes", programs=("vector_add",), ge=1, le=16)
    update: str = parameter(
        "auto", "whether outputs are also read; auto: with one or two arrays", choices=("auto", "yes", "no"),
        programs=("vector_add",),
    )  # fmt: skip
    grid: int = parameter(1, "thread blocks in the launch", programs=("vector_add",), ge=1, le=1 << 31)
    block: int = parameter(1, "threads in a block", programs=("vector_add",), ge=1, le=1024)
    init: str = parameter(
        "cpu", "who writes the arrays first", choices=("cpu", "gpu", "none"), programs=("vector_add",)
    )
    init_arrays: str = parameter(
        "inputs",
        "which arrays: those that the kernel reads, or all",
        choices=("inputs", "all"),
        programs=("vector_add",),
    )
    init_order: str = parameter(
        "auto", "element by element over the arrays, or array by array; auto: interleaved with two arrays",
        choices=("auto", "interleaved", "by_array"), programs=("vector_add",),
    )  # fmt: skip
    checked: str = parameter(
        "auto", "what the CPU reads at the end; auto: outputs with two arrays, else all",
        choices=("auto", "outputs", "all", "none"), programs=("vector_add",),
    )  # fmt: skip
    checked_elements: int = parameter(
        0, "elements read at either end of each array, 0: all of it", programs=("vector_add",), ge=0
    )
    prefetch: str = parameter(
        "none", "cudaMemPrefetchAsync calls around the kernel", choices=("none", "to_gpu", "to_cpu", "both"),
        programs=("three_lines", "vector_add", "stream", "trace"),
    )  # fmt: skip
    prefetch_arrays: str = parameter(
        "all", "what is prefetched to the GPU", choices=("all", "inputs"), programs=("vector_add",)
    )
    repeats: int = parameter(1, "kernel launches", programs=("vector_add", "stream"), ge=1, le=100_000)
    late_accesses: list[int] = parameter(
        [], "input pages, from the first array, whose load came too late for the first batch (a warp-scheduling input)",
        programs=("vector_add",),
    )  # fmt: skip
    # unit_touch
    buffer_bytes: int = parameter(
        2 * MIB,
        "size of the managed buffer",
        unit="B",
        programs=("three_lines", "unit_touch", "stream"),
        ge=1,
        le=1 << 46,
    )
    unit_bytes: int = parameter(65536, "size of a unit", unit="B", programs=("unit_touch",), ge=4096)
    touch_units: list[int] = parameter(
        [0, 1, 2, 4, 8, 16], "units that one GPU thread touches, with a pause between", programs=("unit_touch",)
    )
    readback: str = parameter(
        "reverse", "order in which the CPU reads the touched units", choices=("reverse", "forward", "none"),
        programs=("unit_touch",),
    )  # fmt: skip
    read_units: list[int] = parameter(
        [], "units that the CPU reads back, in this order; empty: as readback says", programs=("unit_touch",)
    )
    # stream and trace
    pattern: str = parameter(
        "sequential", "order of the touches", choices=("sequential", "strided", "random", "zipf"), programs=("stream",)
    )
    touches: int = parameter(0, "touches, 0: one a page", programs=("stream",), ge=0, le=1 << 33)
    stride_pages: int = parameter(16, "distance of strided touches", unit="pages", programs=("stream",), ge=1)
    write_fraction: float = parameter(0.3, "share of touches that write", programs=("stream",), ge=0, le=1)
    zipf_exponent: float = parameter(1.1, "skew of the zipf pattern", programs=("stream",), gt=1, le=8)
    lanes: int = parameter(
        0,
        "misses that the GPU keeps outstanding, 0: as many as the machine can",
        programs=("stream", "trace"),
        ge=0,
        le=1 << 20,
    )
    cpu_touches: int = parameter(
        0, "touches of the same pages by the CPU while the kernel runs", programs=("stream",), ge=0, le=1 << 24
    )
    first_touch: str = parameter(
        "cpu", "who touches the buffer first", choices=("cpu", "gpu"), programs=("three_lines", "stream", "trace")
    )
    trace_file: str = parameter(
        "", "recorded access trace, .npz or lackey text; empty: the shipped one", programs=("trace",)
    )
    trace_limit: int = parameter(0, "records used, 0: all", programs=("trace",), ge=0)
    stray_bytes: int = parameter(
        0, "bytes past the buffer's end at which the kernel makes one illegal access, 0: none",
        programs=("three_lines", "unit_touch", "stream"), unit="B", ge=0,
    )  # fmt: skip
    prefetch_ahead_bytes: int = parameter(
        0, "every touch is preceded by a prefetch instruction so far ahead of it, 0: none", programs=("stream",),
        unit="B", ge=0,
        le=1 << 40,
    )  # fmt: skip
    # memory
    range_bytes: int = parameter(
        0,
        "size of a managed range into which allocations are packed, 0: each allocation has its own",
        unit="B",
        group="Memory",
        ge=0,
        le=1 << 40,
    )
    range_offset: int = parameter(
        0, "where the first range starts in its 2 MiB block", unit="B", group="Memory", ge=0, lt=2 * MIB
    )
    gpu_memory_bytes: int = parameter(
        0, "GPU memory for managed data, 0: the machine's", unit="B", group="Memory", ge=0
    )
    oversubscription: float = parameter(0.0, "working set over GPU memory, 0: not set", group="Memory", ge=0, le=64)
    payload_bytes: int = parameter(
        8, "bytes carried for each page: 8 (a stamp) to 4096 (all of it)", unit="B", group="Memory",
        choices=(8, 64, 512, 4096),
    )  # fmt: skip
    advice: str = parameter(
        "none", "cudaMemAdvise on the arrays", group="Memory",
        choices=(
            "none", "read_mostly", "preferred_location_gpu", "preferred_location_cpu", "accessed_by_gpu",
            "accessed_by_cpu",
        ),
    )  # fmt: skip
    advice_when: str = parameter(
        "allocation", "when advice is given: at allocation, or after first touch", group="Memory",
        choices=("allocation", "first_touch"),
    )  # fmt: skip
    advice_arrays: str = parameter(
        "all", "which arrays get advice: all, or those that the kernel reads", group="Memory", choices=("all", "inputs")
    )
    fault_buffer_entries: int = parameter(
        0, "entries of the replayable fault buffer, 0: the machine's", group="Memory", ge=0, le=1 << 20
    )
    # run
    seed: int = parameter(0, "seed of streams and jitter", group="Run", ge=0)
    jitter: float = parameter(0.0, "latency jitter, as a share", group="Run", ge=0, le=10)

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        if self.oversubscription and self.gpu_memory_bytes:
            raise ParameterError(
                "oversubscription", self.oversubscription, "0 when gpu_memory_bytes is given (one decides the other)"
            )
        if self.fault_buffer_entries == 1:
            raise ParameterError("fault_buffer_entries", 1, "0, or at least 2 (one entry stays empty)")
        if not FAMILIES[load_machine(self.machine).architecture].replayable_faults:
            self._check_calls_before_pascal()
        if self.program == "unit_touch":
            self._check_units()
        if self.program == "vector_add" and self.outputs > self.arrays:
            raise ParameterError("outputs", self.outputs, f"at most arrays = {self.arrays}")

    def _check_calls_before_pascal(self) -> None:
        """Without page faults a GPU's concurrentManagedAccess is 0, which cudaMemPrefetchAsync and advice for it need.

        Other advice is taken, as by CUDA: read-mostly has no effect there.
        """
        invalid = f"none on {self.machine}: cudaErrorInvalidDevice where concurrentManagedAccess is 0, before Pascal"
        if self.prefetch != "none":
            raise ParameterError("prefetch", self.prefetch, invalid)
        if self.advice.endswith("_gpu"):
            raise ParameterError("advice", self.advice, invalid)

    def _check_units(self) -> None:
        if self.unit_bytes % 4096:
            raise ParameterError("unit_bytes", self.unit_bytes, "a multiple of 4096")
        last = (max(self.buffer_bytes, self.range_bytes) - 1) // self.unit_bytes
        for name, unit in [("touch_units", u) for u in self.touch_units] + [("read_units", u) for u in self.read_units]:
            if not 0 <= unit <= last:
                raise ParameterError(name, unit, f"0 to {last}: units of {self.unit_bytes} B in the range")
