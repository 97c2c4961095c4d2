"""Parameters of the flow in which RDMA follows pages that somebody else moves."""

from __future__ import annotations

from typing import ClassVar

from kit.errors import ParameterError
from kit.flows.parameters import parameter
from kit.flows.rdma.parameters import KIB, RdmaParameters

__all__ = ["FollowsParameters"]

PAGE = 4096


class FollowsParameters(RdmaParameters):
    """Everything that a scenario of this flow may set."""

    flow: ClassVar[str] = "rdma_follows_migration"

    mover: str = parameter(
        "gpu", "who owns the mapping and moves the pages: a GPU's driver, or the file system of a mapped file",
        choices=("gpu", "file_system"),
    )  # fmt: skip
    kind: str = parameter(
        "explicit", "kind of memory region over the buffer", choices=("explicit", "implicit", "pinned")
    )
    bytes: int = parameter(64 * KIB, "size of the buffer", unit="B", ge=PAGE, le=1 << 32)
    message_bytes: int = parameter(16 * KIB, "size of a message", unit="B", ge=1, le=1 << 31)
    operation: str = parameter("write", "what the requester does", choices=("write", "read", "mixed"))
    read_share: float = parameter(0.5, "share of READs in a mixed run", ge=0, le=1)
    rounds: int = parameter(2, "moves of the whole buffer, each followed by the messages", ge=1, le=1000)
    move_when: str = parameter(
        "between", "when pages move: between messages, or while they are under way", choices=("between", "during")
    )
    gpu_writes: bool = parameter(True, "the GPU changes every page that it got", programs=("gpu",))
    gpu_memory_bytes: int = parameter(
        64 << 20, "memory of the GPU", unit="B", group="Memory", ge=2 << 20, le=1 << 36, programs=("gpu",)
    )
    notifiers: bool = parameter(
        True, "tell drivers before the page table changes (MMU notifiers); off: a broken kernel",
        group="Memory",
    )  # fmt: skip
    qps: int = parameter(1, "queue pairs over which the messages are spread", ge=1, le=256)
    depth: int = parameter(1, "messages that a queue pair has under way at a time", ge=1, le=1024)

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        super().contradictions()
        if self.bytes % PAGE:
            raise ParameterError("bytes", self.bytes, f"a multiple of {PAGE}")
        if self.mover == "gpu" and self.gpu_memory_bytes < self.bytes:
            raise ParameterError("gpu_memory_bytes", self.gpu_memory_bytes, f"at least bytes = {self.bytes}")
