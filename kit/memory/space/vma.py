"""Areas of an address space, and the roots of the reverse map that connect pages with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.types import PAGE, VM_HUGETLB, VM_SHARED, VM_SPECIAL, VM_WRITE, VmOperations

if TYPE_CHECKING:
    from kit.memory.files.file import File
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm

__all__ = ["AnonFamily", "RmapRoot", "Vma"]


class RmapRoot:
    """What `mapping` of a page names: an anon family or a file, and the areas that may map its pages.

    Attributes
    ----------
    id : int
    vmas : dict
        The areas, in the order in which they came (values unused).
    """

    anon = False

    def __init__(self, memory: PhysicalMemory) -> None:
        self.vmas: dict[Vma, None] = {}
        self.id = memory.register(self)

    def write_back(self, pfns: NDArray[np.integer]) -> None:
        """Write pages of a file to disk; anonymous memory has none."""

    def evict(self, pfns: NDArray[np.integer]) -> None:
        """Forget pages that reclaim takes from a file's cache; anonymous memory has no cache but swap's."""


class AnonFamily(RmapRoot):
    """An anon_vma root: the areas of a parent and its forked children that may share anonymous pages."""

    anon = True


@dataclass(eq=False)
class Vma:
    """One area: pages [first, first + pages).

    Attributes
    ----------
    first, pages : int
        Virtual page number and length in pages.
    flags : int
        VM_* bits.
    pgoff : int
        Offset in pages into the file; of anonymous memory, the page number where it was first mapped.
    file : File or None
        Also of shared anonymous memory (a shmem file).
    anon : AnonFamily or None
        Where anonymous pages of this area are registered, once it has had one.
    ops : VmOperations or None
        A driver's operations.
    page_size : int
        Bytes; 4096 but for hugetlb areas.
    resv : set of int
        Indices of huge pages for which a hugetlb area holds a reservation; areas split from one share it.
    """

    mm: Mm
    first: int
    pages: int
    flags: int
    pgoff: int
    file: File | None = None
    anon: AnonFamily | None = None
    ops: VmOperations | None = None
    name: str = ""
    page_size: int = PAGE
    resv: set[int] = field(default_factory=set)  # huge page indices of a hugetlb area that a free page is promised to

    @property
    def end(self) -> int:
        """First page past the area."""
        return self.first + self.pages

    @property
    def start(self) -> int:
        """First byte (vm_start)."""
        return self.first * PAGE

    @property
    def stop(self) -> int:
        """First byte past the area (vm_end)."""
        return (self.first + self.pages) * PAGE

    @property
    def is_anonymous(self) -> bool:
        """vma_is_anonymous: no file and no driver behind it."""
        return self.file is None and self.ops is None and not self.flags & (VM_HUGETLB | VM_SPECIAL)

    @property
    def is_cow(self) -> bool:
        """is_cow_mapping: private and could become writable; read-only areas are counted when VM_WRITE may come."""
        return not self.flags & VM_SHARED

    @property
    def writable(self) -> bool:
        """VM_WRITE is set."""
        return bool(self.flags & VM_WRITE)

    def index(self, page: int) -> int:
        """linear_page_index: the index in the mapping of virtual page `page`."""
        return page - self.first + self.pgoff

    def __repr__(self) -> str:
        return f"<Vma {self.start:#x}-{self.stop:#x} flags {self.flags:#x} {self.name}>"
