"""The network between adapters: numbers of queue pairs, links, and what gets lost on purpose.

A message is one event at its arrival, whatever its size; MTU segmentation only decides how many bytes count as
committed when a page is missing. Its DMA happens at two moments: local memory is read when it is sent, remote memory
written (or read) when it has arrived. A link carries one message at a time in each direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kit.drivers.mlx5.adapter.message import Message
from kit.drivers.mlx5.adapter.responder import arrive
from kit.drivers.mlx5.adapter.retries import unanswered
from kit.drivers.mlx5.enums import QpState

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca

__all__ = ["Fabric"]


class Fabric:
    """Adapters that reach each other.

    Attributes
    ----------
    drop : callable or None
        ``drop(message) -> bool``: lose a request; the transport's timers have to notice.
    """

    def __init__(self) -> None:
        self.hcas: list[Hca] = []
        self.drop: Callable[[Message], bool] | None = None
        self._homes: dict[int, Hca] = {}
        self._next = 0x100

    def attach(self, hca: Hca) -> None:
        """Connect an adapter."""
        hca.fabric = self
        self.hcas.append(hca)

    def number(self, hca: Hca) -> int:
        """Return a number for a new queue of `hca`, unique in the fabric."""
        self._next += 1
        self._homes[self._next] = hca
        return self._next

    def deliver(self, message: Message) -> None:
        """Let a request arrive, unless it is lost or nobody takes it: the requester's timer has to notice."""
        home = self._homes.get(message.dest)
        qp = home.qps.get(message.dest) if home is not None and not home.internal_error else None
        lost = self.drop is not None and self.drop(message)
        if lost or qp is None or qp.state not in (QpState.RTR, QpState.RTS):
            message.qp.hca.counters.dropped += 1
            unanswered(message)
        else:
            arrive(qp, message)
