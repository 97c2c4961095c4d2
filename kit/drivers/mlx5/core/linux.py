"""Small helpers of the kernel that the driver's documents name: tables of keys, pools, work queues, DMA mapping."""

from __future__ import annotations

from collections.abc import Callable
from errno import ENOMEM
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.core.waiting import DelayedWork, Workqueue
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = [
    "Mempool", "__xa_cmpxchg", "alloc_workqueue", "dma_map_page", "dma_map_single", "dma_unmap_page",
    "dma_unmap_single", "hmm_dma_map_pfn", "hmm_dma_unmap_pfn", "ib_dma_map_page", "ib_dma_unmap_page",
    "mempool_alloc", "mempool_create_kmalloc_pool", "mempool_free", "queue_work", "schedule_work", "xa_erase",
    "xa_init", "xa_load", "xa_store",
]  # fmt: skip

T = TypeVar("T")
NO_ADDRESS: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)


# -- xarray: what happens between two yields is under its lock ----------------------------------------------------


@step
def xa_init(table: dict[int, T], thread: Thread) -> None:
    """Make a table empty."""
    table.clear()


@step
def xa_store(table: dict[int, T], thread: Thread, index: int, entry: T) -> T | None:
    """Enter something; return what was there."""
    old = table.get(index)
    table[index] = entry
    return old


@step
def xa_load(table: dict[int, T], thread: Thread, index: int) -> T | None:
    """Return what is there, or None."""
    return table.get(index)


@step
def xa_erase(table: dict[int, T], thread: Thread, index: int) -> T | None:
    """Take out and return what is there."""
    return table.pop(index, None)


@step
def __xa_cmpxchg(table: dict[int, T], thread: Thread, index: int, old: T | None, entry: T | None) -> T | None:
    """Replace `old` by `entry` (None: nothing); return what was there, which is `old` if it was done."""
    now = table.get(index)
    if now is old:
        if entry is None:
            table.pop(index, None)
        else:
            table[index] = entry
    return now


# -- pools and work queues ------------------------------------------------------------------------------------------


class Mempool:
    """Descriptors: kmalloc, and a reserve for when that fails (mempool_t).

    Attributes
    ----------
    curr_nr, min_nr : int
        Descriptors in reserve, now and when it is full.
    out : int
        Descriptors in use.
    """

    def __init__(self, dev: Mlx5IbDev, min_nr: int) -> None:
        self.dev, self.min_nr, self.curr_nr, self.out = dev, min_nr, min_nr, 0


@step
def mempool_create_kmalloc_pool(dev: Mlx5IbDev, thread: Thread, min_nr: int) -> Mempool | None:
    """Return a pool with a full reserve, or None."""
    thread.note(value=min_nr)
    return None if dev.inject.hit("pf_pool") else Mempool(dev, min_nr)


@step
def mempool_alloc(pool: Mempool, thread: Thread) -> bool:
    """Take one, from the reserve when kmalloc fails; False when that is empty too."""
    if pool.dev.inject.hit("pf_kmalloc"):
        if not pool.curr_nr:
            return False
        pool.curr_nr -= 1
    pool.out += 1
    return True


@step
def mempool_free(pool: Mempool, thread: Thread) -> None:
    """Give one back; it fills the reserve first."""
    pool.out -= 1
    pool.curr_nr += pool.curr_nr < pool.min_nr


@step
def alloc_workqueue(dev: Mlx5IbDev, thread: Thread, name: str, max_active: int) -> Workqueue | None:
    """Return a work queue, or None."""
    thread.note(value=max_active)
    return None if dev.inject.hit("pf_wq") else Workqueue(dev.engine, name, max_active, dev.costs.wq_dispatch)


@step
def queue_work(wq: Workqueue, thread: Thread, work: Callable[[Thread], Wait]) -> None:
    """Queue one item."""
    wq.queue_work(thread, work)


@step
def schedule_work(work: DelayedWork, thread: Thread) -> None:
    """Queue an item unless it is queued already."""
    work.queue(thread, 0)


# -- DMA: arrays of pages where the kernel has one -----------------------------------------------------------------


@step
def ib_dma_map_page(dev: Mlx5IbDev, thread: Thread, pfns: NDArray[np.int64], order: int) -> NDArray[np.uint64]:
    """Give pages of ``1 << order`` DMA addresses, in order, up to the first that fails (ib_verbs.h)."""
    return dma_map_page(dev, thread, pfns, order)


@step
def dma_map_page(dev: Mlx5IbDev, thread: Thread, pfns: NDArray[np.int64], order: int) -> NDArray[np.uint64]:
    """Give pages DMA addresses, up to the first that fails (include/linux/dma-mapping.h)."""
    return map_pages(dev, thread, pfns, order)


@step
def hmm_dma_map_pfn(dev: Mlx5IbDev, thread: Thread, pfns: NDArray[np.int64], order: int) -> NDArray[np.uint64]:
    """Map pages that HMM has found, up to the first that fails (mm/hmm.c @ 7.0)."""
    return map_pages(dev, thread, pfns, order)


def map_pages(dev: Mlx5IbDev, thread: Thread, pfns: NDArray[np.int64], order: int) -> NDArray[np.uint64]:
    """Map pages for the device, up to the first that fails; each is charged."""
    if dev.inject.hit("dma_map"):
        pfns = pfns[: len(pfns) // 2]
    got = dev.hca.dma.map_pages(pfns, order)
    if got is None:
        return NO_ADDRESS
    thread.charge(dev.costs.dma_map_page * len(got))
    thread.note(pages=len(got))
    return got


@step
def ib_dma_unmap_page(dev: Mlx5IbDev, thread: Thread, addresses: NDArray[np.uint64], order: int) -> None:
    """Take DMA addresses back (ib_verbs.h)."""
    dma_unmap_page(dev, thread, addresses, order)


@step
def dma_unmap_page(dev: Mlx5IbDev, thread: Thread, addresses: NDArray[np.uint64], order: int) -> None:
    """Take DMA addresses back (include/linux/dma-mapping.h)."""
    unmap_pages(dev, thread, addresses, order)


@step
def hmm_dma_unmap_pfn(dev: Mlx5IbDev, thread: Thread, addresses: NDArray[np.uint64], order: int) -> None:
    """Unmap pages that HMM had found (mm/hmm.c @ 7.0)."""
    unmap_pages(dev, thread, addresses, order)


def unmap_pages(dev: Mlx5IbDev, thread: Thread, addresses: NDArray[np.uint64], order: int) -> None:
    """Unmap pages from the device; each is charged."""
    dev.hca.dma.unmap_pages(addresses, order)
    thread.charge(dev.costs.dma_unmap_page * len(addresses))
    thread.note(pages=len(addresses))


@step
def dma_map_single(dev: Mlx5IbDev, thread: Thread, length: int) -> int:
    """Hand a buffer of the driver to the device; 0 or -ENOMEM (include/linux/dma-mapping.h)."""
    thread.note(bytes=length)
    return Errno(ENOMEM, "dma_map_single", "injected") if dev.inject.hit("xlt_dma_map") else 0


@step
def dma_unmap_single(dev: Mlx5IbDev, thread: Thread, length: int) -> None:
    """Take a buffer of the driver back from the device (include/linux/dma-mapping.h)."""
    thread.note(bytes=length)
