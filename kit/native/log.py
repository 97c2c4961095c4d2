"""`kit.sim.log` over packed doubles, which stands in its place where the engine is compiled.

A list's numbers are objects, each with memory of its own; most of what recording a span then costs is that memory.
Compiled, a vec's numbers are plain doubles in a row. Read by the interpreter it is the slower of the two.
They are kept in chunks: a vec that doubles touches four times the memory, all of it new to the process.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from librt.vecs import extend, vec
from mypy_extensions import i64
from numpy.typing import NDArray

__all__ = ["END", "KEY", "PARENT", "SHIFT", "START", "WIDTH", "Log", "Rows"]

SHIFT: Final = 2
END: Final = 0
START: Final = 1
KEY: Final = 2
PARENT: Final = 3
WIDTH: Final = 7
BITS: Final = 13
CHUNK: Final = 1 << BITS  # numbers
WITHIN: Final = CHUNK - 1
ROWS: Final = CHUNK // WIDTH * WIDTH
BLANK: Final = vec[float]([0.0] * CHUNK)


class Log:
    """See `kit.sim.log.Log`; keys and places are below 2**53."""

    def __init__(self) -> None:
        self._full: list[vec[float]] = []
        self._before: i64 = 0  # how many numbers are in them
        self._used: i64 = 0  # and in the chunk that is written to
        self._cells: vec[float] = extend(vec[float](), BLANK)

    def __len__(self) -> int:
        return self._before + self._used

    def add(self, end: float, start: float, key: int, parent: int) -> int:
        """Append a span and return its place."""
        if self._used == CHUNK:
            self._next()
        cells, at = self._cells, self._used
        cells[at + END], cells[at + START] = end, start
        cells[at + KEY], cells[at + PARENT] = float(key), float(parent)
        self._used = at + (1 << SHIFT)
        return self._before + at

    def close(self, at: int, now: float) -> int:
        """Let the span at a place end now, and return its parent's place."""
        place: i64 = at
        cells = self._cells if place >= self._before else self._full[place >> BITS]
        place &= WITHIN
        cells[place] = now
        return int(cells[place + PARENT])

    def leave(self, count: int) -> None:
        """Append room for spans that `write` fills in."""
        room: i64 = count << SHIFT
        while room > CHUNK - self._used:
            room -= CHUNK - self._used
            self._next()
        self._used += room

    def write(self, at: int, end: float, start: float, key: int, parent: int) -> None:
        """Fill in the span at a place."""
        place: i64 = at
        cells = self._cells if place >= self._before else self._full[place >> BITS]
        place &= WITHIN
        cells[place + END], cells[place + START] = end, start
        cells[place + KEY], cells[place + PARENT] = float(key), float(parent)

    def column(self, which: int) -> NDArray[np.float64]:
        """Return one of the four numbers of every span, shape (spans,), as a new array."""
        every = np.concatenate([np.frombuffer(memoryview(cells)) for cells in [*self._full, self._cells]])
        return every[which : len(self) : 1 << SHIFT].copy()

    def _next(self) -> None:
        self._full.append(self._cells)
        self._before += CHUNK
        self._cells, self._used = extend(vec[float](), BLANK), 0


class Rows:
    """See `kit.sim.log.Rows`."""

    def __init__(self) -> None:
        self._full: list[vec[float]] = []
        self._used: i64 = 0
        self._fresh: vec[float] = extend(vec[float](), BLANK)
        self._read: NDArray[np.float64] = np.zeros((0, WIDTH))

    def __len__(self) -> int:
        return len(self._read) + (len(self._full) * ROWS + self._used) // WIDTH

    def add(self, a: float, b: float, c: float, d: float, e: float, f: float, g: float) -> None:
        """Append a row."""
        if self._used == ROWS:
            self._full.append(self._fresh)
            self._fresh, self._used = extend(vec[float](), BLANK), 0
        fresh, at = self._fresh, self._used
        fresh[at], fresh[at + 1], fresh[at + 2], fresh[at + 3] = a, b, c, d
        fresh[at + 4], fresh[at + 5], fresh[at + 6] = e, f, g
        self._used = at + WIDTH

    def array(self) -> NDArray[np.float64]:
        """Return all rows, shape (rows, 7), not to be written to."""
        if self._full or self._used:
            fresh = np.concatenate([np.frombuffer(memoryview(cells))[:ROWS] for cells in [*self._full, self._fresh]])
            used = len(self._full) * ROWS + self._used
            self.put(np.concatenate([self._read, fresh[:used].reshape(-1, WIDTH)]))
        return self._read

    def put(self, rows: NDArray[np.float64]) -> None:
        """Have other rows, shape (rows, 7), instead."""
        self._full, self._used, self._read = [], 0, rows
