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
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import simpy.core
from simpy.events import NORMAL, Event, Process, Timeout

from kit.sim.columns import Keys
from kit.sim.log import SHIFT
from kit.sim.trace import Trace

if TYPE_CHECKING:
    from mypy_extensions import i64  # an int that the compiler keeps in a machine word

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
        if self._queue and float(self._queue[0][0]) <= time:
            return False
        self._now = time
        return True

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

    __slots__ = (
        "_clock", "_facts", "_jitter", "_numbered", "_queue", "_trace", "at", "engine", "keys", "log", "name", "now",
    )  # fmt: skip

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self._trace, self.log = engine.trace, engine.trace.spans.log
        # SimPy's fields, for `in_step`: compiled, they are found sooner in their dict than on their object.
        self._clock, self._queue = vars(engine.env), engine.env._queue
        self._facts = engine.trace.spans.facts
        engine.trace.actors(name)
        self.now: float = float(engine.env.now)
        self._jitter = engine.jitter
        self.at: i64 = -1
        self.keys = Keys(lambda step: engine.trace.key(step, name))
        self._numbered: list[int] = []

    @property
    def row(self) -> int:
        """The running span's row, -1: none."""
        return self.at >> SHIFT

    def enter(self, number: i64, step: str) -> i64:
        """Open the span of a step that the compiler has given a number, and return its place (`kit.sim.steps`)."""
        known = self._numbered
        if number >= len(known):
            known += [0] * (number + 1 - len(known))
        key: i64 = known[number]  # a place in a list is found sooner than a word
        if key == 0:
            key = known[number] = self.keys[step]
        self.at = at = self.log.add(self.now, self.now, key, self.at)
        return at

    def leave(self, at: i64) -> None:
        """Close the span at a place, now."""
        self.at = self.log.close(at, self.now)

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
        at = float(self.at)
        if cause or status != "ok":
            trace = self._trace
            self._facts.add(at, va, pages, bytes, trace.causes.ids[cause], trace.statuses.ids[status], value)
        else:
            self._facts.add(at, va, pages, bytes, 0, 0, value)

    def in_step(self) -> bool:
        """Bring the common clock up to this actor's if nobody else acts before; return whether they agree.

        A clock that is ahead takes the actor along.
        """
        now: float = self._clock["_now"]
        ahead = self.now - now
        if ahead > 0:
            now += ahead
            if self._queue and float(self._queue[0][0]) <= now:
                return False
            self._clock["_now"] = now
        self.now = now
        return True

    def sync(self) -> Iterable[Event]:
        """Let everybody else catch up with this actor's clock."""
        return NO_WAIT if self.in_step() else self._catch_up()

    def _catch_up(self) -> Wait:
        env = self.engine.env
        yield Timeout(env, self.now - env._now)
        self.now = float(env._now)

    def wait(self, event: Event) -> Wait:
        """Wait for `event`; time passes on this actor's clock."""
        yield from self.sync()
        value = yield event
        self.now = float(self.engine.env.now)
        return value
