"""The end of the HMM test driver's memory: its pages go home, and it is unplugged (lib/test_hmm.c @ 7.0)."""

from __future__ import annotations

import numpy as np

from kit.drivers.dmirror_types import DmirrorDevice
from kit.memory.device.migrate_device import migrate_device_finalize, migrate_device_pages, migrate_device_range
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from kit.memory.physical.memremap import DevPagemap, memunmap_pages
from kit.memory.types import HPAGE_PMD_NR
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

__all__ = ["dmirror_device_evict_chunk", "dmirror_device_remove_chunks"]


@waiting_step
def dmirror_device_evict_chunk(mdevice: DmirrorDevice, thread: Thread, chunk: DevPagemap) -> Wait:
    """Bring every page of a chunk home, from whichever address space it is in."""
    memory = mdevice.memory
    src = np.zeros(chunk.pages, dtype=np.uint64)
    dst = src.copy()
    yield from migrate_device_range(memory, thread, src, chunk.first_pfn, chunk.pages)
    at = np.flatnonzero((src & MIGRATE_PFN_VALID != 0) & (src & MIGRATE_PFN_MIGRATE != 0))
    large = src[at] & MIGRATE_PFN_COMPOUND != 0
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
            dst[each] = migrate_pfn(folio)[0] | MIGRATE_PFN_COMPOUND
            memory.copy(migrate_pfn_to_pfn(src[each : each + 1]) + np.arange(HPAGE_PMD_NR), folio)
    huge, moves = np.count_nonzero(dst & MIGRATE_PFN_COMPOUND), np.count_nonzero(dst & MIGRATE_PFN_VALID)
    carried = int(huge) * (HPAGE_PMD_NR - 1) + int(moves)
    thread.charge(mdevice.costs.copy_setup * (carried > 0) + mdevice.costs.dma_page * carried)
    thread.note(pages=carried)
    yield from migrate_device_pages(memory, thread, src, dst)
    yield from migrate_device_finalize(memory, thread, src, dst)


@waiting_step
def dmirror_device_remove_chunks(mdevice: DmirrorDevice, thread: Thread) -> Wait:
    """Evict and unplug all device memory; returns 0, or what memunmap_pages says about pages that stay held."""
    yield from mdevice.devmem_lock.acquire(thread)
    ret, chunks = 0, list(mdevice.devmem_chunks)
    for gone in (mdevice.devmem_chunks, mdevice.free_pages, mdevice.free_folios):
        del gone[:]
    for chunk in chunks:
        yield from dmirror_device_evict_chunk(mdevice, thread, chunk)
        ret = (yield from memunmap_pages(mdevice.memory, thread, chunk)) or ret
    yield from mdevice.devmem_lock.release(thread)
    return ret
