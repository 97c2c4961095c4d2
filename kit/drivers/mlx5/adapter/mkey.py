"""Memory keys as the hardware holds them: a context and a translation table.

An mkey's table is one flat array that UMR work requests overwrite 64 bytes at a time with finished words: DMA addresses
with two permission bits (MTT), or keys with addresses (KLM, KSM). A slot of an indirect key names another *key*, with
a protection domain, rights and a free bit of its own, and not a table below it. That is why these tables are
arrays and not the kit's radix tree (`kit.memory.table.pagetable`): a directory entry could hold none of it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.enums import KLM, AccessMode
from kit.memory.physical.zeros import zeros

__all__ = ["HwMkey", "Need"]


class Need(IntEnum):
    """What an access needs of a key."""

    LOCAL_READ = 0
    LOCAL_WRITE = 1
    REMOTE_READ = 2
    REMOTE_WRITE = 3
    REMOTE_ATOMIC = 4


_RIGHT = ("lr", "lw", "rr", "rw", "a")  # the mkey's bit for each Need


class HwMkey:
    """One mkey: its context, whether it may page-fault, and its translation table.

    Attributes
    ----------
    mkc : Mkc
    pg_access : bool
        A missing entry is a page fault; without it, an error.
    """

    __slots__ = ("_high", "_low", "_xlt", "index", "mkc", "pg_access")

    def __init__(self, index: int, mkc: Mkc, pg_access: bool) -> None:
        self.index, self.mkc, self.pg_access = index, mkc, pg_access
        self._xlt: NDArray[Any] | None = None
        self._low, self._high = 1 << 62, 0  # what `filled` says

    @property
    def filled(self) -> slice:
        """Entries outside have been zero ever since the table was made, or are zero again."""
        low, high = self._low, min(self._high, len(self.entries))
        return slice(low, high) if low < high else slice(0, 0)

    @property
    def xlt(self) -> NDArray[Any]:
        """Translation table, to be changed at will: uint64 (MTT) or `KLM` records."""
        self._low, self._high = 0, 1 << 62
        return self.entries

    @property
    def entries(self) -> NDArray[Any]:
        """Translation table, to be read; a key that nobody has used yet has not allocated it."""
        if self._xlt is None:
            octowords = -(-self.mkc.translations_octword_size // 4) * 4  # in the 64 bytes that UMR writes
            indirect = self.mkc.access_mode in (AccessMode.KSM, AccessMode.KLM)
            self._xlt = zeros(octowords, KLM) if indirect else zeros(2 * octowords, np.uint64)
        return self._xlt

    def write(self, first: int, entries: NDArray[Any]) -> None:
        """Overwrite entries from `first` on."""
        self.entries[first : first + len(entries)] = entries
        self._low, self._high = min(self._low, first), max(self._high, first + len(entries))

    def clear(self, first: int, count: int) -> None:
        """Zero `count` entries from `first` on; what has never been anything else is left alone."""
        low, high = max(first, self._low), min(first + count, self._high)
        if low < high:
            self.entries[low:high] = 0
        if first <= self._low and first + count >= self._high:
            self._low, self._high = 1 << 62, 0

    @property
    def key(self) -> int:
        """Index and variant."""
        return self.index << 8 | self.mkc.mkey_7_0

    def refuses(self, key: int, va: int, length: int, need: Need, pd: int) -> str:
        """Return why the key forbids an access, or an empty string."""
        mkc = self.mkc
        if mkc.free:
            return "the key is free"
        if mkc.mkey_7_0 != key & 0xFF:
            return "the key has another variant"
        if mkc.access_mode == AccessMode.NULL:
            return ""
        if mkc.pd != pd:
            return "the key belongs to another protection domain"
        if not getattr(mkc, _RIGHT[need]):
            return f"the key lacks the right {_RIGHT[need]}"
        if not mkc.length64 and not mkc.start_addr <= va <= va + length <= mkc.start_addr + mkc.len:
            return "the access leaves the key's range"
        return ""
