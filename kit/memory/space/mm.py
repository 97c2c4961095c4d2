"""struct mm_struct: one process's address space."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.space.vma import AnonFamily, Vma
from kit.memory.table.cpu_table import CpuTable
from kit.memory.types import PAGE, VM_ACCESS_FLAGS
from kit.sim.costs import Costs
from kit.sim.locks import RwLock

if TYPE_CHECKING:
    from kit.memory.notifier.mmu_notifier_types import MmuNotifierSubscriptions
    from kit.memory.physical.pages import PhysicalMemory
    from kit.sim.engine import Engine, Thread

__all__ = ["MMAP_BASE", "MMAP_MIN_ADDR", "Mm"]

MMAP_BASE = 0x7FFF_F7FF_F000  # bytes; areas are placed from here down, as on x86-64 without randomisation
MMAP_MIN_ADDR = 0x10000
HOST = 1  # residency mask of host memory


class Mm:
    """An address space: areas, page table, locks and counters.

    Parameters
    ----------
    memory : PhysicalMemory
    engine : Engine
    costs : Costs
        `kit.memory.costs.make_costs`.
    name : str
    record_moves : bool
        Append every change of place of its pages to the trace's moves.
    """

    def __init__(
        self, memory: PhysicalMemory, engine: Engine, costs: Costs, name: str = "process",
        record_moves: bool = False,
    ) -> None:  # fmt: skip
        self.memory, self.engine, self.costs, self.name, self.record_moves = memory, engine, costs, name, record_moves
        memory.costs = costs
        self.table = CpuTable()
        self.vmas: list[Vma] = []
        self.changes = 0  # areas that came or went
        self.mmap_lock = RwLock()
        self.notifier_subscriptions: MmuNotifierSubscriptions | None = None
        self.mm_users = 1
        self.pinned_vm = 0  # pages
        self.rlimit_memlock = 1 << 62  # bytes
        self.rss = {"anon": 0, "file": 0, "shmem": 0, "swap": 0}  # pages
        self.mmap_base = MMAP_BASE
        self.faults = 0  # page faults served, each of the kernel's own
        self.files: dict[int, object] = {}  # the process's open files that drivers look up, by descriptor

    def mmget_not_zero(self) -> bool:
        """Take a user reference unless the address space is being torn down."""
        if self.mm_users == 0:
            return False
        self.mm_users += 1
        return True

    def count_faults(self, thread: Thread, n: int) -> None:
        """Count and pay `n` faults."""
        self.faults += n
        thread.charge(self.costs.handle_mm_fault * n)

    def find(self, page: int) -> Vma | None:
        """Return the area that holds virtual page `page` (vma_lookup), or None."""
        at = bisect_right(self.vmas, page, key=_first) - 1
        return self.vmas[at] if at >= 0 and page < self.vmas[at].end else None

    def find_vma(self, address: int) -> Vma | None:
        """Return the first area that ends after byte `address`, or None: it may start after it."""
        page = address // PAGE
        at = bisect_right(self.vmas, page, key=_first) - 1
        if at >= 0 and page < self.vmas[at].end:
            return self.vmas[at]
        return self.vmas[at + 1] if at + 1 < len(self.vmas) else None

    def vmas_in(self, first: int, count: int) -> list[Vma]:
        """Return the areas that overlap pages [first, first + count), ascending."""
        at = max(bisect_right(self.vmas, first, key=_first) - 1, 0)
        found = []
        while at < len(self.vmas) and self.vmas[at].first < first + count:
            if self.vmas[at].end > first:
                found.append(self.vmas[at])
            at += 1
        return found

    def before(self, page: int) -> Vma | None:
        """Return the last area that ends at or before `page`."""
        at = bisect_right(self.vmas, page, key=_first) - 1
        while at >= 0 and self.vmas[at].end > page:
            at -= 1
        return self.vmas[at] if at >= 0 else None

    def insert(self, vma: Vma) -> None:
        """Enter an area, with its place in the reverse map."""
        self.changes += 1
        self.vmas.insert(bisect_right(self.vmas, vma.first, key=_first), vma)
        for root in (vma.file, vma.anon):
            if root is not None:
                root.vmas[vma] = None

    def remove(self, vma: Vma) -> None:
        """Take an area out; rmap still finds its entries until `unlink`."""
        self.changes += 1
        self.vmas.remove(vma)

    def unlink(self, vma: Vma) -> None:
        """Take an area out of the reverse map."""
        for root in (vma.file, vma.anon):
            if root is not None:
                root.vmas.pop(vma, None)
        if vma.file is not None:
            vma.file.last_close()

    def anon_vma_prepare(self, vma: Vma) -> AnonFamily:
        """Return the area's anon family, making it with its first anonymous page.

        A neighbour that differs only in access rights lends its own, so that the two can merge later.
        """
        if vma.anon is None:
            near = [self.find(vma.end), self.find(vma.first - 1)]
            lent = [v.anon for v in near if v is not None and v.anon is not None and _reusable(vma, v)]
            vma.anon = lent[0] if lent else AnonFamily(self.memory)
            vma.anon.vmas[vma] = None
        return vma.anon

    def moved(self, thread: Thread, start: float, pages: NDArray[np.integer], src: int, dst: int, cause: str) -> None:
        """Record that pages (ascending) went from residency mask `src` to `dst` between `start` and now."""
        if not self.record_moves or not len(pages):
            return
        pages = np.asarray(pages, dtype=np.int64)
        cuts = np.flatnonzero(np.diff(pages) != 1) + 1
        firsts = np.concatenate([[0], cuts])
        lengths = np.diff(np.concatenate([firsts, [len(pages)]]))
        for first, length in zip(pages[firsts].tolist(), lengths.tolist(), strict=True):
            self.engine.trace.move(start, thread.now, first, length, src, dst, cause)

    def place_of(self, pfn: int) -> int:
        """Return the residency mask of the memory that holds a page."""
        pgmap = self.memory.pgmaps[int(self.memory.pgmap[pfn])]
        return HOST if pgmap is None else pgmap.place


def _first(vma: Vma) -> int:
    return vma.first


def _reusable(vma: Vma, near: Vma) -> bool:
    """anon_vma_compatible: adjacent in memory and file, alike but for access rights, and not shared by a fork."""
    alike = (vma.flags ^ near.flags) & ~VM_ACCESS_FLAGS == 0 and vma.file is near.file and vma.ops is near.ops
    forked = near.anon is not None and any(v.mm is not vma.mm for v in near.anon.vmas)
    return alike and near.pgoff == vma.pgoff + near.first - vma.first and not forked
