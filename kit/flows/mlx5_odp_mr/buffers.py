"""The buffers of one kind of region: one mapping, cut into equal parts, and what registration keeps of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.flows.rdma.content import Area, frames_of
from kit.memory.space.mm import Mm
from kit.memory.types import PAGE

__all__ = ["Buffers"]

EMPTY: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)


@dataclass(eq=False)
class Buffers:
    """The buffers of one kind of region.

    Attributes
    ----------
    kind : str
        ``pinned``, ``explicit`` or ``implicit``.
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

    @property
    def pages(self) -> NDArray[np.int64]:
        """Every page of the area, numbered from 0."""
        return np.arange(self.area.pages, dtype=np.int64)

    @property
    def part_pages(self) -> int:
        """Pages of each part."""
        return self.size // PAGE

    def starts(self) -> list[int]:
        """Return the first byte of each part."""
        return list(range(self.area.va, self.area.va + self.area.pages * PAGE, self.size))

    def mr_of(self, index: int) -> Mlx5IbMr:
        """Return the region over part `index`."""
        return self.mrs[index % len(self.mrs)]

    def chosen(self, which: str) -> NDArray[np.int64]:
        """Return pages by a word: ``none``, the ``first`` of each part, ``half`` (every other) or ``all``."""
        every = self.pages
        return {"none": every[:0], "first": every[:: self.part_pages], "half": every[::2], "all": every}[which]

    def start_of_parts(self, count: int) -> NDArray[np.int64]:
        """Return the first `count` pages of every part."""
        return self.pages[self.pages % self.part_pages < count]

    def held(self, mm: Mm) -> dict[str, int]:
        """Return what registration keeps, in bytes: pages that nobody else can have, and the driver's lists."""
        umems = [mr.umem for mr in self.mrs]
        lists = sum(getattr(u, "pfn_list", EMPTY).nbytes + getattr(u, "dma_list", EMPTY).nbytes for u in umems)
        return {"pinned": mm.pinned_vm * PAGE if self.kind == "pinned" else 0, "lists": lists}

    def resident_bytes(self, mm: Mm) -> int:
        """Return how much of the buffers is in system memory."""
        frames = frames_of(mm, self.area.va // PAGE, self.area.pages)
        return int(((frames >= 0) & (frames < mm.memory.system_frames)).sum()) * PAGE
