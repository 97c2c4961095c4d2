"""What the recording decorators leave as it was: signatures, results, failures, waits."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

from kit.sim.engine import Engine, Thread, Wait
from kit.sim.trace import step, waiting_step

Given = tuple[tuple[Any, ...], dict[str, Any]]


def plain(at: int, thread: Thread, name: str, _now: float = 1.0, *rest: int, function: str = "f", **more: int) -> Any:
    """Parameters of every kind, with names that a recorder could want for itself."""
    return at, name, _now, rest, function, more


def waits(at: int, thread: Thread, name: str, _now: float = 1.0, *rest: int, function: str = "f", **more: int) -> Wait:
    """The same, and it waits."""
    thread.charge(1.0)
    yield from thread.sync()
    return at, name, _now, rest, function, more


CALLS: list[Given] = [
    (("x",), {}), (("x", 2.0), {}), ((), {"name": "x"}), (("x", 2.0, 3, 4), {"function": "g"}),
    (("x",), {"more": 1, "_now": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize("given", CALLS)
def test_arguments_arrive_as_they_were_given(given: Given) -> None:
    thread, (args, kwargs) = Engine().thread("t"), given
    assert step(plain)(7, thread, *args, **kwargs) == plain(7, thread, *args, **kwargs)


@pytest.mark.parametrize("given", CALLS)
def test_what_waits_returns_its_result(given: Given) -> None:
    engine, (args, kwargs) = Engine(), given
    thread = engine.thread("t")
    found = engine.run(engine.start(waiting_step(waits)(7, thread, *args, **kwargs)))
    assert found == plain(7, thread, *args, **kwargs) and engine.now == 1.0


@pytest.mark.parametrize(("decorate", "function"), [(step, plain), (waiting_step, waits)])
def test_a_step_looks_like_its_function(decorate: Callable[[Any], Any], function: Any) -> None:
    made = decorate(function)
    assert made.__name__ == function.__name__ and made.__doc__ == function.__doc__
    assert signature(made) == signature(function)


def test_a_missing_argument_is_told_by_the_functions_name() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        step(plain)(7, Engine().thread("t"))


def test_a_step_that_waits_is_open_until_it_ends() -> None:
    engine = Engine()
    thread = engine.thread("t")
    work = waiting_step(waits)(7, thread, "x")
    assert thread.row == -1 and not len(engine.trace.spans)  # nothing runs before it is driven
    engine.start(_nobody_leaps_over(engine))
    engine.run(engine.start(work))
    assert engine.trace.spans.column("end").tolist() == [1.0]
    assert thread.row == -1


def _nobody_leaps_over(engine: Engine) -> Wait:
    yield engine.env.timeout(0.5)
