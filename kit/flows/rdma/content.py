"""What memory should hold, kept beside what it holds: the proof that no byte was lost on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.payload import gather, scatter
from kit.flows.run import Integrity
from kit.memory.faults.load_store import store, write_bytes
from kit.memory.physical.zeros import zeros
from kit.memory.types import PAGE, Kind

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["Area", "add_up", "cpu_write", "frames_of", "message_bytes", "peek"]

AT_ONCE = 1 << 18  # pages of an area compared together: 1 GiB
HELD = (Kind.PRESENT, Kind.DEVICE_PRIVATE, Kind.DEVICE_EXCLUSIVE, Kind.MIGRATION)
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]


@dataclass(eq=False)
class Area:
    """An area of memory, with the content that was last written to it.

    Attributes
    ----------
    name : str
    va, pages : int
        First byte, and 4 KiB pages.
    words : int
        Content carried for each page, in 8-byte words.
    model : ndarray of uint64, shape (pages, words)
    maybe_zero : ndarray of bool, shape (pages,)
        Pages that were thrown away while a message was under way: they hold the model's content, or zeros.
    unknown : ndarray of bool, shape (pages,)
        Pages that a failed message may have written in part.
    """

    name: str
    va: int
    pages: int
    words: int
    model: Words = field(init=False, repr=False)
    maybe_zero: NDArray[np.bool_] = field(init=False, repr=False)
    unknown: NDArray[np.bool_] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.model = zeros(self.pages * self.words, np.uint64).reshape(self.pages, self.words)
        self.maybe_zero, self.unknown = zeros(self.pages, bool), zeros(self.pages, bool)

    def __contains__(self, address: int) -> bool:
        return self.va <= address < self.va + self.pages * PAGE

    def span(self, address: int, length: int) -> slice:
        """Return the pages that [address, address + length) touches."""
        return slice((address - self.va) // PAGE, -(-(address + length - self.va) // PAGE))

    def write(self, address: int, data: Bytes) -> None:
        """A message or the CPU has written `data`."""
        where = self.span(address, len(data))
        scatter(self.model[where], np.arange(where.stop - where.start), address % PAGE, data)
        self.maybe_zero[where] = False
        self.unknown[where] = False

    def read(self, address: int, length: int) -> Bytes:
        """Return what a read of these bytes should find."""
        where = self.span(address, length)
        return gather(self.model[where], np.arange(where.stop - where.start), address % PAGE, length)

    def drop(self, pages: NDArray[np.int64], while_in_use: bool = False) -> None:
        """These pages (numbers from 0) were thrown away: they read as zeros, if no message is on its way to them."""
        if while_in_use:
            self.maybe_zero[pages] = True
        else:
            self.model[pages] = 0

    def frames(self, mm: Mm, first: int, count: int) -> NDArray[np.int64]:
        """Return the page that each virtual page number stands for, mapped or in a file's cache; -1: none."""
        found, kind = frames_of(mm, first, count), mm.table.kind[mm.table.slots(first, count)]
        for vma in mm.vmas_in(first, count):
            if vma.file is not None:
                at, _index, cached = _cached(vma, first, count, kind)
                found[at] = cached
        return found

    def check(self, mm: Mm) -> tuple[int, int]:
        """Return how many pages were compared with memory and how many of them differ; nothing is faulted in."""
        pages = lost = 0
        for first in range(0, self.pages, AT_ONCE):
            part = slice(first, min(first + AT_ONCE, self.pages))
            there = peek(mm, self.va // PAGE + first, part.stop - first)
            same = (there == self.model[part]).all(axis=1)
            same |= self.maybe_zero[part] & ~there.any(axis=1)
            checked = ~self.unknown[part]
            pages, lost = pages + int(checked.sum()), lost + int((checked & ~same).sum())
        return pages, lost


def add_up(found: Iterable[tuple[int, int]]) -> Integrity:
    """Return what several checks found together: pages compared, pages lost."""
    checks = list(found)
    return Integrity(sum(pages for pages, _ in checks), sum(lost for _, lost in checks))


def cpu_write(
    mm: Mm, thread: Thread, area: Area, pages: NDArray[np.int64], number: int, rng: np.random.Generator
) -> Wait:  # fmt: skip
    """Let the CPU write pages (numbers from 0) of an area anew, taking every fault; `number` starts its stamps."""
    if not len(pages):
        return
    area.maybe_zero[pages] = area.unknown[pages] = False
    if mm.memory.payload_bytes == PAGE:
        area.model[pages] = rng.integers(1, 1 << 62, (len(pages), area.words), dtype=np.uint64)
        for page in pages.tolist():
            yield from write_bytes(mm, thread, area.va + page * PAGE, area.model[page].view(np.uint8))
        return
    area.model[pages, 0] = (np.uint64(number) << np.uint64(24)) + pages.astype(np.uint64)
    yield from store(mm, thread, area.va // PAGE + pages, area.model[pages, 0])


def frames_of(mm: Mm, first: int, count: int) -> NDArray[np.int64]:
    """Return the page that each virtual page number names, -1 where it names none."""
    slots = mm.table.slots(first, count)
    kind, frame = mm.table.kind[slots], mm.table.frame[slots].astype(np.int64)
    return np.where(np.isin(kind, HELD), frame, -1)


def peek(mm: Mm, first: int, count: int) -> Words:
    """Return the content of virtual pages, wherever it is: in memory, on a device, on swap, in a file; else zeros.

    Returns
    -------
    ndarray of uint64, shape (count, words)
    """
    memory = mm.memory
    found = np.zeros((count, memory.words), dtype=np.uint64)
    if not len(mm.table.leaves(first, count)[0]) and all(vma.file is None for vma in mm.vmas_in(first, count)):
        return found
    slots = mm.table.slots(first, count)
    kind, frame = mm.table.kind[slots], mm.table.frame[slots].astype(np.int64)
    held = np.isin(kind, HELD)
    found[held] = memory.payload[frame[held]]
    out = kind == Kind.SWAP
    found[out] = memory.swap.payload[frame[out]]
    for vma in mm.vmas_in(first, count) if not held.all() else ():
        if vma.file is not None:
            _peek_file(found, vma, first, count, kind)
    return found


def _peek_file(found: Words, vma: Vma, first: int, count: int, kind: NDArray[np.uint8]) -> None:
    """Fill in pages of a mapped file that no entry names."""
    at, index, cached = _cached(vma, first, count, kind)
    there = cached >= 0
    found[at[there]] = vma.mm.memory.payload[cached[there]]
    if vma.file is not None and not vma.file.shmem:
        found[at[~there]] = vma.file.data[index[~there]]


def _cached(
    vma: Vma, first: int, count: int, kind: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return of the pages of [first, first + count) that no entry names: where, index in the file, page or -1."""
    assert vma.file is not None
    low, high = max(vma.first, first), min(vma.end, first + count)
    at = np.flatnonzero(kind[low - first : high - first] == Kind.NONE) + low - first
    index = at + first - vma.first + vma.pgoff
    return at, index, vma.file.cache[index].astype(np.int64)


def message_bytes(address: int, length: int, number: int, whole: bool, rng: np.random.Generator) -> Bytes:
    """Return the payload of a message: a stamp at each start of a page, and with `whole` random bytes in between.

    Parameters
    ----------
    address : int
        Where it will be written: pages start there.
    number : int
        Tells this message's stamps from all others.
    """
    data = rng.integers(0, 256, length, dtype=np.uint8) if whole else np.zeros(length, dtype=np.uint8)
    starts = np.arange(-address % PAGE, length - 7, PAGE)
    if len(starts):
        stamps = (np.uint64(number + 1) << np.uint64(24)) | np.arange(1, len(starts) + 1, dtype=np.uint64)
        data[starts[:, None] + np.arange(8)] = stamps.view(np.uint8).reshape(-1, 8)
    return data
