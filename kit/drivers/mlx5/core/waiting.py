"""Linux semaphores, wait queues and work queues, on the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import simpy

from kit.sim.engine import Engine, Thread, Wait

__all__ = ["DelayedWork", "Semaphore", "WaitQueue", "Workqueue"]

Work = Callable[[Thread], Wait]
NO_WAIT: tuple[simpy.Event, ...] = ()


class Semaphore:
    """A counting semaphore (struct semaphore); taking a free place costs no event.

    Parameters
    ----------
    count : int
        Places.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._waiting: deque[simpy.Event] = deque()

    def down(self, thread: Thread) -> Iterable[simpy.Event]:
        """Take a place, in order of arrival."""
        if thread.in_step() and self.count:
            self.count -= 1
            return NO_WAIT
        return self._down(thread)

    def _down(self, thread: Thread) -> Wait:
        yield from thread.sync()
        if self.count:
            self.count -= 1
            return
        turn = thread.engine.env.event()
        self._waiting.append(turn)
        yield from thread.wait(turn)

    def up(self, thread: Thread) -> Wait:
        """Give the place back."""
        yield from thread.sync()
        if self._waiting:  # handed over
            self._waiting.popleft().succeed()
        else:
            self.count += 1


class WaitQueue:
    """``wait_event`` and ``wake_up`` (wait_queue_head_t)."""

    def __init__(self) -> None:
        self._waiting: list[simpy.Event] = []

    def wait_event(self, thread: Thread, condition: Callable[[], bool]) -> Wait:
        """Sleep until `condition` holds; it is looked at on every `wake_up`."""
        yield from thread.sync()
        while not condition():
            event = thread.engine.env.event()
            self._waiting.append(event)
            yield from thread.wait(event)

    def wake_up(self) -> None:
        """Let everybody who sleeps here look again."""
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            event.succeed()


class Workqueue:
    """A work queue (alloc_workqueue): items start in order, at most `max_active` run at a time.

    Parameters
    ----------
    engine : Engine
    name : str
        The workers are actors named after it.
    max_active : int
    dispatch : float
        Microseconds from queueing until a free worker starts.
    """

    def __init__(self, engine: Engine, name: str, max_active: int, dispatch: float = 0.0) -> None:
        self.engine, self.name, self.max_active, self.dispatch = engine, name, max_active, dispatch
        self.active = 0
        self.most_active = 0
        self._pending: deque[tuple[float, Work]] = deque()
        self._idle: list[Thread] = []
        self._workers = 0
        self._drained = WaitQueue()

    def queue_work(self, thread: Thread, work: Work) -> None:
        """Queue an item (queue_work): a function that gets the worker's thread."""
        item = thread.now + self.dispatch, work
        if self.active == self.max_active:
            self._pending.append(item)
            return
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        self.engine.start(self._run(self._worker(), *item))

    def flush(self, thread: Thread) -> Wait:
        """Wait until nothing is queued or running (flush_workqueue)."""
        yield from self._drained.wait_event(thread, lambda: not self.active and not self._pending)

    def _worker(self) -> Thread:
        if self._idle:
            return self._idle.pop()
        self._workers += 1
        return self.engine.thread(f"{self.name}/{self._workers - 1}")

    def _run(self, worker: Thread, ready: float, work: Work) -> Wait:
        while True:
            worker.now = max(float(self.engine.now), ready)
            yield from worker.sync()
            yield from work(worker)
            yield from worker.sync()
            if not self._pending:
                break
            ready, work = self._pending.popleft()
        self.active -= 1
        self._idle.append(worker)
        if not self.active:
            self._drained.wake_up()


class DelayedWork:
    """Work that is queued when a timer runs out (struct delayed_work); one timer at most, one run at a time queued."""

    def __init__(self, wq: Workqueue, work: Work) -> None:
        self.wq, self.work = wq, work
        self.due: float | None = None  # when the timer runs out
        self._queued = False
        self._turn = 0

    @property
    def pending(self) -> bool:
        """Whether the timer runs or the item waits for its worker."""
        return self._queued or self.due is not None

    def queue(self, thread: Thread, delay: float) -> None:
        """Start the timer, `delay` in microseconds, unless the work is pending already (queue_delayed_work)."""
        if not self.pending:
            self._arm(thread, delay)

    def mod(self, thread: Thread, delay: float) -> None:
        """Start the timer anew, whatever it says now (mod_delayed_work)."""
        if not self._queued or delay > 0:
            self._arm(thread, delay)

    def cancel(self) -> None:
        """Stop the timer (cancel_delayed_work); an item that is queued already is dropped when its turn comes."""
        self._turn += 1
        self.due, self._queued = None, False

    def _arm(self, thread: Thread, delay: float) -> None:
        self._turn += 1
        if delay <= 0:
            self._enqueue(thread, self._turn)
            return
        self._queued, self.due = False, thread.now + delay
        self.wq.engine.start(self._timer(self._turn, self.due))

    def _timer(self, turn: int, due: float) -> Wait:
        env = self.wq.engine.env
        yield env.timeout(max(0.0, due - env.now))
        if turn == self._turn:
            clock = self.wq.engine.thread(f"{self.wq.name}/timer")
            self._enqueue(clock, turn)

    def _enqueue(self, thread: Thread, turn: int) -> None:
        self.due, self._queued = None, True

        def run(worker: Thread) -> Wait:
            if turn == self._turn and self._queued:
                self._queued = False
                yield from self.work(worker)

        self.wq.queue_work(thread, run)
