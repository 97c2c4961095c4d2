"""A GPU whose driver exports its buffer as a dma-buf: it moves the buffer when it likes, and tells importers before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dma_buf_exporter import (
    COSTS,
    GTT,
    VRAM,
    AmdgpuBo,
    AmdgpuDevice,
    amdgpu_gem_prime_export,
    ttm_bo_validate,
)
from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.enums import Access
from kit.errors import Errno, raise_for
from kit.flows.rdma.content import Area, message_bytes
from kit.flows.rdma_follows_migration.movers import Moved
from kit.memory.device.dma_buf import DmaBuf, close_fd, dma_buf_fd
from kit.memory.device.dma_resv import DMA_RESV_USAGE_KERNEL
from kit.memory.syscalls.mmap import mmap
from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE
from kit.sim.costs import Costs

if TYPE_CHECKING:
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.flows.rdma.hosts import Host
    from kit.flows.rdma_follows_migration.parameters import FollowsParameters
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Wait
    from kit.sim.machine import Machine

__all__ = ["BufferArea", "Exporter"]


class BufferArea(Area):
    """The buffer under the addresses that work requests call it by; no page table of the CPU says where it is."""

    bo: AmdgpuBo

    def check(self, mm: Mm) -> tuple[int, int]:
        """Return how many pages were compared with memory and how many of them differ."""
        same = (mm.memory.payload[self.bo.pfns] == self.model).all(axis=1)
        checked = ~self.unknown
        return int(checked.sum()), int((checked & ~same).sum())

    def frames(self, mm: Mm, first: int, count: int) -> NDArray[np.int64]:
        """Return the page that each virtual page number stands for."""
        at = first - self.va // PAGE
        return self.bo.pfns[at : at + count]


class Exporter:
    """The GPU, with one buffer that it exports.

    Parameters
    ----------
    host : Host
    machine : Machine
    pages : int
        Its memory.
    va : int
        Address space that the program has set aside for the buffer.
    parameters : FollowsParameters
    """

    def __init__(self, host: Host, machine: Machine, pages: int, va: int, parameters: FollowsParameters) -> None:
        p = parameters
        costs = Costs(COSTS, {name: machine[name] for name in COSTS})
        self.host, self.parameters = host, p
        distance = 0 if p.peer_to_peer else -1
        self.adev = AmdgpuDevice(
            host.engine, host.memory, pages, costs, distance, engine_name=f"{host.name} gpu copy engine"
        )  # fmt: skip
        self.adev.notify = p.notifiers
        self.bo = AmdgpuBo(self.adev, p.bytes // PAGE, VRAM, va // PAGE)
        self.area = BufferArea("buffer", va, p.bytes // PAGE, host.memory.words)
        self.area.bo = self.bo
        self.thread = host.engine.thread("gpu driver")
        self.fd = -1
        self._beside: Mlx5IbMr | None = None

    def open(self) -> Wait:
        """Let the GPU write all of the buffer, and get a descriptor of it."""
        self._wake()
        yield from self.write(self.area, 1 << 30, np.random.default_rng(self.parameters.seed))
        buffer = amdgpu_gem_prime_export(self.bo, self.thread)
        if isinstance(buffer, DmaBuf):
            buffer.config_move_notify = self.parameters.move_notify
            self.fd = dma_buf_fd(buffer, self.thread, self.host.mm)

    def register(self) -> Wait:
        """Register the buffer, beside one page on demand; return the region or an Errno.

        The driver makes its page-fault queue with the first region on demand, and with no other.
        """
        host = self.host
        flags = PROT_READ | PROT_WRITE
        page = raise_for((yield from mmap(host.mm, host.cpu, PAGE, flags, MAP_PRIVATE | MAP_ANONYMOUS, name="beside")))
        beside = yield from verbs.reg_mr(host.pd, host.cpu, page, PAGE, Access.LOCAL_WRITE | Access.ON_DEMAND)
        if isinstance(beside, Errno):
            return beside
        self._beside = beside
        access = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
        return (
            yield from verbs.reg_dmabuf_mr(host.pd, host.cpu, 0, self.parameters.bytes, self.area.va, self.fd, access)
        )

    def move(self, area: Area) -> Wait:
        """Evict the buffer from the GPU's memory, or bring it back for the GPU's work; returns a `Moved`."""
        self._wake()
        yield from self.bo.resv.lock(self.thread)
        ret = yield from ttm_bo_validate(self.bo, self.thread, GTT if self.bo.domain == VRAM else VRAM)
        yield from self.bo.resv.unlock(self.thread)
        return Moved(0, area.pages) if isinstance(ret, Errno) else Moved(area.pages, 0)

    def write(self, area: Area, number: int, rng: np.random.Generator) -> Wait:
        """Let the GPU change every page, wherever the buffer is."""
        yield from self.settle()
        memory, whole = self.host.memory, self.host.memory.payload_bytes == PAGE
        self.thread.charge(self.adev.costs.dma_page * area.pages)
        yield from self.thread.sync()
        data = message_bytes(area.va, area.pages * PAGE, number, whole, rng)
        memory.payload[self.bo.pfns] = data.view(np.uint64).reshape(area.pages, -1)[:, : area.words]
        area.write(area.va, data)

    def settle(self) -> Wait:
        """Wait until the buffer's content is where the buffer is."""
        self._wake()
        for fence in self.bo.resv.busy(DMA_RESV_USAGE_KERNEL):
            yield from self.thread.wait(fence.done)

    def close(self) -> Wait:
        """Deregister what was registered beside, and close the descriptor; the program keeps the buffer object."""
        yield from self.settle()
        close_fd(self.host.mm, self.fd)
        if self._beside is not None:
            yield from verbs.dereg_mr(self._beside, self.host.cpu)

    def _wake(self) -> None:
        self.thread.now = max(self.thread.now, self.host.engine.now)
