"""Parameters of the implicit memory region's flow."""

from __future__ import annotations

from typing import ClassVar

from kit.errors import ParameterError
from kit.flows.parameters import parameter
from kit.flows.rdma.parameters import KIB, MIB, PAGE_OUTS, PATTERNS, RdmaParameters

__all__ = ["ImplicitParameters"]

PAGE = 4096
TASK_SIZE = 1 << 47


class ImplicitParameters(RdmaParameters):
    """Everything that a scenario of this flow may set."""

    flow: ClassVar[str] = "mlx5_implicit_mr"

    areas: int = parameter(1, "areas of memory that the responder's program maps", ge=1, le=4096)
    area_address: int = parameter(5 << 30, "where the first area starts", unit="B", ge=1 << 20, le=TASK_SIZE - 1)
    area_stride: int = parameter(1 << 30, "from the start of one area to that of the next", unit="B", ge=PAGE)
    area_bytes: int = parameter(16 * KIB, "size of an area", unit="B", ge=PAGE, le=1 << 40)
    first_page: int = parameter(1, "page of each area at which the messages start", unit="pages", ge=0)
    touch_pages: int = parameter(2, "pages of each area that the messages cover", unit="pages", ge=1)
    message_bytes: int = parameter(8 * KIB, "size of a message", unit="B", ge=1, le=1 << 31)
    operation: str = parameter("write", "what the requester does", choices=("write", "read", "mixed"))
    read_share: float = parameter(0.5, "share of READs in a mixed run", ge=0, le=1)
    pattern: str = parameter("sequential", "order of the messages in an area", choices=PATTERNS)
    rounds: int = parameter(2, "how often every message is sent; pages go out in between", ge=1, le=1000)
    qps: int = parameter(1, "queue pairs over which the messages are spread", ge=1, le=256)
    depth: int = parameter(1, "messages that a queue pair has under way at a time", ge=1, le=1024)
    resident: str = parameter(
        "none", "which pages the responder's CPU has written before anything else", choices=("none", "half", "all")
    )
    page_out: str = parameter(
        "madvise",
        "how pages leave between rounds: MADV_DONTNEED, the same and the CPU writes them anew, MADV_PAGEOUT, munmap",
        group="Memory",
        choices=PAGE_OUTS,
    )  # fmt: skip
    page_out_pattern: str = parameter(
        "all", "which of the touched pages leave", group="Memory", choices=("all", "alternate", "first_half", "random")
    )
    page_out_when: str = parameter(
        "between", "when: between rounds, or while messages are under way", group="Memory",
        choices=("between", "during"),
    )  # fmt: skip
    deregister: bool = parameter(True, "call ibv_dereg_mr at the end")

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        super().contradictions()
        for name in ("area_address", "area_stride", "area_bytes"):
            if getattr(self, name) % PAGE:
                raise ParameterError(name, getattr(self, name), f"a multiple of {PAGE}")
        if self.areas > 1 and self.area_stride < self.area_bytes:
            raise ParameterError("area_stride", self.area_stride, f"at least area_bytes = {self.area_bytes}")
        end = self.area_address + (self.areas - 1) * self.area_stride + self.area_bytes
        if end > TASK_SIZE - MIB:
            raise ParameterError("areas", self.areas, f"areas that end below {TASK_SIZE - MIB}; these end at {end}")
        if (self.first_page + self.touch_pages) * PAGE > self.area_bytes:
            most = self.area_bytes // PAGE - self.first_page
            raise ParameterError("touch_pages", self.touch_pages, f"at most {most}: first_page and area_bytes say so")
