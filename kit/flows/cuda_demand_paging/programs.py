"""The programs: what they allocate, what the CPU touches, what they launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.grid import GridKernel
from kit.drivers.uvm.grid_accesses import Shape
from kit.drivers.uvm.sm import Kernel
from kit.flows.cuda_demand_paging.accesses import (
    NOTHING,
    PAGE,
    Accesses,
    interleave,
    pages_of,
    stream_kernel,
    whole,
    with_stray,
)
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.cuda_demand_paging.traces import AccessTrace, read_trace, shipped_trace
from kit.flows.run import Allocation

__all__ = ["Program", "program"]


@dataclass
class Program:
    """A program under unified memory, before anything ran.

    ``sizes`` are its managed allocations; the methods are asked once those have addresses.
    """

    parameters: CudaParameters
    sizes: list[tuple[str, int]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=lambda: [0])
    outputs: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        """Decide sizes, inputs and outputs."""

    def first_touch(self, arrays: list[Allocation]) -> Accesses:
        """Return the CPU's accesses before the first launch: it writes the buffer, unless the GPU touches first."""
        return whole(arrays[0], True) if self.parameters.first_touch == "cpu" else NOTHING

    def kernels(self, arrays: list[Allocation], gpu: Gpu) -> list[Kernel]:
        """Return the kernels in order of launch."""
        return []

    def during_kernel(self, arrays: list[Allocation]) -> Accesses:
        """Return the CPU's accesses while the kernel runs."""
        return NOTHING

    def read_back(self, arrays: list[Allocation]) -> Accesses:
        """Return the CPU's accesses after the last launch."""
        return NOTHING


def program(parameters: CudaParameters) -> Program:
    """Return the program that `parameters` choose."""
    kinds: dict[str, type[Program]] = {
        "three_lines": ThreeLines, "vector_add": VectorAdd, "unit_touch": UnitTouch, "stream": Stream, "trace": Trace,
    }  # fmt: skip
    return kinds[parameters.program](parameters)


class ThreeLines(Program):
    """cudaMallocManaged, memset on the CPU, a kernel over all of it."""

    def __post_init__(self) -> None:
        self.sizes = [("data", self.parameters.buffer_bytes)]

    def kernels(self, arrays: list[Allocation], gpu: Gpu) -> list[Kernel]:
        """One kernel that writes every page."""
        accesses = with_stray(whole(arrays[0], True), self.parameters)
        return [stream_kernel("kernel(char*)", accesses, arrays[0].va // PAGE, gpu, 0)]

    def read_back(self, arrays: list[Allocation]) -> Accesses:
        """The CPU reads everything."""
        return whole(arrays[0], False)


class VectorAdd(Program):
    """out[i] = f(in[i], ...): NVIDIA's first example of unified memory, and its relatives."""

    def __post_init__(self) -> None:
        p = self.parameters
        names = {1: ["x"], 2: ["x", "y"], 3: ["a", "b", "c"]}.get(p.arrays, [f"a{i}" for i in range(p.arrays)])
        self.sizes = [(name, 4 * p.n) for name in names]
        self.outputs = list(range(p.arrays - p.outputs, p.arrays))
        updates = p.update == "yes" or (p.update == "auto" and p.arrays <= 2)
        self.inputs = [i for i in range(p.arrays) if updates or i not in self.outputs]

    def _pages(self, arrays: list[Allocation], which: list[int], together: bool) -> NDArray[np.int64]:
        base = arrays[0].va // PAGE
        columns = [pages_of(arrays[i], base) for i in which]
        if not columns:
            return np.zeros(0, dtype=np.int64)
        return interleave(columns) if together else np.concatenate(columns)

    def _initialised(self) -> list[int]:
        return list(range(self.parameters.arrays)) if self.parameters.init_arrays == "all" else self.inputs

    def first_touch(self, arrays: list[Allocation]) -> Accesses:
        """The CPU writes the arrays, unless the GPU does."""
        p = self.parameters
        if p.init != "cpu":
            return NOTHING
        together = p.init_order == "interleaved" or (p.init_order == "auto" and p.arrays == 2)
        return Accesses.of(self._pages(arrays, self._initialised(), together), True)

    def kernels(self, arrays: list[Allocation], gpu: Gpu) -> list[Kernel]:
        """An initialising kernel when asked for, then the launches."""
        p = self.parameters
        names = [a.name for a in arrays]
        made: list[Kernel] = []

        def grid(name: str, reads: list[int], writes: list[int], late: tuple[int, ...] = ()) -> Kernel:
            shape = Shape(p.n, p.grid, p.block, tuple(arrays[i].va for i in reads), tuple(arrays[i].va for i in writes))
            return GridKernel(name, shape, gpu.table, gpu.machine, gpu.costs, late, p.seed)

        if p.init == "gpu":
            made.append(grid(f"init(int, {', '.join(['float*'] * p.arrays)})", [], self._initialised()))
        late = tuple(arrays[0].va // PAGE + page for page in p.late_accesses)
        signature = f"add(int, {', '.join(['float*'] * len(names))})"
        made += [grid(signature, self.inputs, self.outputs, late if not i else ()) for i in range(p.repeats)]
        return made

    def read_back(self, arrays: list[Allocation]) -> Accesses:
        """The CPU checks the result."""
        p = self.parameters
        if p.checked == "none":
            return NOTHING
        outputs_only = p.checked == "outputs" or (p.checked == "auto" and p.arrays <= 2)
        which = self.outputs if outputs_only else list(range(p.arrays))
        if p.checked_elements:
            return self._ends(arrays, which, p.checked_elements)
        return Accesses.of(self._pages(arrays, which, True), False)

    def _ends(self, arrays: list[Allocation], which: list[int], count: int) -> Accesses:
        base = arrays[0].va // PAGE
        touched: list[int] = []
        for i in which:
            first, last = arrays[i].va, arrays[i].va + arrays[i].bytes
            for low, high in ((first, min(first + 4 * count, last)), (max(last - 4 * count, first), last)):
                touched += range(low // PAGE - base, (high - 1) // PAGE - base + 1)
        return Accesses.of(np.array(touched, dtype=np.int64), False)


class UnitTouch(Program):
    """The CPU writes a buffer, one GPU thread touches units of it with pauses, the CPU reads units back."""

    def __post_init__(self) -> None:
        self.sizes = [("buffer", self.parameters.buffer_bytes)]

    def _units(self, units: list[int]) -> NDArray[np.int64]:
        return np.array(units, dtype=np.int64) * (self.parameters.unit_bytes // PAGE)

    def first_touch(self, arrays: list[Allocation]) -> Accesses:
        """The CPU writes all bytes in order."""
        return whole(arrays[0], True)

    def kernels(self, arrays: list[Allocation], gpu: Gpu) -> list[Kernel]:
        """One thread, one access a unit."""
        accesses = with_stray(Accesses.of(self._units(self.parameters.touch_units), True), self.parameters)
        pause = gpu.costs.touch_pause
        return [stream_kernel("touch(char*)", accesses, arrays[0].va // PAGE, gpu, lanes=1, pause_us=pause)]

    def read_back(self, arrays: list[Allocation]) -> Accesses:
        """The units again, in the order asked for."""
        p = self.parameters
        units = p.read_units or {"reverse": p.touch_units[::-1], "forward": p.touch_units, "none": []}[p.readback]
        return Accesses.of(self._units(units), False)


class Stream(Program):
    """A synthetic access stream over one buffer."""

    def __post_init__(self) -> None:
        self.sizes = [("buffer", self.parameters.buffer_bytes)]

    @property
    def pages(self) -> int:
        """Pages of the buffer."""
        return -(-self.parameters.buffer_bytes // PAGE)

    def accesses(self) -> Accesses:
        """Return the stream; the same seed gives the same stream."""
        p, pages = self.parameters, self.pages
        count = p.touches or pages
        rng = np.random.default_rng(p.seed)
        if p.pattern == "sequential":
            page = np.arange(count) % pages
        elif p.pattern == "strided":
            # Every page once: one sweep with the stride, then the next sweep one page on.
            sweep = np.arange(count) % pages
            page = np.argsort(np.arange(pages) % min(p.stride_pages, pages), kind="stable")[sweep]
        elif p.pattern == "random":
            page = rng.integers(0, pages, count)
        else:
            page = rng.permutation(pages)[(rng.zipf(p.zipf_exponent, count) - 1) % pages]
        return Accesses.of(page, rng.random(count) < p.write_fraction)

    def kernels(self, arrays: list[Allocation], gpu: Gpu) -> list[Kernel]:
        """The stream, as often as asked."""
        p, base = self.parameters, arrays[0].va // PAGE
        accesses = with_stray(self.accesses(), p)
        ahead = -(-p.prefetch_ahead_bytes // PAGE)
        return [stream_kernel("stream(char*)", accesses, base, gpu, p.lanes, ahead=ahead) for _ in range(p.repeats)]

    def during_kernel(self, arrays: list[Allocation]) -> Accesses:
        """The CPU's share of the same pages, writing as often as the GPU does."""
        p = self.parameters
        rng = np.random.default_rng([p.seed, 1])
        page = np.arange(p.cpu_touches) % self.pages
        return Accesses.of(page, rng.random(p.cpu_touches) < p.write_fraction)


class Trace(Program):
    """A recorded program's accesses as the kernel's."""

    def __post_init__(self) -> None:
        p = self.parameters
        self.trace: AccessTrace = read_trace(Path(p.trace_file) if p.trace_file else shipped_trace())
        self.sizes = [("recorded", PAGE * len(self.trace.vpn))]

    def kernels(self, arrays: list[Allocation], gpu: Gpu) -> list[Kernel]:
        """The recorded stream; pages keep their order, gaps between them are closed."""
        p = self.parameters
        count = p.trace_limit or len(self.trace.index)
        accesses = Accesses.of(self.trace.index[:count], self.trace.write[:count])
        return [stream_kernel("recorded(char*)", accesses, arrays[0].va // PAGE, gpu, p.lanes)]
