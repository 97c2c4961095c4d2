"""Words of page masks: 64 pages each, the last one in the sign.

Nothing here leaves the range of such a word, so that compiled and read by the interpreter it means the same. Some of
it is about half a word, which is never negative. A literal that is shifted left has 32 bits in C: none is.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import i64

__all__ = ["HALF", "below", "count", "last", "length", "low", "units", "up", "whole_units"]

HALF: Final = 0xFFFF_FFFF
HIGH: Final = 0x4000_0000_0000_0000  # the page before the last
FIRST: Final = 0x0001_0001_0001_0001  # of every unit of 16 pages


def count(word: i64) -> i64:
    """Return how many pages a word has."""
    if word == 0:
        return 0
    return _ones(word & HALF) + _ones(word >> 32 & HALF)


def _ones(half: i64) -> i64:
    """Return the number of bits that are set, adding up neighbours."""
    half -= half >> 1 & 0x5555_5555
    half = (half & 0x3333_3333) + (half >> 2 & 0x3333_3333)
    half = half + (half >> 4) & 0x0F0F_0F0F
    half += half >> 8
    return half + (half >> 16) & 0x3F


def length(half: i64) -> i64:
    """Return one more than the number of the highest bit that is set."""
    half |= half >> 1
    half |= half >> 2
    half |= half >> 4
    half |= half >> 8
    half |= half >> 16
    return _ones(half)


def low(half: i64) -> i64:
    """Return the number of the lowest bit that is set."""
    return _ones((half & -half) - 1)


def below(page: i64) -> i64:
    """Return the word of the pages below one."""
    if page <= 0:
        return 0
    if page >= 64:
        return -1
    return (HIGH - 1 >> 63 - page) << 1 | 1


def up(word: i64, carry: i64) -> i64:
    """Return the pages after those of a word; the last page of the word before is the carry."""
    return (word & HIGH - 1) << 1 | carry | -(word >> 62 & 1) << 63


def last(word: i64) -> i64:
    """Return 1 where the last page is there, else 0."""
    return word >> 63 & 1


def _spread(first: i64) -> i64:
    """Return the units that begin at pages of a word."""
    found = (first & 0x1_0001_0001) * 0xFFFF
    if first >> 48 & 1 != 0:
        found |= -0x1_0000_0000_0000
    return found


def units(word: i64) -> i64:
    """Return the units that hold a page of a word."""
    word |= word >> 1
    word |= word >> 2
    word |= word >> 4
    return _spread((word | word >> 8) & FIRST)


def whole_units(word: i64) -> i64:
    """Return the units that are in a word as a whole."""
    word &= word >> 1
    word &= word >> 2
    word &= word >> 4
    return _spread(word & word >> 8 & FIRST)
