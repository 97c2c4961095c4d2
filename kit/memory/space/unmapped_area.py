"""Where a new area goes: the highest gap that fits (mm/vma.c vm_unmapped_area, mm/huge_memory.c @ 7.0)."""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

from kit.errors import Errno
from kit.memory.space.mm import MMAP_MIN_ADDR
from kit.memory.types import HPAGE_PMD_SIZE, PAGE

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm

__all__ = ["get_unmapped_area"]


def get_unmapped_area(mm: Mm, pages: int, align: int = PAGE, huge: bool = False) -> int:
    """Return the address (bytes) of a free range of `pages`, searched from the top down, or -ENOMEM.

    Parameters
    ----------
    align : int
        Bytes.
    huge : bool
        Anonymous memory of whole 2 MiB prefers a 2 MiB boundary (thp_get_unmapped_area).
    """
    length = pages * PAGE
    if huge:
        gap = _top_gap(mm, length + HPAGE_PMD_SIZE)
        if gap is not None:
            start = gap - length - HPAGE_PMD_SIZE
            offset = -start % HPAGE_PMD_SIZE
            return start + (offset or HPAGE_PMD_SIZE)
    gap = _top_gap(mm, length, align)
    if gap is None:
        return Errno(ENOMEM, "get_unmapped_area", f"no gap of {pages} pages")
    return (gap - length) // align * align


def _top_gap(mm: Mm, length: int, align: int = PAGE) -> int | None:
    """Return the end (bytes) of the highest gap that holds `length` bytes aligned to `align`."""
    top = mm.mmap_base
    for vma in reversed(mm.vmas):
        if vma.stop < top and (top - length) // align * align >= vma.stop:
            return top
        top = min(top, vma.start)
    return top if (top - length) // align * align >= MMAP_MIN_ADDR else None
