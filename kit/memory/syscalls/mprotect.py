"""mprotect: rights of areas and of their entries (mm/mprotect.c @ 7.0)."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.huge.huge_split import split_edges
from kit.memory.notifier.mmu_notifier_types import EVENTS
from kit.memory.notifier.notify import invalidate_end, invalidate_start
from kit.memory.space.vma_ops import split_at, vma_merge
from kit.memory.types import (
    PAGE,
    PG,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    VM_ACCESS_FLAGS,
    VM_EXEC,
    VM_HUGETLB,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    Bit,
    Kind,
)  # fmt: skip
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["can_change_writable", "change_protection", "mprotect"]


@waiting_step
def mprotect(mm: Mm, thread: Thread, start: int, length: int, prot: int) -> Wait:
    """Set the rights of bytes [start, start + length), rounded up to pages.

    Returns
    -------
    int
        0; -EINVAL: unaligned start or a cut inside a huge page; -ENOMEM: some of the range is not mapped (what comes
        before the gap is changed).
    """
    thread.charge(mm.costs.syscall)
    if start % PAGE:
        return Errno(EINVAL, "mprotect", f"start {start:#x} is not aligned")
    first, count = start // PAGE, -(-length // PAGE)
    thread.note(va=start, pages=count)
    if not count:
        return 0
    yield from mm.mmap_lock.write_acquire(thread)
    result = yield from _mprotect(mm, thread, first, count, prot)
    if result < 0:
        thread.note(va=start, pages=count, status=repr(result))
    yield from mm.mmap_lock.write_release(thread)
    return result


def _mprotect(mm: Mm, thread: Thread, first: int, count: int, prot: int) -> Wait:
    access = VM_READ if prot & (PROT_READ | PROT_WRITE) else 0
    access |= (VM_WRITE if prot & PROT_WRITE else 0) | (VM_EXEC if prot & PROT_EXEC else 0)
    at, end = first, first + count
    while at < end:
        vma = mm.find(at)
        if vma is None:
            vma_merge(mm, thread, first, end)
            return Errno(ENOMEM, "mprotect", f"{at * PAGE:#x} is not mapped")
        stop = min(vma.end, end)
        flags = (vma.flags & ~VM_ACCESS_FLAGS) | access
        if flags != vma.flags:
            result = yield from split_at(mm, thread, at, stop)
            if result < 0:
                return result
            part = mm.find(at)
            assert part is not None
            part.flags = flags
            yield from change_protection(part, thread, at, stop - at)
        at = stop
    vma_merge(mm, thread, first, end)
    return 0


@waiting_step
def change_protection(vma: Vma, thread: Thread, first: int, count: int) -> Wait:
    """Give the entries of pages [first, first + count) the rights of their area; one PROTECTION_VMA notification."""
    mm = vma.mm
    numbers, _rows = mm.table.leaves(first, count)
    thread.note(va=first * PAGE, pages=count)
    if not len(numbers):
        return
    low = max(first, int(numbers[0]) >> 9 << 18)  # from the first PUD entry that is there
    told = yield from invalidate_start(mm, thread, low, first + count - low, EVENTS.PROTECTION_VMA)
    if not vma.flags & VM_HUGETLB:
        yield from split_edges(mm, thread, first, count)
    slots = mm.table.occupied(first, count)
    thread.charge(mm.costs.walk_table * len(numbers))
    if len(slots):
        _change_entries(vma, slots)
        thread.charge(mm.costs.pte_write * int(mm.table.leads(slots).sum()) + mm.costs.tlb_flush)
    yield from invalidate_end(told, thread)


def _change_entries(vma: Vma, slots: NDArray[np.int64]) -> None:
    """change_pte_range and change_huge_pmd, for all entries at once."""
    table, memory = vma.mm.table, vma.mm.memory
    kind, old = table.kind[slots], table.bits[slots]
    present = kind == Kind.PRESENT
    bits = np.where(present, old & ~np.uint8(Bit.PROTNONE | Bit.WRITABLE), old)
    if not vma.flags & VM_ACCESS_FLAGS:
        bits = np.where(present, bits | Bit.PROTNONE, bits)
    elif vma.writable:
        up = present & can_change_writable(vma, table.frame[slots], bits)
        bits = np.where(up, bits | Bit.WRITABLE, bits)
    # A writable migration or device-private entry always loses the right: the next write fault sorts it out.
    moving = (kind == Kind.MIGRATION) & ((old & Bit.WRITABLE) != 0)
    if moving.any():
        frames = table.frame[slots]
        anon = (memory.flags[memory.head(np.where(moving, frames, 0))] & PG.ANON) != 0
        bits = np.where(moving, bits & ~np.uint8(Bit.WRITABLE), bits)
        bits = np.where(moving & anon, bits | Bit.READ_EXCLUSIVE, bits)
    bits = np.where(kind == Kind.DEVICE_PRIVATE, bits & ~np.uint8(Bit.WRITABLE), bits)
    table.set_bits(slots, bits.astype(np.uint8))


def can_change_writable(vma: Vma, frames: NDArray[np.integer], bits: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which present entries of a writable area may be writable without a fault (can_change_pte_writable)."""
    memory = vma.mm.memory
    normal = (bits & (Bit.SPECIAL | Bit.UFFD_WP | Bit.PROTNONE)) == 0
    if vma.flags & VM_SHARED:
        if vma.file is None or vma.file.shmem:
            return np.asarray(normal)  # nobody wants to be told of the first write
        return np.asarray(normal & ((bits & Bit.DIRTY) != 0))
    exclusive = (memory.flags[np.where(normal, frames, 0)] & PG.ANON_EXCLUSIVE) != 0
    return np.asarray(normal & exclusive)
