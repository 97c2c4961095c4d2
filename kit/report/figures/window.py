"""What the pictures look through: the managed pages laid end to end, the run's end, chosen spans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.errors import ParameterError, did_you_mean
from kit.report.flow_report import report_of
from kit.sim.trace import SPAN_COLUMNS, Trace

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = [
    "COLUMN",
    "Pages",
    "Window",
    "busy",
    "driver_rows",
    "end_of",
    "idle_words",
    "self_time",
    "spans_of",
    "window_of",
    "window_of_batch",
]

COLUMN = {name: i for i, name in enumerate(SPAN_COLUMNS)}
_PAGE, _BLOCK = 4096, 512


@dataclass(frozen=True)
class Pages:
    """The managed pages of a run, allocation after allocation, without the gaps between them.

    Attributes
    ----------
    names : list of str
        Allocation names, ascending by address.
    firsts, counts : ndarray of int64, shape (allocations,)
        First virtual page number and pages of each. A range can be longer than its allocation:
        pages past an allocation's end count as its own as soon as one of them has moved.
    """

    names: list[str]
    firsts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, run: Run) -> Pages:
        """Read the allocations of `run`; with none, whatever pages have moved."""
        moves = run.trace.moves.array()
        lo, hi = moves[:, 2].astype(np.int64), (moves[:, 2] + moves[:, 3]).astype(np.int64)
        kept = sorted(run.allocations, key=lambda a: a.va)
        if not kept:
            first = int(lo.min()) if len(lo) else 0
            return cls([""], np.array([first]), np.array([int(hi.max()) - first if len(hi) else 1]))
        firsts = np.array([a.va // _PAGE for a in kept], dtype=np.int64)
        ends = np.array([-(-(a.va + a.bytes) // _PAGE) for a in kept], dtype=np.int64)
        owner = np.searchsorted(firsts, lo, side="right") - 1
        np.maximum.at(ends, owner[owner >= 0], hi[owner >= 0])
        ends[:-1] = np.minimum(ends[:-1], firsts[1:])
        return cls([a.name for a in kept], firsts, np.maximum(ends - firsts, 1))

    @property
    def total(self) -> int:
        """Pages in all."""
        return int(self.counts.sum())

    def position(self, page: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how many managed pages lie before each virtual page number, shape as `page`.

        Page numbers in a gap fall on the gap's edge, so a run of pages keeps exactly its managed part.
        """
        offsets = np.concatenate(([0], np.cumsum(self.counts)))
        owner = np.maximum(np.searchsorted(self.firsts, page, side="right") - 1, 0)
        inside = np.clip(page - self.firsts[owner], 0, self.counts[owner])
        return np.asarray(offsets[owner] + inside, dtype=np.float64)

    def block_edges(self) -> NDArray[np.float64]:
        """Return the positions at which a 2 MiB block starts inside an allocation."""
        found = [
            np.arange(-(-(first + 1) // _BLOCK) * _BLOCK, first + count, _BLOCK, dtype=np.float64)
            for first, count in zip(self.firsts, self.counts, strict=True)
        ]
        return self.position(np.concatenate(found)) if found else np.empty(0)


@dataclass(frozen=True)
class Window:
    """The stretch of simulated time that a picture shows, in microseconds."""

    start: float
    end: float

    @property
    def length(self) -> float:
        """Microseconds shown."""
        return self.end - self.start

    def holds(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rows, with start and end in their first two columns, that reach into the window."""
        return rows[((rows[:, 0] >= self.start) | (rows[:, 1] > self.start)) & (rows[:, 0] < self.end)]


def window_of(run: Run, stage: str = "") -> Window:
    """Return the window of a stage, or of the whole run.

    Raises
    ------
    ParameterError
        No stage of that name has run, with the closest one.
    """
    end = end_of(run)
    if not stage:
        return Window(0.0, end)
    times = {name: (start, stop) for name, start, stop in run.stages}
    if stage not in times:
        raise ParameterError("stage", stage, "one of " + (", ".join(times) or "none yet"), did_you_mean(stage, times))
    start, stop = times[stage]
    return Window(start, max(stop, start + 1.0))


def idle_words(run: Run, stage: str) -> str:
    """Say that a stage took no time, so that there is nothing to draw of it; empty where it did, or has not run."""
    times = [(start, stop) for name, start, stop in run.stages if name == stage]
    if not times or any(stop > start for start, stop in times):
        return ""
    name = stage.replace("_", " ")
    return report_of(run).idle.get(stage, f"Nothing happens in this run's stage “{name}”: it takes no simulated time.")


def window_of_batch(run: Run, batch: int | None = None) -> tuple[int, Window] | None:
    """Return a fault batch's number, from 0, and its window with room around it; None when there is no such batch.

    Without a number, it is the batch that took longest. What a batch is, the flow's `Closeup` says.
    """
    rows = spans_of(run.trace, run.trace.spans.array(), (report_of(run).closeup.step,))
    if batch is None and len(rows):
        batch = int(np.argmax(rows[:, COLUMN["end"]] - rows[:, COLUMN["start"]]))
    if batch is None or not 0 <= batch < len(rows):
        return None
    start, stop = rows[batch, COLUMN["start"]], rows[batch, COLUMN["end"]]
    room = (stop - start) * 0.08
    return batch, Window(start - room, stop + room)


def end_of(run: Run) -> float:
    """Return the last moment of the run so far, in microseconds; 1 for a run without time."""
    spans, moves = run.trace.spans, run.trace.moves
    ends = [end for _name, _start, end in run.stages]
    ends += [float(column.max()) for column in (spans.column("end"), moves.column("end")) if len(column)]
    return max(ends, default=0.0) or 1.0


def spans_of(trace: Trace, table: NDArray[np.float64], steps: Iterable[str], actor: str = "") -> NDArray[np.float64]:
    """Return the rows of `table` whose step is one of `steps` (and whose actor is `actor`)."""
    wanted = [trace.steps.ids[name] for name in steps if name in trace.steps.ids]
    chosen = np.isin(table[:, COLUMN["step"]], wanted)
    if actor:
        chosen &= table[:, COLUMN["actor"]] == trace.actors.ids.get(actor, -1)
    return table[chosen]


def busy(starts: NDArray[np.float64], ends: NDArray[np.float64], end: float, cells: int) -> NDArray[np.float64]:
    """Return the share of each of `cells` equal slices of [0, `end`) that at least one interval covers.

    Parameters
    ----------
    starts, ends : ndarray of float64, shape (intervals,)
        In the unit of `end`; they may overlap and come in any order.

    Returns
    -------
    ndarray of float64, shape (cells,)
    """
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    fresh = np.concatenate(([True], starts[1:] > ends[:-1])) if len(starts) else np.empty(0, dtype=bool)
    first = np.flatnonzero(fresh)
    joined_ends = ends[np.concatenate((first[1:] - 1, [len(ends) - 1]))] if len(first) else ends
    steps = np.zeros(cells + 2)
    for times, sign in ((starts[first], 1.0), (joined_ends, -1.0)):
        at = np.clip(times / end * cells, 0, cells)
        cell = at.astype(np.int64)
        np.add.at(steps, cell, sign * (1 - (at - cell)))
        np.add.at(steps, cell + 1, sign * (at - cell))
    return np.clip(np.cumsum(steps)[:cells], 0.0, 1.0)


def driver_rows(run: Run, table: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows are driver steps: neither tool events nor hardware activity."""
    report = report_of(run)
    outside = [i for name, i in run.trace.steps.ids.items() if not report.is_step(name)]
    return ~np.isin(table[:, COLUMN["step"]], outside)


def self_time(run: Run, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each row's own time: its duration less its driver-step children's; 0 for other rows."""
    driver = driver_rows(run, table)
    duration = np.where(driver, table[:, COLUMN["end"]] - table[:, COLUMN["start"]], 0.0)
    parent = table[:, COLUMN["parent"]].astype(np.int64)
    inner = driver & (parent >= 0)
    children = np.bincount(parent[inner], duration[inner], len(table))
    return np.where(driver, np.maximum(duration - children, 0.0), 0.0)
