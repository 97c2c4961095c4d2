"""The HMM test driver's words (lib/test_hmm_uapi.h @ 7.0), and its device: what it can do and what that costs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.device.migrate_vma import MIGRATE_VMA_SELECT_DEVICE_COHERENT, MIGRATE_VMA_SELECT_DEVICE_PRIVATE
from kit.memory.physical.memremap import DevPagemap
from kit.memory.reclaim.alloc import alloc_folios
from kit.memory.table.cpu_table import CpuTable
from kit.memory.types import HPAGE_PMD_NR
from kit.sim.costs import Costs
from kit.sim.engine import Thread, Wait
from kit.sim.locks import Lock

if TYPE_CHECKING:
    from kit.drivers.dmirror import Dmirror
    from kit.memory.physical.pages import PhysicalMemory
    from kit.memory.space.mm import Mm
    from kit.memory.space.vma import Vma

__all__ = [
    "COSTS", "DEVMEM_CHUNK_SIZE", "DPT_NONE", "DPT_READ", "DPT_XA_TAG_ATOMIC", "DPT_XA_TAG_WRITE", "FAULT_BATCH",
    "HMM_DMIRROR_CHECK_EXCLUSIVE", "HMM_DMIRROR_EXCLUSIVE", "HMM_DMIRROR_FLAGS", "HMM_DMIRROR_FLAG_FAIL_ALLOC",
    "HMM_DMIRROR_MEMORY_DEVICE_COHERENT", "HMM_DMIRROR_MEMORY_DEVICE_PRIVATE", "HMM_DMIRROR_MIGRATE_TO_DEV",
    "HMM_DMIRROR_MIGRATE_TO_SYS", "HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL", "HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE",
    "HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL", "HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE", "HMM_DMIRROR_PROT_ERROR",
    "HMM_DMIRROR_PROT_NONE", "HMM_DMIRROR_PROT_PMD", "HMM_DMIRROR_PROT_PUD", "HMM_DMIRROR_PROT_READ",
    "HMM_DMIRROR_PROT_WRITE", "HMM_DMIRROR_PROT_ZERO", "HMM_DMIRROR_READ", "HMM_DMIRROR_RELEASE",
    "HMM_DMIRROR_SNAPSHOT", "HMM_DMIRROR_WRITE", "DmirrorDevice", "DmirrorFile", "HmmDmirrorCmd", "Pfns",
]  # fmt: skip

Pfns = NDArray[np.integer]

(
    HMM_DMIRROR_READ, HMM_DMIRROR_WRITE, HMM_DMIRROR_MIGRATE_TO_DEV, HMM_DMIRROR_MIGRATE_TO_SYS, HMM_DMIRROR_SNAPSHOT,
    HMM_DMIRROR_EXCLUSIVE, HMM_DMIRROR_CHECK_EXCLUSIVE, HMM_DMIRROR_RELEASE, HMM_DMIRROR_FLAGS,
) = range(9)  # fmt: skip  # the nr of _IOWR('H', nr, struct hmm_dmirror_cmd)

HMM_DMIRROR_FLAG_FAIL_ALLOC = 1 << 0
HMM_DMIRROR_PROT_ERROR, HMM_DMIRROR_PROT_NONE, HMM_DMIRROR_PROT_READ, HMM_DMIRROR_PROT_WRITE = 0xFF, 0x00, 0x01, 0x02
HMM_DMIRROR_PROT_PMD, HMM_DMIRROR_PROT_PUD, HMM_DMIRROR_PROT_ZERO = 0x04, 0x08, 0x10
HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL, HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE = 0x20, 0x30
HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL, HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE = 0x40, 0x50
HMM_DMIRROR_MEMORY_DEVICE_PRIVATE, HMM_DMIRROR_MEMORY_DEVICE_COHERENT = 1, 2
DEVMEM_CHUNK_SIZE = 256 << 20  # bytes
FAULT_BATCH = 32  # pages of one hmm_range_fault: the driver keeps the answers on its stack
PTRS_PER_PTE = 512  # pages of one migration
DPT_NONE, DPT_READ, DPT_XA_TAG_WRITE, DPT_XA_TAG_ATOMIC = range(4)  # rights in the device's page table

# Microseconds that a profile may give, and what each pays for; what is not given is free.
COSTS = {
    "ioctl": "one command of the device, without what it does",
    "dma_page": "one page carried by the device's DMA engine between the device and memory",
    "copy_setup": "one copy programmed and waited for",
    "device_pte": "one entry of the device's page table written or cleared",
    "dma_map": "one page made reachable for the device",
    "devmem_alloc": "one page or folio of device memory taken",
}


@dataclass
class HmmDmirrorCmd:
    """struct hmm_dmirror_cmd.

    Attributes
    ----------
    addr : int
        First byte, page aligned.
    ptr : ndarray
        The user's buffer. uint8: 4096 bytes for each page (of which the simulated pages' content is used), one byte
        for each page of a SNAPSHOT. uint64: just the content that the simulated pages carry, one page after the other.
    npages : int
    cpages, faults : int
        Out: pages copied and device page faults; untouched when the command fails.
    """

    addr: int
    ptr: NDArray[np.uint8] | NDArray[np.uint64]
    npages: int
    cpages: int = 0
    faults: int = 0

    def rows(self, words: int) -> NDArray[np.uint64]:
        """Return the buffer as one row of content for each page, shape (npages, words); a view."""
        width = words if self.ptr.dtype == np.uint64 else 4096
        whole: NDArray[np.uint64] = self.ptr[: self.npages * width].reshape(self.npages, width).view(np.uint64)
        return whole[:, :words]


class DmirrorFile:
    """An open file as the kernel's tests see it: what the device's page table holds, flags, and a mapping."""

    flags = 0  # HMM_DMIRROR_FLAG_*

    def __init__(self, mdevice: DmirrorDevice, mm: Mm) -> None:
        self.mdevice, self.mm = mdevice, mm
        self.pt, self.mutex = CpuTable(), Lock()  # the device's page table, and who reads or writes it

    def load(self, start: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return rights (DPT_*) and frames of bytes [start, end)."""
        slots = self.pt.slots(start >> 12, end - start >> 12)
        return self.pt.rights[slots], self.pt.frame[slots]

    def store(self, pages: Pfns, frames: Pfns, rights: Pfns | int) -> None:
        """Write the entries of `pages`."""
        slots = self.pt.slots_of(pages, create=True)
        self.pt.frame[slots], self.pt.rights[slots] = frames, rights

    def refuses(self) -> bool:
        """Whether the next allocation was told to fail (HMM_DMIRROR_FLAG_FAIL_ALLOC); only that one."""
        fails = bool(self.flags & HMM_DMIRROR_FLAG_FAIL_ALLOC)
        self.flags &= ~HMM_DMIRROR_FLAG_FAIL_ALLOC
        return fails

    def mmap(self, vma: Vma, thread: Thread) -> Wait:
        """Have the file itself mapped: what the area's operations are asked."""
        from kit.drivers.dmirror_ioctl import dmirror_fops_mmap

        return (yield from dmirror_fops_mmap(self, thread, vma))


class DmirrorDevice:
    """struct dmirror_device: /dev/hmm_dmirror<unit>; `dmirror_device_init` plugs its first memory in.

    Parameters
    ----------
    memory : PhysicalMemory
    unit : int
        Its device number, and its bit in the residency masks of the trace's moves is ``unit + 1``.
    zone_device_type : int
        HMM_DMIRROR_MEMORY_DEVICE_PRIVATE, whose memory grows by chunks of `chunk_pages`, or _COHERENT: one chunk.
    costs : mapping of str to float, optional
        Microseconds by the names of COSTS.

    Attributes
    ----------
    guarded : bool
        The real driver, and this one by default, ignores the invalidations of its own migrations, and enters what has
        moved or is exclusive without asking whether something was unmapped meanwhile. That leaves races open: a fault
        under way can enter a page that is leaving, a write can go to a page that is being copied, and MADV_DONTNEED,
        which needs no page lock, can leave an entry behind: its callback comes before the driver's entry, or even
        before the driver takes the page, and its zap after. A guarded device closes them, as a driver for real
        hardware has to (nouveau_atomic_range_fault: mmu_interval_read_begin before, mmu_interval_read_retry after).
    """

    def __init__(
        self, memory: PhysicalMemory, unit: int = 0, zone_device_type: int = HMM_DMIRROR_MEMORY_DEVICE_PRIVATE,
        costs: Mapping[str, float] | None = None, chunk_pages: int = DEVMEM_CHUNK_SIZE >> 12,
    ) -> None:  # fmt: skip
        self.memory, self.unit, self.zone_device_type, self.chunk_pages = memory, unit, zone_device_type, chunk_pages
        self.grows = zone_device_type == HMM_DMIRROR_MEMORY_DEVICE_PRIVATE
        self.select_device = MIGRATE_VMA_SELECT_DEVICE_PRIVATE if self.grows else MIGRATE_VMA_SELECT_DEVICE_COHERENT
        self.costs = Costs(COSTS, {**dict.fromkeys(COSTS, 0.0), **(costs or {})})
        self.devmem_chunks: list[DevPagemap] = []
        self.devmem_lock, self.calloc, self.cfree = Lock(), 0, 0
        self.free_pages, self.free_folios = array("q"), array("q")  # stacks: the page freed last is taken first
        self.mirrors: list[Dmirror] = []
        self.guarded = False

    def take(self, n: int, is_large: bool) -> NDArray[np.int64]:
        """Take up to `n` free pages, or heads of free folios, the one freed last first."""
        free = self.free_folios if is_large else self.free_pages
        at = max(len(free) - n, 0)
        taken = np.array(free[at:])[::-1]
        del free[at:]
        return taken

    def leaving(self, dmirror: Dmirror, thread: Thread, start: int, end: int) -> Wait:
        """A range is about to be copied: a guarded device may only read it, as what it writes would be lost."""
        if self.guarded:
            yield from dmirror.mutex.acquire(thread)
            slots = dmirror.pt.mapped(start >> 12, (end >> 12) - 1)
            dmirror.pt.rights[slots[dmirror.pt.rights[slots] == DPT_XA_TAG_WRITE]] = DPT_READ
            yield from dmirror.mutex.release(thread)

    def listen(self, dmirror: Dmirror, thread: Thread) -> Wait:
        """Return what `stale` asks for. A guarded device waits first for changes that it has been told of already.

        It waits as mmu_interval_read_begin does, but is no step: the driver that it guards has none here.
        """
        told = dmirror.mm.notifier_subscriptions  # None: a broken kernel that tells nobody
        if self.guarded and told is not None:
            yield from thread.sync()
            if dmirror.notifier.invalidate_seq == told.invalidate_seq:
                yield from told.wait_seq_released(thread, told.invalidate_seq)
        return dmirror.invalidations.total() - dmirror.invalidations[thread]

    def stale(self, dmirror: Dmirror, thread: Thread, since: int) -> bool:
        """Whether others than `thread` changed anything since `listen`, so that a guarded device enters nothing.

        What the thread itself has everybody hear, a huge page that its migration splits, leaves its pages where
        they are.
        """
        return self.guarded and dmirror.invalidations.total() - dmirror.invalidations[thread] != since

    # What a device with limited memory does in its own way (`kit.drivers.dmirror_limited`)

    def backing(self, frames: Pfns) -> Pfns:
        """Return the frames that hold the content of these (BACKING_PAGE); here device frames hold their own."""
        return frames

    def make_room(self, thread: Thread, pages: int) -> Wait:
        """Return how many of `pages` wanted pages there may be."""
        yield from ()
        return pages

    def arrived(self, frames: Pfns) -> None:
        """Pages of the device were handed out."""

    def left(self, frames: Pfns) -> None:
        """Pages of the device are free again."""

    def home(self, mm: Mm, thread: Thread, frames: Pfns, huge: bool) -> Wait:
        """Return system pages for device pages, a folio of them if `huge` and there is one; None: memory is out."""
        head = self.memory.alloc_huge() if huge else None
        if head is not None:
            return np.arange(head, head + HPAGE_PMD_NR)
        return (yield from alloc_folios(mm, thread, len(frames)))

    def carry(self, thread: Thread, src: Pfns, dst: Pfns) -> None:
        """The device's DMA engine copies pages."""
        self.memory.copy(src, dst)
        thread.charge(self.costs.copy_setup + (self.costs.dma_map + self.costs.dma_page) * len(src))
