"""A session: one process, its data structure and one mirroring device, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror, dmirror_device_init, dmirror_fops_open, dmirror_fops_release
from kit.drivers.dmirror_limited import LimitedDevice
from kit.drivers.dmirror_types import HMM_DMIRROR_MEMORY_DEVICE_COHERENT, HMM_DMIRROR_MEMORY_DEVICE_PRIVATE
from kit.errors import ParameterError, raise_for
from kit.flows.documented import Documented
from kit.flows.hmm_mirror.device import DeviceProcessor
from kit.flows.hmm_mirror.explicit import offload_by_copies
from kit.flows.hmm_mirror.noise import Noise
from kit.flows.hmm_mirror.parameters import HUGE, HmmParameters
from kit.flows.hmm_mirror.result import Record, content, metrics
from kit.flows.hmm_mirror.structure import Pages, Structure, Words
from kit.flows.run import Allocation, Integrity, Run
from kit.memory.access import load, store
from kit.memory.costs import COSTS, make_costs
from kit.memory.exit import exit_mmap
from kit.memory.fork import fork
from kit.memory.gup import pin_user_pages_fast, unpin_user_pages
from kit.memory.madvise import madvise
from kit.memory.mm import Mm
from kit.memory.mmap import mmap, munmap
from kit.memory.pages import PhysicalMemory
from kit.memory.types import (
    FOLL_LONGTERM,
    FOLL_WRITE,
    MADV_HUGEPAGE,
    MADV_PAGEOUT,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE,
    PROT_READ,
    PROT_WRITE,
    Kind,
)  # fmt: skip
from kit.sim.engine import Engine, Thread, Wait
from kit.sim.machine import load_machine

__all__ = ["STAGES", "Session"]

STAGES = ("build", "without_hmm", "mirror", "migrate", "cpu_touch", "fork", "oversubscribe", "teardown")
RW, ANON = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
TURN = 64  # CPU touches between looks at what others do meanwhile
Progress = Callable[[float, str], None]


class Session:
    """The flow as an object with one method a stage; each returns the session.

    Parameters
    ----------
    parameters : HmmParameters
    scenario : str
        Name of the scenario, for the report.
    """

    def __init__(self, parameters: HmmParameters, scenario: str = "") -> None:
        p = self.parameters = parameters
        self.scenario, self.machine = scenario, load_machine(parameters.machine)
        self.engine = Engine(p.seed, p.jitter)
        self.rng = np.random.default_rng(p.seed)
        self.structure = Structure(p, self.rng)
        host = int(self.machine["host_memory_bytes"]) // PAGE
        if 4 * p.pages > host:
            raise ParameterError("bytes", p.bytes, f"at most a quarter of host memory, {host * PAGE // 4}")
        capacity = self._capacity()
        private = p.device_type == "private"
        frames = capacity if not private else -(-(min(capacity, p.pages) + p.pages + HUGE // PAGE) // 512) * 512
        chunks = 2 if private and p.thp else 1  # one of single pages, one of huge ones
        self.memory = PhysicalMemory(self.engine, host, chunks * frames, p.payload_bytes, swap_slots=p.pages)
        self.costs = make_costs({name: self.machine[name] for name in COSTS})
        self.mm = Mm(self.memory, self.engine, self.costs, "process", record_moves=True)
        curves = self.machine.curves
        self.device = LimitedDevice(
            self.memory,
            HMM_DMIRROR_MEMORY_DEVICE_PRIVATE if private else HMM_DMIRROR_MEMORY_DEVICE_COHERENT,
            {name: self.machine[name] for name in ("ioctl", "device_pte", "dma_map", "devmem_alloc")},
            lambda nbytes, out: curves["copy_htod" if out else "copy_dtoh"](nbytes),
            capacity, p.eviction, p.evict_pages, frames,
        )  # fmt: skip
        self.cpu = self.engine.thread("cpu")
        self.driver = self.engine.thread("driver")
        self.record = Record(self.mm, self.device)
        self.device.on_keep = self._kept
        self.mirror_file: Dmirror | None = None
        self.processor: DeviceProcessor | None = None
        self.base = 0
        self.expected: Words = np.zeros(p.pages, dtype=np.uint64)
        self.pinned: NDArray[np.integer] = np.zeros(0, dtype=np.int64)
        self.noise_area = 0
        self.children_pages = self.children_lost = 0
        self.allocations: list[Allocation] = []
        self.stages: list[tuple[str, float, float]] = []
        self.errors: list[str] = []
        self.checked = Integrity(0, 0)
        self.wall_s = 0.0

    def build(self) -> Session:
        """The program maps memory and builds its structure, node by node: the CPU's first touch."""
        return self._stage("build", self._build())

    def without_hmm(self) -> Session:
        """The walk as it was done before: the device has its own allocation, and every pointer is translated."""
        return self._stage("without_hmm", self._without_hmm())

    def mirror(self) -> Session:
        """The device opens a mirror and walks the structure where it is, by the program's own pointers."""
        return self._stage("mirror", self._mirror())

    def migrate(self) -> Session:
        """The walk again, with a driver that moves what the device faults on into device memory."""
        return self._stage("migrate", self._migrate())

    def cpu_touch(self) -> Session:
        """The CPU touches pages that are on the device: the driver's callback brings them home."""
        return self._stage("cpu_touch", self._cpu_touch())

    def fork(self) -> Session:
        """The process forks while pages are on the device: they are shared until somebody writes."""
        return self._stage("fork", self._fork())

    def oversubscribe(self) -> Session:
        """Another program takes device memory: pages are evicted, and a CPU fault is handed what was kept."""
        return self._stage("oversubscribe", self._oversubscribe())

    def teardown(self) -> Session:
        """Every page is compared with what was last written; then the process exits with the device still open."""
        return self._stage("teardown", self._teardown())

    def finish(self, progress: Progress | None = None) -> Run:
        """Run the stages that have not run yet and return the result."""
        for name in STAGES[len(self.stages) :]:
            if progress is not None:
                progress(STAGES.index(name) / len(STAGES), name.replace("_", " "))
            getattr(self, name)()
        if progress is not None:
            progress(1.0, "done")
        return self.run

    @property
    def run(self) -> Run:
        """The result so far."""
        trace = self.engine.trace
        conformance = Documented.load("hmm_mirror").check(trace)
        return Run(
            "hmm_mirror", self.scenario, self.parameters.model_dump(), metrics(self, conformance), trace, conformance,
            self.checked, self.machine, self.allocations, self.stages, self.wall_s, self.errors, self.record.views(),
        )  # fmt: skip

    def _kept(self, frames: NDArray[np.int64], start: float, end: float) -> None:
        """Record that the content of device pages went to system pages, while the CPU's entries stay as they are."""
        table = self.mm.table
        slots = np.flatnonzero((table.kind == Kind.DEVICE_PRIVATE) & np.isin(table.frame, frames))
        for first, count in _runs(np.sort(table.pages_at(slots))):
            self.engine.trace.move(start, end, first, count, 2, 1, "eviction")

    def _capacity(self) -> int:
        p = self.parameters
        pages = (p.device_memory_bytes or int(self.machine["device_memory_bytes"])) // PAGE
        if p.oversubscription:
            pages = int(p.pages / p.oversubscription)
        if pages < 1:
            raise ParameterError("oversubscription", p.oversubscription, "a share that leaves a page of device memory")
        return pages

    def _stage(self, name: str, work: Wait) -> Session:
        due = (*STAGES, "none")[len(self.stages)]
        if name != due:
            raise ParameterError("stage", name, f"the next stage, {due}")
        began, start = time.perf_counter(), self.engine.now
        self.cpu.now = max(self.cpu.now, start)
        self.engine.run(self.engine.start(work))
        self.engine.trace.span("host_program", "cpu", start, self.engine.now, cause=name)
        self.stages.append((name, start, self.engine.now))
        self.record.snapshot(name, self.base, self.parameters.pages, self.mirror_file)
        self.wall_s += time.perf_counter() - began
        return self

    def _build(self) -> Wait:
        p, cpu = self.parameters, self.cpu
        raise_for(dmirror_device_init(self.device, self.driver))
        length = p.pages * PAGE
        align = HUGE if length >= HUGE else None
        self.base = raise_for((yield from mmap(self.mm, cpu, length, RW, ANON, align=align)))
        self.allocations = [Allocation(p.structure, self.base, length)]
        if p.thp:
            raise_for((yield from madvise(self.mm, cpu, self.base, length, MADV_HUGEPAGE)))
        if p.noise != "none":
            self.noise_area = raise_for((yield from mmap(self.mm, cpu, 16 * PAGE, RW, ANON)))
            self.mm.record_moves = False  # the map shows the structure alone
            yield from store(self.mm, cpu, self.noise_area // PAGE + np.arange(16), np.ones(16, dtype=np.uint64))
            self.mm.record_moves = True
        self.expected = self.structure.words(self.base)
        yield from self.write(self.structure.place, self.expected[self.structure.place])
        if p.pinned_pages:
            self.pinned = yield from pin_user_pages_fast(
                self.mm, cpu, self.base, p.pinned_pages, FOLL_WRITE | FOLL_LONGTERM
            )
        yield from cpu.sync()

    def _without_hmm(self) -> Wait:
        if self.parameters.explicit_copies:
            yield from offload_by_copies(self)
        yield from self.cpu.sync()

    def _open(self) -> Wait:
        """Open the device file: a mirror without a single entry.

        Never while pages are on the device: the test driver remembers with each whose file brought it, and has no file
        that could clear their entries in another's table.
        """
        if self.mirror_file is not None:
            yield from dmirror_fops_release(self.mirror_file, self.cpu)
        self.mirror_file = raise_open((yield from dmirror_fops_open(self.device, self.cpu, self.mm)))
        self.processor = DeviceProcessor(self, self.mirror_file)

    def walk(self, migrate: bool, share: float) -> Wait:
        """Let the device walk the structure, beside whatever else is going on."""
        assert self.processor is not None
        visits = self.structure.walk()
        noise = Noise(self)
        running = self.engine.start(noise.run()) if self.parameters.noise != "none" else None
        yield from self.processor.walk(self.cpu.now, visits, self.structure.writes(len(visits), share), migrate)
        noise.over = True
        if running is not None:
            yield running
        self.cpu.now = max(self.cpu.now, self.engine.now)

    def _mirror(self) -> Wait:
        p = self.parameters
        pages = self.structure.some_pages(p.pageout_fraction)
        for first, count in _runs(pages):
            yield from madvise(self.mm, self.cpu, self.base + first * PAGE, count * PAGE, MADV_PAGEOUT)
        yield from self._open()
        yield from self.walk(False, p.write_fraction)

    def _migrate(self) -> Wait:
        yield from self._open()
        yield from self.walk(self.parameters.placement == "migrate", self.parameters.write_fraction)

    def _cpu_touch(self) -> Wait:
        p = self.parameters
        for turn in range(p.rounds):
            yield from self.touch(self.cpu, self.rng.permutation(self.structure.some_pages(p.cpu_fraction)))
            if turn + 1 < p.rounds:
                yield from self.walk(p.placement == "migrate", p.write_fraction)

    def touch(self, thread: Thread, pages: Pages) -> Wait:
        """The process reads pages and writes to some of them; what it reads must be what was last written."""
        writes = self.rng.random(len(pages)) < self.parameters.cpu_write_fraction
        for at in range(0, len(pages), TURN):
            some, wrote = pages[at : at + TURN], writes[at : at + TURN]
            seen = yield from load(self.mm, thread, self.base // PAGE + some)
            self.record.compare(seen, self.expected[some])
            if wrote.any():
                self.expected[some[wrote]] += np.uint64(1)
                self.record.cpu_writes += int(wrote.sum())
                yield from self.write(some[wrote], self.expected[some[wrote]], thread)
            thread.charge(self.machine["cpu_visit"] * len(some))
            yield from thread.sync()

    def write(self, pages: Pages, words: Words, thread: Thread | None = None) -> Wait:
        """Store words, one a page."""
        yield from store(self.mm, thread or self.cpu, self.base // PAGE + pages, words)

    def _fork(self) -> Wait:
        p = self.parameters
        running = []
        for number in range(p.children):
            self.mm.record_moves = False  # the map shows the parent's address space alone
            child = raise_open((yield from fork(self.mm, self.cpu)))
            self.mm.record_moves, child.record_moves = True, False
            yield from self.cpu.sync()
            running.append(self.engine.start(self._child(child, number + 1)))
        if running:
            yield from self.walk(False, 0.0)
        yield from running
        self.cpu.now = max(self.cpu.now, self.engine.now)

    def _child(self, mm: Mm, number: int) -> Wait:
        """One child: it reads and writes its share of the pages, checks that they are its own, and exits."""
        thread = self.engine.thread(f"child {number}")
        thread.now = self.engine.now
        expected = self.expected.copy()
        pages = self.structure.some_pages(self.parameters.child_fraction)
        first = self.base // PAGE
        for at in range(0, len(pages), TURN):
            some = pages[at : at + TURN]
            wrote = some[::2]
            self.record.compare((yield from load(mm, thread, first + some)), expected[some])
            expected[wrote] += np.uint64(2)
            yield from store(mm, thread, first + wrote, expected[wrote])
            yield from thread.sync()
        for at in range(0, len(pages), TURN):
            some = pages[at : at + TURN]
            self.record.compare((yield from load(mm, thread, first + some)), expected[some])
        yield from exit_mmap(mm, thread)
        yield from thread.sync()

    def _oversubscribe(self) -> Wait:
        p = self.parameters
        if p.placement == "migrate":
            assert self.processor is not None
            yield from self.processor.prefetch(self.cpu.now)
            yield from self.walk(True, 0.0)
            self.driver.now = max(self.driver.now, self.cpu.now)
            self.device.taken = max(self.device.capacity - int(p.left_fraction * p.pages), 0)
            yield from self.device.make_room(self.driver, 0)
            yield from self.driver.sync()
            self.cpu.now = max(self.cpu.now, self.driver.now)
        yield from self.touch(self.cpu, self.rng.permutation(self.structure.some_pages(p.cpu_fraction)))
        yield from self.walk(False, 0.0)

    def _teardown(self) -> Wait:
        if len(self.pinned):
            unpin_user_pages(self.memory, self.pinned)
        self.checked = content(self)
        if self.noise_area:
            self.mm.record_moves = False
            yield from munmap(self.mm, self.cpu, self.noise_area, 16 * PAGE)
            self.mm.record_moves = True
        self.record.settle(self.base, self.parameters.pages)
        half = self.parameters.pages // 2 * PAGE
        if half:
            yield from munmap(self.mm, self.cpu, self.base, half)
        yield from exit_mmap(self.mm, self.cpu)
        if self.mirror_file is not None:
            yield from dmirror_fops_release(self.mirror_file, self.cpu)
        yield from self.cpu.sync()


def raise_open(found: Any) -> Any:
    """Return what opening or forking gave, or raise what it failed with."""
    return raise_for(found) if isinstance(found, int) else found


def _runs(pages: Pages) -> list[tuple[int, int]]:
    """Return (first, count) of each contiguous run of ascending pages."""
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [len(pages)]]))
    return list(zip(pages[starts].tolist(), lengths.tolist(), strict=True))
