"""The structs of MMU notifiers: ranges, subscriptions, and an mm's state (mm/mmu_notifier.c @ 7.0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import simpy

from kit.memory.notifier.interval_tree import IntervalTree
from kit.sim.engine import Thread, Wait

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm

__all__ = [
    "EVENTS", "MmuIntervalNotifier", "MmuIntervalNotifierOps", "MmuNotifier", "MmuNotifierOps", "MmuNotifierRange",
    "MmuNotifierSubscriptions", "subscriptions_of",
]  # fmt: skip


class EVENTS(IntEnum):
    """Why a range is invalidated: enum mmu_notifier_event, in its order, without the MMU_NOTIFY_ prefix."""

    UNMAP = 0
    CLEAR = 1
    PROTECTION_VMA = 2
    PROTECTION_PAGE = 3
    SOFT_DIRTY = 4
    RELEASE = 5
    MIGRATE = 6
    EXCLUSIVE = 7


@dataclass(eq=False, slots=True)
class MmuNotifierRange:
    """One invalidation: bytes from `start` to `end` (exclusive) of `mm`; `owner` is who asked for it, if he said so."""

    mm: Mm
    start: int
    end: int
    event: int
    owner: object = None
    blockable: bool = True


InvalidateFunction = Callable[["MmuIntervalNotifier", Thread, MmuNotifierRange, int], Wait]


@dataclass(frozen=True)
class MmuIntervalNotifierOps:
    """``invalidate(sub, thread, range, cur_seq)``: take the user lock, `mmu_interval_set_seq`, drop the mappings.

    It returns True, or False when the range is not blockable and the lock is taken.
    """

    invalidate: InvalidateFunction


class MmuIntervalNotifier:
    """struct mmu_interval_notifier: a watch on bytes `start` to `last` (inclusive) of `mm`."""

    invalidate_seq: int
    mm: Mm
    ops: MmuIntervalNotifierOps

    def __init__(self, user: Any = None) -> None:
        self.user = user  # what container_of() gives a driver
        self.start = self.last = 0
        self.in_tree = False


@dataclass(frozen=True)
class MmuNotifierOps:
    """Callbacks of a whole-mm notifier; each may be left out.

    ``invalidate_range_start(sub, thread, range)`` returns 0, or -EAGAIN when the range is not blockable;
    ``invalidate_range_end(sub, thread, range)`` and ``release(sub, thread, mm)`` return nothing.
    """

    invalidate_range_start: Callable[[MmuNotifier, Thread, MmuNotifierRange], Wait] | None = None
    invalidate_range_end: Callable[[MmuNotifier, Thread, MmuNotifierRange], Wait] | None = None
    release: Callable[[MmuNotifier, Thread, Mm], Wait] | None = None


class MmuNotifier:
    """struct mmu_notifier: hears of every invalidation of an mm, wherever it is."""

    mm: Mm

    def __init__(self, ops: MmuNotifierOps, user: Any = None) -> None:
        self.ops, self.user = ops, user


class MmuNotifierSubscriptions:
    """What an mm knows of its watchers."""

    def __init__(self, env: simpy.Environment) -> None:
        self.list: list[MmuNotifier] = []
        self.has_itree = False
        self.invalidate_seq = 2
        self.active_invalidate_ranges = 0
        self.itree: IntervalTree[MmuIntervalNotifier] = IntervalTree()
        self.deferred_list: list[MmuIntervalNotifier] = []
        self.wq = simpy.Event(env)

    def mn_itree_is_invalidating(self) -> bool:
        """Whether the sequence is odd: the tree is frozen."""
        return bool(self.invalidate_seq & 1)

    def mn_itree_inv_start_range(self, range: MmuNotifierRange) -> tuple[list[MmuIntervalNotifier], int]:
        """Count one more running invalidation; return the subscriptions it overlaps and the sequence to give them."""
        self.active_invalidate_ranges += 1
        # An odd sequence freezes the tree, so the list stays what an iteration over the tree would find.
        overlapping = self.itree.overlapping(range.start, range.end - 1)
        if overlapping:
            self.invalidate_seq |= 1
        return overlapping, self.invalidate_seq

    def mn_itree_inv_end(self) -> None:
        """End one invalidation; the last one makes the sequence even, does what was deferred, and wakes everybody."""
        self.active_invalidate_ranges -= 1
        if self.active_invalidate_ranges or not self.mn_itree_is_invalidating():
            return
        self.invalidate_seq += 1
        for sub in self.deferred_list:
            (self.remove if sub.in_tree else self.insert)(sub)
        self.deferred_list.clear()
        woken, self.wq = self.wq, simpy.Event(self.wq.env)
        woken.succeed()

    def insert(self, sub: MmuIntervalNotifier) -> None:
        """Put a subscription into the tree."""
        self.itree.insert(sub, sub.start, sub.last)
        sub.in_tree = True

    def remove(self, sub: MmuIntervalNotifier) -> None:
        """Take a subscription out of the tree."""
        self.itree.remove(sub)
        sub.in_tree = False

    def wait_seq_released(self, thread: Thread, seq: int) -> Wait:
        """Wait until the sequence is no longer `seq`."""
        yield from thread.sync()
        while self.invalidate_seq == seq:
            yield from thread.wait(self.wq)


def subscriptions_of(mm: Mm) -> MmuNotifierSubscriptions:
    """Return what an mm knows of its watchers; RuntimeError when it has never had any."""
    subscriptions = mm.notifier_subscriptions
    if subscriptions is None:
        raise RuntimeError("the address space has no notifier subscriptions: insert or register first")
    return subscriptions
