"""The lines that ``valgrind --tool=lackey --trace-mem=yes`` prints, many at a time.

A data line is ``" L 1ffefff7e0,8"``: a load (L), store (S) or modify (M) of 8 bytes at that
hexadecimal address; an instruction fetch is ``"I  04001000,3"``. Everything else is noise.
Each character position is handled for all lines at once: some ten million lines a second.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MalformedLine", "parse_lines"]

PAGE_SHIFT = 12
MOST_BYTES = 4096  # lackey itself stops at 512; more than a page would touch a third page
_ADDRESS_DIGITS, _SIZE_DIGITS = 16, 4
_PAD = b"\n" * 32  # so that reading past a short last line stays inside the buffer
_NEWLINE, _RETURN, _SPACE, _COMMA = b"\n\r ,"
_LOAD, _STORE, _MODIFY, _FETCH = b"LSMI"
_NO_DIGIT = 255


def _digit_values() -> NDArray[np.uint8]:
    values = np.full(256, _NO_DIGIT, dtype=np.uint8)
    for base in (b"0123456789abcdef", b"0123456789ABCDEF"):
        values[list(base)] = np.arange(16)
    return values


_DIGITS = _digit_values()


class MalformedLine(Exception):
    """A line that starts as a data line and does not go on as one.

    Attributes
    ----------
    line : int
        Which, counted from 1 within the text given.
    text : str
        The line.
    why : str
        What is wrong with it when that is not plain to see.
    """

    def __init__(self, line: int, text: str, why: str = "") -> None:
        self.line, self.text, self.why = line, text, why
        super().__init__(f"line {line}: {text!r}")


def parse_lines(text: bytes, instructions: bool = False) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    """Return the pages touched, whether each touch writes, and the number of lines.

    Parameters
    ----------
    text : bytes
        Whole lines; the last one ends with a newline.
    instructions : bool
        Take instruction fetches too, as loads.

    Returns
    -------
    pages : ndarray of int64, shape (touches,)
        Virtual page numbers; an access across a page boundary touches both, the lower first.
    write : ndarray of bool, shape (touches,)
    lines : int

    Raises
    ------
    MalformedLine
        The first data line that is not an address and a size, or whose access runs past the last address.
    """
    buffer = np.frombuffer(text + _PAD, dtype=np.uint8)
    ends = np.flatnonzero(buffer[: len(text)] == _NEWLINE)
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    starts, kind = _data_lines(buffer, starts, instructions)
    address, at = _number(buffer, starts + 3, 16, _ADDRESS_DIGITS)
    good = (buffer[at] == _COMMA) & (at > starts + 3)
    size, after = _number(buffer, at + 1, 10, _SIZE_DIGITS)
    good &= (buffer[after] == _NEWLINE) | (buffer[after] == _RETURN)
    good &= (size > 0) & (size <= MOST_BYTES)
    past_end = good & (address + (size - np.uint64(1)) < address)
    good &= ~past_end
    if not good.all():
        bad = int(starts[np.argmin(good)])
        line = int(np.searchsorted(ends, bad))
        why = "its access runs past the last 64-bit address" if past_end[np.argmin(good)] else ""
        raise MalformedLine(line + 1, text[bad : int(ends[line])].decode("ascii", "replace"), why)
    first = (address >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    last = ((address + (size - np.uint64(1))) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    pages, write = _both_pages(first, last, (kind == _STORE) | (kind == _MODIFY))
    return pages, write, len(ends)


def _data_lines(
    buffer: NDArray[np.uint8], starts: NDArray[np.int64], instructions: bool
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return where the data lines start, and their letters."""
    one, two, three = buffer[starts], buffer[starts + 1], buffer[starts + 2]
    data = (one == _SPACE) & ((two == _LOAD) | (two == _STORE) | (two == _MODIFY))
    if instructions:
        fetch = (one == _FETCH) & (two == _SPACE)
        data |= fetch
    data &= three == _SPACE
    return starts[data], two[data]


def _number(
    buffer: NDArray[np.uint8], at: NDArray[np.int64], base: int, most: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Read up to `most` digits at each place; return the numbers and where the digits end."""
    value = np.zeros(len(at), dtype=np.uint64)
    at = at.copy()
    for _ in range(most):
        digit = _DIGITS[buffer[at]]
        good = digit < base
        if good.all():
            value = value * np.uint64(base) + digit
            at += 1
        elif good.any():
            value = np.where(good, value * np.uint64(base) + digit, value)
            at += good
        else:
            break
    return value, at


def _both_pages(
    first: NDArray[np.int64], last: NDArray[np.int64], write: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Insert the second page after every access that crosses a page boundary."""
    crossing = np.flatnonzero(last != first)
    if not len(crossing):
        return first, write
    return np.insert(first, crossing + 1, last[crossing]), np.insert(write, crossing + 1, write[crossing])
