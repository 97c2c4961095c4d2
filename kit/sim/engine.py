"""The engine: SimPy's clock and processes, and threads that charge time as they work.

A `Thread` is one actor (a kernel thread, a CPU core, a worker). Documented functions that cannot
wait run as plain Python and only *charge* their cost to the thread's own clock; the thread falls
back in step with everybody else at its next `Thread.sync`, which is one SimPy event whatever the
number of pages handled. What other actors must not see in between is guarded by a `Lock`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from kit.sim.trace import Trace

__all__ = ["Engine", "Lock", "Thread", "Wait"]

Wait = Generator[simpy.Event, Any, Any]


class Engine:
    """One run's clock (microseconds), trace and seeded jitter.

    Parameters
    ----------
    seed : int
        Seed of the jitter; the same seed gives the same run, byte for byte.
    jitter : float
        Every charged cost is stretched by a factor drawn uniformly from 1 to ``1 + jitter``.
    """

    def __init__(self, seed: int = 0, jitter: float = 0.0) -> None:
        self.env = simpy.Environment()
        self.trace = Trace()
        self.jitter = jitter
        self.rng = np.random.default_rng(seed)

    @property
    def now(self) -> float:
        """Simulated time in microseconds."""
        return float(self.env.now)

    def thread(self, name: str) -> Thread:
        """Return a new actor whose spans carry `name`."""
        return Thread(self, name)

    def start(self, process: Wait) -> simpy.Process:
        """Start a generator as a concurrent process."""
        return self.env.process(process)

    def run(self, until: simpy.Event | None = None) -> Any:
        """Run until `until` has happened, or until nothing is left to do."""
        return self.env.run(until)


class Thread:
    """One actor: a clock of its own (``now``, microseconds), a stack of open spans."""

    __slots__ = ("_actor", "_env", "_trace", "engine", "keys", "name", "now", "spans", "stack")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self._env, self._trace, self.spans = engine.env, engine.trace, engine.trace.spans
        self._actor = engine.trace.actors(name)
        self.now: float = float(engine.env.now)
        self.stack: list[int] = [-1]
        self.keys: dict[str, int] = {}

    def charge(self, microseconds: float) -> None:
        """Spend time on this actor's own clock."""
        if self.engine.jitter:
            microseconds *= 1.0 + self.engine.jitter * float(self.engine.rng.random())
        self.now += microseconds

    def key(self, name: str) -> int:
        """Return this actor's span key of step `name`."""
        found = self.keys[name] = self._trace.steps(name) << 8 | self._actor
        return found

    def enter(self, name: str) -> int:
        """Open a span named `name` under the running one."""
        spans, stack = self.spans, self.stack
        row = len(spans.end)
        spans.end.append(0.0)
        spans.start.append(self.now)
        spans.key.append(self.keys.get(name) or self.key(name))
        spans.parent.append(stack[-1])
        stack.append(row)
        return row

    def leave(self, row: int) -> None:
        """Close the running span."""
        self.stack.pop()
        self.spans.end[row] = self.now

    def note(self, **facts: float | str) -> None:
        """Fill in what the running step has learned about itself (see `Trace.note`)."""
        self._trace.note(self.stack[-1], **facts)

    @property
    def row(self) -> int:
        """Row number of the running span, -1 outside any."""
        return self.stack[-1]

    def sync(self) -> Wait:
        """Let everybody else catch up with this actor's clock."""
        ahead = self.now - self._env.now
        if ahead > 0:
            yield self._env.timeout(ahead)
        self.now = float(self._env.now)

    def wait(self, event: simpy.Event) -> Wait:
        """Wait for `event`; time passes on this actor's clock."""
        yield from self.sync()
        value = yield event
        self.now = float(self._env.now)
        return value


class Lock:
    """A mutex; taking a free one costs no event."""

    __slots__ = ("_waiting", "holder")

    def __init__(self) -> None:
        self.holder: Thread | None = None
        self._waiting: list[simpy.Event] = []

    def acquire(self, thread: Thread) -> Wait:
        """Take the lock for `thread`, in order of arrival."""
        yield from thread.sync()
        while self.holder is not None:
            turn = thread.engine.env.event()
            self._waiting.append(turn)
            yield from thread.wait(turn)
        self.holder = thread

    def release(self, thread: Thread) -> Wait:
        """Give the lock up once everybody has caught up with the holder's clock."""
        if self.holder is not thread:
            raise RuntimeError(f"{thread.name} releases a lock held by {self.holder and self.holder.name}")
        yield from thread.sync()
        self.holder = None
        if self._waiting:
            self._waiting.pop(0).succeed()
