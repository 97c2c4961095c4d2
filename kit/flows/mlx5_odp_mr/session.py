"""A session: the same buffers registered pinned, explicitly on demand and implicitly, and what each of them costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.descriptors import Sge
from kit.drivers.mlx5.enums import U64_MAX, Access
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.errors import Errno, ParameterError, raise_for
from kit.flows.mlx5_odp_mr.parameters import HUGE, KINDS, OdpMrParameters
from kit.flows.rdma.content import PAGE, Area, cpu_write
from kit.flows.rdma.pressure import page_out
from kit.flows.rdma.session import RdmaSession
from kit.flows.rdma.traffic import Traffic, Transfer
from kit.flows.run import Allocation, Integrity
from kit.memory.madvise import madvise
from kit.memory.mmap import mmap
from kit.memory.types import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, PROT_READ, PROT_WRITE
from kit.sim.engine import Wait

__all__ = ["STAGES", "Buffers", "OdpMrSession"]

STAGES = ("open_device", "register", "prefetch", "first_touch", "page_out", "second_touch", "deregister")
REMOTE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
ADVICE = {"prefetch": 0, "prefetch_write": 1, "no_fault": 2}  # IB_UVERBS_ADVISE_MR_ADVICE_*
FLUSH = 1  # IB_UVERBS_ADVISE_MR_FLAG_FLUSH
NONE: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
SGES = 16  # ranges in one ibv_advise_mr
DEPTH = 8


@dataclass(eq=False)
class Buffers:
    """The buffers of one kind of region: one mapping, cut into equal parts.

    Attributes
    ----------
    kind : str
    area : Area
    size : int
        Bytes of each part.
    mrs : list of Mlx5IbMr
        One for each part; a single one when the region is implicit.
    """

    kind: str
    area: Area
    size: int
    mrs: list[Mlx5IbMr] = field(default_factory=list)

    def starts(self) -> list[int]:
        """Return the first byte of each part."""
        return list(range(self.area.va, self.area.va + self.area.pages * PAGE, self.size))

    def mr_of(self, index: int) -> Mlx5IbMr:
        """Return the region over part `index`."""
        return self.mrs[index % len(self.mrs)]


class OdpMrSession(RdmaSession):
    """The flow as an object with one method a stage."""

    flow = "mlx5_odp_mr"
    stages_of = STAGES
    parameters: OdpMrParameters

    def __init__(self, parameters: OdpMrParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        kinds = KINDS if parameters.kind == "all" else (parameters.kind,)
        whole = parameters.bytes * parameters.regions * len(kinds)
        if whole > self.frames("responder") * PAGE:
            most = (
                f"at most {self.frames('responder') * PAGE // len(kinds) // parameters.regions} with that many regions"
            )
            raise ParameterError("bytes", parameters.bytes, most + ": the host's memory is full")
        self.kinds = kinds
        self.buffers: list[Buffers] = []
        self.traffic = Traffic(self, min(parameters.message_bytes, parameters.bytes), DEPTH)

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
        yield from self._open()
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
        area = Area(f"{kind} buffers", va, size // PAGE, host.memory.words)
        self.buffers.append(Buffers(kind, area, p.bytes))
        self.allocations.append(Allocation(area.name, va, size))
        self.allocations.sort(key=lambda each: each.va)
        yield from cpu_write(host.mm, host.cpu, area, self._resident(area.pages), 1 << 30 | len(self.buffers), self.rng)
        yield from host.cpu.sync()

    def _resident(self, pages: int) -> NDArray[np.int64]:
        each = self.parameters.bytes // PAGE
        every = np.arange(pages, dtype=np.int64)
        return {"none": every[:0], "first": every[::each], "half": every[::2], "all": every}[self.parameters.resident]

    def _register(self) -> Wait:
        host, p = self.responder, self.parameters
        host.mm.rlimit_memlock = p.memlock_bytes or host.mm.rlimit_memlock
        self.arm(host)
        for buffers in self.buffers:
            yield from self._timed(buffers.kind, "register", self._register_kind(buffers))
            held = self._held(buffers)
            self.counts.update({f"{buffers.kind}_{name}_bytes": size for name, size in held.items()})

    def _register_kind(self, buffers: Buffers) -> Wait:
        host, p = self.responder, self.parameters
        flags = REMOTE | {"pinned": 0}.get(buffers.kind, int(Access.ON_DEMAND))
        flags |= Access.HUGETLB if p.pages == "hugetlb" and buffers.kind == "explicit" else 0
        ranges = [(0, U64_MAX)] if buffers.kind == "implicit" else [(at, p.bytes) for at in buffers.starts()]
        for start, length in ranges:
            mr = yield from verbs.reg_mr(host.pd, host.cpu, start, length, flags)
            if isinstance(self.note(mr, f"ibv_reg_mr ({buffers.kind})"), Errno):
                break
            buffers.mrs.append(mr)
            if len(buffers.mrs) == 1:
                host.mrs.append((buffers.kind, mr))

    def _held(self, buffers: Buffers) -> dict[str, int]:
        """Return what a kind of registration keeps: pages that nobody else can have, and the driver's lists."""
        lists = sum(
            getattr(mr.umem, "pfn_list", NONE).nbytes + getattr(mr.umem, "dma_list", NONE).nbytes for mr in buffers.mrs
        )
        pinned = self.responder.mm.pinned_vm * PAGE if buffers.kind == "pinned" else 0
        return {"pinned": pinned, "lists": lists}

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
        span = -(-int(p.bytes * p.touch_share) // PAGE) * PAGE
        for at, start in enumerate(buffers.starts()):
            parts = [
                Transfer(buffers.area, where, min(p.message_bytes, start + span - where), p.operation == "read")
                for where in range(start, start + span, p.message_bytes)
            ]
            if parts:
                yield from self.traffic.run(parts, buffers.mr_of(at).rkey)

    def _page_out(self) -> Wait:
        p, host = self.parameters, self.responder
        each, share = p.bytes // PAGE, int(p.bytes * p.page_out_share) // PAGE
        for buffers in self.buffers if p.page_out != "none" and share else ():
            pages = np.arange(buffers.area.pages, dtype=np.int64)
            pages = pages[pages % each < share]
            work = page_out(host, host.cpu, p.page_out, buffers.area, pages)
            yield from self._timed(buffers.kind, "page_out", work)
            self.counts[f"{buffers.kind}_resident_after_bytes"] = self._resident_bytes(buffers)

    def _resident_bytes(self, buffers: Buffers) -> int:
        from kit.flows.rdma.content import frames_of

        area, memory = buffers.area, self.responder.memory
        frames = frames_of(self.responder.mm, area.va // PAGE, area.pages)
        return int(((frames >= 0) & (frames < memory.system_frames)).sum()) * PAGE

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

    def integrity(self) -> Integrity:
        """Compare every page of the buffers, and every page that READs brought."""
        found = [buffers.area.check(self.responder.mm) for buffers in self.buffers]
        checked = sum(each for each, _ in found) + self.traffic.reads_checked
        return Integrity(checked, sum(lost for _, lost in found) + self.traffic.reads_lost)

    def metrics(self) -> dict[str, float]:
        """Return what is particular to this flow: regions, and pages pinned now."""
        return {
            "regions": sum(len(buffers.mrs) for buffers in self.buffers),
            "pinned_now_bytes": self.responder.mm.pinned_vm * PAGE,
        }
