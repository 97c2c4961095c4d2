"""`kit.sim.log` over packed numbers, which stands in its place where the engine is compiled.

A list's numbers are objects, each with memory of its own; most of what recording a span then costs is that memory.
Compiled, a vec's numbers are machine words in a row. Read by the interpreter it is the slower of the two.
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
NOTHING: Final = vec[i64]([0] * CHUNK)


class Log:
    """See `kit.sim.log.Log`; places are below 2**53."""

    def __init__(self) -> None:
        self._full: list[tuple[vec[float], vec[i64]]] = []
        self._before: i64 = 0  # the place of the first span in the chunks that are written to
        self._used: i64 = 0  # numbers in each of them
        self._times: vec[float] = extend(vec[float](), BLANK)  # of each span its end and its start
        self._marks: vec[i64] = extend(vec[i64](), NOTHING)  # its key and its parent

    def __len__(self) -> int:
        return self._before + self._used + self._used

    def add(self, end: float, start: float, key: i64, parent: i64) -> i64:
        """Append a span and return its place."""
        if self._used == CHUNK:
            self._next()
        times, marks, at = self._times, self._marks, self._used
        times[at], times[at + 1] = end, start
        marks[at], marks[at + 1] = key, parent
        self._used = at + 2
        return self._before + at + at

    def close(self, at: i64, now: float) -> i64:
        """Let the span at a place end now, and return its parent's place."""
        place = at >> 1 & WITHIN
        if at >= self._before:
            self._times[place] = now
            return self._marks[place + 1]
        times, marks = self._full[at >> 1 + BITS]
        times[place] = now
        return marks[place + 1]

    def leave(self, count: int) -> None:
        """Append room for spans that `write` fills in."""
        room: i64 = count << 1
        while room > CHUNK - self._used:
            room -= CHUNK - self._used
            self._next()
        self._used += room

    def write(self, at: i64, end: float, start: float, key: i64, parent: i64) -> None:
        """Fill in the span at a place."""
        times, marks = self._times, self._marks
        if at < self._before:
            times, marks = self._full[at >> 1 + BITS]
        place = at >> 1 & WITHIN
        times[place], times[place + 1] = end, start
        marks[place], marks[place + 1] = key, parent

    def column(self, which: int) -> NDArray[np.float64]:
        """Return one of the four numbers of every span, shape (spans,), as a new array."""
        chunks = [*self._full, (self._times, self._marks)]
        if which < KEY:
            every = np.concatenate([np.frombuffer(memoryview(times)) for times, _ in chunks])
        else:
            every = np.concatenate([np.frombuffer(memoryview(marks), np.int64) for _, marks in chunks])
        return every[which & 1 : len(self) >> 1 : 2].astype(np.float64)

    def _next(self) -> None:
        self._full.append((self._times, self._marks))
        self._before += CHUNK + CHUNK
        self._times, self._marks, self._used = extend(vec[float](), BLANK), extend(vec[i64](), NOTHING), 0


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
