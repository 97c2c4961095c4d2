"""Splitting and merging areas (mm/vma.c @ 7.0)."""

from __future__ import annotations

from dataclasses import replace
from errno import EINVAL
from itertools import pairwise
from typing import TYPE_CHECKING

from kit.errors import Errno
from kit.memory.huge.huge_split import split_edges
from kit.memory.types import PAGE, VM_HUGETLB, VM_SPECIAL
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = ["__split_vma", "split_at", "vma_close", "vma_merge"]


@waiting_step
def __split_vma(mm: Mm, thread: Thread, vma: Vma, page: int) -> Wait:
    """Cut an area in two at virtual page `page`; a PMD leaf across the cut is split.

    Returns 0, or -EINVAL: inside a huge page, or the driver does not let its area be cut.
    """
    if page * PAGE % vma.page_size:
        return Errno(EINVAL, "__split_vma", f"{page * PAGE:#x} is inside a page of {vma.page_size} bytes")
    may_split = getattr(vma.ops, "may_split", None)
    if may_split is not None:
        result: int = may_split(vma, page)
        if result:
            return result
    if not vma.flags & VM_HUGETLB:
        yield from split_edges(mm, thread, page, 0)
    upper = replace(vma, first=page, pages=vma.end - page, pgoff=vma.index(page))
    vma.pages = page - vma.first
    mm.insert(upper)
    thread.charge(mm.costs.vma_op)
    return 0


def split_at(mm: Mm, thread: Thread, first: int, end: int) -> Wait:
    """Cut the areas that cross page `first` or page `end`; returns 0 or -EINVAL."""
    for page in (first, end):
        vma = mm.find(page)
        if vma is not None and vma.first < page:
            result = yield from __split_vma(mm, thread, vma, page)
            if result:
                return result
    return 0


def vma_close(vma: Vma, thread: Thread) -> None:
    """Tell an area's driver that it is gone, entries and all (vm_ops->close)."""
    close = getattr(vma.ops, "close", None)
    if close is not None:
        close(vma, thread)


def vma_merge(mm: Mm, thread: Thread, first: int, end: int) -> None:
    """Merge areas in and around pages [first, end) that may be one."""
    around = mm.vmas_in(max(first - 1, 0), end - first + 2)
    for left, right in pairwise(around):
        if _can_merge(left, right):
            right_pages = right.pages
            mm.remove(right)
            _unlink(right)
            right.first, right.pages, right.pgoff = left.first, left.pages + right_pages, left.pgoff
            right.anon = right.anon or left.anon
            mm.remove(left)
            _unlink(left)
            mm.insert(right)
            thread.charge(mm.costs.vma_op)


def _unlink(vma: Vma) -> None:
    for root in (vma.file, vma.anon):
        if root is not None:
            root.vmas.pop(vma, None)


def _can_merge(left: Vma, right: Vma) -> bool:
    """is_mergeable_vma and is_mergeable_anon_vma."""
    if left.end != right.first or left.flags != right.flags or left.flags & VM_SPECIAL or left.ops or right.ops:
        return False
    same = left.file is right.file and left.page_size == right.page_size and left.name == right.name
    families = left.anon is None or right.anon is None or left.anon is right.anon
    return same and families and right.pgoff == left.pgoff + left.pages and not left.flags & VM_HUGETLB
