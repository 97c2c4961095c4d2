"""A GPU's buffer objects as amdgpu and TTM keep them, exported as dma-bufs: in its own memory or in the host's.

Only what an importer sees of such a driver: where a buffer may be mapped, that its importers hear of a move before it
starts, and that the copy is still under way when the buffer is said to have moved.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np

from kit.drivers.gpu_buffers import COSTS, GTT, HOST, VRAM, AmdgpuBo, AmdgpuDevice, Pfns
from kit.errors import Errno
from kit.memory.device.dma_buf import dma_buf_export, dma_buf_move_notify
from kit.memory.device.dma_buf_types import DmaBuf, DmaBufAttachment, DmaBufOps, SgTable
from kit.memory.device.dma_resv import DMA_RESV_USAGE_KERNEL, DmaFence, dma_resv_add_fence
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

__all__ = [
    "COSTS", "GTT", "VRAM", "AmdgpuBo", "AmdgpuDevice", "amdgpu_gem_prime_export", "drm_gem_object_put",
    "ttm_bo_validate",
]  # fmt: skip


@step
def amdgpu_gem_prime_export(bo: AmdgpuBo, thread: Thread) -> DmaBuf | Errno:
    """Export a buffer object under its own reservation (amdgpu_dma_buf.c)."""
    made = dma_buf_export(amdgpu_dmabuf_ops, thread, bo.pages << 12, bo, bo.resv)
    if isinstance(made, DmaBuf):
        bo.dma_buf = made
        bo.references += 1
    return made


# -- what importers call --------------------------------------------------------------------------------------------


@step
def amdgpu_dma_buf_attach(dmabuf: DmaBuf, thread: Thread, attach: DmaBufAttachment) -> int:
    """No peer-to-peer access where PCIe has no way for it (amdgpu_dma_buf.c)."""
    bo: AmdgpuBo = dmabuf.priv
    if bo.adev.p2p_distance < 0:
        attach.peer2peer = False
    return 0


@waiting_step
def amdgpu_dma_buf_pin(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """Pin the buffer, into the host's memory; 0 or an errno (amdgpu_dma_buf.c @ 6.9)."""
    bo: AmdgpuBo = attach.dmabuf.priv
    if not bo.pin_count:
        ret = yield from ttm_bo_validate(bo, thread, GTT)
        if ret:
            return ret
    bo.pin_count += 1
    return 0


@step
def amdgpu_dma_buf_unpin(attach: DmaBufAttachment, thread: Thread) -> None:
    """Take a pin off (amdgpu_dma_buf.c)."""
    bo: AmdgpuBo = attach.dmabuf.priv
    bo.pin_count -= 1


@waiting_step
def amdgpu_dma_buf_map(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """Bring the buffer to where the importer reaches it, and map it there (amdgpu_dma_buf.c).

    An importer that can use the GPU's memory itself finds it where it is; for any other it moves to the host's.
    """
    bo: AmdgpuBo = attach.dmabuf.priv
    if not bo.pin_count:
        vram = VRAM if bo.preferred & VRAM and attach.peer2peer else 0
        ret = yield from ttm_bo_validate(bo, thread, GTT | vram)
        if ret:
            return ret
    elif bo.domain != GTT:
        return Errno(EBUSY, "amdgpu_dma_buf_map", "pinned outside of the host's memory")
    dma = attach.dev.map_pages(bo.pfns)
    if dma is None:
        return Errno(EBUSY, "amdgpu_dma_buf_map", "no DMA address")
    thread.charge(bo.adev.costs.dma_map * (int(np.count_nonzero(np.diff(bo.pfns) != 1)) + 1))
    thread.note(pages=bo.pages, bytes=bo.pages << 12, cause="VRAM" if bo.domain == VRAM else "GTT")
    return SgTable(dma)


@step
def amdgpu_dma_buf_unmap(attach: DmaBufAttachment, thread: Thread, sgt: SgTable) -> None:
    """Take a mapping back (amdgpu_dma_buf.c)."""
    attach.dev.unmap_pages(sgt.dma)
    thread.note(pages=len(sgt.dma))


def release(dmabuf: DmaBuf) -> None:
    """The last reference to the dma-buf is gone: it gives its buffer object up (drm_gem_dmabuf_release)."""
    bo: AmdgpuBo = dmabuf.priv
    bo.dma_buf = None
    drm_gem_object_put(bo)


def drm_gem_object_put(bo: AmdgpuBo) -> None:
    """Give a reference up; the last one frees the memory."""
    bo.references -= 1
    if not bo.references:
        bo.adev.engine.start(_free_when_idle(bo))


def _free_when_idle(bo: AmdgpuBo) -> Wait:
    """Its pages go once no copy is on its way to them (ttm_bo_delayed_delete)."""
    for fence in bo.resv.busy(DMA_RESV_USAGE_KERNEL):
        yield fence.done
    bo.adev.give(bo.domain, bo.pfns)
    bo.pfns = bo.pfns[:0]


amdgpu_dmabuf_ops = DmaBufOps(
    attach=amdgpu_dma_buf_attach, pin=amdgpu_dma_buf_pin, unpin=amdgpu_dma_buf_unpin, map_dma_buf=amdgpu_dma_buf_map,
    unmap_dma_buf=amdgpu_dma_buf_unmap, release=release,
)  # fmt: skip


# -- moving ---------------------------------------------------------------------------------------------------------


@waiting_step
def ttm_bo_validate(bo: AmdgpuBo, thread: Thread, domains: int) -> Wait:
    """Bring a buffer to one of some domains, unless it is in one; 0 or an errno (ttm_bo.c).

    The reservation is held. The copy is under way when this returns: a fence of the reservation says so.
    """
    bo.resv.assert_held(thread)
    thread.note(pages=bo.pages, bytes=bo.pages << 12)
    if bo.domain & domains:
        return 0
    if bo.pin_count:
        return Errno(EINVAL, "ttm_bo_validate", "a pinned buffer does not move")
    domain = domains & bo.preferred or domains
    new = bo.adev.alloc(domain, bo.pages)
    if new is None:
        return Errno(ENOMEM, "ttm_bo_validate", f"no room for {bo.pages} pages")
    if domain == VRAM:
        thread.charge(bo.adev.costs.devmem_alloc * bo.pages)
    return (yield from ttm_bo_handle_move_mem(bo, thread, domain, new))


@waiting_step
def ttm_bo_handle_move_mem(bo: AmdgpuBo, thread: Thread, domain: int, new: Pfns) -> Wait:
    """Let the driver move the buffer (ttm_bo.c)."""
    return (yield from amdgpu_bo_move(bo, thread, domain, new))


@waiting_step
def amdgpu_bo_move(bo: AmdgpuBo, thread: Thread, domain: int, new: Pfns) -> Wait:
    """Tell everybody who has it mapped, then copy it (amdgpu_ttm.c)."""
    yield from amdgpu_bo_move_notify(bo, thread)
    return (yield from amdgpu_move_blit(bo, thread, domain, new))


@waiting_step
def amdgpu_bo_move_notify(bo: AmdgpuBo, thread: Thread) -> Wait:
    """Importers give their mappings up before the buffer moves (amdgpu_object.c)."""
    if bo.dma_buf is not None and bo.adev.notify:
        yield from dma_buf_move_notify(bo.dma_buf, thread)


@waiting_step
def amdgpu_move_blit(bo: AmdgpuBo, thread: Thread, domain: int, new: Pfns) -> Wait:
    """Give the copy to the GPU's copy engine, behind what it still does to the buffer; 0 (amdgpu_ttm.c)."""
    old, before, fence = bo.pfns, bo.domain, DmaFence(bo.adev.engine)
    thread.charge(bo.adev.costs.copy_setup)
    yield from thread.sync()
    bo.adev.engine.start(_copy(bo, old, before, new, domain, bo.resv.busy(DMA_RESV_USAGE_KERNEL), fence))
    ttm_bo_move_accel_cleanup(bo, thread, fence, domain, new)
    return 0


@step
def ttm_bo_move_accel_cleanup(bo: AmdgpuBo, thread: Thread, fence: DmaFence, domain: int, new: Pfns) -> None:
    """The buffer is in its new place from now on, whose content comes with the fence (ttm_bo_util.c).

    Its old pages are free once the copy has ended: until then a ghost of the buffer has them.
    """
    dma_resv_add_fence(bo.resv, thread, fence, DMA_RESV_USAGE_KERNEL)
    bo.domain, bo.pfns, bo.moves = domain, new, bo.moves + 1


def _copy(
    bo: AmdgpuBo, old: Pfns, before: int, new: Pfns, after: int, behind: list[DmaFence], fence: DmaFence
) -> Wait:  # fmt: skip
    """The copy engine's work: it reads when it starts and has written when it ends, and in between anything may be."""
    adev = bo.adev
    for earlier in behind:
        yield earlier.done
    start, content = adev.engine.now, adev.memory.payload[old].copy()
    yield adev.engine.env.timeout(adev.costs.dma_page * len(old))
    adev.memory.payload[new] = content
    now, trace = adev.engine.now, adev.engine.trace
    va = bo.va << 12 if bo.va >= 0 else -1
    trace.span("gpu_copy", adev.engine_name, start, now, va=va, pages=len(old), bytes=len(old) << 12, cause="move")
    if bo.va >= 0:
        place = {GTT: HOST, VRAM: adev.place}
        trace.move(start, now, bo.va, len(old), place[before], place[after], "move")
    adev.give(before, old)
    fence.signal()
