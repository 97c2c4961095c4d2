"""A session: one program on one machine, stage by stage."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

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
from kit.drivers.uvm.va_block_copy import block_settle
from kit.drivers.uvm.va_space import uvm_mmap
from kit.errors import DriverError
from kit.flows.cuda_demand_paging.accesses import PAGE, Accesses
from kit.flows.cuda_demand_paging.exactness import exactness
from kit.flows.cuda_demand_paging.layout import gpu_memory_bytes, packed_ranges
from kit.flows.cuda_demand_paging.parameters import CudaParameters
from kit.flows.cuda_demand_paging.programs import program
from kit.flows.cuda_demand_paging.result import integrity, metrics
from kit.flows.documented import Conformance
from kit.flows.run import Allocation, Integrity
from kit.flows.session import Session
from kit.memory.costs import make_costs
from kit.memory.faults.access import touch
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.sim.engine import Thread, Wait

__all__ = ["STAGES", "CudaSession"]

TURN = 32  # CPU touches between looks at what the GPU does meanwhile
STAGES = ("allocate", "first_touch", "kernel", "read_back")


class CudaSession(Session):
    """The flow as an object with one method a stage."""

    stages_of = STAGES
    parameters: CudaParameters

    def __init__(self, parameters: CudaParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        self.program = program(parameters)
        self.gpu_memory = gpu_memory_bytes(parameters, self.machine, self.program.sizes)
        names = {f.name for f in fields(ModuleParameters)}
        self.module = ModuleParameters(**{n: v for n, v in parameters.model_dump().items() if n in names})
        self.gpu = Gpu(
            self.engine, self.machine, self.module, self.gpu_memory, parameters.payload_bytes,
            parameters.fault_buffer_entries,
        )  # fmt: skip
        frames = int(self.machine["host_memory_bytes"]) // PAGE
        host = PhysicalMemory(self.engine, frames, payload_bytes=parameters.payload_bytes)
        self.va_space = VaSpace(self.engine, self.module, Mm(host, self.engine, make_costs()), self.gpu)
        self.cpu = self.engine.thread("cpu")
        if self.gpu.hal.replayable_faults:
            start_bottom_half(self.gpu)

    def allocate(self) -> Self:
        """Call cudaMallocManaged for every array, and give advice; no page exists anywhere afterwards."""
        return self.stage("allocate")

    def first_touch(self) -> Self:
        """The CPU's accesses before the launch."""
        return self.stage("first_touch")

    def kernel(self) -> Self:
        """Prefetch calls, launches, synchronisation."""
        return self.stage("kernel")

    def read_back(self) -> Self:
        """The CPU's accesses after the launch."""
        return self.stage("read_back")

    # -- stages ----------------------------------------------------------------------------------------------------

    def _allocate(self) -> Wait:
        p, cpu = self.parameters, self.cpu
        for nbytes, members in packed_ranges(p, self.program.sizes):
            if not self.gpu.hal.replayable_faults and self._populated() + nbytes > self.gpu_memory:
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
        self._settle()

    def _wrote(self, pages: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        if len(pages):
            self.va_space.content.write(self.va_space.slots(pages))

    def _settle(self) -> None:
        """Have in its frames what was written so far: from now on it can be lost."""
        for va_range in self.va_space.ranges:
            for block in va_range.blocks.values():
                for processor in (CPU, GPU):
                    if block.resident[processor]:
                        block_settle(block, processor, block.resident[processor])

    def _kernel(self) -> Wait:
        p = self.parameters
        kernels = self.program.kernels(self.allocations, self.gpu)
        if p.prefetch in ("to_gpu", "both"):
            which = self.program.inputs if p.prefetch_arrays == "inputs" else range(len(self.allocations))
            yield from self._prefetch(list(which), GPU)
        for kernel in kernels:
            yield from self._launch(kernel)
            if self.errors:
                break
        self._settle()
        if p.prefetch in ("to_cpu", "both"):
            yield from self._prefetch(self.program.outputs, CPU)

    def _prefetch(self, which: list[int], destination: int) -> Wait:
        """Call cudaMemPrefetchAsync in the default stream: what follows waits for the copies."""
        end = 0.0
        for index in which:
            array = self.allocations[index]
            pages = -(-array.bytes // PAGE)
            end = max(end, (yield from uvm_api_migrate(self.va_space, self.cpu, array.va // PAGE, pages, destination)))
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

    def _read_back(self) -> Wait:
        yield from self._touch(self.program.read_back(self.allocations))
        # The process ends, and with it what the bottom half has begun.
        yield from self.gpu.service_lock.acquire(self.cpu)
        yield from self.gpu.service_lock.release(self.cpu)

    # -- the result --------------------------------------------------------------------------------------------------

    @property
    def programs(self) -> tuple[Thread, ...]:
        """The one program's thread."""
        return (self.cpu,)

    def integrity(self) -> Integrity:
        """Compare every copy of every page that exists with what the program last wrote to it."""
        return integrity(self.va_space)

    def metrics(self, conformance: Conformance, checked: Integrity) -> dict[str, float]:
        """Return what the run counted."""
        return metrics(self, conformance, checked)

    @property
    def why(self) -> str:
        """Say which counts of this program are exact and which depend on the seed or on how warps are scheduled."""
        return exactness(self)
