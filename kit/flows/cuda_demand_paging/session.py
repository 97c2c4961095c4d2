"""A session: one program on one machine, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.migrate import uvm_api_migrate
from kit.drivers.uvm.module import ModuleParameters
from kit.drivers.uvm.policy import (
    uvm_api_enable_read_duplication,
    uvm_api_set_accessed_by,
    uvm_api_set_preferred_location,
)
from kit.drivers.uvm.range_group import (
    uvm_api_allow_migration_range_groups,
    uvm_api_prevent_migration_range_groups,
    uvm_api_set_range_group,
)
from kit.drivers.uvm.replayable_faults import start_bottom_half
from kit.drivers.uvm.sm import launch
from kit.drivers.uvm.types import CPU, GPU, VaSpace
from kit.drivers.uvm.va_space import uvm_mmap
from kit.errors import DriverError, ParameterError
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.cuda_demand_paging.programs import PAGE, Accesses, program
from kit.flows.cuda_demand_paging.result import integrity, metrics
from kit.flows.documented import Documented
from kit.flows.run import Allocation, Run
from kit.memory.access import touch
from kit.memory.costs import make_costs
from kit.memory.mm import Mm
from kit.memory.pages import PhysicalMemory
from kit.sim.engine import Engine, Wait
from kit.sim.machine import load_machine

__all__ = ["STAGES", "Session"]

BLOCK = 2 << 20
TURN = 32  # CPU touches between looks at what the GPU does meanwhile
STAGES = ("allocate", "first_touch", "kernel", "read_back")
Progress = Callable[[float, str], None]


class Session:
    """The flow as an object with one method a stage; each returns the session.

    Parameters
    ----------
    parameters : CudaParameters
    scenario : str
        Name of the scenario, for the report.
    """

    def __init__(self, parameters: CudaParameters, scenario: str = "") -> None:
        self.parameters, self.scenario = parameters, scenario
        self.machine = load_machine(parameters.machine)
        self.program = program(parameters)
        self.engine = Engine(parameters.seed, parameters.jitter)
        names = {f.name for f in fields(ModuleParameters)}
        self.module = ModuleParameters(**{n: v for n, v in parameters.model_dump().items() if n in names})
        self.gpu = Gpu(
            self.engine, self.machine, self.module, self._gpu_memory(), parameters.payload_bytes,
            parameters.fault_buffer_entries,
        )  # fmt: skip
        frames = int(self.machine["host_memory_bytes"]) // PAGE
        host = PhysicalMemory(self.engine, frames, payload_bytes=parameters.payload_bytes)
        self.va_space = VaSpace(self.engine, self.module, Mm(host, self.engine, make_costs()), self.gpu)
        self.cpu = self.engine.thread("cpu")
        self.allocations: list[Allocation] = []
        self.stages: list[tuple[str, float, float]] = []
        self.errors: list[str] = []
        self.wall_s = 0.0
        if self.gpu.hal.replayable_faults:
            start_bottom_half(self.gpu)

    def allocate(self) -> Session:
        """Call cudaMallocManaged for every array, and give advice; no page exists anywhere afterwards."""
        return self._stage("allocate", self._allocate())

    def first_touch(self) -> Session:
        """The CPU's accesses before the launch."""
        return self._stage("first_touch", self._first_touch())

    def kernel(self) -> Session:
        """Prefetch calls, launches, synchronisation."""
        return self._stage("kernel", self._kernels())

    def read_back(self) -> Session:
        """The CPU's accesses after the launch."""
        return self._stage("read_back", self._touch(self.program.read_back(self.allocations)))

    def finish(self, progress: Progress | None = None) -> Run:
        """Run the stages that have not run yet and return the result."""
        for name in STAGES[len(self.stages) :]:
            if progress is not None:
                progress(STAGES.index(name) / len(STAGES), name)
            getattr(self, name)()
        if progress is not None:
            progress(1.0, "done")
        return self.run

    @property
    def run(self) -> Run:
        """The result so far."""
        trace = self.engine.trace
        conformance = Documented.load("cuda_demand_paging").check(trace)
        checked = integrity(self.va_space)
        return Run(
            "cuda_demand_paging", self.scenario, self.parameters.model_dump(), metrics(self, conformance, checked),
            trace, conformance, checked, self.machine, self.allocations, self.stages, self.wall_s, self.errors,
        )  # fmt: skip

    @property
    def why(self) -> str:
        """Say which counts of this program are exact and which depend on how warps are scheduled."""
        p = self.parameters
        if p.program == "vector_add" and p.grid > 1:
            return (
                "Many thread blocks run at once, and no source says whose miss reaches the fault buffer first. The kit "
                f"lets warps drift apart by up to {self.machine['warp_spread']:g} us, drawn from the seed: the bytes "
                "moved are exact, the number of copies and of fault groups varies from seed to seed, as it does from "
                "run to run on hardware."
            )
        return "The order of accesses is fixed by the program, so every count and every address below is exact."

    def _gpu_memory(self) -> int:
        p = self.parameters
        if not p.oversubscription:
            return p.gpu_memory_bytes or int(self.machine["gpu_memory_bytes"])
        working_set = sum(-(-size // PAGE) * PAGE for _, size in self.program.sizes)
        memory = int(working_set / p.oversubscription) // BLOCK * BLOCK
        if memory < BLOCK:
            most = (
                f"at most {working_set / BLOCK:.3g}: a working set of {working_set} B must leave one 2 MiB root chunk"
            )
            raise ParameterError("oversubscription", p.oversubscription, most)
        return memory

    def _stage(self, name: str, work: Wait) -> Session:
        due = (*STAGES, "none")[len(self.stages)]
        if name != due:
            raise ParameterError("stage", name, f"the next stage, {due}")
        began, start = time.perf_counter(), self.engine.now
        self.engine.run(self.engine.start(work))
        self.engine.trace.span("host_program", "cpu", start, self.engine.now, cause=name)
        self.stages.append((name, start, self.engine.now))
        self.wall_s += time.perf_counter() - began
        return self

    def _allocate(self) -> Wait:
        p, cpu = self.parameters, self.cpu
        cpu.now = self.engine.now
        for nbytes, members in self._ranges():
            if not self.gpu.hal.replayable_faults and self._populated() + nbytes > self._gpu_memory():
                why = "without GPU page faults, managed memory is limited by GPU memory"
                raise DriverError(12, "NV_ERR_NO_MEMORY", "uvm_api_set_range_group", why)
            va_range = uvm_mmap(self.va_space, cpu, nbytes, members[0][0], p.range_offset)
            self.allocations += [Allocation(name, va_range.first * PAGE + at, size) for name, size, at in members]
            if not self.gpu.hal.replayable_faults:
                yield from uvm_api_set_range_group(self.va_space, cpu, va_range)
        yield from self._advise("allocation")
        yield from cpu.sync()

    def _populated(self) -> int:
        return sum(r.pages for r in self.va_space.ranges) * PAGE

    def _ranges(self) -> list[tuple[int, list[tuple[str, int, int]]]]:
        """Pack allocations into ranges: (range bytes, [(name, bytes, offset in the range)])."""
        size = self.parameters.range_bytes
        packed: list[tuple[int, list[tuple[str, int, int]]]] = []
        used = 0
        for name, nbytes in self.program.sizes:
            whole = -(-nbytes // PAGE) * PAGE
            if not size:
                packed.append((whole, [(name, nbytes, 0)]))
                continue
            if whole > size:
                raise ParameterError(
                    "range_bytes", size, f"0, or at least {whole}: allocation {name} has {nbytes} bytes"
                )
            if not packed or used + whole > size:
                packed.append((size, []))
                used = 0
            packed[-1][1].append((name, nbytes, used))
            used += whole
        return packed

    def _first_touch(self) -> Wait:
        yield from self._touch(self.program.first_touch(self.allocations))
        yield from self._advise("first_touch")
        yield from self.cpu.sync()

    def _advise(self, when: str) -> Wait:
        p, cpu, space = self.parameters, self.cpu, self.va_space
        advice = p.advice if p.advice_when == when else "none"
        which = self.program.inputs if p.advice_arrays == "inputs" else range(len(self.allocations))
        processor = GPU if advice.endswith("_gpu") else CPU
        for array in [self.allocations[i] for i in which] if advice != "none" else []:
            first, pages = array.va // PAGE, -(-array.bytes // PAGE)
            if advice == "read_mostly":
                yield from uvm_api_enable_read_duplication(space, cpu, first, pages)
            elif advice.startswith("preferred"):
                yield from uvm_api_set_preferred_location(space, cpu, first, pages, processor)
            else:
                yield from uvm_api_set_accessed_by(space, cpu, first, pages, processor)

    def _touch(self, accesses: Accesses, together: bool = True) -> Wait:
        """CPU accesses; not `together`: everybody else runs in between."""
        cpu, base = self.cpu, (self.allocations[0].va // PAGE if self.allocations else 0)
        cpu.now = max(cpu.now, self.engine.now)
        step = len(accesses.page) if together else TURN
        for at in range(0, len(accesses.page), max(step, 1)):
            part = slice(at, at + step)
            pages = accesses.page[part] + base
            yield from touch(
                self.va_space.mm, cpu, pages, accesses.write[part], self.gpu.costs.cpu_touch_page, self._wrote
            )
            yield from cpu.sync()

    def _wrote(self, pages: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        if len(pages):
            self.va_space.content.write(self.va_space.slots(pages))

    def _kernels(self) -> Wait:
        p, cpu = self.parameters, self.cpu
        cpu.now = max(cpu.now, self.engine.now)
        kernels = self.program.kernels(self.allocations, self.gpu)
        if p.prefetch in ("to_gpu", "both"):
            which = self.program.inputs if p.prefetch_arrays == "inputs" else range(len(self.allocations))
            yield from self._prefetch(list(which), GPU)
        for kernel in kernels:
            yield from self._launch(kernel)
            if self.errors:
                break
        if p.prefetch in ("to_cpu", "both"):
            yield from self._prefetch(self.program.outputs, CPU)

    def _prefetch(self, which: list[int], destination: int) -> Wait:
        """Call cudaMemPrefetchAsync in the default stream: what follows waits for the copies."""
        end = 0.0
        if self.gpu.hal.replayable_faults:
            for index in which:
                array = self.allocations[index]
                pages = -(-array.bytes // PAGE)
                end = max(
                    end, (yield from uvm_api_migrate(self.va_space, self.cpu, array.va // PAGE, pages, destination))
                )
        self.cpu.now = max(self.cpu.now, end)
        yield from self.cpu.sync()

    def _launch(self, kernel: Any) -> Wait:
        env, lite = self.engine.env, not self.gpu.hal.replayable_faults
        if lite:
            yield from uvm_api_prevent_migration_range_groups(self.va_space, self.cpu)
            yield from self.cpu.sync()
        beside = self.program.during_kernel(self.allocations)
        running = env.process(launch(self.va_space, kernel, alone=not len(beside.page)))
        if len(beside.page):
            yield from self._touch(beside, together=False)
        killed = yield running
        self.cpu.now = max(self.cpu.now, self.engine.now)
        if killed:
            self.errors.append(f"kernel {kernel.name} killed by a fatal GPU fault: {killed}")
        if lite:
            yield from uvm_api_allow_migration_range_groups(self.va_space, self.cpu)
            yield from self.cpu.sync()
