"""GPU channels: first in, first out, asynchronous to the CPU.

A channel executes its pushes in order, so the end of a push is known when it is made: the later of
the pusher's clock, what it must wait for, and the end of the push before it, plus its duration. That
closed form replaces a server process; what can block the pusher, a full GPFIFO, is modelled.
"""

from __future__ import annotations

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

    __slots__ = ("_ends", "_next", "entries", "free_at", "name", "pushes")

    def __init__(self, name: str, entries: int) -> None:
        self.name, self.entries = name, entries
        self.free_at = 0.0
        self.pushes = 0
        self._ends = [0.0] * (entries - 1)  # of the pushes that were last in each entry
        self._next = 0

    def push(self, thread: Thread, duration: float, after: float = 0.0) -> tuple[float, float]:
        """Submit work of `duration` microseconds that waits for time `after`.

        Returns
        -------
        start, end : float
            When the GPU executes it.
        """
        ends, at, start = self._ends, self._next, thread.now
        self._next = at + 1 if at + 2 < self.entries else 0
        if ends[at] > start:
            start = thread.now = ends[at]  # uvm_channel_reserve spins until an entry completes
        if after > start:
            start = after
        if self.free_at > start:
            start = self.free_at
        self.free_at = ends[at] = end = start + duration
        self.pushes += 1
        return start, end
