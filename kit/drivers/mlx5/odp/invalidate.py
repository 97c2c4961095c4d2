"""odp.c: the CPU's page table changes: the hardware's entries go first, then the DMA mappings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.mr.umr import mlx5r_umr_update_xlt
from kit.drivers.mlx5.objects import UPD_XLT_ATOMIC, UPD_XLT_ZAP, Mlx5IbMr
from kit.drivers.mlx5.odp.fault import count
from kit.drivers.mlx5.odp.implicit import destroy_unused_implicit_child_mr
from kit.drivers.mlx5.umem.odp import IbUmemOdp
from kit.drivers.mlx5.umem.odp_map import ib_umem_odp_unmap_dma_pages
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_set_seq
from kit.memory.notifier.mmu_notifier import mmu_notifier_range_blockable
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifierOps
from kit.sim.engine import Thread, Wait
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier, MmuNotifierRange

__all__ = ["Block", "blocks_to_zap", "mlx5_ib_invalidate_range", "mlx5_mn_ops"]

UMR_BLOCK = 8  # MLX5_UMR_MTT_NUM_ENTRIES_ALIGNMENT: entries in 64 bytes
Block = tuple[int, int, int]  # first entry, entries, invalidations counted for it


@waiting_step
def mlx5_ib_invalidate_range(
    mni: MmuIntervalNotifier, thread: Thread, range: MmuNotifierRange, cur_seq: int
) -> Wait:  # fmt: skip
    """Zap a range before the CPU's entries change; False when it must not sleep (odp.c).

    Every event does, whatever its reason and owner. The sequence moves even when nothing is mapped, which is what
    makes a fault that is under way start again.
    """
    umem_odp: IbUmemOdp = mni.user
    if not mmu_notifier_range_blockable(range):
        return False
    yield from umem_odp.umem_mutex.acquire(thread)
    mmu_interval_set_seq(mni, cur_seq)
    mr = umem_odp.private
    if umem_odp.npages and mr is not None:
        yield from zap(umem_odp, thread, mr, max(umem_odp.start, range.start), min(umem_odp.end, range.end))
    yield from umem_odp.umem_mutex.release(thread)
    return True


def zap(umem_odp: IbUmemOdp, thread: Thread, mr: Mlx5IbMr, start: int, end: int) -> Wait:
    """Empty the hardware's entries of [start, end), then unmap them, then let go of a child that is empty."""
    dev, shift = mr.dev, umem_odp.page_shift
    low = start - umem_odp.start >> shift
    high = -(-(end - start) >> shift) + low
    thread.charge(dev.costs.scan_entry * (high - low))
    # Beyond what was ever mapped nothing opens a block, and the next unit but one closes any.
    low, high = max(low, umem_odp.touched[0]), min(high, (umem_odp.touched[1] | UMR_BLOCK - 1) + 1 + UMR_BLOCK)
    blocks = blocks_to_zap(umem_odp.mapped(low, max(low, high)), low, dev.options.of("invalidations_fixed", dev.era))
    for first, entries, _ in blocks:
        yield from mlx5r_umr_update_xlt(mr, thread, first, entries, 0, UPD_XLT_ZAP | UPD_XLT_ATOMIC)
    count(mr, thread, "invalidations", sum(counted for _, _, counted in blocks))
    thread.note(va=start, bytes=end - start, value=len(blocks))
    ib_umem_odp_unmap_dma_pages(umem_odp, thread, start, end)
    if not umem_odp.npages and mr.parent is not None:
        destroy_unused_implicit_child_mr(mr, thread)


def blocks_to_zap(mapped: NDArray[np.bool_], low: int, fixed: bool) -> list[Block]:
    """Return the runs of entries that the scan over a range gives one UMR request each.

    A block opens at a mapped entry and closes at the next entry that is not mapped and starts a unit of 64 bytes;
    holes in between are zapped along. The last block ends with the scan.

    Parameters
    ----------
    mapped : ndarray of bool
        The scanned entries.
    low : int
        Index of the first.
    fixed : bool
        Count a block's length, plus one when it closed in mid-scan; otherwise, as long done, 1 + 2 + ... up to each
        mapped entry.
    """
    mapped_at = np.flatnonzero(mapped) + low
    index = np.arange(low + -low % UMR_BLOCK, low + len(mapped), UMR_BLOCK)
    closing = index[~mapped[index - low]]
    blocks: list[Block] = []
    at = 0
    while at < len(mapped_at):
        start = int(mapped_at[at])
        closes = int(np.searchsorted(closing, start))
        if closes < len(closing):
            end = int(closing[closes])
            counted = end - start + 1
        else:
            end = low + len(mapped)
            counted = end - start
        after = int(np.searchsorted(mapped_at, end))
        if not fixed:
            counted = int((mapped_at[at:after] - start + 1).sum())
        blocks.append((start, end - start, counted))
        at = after
    return blocks


mlx5_mn_ops = MmuIntervalNotifierOps(mlx5_ib_invalidate_range)
