"""Completion queues and shared receive queues, and what is posted to a queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import simpy
from numpy.typing import NDArray

from kit.drivers.mlx5.descriptors import RecvWr, SendWr, Wc

__all__ = ["Cq", "RecvWqe", "SendWqe", "Srq"]


@dataclass(eq=False)
class Cq:
    """A completion queue; completions are seen in order."""

    cqn: int
    cqe: int
    entries: deque[Wc] = field(default_factory=deque)
    waiting: list[simpy.Event] = field(default_factory=list)
    overrun: bool = False

    def push(self, wc: Wc) -> None:
        """Write a completion; a full queue overruns, which is an error of the program."""
        if len(self.entries) >= self.cqe:
            self.overrun = True
            return
        self.entries.append(wc)
        if self.waiting:
            waiting, self.waiting = self.waiting, []
            for event in waiting:
                event.succeed()


@dataclass(eq=False, slots=True)
class RecvWqe:
    """A posted receive."""

    wr: RecvWr
    index: int


@dataclass(eq=False)
class Srq:
    """A shared receive queue; with a completion queue of its own it is an XRC one."""

    srqn: int
    pdn: int
    max_sge: int
    max_wr: int
    cq: Cq | None = None
    queue: deque[RecvWqe] = field(default_factory=deque)
    taken: dict[int, RecvWqe] = field(default_factory=dict)  # handed to a message that is not complete
    next_index: int = 0

    @property
    def kind(self) -> str:
        """Which of the two it is: srq or xsrq."""
        return "srq" if self.cq is None else "xsrq"


@dataclass(eq=False, slots=True)
class SendWqe:
    """A posted send and its progress.

    Attributes
    ----------
    index : int
        Place in the queue, counted from 0; the sequence number of the message too.
    length : int
        Bytes of the message.
    data : ndarray of uint8 or None
        What has been read of the message so far (from byte `acked` on).
    read : int
        Bytes of the message that `data` reaches.
    acked : int
        Bytes that the responder has taken or, of a read, that have been written here.
    """

    wr: SendWr
    index: int
    length: int
    posted: float
    data: NDArray[np.uint8] | None = None
    read: int = 0
    acked: int = 0
    answered: bool = False
    sent: int = 0
