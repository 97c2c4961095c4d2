"""MMU notifiers: how a change of the CPU's page table reaches everybody who mirrors it (mm/mmu_notifier.c @ 7.0).

One sequence number per mm says whether an invalidation is running over an interval that somebody
watches: it is odd while one is, and goes even when the last running invalidation ends. Each
subscription keeps the odd number under which it was last invalidated. A reader that finds both
equal waits; one that finds its own changed since it began has collided and starts again.

The subscriptions' spinlock is not simulated: what Python does between two yields nobody can see half done.
"""

from __future__ import annotations

from errno import EAGAIN, EINVAL, EOVERFLOW
from typing import TYPE_CHECKING

from kit.errors import Errno
from kit.memory.notifier.interval_tree import ULONG_MAX
from kit.memory.notifier.mmu_notifier_types import (
    EVENTS,
    MmuIntervalNotifier,
    MmuIntervalNotifierOps,
    MmuNotifier,
    MmuNotifierOps,
    MmuNotifierRange,
    MmuNotifierSubscriptions,
)
from kit.sim.engine import Lock, Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm

__all__ = [
    "EVENTS", "MmuIntervalNotifier", "MmuIntervalNotifierOps", "MmuNotifier", "MmuNotifierOps", "MmuNotifierRange",
    "MmuNotifierSubscriptions", "mmu_interval_check_retry", "mmu_interval_notifier_insert",
    "mmu_interval_notifier_insert_locked", "mmu_interval_notifier_remove", "mmu_interval_read_begin",
    "mmu_interval_read_retry", "mmu_interval_set_seq", "mmu_notifier_invalidate_range_end",
    "mmu_notifier_invalidate_range_start", "mmu_notifier_invalidate_range_start_nonblock", "mmu_notifier_lock",
    "mmu_notifier_range_blockable", "mmu_notifier_register", "mmu_notifier_release", "mmu_notifier_unregister",
]  # fmt: skip


def mmu_notifier_range_blockable(range: MmuNotifierRange) -> bool:
    """Whether callbacks may sleep."""
    return range.blockable


def mmu_notifier_lock(range: MmuNotifierRange, thread: Thread, lock: Lock) -> Wait:
    """Take a driver's user lock if callbacks may sleep or it is free; return whether it was taken."""
    yield from thread.sync()
    if not range.blockable and lock.holder is not None:
        return False
    yield from lock.acquire(thread)
    return True


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
    subscriptions = _subscriptions(sub.mm)
    yield from thread.sync()
    seq = sub.invalidate_seq
    if seq == subscriptions.invalidate_seq:
        thread.note(cause="invalidating")
        yield from subscriptions.wait_seq_released(thread, seq)
    thread.note(value=seq)
    return seq


@waiting_step
def mmu_notifier_invalidate_range_start(range: MmuNotifierRange, thread: Thread) -> Wait:
    """Tell everybody that `range` is about to change; return 0 once nobody's mirror holds it.

    A no-op for an mm that nobody watches. With ``range.blockable`` False it may return -EAGAIN;
    the change must then not be made, and the end not be called.
    """
    subscriptions = range.mm.notifier_subscriptions
    if subscriptions is None:
        return 0
    thread.note(va=range.start, pages=range.end - range.start >> 12, cause=EVENTS(range.event).name)
    yield from thread.sync()
    if subscriptions.has_itree:
        ret = yield from mn_itree_invalidate(subscriptions, thread, range)
        if ret:
            thread.note(status="-EAGAIN")
            return ret
    if subscriptions.list:
        return (yield from mn_hlist_invalidate_range_start(subscriptions, thread, range))
    return 0


def mmu_notifier_invalidate_range_start_nonblock(range: MmuNotifierRange, thread: Thread) -> Wait:
    """`mmu_notifier_invalidate_range_start` that never sleeps: 0, or -EAGAIN when somebody would have to."""
    range.blockable = False
    return (yield from mmu_notifier_invalidate_range_start(range, thread))


@waiting_step
def mmu_notifier_invalidate_range_end(range: MmuNotifierRange, thread: Thread) -> Wait:
    """Tell everybody that the change of `range` is done."""
    subscriptions = range.mm.notifier_subscriptions
    if subscriptions is None:
        return
    thread.note(va=range.start, pages=range.end - range.start >> 12, cause=EVENTS(range.event).name)
    yield from thread.sync()
    if subscriptions.has_itree:
        subscriptions.mn_itree_inv_end()
        thread.note(value=subscriptions.invalidate_seq)
    for notifier in list(subscriptions.list):
        if notifier.ops.invalidate_range_end:
            yield from notifier.ops.invalidate_range_end(notifier, thread, range)


def mn_itree_invalidate(subscriptions: MmuNotifierSubscriptions, thread: Thread, range: MmuNotifierRange) -> Wait:
    """Call every overlapping interval; the first that would block ends the invalidation with -EAGAIN."""
    overlapping, cur_seq = subscriptions.mn_itree_inv_start_range(range)
    thread.note(value=cur_seq)
    for sub in overlapping:
        thread.charge(range.mm.costs.notifier_call)
        if (yield from sub.ops.invalidate(sub, thread, range, cur_seq)):
            continue
        if range.blockable:  # a bug of the callback: said, and ignored
            thread.note(status="WARN")
            continue
        subscriptions.mn_itree_inv_end()
        return Errno(EAGAIN, "mmu_notifier_invalidate_range_start", "an interval notifier would have to sleep")
    return 0


def mn_hlist_invalidate_range_start(
    subscriptions: MmuNotifierSubscriptions, thread: Thread, range: MmuNotifierRange
) -> Wait:
    """Call every whole-mm notifier, also after one has failed; those that have an end are then given it."""
    ret = 0
    for notifier in list(subscriptions.list):
        if notifier.ops.invalidate_range_start:
            thread.charge(range.mm.costs.notifier_call)
            ret = (yield from notifier.ops.invalidate_range_start(notifier, thread, range)) or ret
    if ret:
        thread.note(status="WARN" if range.blockable else "-EAGAIN")
        for notifier in list(subscriptions.list):
            if notifier.ops.invalidate_range_end:
                yield from notifier.ops.invalidate_range_end(notifier, thread, range)
    return ret


@waiting_step
def mmu_notifier_release(mm: Mm, thread: Thread) -> Wait:
    """Teardown of an mm: every interval is invalidated once over everything, every other notifier released."""
    subscriptions = mm.notifier_subscriptions
    if subscriptions is None:
        return
    yield from thread.sync()
    if subscriptions.has_itree:
        range = MmuNotifierRange(mm, 0, ULONG_MAX, EVENTS.RELEASE)
        overlapping, cur_seq = subscriptions.mn_itree_inv_start_range(range)
        for sub in overlapping:
            thread.charge(mm.costs.notifier_call)
            yield from sub.ops.invalidate(sub, thread, range, cur_seq)
        yield from thread.sync()
        subscriptions.mn_itree_inv_end()
    released, subscriptions.list = subscriptions.list, []
    for notifier in released:
        if notifier.ops.release:
            yield from notifier.ops.release(notifier, thread, mm)


@waiting_step
def mmu_notifier_register(subscription: MmuNotifier | None, thread: Thread, mm: Mm) -> Wait:
    """Register a whole-mm notifier under the mmap lock; None only prepares the mm for interval notifiers."""
    yield from mm.mmap_lock.write_acquire(thread)
    _register(subscription, mm, thread)
    yield from mm.mmap_lock.write_release(thread)
    return 0


@waiting_step
def mmu_notifier_unregister(subscription: MmuNotifier, thread: Thread, mm: Mm) -> Wait:
    """Release and forget a whole-mm notifier, unless the mm's teardown has already done so."""
    subscriptions = _subscriptions(mm)
    if subscription in subscriptions.list:
        if subscription.ops.release:
            yield from subscription.ops.release(subscription, thread, mm)
        subscriptions.list.remove(subscription)


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
        _register(None, mm, thread)
    return _interval_notifier_insert(sub, mm, start, length, ops)


@waiting_step
def mmu_interval_notifier_remove(sub: MmuIntervalNotifier, thread: Thread) -> Wait:
    """Stop watching; waits for a running invalidation, so the caller may hold no lock that a callback takes."""
    subscriptions = _subscriptions(sub.mm)
    yield from thread.sync()
    if not subscriptions.mn_itree_is_invalidating():
        subscriptions.remove(sub)
        return
    if not sub.in_tree:  # its own insertion is still deferred
        subscriptions.deferred_list.remove(sub)
        return
    subscriptions.deferred_list.insert(0, sub)
    yield from subscriptions.wait_seq_released(thread, subscriptions.invalidate_seq)


def _register(subscription: MmuNotifier | None, mm: Mm, thread: Thread) -> None:
    if mm.notifier_subscriptions is None:
        mm.notifier_subscriptions = MmuNotifierSubscriptions(thread.engine.env)
    if subscription is None:
        mm.notifier_subscriptions.has_itree = True
    else:
        subscription.mm = mm
        mm.notifier_subscriptions.list.insert(0, subscription)


def _interval_notifier_insert(
    sub: MmuIntervalNotifier, mm: Mm, start: int, length: int, ops: MmuIntervalNotifierOps
) -> int:
    name = "mmu_interval_notifier_insert"
    if length <= 0 or start + length - 1 > ULONG_MAX:
        return Errno(EOVERFLOW, name, f"{length} bytes from {start:#x}")
    if mm.mm_users <= 0:
        return Errno(EINVAL, name, "the address space is gone")
    subscriptions = _subscriptions(mm)
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


def _subscriptions(mm: Mm) -> MmuNotifierSubscriptions:
    subscriptions = mm.notifier_subscriptions
    if subscriptions is None:
        raise RuntimeError("the address space has no notifier subscriptions: insert or register first")
    return subscriptions
