"""core/umem_dmabuf.c: memory that another driver exports as a dma-buf: attaching, mapping, giving it up."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING

from kit.drivers.mlx5.enums import PAGE_SHIFT, U64_MAX, Era
from kit.drivers.mlx5.umem.umem import IbUmem, ib_access_writable
from kit.errors import Errno
from kit.memory.device.dma_buf import (
    DmaBufAttachment,
    DmaBufAttachOps,
    SgTable,
    dma_buf_detach,
    dma_buf_dynamic_attach,
    dma_buf_get,
    dma_buf_map_attachment,
    dma_buf_pin,
    dma_buf_put,
    dma_buf_unmap_attachment,
    dma_buf_unpin,
)
from kit.memory.device.dma_resv import DMA_RESV_USAGE_KERNEL, DmaResv, dma_resv_wait_timeout
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.drivers.mlx5.device import Mlx5IbDev
    from kit.drivers.mlx5.objects import Mlx5IbMr
    from kit.memory.space.mm import Mm

__all__ = [
    "IbUmemDmabuf", "ib_umem_dmabuf_get", "ib_umem_dmabuf_get_pinned", "ib_umem_dmabuf_map_pages",
    "ib_umem_dmabuf_release", "ib_umem_dmabuf_revoke", "ib_umem_dmabuf_unmap_pages",
]  # fmt: skip


@dataclass(eq=False)
class IbUmemDmabuf(IbUmem):
    """Struct ib_umem_dmabuf.

    Attributes
    ----------
    address : int
        Offset in the buffer, bytes; ``dma`` are the addresses of the region's part of it, empty while not mapped.
    iova : int
        What the region's first byte is to the hardware.
    attach : DmaBufAttachment
    sgt : SgTable or None
        The mapping of the whole buffer, under its reservation.
    private : Mlx5IbMr or None
    pinned, revoked : bool
    """

    is_dmabuf: bool = True
    iova: int = 0
    attach: DmaBufAttachment | None = None
    sgt: SgTable | None = None
    private: Mlx5IbMr | None = None
    pinned: bool = False
    revoked: bool = False

    @property
    def attached(self) -> DmaBufAttachment:
        """Its attachment, which it has from the start."""
        assert self.attach is not None
        return self.attach

    @property
    def resv(self) -> DmaResv:
        """The buffer's reservation."""
        return self.attached.dmabuf.resv


@waiting_step
def ib_umem_dmabuf_get(
    dev: Mlx5IbDev, thread: Thread, mm: Mm, offset: int, size: int, fd: int, access: int, ops: DmaBufAttachOps
) -> Wait:  # fmt: skip
    """Attach to part of the buffer behind a descriptor; nothing is mapped yet; IbUmemDmabuf or an errno."""
    name = "ib_umem_dmabuf_get"
    if offset + size > U64_MAX:
        return Errno(EINVAL, name, f"{size} bytes from {offset:#x} wrap around")
    if ops.move_notify is None:
        return Errno(EINVAL, name, "no move_notify")
    dmabuf = dma_buf_get(fd, thread, mm)
    if isinstance(dmabuf, Errno):
        return dmabuf
    umem = IbUmemDmabuf(dev, offset, size, ib_access_writable(access), mm)
    ret = 0
    if dmabuf.size < offset + size:
        ret = Errno(EINVAL, name, f"{size} bytes from {offset:#x} in a buffer of {dmabuf.size}")
    elif not umem.num_pages():
        ret = Errno(EINVAL, name, "no page")
    else:
        attach = yield from dma_buf_dynamic_attach(dmabuf, thread, dev.hca.dma, ops, umem)
        if not isinstance(attach, Errno):
            umem.attach = attach
            return umem
        ret = attach
    dma_buf_put(dmabuf, thread)
    return ret


@waiting_step
def ib_umem_dmabuf_map_pages(umem_dmabuf: IbUmemDmabuf, thread: Thread) -> Wait:
    """Map the buffer, unless it is mapped, cut the region's part out, and wait for its content; 0 or an errno."""
    umem_dmabuf.resv.assert_held(thread)
    if umem_dmabuf.revoked:
        return Errno(EINVAL, "ib_umem_dmabuf_map_pages", "the mapping was revoked")
    if umem_dmabuf.sgt is None:
        sgt = yield from dma_buf_map_attachment(umem_dmabuf.attached, thread)
        if isinstance(sgt, Errno):
            return sgt
        first = umem_dmabuf.address >> PAGE_SHIFT
        umem_dmabuf.dma = sgt.dma[first : first + umem_dmabuf.num_pages()]
        umem_dmabuf.sgt = sgt
        thread.note(pages=len(umem_dmabuf.dma))
    # What the addresses name may be still on its way there.
    yield from dma_resv_wait_timeout(umem_dmabuf.resv, thread, DMA_RESV_USAGE_KERNEL)
    return 0


@step
def ib_umem_dmabuf_unmap_pages(umem_dmabuf: IbUmemDmabuf, thread: Thread) -> None:
    """Give the mapping up, if there is one."""
    umem_dmabuf.resv.assert_held(thread)
    if umem_dmabuf.sgt is None:
        return
    umem_dmabuf.dma = umem_dmabuf.dma[:0]
    dma_buf_unmap_attachment(umem_dmabuf.attached, thread, umem_dmabuf.sgt)
    umem_dmabuf.sgt = None


def _unsupported(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """A pinned buffer is not moved: the kernel only warns (ib_umem_dmabuf_unsupported_move_notify)."""
    thread.note(status="move_notify of pinned memory")
    yield from ()


ib_umem_dmabuf_attach_pinned_ops = DmaBufAttachOps(move_notify=_unsupported, allow_peer2peer=True)


@waiting_step
def ib_umem_dmabuf_get_pinned(
    dev: Mlx5IbDev, thread: Thread, mm: Mm, offset: int, size: int, fd: int, access: int
) -> Wait:  # fmt: skip
    """Attach, pin and map at once, for who cannot follow a move: raw DevX memory; IbUmemDmabuf or an errno."""
    umem_dmabuf = yield from ib_umem_dmabuf_get(
        dev, thread, mm, offset, size, fd, access, ib_umem_dmabuf_attach_pinned_ops
    )
    if isinstance(umem_dmabuf, Errno):
        return umem_dmabuf
    yield from umem_dmabuf.resv.lock(thread)
    err = yield from dma_buf_pin(umem_dmabuf.attached, thread)
    if not err:
        umem_dmabuf.pinned = True
        err = yield from ib_umem_dmabuf_map_pages(umem_dmabuf, thread)
    yield from umem_dmabuf.resv.unlock(thread)
    if err:
        yield from ib_umem_dmabuf_release(umem_dmabuf, thread)
        return err
    return umem_dmabuf


@waiting_step
def ib_umem_dmabuf_release(umem_dmabuf: IbUmemDmabuf, thread: Thread) -> Wait:
    """Unmap, unpin, detach, and give the buffer up."""
    dmabuf = umem_dmabuf.attached.dmabuf
    if umem_dmabuf.ibdev.era == Era.NEW:
        yield from ib_umem_dmabuf_revoke(umem_dmabuf, thread)
    else:
        yield from umem_dmabuf.resv.lock(thread)
        _give_up(umem_dmabuf, thread)
        yield from umem_dmabuf.resv.unlock(thread)
    yield from dma_buf_detach(dmabuf, thread, umem_dmabuf.attached)
    dma_buf_put(dmabuf, thread)


def _give_up(umem_dmabuf: IbUmemDmabuf, thread: Thread) -> None:
    ib_umem_dmabuf_unmap_pages(umem_dmabuf, thread)
    if umem_dmabuf.pinned:
        dma_buf_unpin(umem_dmabuf.attached, thread)
        umem_dmabuf.pinned = False


@waiting_step
def ib_umem_dmabuf_revoke(umem_dmabuf: IbUmemDmabuf, thread: Thread) -> Wait:
    """Unmap and unpin for good (core/umem_dmabuf.c @ 7.0)."""
    yield from umem_dmabuf.resv.lock(thread)
    if not umem_dmabuf.revoked:
        _give_up(umem_dmabuf, thread)
        umem_dmabuf.revoked = True
    yield from umem_dmabuf.resv.unlock(thread)
