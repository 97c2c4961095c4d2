"""odp.c: what a translation entry says: DMA addresses of a region, keys of an implicit region's children."""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.core.linux import hmm_dma_map_pfn
from kit.drivers.mlx5.enums import MTT_READ, MTT_WRITE, PAGE_SHIFT, Era
from kit.drivers.mlx5.objects import UPD_XLT_DOWNGRADE, UPD_XLT_INDIRECT, UPD_XLT_ZAP
from kit.drivers.mlx5.umem.odp import MAPPED, VALID, WRITE
from kit.errors import Errno
from kit.memory.device.hmm_entries import hmm_pfn_to_pfn
from kit.sim.engine import Thread
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.drivers.mlx5.umem.odp import IbUmemOdp

__all__ = ["mlx5_odp_populate_xlt"]


@step
def mlx5_odp_populate_xlt(
    mr: Mlx5IbMr, thread: Thread, xlt: NDArray[Any], idx: int, nentries: int, flags: int
) -> int:  # fmt: skip
    """Fill the first `nentries` of the buffer for entries `idx` on; return 0 or an errno (odp.c)."""
    thread.charge(mr.dev.costs.xlt_entry * nentries)
    if flags & UPD_XLT_INDIRECT:
        (populate_ksm if mr.dev.era == Era.NEW else populate_klm)(mr, thread, xlt, idx, nentries, flags)
        return 0
    if flags & UPD_XLT_ZAP:
        return 0  # the buffer is zero, and zero is a missing page
    return populate_mtt(mr, thread, xlt, idx, nentries, flags)


@step
def populate_klm(imr: Mlx5IbMr, thread: Thread, xlt: NDArray[Any], idx: int, nentries: int, flags: int) -> None:
    """Slots of an implicit region: a child's key, or the device's null key, which always faults (odp.c @ 6.9)."""
    xlt["bcount"][:nentries] = imr.dev.imr.mtt_size
    write_slots(imr, xlt, idx, nentries, flags, imr.dev.hca.null_mkey, 0)


@step
def populate_ksm(imr: Mlx5IbMr, thread: Thread, xlt: NDArray[Any], idx: int, nentries: int, flags: int) -> None:
    """Slots of an implicit region; in the memory scheme the null key is its own and slots keep addresses (odp.c)."""
    if imr.dev.mem_page_fault():
        write_slots(imr, xlt, idx, nentries, flags, imr.null_mmkey.key, imr.dev.imr.mtt_size)
    else:
        write_slots(imr, xlt, idx, nentries, flags, imr.dev.hca.null_mkey, 0)


def write_slots(
    imr: Mlx5IbMr, xlt: NDArray[Any], idx: int, nentries: int, flags: int, null_key: int, step: int
) -> None:  # fmt: skip
    """Write empty slots, then the children's.

    Children are looked up now, under the parent's umem_mutex: whoever changes them does so first and writes the
    slots after, so the last writer always sees the newest children.
    """
    xlt["key"][:nentries] = null_key
    xlt["va"][:nentries] = np.arange(idx, idx + nentries, dtype=np.uint64) * np.uint64(step)
    if flags & UPD_XLT_ZAP:
        return
    children = imr.implicit_children
    here = [slot for slot in range(idx, idx + nentries) if slot in children] if nentries < len(children) else children
    for slot in here:
        if idx <= slot < idx + nentries:
            xlt["key"][slot - idx] = children[slot].lkey
            xlt["va"][slot - idx] = slot * imr.dev.imr.mtt_size


@step
def populate_mtt(mr: Mlx5IbMr, thread: Thread, pas: NDArray[Any], idx: int, nentries: int, flags: int) -> int:
    """DMA addresses with their rights (odp.c).

    Up to 6.11 both are in ``dma_list``. Since then this is where pages are mapped for DMA, and ``npages`` grows with
    every entry that is written, also when it was mapped before.
    """
    odp = cast("IbUmemOdp", mr.umem)
    if mr.dev.era < Era.NEW:
        pas[:nentries] = odp.dma_list[idx : idx + nentries]
        return 0
    pas[:nentries] = 0
    shift = odp.page_shift - PAGE_SHIFT
    pfns = odp.pfn_list[idx << shift : idx + nentries << shift : 1 << shift]
    at = np.flatnonzero(pfns & VALID)
    new = at[(pfns[at] & MAPPED) == 0]
    done = nentries
    if len(new):
        got = hmm_dma_map_pfn(mr.dev, thread, hmm_pfn_to_pfn(pfns[new]), shift)
        if len(got) < len(new):
            done = int(new[len(got)])
        odp.dma_list[idx + new[: len(got)]] = got
        pfns[new[: len(got)]] |= MAPPED
    at = at[at < done]
    rights = np.full(len(at), MTT_READ, dtype=np.uint64)
    if not flags & UPD_XLT_DOWNGRADE:
        rights[(pfns[at] & WRITE) != 0] |= np.uint64(MTT_WRITE)
    pas[at] = odp.dma_list[idx + at] | rights
    odp.npages += len(at)
    if done < nentries:
        return Errno(EFAULT, "mlx5_odp_populate_xlt", f"entry {idx + done} has no DMA address")
    return 0
