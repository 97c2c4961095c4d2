"""Pages of host memory: handing them out one by one or as folios, and taking them back (mm/page_alloc.c @ 7.0).

Folio state of a large folio lives on its head: `refcount`, `mapcount` (a PMD or PUD mapping counts 1, each PTE
mapping of one of its pages counts 1), `pincount` and all flags but ANON_EXCLUSIVE and HWPOISON. `order`, `mapping`
and `index` are kept on every page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.frame_pool import FramePool
from kit.memory.physical.frames import Frames
from kit.memory.physical.zeros import zeros
from kit.memory.types import HPAGE_PMD_ORDER, PG

if TYPE_CHECKING:
    from kit.memory.physical.memremap import DevPagemap

__all__ = ["PageAllocator"]


class PageAllocator(Frames):
    """What each page is part of and whether somebody has it, as columns over pfn, and the pool of those that are free.

    Parameters
    ----------
    system_frames, device_frames : int
        4 KiB frames of host memory, and of device memory that `memremap_pages` may hand out.
    payload_bytes : int
        Content carried for each frame.
    """

    def __init__(self, system_frames: int, device_frames: int, payload_bytes: int) -> None:
        total = system_frames + device_frames
        super().__init__("host memory", total, payload_bytes)
        self.system_frames, self.total = system_frames, total
        self.counts = zeros(total, np.int64)  # both counts of each page, which a mapping changes in one go
        self.refcount, self.mapcount = self.counts.view(np.int32).reshape(total, 2).T
        self.pincount = zeros(total, np.int32)
        self.flags = zeros(total, np.uint16)
        self.order = zeros(total, np.uint8)
        self.mapping = zeros(total, np.int32)
        self.index = zeros(total, np.int64)
        self.pgmap = zeros(total, np.int16)
        self.pgmaps: list[DevPagemap | None] = [None]
        self.hugetlb_free: dict[int, list[int]] = {}  # order -> heads of free hugetlb folios
        self.hugetlb_reserved: dict[int, int] = {}  # order -> how many of them are promised
        self.pool = FramePool(system_frames, 1)
        self.ensure(total if device_frames else 1)  # host memory's payload comes with its frames

    @property
    def free_pages(self) -> int:
        """Frames of host memory that nobody has."""
        return self.pool.free

    @property
    def used(self) -> int:
        """Frames of host memory that somebody has, the zero page not counted."""
        return self.system_frames - 1 - self.pool.free

    def alloc_pages(self, n: int) -> NDArray[np.int32] | None:
        """Take `n` single pages, refcount 1 each, content undefined; None when there are not so many."""
        pfns = self.pool.take(n)
        if pfns is not None:
            self.prep(pfns, 0)
            self.ensure(self.pool.top)
        return pfns

    def alloc_huge(self) -> int | None:
        """Take one order-9 folio, refcount 1; return its head, or None when no 2 MiB of memory is in one piece."""
        head = self.pool.take_huge()
        if head is not None:
            self.prep(np.array([head]), HPAGE_PMD_ORDER)
            self.ensure(self.pool.top)
        return head

    def set_hugetlb_pool(self, order: int, count: int) -> int:
        """Put `count` folios of `order` (9 or 18) aside for hugetlb mappings (nr_hugepages); return how many it got."""
        self.hugetlb_reserved.setdefault(order, 0)
        got = self.pool.carve(1 << order, count)
        self.hugetlb_free.setdefault(order, []).extend(got)
        self.ensure(self.pool.top)
        return len(got)

    def prep(self, heads: NDArray[np.integer], order: int) -> None:
        """Make free pages folios of `order` with one reference each and no other state."""
        self.refcount[heads] = 1
        self.mapcount[heads] = self.pincount[heads] = 0
        blocks = self.block(heads, order)
        self.flags[blocks], self.order[blocks], self.mapping[blocks], self.index[blocks] = 0, order, 0, 0

    def head(self, pfns: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the head of each page's folio."""
        pfns = np.asarray(pfns)
        if len(pfns) == 1 and not self.order[pfns[0]]:
            return pfns
        order = self.order[pfns]
        return pfns >> order << order if order.any() else pfns

    def block(self, heads: NDArray[np.integer], order: int) -> NDArray[np.integer]:
        """Return all pages of folios of one `order`, shape (len(heads) << order,)."""
        if order == 0:
            return heads
        return (np.asarray(heads, dtype=np.int64)[:, None] + np.arange(1 << order)).ravel()

    def free_mask(self) -> NDArray[np.bool_]:
        """Return which frames of host memory are free or in the hugetlb pool, shape (system_frames,)."""
        free = self.pool.free_mask()
        for order, pool in self.hugetlb_free.items():
            for head in pool:
                free[head : head + (1 << order)] = True
        return free

    def _free(self, heads: NDArray[np.integer]) -> None:
        """Take folios back whose last reference is gone."""
        if self.mapcount[heads].any():
            raise RuntimeError(f"pages {heads[self.mapcount[heads] != 0][:8]} are freed while mapped")
        device = self.pgmap[heads]
        if device.any():
            self._free_device(heads[device > 0])
            heads = heads[device == 0]
        order = self.order[heads]
        single = heads[order == 0]
        self.flags[single] = 0
        self.mapping[single] = 0
        self.pool.give(single)
        for head in heads[order > 0].tolist():
            size = 1 << int(self.order[head])
            hugetlb = bool(self.flags[head] & PG.HUGETLB)
            self.flags[head : head + size] = 0
            self.mapping[head : head + size] = 0
            if hugetlb:
                self.hugetlb_free[int(self.order[head])].append(head)
            else:
                self.pool.give_huge(head)
            self.order[head : head + size] = 0

    def _free_device(self, heads: NDArray[np.integer]) -> None:
        """free_zone_device_folio: the driver gets its pages back; their order is still the folio's."""
        for order in (0, HPAGE_PMD_ORDER):
            some = heads[self.order[heads] == order]
            if len(some):
                blocks = self.block(some, order)
                self.flags[blocks] = 0
                self.mapping[blocks] = 0
        for at in range(1, len(self.pgmaps)):
            pgmap = self.pgmaps[at]
            own = heads[self.pgmap[heads] == at]
            if len(own) and pgmap is not None:
                pgmap.ops.folio_free(own)
