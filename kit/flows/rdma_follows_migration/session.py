"""A session: a buffer, a region over it, somebody who moves its pages, and messages that go on as if nothing was."""

from __future__ import annotations

from typing import Self

import numpy as np

from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.errors import raise_for
from kit.flows.rdma.content import Area, cpu_write
from kit.flows.rdma.one_sided import OneSidedSession
from kit.flows.rdma.traffic import cut, transfers_of
from kit.flows.rdma_follows_migration.exporter import Exporter
from kit.flows.rdma_follows_migration.movers import FileSystem, Gpu, Moved
from kit.flows.rdma_follows_migration.parameters import FollowsParameters
from kit.memory.faults.load_store import load
from kit.memory.files.file import File
from kit.memory.syscalls.mmap import mmap
from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PAGE, PROT_READ, PROT_WRITE
from kit.sim.engine import Wait

__all__ = ["STAGES", "FollowsSession"]

STAGES = ("open_device", "register", "rdma", "move", "rdma_follows", "more_rounds", "read_back", "deregister")


class FollowsSession(OneSidedSession):
    """The flow as an object with one method a stage."""

    stages_of = STAGES
    parameters: FollowsParameters

    def __init__(self, parameters: FollowsParameters, scenario: str = "") -> None:
        p = parameters
        super().__init__(p, scenario, p.message_bytes, p.depth, p.qps)
        self.mover: Gpu | FileSystem | Exporter | None = None
        self.moved = Moved()
        self.numbers = 0

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
    def area(self) -> Area:
        """The buffer."""
        assert self.areas, "open_device comes first"
        return self.areas[0]

    def is_told(self, mr: Mlx5IbMr) -> bool:
        """Whether the adapter hears of what happens to a region's pages."""
        return self.parameters.notifiers and super().is_told(mr)

    # -- stages ----------------------------------------------------------------------------------------------------

    def _open_device(self) -> Wait:
        yield from self.open_hosts()
        p, host = self.parameters, self.responder
        pages = p.bytes // PAGE
        file = File(host.memory, pages, name="data") if p.mover == "file_system" else None
        flags = MAP_SHARED if file is not None else MAP_PRIVATE | MAP_ANONYMOUS
        va = raise_for(
            (yield from mmap(host.mm, host.cpu, p.bytes, PROT_READ | PROT_WRITE, flags, file, name="buffer"))
        )
        gpu_pages = -(-p.gpu_memory_bytes // PAGE // 512) * 512
        if p.mover == "dma_buf":
            self.mover = Exporter(host, self.machine, gpu_pages, va, p)
            self.add_area(self.mover.area)
        else:
            area = self.add_area(Area("buffer", va, pages, host.memory.words))
            yield from cpu_write(host.mm, host.cpu, area, np.arange(pages), 1 << 30, self.rng)
            self.mover = FileSystem(host, file) if file is not None else Gpu(host, self.machine, gpu_pages)
        yield from self.mover.open()
        yield from self.traffic.prepare()

    def _register(self) -> Wait:
        if isinstance(self.mover, Exporter):
            self.start_using("dmabuf", (yield from self.mover.register()))
        else:
            yield from self.register_one(self.parameters.kind, self.area.va, self.parameters.bytes)

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
        area, host = self.area, self.responder
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

    def _messages(self) -> Wait:
        p, area = self.parameters, self.area
        parts = cut(area, 0, area.pages, p.message_bytes)
        yield from self.traffic.run(transfers_of(parts, p.operation, p.read_share, self.rng), self.mr)

    def _move_all(self) -> Wait:
        """Move every page; with the notifiers off nobody is told."""
        p, mm, area = self.parameters, self.responder.mm, self.area
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

    # -- the result --------------------------------------------------------------------------------------------------

    def own_metrics(self) -> dict[str, float]:
        """Return what became of the moves."""
        return {
            "pages_moved": self.moved.went,
            "pages_that_stayed": self.moved.stayed,
            "stale_pages_detected": self.detected,
        }  # fmt: skip
