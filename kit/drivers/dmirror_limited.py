"""A mirror device with limited memory: it evicts, and hands over what it has evicted (seed 003, lib/test_hmm.c @ 7.0).

The test driver's private pages are struct pages without hardware; behind each it keeps a system page, which its
``BACKING_PAGE`` finds. A driver for real hardware uses the same freedom to oversubscribe its memory: when it needs room
it copies a page's content to a system page and keeps that page, while the CPU's entry goes on naming the device page.
When the CPU then touches the address, the driver hands over the system page: nothing is left to copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror_types import DPT_NONE, HMM_DMIRROR_MEMORY_DEVICE_PRIVATE, DmirrorDevice, Pfns
from kit.memory.device.migrate_device import migrate_device_finalize, migrate_device_pages, migrate_device_pfns
from kit.memory.device.migrate_vma import MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, migrate_pfn, migrate_pfn_to_pfn
from kit.memory.reclaim.alloc import alloc_folios
from kit.memory.types import HPAGE_PMD_NR

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["HAND_OVER", "MIGRATE", "LimitedDevice"]

HAND_OVER, MIGRATE = "hand_over", "migrate"


class LimitedDevice(DmirrorDevice):
    """A `DmirrorDevice` with `capacity` pages of memory and a copy engine.

    Parameters
    ----------
    memory : PhysicalMemory
    kind : int
        HMM_DMIRROR_MEMORY_DEVICE_PRIVATE or _COHERENT.
    costs : dict of str to float
        As for `DmirrorDevice`; ``dma_page`` and ``copy_setup`` are not used: `copy_time` says what a copy takes.
    copy_time : callable
        Microseconds for a copy of so many bytes, to the device (True) or from it (False).
    capacity : int
        Pages of memory that the hardware has.
    eviction : str
        `HAND_OVER` or `MIGRATE`; a coherent page always migrates, since the CPU reaches it without asking.
    evict_pages : int
        Pages that are evicted together, those that came first.
    frames : int
        Struct pages: for a private device more than `capacity`, as evicted pages keep theirs.
    """

    def __init__(
        self, memory: PhysicalMemory, kind: int, costs: dict[str, float], copy_time: Callable[[int, bool], float],
        capacity: int, eviction: str = HAND_OVER, evict_pages: int = 512, frames: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(memory, 0, kind, {**costs, "dma_page": 0.0, "copy_setup": 0.0}, frames or capacity)
        self.capacity, self.evict_pages, self.copy_time = capacity, evict_pages, copy_time
        self.eviction = eviction if kind == HMM_DMIRROR_MEMORY_DEVICE_PRIVATE else MIGRATE
        self.taken = 0  # pages that another program has
        self.first = memory.system_frames
        region = memory.total - memory.system_frames
        self._kept = np.full(region, -1, dtype=np.int32)  # system page that holds an evicted device page
        self._came = np.zeros(region, dtype=np.int64)  # order in which pages came to the device, 0: free
        self._clock = 0
        self.used = 0  # pages of device memory that hold something
        self.evicted_pages = self.handed_over = 0
        self.on_keep: Callable[[NDArray[np.int64], float, float], None] | None = (
            None  # told of what was evicted, and when
        )

    # What the driver asks of its device

    def backing(self, frames: Pfns) -> NDArray[np.int64]:
        """Return the frames in which the content of these frames is: BACKING_PAGE."""
        frames = np.asarray(frames, dtype=np.int64)
        device = frames >= self.first
        kept = self._kept[np.where(device, frames - self.first, 0)]
        return np.where(device & (kept >= 0), kept, frames)

    def make_room(self, thread: Thread, pages: int) -> Wait:
        """Evict until `pages` more fit; returns how many fit."""
        while self.used + pages > self.capacity - self.taken and self.used:
            before = self.used
            yield from self.evict(thread, min(max(self.evict_pages, pages), self.used))
            if self.used == before:
                break
        return max(min(pages, self.capacity - self.taken - self.used), 0)

    def arrived(self, frames: Pfns) -> None:
        """These device frames have been handed out."""
        at = np.asarray(frames, dtype=np.int64) - self.first
        self._came[at] = self._clock + 1 + np.arange(len(at))
        self._clock += len(at)
        self.used += len(at)

    def left(self, frames: Pfns) -> None:
        """These device frames are free again; what was kept of them is given back."""
        at = np.asarray(frames, dtype=np.int64) - self.first
        kept = self._kept[at]
        self.used -= int((kept < 0).sum())
        self._came[at], self._kept[at] = 0, -1
        if (kept >= 0).any():
            self.memory.put(kept[kept >= 0])

    def home(self, mm: Mm, thread: Thread, frames: Pfns, huge: bool) -> Wait:
        """Return system pages for device pages: those that were kept for them, and new ones."""
        kept = self._kept[np.asarray(frames, dtype=np.int64) - self.first]
        held = kept >= 0
        if not held.any():
            return (yield from super().home(mm, thread, frames, huge))
        pages = kept.astype(np.int64)
        if not held.all():
            new = yield from alloc_folios(mm, thread, int((~held).sum()))
            if new is None:
                return None
            pages[~held] = new
        self.memory.get(pages[held])  # the driver's own reference goes with the device page
        self.handed_over += int(held.sum())
        return pages

    def carry(self, thread: Thread, src: Pfns, dst: Pfns) -> None:
        """Copy pages with the copy engine, but what was handed over: a huge page in one piece, others one by one."""
        content = self.backing(src)
        src, dst, content = (each[content != dst] for each in (src, dst, content))
        if not len(src):
            return
        out = bool(dst[0] >= self.first)
        self.memory.copy(content, np.asarray(dst, dtype=np.int64))
        pieces = len(src) if not self.memory.order[dst[0]] else -(-len(src) // HPAGE_PMD_NR)
        start = thread.now
        thread.charge(pieces * self.copy_time(len(src) * 4096 // pieces, out))
        thread.charge(self.costs.dma_map * len(src))
        thread.engine.trace.span(
            "device_copy", "copy HtoD" if out else "copy DtoH", start, thread.now, parent=thread.row,
            pages=len(src), bytes=len(src) * 4096, cause="migration", value=pieces,
        )  # fmt: skip

    # Eviction

    def evict(self, thread: Thread, pages: int) -> Wait:
        """Make room by `pages` pages: those that came to the device first."""
        resident = np.flatnonzero((self._came > 0) & (self._kept < 0))
        victims = resident[np.argsort(self._came[resident], kind="stable")[:pages]] + self.first
        if self.eviction == HAND_OVER:
            self._keep(thread, victims)
            return
        worker = thread.engine.thread("eviction worker")
        worker.now = thread.now
        yield from self._migrate_home(worker, victims)
        thread.now = max(thread.now, worker.now)

    def _keep(self, thread: Thread, victims: NDArray[np.int64]) -> None:
        """Copy victims to system pages that the driver keeps; whoever mirrors them has to ask again."""
        kept = self.memory.alloc_pages(len(victims))
        if kept is None:
            return
        start = thread.now
        self.carry(thread, victims, kept)
        if self.on_keep is not None:
            self.on_keep(victims, start, thread.now)
        at = victims - self.first
        self._kept[at] = kept
        self.used -= len(victims)
        self.evicted_pages += len(victims)
        for mirror in self.mirrors:
            slots = np.flatnonzero((mirror.pt.rights > DPT_NONE) & np.isin(mirror.pt.frame, victims))
            mirror.pt.rights[slots] = DPT_NONE
            thread.charge(self.costs.device_pte * len(slots))

    def _migrate_home(self, thread: Thread, victims: NDArray[np.int64]) -> Wait:
        """Move victims to system pages, out of every address space that has them."""
        src = np.zeros(len(victims), dtype=np.uint64)
        dst = src.copy()
        yield from migrate_device_pfns(self.memory, thread, src, victims)
        at = np.flatnonzero((src & np.uint64(MIGRATE_PFN_VALID) != 0) & (src & np.uint64(MIGRATE_PFN_MIGRATE) != 0))
        new = self.memory.alloc_pages(len(at))
        if new is not None and len(new):
            self.memory.trylock(new)
            dst[at] = migrate_pfn(new)
            self.carry(thread, migrate_pfn_to_pfn(src[at]), new)
        yield from migrate_device_pages(self.memory, thread, src, dst)
        yield from migrate_device_finalize(self.memory, thread, src, dst)
        self.evicted_pages += len(at)
