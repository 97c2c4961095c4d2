"""The trace: what happened, in two columnar tables that everything shown is derived from.

*Spans* say which step ran when, on which actor, under which parent, over which pages.
*Moves* say where runs of pages went, enough to tell where every page was at any moment.
Columns live in ``array`` buffers: an append costs tens of nanoseconds and a numpy array is one copy
away. Doubles hold every address below 2**53 exactly.
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
_COMPACT = 1 << 17
_STEP_SHIFT = 8  # a span's key is step << 8 | actor
_COLUMN = {name: at for at, name in enumerate(SPAN_COLUMNS)}
_FACTS = _COLUMN["va"]  # columns from here on are facts that only some spans have
_WIDTH = 1 + len(SPAN_COLUMNS) - _FACTS
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


class Spans:
    """One row per executed step or hardware activity; times in microseconds.

    ``step``, ``actor``, ``cause`` and ``status`` are ids into the trace's `Names`; ``parent`` is a
    row number or -1; ``va`` a virtual address in bytes or -1; ``value`` is what the profiler
    reports beside the bytes (faults in a group, program counter). What only some spans say about
    themselves (every column from ``va`` on) is kept as sparse facts until `array` is asked for.
    """

    columns = SPAN_COLUMNS

    def __init__(self) -> None:
        self.start, self.end = array("d"), array("d")
        self.key, self.parent = array("q"), array("q")
        self.said: list[tuple[int, dict[str, float]]] = []  # (row, facts) of running steps
        self.whole = array("d")  # row and every fact of finished spans, _WIDTH doubles each

    def __len__(self) -> int:
        return len(self.start)

    def array(self) -> NDArray[np.float64]:
        """Return all rows as a new array, shape (rows, columns)."""
        rows = np.zeros((len(self), len(SPAN_COLUMNS)))
        rows[:, _COLUMN["va"]] = -1
        if len(self):
            rows[:, 0], rows[:, 1] = self.start, self.end
            key = np.array(self.key)
            rows[:, 2], rows[:, 3] = key >> _STEP_SHIFT, key & ((1 << _STEP_SHIFT) - 1)
            rows[:, 4] = self.parent
        whole = np.array(self.whole).reshape(-1, _WIDTH)
        rows[whole[:, 0].astype(np.int64), _FACTS:] = whole[:, 1:]
        for row, facts in self.said:
            for name, fact in facts.items():
                rows[row, _COLUMN[name]] = fact
        return rows

    def compact(self) -> None:
        """Turn what steps said so far into plain numbers (dictionaries are fast to make, but large)."""
        rows = self.array()[[row for row, _ in self.said]] if self.said else np.zeros((0, len(SPAN_COLUMNS)))
        numbers = np.array([row for row, _ in self.said], dtype=np.float64)[:, None]
        self.whole.frombytes(np.hstack([numbers, rows[:, _FACTS:]]).tobytes())
        self.said.clear()

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one column as a new array, shape (rows,)."""
        return self.array()[:, _COLUMN[name]].copy()


class Moves:
    """One row per run of pages that changed place.

    Between ``start`` and ``end`` (microseconds) the pages are in flight; ``src`` and ``dst`` are
    residency masks before and after (bit 0: host memory, bit *i*: the *i*-th device, 0: nowhere);
    ``first_page`` is a virtual page number.
    """

    columns = MOVE_COLUMNS

    def __init__(self) -> None:
        self.rows = array("d")

    def __len__(self) -> int:
        return len(self.rows) // len(MOVE_COLUMNS)

    def array(self) -> NDArray[np.float64]:
        """Return all rows as a new array, shape (rows, columns)."""
        return np.array(self.rows, dtype=np.float64).reshape(-1, len(MOVE_COLUMNS))

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one column as a new array, shape (rows,)."""
        return self.array()[:, MOVE_COLUMNS.index(name)].copy()


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
        row = self.open(self.steps(step), self.actors(actor), parent, start)
        self.spans.end[row] = end
        self.spans.whole.extend((row, va, pages, bytes, self.causes(cause), self.statuses(status), value))
        return row

    def open(self, step_id: int, actor_id: int, parent: int, start: float) -> int:
        """Append a span that is still running; `close` sets its end."""
        spans = self.spans
        row = len(spans.start)
        spans.start.append(start)
        spans.end.append(start)
        spans.key.append(step_id << _STEP_SHIFT | actor_id)
        spans.parent.append(parent)
        return row

    def close(self, row: int, end: float) -> None:
        """Set the end of an open span."""
        self.spans.end[row] = end

    def note(self, row: int, **facts: float | str) -> None:
        """Fill in what a running step has learned about itself: columns of `SPAN_COLUMNS` from ``va`` on."""
        for name in ("cause", "status"):
            word = facts.get(name)
            if isinstance(word, str):
                facts[name] = self.causes(word) if name == "cause" else self.statuses(word)
        self.spans.said.append((row, cast("dict[str, float]", facts)))
        if len(self.spans.said) >= _COMPACT:
            self.spans.compact()

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
        for _start, end, page, count, _src, dst, _cause in table[table[:, 0] <= time]:
            lo = max(int(page) - first_page, 0)
            hi = min(int(page + count) - first_page, pages)
            if lo < hi:
                where[lo:hi] = int(dst) if end <= time else -1
        return where


def step(function: F) -> F:
    """Record a driver function as a span named after it.

    Its second argument is the `Thread` that runs it: the clock gives start and end, the stack the
    parent. This wrapper runs tens of times for one fault, so it touches the columns directly.
    """
    name = function.__name__

    @wraps(function)
    def recorded(subject: Any, thread: Any, *args: Any, **kwargs: Any) -> Any:
        stack, spans = thread.stack, thread.spans
        ends = spans.end
        row = len(ends)
        ends.append(0.0)
        spans.start.append(thread.now)
        try:
            spans.key.append(thread.keys[name])
        except KeyError:
            spans.key.append(thread.key(name))
        spans.parent.append(stack[-1])
        stack.append(row)
        try:
            return function(subject, thread, *args, **kwargs)
        finally:
            stack.pop()
            ends[row] = thread.now

    return cast(F, recorded)


def waiting_step(function: F) -> F:
    """`step` for a function that waits: a generator to be driven with ``yield from``."""
    name = function.__name__

    @wraps(function)
    def recorded(subject: Any, thread: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        row = thread.enter(name)
        try:
            return (yield from function(subject, thread, *args, **kwargs))
        finally:
            thread.leave(row)

    return cast(F, recorded)
