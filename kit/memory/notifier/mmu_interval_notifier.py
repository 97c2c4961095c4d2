"""Interval notifiers: watches of ranges, and how a reader learns of a change meanwhile (mm/mmu_notifier.c @ 7.0).

One sequence number per mm says whether an invalidation is running over an interval that somebody
watches: it is odd while one is, and goes even when the last running invalidation ends. Each
subscription keeps the odd number under which it was last invalidated. A reader that finds both
equal waits; one that finds its own changed since it began has collided and starts again.
"""

from __future__ import annotations

from errno import EINVAL, EOVERFLOW
from typing import TYPE_CHECKING

from kit.errors import Errno
from kit.memory.notifier.interval_tree import ULONG_MAX
from kit.memory.notifier.mmu_notifier import __mmu_notifier_register, mmu_notifier_register
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier, MmuIntervalNotifierOps, subscriptions_of
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = [
    "mmu_interval_check_retry", "mmu_interval_notifier_insert", "mmu_interval_notifier_insert_locked",
    "mmu_interval_notifier_remove", "mmu_interval_read_begin", "mmu_interval_read_retry", "mmu_interval_set_seq",
]  # fmt: skip


def mmu_interval_set_seq(sub: MmuIntervalNotifier, cur_seq: int) -> None:
    """Remember under which sequence `sub` was invalidated; the callback does it under its user lock."""
    sub.invalidate_seq = cur_seq


def mmu_interval_read_retry(sub: MmuIntervalNotifier, seq: int) -> bool:
    """Whether what was read since `seq` is stale; asked under the user lock."""
    return sub.invalidate_seq != seq


def mmu_interval_check_retry(sub: MmuIntervalNotifier, seq: int) -> bool:
    """Whether what was read since `seq` is stale for certain; False is only a hint, as no lock is held."""
    return sub.invalidate_seq != seq


@waiting_step
def mmu_interval_read_begin(sub: MmuIntervalNotifier, thread: Thread) -> Wait:
    """Return the sequence a reader starts from, once no invalidation of `sub` is running."""
    subscriptions = subscriptions_of(sub.mm)
    yield from thread.sync()
    seq = sub.invalidate_seq
    if seq == subscriptions.invalidate_seq:
        thread.note(cause="invalidating")
        yield from subscriptions.wait_seq_released(thread, seq)
    thread.note(value=seq)
    return seq


@waiting_step
def mmu_interval_notifier_insert(
    sub: MmuIntervalNotifier, thread: Thread, mm: Mm, start: int, length: int, ops: MmuIntervalNotifierOps
) -> Wait:
    """Watch `length` bytes of `mm` from `start`; returns 0, -EOVERFLOW for an impossible range, -EINVAL for a dead mm.

    While an invalidation runs nobody knows what it covers, so the new range counts as covered.
    """
    subscriptions = mm.notifier_subscriptions
    if subscriptions is None or not subscriptions.has_itree:
        yield from mmu_notifier_register(None, thread, mm)
    yield from thread.sync()
    return _interval_notifier_insert(sub, mm, start, length, ops)


@step
def mmu_interval_notifier_insert_locked(
    sub: MmuIntervalNotifier, thread: Thread, mm: Mm, start: int, length: int, ops: MmuIntervalNotifierOps
) -> int:
    """`mmu_interval_notifier_insert` for a caller that holds the mmap lock for writing."""
    subscriptions = mm.notifier_subscriptions
    if subscriptions is None or not subscriptions.has_itree:
        __mmu_notifier_register(None, mm, thread)
    return _interval_notifier_insert(sub, mm, start, length, ops)


@waiting_step
def mmu_interval_notifier_remove(sub: MmuIntervalNotifier, thread: Thread) -> Wait:
    """Stop watching; waits for a running invalidation, so the caller may hold no lock that a callback takes."""
    subscriptions = subscriptions_of(sub.mm)
    yield from thread.sync()
    if not subscriptions.mn_itree_is_invalidating():
        subscriptions.remove(sub)
        return
    if not sub.in_tree:  # its own insertion is still deferred
        subscriptions.deferred_list.remove(sub)
        return
    subscriptions.deferred_list.insert(0, sub)
    yield from subscriptions.wait_seq_released(thread, subscriptions.invalidate_seq)


def _interval_notifier_insert(
    sub: MmuIntervalNotifier, mm: Mm, start: int, length: int, ops: MmuIntervalNotifierOps
) -> int:
    name = "mmu_interval_notifier_insert"
    if length <= 0 or start + length - 1 > ULONG_MAX:
        return Errno(EOVERFLOW, name, f"{length} bytes from {start:#x}")
    if mm.mm_users <= 0:
        return Errno(EINVAL, name, "the address space is gone")
    subscriptions = subscriptions_of(mm)
    sub.mm, sub.ops, sub.start, sub.last, sub.in_tree = mm, ops, start, start + length - 1, False
    if not subscriptions.active_invalidate_ranges:
        # Odd and not the current sequence: readers proceed.
        sub.invalidate_seq = subscriptions.invalidate_seq - 1
        subscriptions.insert(sub)
        return 0
    if subscriptions.mn_itree_is_invalidating():
        subscriptions.deferred_list.insert(0, sub)
    else:
        subscriptions.invalidate_seq |= 1
        subscriptions.insert(sub)
    sub.invalidate_seq = subscriptions.invalidate_seq
    return 0
