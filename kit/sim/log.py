"""What a run writes down while it runs: four numbers a span, and rows of seven for what else there is to say.

Where the engine is compiled, `kit.native.log` stands in its place: the same classes over packed doubles.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["END", "KEY", "PARENT", "SHIFT", "START", "WIDTH", "Log", "Rows"]

SHIFT: Final = 2  # a span takes 1 << SHIFT places
END: Final = 0
START: Final = 1
KEY: Final = 2
PARENT: Final = 3
WIDTH: Final = 7  # numbers in a row


class Log:
    """Of each span its end, its start, its key and its parent's place, one span after the other.

    A span is known by its place: how many numbers were there before it. -1 is no span. A list, because its appends
    cost tens of nanoseconds.
    """

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: list[Any] = []

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, end: float, start: float, key: int, parent: int) -> int:
        """Append a span and return its place."""
        cells = self._cells
        at = len(cells)
        cells += (end, start, key, parent)
        return at

    def close(self, at: int, now: float) -> int:
        """Let the span at a place end now, and return its parent's place."""
        cells = self._cells
        cells[at] = now
        parent: int = cells[at + PARENT]
        return parent

    def leave(self, count: int) -> None:
        """Append room for spans that `write` fills in."""
        self._cells += [0.0] * (count << SHIFT)

    def write(self, at: int, end: float, start: float, key: int, parent: int) -> None:
        """Fill in the span at a place."""
        self._cells[at : at + (1 << SHIFT)] = end, start, key, parent

    def column(self, which: int) -> NDArray[np.float64]:
        """Return one of the four numbers of every span, shape (spans,), as a new array."""
        return np.array(self._cells[which :: 1 << SHIFT], dtype=np.float64)


class Rows:
    """Rows of seven numbers: one flat list while they are written, an array when they are read."""

    __slots__ = ("_fresh", "_read")

    def __init__(self) -> None:
        self._fresh: list[float] = []  # what nobody has read yet
        self._read: NDArray[np.float64] = np.zeros((0, WIDTH))

    def __len__(self) -> int:
        return len(self._read) + len(self._fresh) // WIDTH

    def add(self, a: float, b: float, c: float, d: float, e: float, f: float, g: float) -> None:
        """Append a row."""
        self._fresh += (a, b, c, d, e, f, g)

    def array(self) -> NDArray[np.float64]:
        """Return all rows, shape (rows, 7), not to be written to."""
        if self._fresh:
            self._read = np.concatenate([self._read, np.array(self._fresh, dtype=np.float64).reshape(-1, WIDTH)])
            self._fresh.clear()
        return self._read

    def put(self, rows: NDArray[np.float64]) -> None:
        """Have other rows, shape (rows, 7), instead."""
        self._fresh.clear()
        self._read = rows
