"""`kit.memory.table.pagemask` over eight words, which stands in its place where the driver is compiled.

Compiled, a mask is eight machine integers in an object that is made in a few instructions; a Python integer of 512
bits takes three times as long to combine. Read by the interpreter this is by far the slower of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from librt.strings import BytesWriter, read_i64_le, write_i64_le
from librt.vecs import append, vec
from mypy_extensions import i64, mypyc_attr
from numpy.typing import NDArray

from kit.native import words
from kit.native.words import HALF

__all__ = [
    "EMPTY", "PageMask", "bit", "bools", "cut_counts", "cut_runs", "first_page", "from_bools", "from_pages", "holds",
    "pages_of", "region", "region_weight", "run_count", "run_of", "runs", "units", "whole_units",
]  # fmt: skip

WORDS: Final = 8


@mypyc_attr(acyclic=True, free_list_len=1)
class PageMask:
    """At most 512 pages. Does not change once it is made; ``~mask`` is for what ``&`` follows."""

    __slots__ = ("a", "b", "c", "d", "e", "f", "g", "h")

    def __init__(self, a: i64, b: i64, c: i64, d: i64, e: i64, f: i64, g: i64, h: i64) -> None:
        self.a, self.b, self.c, self.d = a, b, c, d
        self.e, self.f, self.g, self.h = e, f, g, h

    def __and__(self, o: PageMask) -> PageMask:
        return PageMask(
            self.a & o.a, self.b & o.b, self.c & o.c, self.d & o.d,
            self.e & o.e, self.f & o.f, self.g & o.g, self.h & o.h,
        )  # fmt: skip

    def __or__(self, o: PageMask) -> PageMask:
        return PageMask(
            self.a | o.a, self.b | o.b, self.c | o.c, self.d | o.d,
            self.e | o.e, self.f | o.f, self.g | o.g, self.h | o.h,
        )  # fmt: skip

    def __xor__(self, o: PageMask) -> PageMask:
        return PageMask(
            self.a ^ o.a, self.b ^ o.b, self.c ^ o.c, self.d ^ o.d,
            self.e ^ o.e, self.f ^ o.f, self.g ^ o.g, self.h ^ o.h,
        )  # fmt: skip

    def andnot(self, o: PageMask) -> PageMask:
        """Return ``self & ~o``, as `kit.native.inline` writes it."""
        return PageMask(
            self.a & ~o.a, self.b & ~o.b, self.c & ~o.c, self.d & ~o.d,
            self.e & ~o.e, self.f & ~o.f, self.g & ~o.g, self.h & ~o.h,
        )  # fmt: skip

    def __invert__(self) -> PageMask:
        return PageMask(~self.a, ~self.b, ~self.c, ~self.d, ~self.e, ~self.f, ~self.g, ~self.h)

    def __lshift__(self, by: int) -> PageMask:
        return _of((int(self) << by & (1 << 512) - 1).to_bytes(64, "little")) if by else self

    def __rshift__(self, by: int) -> PageMask:
        return _of((int(self) >> by).to_bytes(64, "little")) if by else self

    def __bool__(self) -> bool:
        return self.a | self.b | self.c | self.d | self.e | self.f | self.g | self.h != 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PageMask)
            and self.a == other.a and self.b == other.b and self.c == other.c and self.d == other.d
            and self.e == other.e and self.f == other.f and self.g == other.g and self.h == other.h
        )  # fmt: skip

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(int(self))

    def __int__(self) -> int:
        return int.from_bytes(self.raw(), "little")

    def raw(self) -> bytes:
        """Return the words, the lowest byte first."""
        found = BytesWriter()
        for word in range(WORDS):
            write_i64_le(found, self.word(word))
        return found.getvalue()

    def word(self, at: i64) -> i64:
        """Return the word of pages from 64 `at` on."""
        if at < 4:
            return (self.a if at == 0 else self.b) if at < 2 else self.c if at == 2 else self.d
        return (self.e if at == 4 else self.f) if at < 6 else self.g if at == 6 else self.h

    def bit_count(self) -> int:
        """Return how many pages there are."""
        return (
            words.count(self.a) + words.count(self.b) + words.count(self.c) + words.count(self.d)
            + words.count(self.e) + words.count(self.f) + words.count(self.g) + words.count(self.h)
        )  # fmt: skip

    def bit_length(self) -> int:
        """Return the page after the last one, 0 when there is none."""
        at: i64 = WORDS
        while at > 0:
            at -= 1
            word = self.word(at)
            if word != 0:
                high = word >> 32 & HALF
                if high != 0:
                    return (at << 6) + 32 + words.length(high)
                return (at << 6) + words.length(word & HALF)
        return 0


def _of(raw: bytes) -> PageMask:
    """Return the mask of 64 bytes."""
    return PageMask(
        read_i64_le(raw, 0), read_i64_le(raw, 8), read_i64_le(raw, 16), read_i64_le(raw, 24),
        read_i64_le(raw, 32), read_i64_le(raw, 40), read_i64_le(raw, 48), read_i64_le(raw, 56),
    )  # fmt: skip


EMPTY: Final = PageMask(0, 0, 0, 0, 0, 0, 0, 0)


def bit(page: int) -> PageMask:
    """See `kit.memory.table.pagemask.bit`."""
    return region(page, 1)


def region(first: int, count: int) -> PageMask:
    """See `kit.memory.table.pagemask.region`."""
    lo: i64 = first
    if lo < 0:
        raise ValueError(f"negative page {lo}")
    hi = lo + count
    return PageMask(
        words.below(hi) & ~words.below(lo), words.below(hi - 64) & ~words.below(lo - 64),
        words.below(hi - 128) & ~words.below(lo - 128), words.below(hi - 192) & ~words.below(lo - 192),
        words.below(hi - 256) & ~words.below(lo - 256), words.below(hi - 320) & ~words.below(lo - 320),
        words.below(hi - 384) & ~words.below(lo - 384), words.below(hi - 448) & ~words.below(lo - 448),
    )  # fmt: skip


def holds(mask: PageMask, page: int) -> bool:
    """See `kit.memory.table.pagemask.holds`."""
    at: i64 = page
    if at < 0:
        raise ValueError(f"negative page {at}")
    return mask.word(at >> 6) >> (at & 63) & 1 != 0


def first_page(mask: PageMask) -> int:
    """See `kit.memory.table.pagemask.first_page`."""
    for at in range(WORDS):
        word = mask.word(at)
        if word != 0:
            low = word & HALF
            if low != 0:
                return (at << 6) + words.low(low)
            return (at << 6) + 32 + words.low(word >> 32 & HALF)
    return -1


def region_weight(mask: PageMask, first: int, count: int) -> int:
    """See `kit.memory.table.pagemask.region_weight`."""
    lo: i64 = first
    hi: i64 = lo + count
    found: i64 = 0
    at = lo >> 6
    while at << 6 < hi:
        base = at << 6
        found += words.count(mask.word(at) & words.below(hi - base) & ~words.below(lo - base))
        at += 1
    return found


def units(mask: PageMask) -> PageMask:
    """See `kit.memory.table.pagemask.units`."""
    return PageMask(
        words.units(mask.a), words.units(mask.b), words.units(mask.c), words.units(mask.d),
        words.units(mask.e), words.units(mask.f), words.units(mask.g), words.units(mask.h),
    )  # fmt: skip


def whole_units(mask: PageMask) -> PageMask:
    """See `kit.memory.table.pagemask.whole_units`."""
    return PageMask(
        words.whole_units(mask.a), words.whole_units(mask.b), words.whole_units(mask.c), words.whole_units(mask.d),
        words.whole_units(mask.e), words.whole_units(mask.f), words.whole_units(mask.g), words.whole_units(mask.h),
    )  # fmt: skip


def run_count(mask: PageMask) -> int:
    """See `kit.memory.table.pagemask.run_count`."""
    found: i64 = 0
    carry: i64 = 0
    for at in range(WORDS):
        word = mask.word(at)
        if word != 0:
            found += words.count(word & ~words.up(word, carry))
        carry = words.last(word)
    return found


def run_of(mask: PageMask) -> slice | None:
    """See `kit.memory.table.pagemask.run_of`."""
    return slice(first_page(mask), mask.bit_length()) if run_count(mask) < 2 else None


class _Last:
    """The mask that was asked for last: one operation asks several times."""

    def __init__(self) -> None:
        self.mask: PageMask = EMPTY
        self.runs: tuple[tuple[int, int], ...] = ()


_LAST: Final = _Last()


def runs(mask: PageMask) -> tuple[tuple[int, int], ...]:
    """See `kit.memory.table.pagemask.runs`."""
    last = _LAST
    if last.mask is not mask and last.mask != mask:
        last.mask, last.runs = mask, tuple(cut_runs(mask, EMPTY))
    return last.runs


def cut_runs(mask: PageMask, apart: PageMask) -> list[tuple[int, int]]:
    """See `kit.memory.table.pagemask.cut_runs`."""
    cut = _cut(mask, apart)
    return [(int(cut[at]), int(cut[at + 1])) for at in range(0, len(cut), 2)]


def cut_counts(mask: PageMask, apart: PageMask) -> list[int]:
    """See `kit.memory.table.pagemask.cut_counts`."""
    cut = _cut(mask, apart)
    return [int(cut[at]) for at in range(1, len(cut), 2)]


def _cut(mask: PageMask, apart: PageMask) -> vec[i64]:
    """Return the first page and the number of pages of each run of `cut_runs`, one after the other."""
    found = vec[i64](capacity=16)
    first: i64 = 0
    within = False
    one: i64 = 0  # the last page of the word before: inside `apart`, outside
    two: i64 = 0
    for at in range(WORDS):
        word = mask.word(at)
        if word | one | two == 0:
            continue
        inside = word & apart.word(at)
        outside = word ^ inside
        edge = word ^ words.up(word, one | two)
        cut = (inside ^ words.up(inside, one)) | (outside ^ words.up(outside, two))
        one, two = words.last(inside), words.last(outside)
        base: i64 = at << 6
        while cut != 0:
            todo, turns = cut & HALF, edge & HALF
            while todo != 0:
                low = todo & -todo
                page = base + words.low(todo)
                if within:
                    found = append(append(found, first), page - first)
                if turns & low != 0:
                    within = not within
                first = page
                todo ^= low
            cut, edge, base = cut >> 32 & HALF, edge >> 32 & HALF, base + 32
    if within:
        found = append(append(found, first), (WORDS << 6) - first)
    return found


def from_pages(pages: Sequence[int] | NDArray[np.integer]) -> PageMask:
    """See `kit.memory.table.pagemask.from_pages`."""
    mask = EMPTY
    for page in pages:
        mask |= bit(int(page))
    return mask


def from_bools(marks: NDArray[np.bool_]) -> PageMask:
    """See `kit.memory.table.pagemask.from_bools`."""
    return _of(np.packbits(marks, bitorder="little").tobytes().ljust(64, b"\0"))


def bools(mask: PageMask, count: int) -> NDArray[np.bool_]:
    """See `kit.memory.table.pagemask.bools`."""
    return np.unpackbits(np.frombuffer(mask.raw(), dtype=np.uint8), count=count, bitorder="little").view(np.bool_)


def pages_of(mask: PageMask) -> NDArray[np.int64]:
    """See `kit.memory.table.pagemask.pages_of`."""
    return np.flatnonzero(bools(mask, mask.bit_length())).astype(np.int64)
