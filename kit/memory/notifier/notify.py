"""Telling whoever mirrors an address space that a range of it is about to change, and that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.notifier.mmu_notifier import mmu_notifier_invalidate_range_end, mmu_notifier_invalidate_range_start
from kit.memory.notifier.mmu_notifier_types import EVENTS, MmuNotifierRange
from kit.memory.types import PAGE

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = ["invalidate_end", "invalidate_start", "runs"]


def runs(pages: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, count) of each contiguous run of ascending page numbers."""
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [len(pages)]]))
    return list(zip(pages[starts].tolist(), lengths.tolist(), strict=True))


def invalidate_start(mm: Mm, thread: Thread, first: int, count: int, event: EVENTS, owner: object = None) -> Wait:
    """Start an invalidation of pages [first, first + count); return its range, None when nobody watches."""
    if mm.notifier_subscriptions is None:
        return None
    told = MmuNotifierRange(mm, first * PAGE, (first + count) * PAGE, event, owner)
    yield from mmu_notifier_invalidate_range_start(told, thread)
    return told


def invalidate_end(told: MmuNotifierRange | None, thread: Thread) -> Wait:
    """End what `invalidate_start` returned."""
    if told is not None:
        yield from mmu_notifier_invalidate_range_end(told, thread)
