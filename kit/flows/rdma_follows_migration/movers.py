"""Who moves pages: a GPU's driver, or the file system behind a mapped file; RDMA only ever follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.dmirror import Dmirror, dmirror_device_init, dmirror_fops_open, dmirror_fops_release
from kit.drivers.dmirror_ioctl import dmirror_fops_unlocked_ioctl
from kit.drivers.dmirror_types import (
    COSTS,
    HMM_DMIRROR_MIGRATE_TO_DEV,
    HMM_DMIRROR_WRITE,
    DmirrorDevice,
    HmmDmirrorCmd,
)
from kit.errors import Errno, raise_for
from kit.flows.rdma.content import Area, message_bytes
from kit.memory.space.special import unmap_mapping_range
from kit.memory.types import PAGE, PG, Kind

if TYPE_CHECKING:
    from kit.flows.rdma.hosts import Host
    from kit.memory.files.file import File
    from kit.sim.engine import Wait
    from kit.sim.machine import Machine

__all__ = ["FileSystem", "Gpu", "Moved"]


@dataclass
class Moved:
    """What came of one move: pages that went, and pages that stayed because somebody holds them."""

    went: int = 0
    stayed: int = 0


class Gpu:
    """A GPU that mirrors the address space: its driver takes pages into its memory (kit.drivers.dmirror).

    Parameters
    ----------
    host : Host
    machine : Machine
    pages : int
        Its memory.
    """

    def __init__(self, host: Host, machine: Machine, pages: int) -> None:
        costs = {name: machine[name] for name in COSTS}
        self.host, self.device = host, DmirrorDevice(host.memory, costs=costs, chunk_pages=pages)
        self.device.guarded = True  # as a driver for real hardware: nothing slips past a migration of its own
        self.thread = host.engine.thread("gpu driver")
        self.mirror: Dmirror | None = None

    def open(self) -> Wait:
        """Plug the device's memory in, and mirror the program's address space."""
        self._wake()
        raise_for(dmirror_device_init(self.device, self.thread))
        made = yield from dmirror_fops_open(self.device, self.thread, self.host.mm)
        if isinstance(made, Errno):
            raise_for(made)
        self.mirror = made

    def move(self, area: Area) -> Wait:
        """Take every page of the area into GPU memory, as far as the kernel lets go of it; returns a `Moved`."""
        yield from self._command(HMM_DMIRROR_MIGRATE_TO_DEV, area.va, area.pages, None)
        here = self.here(area)
        return Moved(int(here.sum()), int((~here).sum()))

    def here(self, area: Area) -> NDArray[np.bool_]:
        """Return which pages of the area are in GPU memory."""
        table = self.host.mm.table
        found: NDArray[np.bool_] = table.kind[table.slots(area.va // PAGE, area.pages)] == Kind.DEVICE_PRIVATE
        return found

    def write(self, area: Area, number: int, rng: np.random.Generator) -> Wait:
        """Let the GPU change every page of the area that it has."""
        whole = self.host.memory.payload_bytes == PAGE
        for page in np.flatnonzero(self.here(area)).tolist():
            data = message_bytes(0, PAGE, number + page, whole, rng)
            content = data.view(np.uint64)[: area.words].copy()
            yield from self._command(HMM_DMIRROR_WRITE, area.va + page * PAGE, 1, content)
            area.write(area.va + page * PAGE, data)

    def close(self) -> Wait:
        """Close the device."""
        if self.mirror is not None:
            self._wake()
            yield from dmirror_fops_release(self.mirror, self.thread)

    def _wake(self) -> None:
        self.thread.now = max(self.thread.now, self.host.engine.now)

    def _command(self, command: int, address: int, pages: int, content: Any) -> Wait:
        words = self.host.memory.words
        buffer = np.zeros(pages * words, dtype=np.uint64) if content is None else content
        assert self.mirror is not None
        self._wake()
        cmd = HmmDmirrorCmd(address, buffer, pages)
        ret = yield from dmirror_fops_unlocked_ioctl(self.mirror, self.thread, command, cmd)
        yield from self.thread.sync()
        return ret


class FileSystem:
    """A file system that decides to keep a file's pages somewhere else, as one with DAX does.

    It takes the pages out of every address space, copies them, and lets the file name the copies; whoever
    touches the file next finds those. Pages that somebody has pinned stay where they are.
    """

    def __init__(self, host: Host, file: File) -> None:
        self.host, self.file = host, file
        self.thread = host.engine.thread("file system")

    def open(self) -> Wait:
        """Nothing to do: the file is there."""
        yield from ()

    def move(self, area: Area) -> Wait:
        """Move every page of the file that is in memory; returns a `Moved`."""
        memory, file, thread = self.host.memory, self.file, self.thread
        thread.now = max(thread.now, self.host.engine.now)
        while True:
            cached = np.flatnonzero(file.cache >= 0)
            yield from unmap_mapping_range(file, thread, 0, file.pages)
            yield from thread.sync()
            old = file.cache[cached]
            if len(old) and not memory.mapcount[old].any():
                break  # nobody can come in between from here on: the lines below do not wait
            if not len(old):
                return Moved()
        free = (memory.pincount[old] == 0) & (memory.refcount[old] == 1)
        self._replace(cached[free])
        yield from thread.sync()
        return Moved(int(free.sum()), int((~free).sum()))

    def _replace(self, indices: NDArray[np.int64]) -> None:
        memory, file, thread = self.host.memory, self.file, self.thread
        old = file.cache[indices].copy()
        new = memory.alloc_pages(len(old))
        if new is None:
            raise_for(Errno(12, "FileSystem.move", "no free pages"))
            return
        memory.copy(old, new)
        thread.charge(self.host.mm.costs.page_copy * len(old))
        file.remove(indices)
        file.add(indices, new)
        memory.flags[new] |= PG.DIRTY

    def write(self, area: Area, number: int, rng: np.random.Generator) -> Wait:
        """A file system does not change content."""
        yield from ()

    def close(self) -> Wait:
        """Nothing to do."""
        yield from ()
