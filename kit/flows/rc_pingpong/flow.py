"""rc_pingpong: the example program of libibverbs, pinned or on demand, on two hosts."""

from __future__ import annotations

from collections.abc import Callable

from kit.flows.rc_pingpong.parameters import PingpongParameters
from kit.flows.rc_pingpong.session import STAGES, PingpongSession
from kit.flows.run import Run

__all__ = ["FLOW", "RcPingpong"]


class RcPingpong:
    """The flow as the registry sees it."""

    name = "rc_pingpong"
    title = "rc_pingpong: two hosts send a buffer to and fro, pinned or on demand"
    Parameters = PingpongParameters
    stages = STAGES

    def open(self, parameters: PingpongParameters, scenario: str = "") -> PingpongSession:
        """Return the flow as an object with one method a stage."""
        return PingpongSession(parameters, scenario)

    def run(
        self, parameters: PingpongParameters, scenario: str = "", progress: Callable[[float, str], None] | None = None
    ) -> Run:
        """Run every stage."""
        return PingpongSession(parameters, scenario).finish(progress)


FLOW = RcPingpong()
