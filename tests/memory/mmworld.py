"""A small machine for tests of hmm and migration: memory, one address space, device memory, and pages put where wanted."""

from __future__ import annotations

import numpy as np

from kit.memory.costs import make_costs
from kit.memory.device.migrate_device import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from kit.memory.notifier.mmu_interval_notifier import mmu_interval_notifier_insert, mmu_interval_set_seq
from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier, MmuIntervalNotifierOps
from kit.memory.physical.memremap import DEVICE_PRIVATE, DevPagemap, memremap_pages, zone_device_folio_init
from kit.memory.physical.pages import PhysicalMemory
from kit.memory.reclaim.rmap import add_anon_rmap
from kit.memory.space.mm import Mm
from kit.memory.space.vma import Vma
from kit.memory.types import VM_READ, VM_WRITE, Bit, Kind
from kit.sim.engine import Engine

FIRST = 512 * 40  # page of the first area
RW = VM_READ | VM_WRITE
VALID, MIGRATE, WRITE, COMPOUND = (
    np.uint64(f) for f in (MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_WRITE, MIGRATE_PFN_COMPOUND)
)


class World:
    """Host memory, one mm whose invalidations are logged, and one device."""

    def __init__(self, frames=8192, device_pages=4096, kind=DEVICE_PRIVATE, watched=True):
        self.engine = Engine()
        self.memory = PhysicalMemory(self.engine, frames, 4 * device_pages, swap_slots=1024)
        self.mm = Mm(self.memory, self.engine, make_costs(), record_moves=True)
        self.thread = self.engine.thread("t")
        self.log = []
        self.device = Device(self, device_pages, kind)
        if watched:
            self.sub = MmuIntervalNotifier(self)
            ops = MmuIntervalNotifierOps(self.invalidate)
            self.run(mmu_interval_notifier_insert(self.sub, self.thread, self.mm, 0, 1 << 48, ops))

    def invalidate(self, sub, thread, range, cur_seq):
        mmu_interval_set_seq(sub, cur_seq)
        self.log.append((range.event.name, range.start >> 12, range.end >> 12, range.owner))
        yield from thread.sync()
        return True

    def run(self, *processes):
        done = [self.engine.start(p) for p in processes]
        self.engine.run()
        assert all(p.triggered for p in done), "somebody waits for ever"
        return done[0].value if len(done) == 1 else [p.value for p in done]

    def area(self, pages, flags=RW, first=FIRST, **more):
        vma = Vma(self.mm, first, pages, flags, first, **more)
        self.mm.insert(vma)
        return vma

    def fill(self, vma, first, pages, writable=True):
        """Put fresh anonymous pages, stamped 1000 + page, at `first` pages into the area; return their pfns."""
        pfns, at = self.memory.alloc_pages(pages), np.arange(vma.first + first, vma.first + first + pages)
        add_anon_rmap(self.memory, vma, pfns, at)
        bits = Bit.YOUNG | (Bit.WRITABLE | Bit.DIRTY if writable else 0)
        self.mm.table.set_entries(self.mm.table.slots_of(at, create=True), Kind.PRESENT, bits, pfns)
        self.mm.rss["anon"] += pages
        self.memory.payload[pfns, 0] = 1000 + at
        return pfns

    def fill_huge(self, vma, first, bits=Bit.YOUNG | Bit.WRITABLE | Bit.DIRTY):
        head, at = self.memory.alloc_huge(), np.arange(vma.first + first, vma.first + first + 512)
        add_anon_rmap(self.memory, vma, np.array([head]), at, 9)
        self.mm.table.set_huge(int(at[0]) >> 9, Kind.PRESENT, bits, head)
        self.mm.rss["anon"] += 512
        self.memory.payload[head : head + 512, 0] = 1000 + at
        return head

    def entries(self, vma, first=0, pages=None):
        """(kinds, bits, frames) of pages of an area."""
        table = self.mm.table
        slots = table.slots_of(
            np.arange(vma.first + first, vma.first + (vma.pages if pages is None else first + pages))
        )
        return table.kind[slots], table.bits[slots], table.frame[slots]

    def content(self, vma, first=0, pages=None):
        return self.memory.payload[self.entries(vma, first, pages)[2], 0].astype(np.int64)

    def migration(self, vma, first=0, pages=None, flags=MIGRATE_VMA_SELECT_SYSTEM, **more):
        pages = vma.pages - first if pages is None else pages
        src = np.full(pages, 99, dtype=np.uint64)
        start = vma.first + first << 12
        return MigrateVma(vma, src, src.copy(), start, start + (pages << 12), self.device, flags, **more)

    def setup(self, args):
        return self.run(migrate_vma_setup(args, self.thread))

    def finish(self, args):
        self.run(migrate_vma_pages(args, self.thread))
        self.run(migrate_vma_finalize(args, self.thread))

    def to_device(self, vma, first=0, pages=None, flags=MIGRATE_VMA_SELECT_SYSTEM, chosen=slice(None)):
        args = self.migration(vma, first, pages, flags)
        assert self.setup(args) == 0
        self.device.take(args, chosen)
        self.finish(args)
        return args

    def home(self, vma, first=0, pages=None, flags=MIGRATE_VMA_SELECT_DEVICE_PRIVATE):
        args = self.migration(vma, first, pages, flags)
        assert self.setup(args) == 0
        at = np.flatnonzero((args.src & VALID != 0) & (args.src & COMPOUND == 0))
        new = self.memory.alloc_pages(len(at))
        self.memory.trylock(new)
        self.memory.copy(migrate_pfn_to_pfn(args.src[at]), new)
        args.dst[at] = migrate_pfn(new)
        for one in np.flatnonzero(args.src & COMPOUND != 0).tolist():
            head = self.memory.alloc_huge()
            folio = np.arange(head, head + 512)
            self.memory.trylock(folio[:1])
            self.memory.copy(migrate_pfn_to_pfn(args.src[one : one + 1]) + np.arange(512), folio)
            args.dst[one] = migrate_pfn(folio)[0] | COMPOUND
        self.finish(args)
        return args

    def check(self):
        """No page is locked, and every reference is a mapping's (or the zero page's)."""
        memory = self.memory
        heads = memory.head(np.arange(len(memory.refcount)))
        used = np.flatnonzero(memory.refcount > 0)
        used = used[(heads[used] == used) & (used > 0) & (used != memory.huge_zero)]
        assert not (memory.flags[used] & 1).any(), "a page is still locked"
        assert np.array_equal(memory.refcount[used], memory.mapcount[used] + memory.pincount[used])
        assert not (memory.flags[memory.pgmap > 0] & 2).any(), "a device page is on the LRU"


class Device:
    """Device memory with a free list, and the copies of a migration to it."""

    def __init__(self, world, pages, kind):
        self.world, self.memory = world, world.memory
        self.pgmap = DevPagemap(kind, self, self, pages, 2)
        assert memremap_pages(self.memory, world.thread, self.pgmap) == 0
        self.free = list(range(self.pgmap.first_pfn, self.pgmap.first_pfn + pages - 1024))
        self.blocks = [self.pgmap.first_pfn + pages - 1024, self.pgmap.first_pfn + pages - 512]

    def folio_free(self, pfns):
        for pfn in np.atleast_1d(pfns).tolist():
            (self.blocks if self.memory.order[pfn] else self.free).append(pfn)

    def migrate_to_ram(self, vmf, thread):
        raise AssertionError("no CPU fault is expected here")
        yield

    def take(self, args, chosen=slice(None)):
        """Give the chosen entries that can migrate a device page with their content."""
        wanted = np.zeros(len(args.src), dtype=bool)
        wanted[chosen] = True
        at = np.flatnonzero((args.src & MIGRATE != 0) & wanted)
        huge = at[args.src[at] & COMPOUND != 0]
        at = at[args.src[at] & COMPOUND == 0]
        new = np.array([self.free.pop(0) for _ in at], dtype=np.int64)
        zone_device_folio_init(self.memory, new, 0)
        args.dst[at] = migrate_pfn(new)
        full = args.src[at] & VALID != 0
        self.memory.copy(migrate_pfn_to_pfn(args.src[at[full]]), new[full])
        self.memory.zero(new[~full])
        for one in huge.tolist():
            head = self.blocks.pop()
            zone_device_folio_init(self.memory, np.array([head]), 9)
            args.dst[one] = migrate_pfn(np.array([head]))[0] | COMPOUND
            if args.src[one] & VALID:
                self.memory.copy(migrate_pfn_to_pfn(args.src[one : one + 1]) + np.arange(512), head + np.arange(512))
