"""The notifiers' sequence protocol: who waits, who retries, what is deferred, who may say no."""

from __future__ import annotations

from errno import EAGAIN, EINVAL, EOVERFLOW
from types import SimpleNamespace

import pytest

from kit.memory.notifier.mmu_interval_notifier import (
    mmu_interval_check_retry,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_insert_locked,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from kit.memory.notifier.mmu_notifier import (
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_invalidate_range_start_nonblock,
    mmu_notifier_register,
    mmu_notifier_release,
    mmu_notifier_unregister,
)
from kit.memory.notifier.mmu_notifier_types import (
    EVENTS,
    MmuIntervalNotifier,
    MmuIntervalNotifierOps,
    MmuNotifier,
    MmuNotifierOps,
    MmuNotifierRange,
)
from kit.sim.engine import Engine
from kit.sim.locks import Lock

M = 1 << 20


class FreeLock:
    """An mmap lock that nobody else wants."""

    def write_acquire(self, thread):
        return ()

    def write_release(self, thread):
        return ()


class World:
    """One mm, one mirror lock, and intervals that log their invalidations."""

    def __init__(self, work=0.0):
        self.engine = Engine()
        costs = SimpleNamespace(notifier_call=0.0)
        self.mm = SimpleNamespace(notifier_subscriptions=None, mm_users=1, mmap_lock=FreeLock(), costs=costs)
        self.lock, self.log, self.work = Lock(), [], work
        self.ops = MmuIntervalNotifierOps(self.invalidate)

    def invalidate(self, sub, thread, range, cur_seq):
        yield from thread.sync()
        if not range.blockable and self.lock.holder is not None:
            return False
        yield from self.lock.acquire(thread)
        mmu_interval_set_seq(sub, cur_seq)
        self.log.append((self.engine.now, sub.user, range.event, cur_seq))
        thread.charge(self.work)
        yield from self.lock.release(thread)
        return True

    def run(self, *processes):
        done = [self.engine.start(p) for p in processes]
        self.engine.run()
        assert all(p.triggered for p in done)
        return [p.value for p in done]

    def call(self, function, subject, *args):
        return self.run(function(subject, self.engine.thread("t"), *args))[0]

    def watch(self, name, start, length):
        sub = MmuIntervalNotifier(name)
        ret = self.call(mmu_interval_notifier_insert, sub, self.mm, start, length, self.ops)
        return sub, ret

    def range(self, start, end, event=EVENTS.UNMAP, **kw):
        return MmuNotifierRange(self.mm, start, end, event, **kw)

    @property
    def subs(self):
        return self.mm.notifier_subscriptions

    def at(self, time, function, subject, *args):
        """A process that starts `function` at `time` and returns (when it returned, what)."""
        thread = self.engine.thread(f"t{time}")
        thread.charge(time)

        def go():
            yield from thread.sync()
            got = function(subject, thread, *args)
            value = got if isinstance(got, int) else (yield from got)
            yield from thread.sync()
            return self.engine.now, value

        return go()

    def change(self, start, end, begin, last, **kw):
        """A process that invalidates a range from time `begin` to `last`."""
        thread = self.engine.thread(f"change {start:#x} {begin}")
        thread.charge(begin)
        range = self.range(start, end, **kw)

        def go():
            ret = yield from mmu_notifier_invalidate_range_start(range, thread)
            thread.charge(last - begin)
            yield from mmu_notifier_invalidate_range_end(range, thread)
            return ret

        return go()


def test_event_order_is_the_documented_one():
    names = "UNMAP CLEAR PROTECTION_VMA PROTECTION_PAGE SOFT_DIRTY RELEASE MIGRATE EXCLUSIVE"
    assert [e.name for e in EVENTS] == names.split() and [int(e) for e in EVENTS] == list(range(8))


def test_nobody_watching_costs_nothing():
    world = World()
    assert world.run(world.change(0, M, 0, 5)) == [0]
    assert world.subs is None and world.log == []


@pytest.mark.parametrize("start,length", [(0, 0), ((1 << 64) - 4096, 8192)])
def test_impossible_ranges_overflow(start, length):
    assert World().watch("a", start, length)[1] == -EOVERFLOW


def test_dead_mm_is_refused():
    world = World()
    world.mm.mm_users = 0
    assert world.watch("a", 0, M)[1] == -EINVAL


def test_idle_subscription_lets_readers_through():
    world = World()
    sub, ret = world.watch("a", 0, M)
    assert ret == 0 and sub.invalidate_seq == 1 and world.subs.invalidate_seq == 2
    assert world.run(world.at(3, mmu_interval_read_begin, sub)) == [(3, 1)]
    assert not mmu_interval_read_retry(sub, 1) and not mmu_interval_check_retry(sub, 1)


def test_sequence_is_odd_while_a_watched_range_is_invalidated():
    world = World()
    sub, _ = world.watch("a", 0, M)
    range, thread = world.range(0, 4096), world.engine.thread("t")
    world.run(mmu_notifier_invalidate_range_start(range, thread))
    assert (world.subs.invalidate_seq, world.subs.active_invalidate_ranges, sub.invalidate_seq) == (3, 1, 3)
    world.run(mmu_notifier_invalidate_range_end(range, thread))
    assert (world.subs.invalidate_seq, world.subs.active_invalidate_ranges, sub.invalidate_seq) == (4, 0, 3)
    assert [e[1:] for e in world.log] == [("a", EVENTS.UNMAP, 3)]


def test_unwatched_range_leaves_the_sequence_even():
    world = World()
    sub, _ = world.watch("a", 0, M)
    range, thread = world.range(M, 2 * M), world.engine.thread("t")
    world.run(mmu_notifier_invalidate_range_start(range, thread))
    assert (world.subs.invalidate_seq, world.subs.active_invalidate_ranges) == (2, 1)
    world.run(mmu_notifier_invalidate_range_end(range, thread))
    assert (world.subs.invalidate_seq, sub.invalidate_seq, world.log) == (2, 1, [])


def test_last_of_overlapping_invalidations_makes_it_even_once():
    world = World()
    world.watch("a", 0, M)
    seen = []

    def look():
        for _ in range(6):
            yield world.engine.env.timeout(2)
            seen.append((world.engine.now, world.subs.invalidate_seq, world.subs.active_invalidate_ranges))

    world.run(world.change(0, M, 1, 5), world.change(0, M, 3, 9), look())
    assert seen == [(2, 3, 1), (4, 3, 2), (6, 3, 1), (8, 3, 1), (10, 4, 0), (12, 4, 0)]


def test_reader_waits_for_a_running_invalidation_and_then_retries():
    world = World()
    sub, _ = world.watch("a", 0, M)
    _, (when, seq) = world.run(world.change(0, M, 1, 9), world.at(4, mmu_interval_read_begin, sub))
    assert when == 9 and seq == 3
    assert not mmu_interval_read_retry(sub, seq)  # nothing since


def test_reader_of_another_interval_neither_waits_nor_retries():
    world = World()
    sub, _ = world.watch("a", 0, M)
    other, _ = world.watch("b", 8 * M, M)
    seq = other.invalidate_seq
    _, (when, got) = world.run(world.change(0, M, 1, 9), world.at(4, mmu_interval_read_begin, other))
    assert (when, got) == (4, seq) and not mmu_interval_read_retry(other, seq)
    assert mmu_interval_read_retry(sub, 1)


def test_collision_inside_a_read_is_noticed():
    world = World()
    sub, _ = world.watch("a", 0, M)
    seq = world.call(mmu_interval_read_begin, sub)
    world.run(world.change(4096, 8192, 1, 2))
    assert mmu_interval_check_retry(sub, seq) and mmu_interval_read_retry(sub, seq)


def test_reader_that_holds_the_lock_makes_the_invalidation_wait():
    """The change of the page table starts only when the mirror has let go."""
    world = World()
    world.watch("a", 0, M)
    holder = world.engine.thread("holder")

    def hold():
        yield from world.lock.acquire(holder)
        holder.charge(10)
        yield from world.lock.release(holder)

    thread = world.engine.thread("t")
    thread.charge(2)
    started = []

    def change():
        yield from mmu_notifier_invalidate_range_start(world.range(0, M), thread)
        started.append(world.engine.now)

    world.run(hold(), change())
    assert started == [10]


def test_several_intervals_are_called_in_order_of_start():
    world = World()
    for name, start in (("c", 2 * M), ("a", 0), ("b", M), ("far", 64 * M)):
        world.watch(name, start, M)
    world.run(world.change(0, 3 * M, 0, 1))
    assert [e[1] for e in world.log] == ["a", "b", "c"]


def test_interval_end_is_inclusive_of_its_last_byte_only():
    world = World()
    world.watch("a", M, M)
    world.run(world.change(0, M, 0, 1), world.change(2 * M, 3 * M, 0, 1))
    assert world.log == []
    world.run(world.change(2 * M - 4096, 2 * M, world.engine.now, world.engine.now + 1))
    assert [e[1] for e in world.log] == ["a"]


def test_insert_during_a_watched_invalidation_is_deferred():
    world = World()
    world.watch("a", 0, M)
    late = MmuIntervalNotifier("late")
    insert = world.at(4, mmu_interval_notifier_insert, late, world.mm, 8 * M, M, world.ops)
    read = world.at(5, mmu_interval_read_begin, late)
    in_tree = []

    def look():
        yield world.engine.env.timeout(6)
        in_tree.append((late.in_tree, late.invalidate_seq, len(world.subs.deferred_list)))

    _, inserted, (when, seq), _ = world.run(world.change(0, M, 1, 9), insert, read, look())
    assert inserted == (4, 0) and in_tree == [(False, 3, 1)]
    assert (when, seq) == (9, 3) and late.in_tree and world.subs.deferred_list == []
    world.run(world.change(8 * M, 9 * M, world.engine.now, world.engine.now + 1))
    assert world.log[-1][1] == "late"


def test_insert_during_an_unwatched_invalidation_makes_the_sequence_odd():
    world = World()
    world.watch("a", 0, M)
    late = MmuIntervalNotifier("late")
    insert = world.at(4, mmu_interval_notifier_insert, late, world.mm, 8 * M, M, world.ops)
    read = world.at(5, mmu_interval_read_begin, late)
    _, inserted, (when, seq) = world.run(world.change(32 * M, 33 * M, 1, 9), insert, read)
    assert inserted == (4, 0) and late.in_tree and (when, seq) == (9, 3)
    assert world.subs.invalidate_seq == 4


def test_remove_waits_for_the_invalidation_and_stays_in_the_tree_till_then():
    world = World()
    sub, _ = world.watch("a", 0, M)
    still = []

    def look():
        yield world.engine.env.timeout(6)
        still.append(sub.in_tree)

    thread = world.engine.thread("r")

    def remove():
        thread.charge(4)
        yield from mmu_interval_notifier_remove(sub, thread)
        return world.engine.now

    _, when, _ = world.run(world.change(0, M, 1, 9), remove(), look())
    assert when == 9 and still == [True] and not sub.in_tree


def test_remove_of_a_deferred_insert_does_not_wait():
    world = World()
    world.watch("a", 0, M)
    late = MmuIntervalNotifier("late")

    thread = world.engine.thread("r")

    def both():
        thread.charge(4)
        yield from mmu_interval_notifier_insert(late, thread, world.mm, 0, M, world.ops)
        yield from mmu_interval_notifier_remove(late, thread)
        return world.engine.now

    _, when = world.run(world.change(0, M, 1, 9), both())
    assert when == 4 and not late.in_tree and world.subs.deferred_list == []


def test_remove_when_idle_is_immediate_and_no_callback_follows():
    world = World()
    sub, _ = world.watch("a", 0, M)
    world.call(mmu_interval_notifier_remove, sub)
    world.run(world.change(0, M, 0, 1))
    assert world.log == [] and len(world.subs.itree) == 0


def test_nonblocking_start_says_eagain_and_has_ended_itself():
    world = World()
    sub, _ = world.watch("a", 0, M)
    holder, thread = world.engine.thread("holder"), world.engine.thread("oom")

    def hold():
        yield from world.lock.acquire(holder)
        holder.charge(10)
        yield from world.lock.release(holder)

    def reap():
        thread.charge(2)
        first = yield from mmu_notifier_invalidate_range_start_nonblock(world.range(0, M), thread)
        state = world.subs.active_invalidate_ranges, world.subs.invalidate_seq
        thread.charge(20)
        again = world.range(0, M)
        second = yield from mmu_notifier_invalidate_range_start_nonblock(again, thread)
        yield from mmu_notifier_invalidate_range_end(again, thread)
        return first, state, second

    _, (first, state, second) = world.run(hold(), reap())
    assert first == -EAGAIN and state == (0, 4) and second == 0
    assert sub.invalidate_seq == 5 and world.subs.invalidate_seq == 6


def test_returning_false_on_a_blockable_range_is_ignored_but_said():
    world = World()

    def refuse(sub, thread, range, cur_seq):
        mmu_interval_set_seq(sub, cur_seq)
        yield from thread.sync()
        return False

    world.ops = MmuIntervalNotifierOps(refuse)
    world.watch("a", 0, M)
    assert world.run(world.change(0, M, 0, 1)) == [0]
    trace = world.engine.trace
    said = [trace.statuses.words[int(s)] for s in trace.spans.column("status")]
    assert said.count("WARN") == 1


def test_owner_and_event_reach_the_callback():
    world, seen = World(), []

    def note(sub, thread, range, cur_seq):
        seen.append((range.event, range.owner))
        mmu_interval_set_seq(sub, cur_seq)
        yield from thread.sync()
        return True

    world.ops = MmuIntervalNotifierOps(note)
    world.watch("a", 0, M)
    world.run(world.change(0, M, 0, 1, event=EVENTS.MIGRATE, owner="gpu"))
    assert seen == [(EVENTS.MIGRATE, "gpu")]


def hlist(world, name, log, answer=0, end=True, start=True):
    def on_start(sub, thread, range):
        log.append(("start", name))
        yield from thread.sync()
        return answer

    def on_end(sub, thread, range):
        log.append(("end", name))
        yield from thread.sync()

    def on_release(sub, thread, mm):
        log.append(("release", name))
        yield from thread.sync()

    ops = MmuNotifierOps(on_start if start else None, on_end if end else None, on_release)
    notifier = MmuNotifier(ops, name)
    world.call(mmu_notifier_register, notifier, world.mm)
    return notifier


def test_whole_mm_notifiers_hear_of_everything():
    world, log = World(), []
    hlist(world, "x", log)
    world.run(world.change(123 * M, 124 * M, 0, 1))
    assert log == [("start", "x"), ("end", "x")]


def test_all_whole_mm_notifiers_are_called_after_one_said_eagain():
    world, log = World(), []
    hlist(world, "fine", log)
    hlist(world, "busy", log, answer=-EAGAIN, end=False)
    ret = world.call(mmu_notifier_invalidate_range_start_nonblock, world.range(0, M))
    assert ret == -EAGAIN and log == [("start", "busy"), ("start", "fine"), ("end", "fine")]


def test_unregister_releases_once():
    world, log = World(), []
    notifier = hlist(world, "x", log)
    world.call(mmu_notifier_unregister, notifier, world.mm)
    world.call(mmu_notifier_unregister, notifier, world.mm)
    world.run(world.change(0, M, 0, 1))
    assert log == [("release", "x")]


def test_release_at_exit_reaches_every_interval_once_and_every_notifier():
    world, log = World(), []
    world.watch("a", 0, M)
    world.watch("b", 1 << 46, M)
    hlist(world, "x", log)
    world.call(mmu_notifier_release, world.mm)
    assert [e[1:3] for e in world.log] == [("a", EVENTS.RELEASE), ("b", EVENTS.RELEASE)]
    assert log == [("release", "x")] and world.subs.invalidate_seq == 4 and world.subs.list == []


def test_insert_locked_prepares_the_mm_itself():
    world = World()
    sub, thread = MmuIntervalNotifier("a"), world.engine.thread("t")
    assert mmu_interval_notifier_insert_locked(sub, thread, world.mm, 0, M, world.ops) == 0
    assert world.subs.has_itree and sub.in_tree


def test_many_intervals_are_found_by_overlap():
    world = World()
    for i in range(300):
        world.watch(i, i * M, M)
    world.run(world.change(100 * M + 5, 103 * M + 1, 0, 1))
    assert [e[1] for e in world.log] == [100, 101, 102, 103]
