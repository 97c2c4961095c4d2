"""A session: a buffer, a region over it, somebody who moves its pages, and messages that go on as if nothing was."""

from __future__ import annotations

from typing import Self

import numpy as np

from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.enums import MTT_PRESENT, U64_MAX, Access
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.errors import Errno, raise_for
from kit.flows.rdma.content import PAGE, Area, cpu_write
from kit.flows.rdma.session import RdmaSession
from kit.flows.rdma.traffic import Traffic, Transfer, cut
from kit.flows.rdma_follows_migration.exporter import Exporter
from kit.flows.rdma_follows_migration.movers import FileSystem, Gpu, Moved
from kit.flows.rdma_follows_migration.parameters import FollowsParameters
from kit.flows.run import Allocation, Integrity
from kit.memory.access import load
from kit.memory.file import File
from kit.memory.mmap import mmap
from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from kit.sim.engine import Wait

__all__ = ["STAGES", "FollowsSession"]

STAGES = ("open_device", "register", "rdma", "move", "rdma_follows", "more_rounds", "read_back", "deregister")
REMOTE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ


class FollowsSession(RdmaSession):
    """The flow as an object with one method a stage."""

    flow = "rdma_follows_migration"
    stages_of = STAGES
    parameters: FollowsParameters

    def __init__(self, parameters: FollowsParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        self.area: Area | None = None
        self._mr: Mlx5IbMr | None = None
        self.mover: Gpu | FileSystem | Exporter | None = None
        self.traffic = Traffic(self, parameters.message_bytes, parameters.depth, after=self._watch)
        self.moved = Moved()
        self.detected = self.numbers = 0

    def extra_frames(self, host: str) -> int:
        """The responder has a GPU; its memory is in whole blocks of 2 MiB."""
        p = self.parameters
        return (
            -(-p.gpu_memory_bytes // PAGE // 512) * 512 + 1024
            if host == "responder" and p.mover != "file_system"
            else 0
        )

    def open_device(self) -> Self:
        """Open the devices, map the buffer, let the CPU write all of it; the mover gets ready."""
        return self.stage("open_device")

    def register(self) -> Self:
        """Call ibv_reg_mr over the buffer."""
        return self.stage("register")

    def rdma(self) -> Self:
        """Messages to and from every page: the adapter now has translations for all of them."""
        return self.stage("rdma")

    def move(self) -> Self:
        """The owner of the mapping moves every page; the adapter is fenced first."""
        return self.stage("move")

    def rdma_follows(self) -> Self:
        """The same messages: the adapter faults, and gets the pages where they are now, or back home."""
        return self.stage("rdma_follows")

    def more_rounds(self) -> Self:
        """More moves, each followed by the messages."""
        return self.stage("more_rounds")

    def read_back(self) -> Self:
        """The responder's CPU reads every page."""
        return self.stage("read_back")

    def deregister(self) -> Self:
        """Call ibv_dereg_mr and close the mover."""
        return self.stage("deregister")

    @property
    def mr(self) -> Mlx5IbMr:
        """The region over the buffer."""
        assert self._mr is not None, "register comes first"
        return self._mr

    # -- stages ----------------------------------------------------------------------------------------------------

    def _open_device(self) -> Wait:
        yield from self._open()
        p, host = self.parameters, self.responder
        pages = p.bytes // PAGE
        file = File(host.memory, pages, name="data") if p.mover == "file_system" else None
        flags = MAP_SHARED if file is not None else MAP_PRIVATE | MAP_ANONYMOUS
        va = raise_for(
            (yield from mmap(host.mm, host.cpu, p.bytes, PROT_READ | PROT_WRITE, flags, file, name="buffer"))
        )
        self.area = Area("buffer", va, pages, host.memory.words)
        self.allocations.append(Allocation("buffer", va, p.bytes))
        gpu_pages = -(-p.gpu_memory_bytes // PAGE // 512) * 512
        if p.mover == "dma_buf":
            self.mover = Exporter(host, self.machine, gpu_pages, va, p)
            self.area = self.mover.area
        else:
            yield from cpu_write(host.mm, host.cpu, self.area, np.arange(pages), 1 << 30, self.rng)
            self.mover = FileSystem(host, file) if file is not None else Gpu(host, self.machine, gpu_pages)
        yield from self.mover.open()
        yield from self.traffic.prepare()

    def _register(self) -> Wait:
        host, p, area = self.responder, self.parameters, self._area()
        flags = REMOTE | (0 if p.kind == "pinned" else int(Access.ON_DEMAND))
        start, length = (0, U64_MAX) if p.kind == "implicit" else (area.va, p.bytes)
        if isinstance(self.mover, Exporter):
            mr = yield from self.mover.register()
        else:
            mr = yield from verbs.reg_mr(host.pd, host.cpu, start, length, flags)
        if isinstance(mr, Errno):
            raise_for(mr)
        self._mr = mr
        host.mrs.append(("dmabuf" if mr.is_dmabuf else p.kind, mr))
        self.arm(host)

    def _rdma(self) -> Wait:
        yield from self._messages()

    def _move(self) -> Wait:
        sending = self.engine.env.process(self._messages()) if self.parameters.move_when == "during" else None
        yield from self._move_all()
        if sending is not None:
            yield sending

    def _rdma_follows(self) -> Wait:
        yield from self._messages()

    def _more_rounds(self) -> Wait:
        for _ in range(1, self.parameters.rounds):
            yield from self._move()
            yield from self._messages()

    def _read_back(self) -> Wait:
        area, host = self._area(), self.responder
        host.cpu.now = max(host.cpu.now, self.engine.now)
        if isinstance(self.mover, Exporter):
            yield from self.mover.settle()
            return
        yield from load(host.mm, host.cpu, area.va // PAGE + np.arange(area.pages))
        yield from host.cpu.sync()

    def _deregister(self) -> Wait:
        host = self.responder
        self.note((yield from verbs.dereg_mr(self.mr, host.cpu)), "ibv_dereg_mr")
        if self.mover is not None:
            yield from self.mover.close()

    def _area(self) -> Area:
        assert self.area is not None
        return self.area

    def _messages(self) -> Wait:
        p, area = self.parameters, self._area()
        parts = cut(area, 0, area.pages, p.message_bytes)
        reads = np.full(len(parts), p.operation == "read")
        if p.operation == "mixed":
            reads = self.rng.random(len(parts)) < p.read_share
        transfers = [Transfer(area, at, size, bool(read)) for (at, size), read in zip(parts, reads, strict=True)]
        yield from self.traffic.run(transfers, self.mr.rkey)

    def _move_all(self) -> Wait:
        """Move every page; with the notifiers off nobody is told."""
        p, mm, area = self.parameters, self.responder.mm, self._area()
        assert self.mover is not None
        told = mm.notifier_subscriptions
        if not p.notifiers:
            mm.notifier_subscriptions = None
        moved = yield from self.mover.move(area)
        mm.notifier_subscriptions = told
        self.moved.went += moved.went
        self.moved.stayed += moved.stayed
        if p.gpu_writes and p.move_when == "between":
            self.numbers += 1 << 20
            yield from self.mover.write(area, (1 << 31) + self.numbers, self.rng)

    # -- what must never happen ------------------------------------------------------------------------------------

    def _watch(self, transfer: Transfer) -> None:
        """Look whether a message that has completed went to the pages that its addresses name now."""
        stale = self._stale(transfer)
        if not stale:
            return
        self.detected += stale
        now, hca = self.engine.now, self.responder.dev.hca
        self.engine.trace.span("dma_stale", hca.name, now, now, va=transfer.address, pages=stale, status="error")
        word = "RDMA_READ from" if transfer.read else "RDMA_WRITE to"
        self.errors.append(
            f"stale data: {word} {transfer.address:#x} used {stale} pages that these addresses no longer name"
        )

    def _stale(self, transfer: Transfer) -> int:
        """Return how many of a message's pages the adapter would look for in a place where they are not."""
        hca, mr = self.responder.dev.hca, self._mr
        if mr is None or self.parameters.notifiers:
            return 0
        key = mr.mmkey.key
        if mr.is_odp_implicit:
            child = mr.implicit_children.get(transfer.address >> self.responder.dev.imr.mtt_shift)
            if child is None:
                return 0
            mr, key = child, child.mmkey.key
        hardware = hca.mkeys.get(key)
        if hardware is None:
            return 0
        shift = hardware.mkc.log_page_size
        pages = np.arange(transfer.address // PAGE, -(-(transfer.address + transfer.length) // PAGE))
        entries = hardware.xlt[(pages - mr.iova // PAGE) >> (shift - 12)]
        there = (entries & np.uint64(MTT_PRESENT)) != 0
        pfns, _ = hca.dma.resolve(entries & ~np.uint64(MTT_PRESENT))
        if shift > 12:
            pfns = pfns + (pages & ((1 << (shift - 12)) - 1))
        real = transfer.area.frames(self.responder.mm, int(pages[0]), len(pages))
        return int((there & (pfns != real)).sum())

    # -- the result --------------------------------------------------------------------------------------------------

    def integrity(self) -> Integrity:
        """Compare every page of the buffer, and every page that READs brought."""
        if self.area is None:
            return Integrity(0, 0)
        checked, lost = self.area.check(self.responder.mm)
        return Integrity(checked + self.traffic.reads_checked, lost + self.traffic.reads_lost)

    def metrics(self) -> dict[str, float]:
        """Return what became of the moves."""
        return {
            "pages_moved": self.moved.went,
            "pages_that_stayed": self.moved.stayed,
            "stale_pages_detected": self.detected,
        }  # fmt: skip
