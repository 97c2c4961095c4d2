"""A driver without a flow around it: one GPU, one process, operations one after the other, and what must always hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.gpu import Gpu
from kit.drivers.uvm.migrate import uvm_api_migrate
from kit.drivers.uvm.module import ModuleParameters
from kit.drivers.uvm.policy import (
    uvm_api_disable_read_duplication,
    uvm_api_enable_read_duplication,
    uvm_api_set_accessed_by,
    uvm_api_set_preferred_location,
    uvm_api_unset_accessed_by,
    uvm_api_unset_preferred_location,
)
from kit.drivers.uvm.range_group import (
    uvm_api_allow_migration_range_groups,
    uvm_api_prevent_migration_range_groups,
    uvm_api_set_range_group,
)
from kit.drivers.uvm.replayable_faults import start_bottom_half
from kit.drivers.uvm.sm import launch
from kit.drivers.uvm.stream import StreamKernel
from kit.drivers.uvm.types import (
    BLOCK_PAGES,
    CPU,
    GPU,
    PAGE,
    READ,
    READ_ONLY,
    READ_WRITE,
    READ_WRITE_ATOMIC,
    REQUIRED_PROT,
    WRITE,
    VaBlock,
    VaRange,
    VaSpace,
)
from kit.drivers.uvm.va_space import uvm_mmap
from kit.flows.cuda_demand_paging.result import integrity
from kit.memory.costs import make_costs
from kit.memory.faults.access import touch
from kit.memory.invariants import check_invariants
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.memory.syscalls.mmap import munmap
from kit.memory.table.pagemask import EMPTY, holds, pages_of, region
from kit.sim.engine import Engine, Wait
from kit.sim.machine import load_machine

Copy = tuple[str, int, int, str]  # HtoD or DtoH, first page, pages, cause
HOST_PAGES = 1 << 16


class Harness:
    """One GPU with `roots` root chunks of memory, and one process.

    Costs of the machine can be overridden by name; module parameters are those of `ModuleParameters`.
    """

    def __init__(
        self, *, roots: int = 4, architecture: str = "pascal", entries: int = 4096, host_pages: int = HOST_PAGES,
        costs: dict[str, float] | None = None, payload: int = 8, seed: int = 0, jitter: float = 0.0, **module: Any,
    ) -> None:  # fmt: skip
        machine = replace(load_machine("gtx1080ti_pcie3"), architecture=architecture)
        constants = dict(machine.constants)
        for name, value in (costs or {}).items():
            constants[name] = replace(constants[name], value=value)
        self.machine = replace(machine, constants=constants)
        self.module = ModuleParameters(**module)
        self.engine = Engine(seed, jitter)
        self.roots = roots
        self.gpu = Gpu(self.engine, self.machine, self.module, roots * BLOCK_PAGES * PAGE, payload, entries)
        self.host = PhysicalMemory(self.engine, host_pages, payload_bytes=payload)
        self.mm = Mm(self.host, self.engine, make_costs())
        self.space = VaSpace(self.engine, self.module, self.mm, self.gpu)
        self.cpu = self.engine.thread("cpu")
        self.trace = self.engine.trace
        self.lite = not self.gpu.hal.replayable_faults
        if not self.lite:
            start_bottom_half(self.gpu)

    # operations

    def run(self, work: Wait) -> Any:
        """Run one operation of the CPU thread to its end, and let the bottom half come to rest."""
        self.cpu.now = max(self.cpu.now, self.engine.now)

        def synced() -> Wait:
            value = yield from work
            yield from self.cpu.sync()
            return value

        value = self.engine.run(self.engine.start(synced()))
        self.settle()
        return value

    def settle(self) -> None:
        """Run until the bottom half has nothing left to serve and work queues are empty."""
        buffer, lock = self.gpu.fault_buffer, self.gpu.service_lock
        while buffer.get != buffer.put or lock.holder is not None or any(b.lock.holder for b in self.blocks()):
            self.engine.env.step()

    def wait(self, microseconds: float) -> None:
        """Let time pass."""
        self.engine.run(self.engine.env.timeout(microseconds))

    def allocate(self, pages: int, offset: int = 0) -> VaRange:
        """Allocate a managed range that starts `offset` pages into a 2 MiB block."""
        self.cpu.now = max(self.cpu.now, self.engine.now)
        va_range = uvm_mmap(self.space, self.cpu, pages * PAGE, f"range {len(self.space.ranges)}", offset * PAGE)
        if self.lite:
            self.run(uvm_api_set_range_group(self.space, self.cpu, va_range))
        return va_range

    def free(self, va_range: VaRange) -> None:
        """Free a range."""
        self.cpu.now = max(self.cpu.now, self.engine.now)
        self.engine.run(self.engine.start(self.freeing(va_range)))

    def freeing(self, va_range: VaRange) -> Wait:
        """The unmapping of a range, as work."""
        vma = va_range.vma
        assert (yield from munmap(self.mm, self.cpu, vma.start, vma.stop - vma.start)) == 0
        yield from self.cpu.sync()

    def touching(self, pages: Sequence[int], writes: Sequence[bool] | bool) -> Wait:
        """CPU accesses, as work."""
        where = np.asarray(pages, dtype=np.int64)
        write = np.full(len(where), writes) if isinstance(writes, bool) else np.asarray(writes, dtype=bool)
        return touch(self.mm, self.cpu, where, write, self.gpu.costs.cpu_touch_page, self._wrote)

    def _wrote(self, pages: NDArray[np.int64]) -> None:
        if len(pages):
            self.space.content.write(self.gpu.table.walk(pages))

    def touch(self, pages: Sequence[int], writes: Sequence[bool] | bool = True) -> None:
        """CPU accesses."""
        self.run(self.touching(pages, writes))

    def stream(self, pages: Sequence[int], access: Sequence[int] | int = WRITE, lanes: int = 1) -> StreamKernel:
        """A kernel over pages with access types."""
        where = np.asarray(pages, dtype=np.int64)
        kind = (
            np.full(len(where), access, dtype=np.int8) if isinstance(access, int) else np.asarray(access, dtype=np.int8)
        )
        slots = self.gpu.table.walk(where)
        return StreamKernel("stream", slots, where, kind, REQUIRED_PROT[kind], lanes, int(self.machine["tpcs"]), 0.1)

    def kernel(self, pages: Sequence[int], access: Sequence[int] | int = WRITE, lanes: int = 1) -> str | None:
        """Launch a kernel over pages and wait for it; returns why it was killed, or None."""
        return self.run(self.launching(self.stream(pages, access, lanes)))

    def launching(self, kernel: StreamKernel, alone: bool = True) -> Wait:
        """A launch and its end, as work."""
        if self.lite:
            yield from uvm_api_prevent_migration_range_groups(self.space, self.cpu)
            yield from self.cpu.sync()
        reason = yield self.engine.start(launch(self.space, kernel, alone))
        self.cpu.now = max(self.cpu.now, self.engine.now)
        if self.lite:
            yield from uvm_api_allow_migration_range_groups(self.space, self.cpu)
        return reason

    def faults(
        self,
        pages: Sequence[int],
        access: Sequence[int] | int = WRITE,
        utlb: Sequence[int] | int = 0,
        fatal: Sequence[int] | int = 0,
    ) -> None:
        """Entries that appear in the fault buffer at once, with no access behind them; wait until they are served."""
        count = len(pages)
        columns = [np.full(count, c) if isinstance(c, int) else np.asarray(c) for c in (access, utlb, fatal)]
        now = max(self.engine.now, self.gpu.fault_buffer.last_time)
        self.gpu.fault_buffer.write(np.full(count, now), np.asarray(pages, dtype=np.int64), *columns)
        self.settle()

    def beside(self, kernel: StreamKernel, *works: Wait) -> str | None:
        """Run a kernel, and the CPU's work at the same time; returns why the kernel was killed, or None."""

        def both() -> Wait:
            running = self.engine.start(launch(self.space, kernel, alone=False))
            for work in works:
                yield from work
                yield from self.cpu.sync()
            return (yield running)

        return self.run(both())

    def prefetching(self, first: int, pages: int, destination: int) -> Wait:
        """cudaMemPrefetchAsync and the wait for its copies, as work."""
        end = yield from uvm_api_migrate(self.space, self.cpu, first, pages, destination)
        self.cpu.now = max(self.cpu.now, end)

    def prefetch(self, first: int, pages: int, destination: int) -> None:
        """cudaMemPrefetchAsync, and wait for its copies."""
        self.run(self.prefetching(first, pages, destination))

    def advise(self, advice: str, first: int, pages: int) -> None:
        """cudaMemAdvise: read_mostly, preferred_cpu, preferred_gpu, accessed_by_cpu, accessed_by_gpu, each also with un-."""
        self.run(self.advising(advice, first, pages))

    def advising(self, advice: str, first: int, pages: int) -> Wait:
        """The same, as work."""
        space, cpu = self.space, self.cpu
        where = {"cpu": CPU, "gpu": GPU}.get(advice.rpartition("_")[2], CPU)
        work = {
            "read_mostly": lambda: uvm_api_enable_read_duplication(space, cpu, first, pages),
            "unread_mostly": lambda: uvm_api_disable_read_duplication(space, cpu, first, pages),
            "preferred": lambda: uvm_api_set_preferred_location(space, cpu, first, pages, where),
            "unpreferred": lambda: uvm_api_unset_preferred_location(space, cpu, first, pages),
            "accessed_by": lambda: uvm_api_set_accessed_by(space, cpu, first, pages, where),
            "unaccessed_by": lambda: uvm_api_unset_accessed_by(space, cpu, first, pages, where),
        }
        name = advice if advice.endswith("mostly") else advice.rpartition("_")[0]
        return work[name]()

    def evict(self) -> bool:
        """Evict the next victim, as an allocation would, and give the root chunk back; False when nothing is evictable."""
        pmm = self.gpu.pmm
        if not (pmm.unused or pmm.discarded or pmm.used):
            return False

        def work() -> Wait:
            root = yield from pmm.pick_and_evict_root_chunk(self.cpu)
            self.cpu.now = max(self.cpu.now, root.tracker)
            yield from self.cpu.sync()
            pmm.free_dirty.append(root)

        self.run(work())
        return True

    # what happened

    def spans(self, step: str) -> list[dict[str, Any]]:
        """Rows of one step, words as words."""
        trace, columns = self.trace, self.trace.spans.columns
        rows = trace.spans.array()
        rows = rows[rows[:, columns.index("step")] == trace.steps.ids.get(step, -1)]
        words = {"actor": trace.actors, "cause": trace.causes, "status": trace.statuses}
        return [
            {name: words[name].words[int(v)] if name in words else v for name, v in zip(columns, row, strict=True)}
            for row in rows
        ]

    def count(self, step: str) -> int:
        """How often a step was run."""
        return len(self.spans(step))

    def copies(self, base: int | None = None) -> list[Copy]:
        """Copy records in the order in which they were made, pages counted from `base`."""
        base = min((r.first for r in self.space.ranges), default=0) if base is None else base
        return [
            (row["actor"][5:], int(row["va"]) // PAGE - base, int(row["pages"]), row["cause"])
            for row in self.spans("UvmEventTypeMigration")
        ]

    def kib(self, direction: str) -> list[int]:
        """Sizes of the copies in one direction, KiB, in order."""
        return [pages * 4 for way, _, pages, _ in self.copies() if way == direction]

    def blocks(self) -> list[VaBlock]:
        """Every block that exists."""
        return [block for r in self.space.ranges for block in r.blocks.values()]

    def where(self, va_range: VaRange) -> str:
        """Residency of each page of a range: . nowhere, C, G, D on both."""
        letters = ["."] * va_range.vma.pages
        for part in [r for r in self.space.ranges if r.vma is va_range.vma]:
            for block in part.blocks.values():
                for index in range(block.pages):
                    cpu, gpu = (holds(block.resident[p], index) for p in (CPU, GPU))
                    letters[block.first - va_range.vma.first + index] = ".CGD"[cpu | gpu << 1]
        return "".join(letters)

    # what must hold

    def check(self) -> None:
        """Assert every invariant of a driver at rest."""
        assert self.gpu.service_lock.holder is None
        for block in self.blocks():
            check_block(self, block)
        check_gpu_memory(self)
        check_host_memory(self)
        check_trace(self)
        found = integrity(self.space)
        assert found.lost == 0, f"{found.lost} of {found.pages_checked} pages lost their content"


def check_block(h: Harness, block: VaBlock) -> None:
    """Masks of one block against each other and against both page tables."""
    space, whole = h.space, block.all_pages
    assert block.lock.holder is None and not block.lock._waiting
    cpu, gpu = block.resident
    for mask in (cpu, gpu, block.read_duplicated, block.discarded, *block.pte[CPU], *block.pte[GPU]):
        assert not mask & ~whole
    assert cpu & gpu == block.read_duplicated, "a page has two owners without being read-duplicated, or the reverse"
    for processor in (CPU, GPU):
        assert not block.resident[processor] & ~block.populated(processor), "resident but not populated"
        read, write, atomic = (block.pte[processor][p] for p in (READ_ONLY, READ_WRITE, READ_WRITE_ATOMIC))
        assert not atomic & ~write and not write & ~read, "rights are not nested"
    assert block.pte[CPU][READ_WRITE] == block.pte[CPU][READ_WRITE_ATOMIC], "the CPU has no right between read and all"
    assert not block.mapped(CPU) & ~cpu, "the CPU maps a page that it has no copy of"
    assert not block.mapped(GPU) & ~(cpu | gpu), "the GPU maps a page that is resident nowhere"
    if not h.lite:
        for processor in (CPU, GPU):
            assert not block.pte[processor][READ_WRITE] & block.read_duplicated, "a read-duplicated page may be written"
    # Without native atomics over PCIe, a GPU's atomics on system memory exclude every CPU write, and the reverse.
    assert h.lite or not block.pte[GPU][READ_WRITE_ATOMIC] & ~gpu & block.pte[CPU][READ_WRITE], (
        "atomics are not exclusive"
    )
    check_tables(h, block)
    check_chunks(block)
    if block.thrashing is not None:
        assert not block.thrashing.pinned & ~block.thrashing.pages
        assert block.thrashing.page is not None or not block.thrashing.pages
    assert space.find(block.first) is block.range


def check_tables(h: Harness, block: VaBlock) -> None:
    """Page-table entries say what the masks say, and point at the right frames."""
    pages = np.arange(block.first, block.first + block.pages)
    rights, frames = h.mm.table.lookup(pages)
    wanted = np.zeros(block.pages, dtype=np.uint8)
    wanted[pages_of(block.pte[CPU][READ_ONLY])] = 1
    wanted[pages_of(block.pte[CPU][READ_WRITE])] = 2
    assert (rights == wanted).all(), "CPU page table and masks differ"
    mapped = pages_of(block.mapped(CPU))
    assert (frames[mapped] == block.frames[CPU][mapped]).all(), "a CPU entry points at a wrong frame"
    rights, frames = h.gpu.table.lookup(pages)
    wanted = np.zeros(block.pages, dtype=np.uint8)
    for prot in (READ_ONLY, READ_WRITE, READ_WRITE_ATOMIC):
        wanted[pages_of(block.pte[GPU][prot])] = prot
    assert (rights == wanted).all(), "GPU page table and masks differ"
    # Before Pascal the GPU keeps its entries, of its own memory, while the CPU has the page.
    own = block.all_pages if h.lite else block.resident[GPU]
    local, remote = (pages_of(block.mapped(GPU) & m) for m in (own, ~own & block.all_pages))
    assert (frames[local] == block.frames[GPU][local]).all(), "a GPU entry points at a wrong frame of its memory"
    assert (frames[remote] == block.frames[CPU][remote]).all(), "a remote GPU entry points at a wrong frame"


def check_chunks(block: VaBlock) -> None:
    """Chunks of a block cover exactly its populated pages, do not overlap, and own the frames of their pages."""
    seen = EMPTY
    for first, chunk in block.gpu_chunks.items():
        mask = region(first, chunk.pages)
        assert not mask & seen and not mask & ~block.all_pages
        seen |= mask
        assert chunk.block is block and chunk.page_index == first and chunk.root.owners[chunk.offset] is chunk
        assert (block.frames[GPU][first : first + chunk.pages] == chunk.frame + np.arange(chunk.pages)).all()
        if chunk.pages > 1:
            assert (block.first + first) % chunk.pages == 0, "a chunk is not aligned"
    assert seen == block.populated(GPU)
    seen = EMPTY
    for first, (frame, count, each) in block.cpu_chunks.items():
        mask = region(first, count)
        assert not mask & seen and not mask & ~block.all_pages
        seen |= mask
        assert count % each == 0 and (each == 1 or (block.first + first) % each == 0)
        assert (block.frames[CPU][first : first + count] == frame + np.arange(count)).all()
    assert seen == block.populated(CPU)


def check_gpu_memory(h: Harness) -> None:
    """Every root chunk is in exactly one state, and every page of a split one has one owner."""
    pmm = h.gpu.pmm
    owned = [chunk for block in h.blocks() for chunk in block.gpu_chunks.values()]
    roots = {chunk.root for chunk in owned}
    free = [*pmm.free_zeroed, *pmm.free_dirty]
    listed = [*pmm.unused, *pmm.discarded, *pmm.used]
    for root in [*free, *listed]:
        assert not root.pins and not root.in_eviction, "a root chunk on a list is pinned"
    assert len(set(listed)) == len(listed) and set(listed) == roots, "evictable chunks are not those that blocks own"
    pma = [*range(pmm.pma_next, pmm.roots), *pmm.pma_returned]
    everything = Counter([root.index for root in [*free, *roots]] + pma)
    assert everything == Counter(range(pmm.roots)), "a root chunk is lost or has two owners"
    for root in free:
        assert not root.owners
    pieces = [piece for split in pmm.splits.values() for piece in split]
    assert all(piece.root in roots for piece in pieces), "a piece of a free root chunk is on a free list"
    covered = Counter(c.frame + at for c in [*owned, *pieces] for at in range(c.pages))
    assert covered == Counter(r.index * BLOCK_PAGES + at for r in roots for at in range(BLOCK_PAGES)), "split chunks"


def check_host_memory(h: Harness) -> None:
    """Host frames that are in use are those that blocks hold, each once; the kernel's counts agree."""
    held = Counter(
        frame + at for b in h.blocks() for frame, count, _ in b.cpu_chunks.values() for at in range(count)
    )  # fmt: skip
    assert h.host.used == len(held) and (not held or max(held.values()) == 1), "host frames are lost or shared"
    check_invariants(h.host, [h.mm], held)


def check_trace(h: Harness) -> None:
    """The trace can say where every page is now, and every span lies within its parent and its time."""
    late = h.engine.now + 1e9
    for block in h.blocks():
        said = h.trace.residency_at(late, block.first, block.pages)
        have = np.zeros(block.pages, dtype=np.int16)
        have[pages_of(block.resident[CPU])] |= 1
        have[pages_of(block.resident[GPU])] |= 2
        assert (said == have).all(), "the trace's residency differs from the driver's"


def pages(va_range: VaRange, which: Iterable[int]) -> list[int]:
    """Virtual page numbers of pages of a range."""
    return [va_range.first + page for page in which]


READS, WRITES = READ, WRITE
