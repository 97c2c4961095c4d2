"""The trace: what happened, in two columnar tables that everything shown is derived from.

*Spans* say which step ran when, on which actor, under which parent, over which pages.
*Moves* say where runs of pages went, enough to tell where every page was at any moment.
Columns live in lists, whose appends cost tens of nanoseconds; readers get numpy arrays. Doubles
hold every address below 2**53 exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kit.sim.columns import (
    MOVE_COLUMNS,
    SPAN_COLUMNS,
    STEP_SHIFT,
    Copies,
    LayOut,
    Moves,
    Names,
    Spans,
)
from kit.sim.log import SHIFT
from kit.sim.steps import step, waiting_step

__all__ = ["MOVE_COLUMNS", "SPAN_COLUMNS", "Moves", "Names", "Spans", "Trace", "step", "waiting_step"]


class Trace:
    """Spans and moves of one run, with the words of their columns."""

    def __init__(self) -> None:
        self.spans = Spans()
        self.moves = Moves()
        self._facts, self._moves = self.spans.facts, self.moves.rows
        self.copies = Copies(self.spans, self.moves)
        self.steps = Names()
        self.actors = Names()
        self.causes = Names("")
        self.statuses = Names("ok")
        self._keys: dict[tuple[str, str], int] = {}

    def span(
        self,
        step: str,
        actor: str,
        start: float,
        end: float,
        parent: int = -1,
        va: int = -1,
        pages: int = 0,
        bytes: int = 0,
        cause: str = "",
        status: str = "ok",
        value: float = 0,
    ) -> int:
        """Append one finished span and return its row number."""
        key = self._keys.get((step, actor)) or self.key(step, actor)
        at = self.spans.log.add(end, start, key, parent << SHIFT)
        if va >= 0 or pages or value or cause or bytes or status != "ok":
            cause_id, status_id = self.causes.ids[cause], self.statuses.ids[status]
            self._facts.add(float(at), va, pages, bytes, cause_id, status_id, value)
        return at >> SHIFT

    def key(self, step: str, actor: str) -> int:
        """Return the span key of a step by an actor."""
        found = self._keys.get((step, actor))
        if found is None:
            found = self._keys[step, actor] = self.steps(step) << STEP_SHIFT | self.actors(actor)
        return found

    def move(self, start: float, end: float, first_page: int, pages: int, src: int, dst: int, cause: str = "") -> None:
        """Append a run of pages going from residency mask `src` to `dst`."""
        self._moves.add(start, end, first_page, pages, src, dst, self.causes.ids[cause])

    def copied(
        self, step: str, actor: str, parent: int, count: int, src: int, dst: int, lay_out: LayOut, *how: Any
    ) -> None:
        """Append a finished span and a move for each of several runs of pages, copied one after the other.

        Parameters
        ----------
        count : int
            How many runs.
        src, dst : int
            Residency masks; equal ones make no moves.
        lay_out : function
            Called with `how` when somebody reads the trace. It yields start, end, first page, number of pages and
            cause's id of each copy.
        """
        key = self._keys.get((step, actor)) or self.key(step, actor)
        self.copies.push((len(self.spans.log), key, parent << SHIFT, len(self._moves), src, dst, lay_out, how), count)

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
