"""A GPU's buffer object, exported as a dma-buf, beside whatever host it is put on."""

from __future__ import annotations

from typing import Any

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
from kit.drivers.mlx5.enums import PAGE, Access
from kit.memory.device.dma_buf import DmaBuf, dma_buf_fd
from kit.sim.costs import Costs
from kit.sim.engine import Thread, Wait

RIGHTS = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ)
IOVA = 0x7000_0000


class Gpu:
    """The GPU of a host (anything with memory, mm, pd, a thread and `do`), and one buffer of it."""

    def __init__(
        self, host: Any, pages: int = 64, p2p: bool = True, preferred: int = VRAM, memory_pages: int = 1024,
        cost: float = 1.0,
    ) -> None:  # fmt: skip
        self.host, self.pages = host, pages
        costs = Costs(COSTS, dict.fromkeys(COSTS, cost))
        self.engine = host.thread.engine
        self.thread: Thread = self.engine.thread("gpu driver")
        self.adev = AmdgpuDevice(self.engine, host.memory, memory_pages, costs, 0 if p2p else -1)
        self.bo = AmdgpuBo(self.adev, pages, preferred)
        made = amdgpu_gem_prime_export(self.bo, self.thread)
        assert isinstance(made, DmaBuf)
        self.buf = made
        self.fd = dma_buf_fd(self.buf, self.thread, host.mm)

    def register(self, offset: int = 0, length: int | None = None, iova: int = IOVA, access: int = RIGHTS) -> Wait:
        size = self.pages * PAGE - offset if length is None else length
        return verbs.reg_dmabuf_mr(self.host.pd, self.host.thread, offset, size, iova, self.fd, access)

    def validate(self, domain: int) -> Wait:
        """What command submission or eviction does: bring the buffer somewhere; returns 0 or an errno."""
        self.thread.now = max(self.thread.now, self.engine.now)
        yield from self.bo.resv.lock(self.thread)
        ret = yield from ttm_bo_validate(self.bo, self.thread, domain)
        yield from self.bo.resv.unlock(self.thread)
        return ret

    def there_and_back(self) -> Wait:
        return self.validate(GTT if self.bo.domain == VRAM else VRAM)

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """What the buffer holds, wherever it is."""
        return self.host.memory.payload[self.bo.pfns].view(np.uint8).reshape(-1)

    def fill(self, data: NDArray[np.uint8]) -> None:
        self.host.memory.payload[self.bo.pfns] = data.view(np.uint64).reshape(self.pages, -1)
