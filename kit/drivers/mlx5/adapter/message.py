"""What travels between two adapters, and the link it travels on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kit.drivers.mlx5.adapter.hca import Hca
    from kit.drivers.mlx5.adapter.qp import Qp
    from kit.drivers.mlx5.descriptors import SendWr

__all__ = ["Message", "transmit"]


@dataclass(eq=False, slots=True)
class Message:
    """A request on its way.

    Attributes
    ----------
    qp : Qp
        The requester's.
    dest : int
        Number of the responder's queue pair.
    index : int
        Sequence number.
    offset : int
        Bytes that the responder had taken before; `data` starts there.
    length : int
        Bytes of the whole operation.
    """

    qp: Qp
    epoch: int
    dest: int
    index: int
    wr: SendWr
    offset: int
    length: int
    data: NDArray[np.uint8] | None


def transmit(hca: Hca, size: int, cause: str) -> tuple[float, float]:
    """Put a message of `size` bytes on the link of `hca`.

    Returns
    -------
    float, float
        When its last byte has left, and when it has arrived; microseconds from now.
    """
    now, costs = hca.engine.now, hca.costs
    start = max(now + costs.wqe_fetch, hca.tx_free)
    hca.tx_free = left = start + size / costs.wire_bandwidth
    arrived = left + costs.wire_latency
    if size:
        hca.engine.trace.span("wire", hca.name, start, arrived, bytes=size, cause=cause)
    hca.counters.messages += 1
    hca.counters.bytes += size
    return left - now, arrived - now
