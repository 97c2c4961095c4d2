"""What sessions over mlx5 share: the engine, a requester and a responder, stages, and the result so far."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

from kit.errors import Errno, ParameterError
from kit.flows.documented import Conformance, Documented
from kit.flows.rdma.hosts import Connection, Host, connect, make_host
from kit.flows.rdma.metrics import common_metrics
from kit.flows.rdma.parameters import RdmaParameters
from kit.flows.rdma.snapshots import write_state
from kit.flows.run import Allocation, Integrity, Run
from kit.sim.engine import Engine, Wait
from kit.sim.machine import load_machine

__all__ = ["PAGE", "RdmaSession"]

PAGE = 4096
MOST_WHOLE = 4 << 30  # bytes of host memory with payload_bytes 4096
Progress = Callable[[float, str], None]


class RdmaSession(ABC):
    """A flow over mlx5 as an object with one method a stage; each returns the session.

    Subclasses name their stages and write one generator a stage, ``_<stage>``.

    Parameters
    ----------
    parameters : RdmaParameters
    scenario : str
        Name of the scenario, for the report.
    """

    flow: ClassVar[str]
    stages_of: ClassVar[tuple[str, ...]]

    def __init__(self, parameters: RdmaParameters, scenario: str = "") -> None:
        from kit.drivers.mlx5.fabric import Fabric

        self.parameters, self.scenario = parameters, scenario
        self.machine = load_machine(parameters.machine)
        self.engine = Engine(parameters.seed, parameters.jitter)
        self.rng = np.random.default_rng(parameters.seed)
        self.fabric = Fabric()
        self.requester = self._host("requester", record_moves=False)
        self.responder = self._host("responder", record_moves=True)
        self.connections: list[Connection] = []
        self.allocations: list[Allocation] = []
        self.stages: list[tuple[str, float, float]] = []
        self.errors: list[str] = []
        self.counts: dict[str, float] = {}
        self.wall_s = 0.0

    # -- what subclasses say -------------------------------------------------------------------------------------

    def frames(self, host: str) -> int:
        """Return the pages of a host's memory; of a machine whose pages are carried whole, not more than 4 GiB."""
        whole = self.parameters.payload_bytes == PAGE
        most = min(int(self.machine["host_memory_bytes"]), MOST_WHOLE if whole else 1 << 62)
        return (self.parameters.host_memory_bytes or most) // PAGE

    def extra_frames(self, host: str) -> int:
        """Return the pages of device memory beside them."""
        return 0

    @abstractmethod
    def integrity(self) -> Integrity:
        """Compare what memory holds with what was last written to it."""

    def metrics(self) -> dict[str, float]:
        """Return the flow's own metrics."""
        return {}

    # -- stages ----------------------------------------------------------------------------------------------------

    def finish(self, progress: Progress | None = None) -> Run:
        """Run the stages that have not run yet and return the result."""
        names = self.stages_of
        for name in names[len(self.stages) :]:
            if progress is not None:
                progress(names.index(name) / len(names), name)
            self.stage(name)
        if progress is not None:
            progress(1.0, "done")
        return self.run

    def stage(self, name: str) -> Self:
        """Run the next stage, which must be `name`."""
        due = (*self.stages_of, "none")[len(self.stages)]
        if name != due:
            raise ParameterError("stage", name, f"the next stage, {due}")
        began, start = time.perf_counter(), self.engine.now
        self.catch_up()
        self.engine.run(self.engine.start(getattr(self, f"_{name}")()))
        self._settle()
        self.engine.trace.span("host_program", "program", start, self.engine.now, cause=name)
        for host in (self.requester, self.responder):
            for _name, mr in host.mrs:
                if not mr.dead:
                    write_state(self.engine.trace, host.dev, mr, self.engine.now)
        self.stages.append((name, start, self.engine.now))
        self.wall_s += time.perf_counter() - began
        return self

    def show(self) -> Run:
        """Return the run so far, which front ends show."""
        return self.run

    def _settle(self) -> None:
        """Let queued work (freed children, prefetches) come to its end before the stage does."""
        for host in (self.requester, self.responder):
            thread = host.engine.thread("program")
            self.engine.run(self.engine.start(host.dev.system_unbound_wq.flush(thread)))

    def catch_up(self) -> None:
        """Bring both programs' clocks to the run's."""
        for host in (self.requester, self.responder):
            host.cpu.now = max(host.cpu.now, self.engine.now)

    def _open(self) -> Wait:
        for host in (self.requester, self.responder):
            self.catch_up()
            yield from host.open()
        yield from self._connect()
        self.catch_up()

    def _connect(self) -> Wait:
        p: Any = self.parameters
        for _ in range(getattr(p, "qps", 1)):
            made = yield from connect(self.requester, self.responder, p, max(4 * getattr(p, "depth", 1), 128))
            self.connections.append(made)

    def _host(self, name: str, record_moves: bool) -> Host:
        return make_host(
            name, self.engine, self.machine, self.parameters, self.fabric, self.frames(name), self.extra_frames(name),
            swap_slots=self.swap_slots(name), record_moves=record_moves,
        )  # fmt: skip

    def swap_slots(self, host: str) -> int:
        """Return the pages that fit on a host's swap device: 4 GiB (1 GiB of whole pages), or its memory's size."""
        return min(self.frames(host), 1 << 18 if self.parameters.payload_bytes == PAGE else 1 << 20)

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

    # -- the result --------------------------------------------------------------------------------------------------

    def documented(self) -> Documented:
        """Return the documented steps of the parameters' kernel."""
        return Documented.load(self.flow, self.parameters.era)

    @property
    def run(self) -> Run:
        """The result so far."""
        trace = self.engine.trace
        conformance: Conformance = self.documented().check(trace)
        checked = self.integrity()
        metrics = {**common_metrics(self, conformance, checked), **self.metrics(), **self.counts}
        return Run(
            self.flow, self.scenario, self.parameters.model_dump(), metrics, trace, conformance, checked, self.machine,
            self.allocations, self.stages, self.wall_s, self.errors,
        )  # fmt: skip
