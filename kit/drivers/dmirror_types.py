"""The HMM test driver's words and structs (lib/test_hmm_uapi.h and lib/test_hmm.c @ 7.0), and what its device costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from errno import ENOENT
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import Errno
from kit.memory.alloc import alloc_folios
from kit.memory.cpu_table import CpuTable, Slots
from kit.memory.memremap import DevPagemap
from kit.memory.mmu_notifier import MmuIntervalNotifier, MmuNotifierRange
from kit.sim.engine import Lock, Thread, Wait
from kit.sim.trace import step

if TYPE_CHECKING:
    from kit.memory.mm import Mm
    from kit.memory.pages import PhysicalMemory
    from kit.memory.vma import Vma
    from kit.sim.engine import Thread, Wait

__all__ = [
    "COSTS", "DEVMEM_CHUNK_SIZE", "DPT_NONE", "DPT_READ", "DPT_XA_TAG_ATOMIC", "DPT_XA_TAG_WRITE",
    "HMM_DMIRROR_CHECK_EXCLUSIVE", "HMM_DMIRROR_EXCLUSIVE", "HMM_DMIRROR_FLAGS", "HMM_DMIRROR_FLAG_FAIL_ALLOC",
    "HMM_DMIRROR_MEMORY_DEVICE_COHERENT", "HMM_DMIRROR_MEMORY_DEVICE_PRIVATE", "HMM_DMIRROR_MIGRATE_TO_DEV",
    "HMM_DMIRROR_MIGRATE_TO_SYS", "HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL", "HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE",
    "HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL", "HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE", "HMM_DMIRROR_PROT_ERROR",
    "HMM_DMIRROR_PROT_NONE", "HMM_DMIRROR_PROT_PMD", "HMM_DMIRROR_PROT_PUD", "HMM_DMIRROR_PROT_READ",
    "HMM_DMIRROR_PROT_WRITE", "HMM_DMIRROR_PROT_ZERO", "HMM_DMIRROR_READ", "HMM_DMIRROR_RELEASE",
    "HMM_DMIRROR_SNAPSHOT", "HMM_DMIRROR_WRITE", "Bounce", "Dmirror", "DmirrorDevice", "FreeList", "HmmDmirrorCmd",
]  # fmt: skip

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


class Dmirror:
    """struct dmirror: one open device file, mirroring the address space of who opened it.

    ``pt``, the device's page table, is read and written under ``mutex``, which the invalidation takes too.
    """

    def __init__(self, mdevice: DmirrorDevice, mm: Mm) -> None:
        self.mdevice, self.mm = mdevice, mm
        self.pt = CpuTable()
        self.notifier = MmuIntervalNotifier(self)
        self.mutex = Lock()
        self.flags = 0
        self.invalidations = 0  # by others than the device's own migrations
        self.id = len(mdevice.mirrors)  # what zone_device_data of its device pages holds
        mdevice.mirrors.append(self)

    def lock_for(self, thread: Thread, range: MmuNotifierRange) -> Wait:
        """Take the mutex if the invalidation may sleep or it is free; return whether it was taken."""
        yield from thread.sync()
        if not range.blockable and self.mutex.holder is not None:
            return False
        yield from self.mutex.acquire(thread)
        return True

    def read_back(self, thread: Thread, cmd: HmmDmirrorCmd) -> Wait:
        """Let the device read a range without faulting, for the user to compare; -ENOENT where it cannot."""
        bounce = Bounce(self, cmd)
        yield from self.mutex.acquire(thread)
        ret = bounce.dmirror_do_read(thread, cmd.addr, cmd.addr + (cmd.npages << 12))
        yield from self.mutex.release(thread)
        cmd.cpages = bounce.cpages
        if not ret:
            cmd.rows(bounce.data.shape[1])[:] = bounce.data
        return ret

    def mmap(self, vma: Vma, thread: Thread) -> Wait:
        """Have the file itself mapped: what the area's operations are asked."""
        from kit.drivers.dmirror import dmirror_fops_mmap

        return (yield from dmirror_fops_mmap(self, thread, vma))

    def load(self, start: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Return rights (DPT_*) and frames of bytes [start, end)."""
        slots = self.pt.slots(start >> 12, end - start >> 12)
        return self.pt.rights[slots], self.pt.frame[slots]

    def store(self, start: int, frames: NDArray[np.integer], rights: NDArray[np.integer] | int) -> None:
        """Write entries from byte `start` on."""
        slots: Slots = self.pt.slots(start >> 12, len(frames), create=True)
        self.pt.frame[slots], self.pt.rights[slots] = frames, rights

    def forget(self, frames: NDArray[np.integer]) -> int:
        """Clear every entry for one of these frames; return how many there were."""
        slots = np.flatnonzero((self.pt.rights > 0) & np.isin(self.pt.frame, frames))
        self.pt.rights[slots] = DPT_NONE
        return len(slots)

    def slots_in(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the slots of the entries of pages `first` to `last` (inclusive)."""
        numbers, rows = self.pt.leaves(first, last - first + 1)
        lanes = np.arange(512)
        pages, slots = (numbers[:, None] * 512 + lanes).ravel(), (rows[:, None] * 512 + lanes).ravel()
        return np.asarray(slots[(pages >= first) & (pages <= last) & (self.pt.rights[slots] > 0)])

    def erase(self, first: int, last: int) -> int:
        """Clear the entries of pages `first` to `last` (inclusive); return how many there were."""
        slots = self.slots_in(first, last)
        self.pt.rights[slots] = DPT_NONE
        return len(slots)


class DmirrorDevice:
    """struct dmirror_device: /dev/hmm_dmirror<unit>; `dmirror_device_init` plugs its first memory in.

    Parameters
    ----------
    memory : PhysicalMemory
    unit : int
        Its device number, and its bit in the residency masks of the trace's moves is ``unit + 1``.
    zone_device_type : int
        HMM_DMIRROR_MEMORY_DEVICE_PRIVATE, whose memory grows chunk by chunk, or _COHERENT, which has one chunk.
    costs : mapping of str to float, optional
        Microseconds by the names of COSTS.
    chunk_pages : int
        Pages of a chunk.

    Attributes
    ----------
    guarded : bool
        The real driver, and this one by default, ignores the invalidations of its own migrations and enters what has
        moved without asking whether something was unmapped meanwhile. That leaves three races open: a fault under way
        can enter a page that is leaving, a write can go to a page that is being copied, and MADV_DONTNEED during a
        migration can leave an entry behind. A guarded device closes them, as a driver for real hardware has to.
    """

    def __init__(
        self, memory: PhysicalMemory, unit: int = 0, zone_device_type: int = HMM_DMIRROR_MEMORY_DEVICE_PRIVATE,
        costs: Mapping[str, float] | None = None, chunk_pages: int = DEVMEM_CHUNK_SIZE >> 12,
    ) -> None:  # fmt: skip
        self.memory, self.unit, self.zone_device_type, self.chunk_pages = memory, unit, zone_device_type, chunk_pages
        self.costs = SimpleNamespace(**{**dict.fromkeys(COSTS, 0.0), **(costs or {})})
        self.devmem_chunks: list[DevPagemap] = []
        self.devmem_lock = Lock()
        self.calloc = self.cfree = 0
        self.free_pages, self.free_folios = FreeList(), FreeList()
        self.mirrors: list[Dmirror] = []
        self.guarded = False

    # What another device does in its own way (`kit.drivers.dmirror_limited`)

    def backing(self, frames: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the frames that hold the content of these (BACKING_PAGE); here device frames hold their own."""
        return frames

    def make_room(self, thread: Thread, pages: int) -> Wait:
        """Return how many of `pages` wanted pages there may be."""
        yield from ()
        return pages

    def arrived(self, frames: NDArray[np.integer]) -> None:
        """Pages of the device were handed out."""

    def left(self, frames: NDArray[np.integer]) -> None:
        """Pages of the device are free again."""

    def keeps(self, frames: NDArray[np.integer]) -> bool:
        """Whether the content of any of these frames is in a system page that the driver kept."""
        return False

    def home(self, mm: Mm, thread: Thread, frames: NDArray[np.integer]) -> Wait:
        """Return system pages for device pages (None: out of memory), and which of them have the content already."""
        pages = yield from alloc_folios(mm, thread, len(frames))
        return pages, np.zeros(len(frames), dtype=np.bool_)

    def carry(self, thread: Thread, src: NDArray[np.integer], dst: NDArray[np.integer]) -> None:
        """The device's DMA engine copies pages."""
        self.memory.copy(src, dst)
        thread.charge(self.costs.copy_setup + (self.costs.dma_map + self.costs.dma_page) * len(src))


class FreeList:
    """A stack of free pages: last in, first out, as the driver's list through zone_device_data."""

    def __init__(self) -> None:
        self._pfns = np.zeros(0, dtype=np.int64)
        self._depth = 0

    def __len__(self) -> int:
        return self._depth

    def push(self, pfns: NDArray[np.integer]) -> None:
        """Put pages on it, the last on top."""
        need = self._depth + len(pfns)
        if need > len(self._pfns):
            self._pfns = np.concatenate([self._pfns[: self._depth], np.zeros(need, dtype=np.int64)])
        self._pfns[self._depth : need] = pfns
        self._depth = need

    def pop(self, n: int) -> NDArray[np.int64]:
        """Take up to `n` pages from the top."""
        n = min(n, self._depth)
        self._depth -= n
        return self._pfns[self._depth : self._depth + n][::-1].copy()

    def clear(self) -> None:
        """Forget all pages."""
        self._depth = 0


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
