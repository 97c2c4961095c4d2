"""Stretches of columns: filled, counted up, added to, copied, searched.

A column is a numpy array without gaps, one row for each page, frame or entry; a column of integers has 8, 32 or 64
bits. Where the driver is compiled, `kit/native/columns.c` stands in the place of this module: numpy needs a slice, a
view and a cast for each assignment, which is most of the work when a stretch is short.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["add", "copy", "count", "fill", "marked", "ramp", "ramp_where"]

Column = NDArray[Any]


def add(column: Column, first: int, stop: int, value: int) -> None:
    """Add `value` to rows [first, stop). As all of these, raises IndexError where a row does not exist."""
    rows = column[_rows(column, first, stop)]
    np.add(rows, value, rows)


def copy(into: Column, to: int, column: Column, first: int, stop: int) -> None:
    """Put rows [first, stop) of `column` into `into`, from row `to` on; both have rows of the same type and width."""
    into[_rows(into, to, to + stop - first)] = column[_rows(column, first, stop)]


def count(column: Column, first: int, stop: int, value: int) -> int:
    """Return how many of rows [first, stop) are `value`."""
    return int(np.count_nonzero(column[_rows(column, first, stop)] == value))


def fill(column: Column, first: int, stop: int, value: int) -> None:
    """Set rows [first, stop) to `value`."""
    column[_rows(column, first, stop)] = value


def marked(marks: bytearray, first: int, stop: int) -> bool:
    """Whether one of bytes [first, stop) is 1."""
    rows = _rows(marks, first, stop)
    return marks.find(1, rows.start, rows.stop) >= 0


def ramp(column: Column, first: int, stop: int, value: int) -> None:
    """Set row `first` to `value`, the next one to one more, and so on up to row `stop`."""
    rows = column[_rows(column, first, stop)]
    rows[:] = np.arange(value, value + stop - first).reshape(rows.shape)


def ramp_where(column: Column, first: int, stop: int, value: int, marks: NDArray[np.bool_], at: int) -> None:
    """`ramp`, of the rows whose mark is set; row `first` has the mark at `at`."""
    marked = marks[_rows(marks, at, at + stop - first)].nonzero()[0]
    column[_rows(column, first, stop)][marked] = (marked + value).reshape(-1, *(1,) * (column.ndim - 1))


def _rows(column: Column | bytearray, first: int, stop: int) -> slice:
    if not 0 <= first <= stop <= len(column):
        raise IndexError(f"rows {first} to {stop} of a column of {len(column)}")
    return slice(first, stop)
