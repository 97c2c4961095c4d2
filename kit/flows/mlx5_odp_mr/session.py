"""A session: the same buffers registered pinned, explicitly on demand and implicitly, and what each of them costs."""

from __future__ import annotations

from typing import Self

from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.enums import Access
from kit.errors import Errno, ParameterError, raise_for
from kit.flows.mlx5_odp_mr.buffers import Buffers
from kit.flows.mlx5_odp_mr.parameters import HUGE, KINDS, OdpMrParameters
from kit.flows.rdma.content import Area, cpu_write
from kit.flows.rdma.one_sided import OneSidedSession, reg_mr
from kit.flows.rdma.pressure import page_out
from kit.flows.rdma.traffic import cut, transfers_of
from kit.memory.syscalls.madvise import madvise
from kit.memory.syscalls.mmap import mmap
from kit.memory.types import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE
from kit.sim.engine import Wait

__all__ = ["STAGES", "OdpMrSession"]

STAGES = ("open_device", "register", "prefetch", "first_touch", "page_out", "second_touch", "deregister")
ADVICE = {"prefetch": 0, "prefetch_write": 1, "no_fault": 2}  # IB_UVERBS_ADVISE_MR_ADVICE_*
FLUSH = 1  # IB_UVERBS_ADVISE_MR_FLAG_FLUSH
SGES = 16  # ranges in one ibv_advise_mr
DEPTH = 8


class OdpMrSession(OneSidedSession):
    """The flow as an object with one method a stage."""

    stages_of = STAGES
    parameters: OdpMrParameters

    def __init__(self, parameters: OdpMrParameters, scenario: str = "") -> None:
        p = parameters
        super().__init__(p, scenario, min(p.message_bytes, p.bytes), DEPTH)
        self.kinds = KINDS if p.kind == "all" else (p.kind,)
        memory = self.frames("responder") * PAGE
        if p.bytes * p.regions * len(self.kinds) > memory:
            most = f"at most {memory // len(self.kinds) // p.regions} with that many regions"
            raise ParameterError("bytes", p.bytes, most + ": the host's memory is full")
        self.buffers: list[Buffers] = []

    def open_device(self) -> Self:
        """Load the module, open the devices, map the buffers, let the CPU write what is to be resident."""
        return self.stage("open_device")

    def register(self) -> Self:
        """Call ibv_reg_mr for every buffer, kind after kind."""
        return self.stage("register")

    def prefetch(self) -> Self:
        """Call ibv_advise_mr, where asked for."""
        return self.stage("prefetch")

    def first_touch(self) -> Self:
        """The requester's messages reach every buffer for the first time."""
        return self.stage("first_touch")

    def page_out(self) -> Self:
        """The kernel or the program takes pages away."""
        return self.stage("page_out")

    def second_touch(self) -> Self:
        """The same messages again."""
        return self.stage("second_touch")

    def deregister(self) -> Self:
        """Call ibv_dereg_mr for every region, kind after kind."""
        return self.stage("deregister")

    # -- stages ----------------------------------------------------------------------------------------------------

    def _open_device(self) -> Wait:
        yield from self.open_hosts()
        for kind in self.kinds:
            yield from self._map(kind)
        if self.parameters.operation != "none":
            yield from self.traffic.prepare()

    def _map(self, kind: str) -> Wait:
        p, host = self.parameters, self.responder
        size, flags = p.bytes * p.regions, MAP_PRIVATE | MAP_ANONYMOUS
        if p.pages == "hugetlb":
            host.memory.set_hugetlb_pool(9, size // HUGE)
            flags |= MAP_HUGETLB
        align = PAGE if p.pages == "small" else HUGE
        va = yield from mmap(
            host.mm, host.cpu, size, PROT_READ | PROT_WRITE, flags, align=align, name=f"{kind} buffers"
        )
        raise_for(va)
        if p.pages == "transparent":
            raise_for((yield from madvise(host.mm, host.cpu, va, size, MADV_HUGEPAGE)))
        buffers = Buffers(kind, self.add_area(Area(f"{kind} buffers", va, size // PAGE, host.memory.words)), p.bytes)
        self.buffers.append(buffers)
        self.allocations.sort(key=lambda each: each.va)
        pages, number = buffers.chosen(p.resident), 1 << 30 | len(self.buffers)
        yield from cpu_write(host.mm, host.cpu, buffers.area, pages, number, self.rng)
        yield from host.cpu.sync()

    def _register(self) -> Wait:
        host, p = self.responder, self.parameters
        host.mm.rlimit_memlock = p.memlock_bytes or host.mm.rlimit_memlock
        self.arm(host)
        for buffers in self.buffers:
            yield from self._timed(buffers.kind, "register", self._register_kind(buffers))
            for name, size in buffers.held(host.mm).items():
                self.counts[f"{buffers.kind}_{name}_bytes"] = size

    def _register_kind(self, buffers: Buffers) -> Wait:
        host, p = self.responder, self.parameters
        flags = Access.HUGETLB if p.pages == "hugetlb" and buffers.kind == "explicit" else 0
        for start in buffers.starts()[: 1 if buffers.kind == "implicit" else None]:
            mr = yield from reg_mr(host, buffers.kind, start, p.bytes, flags)
            if isinstance(self.note(mr, f"ibv_reg_mr ({buffers.kind})"), Errno):
                break
            buffers.mrs.append(mr)
            if len(buffers.mrs) == 1:
                host.mrs.append((buffers.kind, mr))

    def _prefetch(self) -> Wait:
        p, host = self.parameters, self.responder
        for buffers in self.buffers if p.prefetch != "none" else ():
            if buffers.kind == "pinned" or not buffers.mrs:
                continue
            yield from self._timed(buffers.kind, "prefetch", self._advise(buffers))
        yield from host.cpu.sync()

    def _advise(self, buffers: Buffers) -> Wait:
        p, host = self.parameters, self.responder
        sges = [Sge(start, p.bytes, buffers.mr_of(at).lkey) for at, start in enumerate(buffers.starts())]
        for at in range(0, len(sges), SGES):
            ret = yield from verbs.advise_mr(
                host.pd, host.cpu, ADVICE[p.prefetch], FLUSH if p.flush else 0, sges[at : at + SGES]
            )
            self.note(ret, f"ibv_advise_mr ({buffers.kind})")

    def _first_touch(self) -> Wait:
        yield from self._touch("first_touch")

    def _second_touch(self) -> Wait:
        if self.parameters.again:
            yield from self._touch("second_touch")

    def _touch(self, stage: str) -> Wait:
        if self.parameters.operation != "none":
            for buffers in self.buffers:
                if buffers.mrs:
                    yield from self._timed(buffers.kind, stage, self._messages(buffers))
        yield from self.responder.cpu.sync()

    def _messages(self, buffers: Buffers) -> Wait:
        p = self.parameters
        pages = -(-int(p.bytes * p.touch_share) // PAGE)
        for at in range(len(buffers.starts())):
            parts = cut(buffers.area, at * buffers.part_pages, pages, p.message_bytes)
            if parts:
                yield from self.traffic.run(transfers_of(parts, p.operation, 0, self.rng), buffers.mr_of(at))

    def _page_out(self) -> Wait:
        p, host = self.parameters, self.responder
        share = int(p.bytes * p.page_out_share) // PAGE
        for buffers in self.buffers if p.page_out != "none" and share else ():
            work = page_out(host, host.cpu, p.page_out, buffers.area, buffers.start_of_parts(share))
            yield from self._timed(buffers.kind, "page_out", work)
            self.counts[f"{buffers.kind}_resident_after_bytes"] = buffers.resident_bytes(host.mm)

    def _deregister(self) -> Wait:
        for buffers in self.buffers:
            yield from self._timed(buffers.kind, "deregister", self._deregister_kind(buffers))

    def _deregister_kind(self, buffers: Buffers) -> Wait:
        for mr in buffers.mrs:
            self.note((yield from verbs.dereg_mr(mr, self.responder.cpu)), f"ibv_dereg_mr ({buffers.kind})")

    def _timed(self, kind: str, what: str, work: Wait) -> Wait:
        """Run something and write down how long it took as ``<kind>_<what>_us``."""
        cpu = self.responder.cpu
        cpu.now = max(cpu.now, self.engine.now)
        yield from cpu.sync()
        start = self.engine.now
        yield from work
        cpu.now = max(cpu.now, self.engine.now)
        yield from cpu.sync()
        self.counts[f"{kind}_{what}_us"] = self.engine.now - start

    # -- the result --------------------------------------------------------------------------------------------------

    def own_metrics(self) -> dict[str, float]:
        """Return what is particular to this flow: regions, pages pinned now, and pages that were no longer theirs."""
        return {
            "regions": sum(len(buffers.mrs) for buffers in self.buffers),
            "pinned_now_bytes": self.responder.mm.pinned_vm * PAGE,
            "stale_pages_detected": self.detected,
        }
