"""Threads, locks and the two tables they fill."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.sim.engine import Engine
from kit.sim.locks import Lock
from kit.sim.trace import SPAN_COLUMNS, Trace, step, waiting_step


class Worker:
    """A made-up driver of two functions."""

    @step
    def inner(self, thread, cost):
        thread.note(va=4096, pages=2, status="done")
        thread.charge(cost)

    @waiting_step
    def outer(self, thread, cost):
        self.inner(thread, cost)
        yield from thread.sync()
        self.inner(thread, cost)


def test_steps_nest_and_carry_the_clock() -> None:
    engine = Engine()
    thread = engine.thread("t")
    engine.run(engine.start(Worker().outer(thread, 5.0)))
    rows = engine.trace.spans.array()
    column = {name: at for at, name in enumerate(SPAN_COLUMNS)}
    assert [engine.trace.steps.words[int(s)] for s in rows[:, column["step"]]] == ["outer", "inner", "inner"]
    assert rows[:, column["parent"]].tolist() == [-1, 0, 0]
    assert rows[:, column["start"]].tolist() == [0, 0, 5] and rows[:, column["end"]].tolist() == [10, 5, 10]
    assert rows[:, column["va"]].tolist() == [-1, 4096, 4096] and rows[:, column["pages"]].tolist() == [0, 2, 2]
    assert engine.trace.statuses.words[int(rows[1, column["status"]])] == "done"


def test_a_lock_serves_in_order_of_arrival_and_excludes() -> None:
    engine, lock, log = Engine(), Lock(), []

    def holder(name: str, arrive: float, hold: float):
        thread = engine.thread(name)
        thread.charge(arrive)
        yield from lock.acquire(thread)
        log.append((name, engine.now))
        thread.charge(hold)
        yield from lock.release(thread)

    for name, arrive in (("a", 0.0), ("b", 2.0), ("c", 1.0)):
        engine.start(holder(name, arrive, 10.0))
    engine.run()
    assert log == [("a", 0.0), ("c", 10.0), ("b", 20.0)]
    assert lock.holder is None


def test_only_the_holder_may_release() -> None:
    engine, lock = Engine(), Lock()
    with pytest.raises(RuntimeError, match="t releases a lock"):
        engine.run(engine.start(lock.release(engine.thread("t"))))


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_a_seed_repeats_itself(jitter: float) -> None:
    def total(seed: int) -> float:
        thread = Engine(seed, jitter).thread("t")
        for _ in range(50):
            thread.charge(1.0)
        return thread.now

    assert total(3) == total(3)
    assert (total(3) == total(4)) == (jitter == 0.0)
    assert 50.0 <= total(3) <= 75.0


MOVES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3)), max_size=25)


@given(MOVES, st.floats(0, 120))
def test_where_pages_are_agrees_with_a_replay_page_by_page(moves: list[tuple[int, int, int, int]], when: float) -> None:
    trace, clock = Trace(), 0.0
    for first, count, wire, place in moves:
        trace.move(clock, clock + wire, first, count, 0, place)
        clock += wire + 1
    where = dict.fromkeys(range(64), 0)
    clock = 0.0
    for first, count, wire, place in moves:
        for page in range(first, first + count):
            if clock <= when:
                where[page] = place if clock + wire <= when else -1
        clock += wire + 1
    assert trace.residency_at(when, 0, 64).tolist() == [where[page] for page in range(64)]


def test_columns_are_numbers_of_the_documented_names() -> None:
    trace = Trace()
    trace.span("copy", "engine", 1.0, 3.0, va=8192, bytes=4096, cause="user", value=7)
    assert trace.spans.column("bytes").tolist() == [4096] and trace.spans.column("value").tolist() == [7]
    assert trace.causes.words[int(trace.spans.column("cause")[0])] == "user"
    assert np.array_equal(trace.moves.array(), np.zeros((0, 7)))
