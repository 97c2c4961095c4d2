"""The HMM test driver's device at work: it reads and writes what its page table allows (lib/test_hmm.c @ 7.0)."""

from __future__ import annotations

from errno import ENOENT

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror, dmirror_fault
from kit.drivers.dmirror_types import DPT_NONE, DPT_XA_TAG_WRITE, HmmDmirrorCmd
from kit.errors import Errno
from kit.sim.engine import Thread, Wait
from kit.sim.trace import step, waiting_step

__all__ = ["Bounce", "dmirror_read", "dmirror_write", "read_back"]


class Bounce:
    """struct dmirror_bounce: the kernel's copy of the user's buffer, and the two directions in which it is used."""

    def __init__(self, dmirror: Dmirror, cmd: HmmDmirrorCmd, filled: bool = False) -> None:
        words = dmirror.mm.memory.words
        self.dmirror, self.addr, self.cpages = dmirror, cmd.addr, 0
        self.data = cmd.rows(words).copy() if filled else np.zeros((cmd.npages, words), dtype=np.uint64)

    @step
    def dmirror_do_read(self, thread: Thread, start: int, end: int) -> int:
        """Copy what the device sees until an entry is missing (-ENOENT); under the mutex."""
        rights, frames = self.dmirror.load(start, end)
        pages, at = self._reach(rights != DPT_NONE), start - self.addr >> 12
        self.data[at : at + pages] = self.dmirror.mm.memory.payload[self.dmirror.mdevice.backing(frames[:pages])]
        return self._done(thread, start, end, pages)

    @step
    def dmirror_do_write(self, thread: Thread, start: int, end: int) -> int:
        """Write through the device until an entry is missing or not writable (-ENOENT); under the mutex."""
        rights, frames = self.dmirror.load(start, end)
        pages, at = self._reach(rights == DPT_XA_TAG_WRITE), start - self.addr >> 12
        self.dmirror.mm.memory.payload[self.dmirror.mdevice.backing(frames[:pages])] = self.data[at : at + pages]
        return self._done(thread, start, end, pages)

    def _reach(self, allowed: NDArray[np.bool_]) -> int:
        return len(allowed) if allowed.all() else int(allowed.argmin())

    def _done(self, thread: Thread, start: int, end: int, pages: int) -> int:
        costs = self.dmirror.mdevice.costs
        self.cpages += pages
        thread.charge(costs.dma_page * pages + costs.copy_setup * (pages > 0))
        thread.note(va=start, pages=pages, bytes=pages << 12)
        if pages == end - start >> 12:
            return 0
        return Errno(ENOENT, "dmirror_do_read", f"{start + (pages << 12):#x} is not in the device's page table")


def read_back(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """Let the device read a range without faulting, for the user to compare; -ENOENT where it cannot."""
    bounce = Bounce(dmirror, cmd)
    yield from dmirror.mutex.acquire(thread)
    ret = bounce.dmirror_do_read(thread, cmd.addr, cmd.addr + (cmd.npages << 12))
    yield from dmirror.mutex.release(thread)
    cmd.cpages = bounce.cpages
    if not ret:
        cmd.rows(bounce.data.shape[1])[:] = bounce.data
    return ret


@waiting_step
def dmirror_read(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_READ: the device reads; one fault covers all that is missing from the first missing page on."""
    bounce = Bounce(dmirror, cmd)
    ret = yield from _access(dmirror, thread, cmd, bounce, False)
    if not ret:
        cmd.rows(bounce.data.shape[1])[:] = bounce.data
    return ret


@waiting_step
def dmirror_write(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
    """HMM_DMIRROR_WRITE: the device writes."""
    return (yield from _access(dmirror, thread, cmd, Bounce(dmirror, cmd, filled=True), True))


def _access(dmirror: Dmirror, thread: Thread, cmd: HmmDmirrorCmd, bounce: Bounce, write: bool) -> Wait:
    """Read or write, faulting in between, until all is done or a fault fails."""
    start, end = cmd.addr, cmd.addr + (cmd.npages << 12)
    transfer = bounce.dmirror_do_write if write else bounce.dmirror_do_read
    while True:
        yield from dmirror.mutex.acquire(thread)
        ret = transfer(thread, start, end)
        yield from dmirror.mutex.release(thread)
        cmd.cpages = bounce.cpages
        if not ret:
            return 0
        start = cmd.addr + (bounce.cpages << 12)
        ret = yield from dmirror_fault(dmirror, thread, start, end, write)
        if ret:
            return ret
        cmd.faults += 1
