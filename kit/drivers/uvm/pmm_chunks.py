"""Chunks of one GPU's memory: 2 MiB root chunks, and the user chunks that blocks own inside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from kit.drivers.uvm.types import BLOCK_PAGES, VaBlock

__all__ = ["Chunk", "RootChunk", "first_owner", "pinned"]


@dataclass(eq=False)
class RootChunk:
    """One 2 MiB chunk: which blocks own parts of it, and what its memory holds."""

    index: int
    zeroed: bool
    owners: dict[int, Chunk] = field(default_factory=dict)
    pins: int = 0
    in_eviction: bool = False
    tracker: float = 0.0


@dataclass(eq=False)
class Chunk:
    """A user chunk of 4 KiB, 64 KiB or 2 MiB inside a root chunk; sizes in pages."""

    root: RootChunk
    offset: int
    pages: int
    block: VaBlock | None = None
    page_index: int = 0
    zeroed: bool = False

    @property
    def frame(self) -> int:
        """First frame in the GPU's memory."""
        return self.root.index * BLOCK_PAGES + self.offset


def pinned(root: RootChunk | None) -> Chunk | None:
    """Return all of a root chunk as one chunk that cannot be evicted; None when there is none."""
    if root is None:
        return None
    root.pins += 1
    return Chunk(root, 0, BLOCK_PAGES, zeroed=root.zeroed)


def first_owner(root: RootChunk) -> VaBlock | None:
    """Return the block that owns the lowest chunk left in a root chunk, None when all are gone."""
    lowest = None
    for chunk in root.owners.values():
        if chunk.block is not None and (lowest is None or chunk.offset < lowest.offset):
            lowest = chunk
    return None if lowest is None else lowest.block
