"""DMA addresses of one adapter: which pages it may reach, and the proof that it reaches no other.

A DMA address is the physical address of the page with the generation of its mapping in bits 63:52, which real
machines leave at zero. So an address that was unmapped stays recognisable even after its page is mapped again, and
an access through it (a translation that outlived its mapping) is recorded instead of being served silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import PAGE_SHIFT

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory

__all__ = ["DmaDevice", "StaleDma"]

Addresses = NDArray[np.uint64]
GENERATION_SHIFT = np.uint64(52)
_PHYSICAL = np.uint64((1 << 52) - 1)
_FRAME = np.uint64((1 << 52) - 1 & ~((1 << PAGE_SHIFT) - 1))
_SHIFT = np.uint64(PAGE_SHIFT)


class StaleDma(NamedTuple):
    """A DMA through an address that is not mapped (any more)."""

    time: float
    address: int
    pfn: int
    write: bool


class DmaDevice:
    """What the DMA API gives one device (``dma_map_page``, no IOMMU translation).

    Attributes
    ----------
    mapped : ndarray of int32, shape (pages,)
        Live mappings of each page.
    live : int
        Live mappings in all.
    stale : list of StaleDma
        Accesses through dead addresses, one entry for each page touched.
    errors : int
        Unmaps of addresses that were not mapped.
    fail_after : int or None
        Injection: `map_pages` works for that many pages more and then fails once.
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.mapped = np.zeros(memory.total, dtype=np.int32)
        self._generation = np.zeros(memory.total, dtype=np.uint16)  # of the mapping, where there is one
        self._seen = np.zeros(memory.total, dtype=np.int32)  # where each page stands in the call that maps it
        self._more: dict[int, dict[int, int]] = {}  # pfn: mappings by generation, where there are several
        self._next = 0
        self.live = 0
        self.stale: list[StaleDma] = []
        self.errors = 0
        self.fail_after: int | None = None

    def map_pages(self, pfns: NDArray[np.integer], order: int = 0) -> Addresses | None:
        """Map pages for DMA in both directions.

        Parameters
        ----------
        pfns : ndarray of int, shape (n,)
        order : int
            Each pfn is the first of ``1 << order`` consecutive ones.

        Returns
        -------
        ndarray of uint64, shape (n,), or None
            DMA addresses; None on an injected failure (DMA_MAPPING_ERROR), with nothing mapped.
        """
        heads = np.asarray(pfns, dtype=np.int64)
        if self.fail_after is not None:
            if len(heads) > self.fail_after:
                self.fail_after = None
                return None
            self.fail_after -= len(heads)
        self._next = generation = self._next % 0xFFF + 1
        each = _spread(heads, order)
        number = np.arange(len(each), dtype=np.int32)
        self._seen[each] = number
        again = each[(self.mapped[each] > 0) | (self._seen[each] != number)]  # the zero page may come many times
        if len(again):
            self._map_again(again, generation)
        self._generation[each] = generation
        np.add.at(self.mapped, each, 1)
        self.live += len(each)
        return (heads.astype(np.uint64) << _SHIFT) | (np.uint64(generation) << GENERATION_SHIFT)

    def _map_again(self, pfns: NDArray[np.int64], generation: int) -> None:
        """Remember the generations of pages that have a mapping already, or get several at once."""
        for pfn, count in zip(*(part.tolist() for part in np.unique(pfns, return_counts=True)), strict=True):
            mapped = bool(self.mapped[pfn])
            known = self._more.setdefault(pfn, {int(self._generation[pfn]): 1} if mapped else {})
            # Of a page that had none, one of this call's mappings is not in the list.
            known[generation] = known.get(generation, 0) + count + (not mapped)

    def unmap_pages(self, addresses: Addresses, order: int = 0) -> None:
        """Unmap what `map_pages` returned; an address that is not mapped counts as an error."""
        heads, generations = self._split(addresses)
        each = _spread(heads, order)
        generations = np.repeat(generations, 1 << order)
        self.live -= len(each)
        if self._more:
            several = self.mapped[each] > 1
            words = each[several] << 16 | generations[several]
            for word, count in zip(*(part.tolist() for part in np.unique(words, return_counts=True)), strict=True):
                self._drop(word >> 16, word & 0xFFFF, count)
            each, generations = each[~several], generations[~several]
        known = (self.mapped[each] > 0) & (self._generation[each] == generations)
        self.mapped[each[known]] -= 1
        self._wrong(len(each) - int(known.sum()))

    def _drop(self, pfn: int, generation: int, count: int) -> None:
        """Forget some of several mappings of a page."""
        several = self._more.get(pfn) or {int(self._generation[pfn]): int(self.mapped[pfn])}
        done = min(count, several.get(generation, 0))
        self._wrong(count - done)
        if not done:
            return
        several[generation] -= done
        if not several[generation]:
            del several[generation]
        self.mapped[pfn] -= done
        if several:
            self._generation[pfn] = next(iter(several))
        if self.mapped[pfn] <= 1:
            self._more.pop(pfn, None)

    def _wrong(self, count: int) -> None:
        """Count addresses that were not mapped."""
        self.errors += count
        self.live += count

    def resolve(self, addresses: Addresses) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the page of each address and whether the address is stale."""
        pfns, generations = self._split(addresses)
        stale = (self.mapped[pfns] == 0) | (self._generation[pfns] != generations)
        if self._more and stale.any():
            for at in np.flatnonzero(stale).tolist():
                stale[at] = int(generations[at]) not in self._more.get(int(pfns[at]), ())
        return pfns, stale

    def access(self, addresses: Addresses, write: bool, time: float) -> tuple[NDArray[np.int64], int]:
        """Return the pages that a DMA reaches and how many of the addresses were stale, which are recorded."""
        pfns, stale = self.resolve(addresses)
        if not stale.any():
            return pfns, 0
        for at in np.flatnonzero(stale).tolist():
            self.stale.append(StaleDma(time, int(addresses[at]), int(pfns[at]), write))
        return pfns, int(stale.sum())

    @staticmethod
    def physical(addresses: Addresses) -> Addresses:
        """Return the physical addresses, bytes: what contiguity is judged by."""
        return addresses & _PHYSICAL

    def _split(self, addresses: Addresses) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        addresses = np.asarray(addresses, dtype=np.uint64)
        pfns = ((addresses & _FRAME) >> _SHIFT).astype(np.int64)
        return pfns, (addresses >> GENERATION_SHIFT).astype(np.uint16)


def _spread(heads: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    if not order:
        return heads
    return (heads[:, None] + np.arange(1 << order)).reshape(-1)
