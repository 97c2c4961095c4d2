"""The device in a walk: it uses its own page table, and faults where that does not allow an access."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror
from kit.drivers.dmirror_ioctl import dmirror_fops_unlocked_ioctl
from kit.drivers.dmirror_types import (
    DPT_NONE,
    DPT_XA_TAG_WRITE,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_MIGRATE_TO_SYS,
    HMM_DMIRROR_READ,
    HMM_DMIRROR_WRITE,
    HmmDmirrorCmd,
)
from kit.errors import DriverError, Errno
from kit.flows.hmm_mirror.structure import Pages
from kit.memory.types import PAGE

if TYPE_CHECKING:
    from kit.flows.hmm_mirror.session import HmmSession
    from kit.sim.engine import Wait

__all__ = ["DeviceProcessor"]

ALONE, BESIDE = 4096, 64  # visits between looks at the page table: alone, or beside threads that change it
PATIENCE = 1000  # times that the same access may fault again


class DeviceProcessor:
    """A processor of the device that walks a structure through the device's page table.

    Parameters
    ----------
    session : HmmSession
    mirror : Dmirror
        The open device file whose page table it uses.
    """

    def __init__(self, session: HmmSession, mirror: Dmirror) -> None:
        self.session, self.mirror = session, mirror
        self.device, self.memory = session.device, session.memory
        self.thread = session.engine.thread("device")
        p = session.parameters
        self.turn = ALONE if p.noise == "none" and not p.children else BESIDE
        self._tried: set[int] = set()  # windows that have been migrated as far as they go, in this walk

    def walk(self, start: float, pages: Pages, writes: NDArray[np.bool_], migrate: bool) -> Wait:
        """Visit `pages` in order, writing where `writes` says so; `migrate`: a fault moves its window to the device."""
        thread, at, patience = self.thread, 0, 0
        thread.now = max(start, self.session.engine.now)
        yield from thread.sync()
        self._tried.clear()
        while at < len(pages):
            some, wrote = pages[at : at + self.turn], writes[at : at + self.turn]
            hits = self._hits(some, wrote)
            if hits:
                self._visit(some[:hits], wrote[:hits])
                yield from thread.sync()
                at, patience = at + hits, 0
            if hits < len(some):
                patience += 1
                if patience > PATIENCE:
                    raise DriverError(4, "EINTR", "dmirror_fault", f"page {some[hits]} does not stay mapped")
                yield from self._fault(int(some[hits]), bool(wrote[hits]), migrate)

    def prefetch(self, start: float) -> Wait:
        """The program asks for the whole structure before the device needs it, window by window."""
        p, driver = self.session.parameters, self.session.driver
        driver.now = max(driver.now, start)
        for window in range(0, p.pages, p.fault_pages):
            yield from self._ioctl(HMM_DMIRROR_MIGRATE_TO_DEV, window, min(p.fault_pages, p.pages - window))
        yield from driver.sync()
        self.session.cpu.now = max(self.session.cpu.now, driver.now)

    def _entries(self, pages: Pages) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return rights and frames of pages of the structure in the device's page table."""
        slots = self.mirror.pt.slots_of(self.session.base // PAGE + pages)
        return self.mirror.pt.rights[slots], self.mirror.pt.frame[slots].astype(np.int64)

    def _hits(self, pages: Pages, writes: NDArray[np.bool_]) -> int:
        """Return how many of the next visits the page table allows."""
        rights, _ = self._entries(pages)
        allowed = np.where(writes, rights == DPT_XA_TAG_WRITE, rights != DPT_NONE)
        return len(allowed) if allowed.all() else int(allowed.argmin())

    def _visit(self, pages: Pages, writes: NDArray[np.bool_]) -> None:
        """Read each node and write some; what is in device memory is near, everything else across the link."""
        session, thread = self.session, self.thread
        _, frames = self._entries(pages)
        content = self.device.backing(frames)
        session.record.compare(self.memory.payload[content, 0], session.expected[pages])
        np.add.at(self.memory.payload[:, 0], content[writes], np.uint64(1))
        np.add.at(session.expected, pages[writes], np.uint64(1))
        near = int((content >= self.device.first).sum())
        start, far = thread.now, len(pages) - near
        thread.charge(near * session.machine["device_visit_local"] + far * session.machine["device_visit_remote"])
        session.record.near += near
        session.record.far += far
        session.record.device_writes += int(writes.sum())
        session.engine.trace.span(
            "device_walk", "device", start, thread.now, pages=len(pages), value=near,
            cause="local" if near >= far else "remote",
        )  # fmt: skip

    def _fault(self, page: int, write: bool, migrate: bool) -> Wait:
        """Hold the access, and let the driver serve the window around it."""
        session, thread, driver = self.session, self.thread, self.session.driver
        start, p = thread.now, session.parameters
        driver.now = max(driver.now, start)
        driver.charge(session.machine["device_fault"])
        window = page // p.fault_pages * p.fault_pages
        count = min(p.fault_pages, p.pages - window)
        if migrate and window not in self._tried:
            self._tried.add(window)
            yield from self._ioctl(HMM_DMIRROR_MIGRATE_TO_DEV, window, count)
        elif write:
            yield from self._make_writable(page, window, count)
        else:
            yield from self._ioctl(HMM_DMIRROR_READ, window, count)
        yield from driver.sync()
        session.engine.trace.span(
            "device_stall", "device", start, driver.now, va=session.base + page * PAGE, pages=count,
            cause="write" if write else "read",
        )  # fmt: skip
        thread.now = driver.now

    def _make_writable(self, page: int, window: int, count: int) -> Wait:
        """A write fault: fetch the window, and write the faulting page back as it is.

        A page that came to the device read-only, as after a fork, cannot be made writable there: it goes home first.
        """
        result, seen = yield from self._ioctl(HMM_DMIRROR_READ, window, count)
        if result:
            return
        at = page - window
        result, _ = yield from self._ioctl(HMM_DMIRROR_WRITE, page, 1, seen[at : at + 1])
        if result and result == -14:
            yield from self._ioctl(HMM_DMIRROR_MIGRATE_TO_SYS, page, 1)

    def _ioctl(self, command: int, first: int, count: int, data: NDArray[np.uint64] | None = None) -> Wait:
        """Give the driver a command about pages of the structure; returns its result and the buffer."""
        words = self.memory.words
        buffer = np.zeros((count, words), dtype=np.uint64) if data is None else data.copy()
        cmd = HmmDmirrorCmd(self.session.base + first * PAGE, buffer.reshape(-1), count)
        result: int = yield from dmirror_fops_unlocked_ioctl(self.mirror, self.session.driver, command, cmd)
        self.session.record.command(command, result, cmd)
        if isinstance(result, Errno) and result.name in ("EPERM", "EFAULT", "EBUSY"):
            self.session.driver.charge(10.0)  # rights in between two changes: the device tries again
        return result, buffer
