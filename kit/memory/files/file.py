"""Files and shared anonymous memory: the page cache (mm/filemap.c, mm/shmem.c, mm/truncate.c @ 7.0).

Folios of the page cache are single pages; a page read from disk brings its neighbours (readahead) with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.space.vma import RmapRoot
from kit.memory.types import PG

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory

__all__ = ["File"]


class File(RmapRoot):
    """A file: its page cache (``i_pages``) and, unless it is shmem, its data on disk.

    Parameters
    ----------
    memory : PhysicalMemory
    pages : int
        Length in pages; an access past it is SIGBUS.
    data : ndarray of uint64, shape (pages, words), optional
        What is on disk; zeros by default.
    shmem : bool
        Memory without a disk behind it: memfd, tmpfs, shared anonymous memory.
    anonymous : bool
        Shared anonymous memory: the file goes with its last area, and grows with it.
    """

    ra_pages = 32  # read_ahead_kb 128

    def __init__(
        self, memory: PhysicalMemory, pages: int, data: NDArray[np.uint64] | None = None, shmem: bool = False,
        name: str = "file", anonymous: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(memory)
        self.memory, self.pages, self.shmem, self.name, self.anonymous = memory, pages, shmem, name, anonymous
        self.cache = np.full(pages, -1, dtype=np.int32)  # pfn; -1: not cached; -2 - slot: shmem page in swap
        disk = 0 if shmem else pages
        self.data = np.zeros((disk, memory.words), dtype=np.uint64) if data is None else data

    def extend(self, pages: int) -> None:
        """Make the file at least `pages` long."""
        more = pages - self.pages
        if more > 0:
            self.cache = np.concatenate([self.cache, np.full(more, -1, dtype=np.int32)])
            if not self.shmem:
                self.data = np.concatenate([self.data, np.zeros((more, self.memory.words), dtype=np.uint64)])
            self.pages = pages

    def add(self, indices: NDArray[np.int64], pfns: NDArray[np.int32]) -> None:
        """Enter new pages, whose reference becomes the cache's (filemap_add_folio, shmem_add_to_page_cache)."""
        memory = self.memory
        self.cache[indices] = pfns
        memory.mapping[pfns], memory.index[pfns] = self.id, indices
        memory.flags[pfns] |= PG.UPTODATE | (PG.SWAPBACKED if self.shmem else 0)
        memory.lru_add(pfns)

    def remove(self, indices: NDArray[np.int64]) -> None:
        """Drop pages from the cache, with what it holds: a reference, or a swap slot (truncate_inode_pages)."""
        memory = self.memory
        held = self.cache[indices]
        self.cache[indices] = -1
        pfns = held[held >= 0]
        memory.mapping[pfns] = 0
        memory.flags[pfns] &= ~np.uint16(PG.DIRTY)
        memory.put(pfns)
        memory.swap.drop(-2 - held[held < -1])

    def write_back(self, pfns: NDArray[np.integer]) -> None:
        """Write pages to disk and mark them clean; shmem has no disk."""
        if not self.shmem:
            self.data[self.memory.index[pfns]] = self.memory.payload[pfns]
            self.memory.flags[pfns] &= ~np.uint16(PG.DIRTY)

    def evict(self, pfns: NDArray[np.integer]) -> None:
        """Forget pages that reclaim takes; shmem keeps the swap slot (shmem_writeout)."""
        memory, indices = self.memory, self.memory.index[pfns]
        if self.shmem:
            slots = memory.swap_slot[pfns]
            memory.swap.count[slots] = 1
            self.cache[indices] = -2 - slots
        else:
            self.cache[indices] = -1
        memory.mapping[pfns] = 0

    def last_close(self) -> None:
        """Shared anonymous memory without areas gives everything back (shmem_evict_inode)."""
        if self.anonymous and not self.vmas:
            self.remove(np.flatnonzero(self.cache != -1))
