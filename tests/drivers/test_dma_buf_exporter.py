"""A GPU's buffer objects: where they go, what they hold on the way, and when their old pages are free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.drivers.dma_buf_exporter import (
    COSTS,
    GTT,
    VRAM,
    AmdgpuBo,
    AmdgpuDevice,
    drm_gem_object_put,
    ttm_bo_validate,
)
from kit.drivers.dmirror_types import COSTS as KNOWN
from kit.errors import Errno
from kit.memory.physical.pages import PhysicalMemory
from kit.sim.engine import Engine, Wait


class Gpu:
    """A GPU of 128 pages in a host of 512; a page takes 2 us to copy."""

    def __init__(self, pages: int = 128) -> None:
        self.engine = Engine()
        self.memory = PhysicalMemory(self.engine, 512, 1024, payload_bytes=16)
        costs = SimpleNamespace(**{**dict.fromkeys(COSTS, 0.0), "dma_page": 2.0, "copy_setup": 5.0})
        self.adev = AmdgpuDevice(self.engine, self.memory, pages, costs)
        self.thread = self.engine.thread("driver")

    def run(self, process: Wait) -> Any:
        self.thread.now = max(self.thread.now, self.engine.now)
        return self.engine.run(self.engine.start(process))

    def validate(self, bo: AmdgpuBo, domain: int) -> Wait:
        yield from bo.resv.lock(self.thread)
        ret = yield from ttm_bo_validate(bo, self.thread, domain)
        yield from bo.resv.unlock(self.thread)
        return ret


def test_costs_are_those_of_the_other_gpu() -> None:
    assert set(COSTS) <= set(KNOWN)


@pytest.mark.parametrize("domain", [GTT, VRAM])
def test_a_buffer_is_where_it_was_asked_for_and_stays_where_it_may_be(domain: int) -> None:
    gpu = Gpu()
    bo = AmdgpuBo(gpu.adev, 16, domain)
    assert ((bo.pfns >= gpu.adev.first) == (domain == VRAM)).all()
    assert gpu.run(gpu.validate(bo, GTT | VRAM)) == 0 and bo.moves == 0 and gpu.engine.now == 0


def test_a_move_returns_before_its_copy_has_ended_and_frees_the_old_pages_after() -> None:
    gpu = Gpu()
    bo = AmdgpuBo(gpu.adev, 16)
    gpu.memory.payload[bo.pfns] = np.arange(32).reshape(16, 2) + 1
    free = gpu.memory.free_pages
    assert gpu.run(gpu.validate(bo, GTT)) == 0
    assert gpu.engine.now == 5.0 and bo.domain == GTT and gpu.memory.free_pages == free - 16
    assert not gpu.memory.payload[bo.pfns].any() and gpu.adev.free.sum() == 112, "a ghost has the old pages"
    (fence, _), *_ = bo.resv.fences
    gpu.engine.run(fence.done)
    assert gpu.engine.now == 5.0 + 16 * 2.0 and gpu.adev.free.all()
    assert (gpu.memory.payload[bo.pfns] == np.arange(32).reshape(16, 2) + 1).all()


def test_a_second_move_is_copied_after_the_first() -> None:
    gpu = Gpu()
    bo = AmdgpuBo(gpu.adev, 16)
    gpu.memory.payload[bo.pfns] = 7
    free = gpu.memory.free_pages
    gpu.run(gpu.validate(bo, GTT))
    gpu.run(gpu.validate(bo, VRAM))
    (first, _), (second, _) = bo.resv.fences
    gpu.engine.run(second.done)
    assert first.signaled and gpu.engine.now == 5.0 + 2 * 16 * 2.0
    assert (gpu.memory.payload[bo.pfns] == 7).all() and gpu.memory.free_pages == free and bo.moves == 2


def test_what_does_not_fit_or_is_pinned_stays() -> None:
    gpu = Gpu(pages=16)
    bo = AmdgpuBo(gpu.adev, 12, GTT)
    AmdgpuBo(gpu.adev, 8)
    got = gpu.run(gpu.validate(bo, VRAM))
    assert isinstance(got, Errno) and got.name == "ENOMEM" and bo.domain == GTT
    bo.pin_count = 1
    got = gpu.run(gpu.validate(bo, VRAM))
    assert isinstance(got, Errno) and got.name == "EINVAL" and bo.moves == 0
    with pytest.raises(ValueError, match="no room for 2000 pages"):
        AmdgpuDevice(gpu.engine, gpu.memory, 2000, gpu.adev.costs)


def test_the_last_reference_frees_the_memory_once_the_copy_has_ended() -> None:
    gpu = Gpu()
    free = gpu.memory.free_pages
    bo = AmdgpuBo(gpu.adev, 16)
    gpu.run(gpu.validate(bo, GTT))
    drm_gem_object_put(bo)
    gpu.engine.run(gpu.engine.env.timeout(1.0))
    assert gpu.memory.free_pages == free - 16
    gpu.engine.run(gpu.engine.env.timeout(100.0))
    assert gpu.memory.free_pages == free and gpu.adev.free.all()
