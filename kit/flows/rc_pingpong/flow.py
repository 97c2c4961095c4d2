"""rc_pingpong: the example program of libibverbs, pinned or on demand, on two hosts."""

from __future__ import annotations

from kit.flows.rc_pingpong.parameters import PingpongParameters
from kit.flows.rc_pingpong.session import STAGES, PingpongSession
from kit.flows.session import StagedFlow

__all__ = ["FLOW"]

FLOW = StagedFlow(
    "rc_pingpong: two hosts send a buffer to and fro, pinned or on demand", PingpongParameters, PingpongSession, STAGES
)
