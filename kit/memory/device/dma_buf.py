"""Buffers that one driver exports and others import: attaching, mapping, and telling importers of a move.

An importer that can do without its mappings for a while (a dynamic one) gives ``move_notify``; the exporter then may
move the buffer whenever it likes. For any other importer the buffer is pinned while it is attached. All of
drivers/dma-buf/dma-buf.c @ 6.9.
"""

from __future__ import annotations

from errno import EBADF, EINVAL
from typing import TYPE_CHECKING, Any

from kit.errors import Errno
from kit.memory.device.dma_buf_types import DmaBuf, DmaBufAttachment, DmaBufAttachOps, DmaBufOps, DmaMapper, SgTable
from kit.memory.device.dma_resv import DMA_RESV_USAGE_KERNEL, DmaResv, dma_resv_wait_timeout
from kit.sim.trace import step, waiting_step

if TYPE_CHECKING:
    from kit.memory.space.mm import Mm
    from kit.sim.engine import Thread, Wait

__all__ = [
    "DmaBuf", "DmaBufAttachOps", "DmaBufAttachment", "DmaBufOps", "DmaMapper", "SgTable", "close_fd",
    "dma_buf_detach", "dma_buf_dynamic_attach", "dma_buf_export", "dma_buf_fd", "dma_buf_get",
    "dma_buf_map_attachment", "dma_buf_move_notify", "dma_buf_pin", "dma_buf_put", "dma_buf_unmap_attachment",
    "dma_buf_unpin",
]  # fmt: skip

FIRST_FD = 3  # after standard input, output and error


@step
def dma_buf_export(ops: DmaBufOps, thread: Thread, size: int, priv: Any, resv: DmaResv | None = None) -> DmaBuf | Errno:
    """Make a buffer of what a driver has; its first reference is the caller's (dma-buf.c)."""
    if (ops.pin is None) != (ops.unpin is None):
        return Errno(EINVAL, "dma_buf_export", "pin without unpin, or the other way round")
    thread.note(bytes=size)
    return DmaBuf(size, ops, priv, resv or DmaResv())


@step
def dma_buf_fd(dmabuf: DmaBuf, thread: Thread, mm: Mm) -> int:
    """Give the process that owns `mm` a descriptor, which takes the caller's reference over (dma-buf.c)."""
    fd = next(number for number in range(FIRST_FD, FIRST_FD + len(mm.files) + 1) if number not in mm.files)
    mm.files[fd] = dmabuf
    return fd


def close_fd(mm: Mm, fd: int) -> int:
    """close(2): the process gives its reference up; returns 0 or -EBADF."""
    file = mm.files.pop(fd, None)
    if file is None:
        return Errno(EBADF, "close", f"descriptor {fd}")
    if isinstance(file, DmaBuf):
        _fput(file)
    return 0


@step
def dma_buf_get(fd: int, thread: Thread, mm: Mm) -> DmaBuf | Errno:
    """Find a process's buffer by its descriptor, and take a reference (dma-buf.c)."""
    file = mm.files.get(fd)
    if file is None:
        return Errno(EBADF, "dma_buf_get", f"descriptor {fd} is not open")
    if not isinstance(file, DmaBuf):
        return Errno(EINVAL, "dma_buf_get", f"descriptor {fd} is no dma-buf")
    file.references += 1
    return file


@step
def dma_buf_put(dmabuf: DmaBuf, thread: Thread) -> None:
    """Give a reference up; with the last one the exporter gets its buffer back (dma-buf.c)."""
    _fput(dmabuf)


def _fput(dmabuf: DmaBuf) -> None:
    dmabuf.references -= 1
    if not dmabuf.references:
        dmabuf.ops.release(dmabuf)


@waiting_step
def dma_buf_dynamic_attach(
    dmabuf: DmaBuf, thread: Thread, dev: DmaMapper, importer_ops: DmaBufAttachOps | None, importer_priv: Any
) -> Wait:
    """Let a device use the buffer; return the DmaBufAttachment or an errno (dma-buf.c).

    Where only one side can deal with moves, the buffer is pinned and mapped now, for as long as it is attached.
    """
    if importer_ops is not None and importer_ops.move_notify is None:
        return Errno(EINVAL, "dma_buf_dynamic_attach", "a dynamic importer has to give move_notify")
    attach = DmaBufAttachment(dmabuf, dev, importer_ops, importer_priv)
    if importer_ops is not None:
        attach.peer2peer = importer_ops.allow_peer2peer
    if dmabuf.ops.attach is not None:
        ret = dmabuf.ops.attach(dmabuf, thread, attach)
        if ret:
            return ret
    yield from dmabuf.resv.lock(thread)
    dmabuf.attachments.append(attach)
    yield from dmabuf.resv.unlock(thread)
    if attach.is_dynamic != dmabuf.is_dynamic:
        yield from dmabuf.resv.lock(thread)
        sgt = yield from _map_for_good(attach, thread)
        yield from dmabuf.resv.unlock(thread)
        if isinstance(sgt, Errno):
            yield from dma_buf_detach(dmabuf, thread, attach)
            return sgt
        attach.sgt = sgt
    return attach


def _map_for_good(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """Pin, where the exporter could move the buffer, and map; return the mapping or an errno, with nothing pinned."""
    ops = attach.dmabuf.ops
    if ops.pin is not None:
        ret = yield from ops.pin(attach, thread)
        if ret:
            return ret
    sgt = yield from _map_dma_buf(attach, thread)
    if isinstance(sgt, Errno) and ops.unpin is not None:
        ops.unpin(attach, thread)
    return sgt


def _map_dma_buf(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """Have the exporter map the buffer; an importer that does not look at fences gets it with none (__map_dma_buf)."""
    dmabuf = attach.dmabuf
    sgt = yield from dmabuf.ops.map_dma_buf(attach, thread)
    if not isinstance(sgt, Errno) and not attach.is_dynamic:
        yield from dma_resv_wait_timeout(dmabuf.resv, thread, DMA_RESV_USAGE_KERNEL)
    return sgt


@waiting_step
def dma_buf_detach(dmabuf: DmaBuf, thread: Thread, attach: DmaBufAttachment) -> Wait:
    """End a device's use of the buffer (dma-buf.c)."""
    yield from dmabuf.resv.lock(thread)
    if attach.sgt is not None:
        dmabuf.ops.unmap_dma_buf(attach, thread, attach.sgt)
        attach.sgt = None
        if dmabuf.ops.unpin is not None:
            dmabuf.ops.unpin(attach, thread)
    dmabuf.attachments.remove(attach)
    yield from dmabuf.resv.unlock(thread)
    if dmabuf.ops.detach is not None:
        dmabuf.ops.detach(dmabuf, thread, attach)


@waiting_step
def dma_buf_pin(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """Keep the buffer from moving, for a dynamic importer that cannot follow for now; 0 or an errno (dma-buf.c)."""
    attach.dmabuf.resv.assert_held(thread)
    pin = attach.dmabuf.ops.pin
    return (yield from pin(attach, thread)) if pin is not None else 0


@step
def dma_buf_unpin(attach: DmaBufAttachment, thread: Thread) -> None:
    """Let the buffer move again (dma-buf.c)."""
    attach.dmabuf.resv.assert_held(thread)
    if attach.dmabuf.ops.unpin is not None:
        attach.dmabuf.ops.unpin(attach, thread)


@waiting_step
def dma_buf_map_attachment(attach: DmaBufAttachment, thread: Thread) -> Wait:
    """Map the whole buffer for the attached device; return an SgTable or an errno (dma-buf.c).

    The content may still be on its way: a dynamic importer waits for the reservation's fences before it uses it.
    """
    dmabuf = attach.dmabuf
    dmabuf.resv.assert_held(thread)
    if attach.sgt is not None:
        return attach.sgt
    if dmabuf.is_dynamic and not dmabuf.config_move_notify:
        return (yield from _map_for_good(attach, thread))
    return (yield from _map_dma_buf(attach, thread))


@step
def dma_buf_unmap_attachment(attach: DmaBufAttachment, thread: Thread, sgt: SgTable) -> None:
    """Give a mapping up (dma-buf.c)."""
    dmabuf = attach.dmabuf
    dmabuf.resv.assert_held(thread)
    if attach.sgt is sgt:
        return
    dmabuf.ops.unmap_dma_buf(attach, thread, sgt)
    if dmabuf.is_dynamic and not dmabuf.config_move_notify:
        dma_buf_unpin(attach, thread)


@waiting_step
def dma_buf_move_notify(dmabuf: DmaBuf, thread: Thread) -> Wait:
    """Have every dynamic importer give its mapping up, before the buffer moves (dma-buf.c)."""
    dmabuf.resv.assert_held(thread)
    thread.note(bytes=dmabuf.size, value=len(dmabuf.attachments))
    for attach in list(dmabuf.attachments):
        if attach.importer_ops is not None and attach.importer_ops.move_notify is not None:
            yield from attach.importer_ops.move_notify(attach, thread)
