"""One seeded schedule: several actors work on one address space at once, with jittered latencies.

A schedule is made from its seed alone: the areas, who does what in which order, and how long every step takes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hmm.harness import ANON, RW, TWOMEG, Buffer, Process, Program, System
from hmm.registers import Registers

from kit.drivers.dmirror_evict import dmirror_device_evict_chunk
from kit.drivers.dmirror_types import (
    DPT_READ,
    HMM_DMIRROR_CHECK_EXCLUSIVE,
    HMM_DMIRROR_EXCLUSIVE,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_WRITE,
)
from kit.errors import DriverError
from kit.memory.reclaim.reclaim import reclaim_pages
from kit.memory.types import MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_FIXED, PAGE, PROT_READ, Bit, Kind

WORDS = PAGE // 8


def mirror_entries(fd: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pages, frames and rights of all entries of a device's page table."""
    numbers, rows = fd.pt.leaves(0, 1 << 36)
    lanes = np.arange(512)
    pages, slots = (numbers[:, None] * 512 + lanes).ravel(), (rows[:, None] * 512 + lanes).ravel()
    used = fd.pt.rights[slots] > 0
    return pages[used], fd.pt.frame[slots[used]], fd.pt.rights[slots[used]]


@dataclass
class Space:
    """One process of a schedule: its memory's model, its mirrors, and what may go wrong in it by design."""

    process: Process
    registers: Registers
    mirrors: list[Any] = field(default_factory=list)
    may_fail: bool = False  # something is unmapped or protected now and then


class Schedule:
    """Everything that happens under one seed.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.random = seed, np.random.default_rng(seed)
        pick = self.random
        self.pages = int(pick.choice([8, 24, 64, 700]))
        self.huge = self.pages == 700
        tight = not self.huge and bool(pick.random() < 0.3)  # so little memory that it is reclaimed
        self.system = System(
            payload_bytes=8, system_frames=self.pages * 3 if tight else 8192, seed=seed, jitter=float(pick.choice([0.2, 1.0, 5.0])),
            chunk_pages=1024, swap_slots=4096, hugetlb=0,
        )  # fmt: skip
        self.coherent, self.children, self.exclusives = int(pick.choice([2, 3])), 0, 0
        for device in self.system.devices:
            device.guarded = True
        self.order = itertools.count(1)  # the order in which Python does things is the order in which they happen
        self.value = itertools.count(1 + (seed & 0xFFFF) * 1_000_000)
        self.errors = pick.random() < 0.4
        self.done: list[str] = []

    def run(self) -> System:
        """Run it, and check afterwards that nothing is lost, left or waiting."""
        self.system.run(self.main())
        stuck = [process.name for process in self.system.processes if process.end == "running"]
        assert not stuck, f"still running: {stuck}"
        self.system.check_nothing_left()
        return self.system

    # The program

    def main(self) -> Program:
        p, pick = self.system.process(), self.random
        base = yield from p.mmap((self.pages + 512) * PAGE, RW, ANON)
        start = -(-base // TWOMEG) * TWOMEG if self.huge else base
        assert (
            yield from p.madvise(base, (self.pages + 512) * PAGE, MADV_HUGEPAGE if self.huge else MADV_NOHUGEPAGE)
        ) == 0
        self.first = start // PAGE
        space = Space(p, Registers(self.first, self.pages), may_fail=bool(self.errors))
        for unit in (0, self.coherent):
            space.mirrors.append((yield from p.open(unit)))
        plans = [self.plan(int(pick.integers(3, 8)), space.may_fail) for _ in range(int(pick.integers(2, 5)))]
        yield from self.cpu_store(space, p, 0, self.pages if pick.random() < 0.7 else self.pages // 2)
        actors = [p.pthread_create(lambda q, plan=plan: self.steps(space, q, plan)) for plan in plans]
        for actor in actors:
            yield from p.join(actor)
        for child in self.system.processes[1:]:
            if child.running is not None:
                yield from p.waitpid(child)
        self.check_mirrors(space)
        for fd in space.mirrors:
            yield from p.close(fd)
        yield from p.exit()

    def plan(self, steps: int, may_fail: bool, forks: bool = True) -> list[Any]:
        """Draw steps: (name, first page, pages, pause before it, luck or a child's own plan)."""
        pick, drawn = self.random, []
        names = [name for name in STEPS if (may_fail or name not in DISRUPTIVE) and (forks or name != "fork")]
        weights = np.array([STEPS[name] for name in names], dtype=float)
        for name in pick.choice(names, size=steps, p=weights / weights.sum()).tolist():
            count = max(int(min(self.pages, pick.choice([1, 4, self.pages // 2, self.pages]))), 1)
            first, pause = int(pick.integers(self.pages - count + 1)), float(pick.exponential(20))
            luck = self.plan(3, may_fail, forks=False) if name == "fork" else int(pick.integers(1 << 30))
            drawn.append((name, first, count, pause, luck))
        return drawn

    def steps(self, space: Space, q: Process, plan: list[Any]) -> Program:
        for name, first, count, pause, luck in plan:
            yield from q.sleep(pause)
            self.done.append(f"{q.thread.now:.3f} {q.thread.name}: {name} {first}+{count}")
            step = getattr(self, name)
            if name == "fork":
                yield from step(space, q, first, count, luck)
            elif name in DEVICE_STEPS:
                yield from step(space, q, first, count, space.mirrors[luck % len(space.mirrors)])
            else:
                yield from step(space, q, first, count)

    # Steps

    def cpu_store(self, space: Space, q: Process, first: int, count: int) -> Program:
        values = np.array(list(itertools.islice(self.value, count)), dtype=np.uint64)
        write = space.registers.begin(self.first + first, values, next(self.order), "cpu store")
        if (yield from self.tried(space, q.store_stamps((self.first + first) * PAGE, values))) is not False:
            write.end = next(self.order)

    def cpu_load(self, space: Space, q: Process, first: int, count: int) -> Program:
        begun = next(self.order)
        seen = yield from self.tried(space, q.load_stamps((self.first + first) * PAGE, count))
        if seen is not False:
            self.compare(space, first, seen, begun, "cpu load")

    def device(
        self, space: Space, q: Process, fd: Any, what: int, first: int, count: int, values: Any = None
    ) -> Program:
        buffer = Buffer((self.first + first) * PAGE, count * PAGE, np.zeros(count * PAGE, dtype=np.uint8), 0)
        if values is not None:
            buffer.mirror.view(np.uint64)[::WORDS] = values
        result = yield from q.ioctl(fd, what, buffer, count)
        allowed = ALLOWED[what] | (DISRUPTED if space.may_fail else set())
        if what == HMM_DMIRROR_WRITE and self.children:
            allowed = allowed | {EFAULT}  # a page that a fork shares went to the device, read-only: documented
        assert result == 0 or -result in allowed, (what, result)
        return result, buffer

    def device_write(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        values = np.array(list(itertools.islice(self.value, count)), dtype=np.uint64)
        write = space.registers.begin(self.first + first, values, next(self.order), "device write")
        result, _ = yield from self.device(space, q, fd, HMM_DMIRROR_WRITE, first, count, values)
        if result == 0:
            write.end = next(self.order)

    def device_read(
        self, space: Space, q: Process, first: int, count: int, fd: Any, what: int = HMM_DMIRROR_READ
    ) -> Program:
        begun = next(self.order)
        result, buffer = yield from self.device(space, q, fd, what, first, count)
        if result == 0:
            assert buffer.cpages == count
            self.compare(space, first, buffer.mirror.view(np.uint64)[::WORDS], begun, f"device command {what}")

    def to_device(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        yield from self.device_read(space, q, first, count, fd, HMM_DMIRROR_MIGRATE_TO_DEV)

    def exclusive(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        self.exclusives += 1
        yield from self.device_read(space, q, first, min(count, 16), fd, HMM_DMIRROR_EXCLUSIVE)

    def to_system(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        yield from self.device(space, q, fd, HMM_DMIRROR_MIGRATE_TO_SYS, first, count)

    def snapshot(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        yield from self.device(space, q, fd, HMM_DMIRROR_SNAPSHOT, first, count)

    def check_exclusive(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        yield from self.device(space, q, fd, HMM_DMIRROR_CHECK_EXCLUSIVE, first, count)

    def evict(self, space: Space, q: Process, first: int, count: int, fd: Any) -> Program:
        """Every page of the device goes home, those of other processes too; the device keeps its memory."""
        for chunk in list(fd.mdevice.devmem_chunks):
            yield from dmirror_device_evict_chunk(fd.mdevice, q.thread, chunk)

    def reclaim(self, space: Space, q: Process, first: int, count: int) -> Program:
        yield from reclaim_pages(q.mm, q.thread, (self.first + first) * PAGE, count * PAGE)

    def dontneed(self, space: Space, q: Process, first: int, count: int) -> Program:
        write = space.registers.begin(self.first + first, np.zeros(count, np.uint64), next(self.order), "madvise")
        result = yield from q.madvise((self.first + first) * PAGE, count * PAGE, MADV_DONTNEED)
        assert result == 0 or space.may_fail
        if result == 0:
            write.end = next(self.order)

    def protect(self, space: Space, q: Process, first: int, count: int) -> Program:
        """Read-only for a while; nothing that is said about contents changes."""
        for prot in (PROT_READ, RW):
            result = yield from q.mprotect((self.first + first) * PAGE, count * PAGE, prot)
            assert result in (0, -12)  # ENOMEM: somebody unmapped part of it
            yield from q.sleep(30)

    def remap(self, space: Space, q: Process, first: int, count: int) -> Program:
        """munmap, and after a while new memory at the same place."""
        start = (self.first + first) * PAGE
        write = space.registers.begin(self.first + first, np.zeros(count, np.uint64), next(self.order), "munmap")
        assert (yield from q.munmap(start, count * PAGE)) == 0
        yield from q.sleep(20)
        assert (yield from q.mmap(count * PAGE, RW, ANON | MAP_FIXED, addr=start)) == start
        write.end = next(self.order)

    def fork(self, space: Space, q: Process, first: int, count: int, plan: list[Any]) -> Program:
        """A child with a mirror of its own, on a device that no relative uses, works on its copy and exits.

        There is none when reclaim has an exclusive page locked: the pages before that have been shared all the same.
        """
        if self.children == 2:
            return
        self.children += 1
        begun = next(self.order)
        unit = (1, 5 - self.coherent)[self.children - 1]
        born: list[int] = []

        def child(process: Process) -> Program:
            registers = Registers(self.first, self.pages, space.registers, (begun, born[0]))
            own = Space(process, registers, may_fail=space.may_fail)
            own.mirrors.append((yield from process.open(unit)))
            yield from self.steps(own, process, plan)
            self.check_mirrors(own)
            yield from process.close(own.mirrors[0])

        made = yield from q.fork(child)
        assert not isinstance(made, int) or (made == -ENOMEM and self.exclusives), made
        born.append(next(self.order))

    # Helpers

    def tried(self, space: Space, access: Program) -> Program:
        """Do an access of the CPU; where areas come and go it may be a segmentation fault (False)."""
        try:
            return (yield from access)
        except DriverError as error:
            assert space.may_fail and error.status == "SIGSEGV", error
            return False

    def check_mirrors(self, space: Space) -> None:
        """Every entry of a device's table names the page that the CPU's entry names, and grants no more."""
        table = space.process.mm.table
        for fd in space.mirrors:
            pages, pfns, rights = mirror_entries(fd)
            slots = table.slots_of(pages)
            assert (slots >= 0).all(), "an entry outlives its page table"
            there = np.isin(table.kind[slots], (Kind.PRESENT, Kind.DEVICE_PRIVATE, Kind.DEVICE_EXCLUSIVE))
            assert there.all(), f"entries outlive pages {pages[~there][:8] - self.first}"
            same = table.frame[slots] == pfns
            assert same.all(), f"entries of other pages at {pages[~same][:8] - self.first}"
            fine = (
                (rights == DPT_READ)
                | (table.bits[slots] & Bit.WRITABLE != 0)
                | (table.kind[slots] == Kind.DEVICE_EXCLUSIVE)
            )
            assert fine.all(), f"entries grant more at {pages[~fine][:8] - self.first}"

    def compare(self, space: Space, first: int, seen: np.ndarray, begun: int, what: str) -> None:
        seen = np.asarray(seen, dtype=np.uint64)
        wrong = space.registers.wrong(self.first + first, seen, begun, next(self.order))
        assert not len(wrong), f"{what}: pages {(first + wrong)[:8]} hold {seen[wrong][:8]}"


# Steps and how often they come; those of a device take a mirror.
STEPS = {
    "cpu_store": 5, "cpu_load": 5, "device_write": 5, "device_read": 5, "to_device": 6, "to_system": 2, "exclusive": 2,
    "check_exclusive": 1, "snapshot": 1, "evict": 1, "reclaim": 2, "fork": 1, "dontneed": 1, "protect": 2, "remap": 1,
}  # fmt: skip
DISRUPTIVE = ("protect", "remap")
DEVICE_STEPS = (
    "device_write",
    "device_read",
    "to_device",
    "to_system",
    "exclusive",
    "check_exclusive",
    "snapshot",
    "evict",
)
ENOENT, EBUSY, EPERM, EFAULT, EINVAL, ENOMEM = 2, 16, 1, 14, 22, 12
ALLOWED = {
    HMM_DMIRROR_READ: {EBUSY}, HMM_DMIRROR_WRITE: {EBUSY}, HMM_DMIRROR_SNAPSHOT: {EBUSY},
    HMM_DMIRROR_MIGRATE_TO_DEV: {ENOENT}, HMM_DMIRROR_MIGRATE_TO_SYS: set(), HMM_DMIRROR_EXCLUSIVE: {ENOENT},
    HMM_DMIRROR_CHECK_EXCLUSIVE: {EPERM},
}  # fmt: skip
DISRUPTED = {EPERM, EFAULT, EINVAL}
