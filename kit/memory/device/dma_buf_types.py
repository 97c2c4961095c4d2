"""What exporters and importers of dma-bufs hand each other (include/linux/dma-buf.h @ 6.9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.dma_resv import DmaResv

if TYPE_CHECKING:
    from kit.sim.engine import Thread, Wait

__all__ = ["DmaBuf", "DmaBufAttachOps", "DmaBufAttachment", "DmaBufOps", "DmaMapper", "SgTable"]


class DmaMapper(Protocol):
    """A device that DMA addresses are made for (struct device, as the DMA API sees it)."""

    def map_pages(self, pfns: NDArray[np.integer], order: int = 0) -> NDArray[np.uint64] | None:
        """Return an address for each page, or None."""
        ...

    def unmap_pages(self, addresses: NDArray[np.uint64], order: int = 0) -> None:
        """Take addresses back."""
        ...


@dataclass(eq=False)
class SgTable:
    """A mapping of a whole buffer for one device (struct sg_table): an address for each 4 KiB page, in order."""

    dma: NDArray[np.uint64]


@dataclass(frozen=True)
class DmaBufOps:
    """What an exporter does (struct dma_buf_ops); with `pin` and `unpin` it can move the buffer otherwise.

    Attributes
    ----------
    attach : callable (dmabuf, thread, attach) -> int, optional
    detach : callable (dmabuf, thread, attach), optional
    pin : callable (attach, thread) -> Wait of int, optional
    unpin : callable (attach, thread), optional
    map_dma_buf : callable (attach, thread) -> Wait of SgTable or Errno
    unmap_dma_buf : callable (attach, thread, sgt)
    release : callable (dmabuf)
    """

    map_dma_buf: Callable[[DmaBufAttachment, Thread], Wait]
    unmap_dma_buf: Callable[[DmaBufAttachment, Thread, SgTable], None]
    release: Callable[[DmaBuf], None]
    attach: Callable[[DmaBuf, Thread, DmaBufAttachment], int] | None = None
    detach: Callable[[DmaBuf, Thread, DmaBufAttachment], None] | None = None
    pin: Callable[[DmaBufAttachment, Thread], Wait] | None = None
    unpin: Callable[[DmaBufAttachment, Thread], None] | None = None


@dataclass(frozen=True)
class DmaBufAttachOps:
    """What a dynamic importer does (struct dma_buf_attach_ops).

    Attributes
    ----------
    allow_peer2peer : bool
        It can use memory of another device that has no struct page.
    move_notify : callable (attach, thread) -> Wait, or None
        Give the mapping up; the reservation is held.
    """

    move_notify: Callable[[DmaBufAttachment, Thread], Wait] | None
    allow_peer2peer: bool = False


@dataclass(eq=False)
class DmaBuf:
    """Struct dma_buf, and the file that stands for it.

    Attributes
    ----------
    size : int
        Bytes.
    priv : object
        The exporter's.
    config_move_notify : bool
        CONFIG_DMABUF_MOVE_NOTIFY; without it whoever maps the buffer pins it.
    references : int
        Of the file: descriptors, and importers.
    """

    size: int
    ops: DmaBufOps
    priv: Any
    resv: DmaResv = field(default_factory=DmaResv)
    config_move_notify: bool = True
    attachments: list[DmaBufAttachment] = field(default_factory=list)
    references: int = 1

    @property
    def is_dynamic(self) -> bool:
        """Whether the exporter moves it unless told not to (dma_buf_is_dynamic)."""
        return self.ops.pin is not None


@dataclass(eq=False)
class DmaBufAttachment:
    """Struct dma_buf_attachment: one device's use of a buffer.

    Attributes
    ----------
    peer2peer : bool
        The importer allows it, and the exporter has not found it impossible.
    sgt : SgTable or None
        The mapping, where importer or exporter needs one that stays.
    """

    dmabuf: DmaBuf
    dev: DmaMapper
    importer_ops: DmaBufAttachOps | None
    importer_priv: Any
    peer2peer: bool = False
    sgt: SgTable | None = None

    @property
    def is_dynamic(self) -> bool:
        """Whether its importer can do without a mapping (dma_buf_attachment_is_dynamic)."""
        return self.importer_ops is not None
