"""The engine: SimPy's clock and processes, and threads that charge time as they work.

A `Thread` is one actor (a kernel thread, a CPU core, a worker). Documented functions that cannot
wait run as plain Python and only *charge* their cost to the thread's own clock; the thread falls
back in step with everybody else at its next `Thread.sync`, which is at most one SimPy event whatever
the number of pages handled, and none when nobody else has anything to do before that time. What
other actors must not see in between is guarded by a lock (`kit.sim.locks`).

What may wait is used with ``yield from``, and is an empty tuple when it turns out not to wait.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable
from heapq import heappush
from typing import Any, Final

import numpy as np
import simpy.core
from simpy.events import NORMAL, Event, Process, Timeout

from kit.sim.columns import Keys
from kit.sim.log import SHIFT
from kit.sim.trace import Trace

__all__ = ["NO_WAIT", "Clock", "Engine", "Thread", "Wait"]

Wait = Generator[Event, Any, Any]
NO_WAIT: Final[tuple[Event, ...]] = ()


class Clock(simpy.core.Environment):
    """SimPy's environment, which can also move on without an event when nothing is due in between."""

    def leap(self, delay: float) -> bool:
        """Let `delay` pass if nothing at all happens in that time; return whether it did.

        It is what waiting for a timeout comes to when that timeout is the next event anyway.
        """
        time = self._now + delay
        if self._due_by(time):
            return False
        self._now = time
        return True

    def reach(self, time: float) -> float | None:
        """Return the clock's time if it is `time` or later, or can leap there; else None."""
        ahead = time - self._now
        if ahead > 0:
            time = self._now + ahead
            if self._due_by(time):
                return None
            self._now = time
        return self._now

    def _due_by(self, time: float) -> bool:
        queue = self._queue
        if not queue:
            return False
        due: float = queue[0][0]
        return due <= time

    def at(self, time: float) -> Event:
        """Return an event that happens at `time`, exactly."""
        event = Event(self)
        event._ok, event._value = True, None
        heappush(self._queue, (time, NORMAL, next(self._eid), event))
        return event


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
        self.env = Clock(0.0)
        self.trace = Trace()
        self.jitter = jitter
        self.rng = np.random.default_rng(seed)
        self.host = ""

    def of(self, host: str) -> Engine:
        """Return this engine as a host sees it: its threads carry the host's name, so that two hosts stay apart."""
        view = Engine(jitter=self.jitter)
        view.env, view.trace, view.rng, view.host = self.env, self.trace, self.rng, host
        return view

    @property
    def now(self) -> float:
        """Simulated time in microseconds."""
        return self.env._now

    def thread(self, name: str) -> Thread:
        """Return a new actor whose spans carry `name`."""
        return Thread(self, name if name.startswith(self.host) else f"{self.host} {name}")

    def start(self, process: Wait) -> Process:
        """Start a generator as a concurrent process."""
        return self.env.process(process)

    def pause(self, delay: float) -> Iterable[Event]:
        """Let `delay` microseconds pass for the running process."""
        return NO_WAIT if self.env.leap(delay) else (Timeout(self.env, delay),)

    def quiet(self) -> Wait:
        """Let everything happen that still can without the running process."""
        while (time := self.env.peek()) < simpy.core.Infinity:
            yield self.env.timeout(max(time - self.env.now, 0.0))

    def run(self, until: Event | None = None) -> Any:
        """Run until `until` has happened, or until nothing is left to do.

        Garbage is not collected meanwhile: a run makes no cycles, and each collection would walk the whole trace.
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self.env.run(until)
        finally:
            if collecting:
                gc.enable()


class Thread:
    """One actor: a clock of its own (``now``, microseconds) and its running span.

    Attributes
    ----------
    log : Log
        The trace's spans.
    keys : Keys
        This actor's span keys.
    at : int
        The running span's place in the log, -1: none.
    """

    __slots__ = ("_env", "_facts", "_jitter", "_numbered", "_trace", "at", "engine", "keys", "log", "name", "now")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self._env, self._trace, self.log = engine.env, engine.trace, engine.trace.spans.log
        self._facts = engine.trace.spans.facts
        engine.trace.actors(name)
        self.now: float = float(engine.env.now)
        self._jitter = engine.jitter
        self.at = -1
        self.keys = Keys(lambda step: engine.trace.key(step, name))
        self._numbered: list[int] = []

    @property
    def row(self) -> int:
        """The running span's row, -1: none."""
        return self.at >> SHIFT

    def key(self, number: int, step: str) -> int:
        """Return ``keys[step]`` of a step that the compiler has given a number: a place in a list is found sooner."""
        known = self._numbered
        if number >= len(known):
            known += [0] * (number + 1 - len(known))
        found = known[number]
        if not found:
            found = known[number] = self.keys[step]
        return found

    def apart(self, work: Callable[[], Any]) -> Any:
        """Do `work` as if the running step had not called it: what a completion or an interrupt calls."""
        at, self.at = self.at, -1
        try:
            return work()
        finally:
            self.at = at

    def charge(self, microseconds: float) -> None:
        """Spend time on this actor's own clock."""
        if self._jitter:
            microseconds *= 1.0 + self._jitter * float(self.engine.rng.random())
        self.now += microseconds

    def note(
        self, va: int = -1, pages: int = 0, bytes: int = 0, cause: str = "", status: str = "ok", value: float = 0
    ) -> None:  # fmt: skip
        """Fill in what the running step has learned about itself: columns of the spans from ``va`` on."""
        if cause or status != "ok":
            trace = self._trace
            self._facts.add(self.at, va, pages, bytes, trace.causes.ids[cause], trace.statuses.ids[status], value)
        else:
            self._facts.add(self.at, va, pages, bytes, 0, 0, value)

    def in_step(self) -> bool:
        """Bring the common clock up to this actor's if nobody else acts before; return whether they agree."""
        now = self._env.reach(self.now)
        if now is None:
            return False
        self.now = now
        return True

    def sync(self) -> Iterable[Event]:
        """Let everybody else catch up with this actor's clock."""
        now = self._env.reach(self.now)
        if now is None:
            return self._catch_up()
        self.now = now
        return NO_WAIT

    def _catch_up(self) -> Wait:
        env = self._env
        yield Timeout(env, self.now - env._now)
        self.now = float(env._now)

    def wait(self, event: Event) -> Wait:
        """Wait for `event`; time passes on this actor's clock."""
        yield from self.sync()
        value = yield event
        self.now = float(self._env.now)
        return value
