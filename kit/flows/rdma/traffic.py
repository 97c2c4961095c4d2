"""One-sided messages: a requester that writes to and reads from areas of a responder, and checks what came through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from kit.drivers.mlx5 import verbs, verbs_post
from kit.drivers.mlx5.adapter.payload import gather, scatter
from kit.drivers.mlx5.descriptors import SendWr, Sge
from kit.drivers.mlx5.enums import Access, WcStatus, WrOpcode
from kit.errors import raise_for
from kit.flows.rdma.content import Area, frames_of, message_bytes
from kit.memory.syscalls.mmap import mmap
from kit.memory.types import MAP_ANONYMOUS, MAP_PRIVATE, PAGE, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.flows.rdma.hosts import Connection, Host
    from kit.flows.rdma.one_sided import OneSidedSession
    from kit.sim.engine import Thread, Wait

__all__ = ["Traffic", "Transfer", "cut", "transfers_of"]


@dataclass(frozen=True)
class Transfer:
    """One message: what is done to which bytes of which area."""

    area: Area
    address: int
    length: int
    read: bool = False


@dataclass(eq=False)
class _Lane:
    """One queue pair with its part of the local buffer: a slot for each message under way."""

    connection: Connection
    mr: Any
    base: int
    slot_bytes: int
    free: list[int] = field(default_factory=list)

    def address(self, slot: int, remote: int) -> int:
        """Return where a message's bytes lie: with the same page offset as at the other end."""
        return self.base + slot * self.slot_bytes + remote % PAGE


Part = tuple[Area, int, int]
"""Area, address and length of a message."""


def cut(area: Area, first_page: int, pages: int, message: int) -> list[Part]:
    """Return the messages that cover some pages of an area, in order."""
    start, end = area.va + first_page * PAGE, area.va + (first_page + pages) * PAGE
    return [(area, at, min(message, end - at)) for at in range(start, end, message)]


def transfers_of(
    parts: Sequence[Part], operation: str, read_share: float, rng: np.random.Generator
) -> list[Transfer]:  # fmt: skip
    """Return what is done to each part: ``write``, ``read``, or ``mixed`` with a share of READs."""
    reads = np.full(len(parts), operation == "read")
    if operation == "mixed":
        reads = rng.random(len(parts)) < read_share
    return [Transfer(*part, read=bool(read)) for part, read in zip(parts, reads, strict=True)]


class Traffic:
    """Messages from a requester to a responder.

    Parameters
    ----------
    session : OneSidedSession
    message_bytes, depth : int
        Largest message; messages that a queue pair has under way at a time.

    Attributes
    ----------
    reads_checked, reads_lost : int
        Pages that READs brought and compared, and those that differed.
    """

    def __init__(self, session: OneSidedSession, message_bytes: int, depth: int) -> None:
        self.session, self.message_bytes, self.depth = session, message_bytes, depth
        self.host: Host = session.requester
        self.lanes: list[_Lane] = []
        self.number = self.reads_checked = self.reads_lost = 0

    def prepare(self) -> Wait:
        """Map, touch and register (pinned) the requester's buffer: one slot a message under way."""
        slot = (-(-self.message_bytes // PAGE) + 1) * PAGE
        host, lanes = self.host, self.session.connections
        for connection in lanes:
            size = slot * self.depth
            base = yield from mmap(
                host.mm, host.cpu, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, name="send buffer"
            )
            mr = yield from verbs.reg_mr(host.pd, host.cpu, raise_for(base), size, Access.LOCAL_WRITE)
            raise_for(mr) if isinstance(mr, int) else None
            self.lanes.append(_Lane(connection, mr, base, slot, list(range(self.depth))[::-1]))

    def run(self, transfers: Sequence[Transfer], mr: Mlx5IbMr) -> Wait:
        """Send all messages to a region, spread over the queue pairs in turn, and wait until all have completed."""
        env = self.session.engine.env
        lanes = [
            env.process(self._lane(lane, list(transfers[at :: len(self.lanes)]), mr))
            for at, lane in enumerate(self.lanes)
        ]
        yield simpy.AllOf(env, lanes)

    def _lane(self, lane: _Lane, transfers: list[Transfer], mr: Mlx5IbMr) -> Wait:
        thread = self.host.engine.thread("program")
        under_way: dict[int, tuple[Transfer, int, float, Any]] = {}
        waiting = transfers[::-1]
        qp, cq, costs = lane.connection.left, lane.connection.left_cq, self.host.dev.costs
        while waiting or under_way:
            while waiting and lane.free:
                transfer, slot = waiting.pop(), lane.free.pop()
                self.number += 1
                number = self.number
                data = self._fill(lane, slot, transfer)
                local = lane.address(slot, transfer.address)
                opcode = WrOpcode.RDMA_READ if transfer.read else WrOpcode.RDMA_WRITE
                sge = Sge(local, transfer.length, lane.mr.lkey)
                wr = SendWr(number, opcode, (sge,), remote_addr=transfer.address, rkey=mr.rkey)
                yield from thread.sync()
                under_way[number] = transfer, slot, thread.now, data
                raise_for((yield from verbs_post.post_send(qp, thread, wr)))
            for wc in (yield from verbs_post.wait_cq(cq, thread, 1, costs.cqe)):
                transfer, slot, start, data = under_way.pop(wc.wr_id)
                lane.free.append(slot)
                self._completed(lane, thread, wc, transfer, slot, start, data)
                if wc.status == WcStatus.SUCCESS:
                    self.session.look(transfer, mr)
            if qp.state.name == "ERR":
                waiting.clear()

    def _fill(self, lane: _Lane, slot: int, transfer: Transfer) -> Any:
        """Put a message's bytes into its slot; a READ's slot is cleared."""
        memory, length = self.host.memory, transfer.length
        whole = memory.payload_bytes == PAGE
        data = message_bytes(transfer.address, length, self.number, whole, self.session.rng)
        pfns = self._frames(lane, slot, transfer)
        scatter(memory.payload, pfns, transfer.address % PAGE, data if not transfer.read else np.zeros_like(data))
        return data

    def _frames(self, lane: _Lane, slot: int, transfer: Transfer) -> Any:
        at = lane.address(slot, transfer.address)
        return frames_of(self.host.mm, at // PAGE, -(-(at % PAGE + transfer.length) // PAGE))

    def _completed(
        self, lane: _Lane, thread: Thread, wc: Any, transfer: Transfer, slot: int, start: float, data: Any
    ) -> None:  # fmt: skip
        area, session = transfer.area, self.session
        word = "RDMA_READ" if transfer.read else "RDMA_WRITE"
        good = wc.status == WcStatus.SUCCESS
        session.engine.trace.span(
            "message", "requester program", start, thread.now, va=transfer.address, bytes=transfer.length,
            pages=-(-(transfer.address % PAGE + transfer.length) // PAGE), cause=word,
            status="ok" if good else wc.status.name, value=wc.wr_id,
        )  # fmt: skip
        if not good:
            session.errors.append(f"{word} of {transfer.length} B at {transfer.address:#x}: {wc.status.name}")
            if not transfer.read:
                area.unknown[area.span(transfer.address, transfer.length)] = True
        elif transfer.read:
            self._compare(lane, slot, transfer)
        else:
            area.write(transfer.address, data)

    def _compare(self, lane: _Lane, slot: int, transfer: Transfer) -> None:
        """Hold what a READ brought against what the area should hold."""
        area, where = transfer.area, transfer.area.span(transfer.address, transfer.length)
        got = gather(
            self.host.memory.payload, self._frames(lane, slot, transfer), transfer.address % PAGE, transfer.length
        )
        wanted = area.read(transfer.address, transfer.length)
        edges = np.arange(-transfer.address % PAGE, transfer.length, PAGE)
        edges = np.unique(np.concatenate(([0], edges)))
        same = np.logical_and.reduceat(got == wanted, edges)
        zero = ~np.logical_or.reduceat(got != 0, edges)
        fine = same | (zero & area.maybe_zero[where]) | area.unknown[where]
        self.reads_checked += len(fine)
        self.reads_lost += int((~fine).sum())
