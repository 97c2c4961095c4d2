"""Hosts: memory, a process, an adapter with its driver; and pairs of them connected by queue pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kit.drivers.mlx5 import costs as mlx5_costs
from kit.drivers.mlx5 import verbs
from kit.drivers.mlx5.adapter.fabric import Fabric
from kit.drivers.mlx5.adapter.hca import Hca, HcaParameters
from kit.drivers.mlx5.adapter.qp import Qp
from kit.drivers.mlx5.adapter.queues import Cq
from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.device import Mlx5IbDev, OdpOptions
from kit.drivers.mlx5.enums import Era, QpType
from kit.drivers.mlx5.mr.mkey_cache import mlx5_mkey_cache_init, set_cache_mkc
from kit.errors import raise_for
from kit.flows.rdma.parameters import RdmaParameters
from kit.memory import costs as mm_costs
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.sim.costs import Costs
from kit.sim.engine import Engine, Thread, Wait
from kit.sim.machine import Machine

__all__ = ["Connection", "Host", "connect", "make_host"]

PAGE = 4096
ERAS = {"old": Era.OLD, "mid": Era.MID, "new": Era.NEW}
FIXED = {"era": None, "fixed": True, "bug": False}


@dataclass(eq=False)
class Host:
    """One host.

    Attributes
    ----------
    name : str
    memory : PhysicalMemory
    mm : Mm
        Address space of the program that calls the verbs.
    dev : Mlx5IbDev
        Its adapter as the driver sees it; ``dev.hca`` is the hardware.
    cpu : Thread
        The program.
    pd : IbPd
        Once the device is open.
    """

    name: str
    engine: Engine
    memory: PhysicalMemory
    mm: Mm
    dev: Mlx5IbDev
    cpu: Thread
    pd: Any = None
    mrs: list[tuple[str, Any]] = field(default_factory=list)

    def open(self) -> Wait:
        """Probe the device, open it, and allocate a protection domain."""
        yield from probe(self)
        self.pd = yield from verbs.alloc_pd(verbs.open_device(self.dev, self.mm), self.cpu)


@dataclass(eq=False)
class Connection:
    """A pair of connected queue pairs, each with a completion queue for sends and one for receives."""

    left: Qp
    right: Qp
    left_cq: Cq
    right_cq: Cq


def make_host(
    name: str, engine: Engine, machine: Machine, parameters: RdmaParameters, fabric: Fabric, frames: int,
    device_frames: int = 0, swap_slots: int = 0, record_moves: bool = False,
) -> Host:  # fmt: skip
    """Build a host: its memory holds `frames` pages, the machine says what everything costs."""
    p, own = parameters, engine.of(name)
    memory = PhysicalMemory(own, frames, device_frames, p.payload_bytes, swap_slots)
    mm = Mm(memory, own, costs_of(machine, mm_costs), name=f"{name} program", record_moves=record_moves)
    costs = costs_of(machine, mlx5_costs)
    hardware = HcaParameters(
        mtu=p.mtu, rnr_scale=p.rnr_scale, timeout_floor=p.timeout_floor_ms * 1000, rdma_op_len_known=p.op_len_known,
        packet_damming=p.packet_damming,
    )  # fmt: skip
    hca = Hca(own, memory, costs, params=hardware, name=f"{name} hca")
    if p.era == "new" and p.memory_scheme:
        hca.caps.mem_page_fault = hca.caps.page_prefetch = True
    options = OdpOptions(
        invalidations_fixed=FIXED[p.count_invalidations], pf_max_active=p.workers, pf_reserve=p.fault_reserve
    )
    dev = Mlx5IbDev(hca, costs, ERAS[p.era], options)
    fabric.attach(hca)
    return Host(name, own, memory, mm, dev, own.thread("program"))


def costs_of(machine: Machine, room: Any) -> Costs:
    """Return the costs that a room of the kit names, with the machine's values."""
    costs: Costs = room.make_costs({name: machine[name] for name in room.COSTS})
    return costs


def probe(host: Host) -> Wait:
    """Make the mkey cache of a device that was found long ago: it is full, and nobody waited for its keys.

    Filling takes the real driver 6,120 firmware commands in the background; here the keys are there at once.
    """
    dev, thread = host.dev, host.engine.thread("kmod")
    dev.cache.fill_delay = True  # no background filling while the entries are made
    yield from mlx5_mkey_cache_init(dev, thread)
    elsewhere = Engine().thread("filled before")
    for ent in dev.cache.ents.values():
        mkc = Mkc()
        set_cache_mkc(ent, elsewhere, mkc)
        ent.mkeys += [dev.hca.mkeys.create(mkc, dev.caps.pg).key for _ in range(2 * ent.limit - ent.ci)]
    dev.cache.fill_delay = False
    yield from thread.sync()


def connect(left: Host, right: Host, parameters: RdmaParameters, depth: int, max_inline: int = 0) -> Wait:
    """Create a queue pair on each host and bring both to RTS; returns a `Connection`."""
    p, ends = parameters, []
    for host in (left, right):
        cq = yield from verbs.create_cq(verbs.Context(host.dev, host.mm), host.cpu, 4 * depth + 16)
        qp = yield from verbs.create_qp(
            host.pd, host.cpu, QpType.RC, cq, cq, max_send_wr=depth, max_recv_wr=depth, max_inline_data=max_inline,
            sq_sig_all=True,
        )  # fmt: skip
        ends.append((qp, cq))
    (a, a_cq), (b, b_cq) = ends
    ret = yield from verbs.connect(
        left.cpu, a, b, timeout=p.timeout, retry_cnt=p.retry_cnt, rnr_retry=p.rnr_retry, min_rnr_timer=p.min_rnr_timer
    )
    raise_for(ret)
    return Connection(a, b, a_cq, b_cq)
