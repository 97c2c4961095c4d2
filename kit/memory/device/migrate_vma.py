"""What a driver and migrate_vma_* tell each other: the words of include/linux/migrate.h @ 7.0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kit.memory.space.vma import Vma
from kit.memory.types import HPAGE_PMD_NR

__all__ = [
    "MIGRATE_PFN_COMPOUND",
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_SHIFT",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "MIGRATE_VMA_SELECT_COMPOUND",
    "MIGRATE_VMA_SELECT_DEVICE_COHERENT",
    "MIGRATE_VMA_SELECT_DEVICE_PRIVATE",
    "MIGRATE_VMA_SELECT_SYSTEM",
    "MigratePfns",
    "MigrateVma",
    "migrate_pfn",
    "migrate_pfn_to_pfn",
    "migrate_pieces",
]  # fmt: skip

MIGRATE_PFN_VALID, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_WRITE, MIGRATE_PFN_COMPOUND = 1 << 0, 1 << 1, 1 << 3, 1 << 4
MIGRATE_PFN_SHIFT = 6
MIGRATE_VMA_SELECT_SYSTEM, MIGRATE_VMA_SELECT_DEVICE_PRIVATE = 1 << 0, 1 << 1
MIGRATE_VMA_SELECT_DEVICE_COHERENT, MIGRATE_VMA_SELECT_COMPOUND = 1 << 2, 1 << 3

MigratePfns = NDArray[np.uint64]  # one word a page: MIGRATE_PFN_* and a pfn


@dataclass(eq=False)
class MigrateVma:
    """struct migrate_vma.

    Attributes
    ----------
    vma : Vma or None
        The area; the mmap lock is held from setup to finalize.
    src, dst : ndarray of uint64, shape (pages,)
        Filled by `migrate_vma_setup`, and by the driver; of a compound entry only the first of its 512 words counts.
    start, end : int
        Bytes.
    pgmap_owner : object
        Whose device pages may be selected; also told to notifiers, so that the driver can ignore its own migration.
    flags : int
        MIGRATE_VMA_SELECT_*.
    fault_page : int or None
        pfn of the locked device-private page behind a CPU fault.
    cpages, npages : int
        Out: entries that can migrate (a compound one counts once), and entries in all.
    began : float
        Time of the setup: when the pages left their old place, as the trace's moves have it.
    """

    vma: Vma | None
    src: MigratePfns
    dst: MigratePfns
    start: int
    end: int
    pgmap_owner: object = None
    flags: int = MIGRATE_VMA_SELECT_SYSTEM
    fault_page: int | None = None
    cpages: int = 0
    npages: int = 0
    began: float = 0.0

    @property
    def area(self) -> Vma:
        """The area, once it is known to be there."""
        if self.vma is None:
            raise ValueError("this migration has no area")
        return self.vma


def migrate_pfn(pfns: NDArray[np.integer]) -> MigratePfns:
    """Return the words that name pages: VALID and the pfn."""
    return np.asarray(pfns).astype(np.uint64) << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)


def migrate_pfn_to_pfn(words: MigratePfns) -> NDArray[np.int64]:
    """Return the pfn that each word names; meaningless where it is not VALID."""
    return (words >> np.uint64(MIGRATE_PFN_SHIFT)).astype(np.int64)


def migrate_pieces(words: MigratePfns, at: NDArray[np.integer]) -> Iterator[tuple[NDArray[np.integer], MigratePfns]]:
    """Yield what moves in one piece: the pages of each compound entry of `words[at]`, then all single pages together.

    Yields
    ------
    at : ndarray, shape (n,)
        Where the pages are in `words`.
    each : ndarray of uint64, shape (n,)
        A word for every page: those of a compound entry repeat its flags, and name pages one after the other.
    """
    large = words[at] & np.uint64(MIGRATE_PFN_COMPOUND) != 0
    lanes = np.arange(HPAGE_PMD_NR)
    for head in at[large].tolist():
        yield head + lanes, words[head] + (lanes.astype(np.uint64) << np.uint64(MIGRATE_PFN_SHIFT))
    if not large.all():
        yield at[~large], words[at[~large]]
