"""A session: rc_pingpong on two hosts, from start to end, stage by stage."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import simpy

from kit.errors import DriverError
from kit.flows.rc_pingpong.libibverbs import Pingpong
from kit.flows.rc_pingpong.parameters import PingpongParameters
from kit.flows.rc_pingpong.program import main
from kit.flows.rdma.content import Area, add_up
from kit.flows.rdma.hosts import probe
from kit.flows.rdma.pressure import page_out
from kit.flows.rdma.session import RdmaSession
from kit.flows.rdma.stale import is_pinned, stale_pages
from kit.flows.run import Allocation, Integrity
from kit.sim.engine import Thread, Wait

__all__ = ["STAGES", "PingpongSession"]

STAGES = ("load_module", "start", "messages", "end")
GATES = ("messages", "end")


class PingpongSession(RdmaSession):
    """The flow as an object with one method a stage. The requester is the client, the responder the server."""

    stages_of = STAGES
    parameters: PingpongParameters

    def __init__(self, parameters: PingpongParameters, scenario: str = "") -> None:
        super().__init__(parameters, scenario)
        env = self.engine.env
        self.client = Pingpong(self.requester, False, parameters)
        self.server = Pingpong(self.responder, True, parameters)
        self.client.other, self.server.other = self.server, self.client
        for side in (self.client, self.server):
            side.here, side.connected, side.between = env.event(), env.event(), self._between
            side.gates = {name: env.event() for name in GATES}
            side.reached = {name: env.event() for name in GATES}
        self._running: list[simpy.Process] = []
        self._ended = False
        self.detected = 0  # pages of the server's pinned buffer that its addresses no longer name

    def load_module(self) -> Self:
        """Load the module on both hosts."""
        return self.stage("load_module")

    def start(self) -> Self:
        """Start both programs: devices opened, buffers filled and registered, queue pairs connected."""
        return self.stage("start")

    def messages(self) -> Self:
        """The round trips."""
        return self.stage("messages")

    def end(self) -> Self:
        """Both programs give everything back."""
        return self.stage("end")

    # -- stages ----------------------------------------------------------------------------------------------------

    def _load_module(self) -> Wait:
        for host in self.hosts:
            yield from probe(host)

    def _start(self) -> Wait:
        for side in (self.server, self.client):
            thread = side.host.engine.thread("program")
            self._running.append(self.engine.env.process(self._side(side, thread)))
        yield from self._until("messages")
        for side in (self.client, self.server):
            if side.area is not None:
                size = side.area.pages * 4096
                self.allocations.append(Allocation("server buffer" if side.server else "client buffer", side.buf, size))
        self.allocations = self.allocations[-1:]
        self.arm(self.responder)

    def _messages(self) -> Wait:
        yield from self._open_gate("messages")
        yield from self._until("end")

    def _end(self) -> Wait:
        yield from self._open_gate("end")
        if self._ended:
            yield from self.engine.quiet()
            for process in self._running:
                if process.is_alive:
                    process.interrupt("it polls for a message that cannot come any more, until somebody stops it")
        yield simpy.AllOf(self.engine.env, self._running)

    def _side(self, side: Pingpong, thread: Thread) -> Wait:
        """Run one side; when a program gives up, the other one is no longer waited for at the gates."""
        try:
            yield from main(side, thread)
        except simpy.Interrupt as stopped:
            self.errors.append(f"{'server' if side.server else 'client'}: {stopped.cause}")
        except DriverError as wrong:
            self.errors.append(f"{'server' if side.server else 'client'}: {wrong}")
            self._ended = True
            for each in (self.client, self.server):
                for event in (*each.reached.values(), each.here, each.connected):
                    if not event.triggered:
                        event.succeed()

    def _until(self, gate: str) -> Wait:
        yield simpy.AllOf(self.engine.env, [side.reached[gate] for side in (self.client, self.server)])

    def _open_gate(self, gate: str) -> Wait:
        for side in (self.client, self.server):
            side.gates[gate].succeed()
        yield from ()

    def _between(self, side: Pingpong, thread: Thread) -> Wait:
        """Let the server's buffer leave memory now and then, behind the program's back."""
        p, area = self.parameters, side.area
        if not side.server or p.page_out == "none" or area is None:
            return
        self._look(side, area)
        if (side.rcnt + 1) % p.page_out_every:
            return
        other = side.host.engine.thread("memory pressure")
        other.now = thread.now
        yield from page_out(side.host, other, p.page_out, area, np.arange(area.pages))
        thread.now = max(thread.now, other.now)

    def _look(self, side: Pingpong, area: Area) -> None:
        """Say, once, that messages come to pages that the buffer's addresses no longer name."""
        if self.detected or not is_pinned(side.mr):
            return
        self.detected = stale_pages(side.host, side.mr, area, side.buf, self.parameters.size)
        if self.detected:
            self.report_stale(side.host, "messages to", side.buf, self.detected)

    # -- the result --------------------------------------------------------------------------------------------------

    def integrity(self) -> Integrity:
        """Compare both buffers with what the last message left in them."""
        sides = (self.client, self.server)
        return add_up(side.area.check(side.host.mm) for side in sides if side.area is not None)

    def own_metrics(self) -> dict[str, float]:
        """Return what the program prints, as numbers."""
        p, client = self.parameters, self.client
        found: dict[str, float] = {"round_trips": client.rcnt, "inline": float(client.inline)}
        elapsed = client.end - client.start
        if elapsed > 0:
            found["elapsed_us"], found["us_per_iter"] = elapsed, elapsed / p.iters
            found["mbit_per_s"] = p.size * p.iters * 2 * 8 / elapsed
        found["messages"] = client.sent + self.server.sent
        return found

    def printed(self) -> str:
        """Return what the client prints at its end, in the program's words."""
        p, m = self.parameters, self.own_metrics()
        if "elapsed_us" not in m:
            return "".join(f"{line}\n" for line in [*self.client.printed, *self.errors])
        seconds, nbytes = m["elapsed_us"] / 1e6, p.size * p.iters * 2
        lines: list[Any] = [
            *self.client.printed,
            f"{nbytes} bytes in {seconds:.2f} seconds = {m['mbit_per_s']:.2f} Mbit/sec",
            f"{p.iters} iters in {seconds:.2f} seconds = {m['us_per_iter']:.2f} usec/iter",
        ]
        return "".join(f"{line}\n" for line in lines)
