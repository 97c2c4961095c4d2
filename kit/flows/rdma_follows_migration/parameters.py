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
    chooser: ClassVar[str] = "mover"

    mover: str = parameter(
        "gpu",
        "who moves the pages: a GPU's driver, the file system of a mapped file, or a GPU's driver with a dma-buf",
        choices=("gpu", "file_system", "dma_buf"),
    )  # fmt: skip
    kind: str = parameter(
        "explicit", "kind of memory region over the buffer; over a dma-buf there is only one",
        choices=("explicit", "implicit", "pinned"),
    )  # fmt: skip
    bytes: int = parameter(64 * KIB, "size of the buffer", unit="B", ge=PAGE, le=1 << 32)
    message_bytes: int = parameter(16 * KIB, "size of a message", unit="B", ge=1, le=1 << 31)
    operation: str = parameter("write", "what the requester does", choices=("write", "read", "mixed"))
    read_share: float = parameter(0.5, "share of READs in a mixed run", ge=0, le=1)
    rounds: int = parameter(2, "moves of the whole buffer, each followed by the messages", ge=1, le=1000)
    move_when: str = parameter(
        "between", "when pages move: between messages, or while they are under way", choices=("between", "during")
    )
    gpu_writes: bool = parameter(True, "the GPU changes every page that it got", programs=("gpu", "dma_buf"))
    gpu_memory_bytes: int = parameter(
        64 << 20, "memory of the GPU", unit="B", group="Memory", ge=2 << 20, le=1 << 36,
        programs=("gpu", "dma_buf"),
    )  # fmt: skip
    peer_to_peer: bool = parameter(
        True, "the adapter reaches the GPU's own memory over PCIe; off: a buffer has to come to host memory for it",
        group="Memory", documented="allow_peer2peer", programs=("dma_buf",),
    )  # fmt: skip
    move_notify: bool = parameter(
        True, "the kernel tells importers that a dma-buf moves; off: it pins what they map", group="Memory",
        documented="CONFIG_DMABUF_MOVE_NOTIFY", programs=("dma_buf",),
    )  # fmt: skip
    notifiers: bool = parameter(
        True, "tell drivers before pages move (MMU notifiers, move_notify); off: a broken kernel",
        group="Memory",
    )  # fmt: skip
    qps: int = parameter(1, "queue pairs over which the messages are spread", ge=1, le=256)
    depth: int = parameter(1, "messages that a queue pair has under way at a time", ge=1, le=1024)

    def contradictions(self) -> None:
        """Raise when parameters that are fine alone do not go together."""
        super().contradictions()
        if self.bytes % PAGE:
            raise ParameterError("bytes", self.bytes, f"a multiple of {PAGE}")
        if self.mover == "dma_buf" and self.kind != "explicit":
            raise ParameterError(
                "kind", self.kind, "left alone with mover = dma_buf: its region is of a kind of its own"
            )
        if self.mover == "dma_buf" and self.era == "old":
            raise ParameterError("era", self.era, "mid or new with mover = dma_buf: 5.12 is the first to register one")
        if self.mover != "file_system" and self.gpu_memory_bytes < self.bytes:
            raise ParameterError("gpu_memory_bytes", self.gpu_memory_bytes, f"at least bytes = {self.bytes}")
