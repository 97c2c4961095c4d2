"""The end of an address space (mm/mmap.c exit_mmap, mm/oom_kill.c @ 7.0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.memory.notifier.mmu_notifier import (
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start_nonblock,
    mmu_notifier_release,
)
from kit.memory.notifier.mmu_notifier_types import EVENTS, MmuNotifierRange
from kit.memory.reclaim.zap import free_pgtables, unmap_vmas, zap_slots
from kit.memory.space.vma_ops import vma_close
from kit.memory.types import VM_HUGETLB, VM_PFNMAP, VM_SHARED
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["exit_mmap", "mmput", "oom_reap_task_mm"]


def mmput(mm: Mm, thread: Thread) -> Wait:
    """Drop a user reference; the last one tears the address space down."""
    if mm.mm_users == 1:
        yield from exit_mmap(mm, thread)
    else:
        mm.mm_users -= 1


@waiting_step
def exit_mmap(mm: Mm, thread: Thread) -> Wait:
    """Tear an address space down: mirrors are released (RELEASE), then everything is unmapped (UNMAP) and freed."""
    mm.mm_users = 0
    if mm.notifier_subscriptions is not None:
        yield from mmu_notifier_release(mm, thread)
    vmas = list(mm.vmas)
    if not vmas:
        return
    first, end = vmas[0].first, vmas[-1].end
    yield from mm.mmap_lock.read_acquire(thread)
    yield from unmap_vmas(mm, thread, vmas, first, end - first)
    yield from mm.mmap_lock.read_release(thread)
    yield from mm.mmap_lock.write_acquire(thread)
    for vma in vmas:
        if vma.flags & VM_HUGETLB:
            from kit.memory.huge.hugetlb import hugetlb_unreserve_pages

            hugetlb_unreserve_pages(vma)
        mm.remove(vma)
        mm.unlink(vma)
        vma_close(vma, thread)
    free_pgtables(mm, thread, first, end - first)
    yield from mm.mmap_lock.write_release(thread)


@waiting_step
def oom_reap_task_mm(mm: Mm, thread: Thread) -> Wait:
    """Take a dying process's private anonymous memory without ever sleeping in a notifier.

    Returns
    -------
    bool
        False when a notifier would have had to sleep: that area was left alone, and somebody has to come again.
    """
    complete = True
    for vma in list(mm.vmas):
        if vma.flags & (VM_HUGETLB | VM_PFNMAP | VM_SHARED) or not vma.pages:
            continue
        told = MmuNotifierRange(mm, vma.start, vma.stop, EVENTS.UNMAP, blockable=False)
        if mm.notifier_subscriptions is not None:
            refused = yield from mmu_notifier_invalidate_range_start_nonblock(told, thread)
            if refused:
                complete = False
                continue
        slots = mm.table.occupied(vma.first, vma.pages)
        if len(slots):
            zap_slots(mm, thread, np.asarray(slots))
        if mm.notifier_subscriptions is not None:
            yield from mmu_notifier_invalidate_range_end(told, thread)
    return complete
