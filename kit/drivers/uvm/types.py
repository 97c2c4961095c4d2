"""The driver's objects: processors, access types, va_space, va_range, va_block.

Three facts about a page are kept apart, as in the driver: *populated* (physical memory is held),
*resident* (that memory holds the valid copy), *mapped* (a page-table entry gives some right).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.content import Content
from kit.memory.space.vma import Vma
from kit.memory.table.pagemask import EMPTY, PageMask, from_bools, region
from kit.sim.engine import Engine
from kit.sim.locks import Lock

if TYPE_CHECKING:
    from kit.drivers.uvm.gpu import Gpu
    from kit.drivers.uvm.module import ModuleParameters
    from kit.drivers.uvm.perf_thrashing_state import BlockThrashing
    from kit.drivers.uvm.pmm_chunks import Chunk
    from kit.memory.space.mm import Mm

__all__ = [
    "ACCESS_NAMES", "ATOMIC_STRONG", "ATOMIC_WEAK", "BIG_PAGES", "BLOCK_PAGES", "COUNT_PROT", "CPU", "GPU",
    "MANAGED_BASE", "NV_ERR_MORE_PROCESSING_REQUIRED", "NV_OK", "NV_WARN_MORE_PROCESSING_REQUIRED", "PAGE",
    "PAGE_SHIFT", "PREFETCH", "READ", "READ_ONLY", "READ_WRITE", "READ_WRITE_ATOMIC", "REQUIRED_PROT", "WRITE",
    "Policy", "VaBlock", "VaRange", "VaSpace",
]  # fmt: skip

PAGE_SHIFT: Final = 12
PAGE: Final = 1 << PAGE_SHIFT
BLOCK_PAGES: Final = 512  # PAGES_PER_UVM_VA_BLOCK on 4 KiB hosts
BIG_PAGES: Final = 16  # 4 KiB pages in a 64 KiB big page
MANAGED_BASE: Final = 0x7F00_0000_0000
CPU: Final = 0  # processor ids; the CPU's is the lowest, so it is served first
GPU: Final = 1

# uvm_fault_access_type_t, ascending by intrusiveness
PREFETCH: Final = 0
READ: Final = 1
WRITE: Final = 2
ATOMIC_WEAK: Final = 3
ATOMIC_STRONG: Final = 4
ACCESS_NAMES: Final = ("prefetch", "read", "write", "atomic", "atomic")
# uvm_prot_t
READ_ONLY: Final = 1
READ_WRITE: Final = 2
READ_WRITE_ATOMIC: Final = 3
COUNT_PROT: Final = 4
REQUIRED_PROT: Final = np.array([READ_ONLY, READ_ONLY, READ_WRITE, READ_WRITE, READ_WRITE_ATOMIC], dtype=np.uint8)

# NV_STATUS (nvstatuscodes.h) of what a block operation calls; every other error ends it, as an exception.
NV_OK: Final = 0
NV_ERR_MORE_PROCESSING_REQUIRED: Final = 0x4D  # locks were dropped: the operation starts again
NV_WARN_MORE_PROCESSING_REQUIRED: Final = 0x1_0005  # the fault is throttled: it sleeps, then tries again


@dataclass
class Policy:
    """Advice given for a range (uvm_va_policy_t)."""

    preferred_location: int | None = None
    accessed_by: frozenset[int] = frozenset()
    read_duplication: bool = False


@dataclass
class VaRange:
    """A managed interval of virtual memory, cut into blocks of at most 2 MiB."""

    first: int
    pages: int
    vma: Vma
    va_space: VaSpace = field(repr=False)
    slot: int
    policy: Policy = field(default_factory=Policy)
    blocks: dict[int, VaBlock] = field(default_factory=dict)
    migratable: bool = True

    @property
    def end(self) -> int:
        """First page past the range."""
        return self.first + self.pages

    @property
    def read_duplicate(self) -> bool:
        """Whether the advice has effect: none while a GPU without page faults is there (uvm_va_policy.c)."""
        return self.policy.read_duplication and self.va_space.can_read_duplicate


class VaBlock:
    """A naturally aligned slice of a managed range: unit of locking, service and prefetch.

    Masks have ``pages`` bits; per processor: ``resident``, ``pte[prot]`` (pages mapped
    with at least that right), ``frames`` (the frame of each page, -1 where unpopulated).
    """

    __slots__ = (
        "all_pages", "big_ptes", "cancel_4k", "clean", "cpu_chunks", "discarded", "evicted",
        "fault_migrations_to_last_proc", "first", "frames", "gpu_chunks", "gpu_state",
        "last_migration_proc_id", "lock", "pages", "pte", "pte_2m", "range", "read_duplicated", "resident",
        "slot", "thrashing", "tracker", "va",
    )  # fmt: skip

    def __init__(self, va_range: VaRange, first: int, pages: int, slots: tuple[int, int]) -> None:
        self.range, self.first, self.pages, self.slot = va_range, first, pages, slots
        self.va = first << PAGE_SHIFT
        self.all_pages = region(0, pages)
        self.lock = Lock()
        self.resident = [EMPTY, EMPTY]
        self.pte = [[EMPTY] * COUNT_PROT, [EMPTY] * COUNT_PROT]
        self.frames: list[NDArray[np.int32]] = [np.full(pages, -1, dtype=np.int32) for _ in (CPU, GPU)]
        self.cpu_chunks: dict[int, tuple[int, int, int]] = {}  # first page: (first frame, pages, pages a chunk)
        self.gpu_chunks: dict[int, Chunk] = {}
        self.gpu_state = False
        self.read_duplicated = EMPTY
        self.discarded = EMPTY
        self.clean = EMPTY  # CPU pages not written since they came down (before Pascal)
        self.evicted = False
        self.pte_2m = False
        self.big_ptes = EMPTY
        self.cancel_4k = False
        self.tracker = 0.0
        self.last_migration_proc_id: int | None = None
        self.fault_migrations_to_last_proc = 0
        self.thrashing: BlockThrashing | None = None

    @property
    def whole(self) -> bool:
        """The block is a full 2 MiB."""
        return self.pages == BLOCK_PAGES

    def mapped(self, processor: int) -> PageMask:
        """Return the mask of pages that `processor` can at least read."""
        return self.pte[processor][READ_ONLY]

    def frames_at(self, processor: int, at: slice | NDArray[np.generic]) -> slice | NDArray[np.int32]:
        """Return the frames of the pages that `at` picks: a slice when they are known to be contiguous."""
        if isinstance(at, slice):
            base = self.base(processor)
            if base >= 0:
                return slice(base + at.start, base + at.stop)
        return self.frames[processor][at]

    def base(self, processor: int) -> int:
        """Return the frame of the first page when one chunk backs the whole block at `processor`, else -1."""
        if processor == GPU:
            chunk = self.gpu_chunks.get(0)
            return chunk.frame if chunk is not None and chunk.pages == self.pages else -1
        held = self.cpu_chunks.get(0)
        return held[0] if held is not None and held[1] == self.pages else -1

    def populated(self, processor: int) -> PageMask:
        """Return the mask of pages for which memory is held at `processor`."""
        if self.base(processor) >= 0:
            return self.all_pages
        return from_bools(self.frames[processor] >= 0)


class VaSpace:
    """One process's unified memory (uvm_va_space_t): ranges, the GPU, the address space."""

    def __init__(self, engine: Engine, module: ModuleParameters, mm: Mm, gpu: Gpu) -> None:
        self.engine, self.module, self.mm, self.host, self.gpu = engine, module, mm, mm.memory, gpu
        self.next_page = MANAGED_BASE // PAGE  # libcuda places managed memory itself, one allocation above the other
        gpu.va_space = self
        self.can_read_duplicate = gpu.hal.replayable_faults
        self.content = Content()
        self.duplicates = False  # whether there have ever been read-duplicated pages
        # Processors whose atomics on a location are not native: a promotion would take rights from them.
        self.contenders = tuple(
            tuple(p for p in (CPU, GPU) if not self.native_atomics(p, at) and (p == CPU or gpu.hal.replayable_faults))
            for at in (CPU, GPU)
        )
        self.ranges: list[VaRange] = []
        self.worker = engine.thread("uvm worker")

    def find(self, page: int) -> VaRange | None:
        """Return the managed range that holds virtual page `page`, or None (uvm_va_range_find)."""
        first, past = 0, len(self.ranges)
        while first < past:
            middle = first + past >> 1
            found = self.ranges[middle]
            if page < found.first:
                past = middle
            elif page < found.first + found.pages:
                return found
            else:
                first = middle + 1
        return None

    def slots(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the GPU page table's slot of each page; within one range that is an addition."""
        home = self.find(int(pages[0]))
        if home is not None:
            within = pages - home.first
            if within.view(np.uint64).max() < home.pages:  # a page before the range is a large number
                return within + home.slot
        return self.gpu.table.walk(pages)

    def accessible(self, processor: int, location: int) -> bool:
        """Whether `processor` can map memory at `location`: over PCIe a GPU reaches system memory, not the reverse."""
        return processor == location or (processor == GPU and location == CPU)

    def native_atomics(self, processor: int, location: int) -> bool:
        """Whether atomics by `processor` on memory at `location` are native: over PCIe only its own."""
        return processor == location
