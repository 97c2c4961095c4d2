"""A GPU's buffer objects as amdgpu and TTM keep them, exported as dma-bufs: in its own memory or in the host's.

Only what an importer sees of such a driver: where a buffer may be mapped, that its importers hear of a move before it
starts, and that the copy is still under way when the buffer is said to have moved.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.dma_buf import (
    DmaBuf,
    DmaBufAttachment,
    DmaBufOps,
    SgTable,
    dma_buf_export,
    dma_buf_move_notify,
)
from kit.memory.dma_resv import DMA_RESV_USAGE_KERNEL, DmaFence, DmaResv, dma_resv_add_fence
from kit.memory.memremap import DEVICE_PRIVATE, DevPagemap, DevPagemapOps, plug_in
from kit.sim.costs import Costs
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.pages import PhysicalMemory
    from kit.sim.engine import Engine, Thread, Wait

__all__ = [
    "COSTS",
    "GTT",
    "VRAM",
    "AmdgpuBo",
    "AmdgpuDevice",
    "amdgpu_gem_prime_export",
    "drm_gem_object_put",
    "ttm_bo_validate",
]

GTT, VRAM = 2, 4  # AMDGPU_GEM_DOMAIN_*
HOST = 1  # residency mask of host memory in the trace's moves
COSTS = ("copy_setup", "devmem_alloc", "dma_map", "dma_page")  # of `kit.drivers.dmirror_types.COSTS`
Pfns = NDArray[np.int64]


class AmdgpuDevice:
    """The GPU: its memory and its copy engine.

    Parameters
    ----------
    memory : PhysicalMemory
        Of the host; the GPU's frames are past the system's.
    pages : int
        Its memory.
    costs : Costs
        `COSTS`, microseconds.
    p2p_distance : int
        What pci_p2pdma_distance says of it and an importer; negative: they cannot reach each other.
    place : int
        Residency mask of its memory in the trace's moves.
    engine_name : str
        The copy engine as an actor of the trace.

    Attributes
    ----------
    notify : bool
        It tells importers of moves; off: a broken driver.
    """

    def __init__(
        self, engine: Engine, memory: PhysicalMemory, pages: int, costs: Costs, p2p_distance: int = 0,
        place: int = 2, engine_name: str = "gpu copy engine",
    ) -> None:  # fmt: skip
        self.engine, self.memory, self.costs, self.p2p_distance = engine, memory, costs, p2p_distance
        self.place, self.engine_name, self.notify = place, engine_name, True
        pgmap = DevPagemap(DEVICE_PRIVATE, self, DevPagemapOps(_no_page, _no_page), pages, place)
        if not plug_in(memory, pgmap):
            raise ValueError(f"no room for {pages} pages of device memory")
        self.first = pgmap.first_pfn
        self.free = np.ones(pages, dtype=bool)
        self._next = 0  # where to look first

    def alloc(self, domain: int, pages: int) -> Pfns | None:
        """Take pages of a domain; None when there are not so many. Those given back last come last again."""
        if domain == GTT:
            got = self.memory.alloc_pages(pages)
            return None if got is None else got.astype(np.int64)
        free = np.flatnonzero(self.free)
        if len(free) < pages:
            return None
        taken = np.sort(np.roll(free, -int(np.searchsorted(free, self._next)))[:pages])
        self._next = int(taken[-1]) + 1
        self.free[taken] = False
        return taken + self.first

    def give(self, domain: int, pfns: Pfns) -> None:
        """Give pages of a domain back."""
        if domain == GTT:
            self.memory.put(pfns)
        else:
            self.free[pfns - self.first] = True


def _no_page(*_: object) -> NoReturn:
    raise RuntimeError("memory of buffer objects is never mapped as pages of a process")


class AmdgpuBo:
    """A buffer object (struct amdgpu_bo with its ttm_buffer_object).

    Parameters
    ----------
    adev : AmdgpuDevice
    pages : int
    preferred : int
        Domain in which it is made, and to which the GPU's work brings it.
    va : int
        First virtual page that stands for it in the trace's moves, -1: none.

    Attributes
    ----------
    domain : int
        Where it is, or is on its way to.
    pfns : ndarray of int64, shape (pages,)
    pin_count : int
    dma_buf : DmaBuf or None
        Once exported.
    moves : int
        How often it has moved.
    references : int
        Its user's handle, and the dma-buf.
    """

    def __init__(self, adev: AmdgpuDevice, pages: int, preferred: int = VRAM, va: int = -1) -> None:
        found = adev.alloc(preferred, pages)
        if found is None:
            raise ValueError(f"no room for {pages} pages")
        self.adev, self.pages, self.preferred, self.domain, self.va = adev, pages, preferred, preferred, va
        self.pfns: Pfns = found
        self.resv = DmaResv()
        self.pin_count = self.moves = 0
        self.references = 1
        self.dma_buf: DmaBuf | None = None
        adev.memory.zero(found)
        if va >= 0:
            now = adev.engine.now
            adev.engine.trace.move(now, now, va, pages, 0, adev.place if preferred == VRAM else HOST, "create")


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
