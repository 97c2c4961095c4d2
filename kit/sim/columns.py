"""The columns of a trace: words, spans, moves, and copies that are laid out when they are read."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOVE_COLUMNS", "SPAN_COLUMNS", "Copies", "Moves", "Names", "Spans"]

SPAN_COLUMNS = ("start", "end", "step", "actor", "parent", "va", "pages", "bytes", "cause", "status", "value")
MOVE_COLUMNS = ("start", "end", "first_page", "pages", "src", "dst", "cause")
PAGE = 4096  # bytes
LOG_SHIFT = 2  # a row takes 1 << LOG_SHIFT places of the spans' log
LOG_WIDTH = 1 << LOG_SHIFT
STEP_SHIFT = 8  # a span's key is step << 8 | actor
_FACTS = SPAN_COLUMNS.index("va")  # columns from here on are facts that only some spans have
_WIDTH = 1 + len(SPAN_COLUMNS) - _FACTS
MOVE_BYTES = 8 * len(MOVE_COLUMNS)
pack_facts = Struct(f"{_WIDTH}d").pack
pack_move = Struct(f"{len(MOVE_COLUMNS)}d").pack


class Ids(dict[str, int]):
    """Ids by word; a word that is asked for the first time gets the next one."""

    def __init__(self, *words: str) -> None:
        super().__init__((word, at) for at, word in enumerate(words))
        self.words: list[str] = list(words)

    def __missing__(self, word: str) -> int:
        found = self[word] = len(self.words)
        self.words.append(word)
        return found


class Names:
    """Words of a column, interned: the column stores small integers, readers see words."""

    def __init__(self, *words: str) -> None:
        self.ids = Ids(*words)
        self.words = self.ids.words

    def __call__(self, word: str) -> int:
        """Return the id of `word`, giving it one when it is new."""
        return self.ids[word]


class Spans:
    """One row per executed step or hardware activity; times in microseconds.

    ``step``, ``actor``, ``cause`` and ``status`` are ids into the trace's `Names`; ``parent`` is a
    row number or -1; ``va`` a virtual address in bytes or -1; ``value`` is what the profiler
    reports beside the bytes (faults in a group, program counter). What only some spans say about
    themselves (every column from ``va`` on) is kept as sparse facts until a column is asked for.
    """

    columns = SPAN_COLUMNS

    def __init__(self) -> None:
        self.log: list[float] = []  # of each row its end, start, key, and the place in this list of its parent
        self.facts = bytearray()  # a row number and the columns from va on, packed as doubles
        self.before_reading: Callable[[], None] = lambda: None  # completes the facts

    def __len__(self) -> int:
        return len(self.log) >> LOG_SHIFT

    def array(self) -> NDArray[np.float64]:
        """Return all rows as a new array, shape (rows, columns)."""
        rows = np.empty((len(self), len(SPAN_COLUMNS)))
        for at, name in enumerate(SPAN_COLUMNS):
            rows[:, at] = self.column(name)
        return rows

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one column as a new array, shape (rows,)."""
        if name in ("step", "actor"):
            key = np.array(self.log[2::LOG_WIDTH], dtype=np.int64)
            return (key >> STEP_SHIFT if name == "step" else key & ((1 << STEP_SHIFT) - 1)).astype(np.float64)
        if name == "parent":
            return (np.array(self.log[3::LOG_WIDTH], dtype=np.int64) >> LOG_SHIFT).astype(np.float64)
        if name in ("start", "end"):
            return np.array(self.log[name == "start" :: LOG_WIDTH], dtype=np.float64)
        self.before_reading()
        facts = np.frombuffer(self.facts, dtype=np.float64).reshape(-1, _WIDTH)
        blank = -1.0 if name == "va" else 0.0
        said = facts[:, 1 + SPAN_COLUMNS.index(name) - _FACTS]
        chosen = said != blank
        column = np.full(len(self), blank)
        column[facts[chosen, 0].astype(np.int64)] = said[chosen]
        return column


class Moves:
    """One row per run of pages that changed place.

    Between ``start`` and ``end`` (microseconds) the pages are in flight; ``src`` and ``dst`` are
    residency masks before and after (bit 0: host memory, bit *i*: the *i*-th device, 0: nowhere);
    ``first_page`` is a virtual page number.
    """

    columns = MOVE_COLUMNS

    def __init__(self) -> None:
        self.rows = bytearray()  # the columns, packed as doubles
        self.before_reading: Callable[[], None] = lambda: None  # completes the rows

    def __len__(self) -> int:
        self.before_reading()
        return len(self.rows) // MOVE_BYTES

    def array(self) -> NDArray[np.float64]:
        """Return all rows as a new array, shape (rows, columns)."""
        self.before_reading()
        return np.frombuffer(bytearray(self.rows), dtype=np.float64).reshape(-1, len(MOVE_COLUMNS))

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one column as a new array, shape (rows,)."""
        return self.array()[:, MOVE_COLUMNS.index(name)].copy()


class Copies:
    """Copies as they were pushed, several at a time, until somebody reads spans or moves.

    Then each becomes facts of its span, and a move in the place that it had among the moves.
    """

    def __init__(self, spans: Spans, moves: Moves) -> None:
        self.spans, self.moves = spans, moves
        self.pushes: list[int] = []  # of each push its first row, its copies, its place in the moves, src and dst
        self.page: list[int] = []  # of each copy
        self.pages: list[int] = []
        self.cause: list[int] = []
        spans.before_reading = moves.before_reading = self.lay_out

    def lay_out(self) -> None:
        """Complete facts and moves."""
        if not self.pushes:
            return
        pushes = np.array(self.pushes, dtype=np.int64).reshape(-1, 5)
        of_push = np.repeat(np.arange(len(pushes)), pushes[:, 1])
        row, _, place, src, dst = pushes[of_push].T
        row = row + np.arange(len(row)) - (np.cumsum(pushes[:, 1]) - pushes[:, 1])[of_push]
        page, pages, cause = (np.array(column, dtype=np.float64) for column in (self.page, self.pages, self.cause))
        blank = np.zeros(len(row))
        self.spans.facts += np.stack([row, page * PAGE, pages, pages * PAGE, cause, blank, blank], 1).tobytes()
        log, at = self.spans.log, (row << LOG_SHIFT).tolist()
        start, end = np.array([log[i + 1] for i in at]), np.array([log[i] for i in at])
        moved = np.stack([start, end, page, pages, src, dst, cause], 1)[src != dst]
        rows = np.frombuffer(bytes(self.moves.rows), dtype=np.float64).reshape(-1, len(MOVE_COLUMNS))
        self.moves.rows[:] = np.insert(rows, place[src != dst], moved, axis=0).tobytes()
        for column in (self.pushes, self.page, self.pages, self.cause):
            column.clear()
