"""On-demand paging with mlx5: page faults, invalidations, registration, a sparse implicit region, random schedules."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.figure import Figure, timed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

__all__ = ["faults", "invalidations", "registration", "schedules", "sparse"]

PAGE, MIB, GIB, TIB = 4096, 1 << 20, 1 << 30, 1 << 40
MACHINE = "connectx5"
Program = Generator[Any, Any, Any]


class Pair:
    """Two hosts of the ConnectX-5 profile; pages carry 8 bytes."""

    def __init__(self, frames: int, seed: int = 0) -> None:
        from kit.drivers.mlx5.adapter.fabric import Fabric
        from kit.drivers.mlx5.costs import COSTS, make_costs
        from kit.memory.costs import COSTS as MM_COSTS
        from kit.memory.costs import make_costs as make_mm_costs
        from kit.sim.engine import Engine
        from kit.sim.machine import load_machine

        machine = load_machine(MACHINE)
        self.engine, self.fabric = Engine(seed), Fabric()
        self.costs = make_costs({name: machine[name] for name in COSTS})
        self.mm_costs = make_mm_costs({name: machine[name] for name in MM_COSTS})
        self.client, self.server = self._host("client", frames), self._host("server", frames)

    def _host(self, name: str, frames: int) -> SimpleNamespace:
        from kit.drivers.mlx5.adapter.hca import Hca
        from kit.drivers.mlx5.device import Mlx5IbDev
        from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init, warm_cache
        from kit.drivers.mlx5.objects import IbPd
        from kit.drivers.mlx5.verbs import open_device
        from kit.memory.physical.pages import PhysicalMemory
        from kit.memory.space.mm import Mm

        memory = PhysicalMemory(self.engine, frames, payload_bytes=8)
        mm = Mm(memory, self.engine, self.mm_costs, name)
        hca = Hca(self.engine, memory, self.costs, name=f"{name} hca")
        self.fabric.attach(hca)
        dev = Mlx5IbDev(hca, self.costs)
        thread = self.engine.thread(name)
        self.run(mlx5_mkey_cache_init(dev, thread))
        warm_cache(dev)
        pd = IbPd(dev, self.fabric.number(hca), mm)
        return SimpleNamespace(mm=mm, hca=hca, dev=dev, pd=pd, thread=thread, context=open_device(dev, mm))

    def run(self, program: Program) -> Any:
        return self.engine.run(self.engine.start(program))

    def setup(self, host: SimpleNamespace, length: int, kind: str) -> Program:
        """Map a buffer of small pages and register it; returns its address and the region."""
        from kit.drivers.mlx5.enums import U64_MAX, Access
        from kit.drivers.mlx5.verbs import reg_mr
        from kit.memory.syscalls.madvise import madvise
        from kit.memory.syscalls.mmap import mmap
        from kit.memory.types import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

        flags = MAP_PRIVATE | MAP_ANONYMOUS
        at = yield from mmap(host.mm, host.thread, length, PROT_READ | PROT_WRITE, flags)
        assert (yield from madvise(host.mm, host.thread, at, length, MADV_NOHUGEPAGE)) == 0
        where = (0, U64_MAX) if kind == "implicit" else (at, length)
        rights = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
        rights |= Access.ON_DEMAND if kind != "pinned" else 0
        mr = yield from reg_mr(host.pd, host.thread, *where, rights)
        assert not isinstance(mr, int), mr
        return at, mr

    def connect(self) -> Program:
        """Return the client's end of a connection."""
        from kit.drivers.mlx5.enums import QpType
        from kit.drivers.mlx5.verbs import connect, create_cq, create_qp

        ends = []
        for host in (self.client, self.server):
            cq = yield from create_cq(host.context, host.thread, 1024)
            ends.append((yield from create_qp(host.pd, host.thread, QpType.RC, cq, cq)))
        assert (yield from connect(self.client.thread, *ends)) == 0
        return ends[0]

    def write(self, qp: Any, local: Any, remote: int, rkey: int) -> Program:
        """RDMA WRITE, and wait until it is done."""
        from kit.drivers.mlx5.descriptors import SendWr
        from kit.drivers.mlx5.enums import WrOpcode
        from kit.drivers.mlx5.verbs_post import post_send, wait_cq

        thread = self.client.thread
        wr = SendWr(0, WrOpcode.RDMA_WRITE, (local,), remote_addr=remote, rkey=rkey)
        assert (yield from post_send(qp, thread, wr)) == 0
        (wc,) = yield from wait_cq(qp.send_cq, thread)
        assert wc.status == 0, wc


def _faults(kind: str, size: int, count: int, side: str) -> tuple[float, float]:
    """Return wall-clock and simulated seconds of as many cold messages, one page fault each on one side."""
    from kit.drivers.mlx5.descriptors import Sge
    from kit.memory.syscalls.madvise import madvise
    from kit.memory.types import MADV_DONTNEED

    pages = size * count // PAGE if size == PAGE else size // PAGE
    pair, clock = Pair(2 * pages + 4096), {}

    def program() -> Program:
        cold, warm = (pair.server, pair.client) if side == "responder" else (pair.client, pair.server)
        at, mr = yield from pair.setup(cold, pages * PAGE, kind)
        other, pinned = yield from pair.setup(warm, size, "pinned")
        qp = yield from pair.connect()
        if kind == "implicit":  # the child is there already
            yield from pair.write(qp, *_where(side, at, mr, other, pinned, PAGE, Sge))
            assert (yield from madvise(cold.mm, cold.thread, at, PAGE, MADV_DONTNEED)) == 0
        spent = ticked = 0.0
        before = cold.hca.counters.page_faults
        for number in range(count):
            if size > PAGE:
                assert (yield from madvise(cold.mm, cold.thread, at, size, MADV_DONTNEED)) == 0
            here = at + number * PAGE if size == PAGE else at
            pair.client.thread.now = max(pair.client.thread.now, cold.thread.now)
            yield from pair.client.thread.sync()
            wall, now = time.perf_counter(), pair.engine.now
            yield from pair.write(qp, *_where(side, here, mr, other, pinned, size, Sge))
            spent, ticked = spent + time.perf_counter() - wall, ticked + pair.engine.now - now
            cold.thread.now = max(cold.thread.now, pair.engine.now)
        assert cold.hca.counters.page_faults - before >= count
        clock["wall"], clock["simulated"] = spent, ticked / 1e6

    pair.run(program())
    return clock["wall"], clock["simulated"]


def _where(side: str, cold: int, mr: Any, warm: int, pinned: Any, size: int, sge: Any) -> tuple[Any, int, int]:
    if side == "responder":
        return sge(warm, size, pinned.lkey), cold, mr.rkey
    return sge(cold, size, mr.lkey), warm, pinned.rkey


def faults() -> list[Figure]:
    """Cold messages: how many a second, and how much simulated time passes in a second of the wall clock."""
    rows = []
    for kind, size, count, side, aim in (
        ("explicit", PAGE, 2000, "responder", 1000.0), ("explicit", PAGE, 2000, "requester", 1000.0),
        ("implicit", PAGE, 2000, "responder", 1000.0), ("explicit", 4 * MIB, 100, "responder", 100.0),
    ):  # fmt: skip
        wall, simulated = min(_faults(kind, size, count, side) for _ in range(3))
        words = f"{kind}, {'4 KiB' if size == PAGE else '4 MiB'}, {side}"
        beside = f"the aim; {wall / count * 1e6:.0f} us of wall clock a message with its fault"
        rows.append(Figure(f"page faults, {words}", count / wall, aim, "1/s", True, beside))
        clocks = f"the aim; {simulated / count * 1e6:.0f} us simulated a message"
        rows.append(Figure(f"page faults, {words}, simulated over wall time", simulated / wall, 1.0, "x", True, clocks))
    return rows


def invalidations(count: int = 4000) -> list[Figure]:
    """Pages given up one by one, each of which the device has mapped."""
    from kit.drivers.mlx5.descriptors import Sge
    from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH_WRITE
    from kit.drivers.mlx5.verbs import advise_mr
    from kit.memory.syscalls.madvise import madvise
    from kit.memory.types import MADV_DONTNEED

    pair, walls = Pair(2 * count + 4096), []

    def program() -> Program:
        host = pair.server
        at, mr = yield from pair.setup(host, count * PAGE, "explicit")
        whole = Sge(at, count * PAGE, mr.lkey)
        assert (yield from advise_mr(host.pd, host.thread, PREFETCH_WRITE, ADVISE_FLUSH, [whole])) == 0
        assert mr.umem.npages == count
        start = time.perf_counter()
        for page in range(count):
            assert (yield from madvise(host.mm, host.thread, at + page * PAGE, PAGE, MADV_DONTNEED)) == 0
        walls.append(time.perf_counter() - start)
        assert mr.umem.npages == 0 and host.hca.dma.live == 0

    pair.run(program())
    beside = "the aim; each by MADV_DONTNEED of a page, zapped and unmapped"
    return [Figure("invalidations of mapped pages", count / walls[0], 1000, "1/s", True, beside)]


def registration(count: int = 10_000) -> list[Figure]:
    """As many regions of four pages, registered and deregistered again."""
    from kit.drivers.mlx5.enums import Access
    from kit.drivers.mlx5.verbs import dereg_mr, reg_mr

    pair, walls, simulated = Pair(count), {}, {}

    def program() -> Program:
        host = pair.server
        at, first = yield from pair.setup(host, 4 * count * PAGE, "explicit")
        rights, mrs = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.ON_DEMAND, [first]
        start, now = time.perf_counter(), pair.engine.now
        for number in range(count):
            mr = yield from reg_mr(host.pd, host.thread, at + 4 * number * PAGE, 4 * PAGE, rights)
            assert not isinstance(mr, int), mr
            mrs.append(mr)
        walls["registered"], simulated["registered"] = time.perf_counter() - start, pair.engine.now - now
        start, now = time.perf_counter(), pair.engine.now
        for mr in mrs:
            assert (yield from dereg_mr(mr, host.thread)) == 0
        walls["deregistered"], simulated["deregistered"] = time.perf_counter() - start, pair.engine.now - now
        assert not host.dev.odp_mkeys

    pair.run(program())
    return [
        Figure(
            f"{count:,} on-demand regions {words}", count / wall, 500, "1/s", True,
            f"the aim; {wall:.1f} s, {simulated[words] / 1e6:.2f} s simulated",
        )
        for words, wall in walls.items()
    ]  # fmt: skip


def sparse(children: int = 256) -> list[Figure]:
    """An implicit region over 1 TiB of which single pages are touched, far apart: what the process holds then."""
    from kit.drivers.mlx5.descriptors import Sge

    pair, held, walls = Pair(1 << 16), [], []

    def program() -> Program:
        at, mr = yield from pair.setup(pair.server, TIB, "implicit")
        warm, pinned = yield from pair.setup(pair.client, PAGE, "pinned")
        qp = yield from pair.connect()
        gc.collect()
        before, start = _resident(), time.perf_counter()
        for number in range(children):
            where = at + number * (TIB // children)
            yield from pair.write(qp, Sge(warm, PAGE, pinned.lkey), where, mr.rkey)
        walls.append(time.perf_counter() - start)
        gc.collect()
        held.append(_resident() - before)
        assert len(mr.implicit_children) == children

    pair.run(program())
    lists = children * 2 * (GIB // PAGE) * 8 / MIB
    beside = f"the aim, the children's lists ({lists:,.0f} MB if they were filled) not taken off; {walls[0]:.1f} s"
    return [Figure(f"1 TiB implicit, {children} children, memory held", held[0] / MIB, 64, "MB", False, beside)]


def _resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def schedules(count: int = 10_000) -> list[Figure]:
    """More random schedules than the tests run, with seeds of their own."""
    from odp.schedules import Schedule

    total = np.zeros(3)

    def run() -> None:
        for seed in range(1_000_000, 1_000_000 + count):
            schedule = Schedule(seed).run()
            pages = sum(host.hca.counters.page_faults for host in schedule.hosts)
            total[:] += schedule.engine.now / 1e6, schedule.steps, pages

    wall = timed(run)
    beside = f"the aim; {total[1]:,.0f} steps, every one checked, and {total[2]:,.0f} page faults"
    return [Figure(f"{count:,} random schedules of two hosts", wall, 0.03 * count, "s", False, beside)]
