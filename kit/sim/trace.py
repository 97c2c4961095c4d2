"""The trace: what happened, in two columnar tables that everything shown is derived from.

*Spans* say which step ran when, on which actor, under which parent, over which pages.
*Moves* say where runs of pages went, enough to tell where every page was at any moment.
Rows live in flat ``array('d')`` buffers (88 and 56 bytes a row): an append costs a fraction of a
microsecond and the numpy view costs nothing. Doubles hold every address below 2**53 exactly.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOVE_COLUMNS", "SPAN_COLUMNS", "Moves", "Names", "Spans", "Trace", "step", "waiting_step"]

SPAN_COLUMNS = ("start", "end", "step", "actor", "parent", "va", "pages", "bytes", "cause", "status", "value")
MOVE_COLUMNS = ("start", "end", "first_page", "pages", "src", "dst", "cause")
_W, _M = len(SPAN_COLUMNS), len(MOVE_COLUMNS)
_END, _VA, _PAGES, _BYTES, _CAUSE, _STATUS, _VALUE = (
    SPAN_COLUMNS.index(c) for c in ("end", "va", "pages", "bytes", "cause", "status", "value")
)
F = TypeVar("F", bound=Callable[..., Any])


class Names:
    """Words of a column, interned: the column stores small integers, readers see words."""

    def __init__(self, *words: str) -> None:
        self.words: list[str] = list(words)
        self.ids: dict[str, int] = {w: i for i, w in enumerate(words)}

    def __call__(self, word: str) -> int:
        """Return the id of `word`, giving it one when it is new."""
        found = self.ids.get(word)
        if found is None:
            found = self.ids[word] = len(self.words)
            self.words.append(word)
        return found


class _Table:
    """Rows of doubles under fixed column names."""

    columns: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.rows = array("d")

    def __len__(self) -> int:
        return len(self.rows) // len(self.columns)

    def array(self) -> NDArray[np.float64]:
        """Return a copy of all rows, shape (rows, columns)."""
        return np.array(self.rows, dtype=np.float64).reshape(-1, len(self.columns))

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a copy of one column, shape (rows,)."""
        return np.array(self.rows[self.columns.index(name) :: len(self.columns)], dtype=np.float64)


class Spans(_Table):
    """One row per executed step or hardware activity; times in microseconds.

    ``step``, ``actor``, ``cause`` and ``status`` are ids into the trace's `Names`; ``parent`` is a
    row number or -1; ``va`` a virtual address in bytes or -1; ``value`` is what the profiler
    reports beside the bytes (faults in a group, program counter).
    """

    columns = SPAN_COLUMNS


class Moves(_Table):
    """One row per run of pages that changed place.

    Between ``start`` and ``end`` (microseconds) the pages are in flight; ``src`` and ``dst`` are
    residency masks before and after (bit 0: host memory, bit *i*: the *i*-th device, 0: nowhere);
    ``first_page`` is a virtual page number.
    """

    columns = MOVE_COLUMNS


class Trace:
    """Spans and moves of one run, with the words of their columns."""

    def __init__(self) -> None:
        self.spans = Spans()
        self.moves = Moves()
        self.steps = Names()
        self.actors = Names()
        self.causes = Names("")
        self.statuses = Names("ok")

    def span(
        self,
        step: str,
        actor: str,
        start: float,
        end: float,
        *,
        parent: int = -1,
        va: int = -1,
        pages: int = 0,
        bytes: int = 0,
        cause: str = "",
        status: str = "ok",
        value: float = 0,
    ) -> int:
        """Append one finished span and return its row number."""
        rows = self.spans.rows
        row = len(rows) // _W
        rows.extend((
            start, end, self.steps(step), self.actors(actor), parent, va, pages, bytes,
            self.causes(cause), self.statuses(status), value,
        ))  # fmt: skip
        return row

    def open(self, step_id: int, actor_id: int, parent: int, start: float, va: int = -1, pages: int = 0) -> int:
        """Append a span that is still running; `close` sets its end."""
        rows = self.spans.rows
        row = len(rows) // _W
        rows.extend((start, start, step_id, actor_id, parent, va, pages, 0, 0, 0, 0))
        return row

    def close(self, row: int, end: float) -> None:
        """Set the end of an open span."""
        self.spans.rows[row * _W + _END] = end

    def note(
        self,
        row: int,
        *,
        va: int | None = None,
        pages: int | None = None,
        bytes: int | None = None,
        cause: str | None = None,
        status: str | None = None,
        value: float | None = None,
    ) -> None:
        """Fill in what a running step has learned about itself."""
        rows, base = self.spans.rows, row * _W
        if va is not None:
            rows[base + _VA] = va
        if pages is not None:
            rows[base + _PAGES] = pages
        if bytes is not None:
            rows[base + _BYTES] = bytes
        if cause is not None:
            rows[base + _CAUSE] = self.causes(cause)
        if status is not None:
            rows[base + _STATUS] = self.statuses(status)
        if value is not None:
            rows[base + _VALUE] = value

    def move(self, start: float, end: float, first_page: int, pages: int, src: int, dst: int, cause: str = "") -> None:
        """Append a run of pages going from residency mask `src` to `dst`."""
        self.moves.rows.extend((start, end, first_page, pages, src, dst, self.causes(cause)))

    def residency_at(self, time: float, first_page: int, pages: int) -> NDArray[np.int16]:
        """Return where each page is at `time`: a residency mask, or -1 while in flight.

        Parameters
        ----------
        time : float
            Microseconds of simulated time.
        first_page, pages : int
            The window, in virtual page numbers.

        Returns
        -------
        ndarray of int16, shape (pages,)
        """
        where = np.zeros(pages, dtype=np.int16)
        table = self.moves.array()
        for start, end, page, count, _src, dst, _cause in table[table[:, 0] <= time]:
            lo = max(int(page) - first_page, 0)
            hi = min(int(page + count) - first_page, pages)
            if lo < hi:
                where[lo:hi] = int(dst) if end <= time else -1
        return where


def step(function: F) -> F:
    """Record a driver method as a span named after it.

    The method's first argument after ``self`` is the `Thread` that runs it; its clock gives start
    and end, its stack the parent.
    """
    name = function.__name__

    @wraps(function)
    def recorded(self: Any, thread: Any, *args: Any, **kwargs: Any) -> Any:
        row = thread.enter(name)
        try:
            return function(self, thread, *args, **kwargs)
        finally:
            thread.leave(row)

    return cast(F, recorded)


def waiting_step(function: F) -> F:
    """`step` for a method that waits: a generator to be driven with ``yield from``."""
    name = function.__name__

    @wraps(function)
    def recorded(self: Any, thread: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        row = thread.enter(name)
        try:
            return (yield from function(self, thread, *args, **kwargs))
        finally:
            thread.leave(row)

    return cast(F, recorded)
