"""The dma-buf core with an exporter of a few lines: who is told what, in which order, and who waits for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.costs import make_costs
from kit.memory.device.dma_buf import (
    DmaBuf,
    DmaBufAttachment,
    DmaBufAttachOps,
    DmaBufOps,
    SgTable,
    close_fd,
    dma_buf_detach,
    dma_buf_dynamic_attach,
    dma_buf_export,
    dma_buf_fd,
    dma_buf_get,
    dma_buf_map_attachment,
    dma_buf_move_notify,
    dma_buf_pin,
    dma_buf_put,
    dma_buf_unmap_attachment,
    dma_buf_unpin,
)
from kit.memory.device.dma_resv import (
    DMA_RESV_USAGE_KERNEL,
    DMA_RESV_USAGE_WRITE,
    DmaFence,
    dma_resv_add_fence,
    dma_resv_wait_timeout,
)
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.space.mm import Mm
from kit.sim.engine import Engine, Thread, Wait


class Device:
    """A device that nobody maps anything for: the exporter below makes its addresses up."""

    def map_pages(self, pfns: NDArray[np.integer], order: int = 0) -> NDArray[np.uint64] | None:
        raise AssertionError

    def unmap_pages(self, addresses: NDArray[np.uint64], order: int = 0) -> None:
        raise AssertionError


class Lab:
    """An exporter that writes down what it is asked for; `fails` names the calls that return -16 (-EBUSY)."""

    def __init__(self, dynamic: bool = True) -> None:
        self.engine = Engine()
        self.thread = self.engine.thread("driver")
        self.memory = PhysicalMemory(self.engine, 256)
        self.mm = Mm(self.memory, self.engine, make_costs(None))
        self.log: list[str] = []
        self.fails: set[str] = set()
        ops = DmaBufOps(
            map_dma_buf=self.map, unmap_dma_buf=lambda attach, thread, sgt: self.log.append("unmap"),
            release=lambda dmabuf: self.log.append("release"), attach=self.attached,
            detach=lambda dmabuf, thread, attach: self.log.append("detach"), pin=self.pin if dynamic else None,
            unpin=(lambda attach, thread: self.log.append("unpin")) if dynamic else None,
        )  # fmt: skip
        made = dma_buf_export(ops, self.thread, 4 << 12, self)
        assert isinstance(made, DmaBuf)
        self.buf = made

    def does(self, what: str) -> int:
        self.log.append(what)
        return Errno(16, what) if what in self.fails else 0

    def attached(self, dmabuf: DmaBuf, thread: Thread, attach: DmaBufAttachment) -> int:
        return self.does("attach")

    def pin(self, attach: DmaBufAttachment, thread: Thread) -> Wait:
        yield from thread.sync()
        return self.does("pin")

    def map(self, attach: DmaBufAttachment, thread: Thread) -> Wait:
        yield from thread.sync()
        return self.does("map") or SgTable(np.arange(4, dtype=np.uint64) << np.uint64(12))

    def run(self, process: Wait) -> Any:
        return self.engine.run(self.engine.start(process))

    def importer(self, name: str = "told", peer: bool = True) -> DmaBufAttachOps:
        def notify(attach: DmaBufAttachment, thread: Thread) -> Wait:
            attach.dmabuf.resv.assert_held(thread)
            yield from thread.sync()
            self.log.append(name)

        return DmaBufAttachOps(notify, peer)

    def attach(self, ops: DmaBufAttachOps | None) -> Any:
        return self.run(dma_buf_dynamic_attach(self.buf, self.thread, Device(), ops, None))

    def locked(self, act: Callable[[], Wait]) -> Any:
        def whole() -> Wait:
            yield from self.buf.resv.lock(self.thread)
            found = yield from act()
            yield from self.buf.resv.unlock(self.thread)
            return found

        return self.run(whole())


def test_descriptors_hold_a_buffer_and_the_last_reference_releases_it() -> None:
    lab = Lab()
    fd = dma_buf_fd(lab.buf, lab.thread, lab.mm)
    assert fd == 3 and dma_buf_get(fd, lab.thread, lab.mm) is lab.buf and lab.buf.references == 2
    assert close_fd(lab.mm, fd) == 0 and lab.log == []
    dma_buf_put(lab.buf, lab.thread)
    assert lab.log == ["release"]


def test_what_is_no_dma_buf_is_refused() -> None:
    lab = Lab()
    lab.mm.files[3] = "a text file"
    for fd, name in ((7, "EBADF"), (3, "EINVAL")):
        got = dma_buf_get(fd, lab.thread, lab.mm)
        assert isinstance(got, Errno) and got.name == name
    assert close_fd(lab.mm, 9) == -9 and dma_buf_fd(lab.buf, lab.thread, lab.mm) == 4


def test_a_dynamic_importer_attaches_without_a_mapping_and_hears_of_a_move() -> None:
    lab = Lab()
    first, second = lab.attach(lab.importer("one")), lab.attach(lab.importer("two", peer=False))
    assert (first.peer2peer, second.peer2peer) == (True, False) and lab.log == ["attach", "attach"]
    lab.locked(lambda: dma_buf_move_notify(lab.buf, lab.thread))
    assert lab.log[2:] == ["one", "two"]
    lab.run(dma_buf_detach(lab.buf, lab.thread, first))
    lab.locked(lambda: dma_buf_move_notify(lab.buf, lab.thread))
    assert lab.log[4:] == ["detach", "two"]


def test_an_importer_that_cannot_follow_gets_a_pinned_mapping_for_as_long_as_it_is_attached() -> None:
    lab = Lab()
    attach = lab.attach(None)
    assert lab.log == ["attach", "pin", "map"] and attach.sgt is not None
    assert lab.locked(lambda: dma_buf_map_attachment(attach, lab.thread)) is attach.sgt
    lab.locked(lambda: unmapped(attach, lab.thread, attach.sgt))
    lab.locked(lambda: dma_buf_move_notify(lab.buf, lab.thread))
    assert lab.log == ["attach", "pin", "map"], "the mapping stays, and nobody is told"
    lab.run(dma_buf_detach(lab.buf, lab.thread, attach))
    assert lab.log[3:] == ["unmap", "unpin", "detach"] and not lab.buf.attachments


def unmapped(attach: DmaBufAttachment, thread: Thread, sgt: SgTable) -> Wait:
    dma_buf_unmap_attachment(attach, thread, sgt)
    yield from ()


def unpinned(attach: DmaBufAttachment, thread: Thread) -> Wait:
    dma_buf_unpin(attach, thread)
    yield from ()


def test_an_exporter_that_cannot_move_is_mapped_once() -> None:
    lab = Lab(dynamic=False)
    assert lab.attach(None).sgt is None and lab.log == ["attach"]
    assert lab.attach(lab.importer()).sgt is not None and lab.log[1:] == ["attach", "map"]


@pytest.mark.parametrize(("fails", "then"), [("pin", []), ("map", ["unpin"])])
def test_what_fails_while_attaching_is_undone(fails: str, then: list[str]) -> None:
    lab = Lab()
    lab.fails.add(fails)
    got = lab.attach(None)
    assert isinstance(got, Errno) and got.name == "EBUSY" and got.step == fails
    assert lab.log[lab.log.index(fails) + 1 :] == [*then, "detach"] and not lab.buf.attachments


def test_attaching_needs_move_notify_of_a_dynamic_importer_and_the_exporters_consent() -> None:
    lab = Lab()
    got = lab.attach(DmaBufAttachOps(None))
    assert isinstance(got, Errno) and got.name == "EINVAL" and lab.log == []
    lab.fails.add("attach")
    assert lab.attach(lab.importer()).name == "EBUSY" and not lab.buf.attachments


def test_pin_and_unpin_come_together() -> None:
    lab = Lab()
    ops = DmaBufOps(lab.map, lambda *_: None, lambda _: None, pin=lab.pin)
    got = dma_buf_export(ops, lab.thread, 4096, lab)
    assert isinstance(got, Errno) and got.name == "EINVAL"


@pytest.mark.parametrize("notify", [True, False])
def test_without_config_move_notify_a_mapping_pins(notify: bool) -> None:
    lab = Lab()
    lab.buf.config_move_notify = notify
    attach = lab.attach(lab.importer())
    sgt = lab.locked(lambda: dma_buf_map_attachment(attach, lab.thread))
    lab.locked(lambda: unmapped(attach, lab.thread, sgt))
    assert lab.log[1:] == (["map", "unmap"] if notify else ["pin", "map", "unmap", "unpin"])


def test_a_dynamic_importer_may_pin() -> None:
    lab = Lab()
    attach = lab.attach(lab.importer())
    assert lab.locked(lambda: dma_buf_pin(attach, lab.thread)) == 0
    lab.locked(lambda: unpinned(attach, lab.thread))
    assert lab.log[1:] == ["pin", "unpin"]


def test_mapping_needs_the_reservation() -> None:
    lab = Lab()
    attach = lab.attach(lab.importer())
    with pytest.raises(RuntimeError, match="driver needs a reservation that nobody holds"):
        lab.run(dma_buf_map_attachment(attach, lab.thread))


@pytest.mark.parametrize(("added", "waits"), [(DMA_RESV_USAGE_KERNEL, True), (DMA_RESV_USAGE_WRITE, False)])
def test_a_wait_for_the_kernels_work_is_for_no_other(added: int, waits: bool) -> None:
    lab = Lab()
    fence = DmaFence(lab.engine)

    def add() -> Wait:
        dma_resv_add_fence(lab.buf.resv, lab.thread, fence, added)
        yield from ()

    def later() -> Wait:
        yield lab.engine.env.timeout(25.0)
        fence.signal()

    lab.locked(add)
    lab.engine.start(later())
    assert lab.run(dma_resv_wait_timeout(lab.buf.resv, lab.thread, DMA_RESV_USAGE_KERNEL)) == 1
    assert lab.engine.now == (25.0 if waits else 0.0)


def test_only_an_importer_that_looks_at_no_fence_gets_a_mapping_whose_content_is_there() -> None:
    for ops, at in ((None, 25.0), (True, 0.0)):
        lab = Lab()
        fence = DmaFence(lab.engine)
        lab.buf.resv.fences.append((fence, DMA_RESV_USAGE_KERNEL))

        def later(lab: Lab = lab, fence: DmaFence = fence) -> Wait:
            yield lab.engine.env.timeout(25.0)
            fence.signal()

        lab.engine.start(later())
        attach = lab.attach(lab.importer() if ops else None)
        lab.locked(lambda lab=lab, attach=attach: dma_buf_map_attachment(attach, lab.thread))
        assert lab.engine.now == at
