"""GPU channels: first in, first out, asynchronous to the CPU.

A channel executes its pushes in order, so the end of a push is known when it is made: the later of
the pusher's clock, what it must wait for, and the end of the push before it, plus its duration. That
closed form replaces a server process; what can block the pusher, a full GPFIFO, is modelled.
"""

from __future__ import annotations

from collections import deque

from kit.sim.engine import Thread

__all__ = ["Channel"]


class Channel:
    """One channel.

    Parameters
    ----------
    name : str
        Documented channel type, such as ``CPU_TO_GPU``.
    entries : int
        GPFIFO entries; one stays free, as in the driver.
    """

    __slots__ = ("_pending", "entries", "free_at", "name", "pushes")

    def __init__(self, name: str, entries: int) -> None:
        self.name, self.entries = name, entries
        self.free_at = 0.0
        self.pushes = 0
        self._pending: deque[float] = deque()

    def push(self, thread: Thread, duration: float, after: float = 0.0) -> tuple[float, float]:
        """Submit work of `duration` microseconds that waits for time `after`.

        Returns
        -------
        start, end : float
            When the GPU executes it.
        """
        pending, start = self._pending, thread.now
        if len(pending) >= self.entries - 1:
            while pending and pending[0] <= start:
                pending.popleft()
            if len(pending) >= self.entries - 1:
                start = thread.now = pending.popleft()  # uvm_channel_reserve spins until an entry completes
        if after > start:
            start = after
        if self.free_at > start:
            start = self.free_at
        self.free_at = end = start + duration
        self.pushes += 1
        pending.append(end)
        return start, end
