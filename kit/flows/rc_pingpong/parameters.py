"""Parameters of rc_pingpong: its own options, and what the kit adds."""

from __future__ import annotations

from typing import ClassVar

from kit.errors import ParameterError
from kit.flows.parameters import parameter
from kit.flows.rdma.parameters import RdmaParameters

__all__ = ["PingpongParameters"]


class PingpongParameters(RdmaParameters):
    """Everything that a scenario of this flow may set; names in brackets are the program's options."""

    flow: ClassVar[str] = "rc_pingpong"

    odp: bool = parameter(False, "register the buffer for on-demand paging (-o)", documented="--odp")
    iodp: bool = parameter(
        False, "register the whole address space for on-demand paging; implies odp (-O)", documented="--iodp"
    )
    prefetch: bool = parameter(False, "ask for the pages before the first message (-P)", documented="--prefetch")
    chk: bool = parameter(False, "check the received buffer (-c)", documented="--chk")
    size: int = parameter(4096, "size of a message (-s)", unit="B", documented="--size", ge=1, le=1 << 31)
    iters: int = parameter(1000, "round trips (-n)", documented="--iters", ge=1, le=1_000_000)
    rx_depth: int = parameter(500, "receives that are posted at a time (-r)", documented="--rx-depth", ge=2, le=32768)
    max_inline_data: int = parameter(
        60, "bytes that the queue pair takes into the work request itself", unit="B", group="Transport", ge=0, le=1024
    )
    page_out: str = parameter(
        "none", "how the server's buffer leaves memory now and then", group="Memory",
        choices=("none", "madvise", "reclaim"),
    )  # fmt: skip
    page_out_every: int = parameter(100, "round trips from one page-out to the next", group="Memory", ge=1)

    def contradictions(self) -> None:
        """Raise what the program itself refuses, in its words."""
        super().contradictions()
        if self.prefetch and not (self.odp or self.iodp):
            raise ParameterError(
                "prefetch", True, "False without odp (prefetch is valid only with on-demand memory region)"
            )
