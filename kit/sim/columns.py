"""The columns of a trace: words, spans, moves, and copies that are laid out when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from kit.sim.log import END, KEY, PARENT, SHIFT, START, Log, Rows

__all__ = ["MOVE_COLUMNS", "SPAN_COLUMNS", "Copies", "Moves", "Names", "Spans"]

SPAN_COLUMNS: Final = ("start", "end", "step", "actor", "parent", "va", "pages", "bytes", "cause", "status", "value")
MOVE_COLUMNS: Final = ("start", "end", "first_page", "pages", "src", "dst", "cause")
PAGE_SHIFT: Final = 12
STEP_SHIFT: Final = 8  # a span's key is step << 8 | actor
_FACTS: Final = SPAN_COLUMNS.index("va")  # columns from here on are facts that only some spans have
LayOut = Callable[..., Iterable[tuple[float, float, int, int, int]]]
# Of a push its place in the log, key, parent's place, place among the moves, src, dst, and how to lay it out.
Push = tuple[int, int, int, int, int, int, LayOut, tuple[Any, ...]]


class Ids(dict[str, int]):
    """Ids by word; a word that is asked for the first time gets the next one."""

    def __init__(self, *words: str) -> None:
        super().__init__((word, at) for at, word in enumerate(words))
        self.words: list[str] = list(words)

    def __missing__(self, word: str) -> int:
        found = self[word] = len(self.words)
        self.words.append(word)
        return found


class Keys(dict[str, int]):
    """An actor's span keys by the name of the step, made when they are asked for the first time."""

    def __init__(self, make: Callable[[str], int]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, step: str) -> int:
        found = self[step] = self.make(step)
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

    columns: ClassVar = SPAN_COLUMNS

    def __init__(self) -> None:
        self.log = Log()
        self.facts = Rows()  # a place in the log and the columns from va on
        self.before_reading: Callable[[], None] = lambda: None  # completes them

    def __len__(self) -> int:
        return len(self.log) >> SHIFT

    def array(self) -> NDArray[np.float64]:
        """Return all rows as a new array, shape (rows, columns)."""
        rows = np.empty((len(self), len(SPAN_COLUMNS)))
        for at, name in enumerate(SPAN_COLUMNS):
            rows[:, at] = self.column(name)
        return rows

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one column as a new array, shape (rows,)."""
        self.before_reading()
        if name in ("step", "actor"):
            key = self.log.column(KEY).astype(np.int64)
            return (key >> STEP_SHIFT if name == "step" else key & ((1 << STEP_SHIFT) - 1)).astype(np.float64)
        if name == "parent":
            return (self.log.column(PARENT).astype(np.int64) >> SHIFT).astype(np.float64)
        if name in ("start", "end"):
            return self.log.column(END if name == "end" else START)
        facts = self.facts.array()
        blank = -1.0 if name == "va" else 0.0
        said = facts[:, 1 + SPAN_COLUMNS.index(name) - _FACTS]
        chosen = said != blank
        column = np.full(len(self), blank)
        column[facts[chosen, 0].astype(np.int64) >> SHIFT] = said[chosen]
        return column


class Moves:
    """One row per run of pages that changed place.

    Between ``start`` and ``end`` (microseconds) the pages are in flight; ``src`` and ``dst`` are
    residency masks before and after (bit 0: host memory, bit *i*: the *i*-th device, 0: nowhere);
    ``first_page`` is a virtual page number.
    """

    columns: ClassVar = MOVE_COLUMNS

    def __init__(self) -> None:
        self.rows = Rows()
        self.before_reading: Callable[[], None] = lambda: None  # completes them

    def __len__(self) -> int:
        return len(self._all())

    def array(self) -> NDArray[np.float64]:
        """Return all rows as a new array, shape (rows, columns)."""
        return self._all().copy()

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one column as a new array, shape (rows,)."""
        return self._all()[:, MOVE_COLUMNS.index(name)].copy()

    def _all(self) -> NDArray[np.float64]:
        self.before_reading()
        return self.rows.array()


class Copies:
    """Copies as they were pushed, several at a time, until somebody reads spans or moves.

    Then each fills the row that was left blank for its span, and becomes a move in the place that it had among them.
    """

    def __init__(self, spans: Spans, moves: Moves) -> None:
        self.spans, self.moves = spans, moves
        self.pushed: list[Push] = []
        spans.before_reading = moves.before_reading = self.lay_out

    def push(self, push: Push, count: int) -> None:
        """Leave room for `count` spans and remember how to fill it."""
        self.pushed.append(push)
        self.spans.log.leave(count)

    def lay_out(self) -> None:
        """Complete spans and moves."""
        if not self.pushed:
            return
        log, facts, moves = self.spans.log, self.spans.facts, self.moves.rows
        moved, places = [], []
        for at, key, parent, place, src, dst, lay_out, how in self.pushed:
            for start, end, page, count, cause in lay_out(*how):
                log.write(at, end, start, key, parent)
                facts.add(at, page << PAGE_SHIFT, count, count << PAGE_SHIFT, cause, 0, 0)
                if src != dst:
                    moved.append((start, end, page, count, src, dst, cause))
                    places.append(place)
                at += 1 << SHIFT
        if places:
            moves.put(np.insert(moves.array(), places, np.array(moved, dtype=np.float64), axis=0))
        self.pushed.clear()  # last: whoever is interrupted before starts again
