"""The engine: SimPy's clock and processes, and threads that charge time as they work.

A `Thread` is one actor (a kernel thread, a CPU core, a worker). Documented functions that cannot
wait run as plain Python and only *charge* their cost to the thread's own clock; the thread falls
back in step with everybody else at its next `Thread.sync`, which is at most one SimPy event whatever
the number of pages handled, and none when nobody else has anything to do before that time. What
other actors must not see in between is guarded by a `Lock`.

What may wait is used with ``yield from``, and is an empty tuple when it turns out not to wait.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable
from heapq import heappush
from typing import Any

import numpy as np
import simpy
from simpy.events import NORMAL

from kit.sim.columns import LOG_SHIFT
from kit.sim.trace import Trace

__all__ = ["Clock", "Engine", "Lock", "RwLock", "Thread", "Wait"]

Wait = Generator[simpy.Event, Any, Any]
NO_WAIT: tuple[simpy.Event, ...] = ()


class Clock(simpy.Environment):
    """SimPy's environment, which can also move on without an event when nothing is due in between."""

    def leap(self, delay: float) -> bool:
        """Let `delay` pass if nothing at all happens in that time; return whether it did.

        It is what waiting for a timeout comes to when that timeout is the next event anyway.
        """
        time = self._now + delay
        if self._queue and self._queue[0][0] <= time:
            return False
        self._now = time
        return True

    def reach(self, time: float) -> float | None:
        """Return the clock's time if it is `time` or later, or can leap there; else None."""
        ahead = time - self._now
        if ahead > 0:
            time = self._now + ahead
            if self._queue and self._queue[0][0] <= time:
                return None
            self._now = time
        return self._now

    def at(self, time: float) -> simpy.Event:
        """Return an event that happens at `time`, exactly."""
        event = simpy.Event(self)
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

    @property
    def now(self) -> float:
        """Simulated time in microseconds."""
        return self.env._now

    def thread(self, name: str) -> Thread:
        """Return a new actor whose spans carry `name`."""
        return Thread(self, name)

    def start(self, process: Wait) -> simpy.Process:
        """Start a generator as a concurrent process."""
        return self.env.process(process)

    def pause(self, delay: float) -> Iterable[simpy.Event]:
        """Let `delay` microseconds pass for the running process."""
        return NO_WAIT if self.env.leap(delay) else (simpy.Timeout(self.env, delay),)

    def quiet(self) -> Wait:
        """Let everything happen that still can without the running process."""
        while (time := self.env.peek()) < simpy.core.Infinity:
            yield self.env.timeout(max(time - self.env.now, 0.0))

    def run(self, until: simpy.Event | None = None) -> Any:
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
    log : list
        The trace's spans, place by place (`kit.sim.trace.Spans`).
    at : int
        The running span's place in it, -1: none.
    """

    __slots__ = ("_env", "_facts", "_jitter", "_trace", "at", "engine", "keys", "log", "name", "now")

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self._env, self._trace, self.log = engine.env, engine.trace, engine.trace.spans.log
        self._facts = engine.trace.spans.facts.fresh
        engine.trace.actors(name)
        self.now: float = float(engine.env.now)
        self._jitter = engine.jitter
        self.at = -1
        self.keys: dict[str, int] = {}

    @property
    def row(self) -> int:
        """The running span's row, -1: none."""
        return self.at >> LOG_SHIFT

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

    def key(self, name: str) -> int:
        """Return this actor's span key of step `name`."""
        found = self.keys[name] = self._trace.key(name, self.name)
        return found

    def note(
        self, va: int = -1, pages: int = 0, bytes: int = 0, cause: str = "", status: str = "ok", value: float = 0
    ) -> None:  # fmt: skip
        """Fill in what the running step has learned about itself: columns of the spans from ``va`` on."""
        if cause or status != "ok":
            trace = self._trace
            self._facts += (self.at, va, pages, bytes, trace.causes.ids[cause], trace.statuses.ids[status], value)
        else:
            self._facts += (self.at, va, pages, bytes, 0, 0, value)

    def in_step(self) -> bool:
        """Bring the common clock up to this actor's if nobody else acts before; return whether they agree."""
        now = self._env.reach(self.now)
        if now is None:
            return False
        self.now = now
        return True

    def sync(self) -> Iterable[simpy.Event]:
        """Let everybody else catch up with this actor's clock."""
        now = self._env.reach(self.now)
        if now is None:
            return self._catch_up()
        self.now = now
        return NO_WAIT

    def _catch_up(self) -> Wait:
        env = self._env
        yield simpy.Timeout(env, self.now - env._now)
        self.now = float(env._now)

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
        self._waiting: list[tuple[simpy.Event, Thread]] = []

    def acquire(self, thread: Thread) -> Iterable[simpy.Event]:
        """Take the lock for `thread`, in order of arrival."""
        now = thread._env.reach(thread.now)
        if now is None or self.holder is not None:
            return self._acquire(thread)
        thread.now, self.holder = now, thread
        return NO_WAIT

    def _acquire(self, thread: Thread) -> Wait:
        yield from thread.sync()
        if self.holder is None:
            self.holder = thread
            return
        turn = thread.engine.env.event()
        self._waiting.append((turn, thread))
        yield from thread.wait(turn)

    def release(self, thread: Thread) -> Iterable[simpy.Event]:
        """Give the lock up once everybody has caught up with the holder's clock."""
        if self.holder is not thread:
            raise RuntimeError(f"{thread.name} releases a lock held by {self.holder and self.holder.name}")
        now = thread._env.reach(thread.now)
        if now is None:
            return self._release(thread)
        thread.now = now
        if self._waiting:
            self._give_up()
        else:
            self.holder = None
        return NO_WAIT

    def _release(self, thread: Thread) -> Wait:
        yield from thread.sync()
        self._give_up()

    def _give_up(self) -> None:
        self.holder = None
        if self._waiting:  # handed over, so that nobody who comes at the same moment can get in between
            turn, self.holder = self._waiting.pop(0)
            turn.succeed()


class RwLock:
    """A readers-writer lock (rw_semaphore); taking a free one costs no event.

    It is fair: who comes while somebody waits, waits behind; when a writer leaves, the readers at the front of the
    queue get in together.
    """

    __slots__ = ("_waiting", "readers", "writer")

    def __init__(self) -> None:
        self.writer: Thread | None = None
        self.readers = 0
        self._waiting: list[tuple[simpy.Event, Thread, bool]] = []

    def read_acquire(self, thread: Thread) -> Iterable[simpy.Event]:
        """Share the lock with other readers, in order of arrival."""
        now = thread._env.reach(thread.now)
        if now is None or self.writer is not None or self._waiting:
            return self._acquire(thread, False)
        thread.now = now
        self.readers += 1
        return NO_WAIT

    def write_acquire(self, thread: Thread) -> Iterable[simpy.Event]:
        """Take the lock alone, in order of arrival."""
        if thread.in_step() and self.writer is None and not self.readers and not self._waiting:
            self.writer = thread
            return NO_WAIT
        return self._acquire(thread, True)

    def _acquire(self, thread: Thread, alone: bool) -> Wait:
        yield from thread.sync()
        turn = thread.engine.env.event()
        self._waiting.append((turn, thread, alone))
        self._hand_over()
        yield from thread.wait(turn)

    def read_release(self, thread: Thread) -> Iterable[simpy.Event]:
        """Give up a reader's share."""
        if not self.readers:
            raise RuntimeError(f"{thread.name} releases a lock that nobody reads under")
        now = thread._env.reach(thread.now)
        if now is None:
            return self._late_release(thread, False)
        thread.now = now
        self.readers -= 1
        if self._waiting:
            self._hand_over()
        return NO_WAIT

    def write_release(self, thread: Thread) -> Iterable[simpy.Event]:
        """Give up the writer's hold."""
        if self.writer is not thread:
            raise RuntimeError(f"{thread.name} releases a lock held by {self.writer and self.writer.name}")
        if thread.in_step():
            self._give_up(True)
            return NO_WAIT
        return self._late_release(thread, True)

    def write_downgrade(self, thread: Thread) -> None:
        """The writer goes on as a reader (mmap_write_downgrade)."""
        if self.writer is not thread:
            raise RuntimeError(f"{thread.name} downgrades a lock held by {self.writer and self.writer.name}")
        self.writer, self.readers = None, 1
        self._hand_over()

    def _late_release(self, thread: Thread, alone: bool) -> Wait:
        yield from thread.sync()
        self._give_up(alone)

    def _give_up(self, alone: bool) -> None:
        if alone:
            self.writer = None
        else:
            self.readers -= 1
        self._hand_over()

    def _hand_over(self) -> None:
        while self._waiting and self.writer is None:
            turn, thread, alone = self._waiting[0]
            if alone:
                if self.readers:
                    return
                self.writer = thread
            else:
                self.readers += 1
            self._waiting.pop(0)
            turn.succeed()
