"""The memory system: range faults, migration, invalidations, the kernel's selftests and random schedules."""

from __future__ import annotations

import sys
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figure import Figure, best, timed
from kit.drivers.dmirror_types import HMM_DMIRROR_MIGRATE_TO_DEV, HMM_DMIRROR_MIGRATE_TO_SYS
from kit.memory.types import MADV_DONTNEED, MADV_NOHUGEPAGE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

__all__ = ["invalidations", "migration", "range_fault", "schedules", "selftests"]

PAGE = 4096
MILLION = 1_000_000
STRETCH = 1 << 16  # pages at once: their columns fit a cache
GIB = 1 << 30
Program = Generator[Any, Any, Any]


def _machine(pages: int, chunk_pages: int = 1 << 16) -> Any:
    """Return a fixture on a machine of 8-byte pages, with room for `pages` twice."""
    from hmm.harness import Fixture, System

    frames, chunks = 2 * pages + (1 << 16), pages // chunk_pages + 8
    system = System(payload_bytes=8, system_frames=frames, chunk_pages=chunk_pages, chunks=chunks)
    return Fixture(system, system.process(), False)


def _mapped(t: Any, pages: int, stamps: bool) -> Program:
    from hmm.harness import ANON, RW

    start = yield from t.process.mmap(pages * PAGE, RW, ANON)
    assert (yield from t.process.madvise(start, pages * PAGE, MADV_NOHUGEPAGE)) == 0
    if stamps:
        yield from t.process.store_stamps(start, np.arange(pages, dtype=np.uint64))
    return start


def range_fault() -> list[Figure]:
    """`hmm_range_fault` over a million mapped pages, beside the least that numpy can do over the same arrays."""
    from hmm.probe import READ, Probe

    t = _machine(MILLION)
    process, found = t.process, []

    def program() -> Program:
        start = yield from _mapped(t, MILLION, True)
        probe = yield from Probe(process, start, MILLION).insert()
        for words, default in (("snapshot", 0), ("read request", READ)):
            fastest = float("inf")
            for _ in range(5):
                fastest = min(fastest, (yield from _clocked(probe.range_fault(start, MILLION, default))))
            found.append((words, fastest))
        yield from probe.remove()

    t.system.run(program())
    table, slots = process.mm.table, process.mm.table.slots(process.mm.vmas[0].first, MILLION)
    kind, bits, frame = table.kind[slots], table.bits[slots], table.frame[slots]
    flags = np.zeros(1 << 16, dtype=np.uint64)

    def bare() -> None:
        for at in range(0, MILLION, STRETCH):
            some = slice(at, at + STRETCH)
            out = frame[some].astype(np.uint64)
            out |= flags[kind[some].astype(np.uint16) << np.uint16(8) | bits[some]]

    pass_ = MILLION / best(5, lambda: timed(bare)) / 1e6
    return [
        Figure(
            f"hmm_range_fault, {words}, 1,000,000 pages", MILLION / wall / 1e6, 20, "M pages/s", True,
            f"the aim; one bare numpy pass that joins flags and frames of the same entries: {pass_:,.0f} M/s",
        )
        for words, wall in found
    ]  # fmt: skip


def _clocked(program: Program) -> Program:
    """Run a program inside another and return its wall-clock seconds."""
    import time

    start = time.perf_counter()
    result = yield from program
    assert result[0] == 0 if isinstance(result, tuple) else result == 0, result
    return time.perf_counter() - start


def migration() -> list[Figure]:
    """4 GiB in 4 KiB pages to a private device and home, in slices of 512 pages as the test driver does it."""

    pages = 4 * GIB // PAGE
    t, walls = _machine(pages), {}

    def program() -> Program:
        p = t.process
        fd = yield from p.open(0)
        start = yield from _mapped(t, pages, True)
        buffer = t.stamp_buffer(start, pages)
        for words, what in (("to the device", HMM_DMIRROR_MIGRATE_TO_DEV), ("home", HMM_DMIRROR_MIGRATE_TO_SYS)):
            walls[words] = yield from _clocked(p.ioctl(fd, what, buffer, pages))
            assert buffer.cpages == pages
        assert np.array_equal((yield from p.load_stamps(start, pages)), np.arange(pages, dtype=np.uint64))
        yield from p.close(fd)

    t.system.run(program())
    payload, frames = t.system.memory.payload, np.arange(pages)
    copy = pages / best(3, lambda: timed(lambda: payload.__setitem__(frames + pages, payload[frames]))) / 1e6
    return [
        Figure(
            f"4 GiB in 4 KiB pages, {words}", pages / wall / 1e6, 0.25, "M pages/s", True,
            f"the aim; the bare copy of as many contents, 8 bytes a page: {copy:,.0f} M/s; {wall:.2f} s in all",
        )
        for words, wall in walls.items()
    ]  # fmt: skip


def invalidations() -> list[Figure]:
    """Invalidations of one page that 16 subscriptions watch, and of a page that none of 10,000 watches."""
    from hmm.probe import Probe

    t, rates = _machine(1 << 16), {}

    def program() -> Program:
        p = t.process
        start = yield from _mapped(t, 1 << 16, False)
        for words, probes, each, at in (
            ("16 subscriptions hear", 16, 1 << 16, 0), ("10,000 subscriptions, none hears", 10_000, 4, 1 << 15),
        ):  # fmt: skip
            subs = []
            for number in range(probes):
                first = start if each > 4 else start + each * (number % 8000) * PAGE
                subs.append((yield from Probe(p, first, each).insert()))
            count = 2000

            def storm(at: int = at, count: int = count) -> Program:
                for _ in range(count):
                    assert (yield from p.madvise(start + at * PAGE, PAGE, MADV_DONTNEED)) == 0
                return 0

            rates[words] = count / (yield from _clocked(storm()))
            for sub in subs:
                yield from sub.remove()

    t.system.run(program())
    limits = {"16 subscriptions hear": 1000, "10,000 subscriptions, none hears": 5000}
    return [
        Figure(f"invalidations, {words}", rate, limits[words], "1/s", True, "the aim; each by MADV_DONTNEED of a page")
        for words, rate in rates.items()
    ]


def selftests() -> list[Figure]:
    """All instances of the kernel's own tests, each on a machine of its own."""
    from hmm import selftest_huge, selftest_memory, selftest_migrate
    from hmm.harness import CASES

    rooms = {room.__name__ for room in (selftest_memory, selftest_migrate, selftest_huge)}
    names = [n for n, case in CASES.items() if case.program.__module__ in rooms and n != "migrate_file_private"]
    walls = {
        (name, coherent): timed(partial(CASES[name].run, coherent)) for name in names for coherent in (False, True)
    }
    slowest = max(walls, key=walls.__getitem__)
    beside = f"the aim; the slowest, {slowest[0]}, takes {walls[slowest]:.1f} s"
    return [Figure(f"{len(walls)} instances of hmm-tests.c", sum(walls.values()), 60, "s", False, beside)]


def schedules(count: int = 10_000) -> list[Figure]:
    """Random schedules, and how their simulated time compares with the wall clock."""
    from hmm.schedules import Schedule

    simulated = steps = 0.0

    def run() -> None:
        nonlocal simulated, steps
        for seed in range(count):
            schedule = Schedule(seed)
            simulated += schedule.run().engine.now / 1e6
            steps += len(schedule.done)

    wall = timed(run)
    beside = f"the aim; {steps:,.0f} steps, every one checked"
    clocks = f"the aim; {simulated:.2f} s simulated in {wall:.0f} s"
    return [
        Figure(f"{count:,} random schedules", wall, 0.045 * count, "s", False, beside),
        Figure("random schedules, simulated over wall time", simulated / wall, 0.01, "x", True, clocks),
    ]
