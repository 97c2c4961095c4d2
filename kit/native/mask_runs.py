"""`kit.memory.table.mask_runs` over 32-bit words, which stands in its place where the driver is compiled.

Compiled, a word is a machine's integer and costs no memory; a whole mask is an object, made anew by each operation.
Read by the interpreter this is the slower of the two.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from librt.strings import read_i32_le
from mypy_extensions import i64
from numpy.typing import NDArray

from kit.memory.table.pagemask import run_of

__all__ = ["cut_runs", "runs", "selection"]

WORD: Final = 0xFFFF_FFFF


def runs(mask: int) -> tuple[tuple[int, int], ...]:
    """See `kit.memory.table.mask_runs.runs`."""
    return tuple(cut_runs(mask, 0))


def cut_runs(mask: int, apart: int) -> list[tuple[int, int]]:
    """See `kit.memory.table.mask_runs.cut_runs`."""
    found: list[tuple[int, int]] = []
    cut, edge, words = _edges(mask, apart)
    first: i64 = 0
    within = False
    for word in range(words):
        todo, turns = i64(read_i32_le(cut, word << 2)) & WORD, i64(read_i32_le(edge, word << 2)) & WORD
        while todo != 0:
            low = todo & -todo
            page = (word << 5) + _index(low)
            if within:
                found.append((int(first), int(page - first)))
            if turns & low:
                within = not within
            first = page
            todo ^= low
    return found


def _edges(mask: int, apart: int) -> tuple[bytes, bytes, i64]:
    """Return where runs are cut, where they begin and end, each as words, and how many words."""
    words: i64 = (mask.bit_length() >> 5) + 1
    edge = (mask ^ mask << 1).to_bytes(words << 2, "little")
    inside = mask & apart
    if not inside:
        return edge, edge, words
    outside = mask ^ inside
    return ((inside ^ inside << 1) | (outside ^ outside << 1)).to_bytes(words << 2, "little"), edge, words


def _index(low: i64) -> i64:
    """Return the number of the only bit that is set."""
    at: i64 = 0
    if low & 0xFFFF == 0:
        at += 16
        low >>= 16
    if low & 0xFF == 0:
        at += 8
        low >>= 8
    if low & 0xF == 0:
        at += 4
        low >>= 4
    if low & 3 == 0:
        at += 2
        low >>= 2
    return at + (low & 1 ^ 1)


class _Last:
    """The mask that was asked for last: one operation asks several times."""

    def __init__(self) -> None:
        self.mask: int = -1
        self.count: int = -1
        self.picked: slice | NDArray[np.bool_] = slice(0)


_LAST: Final = _Last()


def selection(mask: int, count: int) -> slice | NDArray[np.bool_]:
    """See `kit.memory.table.mask_runs.selection`."""
    last = _LAST
    if last.mask != mask or last.count != count:
        run = run_of(mask)
        if run is None:
            marks = bytearray(count)
            for first, pages in cut_runs(mask, 0):
                for page in range(first, first + pages):
                    marks[page] = 1
            last.picked = np.frombuffer(bytes(marks), np.bool_)
        else:
            last.picked = run
        last.mask, last.count = mask, count
    return last.picked
