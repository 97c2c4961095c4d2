"""All memory keys of a device, and the walk from a key and an address to DMA addresses."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.drivers.mlx5.adapter.mkey import HwMkey, Need
from kit.drivers.mlx5.descriptors import Mkc
from kit.drivers.mlx5.enums import KLM, MTT_PRESENT, MTT_READ, MTT_WRITE, PAGE, PAGE_SHIFT, AccessMode

__all__ = ["NOTHING", "MkeyTable", "Run", "Translation", "Verdict"]

_BITS = np.uint64(MTT_PRESENT)
Run = tuple[NDArray[np.uint64], int, int]  # DMA addresses, offset in the first page, bytes
NOTHING = np.zeros(0, dtype=np.uint64)
_WRITES = (False, True, False, True, True)  # for each Need


class Verdict(IntEnum):
    """How a translation ended."""

    OK = 0
    FAULT = 1  # a page is missing and the key may fault
    ERROR = 2  # protection: key, domain, right or bounds


@dataclass(slots=True)
class Translation:
    """Result of `MkeyTable.translate`.

    Attributes
    ----------
    verdict : Verdict
    addresses : ndarray of uint64, shape (n,)
        DMA address of every 4 KiB piece up to the end or the first one that is missing; the first has no page offset.
    offset : int
        Offset of the access in its first piece, bytes.
    good : int
        Bytes that are translated.
    key, va, size : int
        On a fault: the direct key that lacks the page, the address of the missing byte within it, and how many bytes
        from there on the access needs of that key.
    why : str
        On an error.
    runs : list of (addresses, offset, bytes) or None
        The same in pieces, when a list of keys puts bytes together that do not follow each other within their pages.
    """

    verdict: Verdict
    addresses: NDArray[np.uint64]
    offset: int
    good: int
    key: int = 0
    va: int = 0
    size: int = 0
    why: str = ""
    runs: list[Run] | None = None


class MkeyTable:
    """All mkeys of a device.

    Parameters
    ----------
    max_indirection : int
        Levels of indirect keys that the hardware follows.
    """

    def __init__(self, max_indirection: int) -> None:
        self.max_indirection = max_indirection
        self.mkeys: dict[int, HwMkey] = {}
        self._next = 0x10  # lower ones are reserved: 0x100 is the key that ends a receive list
        self._spare: list[tuple[int, int, Mkc, bool]] = []  # made many at a time and not used yet: first, end, ...
        self._gone: set[int] = set()

    def create(self, mkc: Mkc, pg_access: bool, klm_pas_mtt: NDArray[Any] | None = None) -> HwMkey:
        """Make an mkey (CREATE_MKEY), with translations if they are given."""
        mkey = HwMkey(self._next, mkc.copy(), pg_access)
        self._next += 1
        if klm_pas_mtt is not None:
            if len(klm_pas_mtt) > len(mkey.entries):
                raise ValueError(f"{len(klm_pas_mtt)} translations for a table of {len(mkey.entries)}")
            mkey.write(0, klm_pas_mtt)
        self.mkeys[mkey.index] = mkey
        return mkey

    def create_many(self, mkc: Mkc, pg_access: bool, count: int) -> list[int]:
        """Make many alike at once and return their keys; each comes to life with its first use."""
        first, end = self._next, self._next + count
        self._next = end
        if count:
            self._spare.append((first, end, mkc.copy(), pg_access))
        return [index << 8 | mkc.mkey_7_0 for index in range(first, end)]

    def destroy(self, key: int) -> bool:
        """Destroy an mkey; return whether there was one."""
        there = self.get(key) is not None
        if there:
            del self.mkeys[key >> 8]
            self._gone.add(key >> 8)
        return there

    def get(self, key: int) -> HwMkey | None:
        """Return the mkey with the index of `key`, or None."""
        index = key >> 8
        found = self.mkeys.get(index)
        if found is None and self._spare and index not in self._gone:
            at = bisect_right(self._spare, index, key=_first) - 1
            if at >= 0 and index < self._spare[at][1]:
                _, _, mkc, pg_access = self._spare[at]
                found = self.mkeys[index] = HwMkey(index, mkc.copy(), pg_access)
        return found

    def translate(self, key: int, va: int, length: int, need: Need, pd: int) -> Translation:
        """Walk from a key and an address to DMA addresses, up to the first page that is missing.

        Parameters
        ----------
        key : int
            lkey or rkey, with its variant.
        va, length : int
            Bytes; the length is at least 1.
        need : Need
        pd : int
            Protection domain of the queue pair.

        Notes
        -----
        Vectorised over pages; the loop below is over slots of an indirect key (1 GiB each).
        """
        mkey = self.get(key)
        if mkey is None:
            return Translation(Verdict.ERROR, NOTHING, 0, 0, why="no such key")
        return self._walk(mkey, key, va, length, need, pd, 0)

    def _walk(self, mkey: HwMkey, key: int, va: int, length: int, need: Need, pd: int, depth: int) -> Translation:
        why = mkey.refuses(key, va, length, need, pd)
        if why:
            return Translation(Verdict.ERROR, NOTHING, 0, 0, why=why)
        mode = mkey.mkc.access_mode
        if mode == AccessMode.NULL:
            return Translation(Verdict.FAULT, NOTHING, va & (PAGE - 1), 0, key, va, length)
        if mode == AccessMode.MTT:
            return _walk_mtt(mkey, key, va, length, _WRITES[need])
        if depth >= self.max_indirection:
            return Translation(Verdict.ERROR, NOTHING, 0, 0, why="too many levels of indirection")
        pieces: list[NDArray[np.uint64]] = []
        runs: list[Run] = []
        good, scattered = 0, False
        for below, at, size in _slots(mkey, va, length):
            entry = self.get(below)
            if entry is None:
                return Translation(Verdict.ERROR, NOTHING, 0, 0, why=f"slot names key {below:#x}, which does not exist")
            part = self._walk(entry, below, at, size, need, pd, depth + 1)
            if part.verdict == Verdict.ERROR:
                return part
            # A piece that starts in the page where the last one ended would list that page twice.
            pieces.append(part.addresses[1:] if pieces and (va + good) & (PAGE - 1) else part.addresses)
            runs += part.runs or [(part.addresses, part.offset, part.good)]
            scattered |= part.runs is not None or bool((at ^ (va + good)) & (PAGE - 1))
            good += part.good
            if part.verdict == Verdict.FAULT:
                part.addresses, part.offset, part.good = np.concatenate(pieces), va & (PAGE - 1), good
                part.runs = runs if scattered else None
                return part
        if scattered:
            return Translation(Verdict.OK, runs[0][0], runs[0][1], good, runs=runs)
        return Translation(Verdict.OK, np.concatenate(pieces), va & (PAGE - 1), good)


def _first(span: tuple[int, int, Mkc, bool]) -> int:
    return span[0]


def _slots(mkey: HwMkey, va: int, length: int) -> list[tuple[int, int, int]]:
    """Return (key, address, bytes) for each slot of an indirect key that an access touches."""
    mkc = mkey.mkc
    found = []
    at, end = va - mkc.start_addr, va - mkc.start_addr + length
    if mkc.access_mode == AccessMode.KSM:
        size = 1 << mkc.log_page_size
        for slot in range(at >> mkc.log_page_size, ((end - 1) >> mkc.log_page_size) + 1):
            low = max(at, slot * size)
            entry = mkey.entries[slot] if slot < len(mkey.entries) else np.zeros(1, dtype=KLM)[0]
            found.append((int(entry["key"]), int(entry["va"]) + low - slot * size, min(end, (slot + 1) * size) - low))
        return found
    starts = np.concatenate([[0], np.cumsum(mkey.entries["bcount"].astype(np.int64))])
    for slot in range(int(np.searchsorted(starts, at, side="right")) - 1, len(mkey.entries)):
        low, high = int(starts[slot]), int(starts[slot + 1])
        if low >= end:
            break
        entry = mkey.entries[slot]
        low = max(low, at)
        found.append((int(entry["key"]), int(entry["va"]) + low - int(starts[slot]), min(high, end) - low))
    return found


def _walk_mtt(mkey: HwMkey, key: int, va: int, length: int, write: bool) -> Translation:
    """Read the entries of a direct key; what they span may be larger than a 4 KiB piece."""
    mkc = mkey.mkc
    shift = mkc.log_page_size
    base = mkc.start_addr >> shift
    first, last = (va >> shift) - base, ((va + length - 1) >> shift) - base
    entries = mkey.entries[first : last + 1]
    want = MTT_WRITE if write else MTT_READ
    if first == last and len(entries) and shift == PAGE_SHIFT and int(entries[0]) & want:  # a page, which is there
        return Translation(Verdict.OK, entries & ~_BITS, va & (PAGE - 1), length)
    missing = (entries.astype(np.uint64, copy=False) & np.uint64(want)) == 0
    offset = va & (PAGE - 1)
    count, good = len(entries), length
    if len(entries) < last + 1 - first or missing.any():
        count = int(missing.argmax()) if missing.any() else len(entries)
        good = max(((first + count + base) << shift) - va, 0) if count else 0
    words = entries[:count].astype(np.uint64, copy=False) & ~_BITS
    if shift > PAGE_SHIFT and count:
        words = _pieces(words, va, good, shift)
    if good == length:
        return Translation(Verdict.OK, words, offset, length)
    if not mkey.pg_access:
        return Translation(Verdict.ERROR, NOTHING, 0, 0, why="the key has no translation there")
    return Translation(Verdict.FAULT, words, offset, good, key, va + good, length - good)


def _pieces(words: NDArray[np.uint64], va: int, length: int, shift: int) -> NDArray[np.uint64]:
    """Cut large entries into the 4 KiB pieces that an access touches."""
    first, last = va >> PAGE_SHIFT, (va + length - 1) >> PAGE_SHIFT
    pages = np.arange(first, last + 1, dtype=np.int64)
    per = shift - PAGE_SHIFT
    entry = (pages >> per) - (va >> shift)
    within = (pages & ((1 << per) - 1)).astype(np.uint64) << np.uint64(PAGE_SHIFT)
    pieces: NDArray[np.uint64] = words[entry] + within
    return pieces
