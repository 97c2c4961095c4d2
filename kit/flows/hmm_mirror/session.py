"""A session: one process, its data structure and one mirroring device, stage by stage."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror, dmirror_device_init, dmirror_fops_open, dmirror_fops_release
from kit.errors import Errno, raise_for
from kit.flows.documented import Conformance
from kit.flows.hmm_mirror.device import DeviceProcessor
from kit.flows.hmm_mirror.evictions import Evictions
from kit.flows.hmm_mirror.explicit import offload_by_copies
from kit.flows.hmm_mirror.hardware import make_device, make_memory
from kit.flows.hmm_mirror.noise import Noise
from kit.flows.hmm_mirror.parameters import HmmParameters
from kit.flows.hmm_mirror.process import build, fork_children, leave, touch
from kit.flows.hmm_mirror.record import Record
from kit.flows.hmm_mirror.result import content, metrics
from kit.flows.hmm_mirror.structure import Structure, Words
from kit.flows.run import Integrity
from kit.flows.session import Session
from kit.memory.costs import COSTS, make_costs
from kit.memory.faults.gup import unpin_user_pages
from kit.memory.notifier.notify import runs
from kit.memory.space.mm import Mm
from kit.memory.syscalls.madvise import madvise
from kit.memory.types import MADV_PAGEOUT, PAGE
from kit.sim.engine import Thread, Wait

__all__ = ["STAGES", "HmmSession"]

STAGES = ("build", "without_hmm", "mirror", "migrate", "cpu_touch", "fork", "oversubscribe", "teardown")


class HmmSession(Session):
    """The flow as an object with one method a stage.

    Attributes
    ----------
    mm, cpu : Mm, Thread
        The process: its address space and its thread.
    device, driver : LimitedDevice, Thread
        The mirroring device, and the thread on which its driver works.
    base : int
        First byte of the structure.
    expected : ndarray of uint64, shape (pages,)
        The word that was last written to each page.
    """

    stages_of = STAGES
    parameters: HmmParameters

    def __init__(self, parameters: HmmParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        self.rng = np.random.default_rng(parameters.seed)
        # First of all: memory refuses a structure that is too large, and building one takes a minute.
        self.memory = make_memory(self.engine, self.machine, parameters)
        self.structure = Structure(parameters, self.rng)
        costs = make_costs({name: self.machine[name] for name in COSTS})
        self.mm = Mm(self.memory, self.engine, costs, "process", record_moves=True)
        self.device = make_device(self.memory, self.machine, parameters)
        self.cpu = self.engine.thread("cpu")
        self.driver = self.engine.thread("driver")
        self.evictions = Evictions(self.mm, self.device)
        self.device.on_keep = self.evictions.kept
        self.record = Record(self.mm, self.device, self.evictions)
        self.mirror_file: Dmirror | None = None
        self.processor: DeviceProcessor | None = None
        self.base = self.noise_area = 0
        self.expected: Words = np.zeros(parameters.pages, dtype=np.uint64)
        self.pinned: NDArray[np.integer] = np.zeros(0, dtype=np.int64)
        self.checked = Integrity(0, 0)

    def build(self) -> Self:
        """The program maps memory and builds its structure, node by node: the CPU's first touch."""
        return self.stage("build")

    def without_hmm(self) -> Self:
        """The walk as it was done before: the device has its own allocation, and every pointer is translated."""
        return self.stage("without_hmm")

    def mirror(self) -> Self:
        """The device opens a mirror and walks the structure where it is, by the program's own pointers."""
        return self.stage("mirror")

    def migrate(self) -> Self:
        """The walk again, with a driver that moves what the device faults on into device memory."""
        return self.stage("migrate")

    def cpu_touch(self) -> Self:
        """The CPU touches pages that are on the device: the driver's callback brings them home."""
        return self.stage("cpu_touch")

    def fork(self) -> Self:
        """The process forks while pages are on the device: they are shared until somebody writes."""
        return self.stage("fork")

    def oversubscribe(self) -> Self:
        """Another program takes device memory: pages are evicted, and a CPU fault is handed what was kept."""
        return self.stage("oversubscribe")

    def teardown(self) -> Self:
        """Every page is compared with what was last written; then the process exits with the device still open."""
        return self.stage("teardown")

    # -- stages ----------------------------------------------------------------------------------------------------

    def _build(self) -> Wait:
        raise_for(dmirror_device_init(self.device, self.driver))
        yield from build(self)

    def _without_hmm(self) -> Wait:
        if self.parameters.explicit_copies:
            yield from offload_by_copies(self)
        yield from self.cpu.sync()

    def _mirror(self) -> Wait:
        for first, count in runs(self.structure.some_pages(self.parameters.pageout_fraction)):
            yield from madvise(self.mm, self.cpu, self.base + first * PAGE, count * PAGE, MADV_PAGEOUT)
        yield from self._open()
        yield from self._walk(False, self.parameters.write_fraction)

    def _migrate(self) -> Wait:
        yield from self._open()
        yield from self._walk(self.parameters.placement == "migrate", self.parameters.write_fraction)

    def _cpu_touch(self) -> Wait:
        p = self.parameters
        for turn in range(p.rounds):
            yield from self._touch_some()
            if turn + 1 < p.rounds:
                yield from self._walk(p.placement == "migrate", p.write_fraction)

    def _fork(self) -> Wait:
        running = yield from fork_children(self)
        if running:
            yield from self._walk(False, 0.0)
        yield from running
        self.catch_up()

    def _oversubscribe(self) -> Wait:
        if self.parameters.placement == "migrate":
            yield from self._fill_and_evict()
        yield from self._touch_some()
        yield from self._walk(False, 0.0)

    def _teardown(self) -> Wait:
        if len(self.pinned):
            unpin_user_pages(self.memory, self.pinned)
        self.checked = content(self)
        yield from leave(self)
        if self.mirror_file is not None:
            yield from dmirror_fops_release(self.mirror_file, self.cpu)
        yield from self.cpu.sync()

    # -- what stages do more than once -------------------------------------------------------------------------------

    def _open(self) -> Wait:
        """Open the device file: a mirror without a single entry.

        Never while pages are on the device: the test driver remembers with each whose file brought it, and has no file
        that could clear their entries in another's table.
        """
        if self.mirror_file is not None:
            yield from dmirror_fops_release(self.mirror_file, self.cpu)
        opened = yield from dmirror_fops_open(self.device, self.cpu, self.mm)
        if isinstance(opened, Errno):
            raise_for(opened)
        self.mirror_file, self.processor = opened, DeviceProcessor(self, opened)

    def _walk(self, migrate: bool, share: float) -> Wait:
        """Let the device walk the structure, beside whatever else is going on; `share` of its visits write."""
        assert self.processor is not None
        visits = self.structure.walk()
        noise = Noise(self)
        running = self.engine.start(noise.run()) if self.parameters.noise != "none" else None
        yield from self.processor.walk(self.cpu.now, visits, self.structure.writes(len(visits), share), migrate)
        noise.over = True
        if running is not None:
            yield running
        self.catch_up()

    def _touch_some(self) -> Wait:
        """Let the CPU touch its share of the pages, in random order."""
        yield from touch(self, self.rng.permutation(self.structure.some_pages(self.parameters.cpu_fraction)))

    def _fill_and_evict(self) -> Wait:
        """Bring everything to the device; then another program takes some of its memory."""
        assert self.processor is not None
        yield from self.processor.prefetch(self.cpu.now)
        yield from self._walk(True, 0.0)
        self.driver.now = max(self.driver.now, self.cpu.now)
        left = int(self.parameters.left_fraction * self.parameters.pages)
        self.device.taken = max(self.device.capacity - left, 0)
        yield from self.device.make_room(self.driver, 0)
        yield from self.driver.sync()
        self.cpu.now = max(self.cpu.now, self.driver.now)

    # -- the result --------------------------------------------------------------------------------------------------

    @property
    def programs(self) -> tuple[Thread, ...]:
        """The process's thread."""
        return (self.cpu,)

    def close(self, stage: str, start: float) -> None:
        """Write down that a stage has ended, and both page tables as they are now."""
        super().close(stage, start)
        self.record.snapshot(stage, self.base, self.parameters.pages, self.mirror_file)

    def integrity(self) -> Integrity:
        """Return what the check of every page found before the process exited."""
        return self.checked

    def metrics(self, conformance: Conformance, checked: Integrity) -> dict[str, float]:
        """Return what the run counted."""
        return metrics(self, conformance, checked)

    def views(self) -> dict[str, Any]:
        """Return copies of the page tables, phases of migrations, and commands to the device."""
        return self.record.views()
