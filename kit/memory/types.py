"""Names and numbers of Linux memory management, under the kernel's own names; plain integers, fast in numpy.

Sources: include/linux/{mm,mm_types,page-flags,mman}.h and arch/x86/include/asm/pgtable_types.h @ 7.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kit.memory.space.vma import Vma
    from kit.sim.engine import Thread, Wait

Runs = Sequence[tuple[int, int]]  # of pages: the first, and how many

PAGE = 4096
PAGE_SHIFT = 12
HPAGE_PMD_ORDER = 9
HPAGE_PMD_NR = 512  # pages of a PMD leaf, entries of a leaf table
HPAGE_PMD_SIZE = HPAGE_PMD_NR * PAGE
HPAGE_PUD_ORDER = 18
HPAGE_PUD_NR = 1 << HPAGE_PUD_ORDER

# What mmap and mprotect ask for (include/uapi/asm-generic/mman-common.h).
PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_LOCKED, MAP_NORESERVE, MAP_POPULATE, MAP_HUGETLB = 0x2000, 0x4000, 0x8000, 0x40000
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED, MADV_FREE = 0, 1, 2, 3, 4, 8
MADV_DONTFORK, MADV_DOFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 10, 11, 14, 15
MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 20, 21, 22, 23, 25
MADV_HWPOISON = 100

# vma->vm_flags
VM_READ, VM_WRITE, VM_EXEC, VM_SHARED = 0x1, 0x2, 0x4, 0x8
VM_MAYREAD, VM_MAYWRITE, VM_MAYEXEC, VM_MAYSHARE = 0x10, 0x20, 0x40, 0x80
VM_PFNMAP, VM_LOCKED, VM_IO = 0x400, 0x2000, 0x4000
VM_DONTCOPY, VM_DONTEXPAND, VM_ACCOUNT, VM_NORESERVE, VM_HUGETLB = 0x20000, 0x40000, 0x100000, 0x200000, 0x400000
VM_MIXEDMAP, VM_HUGEPAGE, VM_NOHUGEPAGE = 0x10000000, 0x20000000, 0x40000000
VM_SPECIAL = VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP
VM_ACCESS_FLAGS = VM_READ | VM_WRITE | VM_EXEC

# vm_fault_t
VM_FAULT_OOM, VM_FAULT_SIGBUS, VM_FAULT_MAJOR, VM_FAULT_HWPOISON = 0x1, 0x2, 0x4, 0x10
VM_FAULT_SIGSEGV, VM_FAULT_NOPAGE, VM_FAULT_LOCKED, VM_FAULT_RETRY = 0x40, 0x100, 0x200, 0x400
VM_FAULT_FALLBACK, VM_FAULT_COMPLETED = 0x800, 0x4000
VM_FAULT_ERROR = VM_FAULT_OOM | VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV | VM_FAULT_HWPOISON | VM_FAULT_FALLBACK

# enum fault_flag
FAULT_FLAG_WRITE, FAULT_FLAG_MKWRITE, FAULT_FLAG_ALLOW_RETRY, FAULT_FLAG_RETRY_NOWAIT = 0x1, 0x2, 0x4, 0x8
FAULT_FLAG_KILLABLE, FAULT_FLAG_TRIED, FAULT_FLAG_USER, FAULT_FLAG_REMOTE = 0x10, 0x20, 0x40, 0x80
FAULT_FLAG_INTERRUPTIBLE, FAULT_FLAG_UNSHARE, FAULT_FLAG_VMA_LOCK = 0x200, 0x400, 0x1000

# gup_flags
FOLL_WRITE, FOLL_GET, FOLL_DUMP, FOLL_FORCE, FOLL_NOWAIT = 0x1, 0x2, 0x4, 0x8, 0x10
FOLL_HWPOISON, FOLL_LONGTERM, FOLL_SPLIT_PMD, FOLL_PIN = 0x40, 0x100, 0x200, 1 << 19


class Kind:
    """What a page-table entry is."""

    NONE, PRESENT, SWAP, MIGRATION, DEVICE_PRIVATE, DEVICE_EXCLUSIVE, HWPOISON, MARKER = range(8)
    WITH_PAGE = (False, True, False, True, True, True, False, False)  # does `frame` name a page counted by rmap?


class Bit:
    """Flags of a page-table entry, present or not."""

    WRITABLE, YOUNG, DIRTY, SOFT_DIRTY, PROTNONE, SPECIAL, UFFD_WP = 1, 2, 4, 8, 16, 32, 64
    READ_EXCLUSIVE = 128  # readable entry of a page that is exclusive to this mm: migration, swap


class PG:
    """Flags of a page or folio (enum pageflags); all but ANON_EXCLUSIVE and HWPOISON live on the head of a folio."""

    LOCKED, LRU, DIRTY, ANON, ANON_EXCLUSIVE, SWAPBACKED, SWAPCACHE, HWPOISON = 1, 2, 4, 8, 16, 32, 64, 128
    RESERVED, YOUNG, WRITEBACK, UPTODATE, HUGETLB, ACTIVE, MLOCKED = 256, 512, 1024, 2048, 4096, 8192, 16384


class Leaf:
    """Level of the leaf that a row of the CPU's table is part of."""

    PTE, PMD, PUD = 0, 1, 2


@dataclass
class Vmf:
    """struct vm_fault: one fault on its way.

    Attributes
    ----------
    vma : Vma
    address : int
        Faulting address in bytes, rounded down to its page.
    flags : int
        FAULT_FLAG_* bits.
    page : int
        pfn that the entry names or that a driver's `fault` op found; -1 when there is none.
    pmd : bool
        The entry is PMD-sized (``vmf->pte == NULL``).
    """

    vma: Vma
    address: int
    flags: int
    page: int = -1
    pmd: bool = False


class VmOperations(Protocol):
    """struct vm_operations_struct, as far as a driver's area needs it.

    Beside `fault` a driver may have ``mmap(vma, thread) -> Wait`` (its file's, for a new area; 0 or -errno),
    ``page_mkwrite(vmf, thread) -> Wait`` (as `fault`, for a write to a read-only entry of a shared area),
    ``may_split(vma, page) -> int`` (0, or -errno: the area may not be cut there) and
    ``close(vma, thread)`` (the area is gone, and its entries with it).
    """

    def fault(self, vmf: Vmf, thread: Thread) -> Wait:
        """Serve a fault; return VM_FAULT_* bits: NOPAGE when the entry is in, else 0 with a referenced `vmf.page`."""
        ...


Pages = NDArray[np.int64]  # virtual page numbers
Pfns = NDArray[np.integer]  # page frame numbers
