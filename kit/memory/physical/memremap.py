"""Hot-plug of device memory: page frames past the system's, with a driver's operations (mm/memremap.c @ 7.0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import EBUSY, ENOMEM
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.types import HPAGE_PMD_NR, PG, Vmf
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.sim.engine import Thread, Wait

__all__ = [
    "DEVICE_COHERENT", "DEVICE_PRIVATE", "HUNG_TASK", "MEMORY_DEVICE_COHERENT", "MEMORY_DEVICE_PRIVATE", "DevPagemap",
    "DevPagemapOps", "PagemapOperations",
    "is_device_coherent", "is_device_private", "memremap_pages", "memunmap_pages", "page_pgmap", "pgmaps_where",
    "plug_in", "zone_device_folio_init",
]  # fmt: skip

MEMORY_DEVICE_PRIVATE, MEMORY_DEVICE_COHERENT = 1, 2  # enum memory_type
DEVICE_PRIVATE, DEVICE_COHERENT = MEMORY_DEVICE_PRIVATE, MEMORY_DEVICE_COHERENT
HUNG_TASK = 120e6  # microseconds that the kernel lets a task sleep before it complains (hung_task_timeout_secs)
_POLL = 1000.0  # microseconds between two looks at references that are still held


class PagemapOperations(Protocol):
    """What a driver does for its device pages."""

    def migrate_to_ram(self, vmf: Vmf, thread: Thread) -> Wait:
        """The CPU touched a device-private page, ``vmf.page``: bring it home. Return VM_FAULT_* bits."""
        ...

    def folio_free(self, pfns: NDArray[np.integer]) -> None:
        """The last reference of these folios (heads, of any order, all of one pagemap) is gone."""
        ...


@dataclass(frozen=True)
class DevPagemapOps:
    """struct dev_pagemap_ops: `PagemapOperations` as two functions."""

    migrate_to_ram: Callable[[Vmf, Thread], Wait]
    folio_free: Callable[[NDArray[np.integer]], None]


@dataclass(eq=False)
class DevPagemap:
    """struct dev_pagemap: one region of device memory.

    Attributes
    ----------
    type : int
        DEVICE_PRIVATE (the CPU cannot reach it) or DEVICE_COHERENT (it can, cache-coherently).
    owner : object
        Who may have its pages in range faults and migrations; compared by identity.
    ops : PagemapOperations
    pages : int
    place : int
        Residency mask of the memory in the trace's moves: a single bit, not bit 0 (which is the host).
    first_pfn, index : int
        Where it lies and its number in ``memory.pgmaps``; assigned by `memremap_pages`.
    """

    type: int
    owner: object
    ops: PagemapOperations
    pages: int
    place: int
    first_pfn: int = -1
    index: int = 0


@step
def memremap_pages(memory: PhysicalMemory, thread: Thread, pgmap: DevPagemap) -> int:
    """Give `pgmap` page frames past the system's, all of them free; returns 0, or -ENOMEM when there is no room."""
    if not plug_in(memory, pgmap):
        return Errno(ENOMEM, "memremap_pages", f"no room for {pgmap.pages} pages of device memory")
    thread.note(pages=pgmap.pages, bytes=pgmap.pages << 12)
    return 0


def plug_in(memory: PhysicalMemory, pgmap: DevPagemap) -> bool:
    """Give `pgmap` frames past the system's, all of them free; False when there is no room."""
    first = _free_region(memory, pgmap.pages)
    if first < 0:
        return False
    if None in memory.pgmaps[1:]:
        pgmap.index = memory.pgmaps.index(None, 1)
        memory.pgmaps[pgmap.index] = pgmap
    else:
        pgmap.index = len(memory.pgmaps)
        memory.pgmaps.append(pgmap)
    pgmap.first_pfn = first
    region = slice(first, first + pgmap.pages)
    memory.pgmap[region] = pgmap.index
    memory.refcount[region] = 0
    memory.flags[region] = 0
    memory.order[region] = 0
    return True


@waiting_step
def memunmap_pages(memory: PhysicalMemory, thread: Thread, pgmap: DevPagemap) -> Wait:
    """Take the page frames away again once nobody holds any; returns 0.

    A reference that is never dropped would block the kernel for good: after the time of its hung-task
    warning this returns -EBUSY instead.
    """
    region = slice(pgmap.first_pfn, pgmap.first_pfn + pgmap.pages)
    yield from thread.sync()
    deadline = thread.now + HUNG_TASK
    while (held := int(np.count_nonzero(memory.refcount[region]))) and thread.now < deadline:
        thread.charge(_POLL)
        yield from thread.sync()
    if held:
        return Errno(EBUSY, "memunmap_pages", f"{held} of {pgmap.pages} pages are still held")
    memory.pgmap[region] = 0
    memory.pgmaps[pgmap.index] = None
    thread.note(pages=pgmap.pages, bytes=pgmap.pages << 12)
    return 0


def zone_device_folio_init(memory: PhysicalMemory, heads: NDArray[np.integer], order: int) -> None:
    """Make free device pages folios of `order`, each with one reference and locked, as their driver hands them out."""
    memory.prep(heads, order)
    memory.flags[heads] = PG.LOCKED


def page_pgmap(memory: PhysicalMemory, pfn: int) -> DevPagemap | None:
    """Return the pagemap of a device page, None for a system page."""
    return memory.pgmaps[int(memory.pgmap[pfn])]


def pgmaps_where(memory: PhysicalMemory, condition: Callable[[DevPagemap], bool]) -> NDArray[np.bool_]:
    """Return which pagemaps meet a condition, to be indexed with ``memory.pgmap[pfns]``; system memory never does."""
    return np.array([pgmap is not None and condition(pgmap) for pgmap in memory.pgmaps])


def is_device_private(memory: PhysicalMemory, pfn: int) -> bool:
    """is_device_private_page."""
    pgmap = page_pgmap(memory, pfn)
    return pgmap is not None and pgmap.type == DEVICE_PRIVATE


def is_device_coherent(memory: PhysicalMemory, pfn: int) -> bool:
    """is_device_coherent_page."""
    pgmap = page_pgmap(memory, pfn)
    return pgmap is not None and pgmap.type == DEVICE_COHERENT


def _free_region(memory: PhysicalMemory, pages: int) -> int:
    """Return the lowest free, 512-aligned frame number with room for `pages`, -1 when there is none."""
    taken = sorted((p.first_pfn, p.first_pfn + p.pages) for p in memory.pgmaps if p is not None)
    first = _align(memory.system_frames)
    for start, end in taken:
        if first + pages <= start:
            break
        first = _align(end)
    return first if first + pages <= memory.total else -1


def _align(pfn: int) -> int:
    return -(-pfn // HPAGE_PMD_NR) * HPAGE_PMD_NR
