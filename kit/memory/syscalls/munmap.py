"""Removing areas with everything that they map (mm/vma.c do_vmi_align_munmap @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.memory.reclaim.zap import free_pgtables, unmap_vmas
from kit.memory.space.vma_ops import split_at, vma_close
from kit.memory.types import VM_HUGETLB
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["do_vmi_munmap"]


@waiting_step
def do_vmi_munmap(mm: Mm, thread: Thread, first: int, count: int, unlock: bool = False) -> Wait:
    """Unmap pages [first, first + count); the caller holds the mmap lock for writing. Returns 0 or -EINVAL.

    With `unlock` the lock is downgraded once the areas are gone, and released at the end, as munmap does.
    """
    result = yield from split_at(mm, thread, first, first + count)
    vmas = mm.vmas_in(first, count) if not result else []
    for vma in vmas:
        mm.remove(vma)
        thread.charge(mm.costs.vma_op)
    if unlock:
        yield from thread.sync()
        mm.mmap_lock.write_downgrade(thread)
    if vmas:
        low, high = vmas[0].first, vmas[-1].end
        yield from unmap_vmas(mm, thread, vmas, low, high - low)
        for vma in vmas:
            mm.unlink(vma)
            vma_close(vma, thread)
            if vma.flags & VM_HUGETLB:
                from kit.memory.huge.hugetlb import hugetlb_unreserve_pages

                hugetlb_unreserve_pages(vma)
        free_pgtables(mm, thread, low, high - low)
    if unlock:
        yield from mm.mmap_lock.read_release(thread)
    return result
