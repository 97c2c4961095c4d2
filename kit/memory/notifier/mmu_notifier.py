"""MMU notifiers: how a change of the CPU's page table reaches everybody who mirrors it (mm/mmu_notifier.c @ 7.0).

The subscriptions' spinlock is not simulated: what Python does between two yields nobody can see half done.
"""

from __future__ import annotations

from errno import EAGAIN
from typing import TYPE_CHECKING

from kit.errors import Errno
from kit.memory.notifier.interval_tree import ULONG_MAX
from kit.memory.notifier.mmu_notifier_types import (
    EVENTS,
    MmuNotifier,
    MmuNotifierRange,
    MmuNotifierSubscriptions,
    subscriptions_of,
)
from kit.sim.engine import Thread, Wait
from kit.sim.locks import Lock
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm

__all__ = [
    "__mmu_notifier_register", "mmu_notifier_invalidate_range_end", "mmu_notifier_invalidate_range_start",
    "mmu_notifier_invalidate_range_start_nonblock", "mmu_notifier_lock", "mmu_notifier_range_blockable",
    "mmu_notifier_register", "mmu_notifier_release", "mmu_notifier_unregister",
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


def __mmu_notifier_register(subscription: MmuNotifier | None, mm: Mm, thread: Thread) -> None:
    """`mmu_notifier_register` for a caller that holds the mmap lock for writing."""
    if mm.notifier_subscriptions is None:
        mm.notifier_subscriptions = MmuNotifierSubscriptions(thread.engine.env)
    if subscription is None:
        mm.notifier_subscriptions.has_itree = True
    else:
        subscription.mm = mm
        mm.notifier_subscriptions.list.insert(0, subscription)


@waiting_step
def mmu_notifier_register(subscription: MmuNotifier | None, thread: Thread, mm: Mm) -> Wait:
    """Register a whole-mm notifier under the mmap lock; None only prepares the mm for interval notifiers."""
    yield from mm.mmap_lock.write_acquire(thread)
    __mmu_notifier_register(subscription, mm, thread)
    yield from mm.mmap_lock.write_release(thread)
    return 0


@waiting_step
def mmu_notifier_unregister(subscription: MmuNotifier, thread: Thread, mm: Mm) -> Wait:
    """Release and forget a whole-mm notifier, unless the mm's teardown has already done so."""
    subscriptions = subscriptions_of(mm)
    if subscription in subscriptions.list:
        if subscription.ops.release:
            yield from subscription.ops.release(subscription, thread, mm)
        subscriptions.list.remove(subscription)
