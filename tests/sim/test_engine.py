"""Locks and clocks when many actors want the same thing at once."""

from __future__ import annotations

import gc
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kit.sim.engine import Engine, Thread, Wait
from kit.sim.locks import Lock


def visitor(
    engine: Engine, lock: Lock, name: str, arrive: float, holds: list[float], log: list[tuple[str, float, float]]
) -> Wait:
    """Take the lock as often as `holds` says, without a pause in between."""
    thread = engine.thread(name)
    thread.charge(arrive)
    for hold in holds:
        yield from lock.acquire(thread)
        start = engine.now
        thread.charge(hold)
        yield from lock.release(thread)
        log.append((name, start, engine.now))


def test_who_waits_comes_before_who_takes_it_again_at_once() -> None:
    engine, lock, log = Engine(), Lock(), []
    engine.start(visitor(engine, lock, "a", 0.0, [10.0, 10.0], log))
    engine.start(visitor(engine, lock, "b", 5.0, [10.0], log))
    engine.run()
    assert [name for name, _, _ in log] == ["a", "b", "a"]
    assert [start for _, start, _ in log] == [0.0, 10.0, 20.0]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 5), min_size=1, max_size=3)), min_size=1, max_size=8)
)
def test_a_lock_is_held_by_one_at_a_time_and_nobody_starves(visitors: list[tuple[int, list[int]]]) -> None:
    engine, lock, log = Engine(), Lock(), []
    for number, (arrive, holds) in enumerate(visitors):
        engine.start(visitor(engine, lock, str(number), float(arrive), [float(h) for h in holds], log))
    engine.run()
    assert len(log) == sum(len(holds) for _, holds in visitors)
    ordered = sorted(log, key=lambda row: (row[1], row[2]))
    assert all(end <= start for (_, _, end), (_, start, _) in pairwise(ordered))
    assert lock.holder is None and not lock._waiting


def test_a_free_lock_costs_no_event() -> None:
    engine, lock = Engine(), Lock()
    thread = engine.thread("t")
    assert list(lock.acquire(thread)) == []
    assert lock.holder is thread
    assert list(lock.release(thread)) == []


def test_charged_time_is_seen_by_others_only_after_a_sync() -> None:
    engine, seen = Engine(), []

    def worker(thread: Thread) -> Wait:
        thread.charge(7.0)
        seen.append((engine.now, thread.now))
        yield from thread.sync()
        seen.append((engine.now, thread.now))

    engine.run(engine.start(worker(engine.thread("t"))))
    assert seen == [(0.0, 7.0), (7.0, 7.0)]


def test_waiting_passes_time_and_returns_what_the_event_carries() -> None:
    engine = Engine()

    def worker(thread: Thread) -> Wait:
        thread.charge(3.0)
        value = yield from thread.wait(engine.env.timeout(10.0, value="done"))
        return value, thread.now

    assert engine.run(engine.start(worker(engine.thread("t")))) == ("done", 10.0)


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_runs_of_many_actors_repeat_themselves(jitter: float) -> None:
    def once(seed: int) -> list[tuple[str, float, float]]:
        engine, lock, log = Engine(seed, jitter), Lock(), []
        for number in range(6):
            engine.start(visitor(engine, lock, str(number), 1.0, [2.0, 3.0], log))
        engine.run()
        return log

    assert once(1) == once(1)
    assert (once(1) == once(2)) == (jitter == 0.0)


def test_garbage_waits_for_the_end_of_a_run_whatever_the_end_is() -> None:
    engine, seen = Engine(), []

    def fails() -> Wait:
        seen.append(gc.isenabled())
        yield engine.env.timeout(1.0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        engine.run(engine.start(fails()))
    assert seen == [False] and gc.isenabled()
