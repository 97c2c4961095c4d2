"""The trace's columns: notes, compaction, failures, words."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kit.sim.engine import Engine, Thread, Wait
from kit.sim.log import SHIFT
from kit.sim.trace import SPAN_COLUMNS, Trace, step, waiting_step

BLANK = {"va": -1, "pages": 0, "bytes": 0, "cause": "", "status": "ok", "value": 0}
FACTS = st.fixed_dictionaries(
    {},
    optional={
        "va": st.integers(0, 1 << 52), "pages": st.integers(1, 512), "bytes": st.integers(1, 1 << 40),
        "cause": st.sampled_from(["user", "prefetch"]), "status": st.sampled_from(["bad", "worse"]), "value": st.integers(1, 9),
    },
)  # fmt: skip


@given(st.lists(st.tuples(FACTS, st.lists(FACTS, max_size=3)), max_size=20))
def test_a_span_says_what_was_said_last_about_it(rows: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
    engine, plain = Engine(), []
    trace, thread = engine.trace, engine.thread("t")
    for number, (facts, later) in enumerate(rows):
        row = trace.span("tool", "gpu", number, number + 1, parent=number - 1, **facts)
        plain.append({**BLANK, **facts})
        for more in later:
            thread.at = row << SHIFT
            thread.note(**more)
            plain[-1].update(more)
    found = trace.spans.array()
    assert found.shape == (len(rows), len(SPAN_COLUMNS))
    words = {"cause": trace.causes, "status": trace.statuses}
    for number, facts in enumerate(plain):
        read = dict(zip(SPAN_COLUMNS, found[number].tolist(), strict=True))
        assert (read["start"], read["end"], read["parent"]) == (number, number + 1, number - 1)
        for name, fact in facts.items():
            assert (words[name].words[int(read[name])] if name in words else read[name]) == fact
    for name in SPAN_COLUMNS:
        assert trace.spans.column(name).tolist() == found[:, SPAN_COLUMNS.index(name)].tolist()


class Driver:
    @step
    def fails(self, thread: Thread) -> None:
        thread.charge(2.0)
        raise ValueError("no")

    @waiting_step
    def waits(self, thread: Thread) -> Wait:
        thread.charge(1.0)
        yield from thread.sync()
        self.fails(thread)

    @step
    def says(self, thread: Thread) -> None:
        thread.note(va=4096)
        self.returns(thread, double=1)
        thread.note(pages=3, status="bad")

    @step
    def returns(self, thread: Thread, *, double: int) -> int:
        return 2 * double


def test_a_step_that_fails_is_closed_and_so_are_its_callers() -> None:
    engine = Engine()
    thread = engine.thread("t")
    with pytest.raises(ValueError, match="no"):
        engine.run(engine.start(Driver().waits(thread)))
    assert engine.trace.spans.column("end").tolist() == [3.0, 3.0]
    assert thread.row == -1
    assert Driver().returns(thread, double=4) == 8
    assert engine.trace.spans.column("parent").tolist() == [-1, 0, -1]


def test_a_running_step_notes_about_itself_and_not_about_what_it_called() -> None:
    engine = Engine()
    Driver().says(engine.thread("t"))
    spans = engine.trace.spans
    assert [spans.column(name).tolist() for name in ("va", "pages", "status")] == [[4096, -1], [3, 0], [1, 0]]


def test_actors_and_steps_are_words() -> None:
    engine = Engine()
    for name in ("cpu", "UVM GPU0 BH", "cpu"):
        Driver().returns(engine.thread(name), double=1)
    actors = [engine.trace.actors.words[int(a)] for a in engine.trace.spans.column("actor")]
    assert actors == ["cpu", "UVM GPU0 BH", "cpu"]


def test_a_page_in_flight_is_nowhere_and_a_window_cuts_runs() -> None:
    trace = Trace()
    trace.move(0.0, 0.0, 100, 8, 0, 1, "populate")
    trace.move(10.0, 20.0, 104, 8, 1, 2, "coherence")
    assert trace.residency_at(5.0, 100, 12).tolist() == [1] * 8 + [0] * 4
    assert trace.residency_at(15.0, 102, 4).tolist() == [1, 1, -1, -1]
    assert trace.residency_at(20.0, 102, 4).tolist() == [1, 1, 2, 2]
    assert trace.residency_at(-1.0, 100, 3).tolist() == [0, 0, 0]
    assert trace.moves.column("pages").tolist() == [8, 8]


def test_who_is_interrupted_while_copies_are_laid_out_reads_them_all_later(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace()
    trace.move(0.0, 1.0, 7, 1, 0, 1)
    trace.copied("copy", "engine", -1, 1, 1, 2, lambda: [(1.0, 2.0, 7, 1, 0)])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "insert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace.moves.array()
    monkeypatch.undo()
    assert trace.moves.array().tolist() == [[0.0, 1.0, 7, 1, 0, 1, 0], [1.0, 2.0, 7, 1, 1, 2, 0]]
    assert trace.spans.array()[:, :3].tolist() == [[1.0, 2.0, trace.steps("copy")]]
    assert trace.spans.column("va").tolist() == [7 * 4096]
