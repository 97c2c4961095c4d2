"""What the tables hold at the end of a stage, written into the trace as spans without length.

Steps alone do not say what a page table holds: registration copies whatever is resident, and a UMR writes neighbours
again. So the flows write down, as runs of equal entries, what the hardware's and the driver's tables say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.enums import KLM, MTT_PRESENT, PAGE_SHIFT

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.drivers.mlx5.umem.odp import IbUmemOdp
    from kit.sim.trace import Trace

__all__ = ["STATES", "write_state"]

STATES = ("pfn_list", "dma_list", "hardware_mtt", "hardware_ksm")
BLOCK = 512
MOST_RUNS = 20_000  # a table that changes more often than that is written as whole blocks that hold something
VALID = 1 << 63


def write_state(trace: Trace, dev: Mlx5IbDev, mr: Mlx5IbMr, now: float) -> None:
    """Append the present entries of an ODP region: its lists, its translations, and those of its children.

    Parameters
    ----------
    trace : Trace
    dev : Mlx5IbDev
    mr : Mlx5IbMr
        An explicit region, or an implicit parent.
    now : float
        Microseconds.

    Notes
    -----
    A span's ``va`` and ``pages`` are the run, ``value`` its rights (1 read, 2 write); of a KSM slot it is the number
    of the slot.
    """
    if mr.is_odp_implicit:
        _slots(trace, dev, mr, now)
        for child in list(mr.implicit_children.values()):
            write_state(trace, dev, child, now)
        return
    hardware = dev.hca.mkeys.get(mr.mmkey.key)
    if hardware is not None and not hardware.mkc.free:
        shift, at = hardware.mkc.log_page_size, _blocks(hardware.filled)
        present = hardware.entries[at] & np.uint64(MTT_PRESENT)
        _runs(trace, "hardware_mtt", dev.hca.name, present, mr.iova + (at.start << shift), shift, now)
    if mr.is_odp:
        odp = cast("IbUmemOdp", mr.umem)
        at = _blocks(_nonzero(odp.pfn_list))
        present = (odp.pfn_list[at] >> np.uint64(63)) & np.uint64(1)
        _runs(trace, "pfn_list", dev.hca.name, present, odp.start + (at.start << PAGE_SHIFT), PAGE_SHIFT, now)
        at = _blocks(_nonzero(odp.dma_list))
        mapped = (odp.dma_list[at] != 0).astype(np.uint64)
        _runs(trace, "dma_list", dev.hca.name, mapped, odp.start + (at.start << odp.page_shift), odp.page_shift, now)


def _nonzero(entries: NDArray[np.uint64]) -> slice:
    """Return the part of a table that holds everything it says."""
    at = (entries != 0).nonzero()[0]  # booleans are searched ten times faster than numbers
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)


def _blocks(part: slice) -> slice:
    """Return a part of a table from a whole block on (`_runs`)."""
    return slice(part.start // BLOCK * BLOCK, part.stop)


def _slots(trace: Trace, dev: Mlx5IbDev, mr: Mlx5IbMr, now: float) -> None:
    hardware = dev.hca.mkeys.get(mr.mmkey.key)
    if hardware is None or hardware.mkc.free or hardware.entries.dtype != KLM:
        return
    null = {dev.hca.null_mkey, mr.null_mmkey.key, 0}
    size = dev.imr.mtt_size
    keys = hardware.entries["key"]
    for slot in np.flatnonzero(keys != dev.hca.null_mkey).tolist():
        if int(keys[slot]) not in null:
            trace.span("hardware_ksm", dev.hca.name, now, now, va=slot * size, pages=size >> PAGE_SHIFT, value=slot)


def _runs(
    trace: Trace, name: str, actor: str, entries: NDArray[np.uint64], base: int, shift: int, now: float
) -> None:  # fmt: skip
    """Append one span for each run of equal entries that are not 0."""
    change = np.flatnonzero(entries[1:] != entries[:-1]) + 1
    if len(change) > MOST_RUNS:
        pad = -len(entries) % BLOCK
        entries = np.pad(entries, (0, pad)).reshape(-1, BLOCK).max(axis=1)
        shift += 9
        change = np.flatnonzero(entries[1:] != entries[:-1]) + 1
    starts = np.concatenate(([0], change))
    ends = np.concatenate((change, [len(entries)]))
    for first, last in zip(starts.tolist(), ends.tolist(), strict=True):
        if last > first and entries[first]:
            pages = (last - first) << (shift - PAGE_SHIFT)
            va = base + (first << shift)
            trace.span(name, actor, now, now, va=va, pages=pages, bytes=pages << PAGE_SHIFT, value=int(entries[first]))
