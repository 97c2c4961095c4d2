"""Rows of columns, by runs of pages: filled, counted up, added to, copied, searched; and by number: looked up, marked.

A column is a numpy array without gaps, one row for each page, frame or entry; a column of integers has 8, 32 or 64
bits. Which rows are meant is said by the row of page 0 and by runs, (first page, pages) each, as a mask has them. Where
the driver is compiled, `kit/native/columns.c` stands in the place of this module: numpy needs a slice, a view and a
cast for each assignment, which is most of the work when a run is short.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.memory.types import Runs

__all__ = ["add", "copy", "count", "count_below", "fill", "mark", "marked", "ramp", "ramp_where"]

Column = NDArray[Any]


def add(column: Column, at: int, runs: Runs, value: int) -> None:
    """Add `value`. As all of these, raises IndexError where a row does not exist, and has done nothing then."""
    for rows in _rows(column, at, runs):
        np.add(column[rows], value, column[rows])


def copy(into: Column, to: int, column: Column, at: int, runs: Runs) -> None:
    """Put rows of `column` into `into`, where page 0 is row `to`; both have rows of the same type and width."""
    for there, here in zip(_rows(into, to, runs), _rows(column, at, runs), strict=True):
        into[there] = column[here]


def count(column: Column, at: int, runs: Runs, value: int) -> int:
    """Return how many rows are `value`."""
    return sum(int(np.count_nonzero(column[rows] == value)) for rows in _rows(column, at, runs))


def fill(column: Column, at: int, runs: Runs, value: int) -> None:
    """Set to `value`."""
    for rows in _rows(column, at, runs):
        column[rows] = value


def marked(marks: bytearray, at: int, runs: Runs) -> bool:
    """Whether one of the bytes is 1."""
    return any(marks.find(1, rows.start, rows.stop) >= 0 for rows in _rows(marks, at, runs))


def ramp(column: Column, at: int, runs: Runs, value: int) -> None:
    """Set the row of each page to the page and `value`."""
    for rows in _rows(column, at, runs):
        column[rows] = np.arange(rows.start, rows.stop).reshape(-1, *(1,) * (column.ndim - 1)) + (value - at)


def ramp_where(column: Column, at: int, runs: Runs, value: int, marks: NDArray[np.bool_], there: int) -> None:
    """`ramp`, of the pages whose mark is set; page 0 has the mark at `there`."""
    for rows, held in zip(_rows(column, at, runs), _rows(marks, there, runs), strict=True):
        found = marks[held].nonzero()[0]
        column[rows][found] = (found + (rows.start - at + value)).reshape(-1, *(1,) * (column.ndim - 1))


def count_below(column: NDArray[np.uint8], rows: NDArray[np.signedinteger], limits: NDArray[np.uint8]) -> int:
    """Return of how many rows, given by number, the value is below the limit for it; -1 is the last row.

    Numbers have 32 or 64 bits, as in `mark`.
    """
    return int(np.count_nonzero(column[rows] < limits))


def mark(marks: bytearray, rows: NDArray[np.signedinteger]) -> None:
    """Set the bytes of rows, given by number, to 1."""
    np.frombuffer(marks, np.uint8)[rows] = 1


def _rows(column: Column | bytearray, at: int, runs: Runs) -> list[slice]:
    rows = [slice(at + first, at + first + pages) for first, pages in runs]
    for each in rows:
        if not 0 <= each.start <= each.stop <= len(column):
            raise IndexError(f"rows {each.start} to {each.stop} of a column of {len(column)}")
    return rows
