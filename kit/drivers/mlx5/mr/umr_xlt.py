"""umr.c: the buffer that carries translations to the hardware: finding, mapping and giving up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.core.linux import dma_map_single, dma_unmap_single
from kit.drivers.mlx5.device import MLX5_MAX_UMR_SHIFT
from kit.drivers.mlx5.enums import KLM, PAGE, UMR_ALIGNMENT
from kit.drivers.mlx5.objects import UPD_XLT_ATOMIC, UPD_XLT_ZAP
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev

__all__ = [
    "KSM_SIZE", "MLX5_MAX_UMR_CHUNK", "MLX5_SPARE_UMR_CHUNK", "MTT_SIZE", "OCTOWORD", "Xlt", "align",
    "mlx5r_umr_alloc_xlt", "mlx5r_umr_create_xlt", "mlx5r_umr_unmap_free_xlt",
]  # fmt: skip

MLX5_MAX_UMR_CHUNK = (1 << (MLX5_MAX_UMR_SHIFT + 4)) - UMR_ALIGNMENT  # bytes
MLX5_SPARE_UMR_CHUNK = 0x10000
OCTOWORD = 16
MTT_SIZE, KSM_SIZE = 8, 16
ZEROS: NDArray[np.uint64] = np.zeros(MLX5_MAX_UMR_CHUNK // MTT_SIZE, dtype=np.uint64)
ZEROS.flags.writeable = False


@dataclass
class Xlt:
    """The buffer that carries translations to the hardware.

    Attributes
    ----------
    entries : ndarray
        uint64 (MTT) or `KLM` records, zeroed.
    length : int
        Bytes that are mapped for DMA (sg->length).
    emergency : bool
        It is the page that everybody shares, under its mutex.
    """

    entries: NDArray[np.generic]
    length: int
    emergency: bool = False


def align(value: int, to: int) -> int:
    """Round up to a multiple."""
    return -(-value // to) * to


@waiting_step
def mlx5r_umr_alloc_xlt(
    dev: Mlx5IbDev, thread: Thread, nents: int, ent_size: int, cause: str, zap: bool = False
) -> Wait:  # fmt: skip
    """Find a buffer: as large as wanted, else 64 KiB, else a page, else the emergency page, which never fails (umr.c).

    `cause` says whether the allocator may reclaim: from within an invalidation it must not. With `zap` nobody will
    write to the buffer, so that one block of zeros serves all who ask.
    """
    inject = dev.inject
    kind = np.uint64 if ent_size == MTT_SIZE else KLM
    size = min(ent_size * align(nents, UMR_ALIGNMENT // ent_size), MLX5_MAX_UMR_CHUNK)
    for site, limit in (("xlt_max", size), ("xlt_spare", MLX5_SPARE_UMR_CHUNK), ("xlt_page", PAGE)):
        if site == "xlt_spare" and size <= MLX5_SPARE_UMR_CHUNK:
            continue
        if not inject.hit(site):
            thread.note(bytes=limit, cause=cause)
            return Xlt(ZEROS[: limit // ent_size] if zap else np.zeros(limit // ent_size, dtype=kind), limit)
    yield from dev.xlt_emergency_page_mutex.acquire(thread)
    thread.note(bytes=PAGE, cause="emergency")
    return Xlt(np.zeros(PAGE // ent_size, dtype=kind), PAGE, emergency=True)


@waiting_step
def mlx5r_umr_unmap_free_xlt(dev: Mlx5IbDev, thread: Thread, xlt: Xlt) -> Wait:
    """Take the buffer back from the hardware and give it up (umr.c)."""
    dma_unmap_single(dev, thread, xlt.length)
    yield from mlx5r_umr_free_xlt(dev, thread, xlt)


@waiting_step
def mlx5r_umr_free_xlt(dev: Mlx5IbDev, thread: Thread, xlt: Xlt) -> Wait:
    """Give the buffer up; of the emergency page, its mutex (umr.c)."""
    if xlt.emergency:
        yield from dev.xlt_emergency_page_mutex.release(thread)


@waiting_step
def mlx5r_umr_create_xlt(dev: Mlx5IbDev, thread: Thread, nents: int, ent_size: int, flags: int) -> Wait:
    """Return a buffer that the hardware can read, or None (umr.c)."""
    cause = "GFP_ATOMIC" if flags & UPD_XLT_ATOMIC else "GFP_KERNEL"
    zap = bool(flags & UPD_XLT_ZAP) and ent_size == MTT_SIZE
    xlt = yield from mlx5r_umr_alloc_xlt(dev, thread, nents, ent_size, cause, zap)
    thread.charge(dev.costs.xlt_alloc)
    if dma_map_single(dev, thread, xlt.length):
        yield from mlx5r_umr_free_xlt(dev, thread, xlt)
        return None
    return xlt
