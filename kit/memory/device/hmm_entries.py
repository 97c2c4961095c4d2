"""What a device asks and what the CPU's entries say to it: words of include/linux/hmm.h @ 7.0, and the decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.memory.physical.pages import ZERO_PFN
from kit.memory.table.leaf_tables import Slots
from kit.memory.types import HPAGE_PMD_NR, Bit, Kind, Leaf

if TYPE_CHECKING:
    from kit.memory.notifier.mmu_notifier_types import MmuIntervalNotifier
    from kit.memory.space.mm import Mm

__all__ = [
    "HMM_PFN_DMA_MAPPED", "HMM_PFN_ERROR", "HMM_PFN_INOUT_FLAGS", "HMM_PFN_ORDER_SHIFT", "HMM_PFN_P2PDMA",
    "HMM_PFN_P2PDMA_BUS", "HMM_PFN_REQ_FAULT", "HMM_PFN_REQ_WRITE", "HMM_PFN_VALID", "HMM_PFN_WRITE", "HmmRange",
    "Stretch", "classify", "hmm_pfn_to_map_order", "hmm_pfn_to_pfn",
]  # fmt: skip

HMM_PFN_VALID = HMM_PFN_REQ_FAULT = 1 << 63
HMM_PFN_WRITE = HMM_PFN_REQ_WRITE = 1 << 62
HMM_PFN_ERROR = 1 << 61
HMM_PFN_DMA_MAPPED, HMM_PFN_P2PDMA, HMM_PFN_P2PDMA_BUS = 1 << 60, 1 << 59, 1 << 58
HMM_PFN_INOUT_FLAGS = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS
HMM_PFN_ORDER_SHIFT = 53

_VALID, _WRITE, _ERROR = np.uint64(HMM_PFN_VALID), np.uint64(HMM_PFN_WRITE), np.uint64(HMM_PFN_ERROR)
_FAULT, _FAULT_WRITE = np.uint64(HMM_PFN_REQ_FAULT), np.uint64(HMM_PFN_REQ_WRITE)
_ORDERS = np.array([0, 9 << HMM_PFN_ORDER_SHIFT, 18 << HMM_PFN_ORDER_SHIFT], dtype=np.uint64)
_LEAF = HPAGE_PMD_NR


@dataclass(eq=False, slots=True)
class HmmRange:
    """struct hmm_range: bytes [start, end) and what is asked and answered about each of their pages.

    Attributes
    ----------
    notifier : MmuIntervalNotifier
    notifier_seq : int
        From `mmu_interval_read_begin`.
    start, end : int
        Bytes, page aligned.
    hmm_pfns : ndarray of uint64, shape (pages,)
        In: HMM_PFN_REQ_* flags; out: pfn, flags and order. On an error, partly overwritten.
    default_flags, pfn_flags_mask : int
        The request of a page is ``(hmm_pfns[i] & pfn_flags_mask) | default_flags``.
    dev_private_owner : object
        Whose device-private pages are reported as they are; None: nobody's.
    """

    notifier: MmuIntervalNotifier
    notifier_seq: int
    start: int
    end: int
    hmm_pfns: NDArray[np.uint64]
    default_flags: int = 0
    pfn_flags_mask: int = 0
    dev_private_owner: object = None

    def __post_init__(self) -> None:
        if self.start % 4096 or self.end % 4096 or len(self.hmm_pfns) < (self.end - self.start) >> 12:
            raise ValueError(f"hmm range {self.start:#x}..{self.end:#x} with {len(self.hmm_pfns)} entries")


def hmm_pfn_to_pfn(entries: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the page frame number of each entry; meaningful where HMM_PFN_VALID is set."""
    return (entries & np.uint64((1 << HMM_PFN_ORDER_SHIFT) - 1)).astype(np.int64)


def hmm_pfn_to_map_order(entries: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the log2 of the pages that the CPU maps with one entry."""
    return (entries >> np.uint64(HMM_PFN_ORDER_SHIFT) & np.uint64(31)).astype(np.int64)


def _flags_of_states() -> NDArray[np.uint64]:
    """cpu_flags of every (kind, bits): a device-private entry's as if its owner asked, PROTNONE as none."""
    kind, bits = np.divmod(np.arange(8 * 256), 256)
    seen = ((kind == Kind.PRESENT) & (bits & Bit.PROTNONE == 0)) | (kind == Kind.DEVICE_PRIVATE)
    writable = np.where(bits & Bit.WRITABLE, HMM_PFN_WRITE, 0).astype(np.uint64)
    return np.where(seen, _VALID | writable, np.uint64(0))


_FLAGS = _flags_of_states()
_RESOLVABLE = (Kind.PRESENT, Kind.DEVICE_PRIVATE, Kind.MIGRATION)


@dataclass(slots=True)
class Stretch:
    """Entries as a device sees them, up to the first (`bad`, -1: none) that needs a fault, a wait or an error."""

    values: NDArray[np.uint64]
    bad: int = -1
    kind: int = 0
    frame: int = -1
    cpu_flags: int = 0
    huge: bool = False
    error: str = ""  # why no fault can help; empty: one can


def classify(mm: Mm, slots: Slots, owned: NDArray[np.bool_], asked: NDArray[np.uint64] | int) -> Stretch:
    """Translate existing entries of consecutive pages, in the order of hmm_vma_handle_pte and hmm_vma_handle_pmd.

    Parameters
    ----------
    slots : slice or ndarray of int64
    owned : ndarray of bool, indexed by pagemap
        Whose device-private pages are reported as they are.
    asked : ndarray of uint64 or int
        Request of each page.
    """
    table = mm.table
    kind, bits, frame = table.kind[slots], table.bits[slots], table.frame[slots]
    flags = _FLAGS[kind.astype(np.uint16) << np.uint16(8) | bits]
    level = _levels(mm, slots)
    own: NDArray[np.bool_] | None = None
    if int(kind.min()) == Kind.PRESENT == int(kind.max()):
        values = frame.astype(np.uint64)
    else:
        private = kind == Kind.DEVICE_PRIVATE
        own = private & owned[mm.memory.pgmap[np.where(private, frame, 0)]]
        flags[private & ~own] = 0
        values = np.where((kind == Kind.PRESENT) | own, frame, 0).astype(np.uint64)
    if level is not None:
        flags |= np.where(flags & _VALID, _ORDERS[level], np.uint64(0))
    values |= flags
    if level is not None and own is not None:
        # hmm_vma_handle_absent_pmd: what a PTE would show as nothing, a PMD shows as an error.
        values[(level > 0) & (kind != Kind.PRESENT) & (kind != Kind.MIGRATION) & ~own] = _ERROR
    lacking = _lacking(asked, flags, own)
    bad = lacking
    if (bits & np.uint8(Bit.SPECIAL)).any():
        special = (kind == Kind.PRESENT) & (bits & np.uint8(Bit.SPECIAL) != 0) & (frame != ZERO_PFN)
        if level is not None:
            special &= level == Leaf.PTE
        values[special] = _ERROR
        bad = lacking | special & (np.asarray(asked, dtype=np.uint64) & _FAULT != 0)
    if not bad.any():
        return Stretch(values)
    at = int(bad.argmax())
    huge = level is not None and bool(level[at])
    error = ""
    if kind[at] == Kind.HWPOISON or (huge and kind[at] not in _RESOLVABLE):
        error = "poisoned, or an entry that no fault resolves"
    elif not lacking[at]:
        error = "mapped, but without struct page"
    if huge:  # the leaf is one entry: what one of its pages asks for happens at its first
        slot = slots.start + at if isinstance(slots, slice) else int(slots[at])
        at = max(0, at - slot % _LEAF)
    return Stretch(values, at, int(kind[at]), int(frame[at]), int(flags[at]), huge, error)


def _levels(mm: Mm, slots: Slots) -> NDArray[np.uint8] | None:
    """Return the leaf level of each entry, or None when all are PTEs."""
    level = mm.table.leaf_level
    if isinstance(slots, slice):
        first, last = slots.start // _LEAF, (slots.stop - 1) // _LEAF
        rows = level[first : last + 1]
        if not rows.any():
            return None
        return np.repeat(rows, _LEAF)[slots.start - first * _LEAF : slots.stop - first * _LEAF]
    found = level[slots // _LEAF]
    return found if found.any() else None


def _lacking(
    asked: NDArray[np.uint64] | int, flags: NDArray[np.uint64], own: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Return which entries fall short of what is asked (hmm_pte_need_fault)."""
    if isinstance(asked, int):
        if not asked & HMM_PFN_REQ_FAULT:
            return np.zeros(len(flags), dtype=bool)
        lacking = flags & (_WRITE if asked & HMM_PFN_REQ_WRITE else _VALID) == 0
    else:
        lacking = (asked & _FAULT != 0) & (flags & np.where(asked & _FAULT_WRITE, _WRITE, _VALID) == 0)
    # Its owner is told of a device-private page before the request is looked at.
    return np.asarray(lacking if own is None else lacking & ~own)
