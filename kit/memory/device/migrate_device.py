"""Moving a process's pages to device memory and back, with the copy left to a driver (mm/migrate_device.c @ 7.0).

setup finds, locks and unmaps pages; the driver allocates destinations and copies; pages moves what the kernel
knows of each page; finalize puts mappings back, of the new page or of the old. It is best effort: what cannot
move stays where it was, and only its MIGRATE bit says so.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.device.migrate_collect import migrate_vma_collect
from kit.memory.device.migrate_vma import (
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MigratePfns,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from kit.memory.physical.memremap import is_device_private
from kit.memory.reclaim.migrate_pages import migrate_pages
from kit.memory.reclaim.rmap import remove_migration_ptes, try_to_migrate
from kit.memory.types import PG, VM_HUGETLB, VM_SPECIAL
from kit.sim.trace import waiting_step

if TYPE_CHECKING:
    from kit.memory.physical.pages import PhysicalMemory
    from kit.sim.engine import Thread, Wait

__all__ = [
    "migrate_device_coherent_folio", "migrate_device_finalize", "migrate_device_pages", "migrate_device_pfns",
    "migrate_device_range", "migrate_vma_finalize", "migrate_vma_pages", "migrate_vma_setup",
]  # fmt: skip

_VALID, _MIGRATE, _COMPOUND = (np.uint64(f) for f in (MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_COMPOUND))


@waiting_step
def migrate_vma_setup(args: MigrateVma, thread: Thread) -> Wait:
    """Collect, lock and unmap the pages of a range of one area; the mmap lock is held for reading.

    Returns 0, also when nothing can move (look at ``cpages``), or -EINVAL for a range or area that cannot be migrated.
    """
    args.start &= ~4095
    args.end &= ~4095
    wrong = _wrong(args)
    if wrong:
        thread.note(status="-EINVAL")
        return Errno(EINVAL, "migrate_vma_setup", wrong)
    pages = args.end - args.start >> 12
    thread.note(va=args.start, pages=pages)
    args.src[:pages] = 0
    args.dst[:pages] = 0
    args.cpages = args.npages = 0
    args.began = thread.now
    yield from migrate_vma_collect(args, thread)
    if args.cpages:
        yield from migrate_vma_unmap(args, thread)
    _observe(args, "setup")
    return 0


def _observe(args: MigrateVma, phase: str) -> None:
    """Show the arrays after a phase to whoever looks on."""
    observer = args.area.mm.memory.observer
    if observer is not None:
        observer(phase, args)


def _wrong(args: MigrateVma) -> str:
    """Return what is wrong with a request, or nothing."""
    vma, pages = args.vma, args.end - args.start >> 12
    if vma is None or vma.flags & (VM_HUGETLB | VM_SPECIAL):
        return "no area, or one of huge pages or a device"
    if pages <= 0 or not vma.start <= args.start < vma.stop or not vma.start < args.end <= vma.stop:
        return f"{args.start:#x}..{args.end:#x} is not inside {vma!r}"
    if len(args.src) < pages or len(args.dst) < pages:
        return f"{pages} pages need as many words in src and dst"
    memory = vma.mm.memory
    fault_page = args.fault_page
    if fault_page is None or (is_device_private(memory, fault_page) and memory.locked(fault_page)):
        return ""
    return f"fault page {fault_page:#x} is not a locked device-private page"


@waiting_step
def migrate_vma_unmap(migrate: MigrateVma, thread: Thread) -> Wait:
    """Unmap what was collected from wherever else it is mapped, and give up what is pinned."""
    memory = migrate.area.mm.memory
    src = migrate.src[: migrate.npages]
    migrate.cpages = yield from migrate_device_unmap(memory, thread, src, migrate.fault_page)
    thread.note(va=migrate.start, pages=migrate.cpages)


@waiting_step
def migrate_device_unmap(memory: PhysicalMemory, thread: Thread, src: MigratePfns, fault_page: int | None) -> Wait:
    """Isolate and unmap the locked pages of `src`; restore those that stay mapped or pinned. Returns entries left."""
    yield from thread.sync()
    at = np.flatnonzero(src & _VALID)
    pfns = migrate_pfn_to_pfn(src[at])
    src[at[memory.order[pfns] > 0]] |= _COMPOUND
    device = memory.pgmap[pfns] > 0
    good = device.copy()  # device pages are not on the LRU
    isolated = memory.lru_isolate(pfns[~device])
    good[~device] = isolated
    memory.refcount[pfns[~device & good]] -= 1  # the collector's reference; the isolation's holds the page
    mapped = good & (memory.mapcount[pfns] > 0)
    if mapped.any():
        yield from try_to_migrate(memory, thread, pfns[mapped])
    stay = good & ~_unpinned(memory, pfns, fault_page)
    memory.lru_add(pfns[stay & ~device])  # folio_putback_lru: the isolation's reference becomes the collector's again
    back = stay | ~good
    if back.any():
        gone = pfns[back]
        yield from remove_migration_ptes(memory, thread, gone, gone)
        yield from thread.sync()
        src[at[back]] = 0
        memory.unlock(gone if fault_page is None else gone[gone != _head(memory, fault_page)])
        memory.put(gone)
    return int(np.count_nonzero(src & _MIGRATE))


def _unpinned(memory: PhysicalMemory, pfns: NDArray[np.int64], fault_page: int | None) -> NDArray[np.bool_]:
    """Return which pages nobody but the migration holds and nothing maps (migrate_vma_check_page)."""
    flags = memory.flags[pfns]
    cached = (flags & PG.SWAPCACHE != 0) | ((memory.mapping[pfns] != 0) & (flags & PG.ANON == 0))
    extra = 1 + (memory.pgmap[pfns] > 0) + cached
    if fault_page is not None:
        extra = extra + (pfns == fault_page)
    mapcount = memory.mapcount[pfns]
    return np.asarray((mapcount == 0) & (memory.refcount[pfns] - extra <= mapcount))


def _head(memory: PhysicalMemory, pfn: int) -> int:
    return int(memory.head(np.array([pfn]))[0])


@waiting_step
def migrate_vma_pages(migrate: MigrateVma, thread: Thread) -> Wait:
    """Fill holes, and move what the kernel knows of each page; where that fails MIGRATE is cleared."""
    thread.note(va=migrate.start, pages=migrate.npages)
    src, dst = migrate.src[: migrate.npages], migrate.dst[: migrate.npages]
    _observe(migrate, "driver")
    yield from migrate_pages(migrate.area.mm.memory, thread, src, dst, migrate)
    _observe(migrate, "pages")


@waiting_step
def migrate_device_pages(memory: PhysicalMemory, thread: Thread, src: MigratePfns, dst: MigratePfns) -> Wait:
    """`migrate_vma_pages` for pages found by pfn."""
    yield from migrate_pages(memory, thread, src, dst, None)


@waiting_step
def migrate_vma_finalize(migrate: MigrateVma, thread: Thread) -> Wait:
    """Replace migration entries by mappings of the destinations, or of the sources where the migration failed."""
    thread.note(va=migrate.start, pages=migrate.npages)
    src, dst = migrate.src[: migrate.npages], migrate.dst[: migrate.npages]
    cause = "migrate" if migrate.fault_page is None else "fault home"
    yield from _finalize(migrate.area.mm.memory, thread, src, dst, migrate.fault_page, (migrate.began, cause))


@waiting_step
def migrate_device_finalize(memory: PhysicalMemory, thread: Thread, src: MigratePfns, dst: MigratePfns) -> Wait:
    """`migrate_vma_finalize` for pages found by pfn."""
    yield from _finalize(memory, thread, src, dst, None, (thread.now, "evict"))


def _finalize(
    memory: PhysicalMemory, thread: Thread, src: MigratePfns, dst: MigratePfns, fault_page: int | None,
    moved: tuple[float, str],
) -> Wait:  # fmt: skip
    """__migrate_device_finalize."""
    yield from thread.sync()
    given, held = dst & _VALID != 0, src & _VALID != 0
    unused = given & held & (src & _MIGRATE == 0)
    sources, targets = migrate_pfn_to_pfn(src[held]), migrate_pfn_to_pfn(np.where(given & ~unused, dst, src)[held])
    memory.lru_add(targets[memory.pgmap[targets] == 0])
    if len(sources):
        yield from remove_migration_ptes(memory, thread, sources, targets, moved)
    yield from thread.sync()
    keep = -1 if fault_page is None else _head(memory, fault_page)
    destinations = migrate_pfn_to_pfn(dst[given])
    memory.unlock(np.concatenate([sources[sources != keep], destinations]))
    memory.put(sources)
    memory.put(destinations)


@waiting_step
def migrate_device_range(memory: PhysicalMemory, thread: Thread, src: MigratePfns, start: int, npages: int) -> Wait:
    """Lock and unmap the device pages in use among `npages` from pfn `start`; fills `src` and returns 0."""
    thread.note(pages=npages)
    return (yield from migrate_device_pfns(memory, thread, src, np.arange(start, start + npages)))


@waiting_step
def migrate_device_pfns(memory: PhysicalMemory, thread: Thread, src: MigratePfns, pfns: NDArray[np.integer]) -> Wait:
    """`migrate_device_range` for any device pages; ``src[i]`` is about ``pfns[i]``, of a large folio about its head."""
    yield from thread.sync()
    pfns = np.asarray(pfns, dtype=np.int64)
    src[: len(pfns)] = 0
    # Only the head of a folio has a count: tails and free pages are passed over (folio_get_nontail_page).
    at = np.flatnonzero((memory.refcount[pfns] > 0) & (memory.head(pfns) == pfns))
    locked = memory.trylock(pfns[at])
    at = at[locked]
    memory.get(pfns[at])
    src[at] = migrate_pfn(pfns[at]) | _MIGRATE
    yield from migrate_device_unmap(memory, thread, src[: len(pfns)], None)
    return 0


@waiting_step
def migrate_device_coherent_folio(memory: PhysicalMemory, thread: Thread, pfn: int) -> Wait:
    """Move one device-coherent page home, using up the reference that the caller holds on it. Returns 0 or -EBUSY."""
    failed = Errno(EBUSY, "migrate_device_coherent_folio", f"page {pfn:#x} is mapped or held")
    yield from memory.lock(thread, pfn)
    src, dst = migrate_pfn(np.array([pfn])) | _MIGRATE, np.zeros(1, dtype=np.uint64)
    yield from migrate_device_unmap(memory, thread, src, None)
    if not src[0] & _MIGRATE:
        return failed
    new = memory.alloc_pages(1)
    if new is not None:
        memory.trylock(new)
        dst = migrate_pfn(new)
    yield from migrate_device_pages(memory, thread, src, dst)
    moved = bool(src[0] & _MIGRATE)
    if moved and new is not None:
        memory.copy(np.array([pfn]), new)
    yield from migrate_device_finalize(memory, thread, src, dst)
    return 0 if moved else failed
