"""`kit.sim.log` over packed doubles, which stands in its place where the engine is compiled.

A list's numbers are objects, each with memory of its own; most of what recording a span then costs is that memory.
Compiled, a vec's numbers are plain doubles in a row. Read by the interpreter it is the slower of the two.
They are kept in chunks: a vec that doubles touches four times the memory, all of it new to the process.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from librt.vecs import append, vec
from numpy.typing import NDArray

__all__ = ["END", "KEY", "PARENT", "SHIFT", "START", "WIDTH", "Log", "Rows"]

SHIFT: Final = 2
END: Final = 0
START: Final = 1
KEY: Final = 2
PARENT: Final = 3
WIDTH: Final = 7
BITS: Final = 16
CHUNK: Final = 1 << BITS  # numbers; the first chunk grows to it, so that a short log is a small one
WITHIN: Final = CHUNK - 1
ROWS: Final = CHUNK // WIDTH * WIDTH


class Log:
    """See `kit.sim.log.Log`; keys and places are below 2**53."""

    def __init__(self) -> None:
        self._full: list[vec[float]] = []
        self._before: int = 0  # how many numbers are in them
        self._cells: vec[float] = vec[float]()

    def __len__(self) -> int:
        return self._before + len(self._cells)

    def add(self, end: float, start: float, key: int, parent: int) -> int:
        """Append a span and return its place."""
        cells = self._cells
        if len(cells) == CHUNK:
            cells = self._next()
        at = self._before + len(cells)
        cells = append(cells, end)
        cells = append(cells, start)
        cells = append(cells, float(key))
        self._cells = append(cells, float(parent))
        return at

    def close(self, at: int, now: float) -> int:
        """Let the span at a place end now, and return its parent's place."""
        cells = self._at(at)
        at &= WITHIN
        cells[at] = now
        return int(cells[at + PARENT])

    def leave(self, count: int) -> None:
        """Append room for spans that `write` fills in."""
        cells = self._cells
        for _ in range(count):
            if len(cells) == CHUNK:
                cells = self._next()
            self._cells = cells = append(append(append(append(cells, 0.0), 0.0), 0.0), 0.0)

    def write(self, at: int, end: float, start: float, key: int, parent: int) -> None:
        """Fill in the span at a place."""
        cells = self._at(at)
        at &= WITHIN
        cells[at + END], cells[at + START] = end, start
        cells[at + KEY], cells[at + PARENT] = float(key), float(parent)

    def column(self, which: int) -> NDArray[np.float64]:
        """Return one of the four numbers of every span, shape (spans,), as a new array."""
        return np.concatenate([_array(cells)[which :: 1 << SHIFT] for cells in [*self._full, self._cells]])

    def _at(self, at: int) -> vec[float]:
        return self._cells if at >= self._before else self._full[at >> BITS]

    def _next(self) -> vec[float]:
        self._full.append(self._cells)
        self._before += CHUNK
        self._cells = vec[float](capacity=CHUNK)
        return self._cells


class Rows:
    """See `kit.sim.log.Rows`."""

    def __init__(self) -> None:
        self._full: list[vec[float]] = []
        self._fresh: vec[float] = vec[float]()
        self._read: NDArray[np.float64] = np.zeros((0, WIDTH))

    def __len__(self) -> int:
        return len(self._read) + (len(self._full) * ROWS + len(self._fresh)) // WIDTH

    def add(self, a: float, b: float, c: float, d: float, e: float, f: float, g: float) -> None:
        """Append a row."""
        fresh = self._fresh
        if len(fresh) == ROWS:
            self._full.append(fresh)
            self._fresh = fresh = vec[float](capacity=ROWS)
        fresh = append(append(append(fresh, a), b), c)
        self._fresh = append(append(append(append(fresh, d), e), f), g)

    def array(self) -> NDArray[np.float64]:
        """Return all rows, shape (rows, 7), not to be written to."""
        if self._full or len(self._fresh):
            fresh = [_array(cells).reshape(-1, WIDTH) for cells in [*self._full, self._fresh]]
            self.put(np.concatenate([self._read, *fresh]))
        return self._read

    def put(self, rows: NDArray[np.float64]) -> None:
        """Have other rows, shape (rows, 7), instead."""
        self._full, self._fresh, self._read = [], vec[float](), rows


def _array(cells: vec[float]) -> NDArray[np.float64]:
    return np.frombuffer(memoryview(cells), dtype=np.float64)
