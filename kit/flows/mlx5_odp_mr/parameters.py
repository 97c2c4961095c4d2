"""Parameters of the flow that puts pinned, explicit and implicit registration side by side."""

from __future__ import annotations

from typing import ClassVar

from kit.errors import ParameterError
from kit.flows.parameters import parameter
from kit.flows.rdma.parameters import MIB, PAGE_OUTS, RdmaParameters

__all__ = ["KINDS", "OdpMrParameters"]

KINDS = ("pinned", "explicit", "implicit")
HUGE = 2 * MIB


class OdpMrParameters(RdmaParameters):
    """Everything that a scenario of this flow may set."""

    flow: ClassVar[str] = "mlx5_odp_mr"

    kind: str = parameter("all", "kind of memory region; all: one after the other", choices=("all", *KINDS))
    regions: int = parameter(1, "regions that are registered, each over a buffer of its own", ge=1, le=100_000)
    bytes: int = parameter(4 * MIB, "size of each buffer", unit="B", ge=1, le=1 << 40)
    pages: str = parameter(
        "small", "pages behind the buffer: 4 KiB, transparent huge ones, or hugetlb with IB_ACCESS_HUGETLB",
        choices=("small", "transparent", "hugetlb"),
    )  # fmt: skip
    resident: str = parameter(
        "none",
        "which pages the CPU has written before registration; first: one in each buffer",
        choices=("none", "first", "half", "all"),
    )
    prefetch: str = parameter(
        "none", "ibv_advise_mr after registration (not for pinned regions)",
        choices=("none", "prefetch", "prefetch_write", "no_fault"),
    )  # fmt: skip
    flush: bool = parameter(True, "the advice waits until it is done")
    operation: str = parameter("write", "what the requester does", choices=("write", "read", "none"))
    message_bytes: int = parameter(4 * MIB, "size of a message", unit="B", ge=1, le=1 << 31)
    touch_share: float = parameter(1.0, "share of each buffer that messages cover, from its start", ge=0, le=1)
    page_out: str = parameter(
        "reclaim",
        "how pages leave afterwards: MADV_DONTNEED, the same and the CPU writes them anew, MADV_PAGEOUT, munmap",
        group="Memory",
        choices=PAGE_OUTS,
    )  # fmt: skip
    page_out_share: float = parameter(
        1.0, "share of the buffer that is to leave, from its start", group="Memory", ge=0, le=1
    )
    again: bool = parameter(True, "send the messages a second time after the page-out")
    memlock_bytes: int = parameter(
        0, "RLIMIT_MEMLOCK of the program, 0: unlimited", unit="B", group="Memory", ge=0, documented="RLIMIT_MEMLOCK"
    )

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        super().contradictions()
        if self.bytes % 4096:
            raise ParameterError("bytes", self.bytes, "a multiple of 4096")
        if self.pages == "hugetlb" and self.kind in ("all", "implicit"):
            raise ParameterError("pages", self.pages, "small or transparent: implicit regions refuse IB_ACCESS_HUGETLB")
        if self.pages == "hugetlb" and self.bytes % HUGE:
            raise ParameterError("bytes", self.bytes, f"a multiple of {HUGE} with hugetlb pages")
        if self.page_out == "munmap" and self.again:
            raise ParameterError("again", True, "False with page_out = munmap: the addresses are gone")
