"""Sessions in which a requester reaches areas of a responder's memory by RDMA, through regions over them."""

from __future__ import annotations

from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.enums import U64_MAX, Access
from kit.drivers.mlx5.objects import Mlx5IbMr
from kit.errors import Errno, raise_for
from kit.flows.rdma.content import Area, add_up
from kit.flows.rdma.hosts import Connection, Host, connect
from kit.flows.rdma.parameters import RdmaParameters
from kit.flows.rdma.session import RdmaSession
from kit.flows.rdma.stale import is_pinned, stale_pages
from kit.flows.rdma.traffic import Traffic, Transfer
from kit.flows.run import Allocation, Integrity
from kit.memory.types import PAGE
from kit.sim.engine import Wait

__all__ = ["OneSidedSession", "reg_mr"]

REMOTE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ


class OneSidedSession(RdmaSession):
    """A flow in which the requester writes to and reads from areas of the responder's memory.

    Parameters
    ----------
    parameters : RdmaParameters
    scenario : str
    message_bytes, depth, qps : int
        Largest message; messages that a queue pair has under way at a time; queue pairs.

    Attributes
    ----------
    areas : list of Area
        Memory of the responder that messages reach; every page of it is checked in the end.
    traffic : Traffic
        The requester's side.
    detected : int
        Pages that messages found, or left, where their addresses no longer were.
    """

    def __init__(
        self, parameters: RdmaParameters, scenario: str, message_bytes: int, depth: int, qps: int = 1
    ) -> None:  # fmt: skip
        super().__init__(parameters, scenario)
        self.areas: list[Area] = []
        self.qps, self.connections = qps, list[Connection]()
        self.traffic = Traffic(self, message_bytes, depth)
        self.detected = 0

    @property
    def mr(self) -> Mlx5IbMr:
        """The region that the messages go through, the first one if there are several."""
        assert self.responder.mrs, "register comes first"
        found: Mlx5IbMr = self.responder.mrs[0][1]
        return found

    # -- what stages are made of -------------------------------------------------------------------------------------

    def open_hosts(self) -> Wait:
        """Probe and open both hosts' devices, and connect the queue pairs."""
        for host in self.hosts:
            self.catch_up()
            yield from host.open()
        for _ in range(self.qps):
            made = yield from connect(*self.hosts, self.parameters, max(4 * self.traffic.depth, 128))
            self.connections.append(made)
        self.catch_up()

    def add_area(self, area: Area) -> Area:
        """Note that the responder's program has mapped an area."""
        self.areas.append(area)
        self.allocations.append(Allocation(area.name, area.va, area.pages * PAGE))
        return area

    def register_one(self, kind: str, va: int = 0, length: int = 0) -> Wait:
        """Register the flow's one region, which must succeed; from then on the failure asked for may happen."""
        self.start_using(kind, (yield from reg_mr(self.responder, kind, va, length)))

    def start_using(self, kind: str, mr: Mlx5IbMr | Errno) -> None:
        """Send messages through a region that was registered; raise what refused it."""
        if isinstance(mr, Errno):
            raise_for(mr)
        self.responder.mrs.append((kind, mr))
        self.arm(self.responder)

    # -- what must never happen ------------------------------------------------------------------------------------

    def is_told(self, mr: Mlx5IbMr) -> bool:
        """Whether the adapter hears of what happens to a region's pages: not when they are pinned."""
        return not is_pinned(mr)

    def look(self, transfer: Transfer, mr: Mlx5IbMr) -> None:
        """Look whether a message that has completed went to the pages that its addresses name now."""
        host = self.responder
        if self.is_told(mr):
            return
        stale = stale_pages(host, mr, transfer.area, transfer.address, transfer.length)
        if not stale:
            return
        self.detected += stale
        self.report_stale(host, "RDMA_READ from" if transfer.read else "RDMA_WRITE to", transfer.address, stale)

    # -- the result --------------------------------------------------------------------------------------------------

    def integrity(self) -> Integrity:
        """Compare every page of the areas, and every page that READs brought."""
        reads = self.traffic.reads_checked, self.traffic.reads_lost
        return add_up([*(area.check(self.responder.mm) for area in self.areas), reads])


def reg_mr(host: Host, kind: str, va: int, length: int, flags: int = 0) -> Wait:
    """Call ibv_reg_mr, for remote access too; an implicit region is over all addresses. Return it, or the errno.

    Parameters
    ----------
    host : Host
    kind : str
        ``pinned``, ``explicit`` (on demand) or ``implicit``.
    va, length : int
        What the region covers, in bytes; not read when it is implicit.
    flags : int
        More of `Access`.
    """
    access = REMOTE | flags | (0 if kind == "pinned" else int(Access.ON_DEMAND))
    start, length = (0, U64_MAX) if kind == "implicit" else (va, length)
    return (yield from verbs.reg_mr(host.pd, host.cpu, start, length, access))
