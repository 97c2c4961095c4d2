"""A driver's use of migrate_vma_*, step by step, with device memory of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from hmm.harness import Fixture, Program

from kit.memory.device.migrate_device import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_COMPOUND,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
)
from kit.memory.physical.memremap import (
    MEMORY_DEVICE_COHERENT,
    MEMORY_DEVICE_PRIVATE,
    DevPagemap,
    DevPagemapOps,
    memremap_pages,
    zone_device_folio_init,
)
from kit.memory.types import PAGE
from kit.sim.engine import Thread, Wait

VALID, MIGRATE, WRITE, COMPOUND = (
    int(each) for each in (MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_WRITE, MIGRATE_PFN_COMPOUND)
)
SYSTEM = int(MIGRATE_VMA_SELECT_SYSTEM)
PFN_SHIFT = 6


class Device:
    """Device memory with a list of free pages, and a `migrate_to_ram` that moves the one page that faulted."""

    def __init__(self, t: Fixture, pages: int = 1024, coherent: bool = False) -> None:
        self.t, self.memory, self.coherent = t, t.system.memory, coherent
        kind = MEMORY_DEVICE_COHERENT if coherent else MEMORY_DEVICE_PRIVATE
        self.pgmap = DevPagemap(kind, self, DevPagemapOps(self.migrate_to_ram, self.folio_free), pages, 1 << 5)
        assert memremap_pages(self.memory, t.process.thread, self.pgmap) == 0
        self.free = list(range(self.pgmap.first_pfn, self.pgmap.first_pfn + pages))[::-1]
        self.freed: list[int] = []

    def alloc(self) -> int:
        """Take one page: locked, with one reference."""
        pfn = self.free.pop()
        zone_device_folio_init(self.memory, np.array([pfn]), 0)
        return pfn

    def alloc_huge(self) -> int:
        """Take 512 pages in one piece, as one folio."""
        first = next(pfn for pfn in self.free if pfn % 512 == 0)
        self.free = [pfn for pfn in self.free if not first <= pfn < first + 512]
        zone_device_folio_init(self.memory, np.array([first]), 9)
        return first

    def folio_free(self, pfns: Any) -> None:
        for pfn in np.atleast_1d(pfns).tolist():
            whole = range(pfn, pfn + (1 << int(self.memory.order[pfn])))
            self.freed += whole
            self.free += whole

    def migrate_to_ram(self, vmf: Any, thread: Thread) -> Wait:
        """Bring the page home, or the whole folio when its entry is huge."""
        pages = 512 if vmf.pmd else 1
        start = vmf.address // (pages * PAGE) * pages * PAGE
        args = MigrateVma(
            vma=vmf.vma, src=np.zeros(pages, np.uint64), dst=np.zeros(pages, np.uint64), start=start,
            end=start + pages * PAGE, pgmap_owner=self, fault_page=vmf.page,
            flags=MIGRATE_VMA_SELECT_DEVICE_PRIVATE | (MIGRATE_VMA_SELECT_COMPOUND if vmf.pmd else 0),
        )  # fmt: skip
        assert (yield from migrate_vma_setup(args, thread)) == 0
        if args.cpages:
            new = self.memory.alloc_huge() if vmf.pmd else int(self.memory.alloc_pages(1)[0])
            self.memory.trylock(np.array([new]))
            self.memory.copy((int(args.src[0]) >> PFN_SHIFT) + np.arange(pages), new + np.arange(pages))
            args.dst[0] = new << PFN_SHIFT | VALID | (COMPOUND if vmf.pmd else 0)
            yield from migrate_vma_pages(args, thread)
        yield from migrate_vma_finalize(args, thread)
        return 0


class Migration:
    """One migrate_vma, and the choices a driver makes between its steps."""

    def __init__(self, t: Fixture, start: int, pages: int, **how: Any) -> None:
        self.t, self.memory, self.thread = t, t.system.memory, how.pop("thread", t.process.thread)
        mm = how.pop("mm", t.process.mm)
        made = {
            "vma": mm.find(start // PAGE), "src": np.full(pages, 7, dtype=np.uint64), "dst": np.zeros(pages, np.uint64),
            "start": start, "end": start + pages * PAGE, "pgmap_owner": None, "flags": SYSTEM, "fault_page": None,
        }  # fmt: skip
        self.mm, self.args = mm, MigrateVma(**{**made, **how})
        self.result = 0

    def setup(self) -> Program:
        """migrate_vma_setup under the mmap lock, which stays held until `finish`."""
        yield from self.mm.mmap_lock.read_acquire(self.thread)
        self.result = yield from migrate_vma_setup(self.args, self.thread)
        return self

    @property
    def src(self) -> list[int]:
        """The flags of src, without pfns."""
        return [int(each) & 0x3F for each in self.args.src]

    @property
    def pfns(self) -> np.ndarray:
        return self.args.src.astype(np.int64) >> PFN_SHIFT

    def choose(self, device: Device, chosen: Any = None) -> list[int]:
        """Give the chosen pages that may migrate a device page each, with their content; return the device's pfns."""
        taken = []
        for at, word in enumerate(self.args.src.tolist()):
            if not word & MIGRATE or (chosen is not None and at not in chosen):
                continue
            pfn = device.alloc()
            new = np.array([pfn])
            if word & VALID:
                self.memory.copy(np.array([word >> PFN_SHIFT]), new)
            else:
                self.memory.zero(new)
            self.args.dst[at] = pfn << PFN_SHIFT | VALID | (word & WRITE)
            taken.append(pfn)
        return taken

    def bring_home(self) -> None:
        """Give every page that may migrate a page of host memory."""
        for at, word in enumerate(self.args.src.tolist()):
            if word & MIGRATE and word & VALID:
                new = self.memory.alloc_pages(1)
                self.memory.trylock(new)
                self.memory.copy(np.array([word >> PFN_SHIFT]), new)
                self.args.dst[at] = int(new[0]) << PFN_SHIFT | VALID

    def pages(self) -> Program:
        yield from migrate_vma_pages(self.args, self.thread)

    def finalize(self) -> Program:
        yield from migrate_vma_finalize(self.args, self.thread)
        yield from self.mm.mmap_lock.read_release(self.thread)

    def finish(self, device: Device | None = None, copy: bool = True) -> Program:
        """Everything after the setup; without a device no page gets a destination."""
        if device is not None:
            self.choose(device)
        yield from self.pages()
        yield from self.finalize()
