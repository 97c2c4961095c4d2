"""A GPU's memory, and buffer objects in it or in the host's: what the exporter of dma-bufs works on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.dma_resv import DmaResv
from kit.memory.physical.memremap import DEVICE_PRIVATE, DevPagemap, DevPagemapOps, plug_in

if TYPE_CHECKING:
    from kit.memory.device.dma_buf_types import DmaBuf
    from kit.memory.physical.pages import PhysicalMemory
    from kit.sim.costs import Costs
    from kit.sim.engine import Engine

__all__ = ["COSTS", "GTT", "HOST", "VRAM", "AmdgpuBo", "AmdgpuDevice", "Pfns"]

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
