"""A machine with the four HMM test devices, processes on it, and the small C library that the selftests are written in.

A `Process` is one simulated process: its methods are what a program calls (mmap, fork, ioctl, loads
and stores), driven with ``yield from``; a `Fixture` is what a selftest gets: a process and the
devices of its variant.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from kit.drivers.dmirror import Dmirror, dmirror_device_init, dmirror_fops_open, dmirror_fops_release
from kit.drivers.dmirror_ioctl import dmirror_fops_unlocked_ioctl
from kit.drivers.dmirror_types import (
    HMM_DMIRROR_MEMORY_DEVICE_COHERENT,
    HMM_DMIRROR_MEMORY_DEVICE_PRIVATE,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    DmirrorDevice,
    HmmDmirrorCmd,
)
from kit.memory.costs import COSTS, make_costs
from kit.memory.faults.gup import get_user_pages, pin_user_pages, pin_user_pages_fast, unpin_user_pages
from kit.memory.faults.load_store import load, read_bytes, store, write_bytes
from kit.memory.files.file import File
from kit.memory.files.filemap import pread, pwrite, truncate
from kit.memory.invariants import check_invariants
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.physical.swap import folio_free_swap
from kit.memory.space.mm import Mm
from kit.memory.syscalls.exit import mmput
from kit.memory.syscalls.fork import fork
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap, mprotect, mremap, munmap
from kit.memory.types import (
    FOLL_LONGTERM,
    FOLL_WRITE,
    HPAGE_PMD_ORDER,
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE,
    PG,
    PROT_READ,
    PROT_WRITE,
    Bit,
    Kind,
)
from kit.sim.engine import Engine

KIB, MIB, TWOMEG = 1 << 10, 1 << 20, 2 << 20
RW, ANON = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
HMM_BUFFER_SIZE = 1024 << 12
NTIMES = 10
GUP_BASIC_TEST, GUP_FAST_BENCHMARK, PIN_FAST_BENCHMARK, PIN_LONGTERM_BENCHMARK = range(4)
PRIVATE, COHERENT = (0, 1), (2, 3)  # device numbers
Program = Generator[simpy.Event, Any, Any]


def counting(size: int) -> np.ndarray:
    """Return int i = i for `size` bytes."""
    return np.arange(size // 4, dtype=np.int32)


# Microseconds, of no machine in particular: schedules need steps that take time.
KERNEL_COSTS = {
    **dict.fromkeys(COSTS, 0.1), "pte_read": 0.005, "pte_write": 0.02, "hmm_entry": 0.01, "migrate_entry": 0.2, "tlb_flush": 2.0,
    "page_copy": 0.3, "page_zero": 0.2, "huge_copy": 100.0, "huge_zero": 80.0, "swap_out_page": 8.0, "swap_in_page": 8.0,
    "fork_base": 50.0, "syscall": 0.3, "fault_entry": 0.5,
}  # fmt: skip
DEVICE_COSTS = {
    "ioctl": 1.0,
    "dma_page": 0.4,
    "copy_setup": 2.0,
    "device_pte": 0.02,
    "dma_map": 0.05,
    "devmem_alloc": 0.05,
}


@dataclass
class Buffer:
    """struct hmm_buffer: ``base`` and ``size`` are the mapping, ``ptr`` what the commands work on."""

    ptr: int
    size: int
    mirror: np.ndarray
    base: int
    cpages: int = 0
    faults: int = 0

    @property
    def ints(self) -> np.ndarray:
        return self.mirror.view(np.int32)

    def copy(self) -> Buffer:
        """Return what a forked child has of it."""
        return Buffer(self.ptr, self.size, self.mirror.copy(), self.base)


class System:
    """Physical memory, an engine and devices 0, 1 (private) and 2, 3 (coherent)."""

    def __init__(
        self, payload_bytes: int = 4096, system_frames: int = 1 << 18, seed: int = 0, jitter: float = 0.0,
        chunk_pages: int = 1 << 16, chunks: int = 8, swap_slots: int = 1 << 14, hugetlb: int = 4,
    ) -> None:  # fmt: skip
        self.engine = Engine(seed, jitter)
        self.memory = PhysicalMemory(
            self.engine, system_frames, chunks * chunk_pages, payload_bytes=payload_bytes, swap_slots=swap_slots
        )
        if hugetlb:
            assert self.memory.set_hugetlb_pool(HPAGE_PMD_ORDER, hugetlb) == hugetlb
        self.costs = make_costs(KERNEL_COSTS)
        kernel = self.engine.thread("modprobe")
        kinds = [HMM_DMIRROR_MEMORY_DEVICE_PRIVATE] * 2 + [HMM_DMIRROR_MEMORY_DEVICE_COHERENT] * 2
        self.devices = [
            DmirrorDevice(self.memory, unit, kind, DEVICE_COSTS, chunk_pages) for unit, kind in enumerate(kinds)
        ]
        for device in self.devices:
            assert dmirror_device_init(device, kernel) == 0
        self.processes: list[Process] = []
        self.files: list[File] = []
        self.random = np.random.default_rng(seed)
        self.free = self.memory.free_pages

    def process(self, name: str = "test") -> Process:
        """Start a process with an empty address space."""
        return Process(self, Mm(self.memory, self.engine, self.costs, name=name), name)

    def device_pages_in_use(self, unit: int) -> int:
        """Return how many pages of a device's memory somebody has."""
        owned = [p is not None and p.owner is self.devices[unit] for p in self.memory.pgmaps]
        heads = np.flatnonzero(np.array(owned)[self.memory.pgmap] & (self.memory.refcount > 0))
        return int((1 << self.memory.order[heads].astype(np.int64)).sum())

    def check(self) -> None:
        """Check counts, lists and tables against each other."""
        check_invariants(self.memory, [process.mm for process in self.processes])

    def check_nothing_left(self) -> None:
        """After every process has exited: no frame, device page, swap slot or lock is held."""
        self.check()
        cleaner = self.engine.thread("cleaner")
        for file in self.files:  # the last close of an unlinked file
            self.run(truncate(file, cleaner, 0))
        # A page of the swap cache that was locked when its last entry went waits there for reclaim, as in Linux.
        folio_free_swap(self.memory, np.flatnonzero(self.memory.flags[: self.memory.system_frames] & PG.SWAPCACHE))
        huge_zero = 512 if self.memory.huge_zero >= 0 else 0
        assert self.memory.free_pages == self.free - huge_zero, "frames are lost"
        assert [self.device_pages_in_use(unit) for unit in range(4)] == [0] * 4, "device pages are lost"
        assert not self.memory.swap.in_use().any(), "swap slots are lost"
        assert not (self.memory.flags & PG.LOCKED).any(), "a page is still locked"
        for process in self.processes:
            lock = process.mm.mmap_lock
            assert (lock.writer, lock.readers) == (None, 0), f"the mmap lock of {process.name} is held"
        for device in self.devices:
            assert device.devmem_lock.holder is None
            assert all(mirror.mutex.holder is None for mirror in device.mirrors)
        assert not self.memory.pincount.any(), "a page is still pinned"

    def run(self, program: Program) -> Any:
        """Run a program and everything else until nothing is left to do, and return what it returned."""
        main = self.engine.start(program)
        self.engine.run()
        assert main.triggered, "the program waits for something that never happens"
        return main.value


class Process:
    """One process: an address space and a main thread."""

    def __init__(self, system: System, mm: Mm, name: str) -> None:
        self.system, self.mm, self.name = system, mm, name
        self.thread = system.engine.thread(name)
        self.running: simpy.Process | None = None
        self.end = "running"
        system.processes.append(self)

    def pages_present(self, start: int, pages: int) -> np.ndarray:
        """Return which pages /proc/self/pagemap calls present."""
        slots = self.mm.table.slots_of(np.arange(start // PAGE, start // PAGE + pages))
        return (slots >= 0) & (self.mm.table.kind[slots] == Kind.PRESENT)

    def another_thread(self, name: str) -> Process:
        """Return the same process as one more of its threads sees it."""
        made = object.__new__(Process)
        made.__dict__.update(self.__dict__)
        made.thread = self.system.engine.thread(name)
        return made

    # Memory

    def mmap(self, size: int, prot: int, flags: int, file: Any = None, addr: int | None = None) -> Program:
        ops, file = (file, None) if isinstance(file, Dmirror) else (None, file)
        return (yield from mmap(self.mm, self.thread, size, prot, flags, file=file, addr=addr, ops=ops))

    def munmap(self, start: int, size: int) -> Program:
        return (yield from munmap(self.mm, self.thread, start, size))

    def mprotect(self, start: int, size: int, prot: int) -> Program:
        return (yield from mprotect(self.mm, self.thread, start, size, prot))

    def madvise(self, start: int, size: int, advice: int) -> Program:
        return (yield from madvise(self.mm, self.thread, start, size, advice))

    def mremap(self, old: int, old_len: int, new_len: int, flags: int, new: int) -> Program:
        return (yield from mremap(self.mm, self.thread, old, old_len, new_len, flags, new))

    # Loads and stores

    def read_ints(self, start: int, count: int) -> Program:
        return (yield from read_bytes(self.mm, self.thread, start, 4 * count)).view(np.int32)

    def write_ints(self, start: int, values: Any) -> Program:
        data = np.asarray(values, dtype=np.int32)
        yield from write_bytes(self.mm, self.thread, start, data.view(np.uint8))

    def increment_ints(self, start: int, expected: np.ndarray) -> Program:
        """Read every int, compare it, and write it back plus one, page after page."""
        for at in range(0, len(expected), PAGE // 4):
            seen = yield from self.read_ints(start + 4 * at, PAGE // 4)
            assert np.array_equal(seen, expected[at : at + PAGE // 4])
            yield from self.write_ints(start + 4 * at, seen + 1)

    def load_stamps(self, start: int, pages: int) -> Program:
        first = start // PAGE
        return (yield from load(self.mm, self.thread, np.arange(first, first + pages)))

    def store_stamps(self, start: int, stamps: Any) -> Program:
        first = start // PAGE
        stamps = np.asarray(stamps, dtype=np.uint64)
        yield from store(self.mm, self.thread, np.arange(first, first + len(stamps)), stamps)

    def pwrite(self, file: File, data: np.ndarray, offset: int) -> Program:
        content = data.view(np.uint64).reshape(-1, PAGE // 8)
        return PAGE * (yield from pwrite(file, self.thread, self.mm, offset // PAGE, content))

    def pread(self, file: File, size: int, offset: int) -> Program:
        content = yield from pread(file, self.thread, self.mm, offset // PAGE, size // PAGE)
        return content.reshape(-1).view(np.uint8)

    def gup_test(self, start: int, command: int, pages: int, flags: int) -> Program:
        """What /sys/kernel/debug/gup_test does (mm/gup_test.c @ 7.0): take the pages, then give them back."""
        flags |= FOLL_WRITE | (FOLL_LONGTERM if command == PIN_LONGTERM_BENCHMARK else 0)
        if command in (GUP_BASIC_TEST, GUP_FAST_BENCHMARK):
            taken = yield from get_user_pages(self.mm, self.thread, start, pages, flags)
            if isinstance(taken, int):
                return taken
            self.system.memory.put(taken)
        else:
            pin = pin_user_pages if command == PIN_LONGTERM_BENCHMARK else pin_user_pages_fast
            taken = yield from pin(self.mm, self.thread, start, pages, flags)
            if isinstance(taken, int):
                return taken
            unpin_user_pages(self.system.memory, taken)
        return 0 if len(taken) == pages else -14

    # Devices

    def open(self, unit: int) -> Program:
        return (yield from dmirror_fops_open(self.system.devices[unit], self.thread, self.mm))

    def close(self, fd: Any) -> Program:
        yield from dmirror_fops_release(fd, self.thread)

    def ioctl(self, fd: Any, command: int, buffer: Buffer, pages: int) -> Program:
        """hmm_dmirror_cmd: the struct is copied back only when the command succeeded."""
        cmd = HmmDmirrorCmd(buffer.ptr, buffer.mirror, pages)
        result = yield from dmirror_fops_unlocked_ioctl(fd, self.thread, command, cmd)
        if result == 0:
            buffer.cpages, buffer.faults = cmd.cpages, cmd.faults
        return result

    # Processes and threads

    def fork(self, program: Callable[[Process], Program]) -> Program:
        """Fork; the child runs `program` and exits. Returns the child, or a negative errno."""
        mm = yield from fork(self.mm, self.thread)
        if isinstance(mm, int):
            return mm
        child = Process(self.system, mm, f"{self.name}'s child {len(self.system.processes)}")
        child.running = self.system.engine.start(child.life(program))
        return child

    def life(self, program: Callable[[Process], Program]) -> Program:
        """Run a program, then let the process die as exit or a signal does."""
        try:
            yield from program(self)
            self.end = "exited"
        except simpy.Interrupt:
            self.end = "killed"
        yield from self.exit()

    def exit(self) -> Program:
        yield from mmput(self.mm, self.thread)
        self.end = "exited" if self.end == "running" else self.end

    def waitpid(self, child: Process) -> Program:
        yield from self.thread.wait(child.running)
        return child.end

    def kill(self, child: Process) -> Program:
        yield from self.thread.sync()
        child.running.interrupt("SIGTERM")

    def pause(self) -> Program:
        """Wait for a signal."""
        yield self.system.engine.env.event()

    def sleep(self, microseconds: float) -> Program:
        self.thread.now += float(microseconds)
        yield from self.thread.sync()

    def pthread_create(self, program: Callable[[Process], Program]) -> simpy.Process:
        thread = self.another_thread(f"{self.name} thread")
        thread.thread.now = self.thread.now
        return self.system.engine.start(program(thread))

    def join(self, thread: simpy.Process) -> Program:
        yield from self.thread.wait(thread)


@dataclass
class Fixture:
    """What a selftest works with: a process, and the open devices of the variant."""

    system: System
    process: Process
    coherent: bool
    fds: list[Any] = field(default_factory=list)
    children: list[Process] = field(default_factory=list)
    undo: list[tuple[int, int]] = field(default_factory=list)

    def create_file(self, size: int) -> File:
        """An unlinked file of `size` bytes."""
        file = File(self.system.memory, -(-size // PAGE))
        self.system.files.append(file)
        return file

    def unspecial(self) -> None:
        """Make entries ordinary again that a state made special: the pages behind them have counts."""
        table = self.process.mm.table
        for start, pages in self.undo:
            slots = table.slots_of(np.arange(start // PAGE, start // PAGE + pages))
            table.set_bits(slots, table.bits[slots] & ~np.uint8(Bit.SPECIAL))

    def stamp_buffer(self, start: int, pages: int) -> Buffer:
        """Return a buffer whose mirror holds a stamp for each page, not a page."""
        return Buffer(start, pages * PAGE, np.zeros(pages, dtype=np.uint64), start)

    @classmethod
    def play(cls, program: Callable[[Fixture], Program], units: Iterable[int] = (0, 1, 2), **machine: Any) -> System:
        """Run `program` on a new machine with the devices `units` open; afterwards nothing may be left."""
        system = System(**machine)
        t = cls(system, system.process(), False)
        system.run(t.whole(program, units))
        system.check_nothing_left()
        return system

    def whole(self, program: Callable[[Fixture], Program], units: Iterable[int]) -> Program:
        """Open the devices, run a program, close the devices, end forgotten children, and exit."""
        for unit in units:
            self.fds.append((yield from self.process.open(unit)))
        yield from program(self)
        self.unspecial()
        for fd in self.fds:
            yield from self.process.close(fd)
        for child in self.children:
            yield from self.process.kill(child)
            yield from self.process.waitpid(child)
        yield from self.process.exit()

    @property
    def fd(self) -> Any:
        return self.fds[0]

    fd0 = fd

    @property
    def fd1(self) -> Any:
        return self.fds[1]

    @property
    def random(self) -> np.random.Generator:
        return self.system.random

    def buffer(
        self, size: int = HMM_BUFFER_SIZE, prot: int = RW, flags: int = ANON, file: Any = None, mirror: int = 0
    ) -> Program:
        """Map `size` bytes and return a buffer over all of it."""
        start = yield from self.process.mmap(size, prot, flags, file)
        assert start > 0, start
        return Buffer(start, size, np.zeros(mirror or size, dtype=np.uint8), start)

    def mirror(self, pages: int) -> np.ndarray:
        """Return a mirror for `pages` pages: whole pages, whatever the machine's pages carry."""
        return np.zeros(pages * PAGE, dtype=np.uint8)

    def stamps(self, mirror: np.ndarray, pages: int) -> np.ndarray:
        """Return the stamp (first word) of each page that a command left in a mirror."""
        return mirror.view(np.uint64)[: pages * PAGE // 8 : PAGE // 8].copy()

    def huge_buffer(self, prot: int = RW, size: int = 2 * TWOMEG) -> Program:
        """Map `size` bytes and return a buffer over the first 2 MiB aligned to 2 MiB."""
        buffer = yield from self.buffer(size, prot, mirror=TWOMEG)
        buffer.ptr = -(-buffer.base // TWOMEG) * TWOMEG
        return buffer

    def free(self, buffer: Buffer) -> Program:
        assert (yield from self.process.munmap(buffer.base, buffer.size)) == 0

    def migrate_sys_to_dev(self, fd: Any, buffer: Buffer, pages: int) -> Program:
        return (yield from self.process.ioctl(fd, HMM_DMIRROR_MIGRATE_TO_DEV, buffer, pages))

    def migrate_dev_to_sys(self, fd: Any, buffer: Buffer, pages: int) -> Program:
        return (yield from self.process.ioctl(fd, HMM_DMIRROR_MIGRATE_TO_SYS, buffer, pages))

    def migrated(self, buffer: Buffer, data: np.ndarray) -> Program:
        """Migrate all of a buffer to the device and compare what the device then reads."""
        buffer.mirror[:] = 0xFF
        pages = 4 * len(data) // PAGE
        assert (yield from self.migrate_sys_to_dev(self.fd, buffer, pages)) == 0
        assert buffer.cpages == pages
        assert np.array_equal(buffer.ints[: len(data)], data)


@dataclass(frozen=True)
class Case:
    """One documented selftest."""

    fixture: str
    program: Callable[[Fixture], Program]
    payload_bytes: int

    def run(self, coherent: bool, seed: int = 0, jitter: float = 0.0) -> System:
        """Run it on a new machine, let its process exit, and check that nothing is left."""
        system = System(self.payload_bytes, seed=seed, jitter=jitter)
        first = 2 if coherent else 0
        units = range(first, first + (2 if self.fixture == "hmm2" else 1))
        system.run(Fixture(system, system.process(), coherent).whole(self.program, units))
        system.check_nothing_left()
        return system


CASES: dict[str, Case] = {}


def case(
    fixture: str, payload_bytes: int = 4096
) -> Callable[[Callable[[Fixture], Program]], Callable[[Fixture], Program]]:
    """Register a selftest under its own name."""

    def registered(program: Callable[[Fixture], Program]) -> Callable[[Fixture], Program]:
        CASES[program.__name__] = Case(fixture, program, payload_bytes)
        return program

    return registered
