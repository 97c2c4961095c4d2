"""What must hold of memory and address spaces whenever nobody is in the middle of a change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.files.file import File
from kit.memory.physical.memremap import MEMORY_DEVICE_PRIVATE
from kit.memory.types import HPAGE_PMD_NR, PG, VM_HUGETLB, Bit, Kind

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm

__all__ = ["check_invariants"]


def check_invariants(
    memory: PhysicalMemory, mms: Iterable[Mm], extra: Mapping[int, int] | None = None, devices: bool = True
) -> None:
    """Assert conservation of pages, references, mappings and swap slots.

    Parameters
    ----------
    mms : iterable of Mm
        Every address space that exists.
    extra : mapping of int to int, optional
        References that somebody else holds: folio head -> how many, pins not included.
    devices : bool
        Check the references of device pages too; False while a driver keeps some of its own.

    Raises
    ------
    AssertionError
        Naming the pages that are wrong.
    """
    mms = list(mms)
    mapped = np.zeros(memory.total, dtype=np.int64)  # entries by head
    swap = np.zeros(memory.swap.slots, dtype=np.int64)
    for mm in mms:
        _table(mm)
        _entries(memory, mm, mapped, swap)
    files = [root for root in memory.mappings if isinstance(root, File)]
    cached = _caches(memory, files, swap)
    _pages(memory, mapped, cached, extra or {}, devices)
    assert _same(memory.swap.count, swap), f"swap counts differ at slots {_first(memory.swap.count != swap)}"
    used = memory.swap.in_use()
    needed = (swap > 0) | (memory.swap.cache >= 0)
    assert _same(used, needed), f"swap slots are lost or free although named: {_first(used != needed)}"
    _free_lists(memory)


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    return bool((a == b).all())


def _first(wrong: NDArray[np.bool_]) -> list[int]:
    return [int(at) for at in np.flatnonzero(wrong)[:6]]


def _table(mm: Mm) -> None:
    """Rights follow from kind and bits; leaves are uniform; every entry lies in an area."""
    table = mm.table
    live = table.kind != Kind.NONE
    present = (table.kind == Kind.PRESENT) & ((table.bits & Bit.PROTNONE) == 0)
    rights = np.where(present, 1 + (table.bits & Bit.WRITABLE), 0)
    assert _same(table.rights, rights), f"{mm.name}: rights of slots {_first(table.rights != rights)}"
    numbers, rows = table.leaves(0, 1 << 36)
    assert _same(table.number[rows], numbers), f"{mm.name}: rows do not know their numbers"
    kinds = table.kind.reshape(-1, HPAGE_PMD_NR)
    loose = live.reshape(-1, HPAGE_PMD_NR).any(axis=1)
    loose[rows] = False
    assert not loose.any(), f"{mm.name}: entries in rows {_first(loose)} that translate nothing"
    for row in rows[table.leaf_level[rows] > 0].tolist():
        slots = slice(row * HPAGE_PMD_NR, (row + 1) * HPAGE_PMD_NR)
        assert kinds[row, 0] != Kind.NONE, f"{mm.name}: row {row} is an empty leaf"
        alike = (table.kind[slots] == table.kind[slots.start]) & (table.bits[slots] == table.bits[slots.start])
        alike &= np.diff(table.frame[slots], prepend=table.frame[slots.start] - 1) == 1
        assert alike.all(), f"{mm.name}: leaf row {row} is not uniform at {_first(~alike)}"
        assert int(table.frame[slots.start]) % HPAGE_PMD_NR == 0, f"{mm.name}: leaf row {row} is not aligned"
    slots_ = table.occupied(0, 1 << 36)
    pages = np.sort(table.pages_at(slots_))
    inside = np.zeros(len(pages), dtype=bool)
    last = 0
    for vma in mm.vmas:
        assert vma.first >= last and vma.pages > 0 and vma.mm is mm, f"{mm.name}: {vma} overlaps or is empty"
        last = vma.end
        inside[np.searchsorted(pages, vma.first) : np.searchsorted(pages, vma.end)] = True
    assert inside.all(), f"{mm.name}: pages {pages[~inside][:6]} have entries but no area"


def _entries(memory: PhysicalMemory, mm: Mm, mapped: NDArray[np.int64], swap: NDArray[np.int64]) -> None:
    """Count what a table names, and compare the resident set counters."""
    table = mm.table
    slots = table.occupied(0, 1 << 36)
    kind, frame, bits = table.kind[slots], table.frame[slots].astype(np.int64), table.bits[slots]
    lead = table.leads(slots)
    struct = ((kind == Kind.PRESENT) & ((bits & Bit.SPECIAL) == 0)) | (kind == Kind.DEVICE_PRIVATE)
    struct |= kind == Kind.DEVICE_EXCLUSIVE
    np.add.at(mapped, memory.head(frame[struct & lead]), 1)
    np.add.at(swap, frame[kind == Kind.SWAP], 1)
    private = np.array([p is not None and p.type == MEMORY_DEVICE_PRIVATE for p in memory.pgmaps])
    device = private[memory.pgmap[frame[struct]]]
    odd = slots[struct][device != (kind[struct] == Kind.DEVICE_PRIVATE)]
    assert not len(odd), f"{mm.name}: device-private pages and entries differ at slots {odd[:6]}"
    moving = frame[kind == Kind.MIGRATION]
    unlocked = (memory.flags[memory.head(moving)] & PG.LOCKED) == 0
    assert not unlocked.any(), f"{mm.name}: migration entries name unlocked pages {moving[unlocked][:6]}"
    writable = struct & (kind != Kind.DEVICE_EXCLUSIVE) & ((bits & Bit.WRITABLE) != 0)
    flags = memory.flags[memory.head(np.where(struct, frame, 0))]
    shared = writable & ((flags & PG.ANON) != 0) & ((memory.flags[np.where(struct, frame, 0)] & PG.ANON_EXCLUSIVE) == 0)
    assert not shared.any(), f"{mm.name}: writable entries of pages that are not exclusive: {frame[shared][:6]}"
    assert mm.rss["swap"] == int((kind == Kind.SWAP).sum()), f"{mm.name}: rss swap {mm.rss['swap']}"
    counted = (struct | (kind == Kind.MIGRATION)) & _plain(mm, table.pages_at(slots))
    flags = memory.flags[memory.head(frame[counted])]
    anon, backed = (flags & PG.ANON) != 0, (flags & PG.SWAPBACKED) != 0
    found = {"anon": anon, "shmem": ~anon & backed, "file": ~anon & ~backed}
    for counter, marks in found.items():
        assert mm.rss[counter] == int(marks.sum()), f"{mm.name}: rss {counter} {mm.rss[counter]} is {int(marks.sum())}"


def _plain(mm: Mm, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
    plain = np.ones(len(pages), dtype=bool)
    for vma in mm.vmas:
        if vma.flags & VM_HUGETLB:
            plain &= (pages < vma.first) | (pages >= vma.end)
    return plain


def _caches(memory: PhysicalMemory, files: list[File], swap: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the references that page caches and the swap cache hold, by pfn."""
    cached = np.zeros(memory.total, dtype=np.int64)
    for file in files:
        indices = np.flatnonzero(file.cache >= 0)
        pfns = file.cache[indices]
        np.add.at(cached, pfns, 1)
        right = (memory.mapping[pfns] == file.id) & (memory.index[pfns] == indices)
        assert right.all(), f"{file.name}: cached pages {pfns[~right][:6]} do not know where they belong"
        np.add.at(swap, -2 - file.cache[file.cache < -1], 1)
    slots = np.flatnonzero(memory.swap.cache >= 0)
    np.add.at(cached, memory.swap.cache[slots], 1)
    right = (memory.flags[memory.swap.cache[slots]] & PG.SWAPCACHE) != 0
    right &= memory.swap_slot[memory.swap.cache[slots]] == slots
    assert right.all(), f"swap cache: slots {slots[~right][:6]}"
    return cached


def _pages(
    memory: PhysicalMemory, mapped: NDArray[np.int64], cached: NDArray[np.int64], extra: Mapping[int, int],
    devices: bool,
) -> None:  # fmt: skip
    """Compare each folio's counts with what was found."""
    assert _same(memory.mapcount, mapped), f"mapcount differs at pfns {_first(memory.mapcount != mapped)}"
    expected = mapped + cached + memory.pincount
    for head, count in extra.items():
        expected[head] += count
    ours = (memory.flags & (PG.RESERVED | PG.HWPOISON)) == 0
    if not devices:
        ours &= memory.pgmap == 0
    wrong = ours & (memory.refcount != expected)
    assert not wrong.any(), (
        f"refcounts {memory.refcount[wrong][:6]} of pfns {_first(wrong)} should be {expected[wrong][:6]}"
    )
    tails = np.flatnonzero((memory.order > 0) & (memory.refcount == 0))
    whole = memory.refcount[memory.head(tails)] > 0
    assert whole[memory.pgmap[tails] == 0].all(), f"tails of folios that are free: {tails[~whole][:6]}"
    on = (memory.flags & PG.LRU) != 0
    assert (memory.refcount[on] > 0).all(), f"free pages on the LRU: {_first(on & (memory.refcount <= 0))}"


def _free_lists(memory: PhysicalMemory) -> None:
    """No frame is lost, and none is both free and in use."""
    free = memory.free_mask()
    used = np.zeros(memory.system_frames, dtype=bool)
    heads = np.flatnonzero(memory.refcount[: memory.system_frames] > 0)
    for order in set(memory.order[heads].tolist()):
        used[memory.block(heads[memory.order[heads] == order], order)] = True
    if memory.huge_zero >= 0:
        used[memory.huge_zero : memory.huge_zero + HPAGE_PMD_NR] = True
    assert not (free & used).any(), f"frames both free and in use: {_first(free & used)}"
    assert (free | used).all(), f"frames that are lost: {_first(~(free | used))}"
