"""An address space (mm): areas of virtual memory, one CPU page table, first-touch allocation."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kit.errors import DriverError
from kit.memory.frames import Frames
from kit.memory.pagetable import GEOMETRIES, PageTable
from kit.sim.engine import Thread, Wait

__all__ = ["MMAP_BASE", "READ", "WRITE", "AddressSpace", "Vma"]

READ, WRITE = 1, 2
PAGE = 4096
MMAP_BASE = 0x7F00_0000_0000
FaultHandler = Callable[[Thread, int, bool], Wait]


@dataclass
class Vma:
    """One area: pages [first, first + pages), what may be done there, and who handles its faults.

    ``fault`` is None for anonymous memory; a driver's area has the driver's fault handler, called
    with the faulting thread, the virtual page number and whether the access writes.
    """

    first: int
    pages: int
    prot: int
    name: str
    slot: int
    fault: FaultHandler | None = None

    @property
    def end(self) -> int:
        """First page past the area."""
        return self.first + self.pages


class AddressSpace:
    """A process's memory as its CPU threads see it.

    Parameters
    ----------
    frames : Frames
        Host memory.
    """

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.table = PageTable(GEOMETRIES["x86_64"])
        self.areas: list[Vma] = []
        self._top = MMAP_BASE // PAGE

    def mmap(
        self, nbytes: int, name: str, prot: int = READ | WRITE, fault: FaultHandler | None = None,
        align: int = 1, offset: int = 0,
    ) -> Vma:  # fmt: skip
        """Create an area of `nbytes`, rounded up to pages, populated with nothing.

        Parameters
        ----------
        align, offset : int
            The area starts `offset` pages past a multiple of `align` pages.

        Raises
        ------
        DriverError
            EINVAL: no bytes.
        """
        if nbytes <= 0:
            raise DriverError(errno.EINVAL, "EINVAL", "mmap", f"{name}: length {nbytes}")
        pages = -(-nbytes // PAGE)
        first = -(-(self._top - offset) // align) * align + offset
        self._top = first + pages
        vma = Vma(first, pages, prot, name, self.table.reserve(first, pages), fault)
        self.areas.append(vma)
        return vma

    def find(self, page: int) -> Vma | None:
        """Return the area that holds virtual page `page`, or None."""
        index = bisect_right(self.areas, page, key=lambda vma: vma.first) - 1
        return self.areas[index] if index >= 0 and page < self.areas[index].end else None

    def munmap(self, vma: Vma) -> None:
        """Remove an area and, when it is anonymous, free its frames."""
        if vma.fault is None:
            frames = self.table.frame[vma.slot : vma.slot + vma.pages]
            for frame in frames[frames >= 0].tolist():
                self.frames.free(frame, 1)
            frames[:] = -1
        self.table.unmap(vma.slot, vma.pages)
        self.areas.remove(vma)

    def mprotect(self, vma: Vma, prot: int) -> None:
        """Change what may be done in an area; present pages lose rights that it no longer has."""
        vma.prot = prot
        rights = self.table.window(vma.slot, vma.pages)
        if not prot & WRITE:
            np.minimum(rights, 1 if prot & READ else 0, out=rights)

    def touch(
        self, thread: Thread, pages: NDArray[np.int64], writes: NDArray[np.bool_], touch_us: float = 0.0,
        wrote: Callable[[NDArray[np.int64]], None] | None = None,
    ) -> Wait:  # fmt: skip
        """Access `pages` in order from a CPU thread, taking every fault on the way.

        Parameters
        ----------
        pages : ndarray of int64, shape (n,)
            Virtual page numbers.
        writes : ndarray of bool, shape (n,)
        touch_us : float
            The program's own work on each access, microseconds.
        wrote : callable
            Told the pages of completed writes.

        Raises
        ------
        DriverError
            EFAULT: a page in no area, or a right that its area does not give (the process's SIGSEGV).
        """
        need = np.where(writes, WRITE, READ).astype(np.uint8)
        for start in range(0, len(pages), 65536):
            chunk = slice(start, start + 65536)
            yield from self._touch_chunk(thread, pages[chunk], need[chunk], touch_us, wrote)

    def _touch_chunk(
        self, thread: Thread, pages: NDArray[np.int64], need: NDArray[np.uint8], touch_us: float,
        wrote: Callable[[NDArray[np.int64]], None] | None,
    ) -> Wait:  # fmt: skip
        slots = self.table.walk(pages)
        at, window = 0, 64
        while at < len(pages):
            stop = min(at + window, len(pages))
            miss = self.table.rights[slots[at:stop]] < need[at:stop]
            first = int(miss.argmax())
            ran = first if miss[first] else stop - at
            if ran:
                thread.charge(ran * touch_us)
                if wrote is not None:
                    wrote(pages[at : at + ran][need[at : at + ran] == WRITE])
                at += ran
                window = min(2 * window, 8192)
            if at < stop:
                window = 64
                yield from self.handle_mm_fault(thread, int(pages[at]), bool(need[at] == WRITE))

    def handle_mm_fault(self, thread: Thread, page: int, write: bool) -> Wait:
        """Serve one CPU fault: by the area's driver, or by a zeroed frame (first touch)."""
        vma = self.find(page)
        if vma is None or not vma.prot & (WRITE if write else READ):
            why = "in no area" if vma is None else f"{vma.name} does not allow it"
            raise DriverError(errno.EFAULT, "SIGSEGV", "handle_mm_fault", f"address {page * PAGE:#x}: {why}")
        if vma.fault is not None:
            yield from vma.fault(thread, page, write)
            return
        slot = vma.slot + page - vma.first
        frame = int(self.table.frame[slot])
        if frame < 0:  # else the page is there, and only its rights were taken away
            frame = self.frames.alloc(1)
            self.frames.zero(slice(frame, frame + 1))
        self.table.map(slot, 1, frame, WRITE if vma.prot & WRITE else READ)
