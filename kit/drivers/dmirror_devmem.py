"""The HMM test driver's device memory: chunks of it, its free pages, and its end (lib/test_hmm.c @ 7.0).

The real driver keeps the content of a private page in a system page behind it; here device frames carry content.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror_types import (
    HMM_DMIRROR_MEMORY_DEVICE_PRIVATE,
    Dmirror,
    DmirrorDevice,
)
from kit.errors import Errno
from kit.memory.memremap import DevPagemap, memremap_pages, memunmap_pages, zone_device_folio_init
from kit.memory.migrate_device import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from kit.memory.types import HPAGE_PMD_NR, HPAGE_PMD_ORDER, Vmf
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

_VALID, _MIGRATE, _WRITE, _COMPOUND = (
    np.uint64(flag) for flag in (MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_WRITE, MIGRATE_PFN_COMPOUND)
)


class DmirrorChunk:
    """struct dmirror_chunk, and the operations on its pages."""

    def __init__(self, mdevice: DmirrorDevice) -> None:
        self.mdevice, self.remove = mdevice, False
        self.pagemap = DevPagemap(mdevice.zone_device_type, mdevice, self, mdevice.chunk_pages, 1 << (mdevice.unit + 1))

    def migrate_to_ram(self, vmf: Vmf, thread: Thread) -> Wait:
        """The CPU touched a private page."""
        from kit.drivers.dmirror_migrate import dmirror_devmem_fault  # which takes its memory from here

        return (yield from dmirror_devmem_fault(vmf, thread, self.mdevice))

    def folio_free(self, pfns: NDArray[np.integer]) -> None:
        """dmirror_devmem_free: pages go back to the free lists, unless the chunk is going away."""
        mdevice, large = self.mdevice, self.mdevice.memory.order[pfns] > 0
        if not self.remove:
            mdevice.cfree += len(pfns) + int(large.sum()) * (HPAGE_PMD_NR - 1)
            mdevice.free_folios.push(pfns[large])
            mdevice.free_pages.push(pfns[~large])
        mdevice.left(np.concatenate([pfns[~large], mdevice.memory.block(pfns[large], HPAGE_PMD_ORDER)]))


def dmirror_device_init(mdevice: DmirrorDevice, thread: Thread) -> int:
    """Plug the device's first chunk of memory in; returns 0 or -ENOMEM."""
    return _add_chunk(mdevice, thread, False)


@waiting_step
def dmirror_allocate_chunk(mdevice: DmirrorDevice, thread: Thread, is_large: bool) -> Wait:
    """Plug one more chunk in, as folios of 2 MiB or as single pages; a coherent device has one only."""
    yield from mdevice.devmem_lock.acquire(thread)
    ret: int = Errno(ENOMEM, "dmirror_allocate_chunk", "a coherent device has one chunk")
    if mdevice.zone_device_type == HMM_DMIRROR_MEMORY_DEVICE_PRIVATE or not mdevice.devmem_chunks:
        ret = _add_chunk(mdevice, thread, is_large)
    yield from mdevice.devmem_lock.release(thread)
    return ret


def _add_chunk(mdevice: DmirrorDevice, thread: Thread, is_large: bool) -> int:
    chunk = DmirrorChunk(mdevice)
    ret = memremap_pages(mdevice.memory, thread, chunk.pagemap)
    if not ret:
        mdevice.devmem_chunks.append(chunk.pagemap)
        first, pages = chunk.pagemap.first_pfn, chunk.pagemap.pages
        blocks = pages // HPAGE_PMD_NR if is_large else 0
        mdevice.free_folios.push(first + HPAGE_PMD_NR * np.arange(blocks))
        mdevice.free_pages.push(np.arange(first + HPAGE_PMD_NR * blocks, first + pages))
    return ret


@waiting_step
def dmirror_devmem_alloc_page(dmirror: Dmirror, thread: Thread, n: int, is_large: bool) -> Wait:
    """Take `n` pages or folios, locked and referenced; returns their heads, fewer when there is no more memory."""
    mdevice, memory = dmirror.mdevice, dmirror.mdevice.memory
    free, order = mdevice.free_folios if is_large else mdevice.free_pages, HPAGE_PMD_ORDER if is_large else 0
    n = (yield from mdevice.make_room(thread, n << order)) >> order
    heads = free.pop(n)
    while len(heads) < n and not (yield from dmirror_allocate_chunk(mdevice, thread, is_large)):
        heads = np.concatenate([heads, free.pop(n - len(heads))])
    zone_device_folio_init(memory, heads, order)
    memory.zone_device_data[memory.block(heads, order)] = dmirror.id
    mdevice.calloc += len(heads) << order
    mdevice.arrived(memory.block(heads, order))
    thread.charge(mdevice.costs.devmem_alloc * len(heads))
    return heads


@waiting_step
def dmirror_device_evict_chunk(mdevice: DmirrorDevice, thread: Thread, chunk: DevPagemap) -> Wait:
    """Bring every page of a chunk home, from whichever address space it is in."""
    memory = mdevice.memory
    src = np.zeros(chunk.pages, dtype=np.uint64)
    dst = src.copy()
    yield from migrate_device_range(memory, thread, src, chunk.first_pfn, chunk.pages)
    at = np.flatnonzero((src & _VALID != 0) & (src & _MIGRATE != 0))
    large = src[at] & _COMPOUND != 0
    new = memory.alloc_pages(int((~large).sum()))
    old = migrate_pfn_to_pfn(src[at[~large]])
    if new is not None and len(new):
        memory.trylock(new)
        dst[at[~large]] = migrate_pfn(new)
        memory.copy(old, new)
    for each in at[large].tolist():
        head = memory.alloc_huge()
        if head is not None:
            folio = np.arange(head, head + HPAGE_PMD_NR)
            memory.trylock(folio[:1])
            dst[each] = migrate_pfn(folio)[0] | _COMPOUND
            memory.copy(migrate_pfn_to_pfn(src[each : each + 1]) + np.arange(HPAGE_PMD_NR), folio)
    carried = int(np.count_nonzero(dst & _COMPOUND)) * (HPAGE_PMD_NR - 1) + int(np.count_nonzero(dst & _VALID))
    thread.charge(mdevice.costs.copy_setup * (carried > 0) + mdevice.costs.dma_page * carried)
    thread.note(pages=carried)
    yield from migrate_device_pages(memory, thread, src, dst)
    yield from migrate_device_finalize(memory, thread, src, dst)


@waiting_step
def dmirror_device_remove_chunks(mdevice: DmirrorDevice, thread: Thread) -> Wait:
    """Evict and unplug all device memory; returns 0, or what memunmap_pages says about pages that stay held."""
    yield from mdevice.devmem_lock.acquire(thread)
    ret = 0
    for pagemap in mdevice.devmem_chunks:
        chunk = pagemap.ops
        if isinstance(chunk, DmirrorChunk):
            chunk.remove = True
    mdevice.free_pages.clear()
    mdevice.free_folios.clear()
    for pagemap in mdevice.devmem_chunks:
        yield from dmirror_device_evict_chunk(mdevice, thread, pagemap)
        ret = (yield from memunmap_pages(mdevice.memory, thread, pagemap)) or ret
    mdevice.devmem_chunks.clear()
    yield from mdevice.devmem_lock.release(thread)
    return ret
