"""Locks of the simulated drivers: a mutex and a readers-writer lock, both in order of arrival.

What other actors must not see while a thread works ahead of the common clock is guarded by one of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import simpy

from kit.sim.engine import NO_WAIT, Thread, Wait

__all__ = ["Lock", "RwLock"]


class Lock:
    """A mutex; taking a free one costs no event."""

    __slots__ = ("_waiting", "holder")

    def __init__(self) -> None:
        self.holder: Thread | None = None
        self._waiting: list[tuple[simpy.Event, Thread]] = []

    def acquire(self, thread: Thread) -> Iterable[simpy.Event]:
        """Take the lock for `thread`, in order of arrival."""
        if not thread.in_step() or self.holder is not None:
            return self._acquire(thread)
        self.holder = thread
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
        if not thread.in_step():
            return self._release(thread)
        self._give_up()
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
        if not thread.in_step() or self.writer is not None or self._waiting:
            return self._acquire(thread, False)
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
        if not thread.in_step():
            return self._late_release(thread, False)
        self._give_up(False)
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
