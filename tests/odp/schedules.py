"""One seeded schedule: programs on two hosts, the kernel and the adapters work on the same pages at the same time.

A schedule is made from its seed alone: kernel, kinds of regions, latencies, who does what and when. After every step
of every actor the invariants of an on-demand device are checked on both hosts, and at the end that nothing is left.
Contents are checked against the register model of the memory system's own schedules (`hmm.registers`): a page may only
hold what some write, of a CPU or of the wire, could have left there.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import numpy as np
import simpy
from hmm.registers import Registers, Write
from odp.checks import Checks, need

from kit.drivers.mlx5.adapter.fabric import Fabric
from kit.drivers.mlx5.adapter.hca import Hca, HcaParameters
from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.caps import HcaCaps
from kit.drivers.mlx5.costs import make_costs
from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Sge
from kit.drivers.mlx5.device import Mlx5IbDev, OdpOptions
from kit.drivers.mlx5.enums import PAGE, U64_MAX, Access, AccessMode, Era, QpType, WcStatus, WrOpcode
from kit.drivers.mlx5.mr.mkey_cache import mlx5r_cache_create_ent_locked, warm_cache
from kit.drivers.mlx5.objects import IbPd, Mlx5IbMr, RbKey
from kit.drivers.mlx5.odp.advise import ADVISE_FLUSH, PREFETCH_NO_FAULT, PREFETCH_WRITE
from kit.drivers.mlx5.verbs import advise_mr, connect, create_cq, create_qp, dereg_mr, destroy_qp, open_device, reg_mr
from kit.drivers.mlx5.verbs_post import post_recv, post_send, wait_cq
from kit.errors import DriverError
from kit.memory.costs import COSTS as MM_COSTS
from kit.memory.costs import make_costs as make_mm_costs
from kit.memory.faults.load_store import load, store
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.memory.syscalls.exit import exit_mmap, oom_reap_task_mm
from kit.memory.syscalls.fork import fork
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap, munmap
from kit.memory.syscalls.mprotect import mprotect
from kit.memory.types import (
    MADV_DONTNEED,
    MADV_FREE,
    MADV_PAGEOUT,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)
from kit.sim.engine import Engine, Thread, Wait

UPSTREAM = ("child_cmpxchg", "revoke_under_lock")  # fixes that the newest kernel has
FIXES = (*UPSTREAM, "private_hmm_pfns", "memory_fault_holds_parent")
RIGHTS = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
RW, ANON = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
GIB_PAGES = 1 << 18
FAILURES = (WcStatus.LOC_PROT_ERR, WcStatus.REM_ACCESS_ERR, WcStatus.REM_OP_ERR, WcStatus.WR_FLUSH_ERR)
COSTS = {
    "hw_fault_detect": 20.0, "irq": 2.0, "cmd_create_mkey": 20.0, "cmd_destroy_mkey": 10.0, "cmd_query_mkey": 5.0,
    "cmd_create_eq": 20.0, "cmd_resume": 20.0, "cmd_modify_qp": 5.0, "umr_wqe": 3.0, "umr_per_kib": 0.01,
    "wqe_fetch": 0.5, "cqe": 0.2, "wire_latency": 1.0, "wire_bandwidth": 12500.0, "resend_interval": 0.0, "verb": 0.5,
    "eqe": 0.2, "wq_dispatch": 1.0, "read_wqe": 0.5, "list_page": 2e-5, "dma_map_page": 0.2, "dma_unmap_page": 0.1,
    "pin_page": 0.2, "unpin_page": 0.1, "scan_entry": 1e-5, "xlt_entry": 1e-5, "xlt_alloc": 0.3, "cache_op": 0.1,
    "srcu_grace_period": 200.0,
}  # fmt: skip
MM_TIMES = dict.fromkeys(MM_COSTS, 0.2)


class Host:
    """A machine with one process and one adapter: memory of a few dozen pages and a cache of a few keys."""

    def __init__(self, plan: Schedule, name: str, frames: int) -> None:
        engine = plan.engine
        self.plan, self.name = plan, name
        self.memory = PhysicalMemory(engine, frames, payload_bytes=8, swap_slots=256)
        self.mm = Mm(self.memory, engine, plan.mm_costs, name)
        self.hca = Hca(engine, self.memory, plan.costs, plan.caps, plan.params, f"{name} hca")
        plan.fabric.attach(self.hca)
        self.dev = Mlx5IbDev(self.hca, plan.costs, plan.era, plan.options)
        self.context = open_device(self.dev, self.mm)
        self.pd = IbPd(self.dev, plan.fabric.number(self.hca), self.mm)
        thread = engine.thread(f"{name} kmod")
        shape = self.dev.imr
        for mode, ndescs in (
            (AccessMode.MTT, 4),
            (AccessMode.MTT, 16),
            (AccessMode.MTT, shape.mtt_entries),
            (AccessMode.KSM, shape.ksm_entries),
        ):
            ent: Any = mlx5r_cache_create_ent_locked(self.dev, thread, RbKey(0, mode, 0, ndescs), True)
            ent.limit = 2 if ndescs <= 16 else 0
        warm_cache(self.dev)
        self.first = plan.first
        self.mms = [self.mm]
        self.regions: list[Region] = []
        self.all_mrs: list[Mlx5IbMr] = []


class Region:
    """A registered region: which pages, of which kind, and who relies on it."""

    def __init__(self, mr: Mlx5IbMr, kind: str, first: int, pages: int, rights: int) -> None:
        self.mr, self.kind, self.first, self.pages, self.rights = mr, kind, first, pages, rights
        self.dying = False

    def covers(self, first: int, count: int) -> bool:
        return not self.dying and self.first <= first and first + count <= self.first + self.pages


class Schedule(Checks):
    """Everything that happens under one seed.

    Parameters
    ----------
    seed : int
    era : Era or None
        None: drawn.
    fixes : names of `OdpOptions`
        Which fixes the kernel has; the newest always has those of `UPSTREAM`.
    implicit_only : bool
        No other kind of region, no disruption: what children do.
    """

    def __init__(
        self, seed: int, era: Era | None = None, fixes: Collection[str] = FIXES, implicit_only: bool = False
    ) -> None:  # fmt: skip
        self.seed, self.random = seed, np.random.default_rng(seed)
        pick = self.random
        drawn = Era(int(pick.integers(3)))
        self.era = drawn if era is None else era
        fixed = {name: name in fixes or (self.era == Era.NEW and name in UPSTREAM) for name in FIXES}
        self.options = OdpOptions(**fixed, task_size=1 << 34, pf_max_active=int(pick.choice([1, 2, 32])))
        self.memory_scheme = self.era == Era.NEW and bool(pick.random() < 0.5)
        self.caps = HcaCaps(mem_page_fault=self.memory_scheme, page_prefetch=self.memory_scheme)
        self.params = HcaParameters(
            rdma_op_len_known=bool(pick.random() < 0.7), prefetch_before=int(pick.choice([0, 0, 3])),
            prefetch_after=int(pick.choice([0, 0, 5])),
        )  # fmt: skip
        scale = np.exp(pick.normal(0.0, 1.0, len(COSTS)))
        self.costs = make_costs({name: cost * float(s) for (name, cost), s in zip(COSTS.items(), scale, strict=True)})
        self.mm_costs = make_mm_costs(
            {name: cost * float(pick.choice([0.2, 1.0, 5.0])) for name, cost in MM_TIMES.items()}
        )
        self.engine = Engine(seed, float(pick.choice([0.2, 1.0, 4.0])))
        self.fabric = Fabric()
        self.disruptive = not implicit_only and bool(pick.random() < 0.35)
        self.exits = self.disruptive and bool(pick.random() < 0.4)
        self.implicit_only = implicit_only
        self.pages = int(pick.choice([4, 6, 10]))
        self.kept = 0 if implicit_only else self.pages // 3  # pages that nobody gives up: those may be pinned
        self.first = GIB_PAGES - int(pick.integers(0, self.pages + 1))  # some lie in one child, some in two
        self.timer = int(pick.choice([1, 4, 7]))
        tight = bool(pick.random() < 0.2)
        self.client = Host(self, "client", 3 * self.pages + 24)
        self.server = Host(self, "server", (self.pages + 6) if tight else 4 * self.pages + 24)
        self.hosts = (self.client, self.server)
        self.contents = Registers(self.server.first, self.pages)
        self.order, self.value = itertools.count(1), itertools.count(1 + seed % 1000 * 1_000_000)
        self.forks = self.steps = self.failures = self.gone = 0
        self.done: list[str] = []

    # -- the course ----------------------------------------------------------------------------------------------

    def run(self) -> Schedule:
        """Run it all; `Broken` says what does not hold."""
        main = self.engine.start(self.main())
        self.engine.run(self.any_end(main))
        need(main.triggered, "someone waits for ever")
        self.engine.run(self.engine.env.timeout(1e4))
        self.check_end()
        return self

    def any_end(self, main: simpy.Process) -> simpy.Event:
        """The end of the program, or a second: whoever is not through by then never will be."""
        env: Any = self.engine.env
        return env.any_of([main, env.timeout(1e6)])

    def main(self) -> Wait:
        pick, thread = self.random, self.engine.thread("main")
        for host in self.hosts:
            at = host.first * PAGE
            got = yield from mmap(host.mm, thread, self.pages * PAGE, RW, ANON | MAP_FIXED, addr=at)
            need(got == at, f"mmap {got}")
        yield from self.touch_some(thread)
        for host, count in ((self.client, 1), (self.server, int(pick.integers(1, 4)))):
            for number in range(count):
                kind = (
                    "implicit"
                    if self.implicit_only
                    else str(pick.choice(["implicit", "explicit", "pinned"], p=[0.5, 0.4, 0.1]))
                )
                if not number and kind == "pinned":
                    kind = "explicit"
                yield from self.register(host, thread, kind, whole=not number)
        actors = [
            self.traffic(number, int(pick.integers(2, 5)), np.random.default_rng([self.seed, 1, number]))
            for number in range(int(pick.integers(1, 4)))
        ]
        for number in range(int(pick.integers(1, 4))):
            rng = np.random.default_rng([self.seed, 2, number])
            actors.append(self.chaos(self.server, number, int(pick.integers(3, 8)), rng))
        if pick.random() < 0.5:
            actors.append(self.chaos(self.client, 9, int(pick.integers(1, 4)), np.random.default_rng([self.seed, 3])))
        running = [self.engine.start(actor) for actor in actors]
        for process in running:
            yield from thread.wait(process)
        if self.exits:
            yield from self.leave(thread)
        yield from self.close(thread)

    def touch_some(self, thread: Thread) -> Wait:
        for host in self.hosts:
            pages = np.flatnonzero(self.random.random(self.pages) < 0.5)
            if len(pages):
                values = self.values(len(pages))
                for page, value in zip(pages.tolist(), values.tolist(), strict=True):
                    if host is self.server:
                        write = self.begin(page, np.array([value], np.uint64), "first")
                        write.end = next(self.order)
                yield from store(host.mm, thread, host.first + pages, values)

    def leave(self, thread: Thread) -> Wait:
        """The server's process exits while messages for it are on their way."""
        last = self.engine.start(self.traffic(7, 2, np.random.default_rng([self.seed, 4])))
        thread.charge(float(self.random.exponential(60)))
        yield from thread.sync()
        self.gone = True
        self.begin(0, np.zeros(self.pages, np.uint64), "exit")
        if self.random.random() < 0.3:
            yield from oom_reap_task_mm(self.server.mm, thread)
        self.server.mm.mm_users -= 1
        if not self.server.mm.mm_users:
            yield from exit_mmap(self.server.mm, thread)
        yield from thread.wait(last)
        self.check("exit")

    def close(self, thread: Thread) -> Wait:
        """Deregister everything, two at a time."""
        left = [region for host in self.hosts for region in host.regions if not region.dying]
        for pair in itertools.zip_longest(left[::2], left[1::2]):
            going = [
                self.engine.start(self.deregister(region, self.engine.thread("close"))) for region in pair if region
            ]
            for process in going:
                yield from thread.wait(process)
            self.check("close")

    # -- helpers --------------------------------------------------------------------------------------------------

    def values(self, count: int) -> np.ndarray:
        return np.array(list(itertools.islice(self.value, count)), dtype=np.uint64)

    def begin(self, first: int, values: np.ndarray, what: str) -> Write:
        return self.contents.begin(self.server.first + first, values, next(self.order), what)

    def compare(self, registers: Registers, first: int, seen: np.ndarray, begun: int, what: str) -> None:
        wrong = registers.wrong(self.server.first + first, seen, begun, next(self.order))
        need(not len(wrong), f"lost payload: {what} page {first + wrong} holds {seen[wrong]}")

    def say(self, thread: Thread, *words: object) -> None:
        self.steps += 1
        self.done.append(f"{thread.now:.3f} {thread.name}: " + " ".join(map(str, words)))

    def rest(self, thread: Thread, rng: np.random.Generator) -> Wait:
        thread.charge(float(rng.exponential(40)))
        yield from thread.sync()

    def span(self, rng: np.random.Generator, low: int = 0) -> tuple[int, int]:
        """Some consecutive pages from `low` on."""
        first = int(rng.integers(low, self.pages))
        return first, int(rng.integers(1, self.pages - first + 1))

    def register(
        self, host: Host, thread: Thread, kind: str, whole: bool, rng: np.random.Generator | None = None
    ) -> Wait:
        rng = rng or self.random
        first, count = (0, self.pages) if whole else self.span(rng)
        rights = RIGHTS if whole or rng.random() < 0.8 else Access.REMOTE_READ
        if kind == "pinned":
            if not self.kept:
                return
            first, count = 0, self.kept
        at, length, access = (host.first + first) * PAGE, count * PAGE, rights
        if kind == "implicit":
            at, length, first, count = 0, U64_MAX, 0, self.pages
        if kind != "pinned":
            access |= Access.ON_DEMAND
        self.say(thread, "register", kind, first, count)
        mr = yield from reg_mr(host.pd, thread, at, length, access)
        if isinstance(mr, int):
            need(self.disruptive and kind == "pinned", f"registration failed: {mr!r}")
            return
        host.regions.append(Region(mr, kind, first, count, rights))
        host.all_mrs.append(mr)
        self.check("register")

    def deregister(self, region: Region, thread: Thread) -> Wait:
        region.dying = True
        self.say(thread, "deregister", region.kind, region.first, region.pages)
        ret = yield from dereg_mr(region.mr, thread)
        need(ret == 0 and region.mr.dead, f"deregistration failed: {ret!r}")
        self.check("deregister")

    # -- traffic --------------------------------------------------------------------------------------------------

    def traffic(self, number: int, steps: int, rng: np.random.Generator) -> Wait:
        """Messages from the client, over a queue pair and through client pages of the actor's own."""
        thread, client = self.engine.thread(f"traffic {number}"), self.client
        own = yield from mmap(
            client.mm, thread, self.pages * PAGE, RW, ANON | MAP_FIXED, addr=(client.first + 32 * (number + 1)) * PAGE
        )
        yield from reg_own(self, client, thread, own)
        source = client.regions[-1] if client.regions[0].kind != "implicit" else client.regions[0]
        pair: tuple[Qp, Qp] | None = None
        for _ in range(steps):
            yield from self.rest(thread, rng)
            if pair is None:
                pair = yield from self.connect(thread)
            fitting = self.fitting(rng)
            if fitting is None:
                continue
            region, first, count = fitting
            what = str(
                rng.choice(["write", "write", "read", "send"] if region.rights & Access.REMOTE_WRITE else ["read"])
            )
            self.say(thread, what, region.kind, first, count)
            good = yield from self.message(thread, pair, source.mr, own, region, what, first, count)
            if not good:
                for qp in pair:
                    yield from destroy_qp(qp, thread)
                pair = None
            self.check(what)

    def connect(self, thread: Thread) -> Wait:
        pair = []
        for host in self.hosts:
            cq = yield from create_cq(host.context, thread, 64)
            pair.append((yield from create_qp(host.pd, thread, QpType.RC, cq, cq)))
        ret = yield from connect(thread, *pair, min_rnr_timer=self.timer, timeout=14)
        need(ret == 0, f"connect {ret!r}")
        return tuple(pair)

    def fitting(self, rng: np.random.Generator) -> tuple[Region, int, int] | None:
        """Draw a region of the server and pages of it."""
        alive = [region for region in self.server.regions if not region.dying]
        if not alive:
            return None
        region = alive[int(rng.integers(len(alive)))]
        first = region.first + int(rng.integers(region.pages))
        return region, first, int(rng.integers(1, region.first + region.pages - first + 1))

    def message(
        self, thread: Thread, pair: tuple[Qp, Qp], source: Mlx5IbMr, own: int, region: Region, what: str, first: int,
        count: int,
    ) -> Wait:  # fmt: skip
        """One message and its check; False when the queue pair is broken, which needs an excuse."""
        client, server, pages = self.client, self.server, own // PAGE + np.arange(count)
        remote, length = (server.first + first) * PAGE, count * PAGE
        values = self.values(count)
        local = (Sge(own, length, source.lkey),)
        yield from store(client.mm, thread, pages, values)
        write, begun = None, next(self.order)
        if what != "read":
            write = self.begin(first, values, what)
        if what == "send":
            ret = yield from post_recv(pair[1], thread, RecvWr(1, (Sge(remote, length, region.mr.lkey),)))
            need(ret == 0, f"post_recv {ret!r}")
        opcode = {"write": WrOpcode.RDMA_WRITE, "read": WrOpcode.RDMA_READ, "send": WrOpcode.SEND}[what]
        ret = yield from post_send(pair[0], thread, SendWr(1, opcode, local, remote_addr=remote, rkey=region.mr.rkey))
        need(ret == 0, f"post_send {ret!r}")
        (wc,) = yield from wait_cq(pair[0].send_cq, thread)
        if wc.status != WcStatus.SUCCESS:
            self.failures += 1
            need(wc.status in FAILURES and self.excused(region), f"failed without cause: {what} {wc.status.name}")
            return False
        if write is not None:
            write.end = next(self.order)
        if what == "read":
            seen = yield from load(client.mm, thread, pages)
            self.compare(self.contents, first, seen, begun, "RDMA READ")
        elif what == "send":
            (got,) = yield from wait_cq(pair[1].recv_cq, thread)
            need(got.status == WcStatus.SUCCESS and got.byte_len == length, f"receive {got}")
        return True

    def excused(self, region: Region) -> bool:
        """Whether a message may fail: memory was taken or protected, the region went, or its child's key did."""
        return self.disruptive or region.dying or self.out_of_memory() or (self.memory_scheme and self.unknown_key())

    def out_of_memory(self) -> bool:
        return "VM_FAULT_OOM" in self.engine.trace.statuses.ids

    def unknown_key(self) -> bool:
        return "unknown key" in self.engine.trace.statuses.ids

    # -- everybody else -------------------------------------------------------------------------------------------

    def chaos(self, host: Host, number: int, steps: int, rng: np.random.Generator) -> Wait:
        """A thread of the program, or the kernel on its behalf."""
        thread = self.engine.thread(f"{host.name} chaos {number}")
        names = [n for n in STEPS if self.disruptive or n not in DISRUPTIVE]
        if host is self.client:
            names = [n for n in names if n in CLIENT_STEPS]
        weights = np.array([STEPS[n] for n in names], dtype=float)
        for name in rng.choice(names, steps, p=weights / weights.sum()).tolist():
            yield from self.rest(thread, rng)
            self.say(thread, name)
            yield from getattr(self, name)(host, thread, rng)
            self.check(name)

    def cpu_store(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        first, count = self.span(rng)
        write = self.begin(first, self.values(count), "cpu store")
        if (
            yield from self.tried(store(host.mm, thread, host.first + first + np.arange(count), write.values))
        ) is not False:
            write.end = next(self.order)

    def cpu_load(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        first, count = self.span(rng)
        begun = next(self.order)
        seen = yield from self.tried(load(host.mm, thread, host.first + first + np.arange(count)))
        if seen is not False:
            self.compare(self.contents, first, seen, begun, "cpu load")

    def tried(self, access: Wait) -> Wait:
        try:
            return (yield from access)
        except DriverError as error:
            need(self.disruptive and error.status == "SIGSEGV", f"CPU access: {error}")
            return False

    def dontneed(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        first, count = self.span(rng, self.kept)
        write = self.begin(first, np.zeros(count, np.uint64), "madvise")
        ret = yield from madvise(host.mm, thread, (host.first + first) * PAGE, count * PAGE, MADV_DONTNEED)
        need(ret == 0 or self.disruptive, f"madvise {ret!r}")
        write.end = next(self.order) if ret == 0 else write.end

    def free(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        """MADV_FREE: from now on reclaim may drop the contents, at any time until they are written again."""
        first, count = self.span(rng, self.kept)
        self.begin(first, np.zeros(count, np.uint64), "madvise free")
        ret = yield from madvise(host.mm, thread, (host.first + first) * PAGE, count * PAGE, MADV_FREE)
        need(ret == 0 or self.disruptive, f"madvise {ret!r}")

    def pageout(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        first, count = self.span(rng)
        if host is self.client:
            first += 32 * int(rng.integers(0, 4))
        ret = yield from madvise(host.mm, thread, (host.first + first) * PAGE, count * PAGE, MADV_PAGEOUT)
        need(ret == 0 or self.disruptive or host is self.client, f"madvise {ret!r}")

    def protect(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        first, count = self.span(rng)
        for prot in (PROT_READ if rng.random() < 0.6 else PROT_NONE, RW):
            ret = yield from mprotect(host.mm, thread, (host.first + first) * PAGE, count * PAGE, prot)
            need(ret in (0, -12), f"mprotect {ret!r}")
            self.check("mprotect")
            yield from self.rest(thread, rng)

    def remap(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        first, count = self.span(rng, self.kept)
        start = (host.first + first) * PAGE
        write = self.begin(first, np.zeros(count, np.uint64), "munmap")
        need((yield from munmap(host.mm, thread, start, count * PAGE)) == 0, "munmap")
        self.check("munmap")
        yield from self.rest(thread, rng)
        need((yield from mmap(host.mm, thread, count * PAGE, RW, ANON | MAP_FIXED, addr=start)) == start, "mmap")
        write.end = next(self.order)

    def forked(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        """A child shares every page, looks at it later, writes to some, and exits."""
        if self.forks:
            return
        self.forks += 1
        begun = next(self.order)
        child = yield from fork(host.mm, thread)
        need(isinstance(child, Mm), f"fork {child!r}")
        host.mms.append(child)
        copy = Registers(host.first, self.pages, self.contents, (begun, next(self.order)))
        self.check("fork")
        for _ in range(2):
            yield from self.rest(thread, rng)
            mapped = np.array([p for p in range(self.pages) if child.find(host.first + p) is not None], dtype=np.int64)
            begun = next(self.order)
            for page in mapped.tolist():
                seen = yield from self.tried(load(child, thread, np.array([host.first + page])))
                if seen is not False:
                    self.compare(copy, page, seen, begun, "child's load")
            if len(mapped) and rng.random() < 0.5:
                page = int(rng.choice(mapped))
                write = copy.begin(host.first + page, self.values(1), next(self.order), "child's store")
                if (
                    yield from self.tried(store(child, thread, np.array([host.first + page]), write.values))
                ) is not False:
                    write.end = next(self.order)
            self.check("child")
        yield from exit_mmap(child, thread)
        host.mms.remove(child)

    def advise(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        alive = [r for r in host.regions if not r.dying and r.kind != "pinned" and r.first < self.pages]
        if not alive:
            return
        region = alive[int(rng.integers(len(alive)))]
        first = region.first + int(rng.integers(region.pages))
        sge = Sge(
            (host.first + first) * PAGE,
            int(rng.integers(1, region.first + region.pages - first + 1)) * PAGE,
            region.mr.lkey,
        )
        advice = int(rng.integers(PREFETCH_NO_FAULT + 1))
        if advice == PREFETCH_WRITE and region.rights != RIGHTS:
            advice = PREFETCH_NO_FAULT
        ret = yield from advise_mr(host.pd, thread, advice, int(rng.choice([0, ADVISE_FLUSH])), [sge])
        need(ret == 0 or self.disruptive or region.dying or -ret == 11, f"advise_mr {ret!r}")

    def enroll(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        kinds = ["implicit"] if self.implicit_only else ["implicit", "explicit", "explicit", "pinned"]
        yield from self.register(host, thread, str(rng.choice(kinds)), False, rng)

    def drop(self, host: Host, thread: Thread, rng: np.random.Generator) -> Wait:
        alive = [region for region in host.regions[1:] if not region.dying and region.first < self.pages]
        if alive:
            yield from self.deregister(alive[int(rng.integers(len(alive)))], thread)


def reg_own(plan: Schedule, client: Host, thread: Thread, own: int) -> Wait:
    """Unless an implicit region covers everything, register the actor's own pages."""
    if client.regions[0].kind != "implicit":
        mr = yield from reg_mr(client.pd, thread, own, plan.pages * PAGE, RIGHTS | Access.ON_DEMAND)
        need(isinstance(mr, Mlx5IbMr), f"registration failed: {mr!r}")
        client.regions.append(Region(mr, "explicit", own // PAGE - client.first, plan.pages, RIGHTS))
        client.all_mrs.append(mr)


STEPS = {
    "cpu_store": 4, "cpu_load": 4, "dontneed": 6, "free": 1, "pageout": 4, "protect": 2, "remap": 2, "forked": 2,
    "advise": 4, "enroll": 2, "drop": 2,
}  # fmt: skip
DISRUPTIVE = ("protect", "remap")
CLIENT_STEPS = ("pageout", "advise", "enroll", "drop")
