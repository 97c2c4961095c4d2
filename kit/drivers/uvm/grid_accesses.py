"""The accesses of a grid's warps: which pages an iteration needs, and which of its accesses have been made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kit.drivers.uvm.types import READ, WRITE
from kit.memory.physical.content import Content
from kit.memory.table.pagetable import PageTable

__all__ = ["ELEMENT", "GridAccesses", "Shape"]

ELEMENT: Final = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """Launch shape and arrays of a grid-stride loop ``out[i] = f(in[i], ...)``.

    Attributes
    ----------
    n : int
        Elements of 4 bytes.
    grid, block : int
        Thread blocks, threads in a block.
    reads, writes : tuple of int
        Addresses of the arrays that an iteration loads, and of those that it then stores.
    """

    n: int
    grid: int
    block: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class GridAccesses:
    """The loads and stores of the step that each warp is at.

    An access is made once. A load is over when its data has come back: the register is filled, and
    the page may leave while the warp's other loads are served. So only what is missing faults again,
    and a loop over more arrays than fit in memory at once still ends.

    Parameters
    ----------
    lanes : int
        Warps in flight at most.
    """

    def __init__(self, shape: Shape, table: PageTable, lanes: int) -> None:
        self.arrays = {READ: shape.reads, WRITE: shape.writes}
        self.first_bit = {READ: 0, WRITE: len(shape.reads)}
        self.all_loads = (1 << len(shape.reads)) - 1
        # Accesses of its present step that each warp has made, as bits: loads, then stores.
        self.bits = np.zeros(lanes, dtype=np.int64)
        self.first_page = {a: a // 4096 for a in (*shape.reads, *shape.writes)}
        self.slot: dict[int, NDArray[np.int64]] = {}  # of each page of an array: an index away, not a walk
        nbytes = shape.n * ELEMENT
        for address, first in self.first_page.items():
            count = (address % 4096 + nbytes - 1) // 4096 + 1
            self.slot[address] = table.walk(np.arange(first, first + min(count, -(-nbytes // 4096) + 1)))

    def pages(self, address: int, offset: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the virtual page numbers of bytes `offset` of an array."""
        found: NDArray[np.int64] = self.first_page[address] + ((address % 4096 + offset) >> 12)
        return found

    def _slots(self, address: int, offset: NDArray[np.int64]) -> NDArray[np.int64]:
        table = self.slot[address]
        found: NDArray[np.int64] = table[np.minimum((address % 4096 + offset) >> 12, len(table) - 1)]
        return found

    def made(self, lanes: NDArray[np.int64], kind: int, turn: int) -> NDArray[np.bool_]:
        """Return which of `lanes` have made load or store number `turn` of their present step."""
        return (self.bits[lanes] >> (self.first_bit[kind] + turn) & 1).astype(bool)

    def granted(
        self, lanes: NDArray[np.int64], rights: NDArray[np.uint8], offset: NDArray[np.int64],
        inside: NDArray[np.bool_], kind: int,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Return where all loads, or all stores, of a step can be made, or have been.

        Parameters
        ----------
        offset : ndarray of int64, shape (lanes, steps)
            Bytes into the arrays, from the present step of each warp on.
        inside : ndarray of bool, shape (lanes, steps)
            Which of them are still in the loop.
        """
        granted, some = inside.copy(), bool(self.bits[lanes].any())
        for turn, address in enumerate(self.arrays[kind]):
            right = rights[self._slots(address, offset)] >= kind
            if some:
                right[:, 0] |= self.made(lanes, kind, turn)
            granted &= right
        return granted

    def passed(
        self, lanes: NDArray[np.int64], offset: NDArray[np.int64], ran: NDArray[np.bool_], content: Content
    ) -> None:
        """Warps went through the steps that `ran` marks: their stores are made, less those made before."""
        some = bool(self.bits[lanes].any())
        for turn, address in enumerate(self.arrays[WRITE]):
            fresh = ran
            if some:
                fresh = ran.copy()
                fresh[:, 0] &= ~self.made(lanes, WRITE, turn)
            content.write(self._slots(address, offset[fresh]))
        if some:
            self.bits[lanes[ran[:, 0]]] = 0

    def wait(
        self, lanes: NDArray[np.int64], offset: NDArray[np.int64], rights: NDArray[np.uint8], content: Content
    ) -> int:
        """Make what can be made of the steps that warps are stuck at; return how many warps got further.

        Stores come after the last load.
        """
        before = self.bits[lanes]
        bits = before.copy()
        for turn, address in enumerate(self.arrays[READ]):
            bits |= (rights[self._slots(address, offset)] >= READ).astype(np.int64) << turn
        loaded = bits & self.all_loads == self.all_loads
        for turn, address in enumerate(self.arrays[WRITE], self.first_bit[WRITE]):
            slots = self._slots(address, offset)
            fresh = loaded & (rights[slots] >= WRITE) & (before >> turn & 1 == 0)
            content.write(slots[fresh])
            bits |= fresh.astype(np.int64) << turn
        self.bits[lanes] = bits
        return int(np.count_nonzero(bits != before))
