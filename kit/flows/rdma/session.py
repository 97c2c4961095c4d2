"""What sessions over mlx5 share: a requester and a responder, failures that are made to happen, the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np

from kit.drivers.mlx5.adapter.fabric import Fabric
from kit.errors import Errno
from kit.flows.documented import Conformance, Documented
from kit.flows.rdma.hosts import Host, make_host
from kit.flows.rdma.metrics import common_metrics
from kit.flows.rdma.parameters import RdmaParameters
from kit.flows.rdma.snapshots import write_state
from kit.flows.run import Integrity
from kit.flows.session import Session
from kit.memory.types import PAGE
from kit.sim.engine import Thread

__all__ = ["RdmaSession"]

MOST_WHOLE = 4 << 30  # bytes of host memory with payload_bytes 4096


class RdmaSession(Session):
    """A flow over mlx5 as an object with one method a stage: two hosts, each with a program and an adapter.

    Attributes
    ----------
    requester, responder : Host
        The responder's pages are the ones that the trace follows.
    counts : dict of str to number
        Metrics that a flow writes down on its way.
    """

    actor = "program"
    parameters: RdmaParameters

    def __init__(self, parameters: RdmaParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        self.rng = np.random.default_rng(parameters.seed)
        self.fabric = Fabric()
        self.requester = self._host("requester", record_moves=False)
        self.responder = self._host("responder", record_moves=True)
        self.counts: dict[str, float] = {}

    def _host(self, name: str, record_moves: bool) -> Host:
        return make_host(
            name, self.engine, self.machine, self.parameters, self.fabric, self.frames(name), self.extra_frames(name),
            swap_slots=self.swap_slots(name), record_moves=record_moves,
        )  # fmt: skip

    # -- how large a host is -----------------------------------------------------------------------------------------

    def frames(self, host: str) -> int:
        """Return the pages of a host's memory; of a machine whose pages are carried whole, not more than 4 GiB."""
        whole = self.parameters.payload_bytes == PAGE
        most = min(int(self.machine["host_memory_bytes"]), MOST_WHOLE if whole else 1 << 62)
        return (self.parameters.host_memory_bytes or most) // PAGE

    def extra_frames(self, host: str) -> int:
        """Return the pages of device memory beside them."""
        return 0

    def swap_slots(self, host: str) -> int:
        """Return the pages that fit on a host's swap device: 4 GiB (1 GiB of whole pages), or its memory's size."""
        return min(self.frames(host), 1 << 18 if self.parameters.payload_bytes == PAGE else 1 << 20)

    # -- stages ----------------------------------------------------------------------------------------------------

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both hosts, the requester first."""
        return (self.requester, self.responder)

    @property
    def programs(self) -> tuple[Thread, ...]:
        """Both hosts' programs."""
        return tuple(host.cpu for host in self.hosts)

    def work(self, stage: str) -> None:
        """Run a stage, and queued work (freed children, prefetches) to its end before the stage comes to its own."""
        super().work(stage)
        for host in self.hosts:
            thread = host.engine.thread("program")
            self.engine.run(self.engine.start(host.dev.system_unbound_wq.flush(thread)))

    def close(self, stage: str, start: float) -> None:
        """Write down that a stage has ended, and what the regions' tables hold now."""
        super().close(stage, start)
        for host in self.hosts:
            for _name, mr in host.mrs:
                if not mr.dead:
                    write_state(self.engine.trace, host.dev, mr, self.engine.now)

    # -- failures --------------------------------------------------------------------------------------------------

    def arm(self, host: Host) -> None:
        """Arm the failure that the parameters ask for, at `host`."""
        p = self.parameters
        if p.fail == "device":
            host.dev.hca.internal_error = True
        elif p.fail == "dead_owner":
            host.mm.mm_users = 0
            for _name, mr in host.mrs:
                mr.umem.owner_alive = False
        elif p.fail != "none":
            host.dev.inject.fail(p.fail, times=p.fail_times, after=p.fail_after)

    def note(self, result: Any, what: str) -> Any:
        """Write down an errno as one of the run's errors; return `result`."""
        if isinstance(result, Errno):
            self.errors.append(f"{what}: {result!r} from {result.step} ({result.detail})")
        return result

    def report_stale(self, host: Host, what: str, va: int, pages: int) -> None:
        """Say that a message used pages that its addresses, from `va` on, no longer name."""
        now, hca = self.engine.now, host.dev.hca
        self.engine.trace.span("dma_stale", hca.name, now, now, va=va, pages=pages, status="error")
        self.errors.append(f"stale data: {what} {va:#x} used {pages} pages that these addresses no longer name")

    # -- the result --------------------------------------------------------------------------------------------------

    def documented(self) -> Documented:
        """Return the documented steps of the parameters' kernel."""
        return Documented.load(self.parameters.flow, self.parameters.era)

    def metrics(self, conformance: Conformance, checked: Integrity) -> dict[str, float]:
        """Return what every flow over mlx5 counts, then what is particular to this one."""
        return {**common_metrics(self, conformance, checked), **self.own_metrics(), **self.counts}

    def own_metrics(self) -> dict[str, float]:
        """Return the flow's own metrics."""
        return {}
