"""The records that a profiler would show, taken from the trace's spans.

`event_columns` gives those of any flow: a flow names the function that makes them (`step_event_columns` for one
whose records are spans of some steps). Times become whole nanoseconds here, as in CUPTI's records.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.files import whole_file
from kit.report.flow_report import report_of
from kit.sim.trace import SPAN_COLUMNS

if TYPE_CHECKING:
    from kit.flows.run import Run
    from kit.sim.trace import Trace

__all__ = [
    "COLUMN",
    "EVENT_COLUMNS",
    "Ints",
    "csv_line",
    "event_columns",
    "event_records",
    "nanoseconds",
    "picked",
    "step_event_columns",
    "write_events_csv",
]

EVENT_COLUMNS = ("time_us", "duration_us", "kind", "address", "bytes", "value", "cause")
csv_line = "{:.3f},{:.3f},{},{},{},{},{}\n".format
"""Makes one line of the events CSV from the values of `EVENT_COLUMNS`."""

COLUMN = {name: i for i, name in enumerate(SPAN_COLUMNS)}
_CHUNK = 65_536
Ints = NDArray[np.int64]


def picked(trace: Trace, codes: dict[str, int]) -> tuple[NDArray[np.float64], Ints]:
    """Return the span rows whose step is in `codes`, and their codes."""
    # A view, not the copy that `Spans.array` makes: a long run has gigabytes of spans that are no tool events.
    rows = trace.spans.array()
    table = np.array([codes.get(word, 0) for word in trace.steps.words] or [0], dtype=np.int64)
    found = table[rows[:, COLUMN["step"]].astype(np.intp)]
    chosen = np.flatnonzero(found)
    return rows[chosen], found[chosen]


def nanoseconds(microseconds: NDArray[np.float64]) -> Ints:
    """Return times as profilers have them: whole nanoseconds."""
    return np.rint(microseconds * 1000).astype(np.int64)


def event_columns(run: Run) -> dict[str, NDArray[Any]]:
    """Return the profiler's records as one array a column of `EVENT_COLUMNS`, by time.

    Returns
    -------
    dict of str to ndarray, each of shape (records,)
        Times in microseconds (float64, whole nanoseconds), ``address`` relative to the run's base,
        ``bytes`` and ``value`` int64, ``kind`` and ``cause`` words in the flow's profiler's spelling.
    """
    return report_of(run).event_columns(run)


def step_event_columns(run: Run, kinds: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """Return the columns of `event_columns` for a flow whose records are spans of some steps.

    Parameters
    ----------
    run : Run
    kinds : mapping of str to str
        Step to the kind of its record. A record's cause is the span's; ``value`` is the span's value.
    """
    words = tuple(kinds)
    rows, code = picked(run.trace, {step: number for number, step in enumerate(words, start=1)})
    start, end = nanoseconds(rows[:, COLUMN["start"]]), nanoseconds(rows[:, COLUMN["end"]])
    order = np.argsort(start, kind="stable")
    rows, code, start, end = rows[order], code[order], start[order], end[order]
    address = rows[:, COLUMN["va"]].astype(np.int64)
    return {
        "time_us": start / 1000,
        "duration_us": (end - start) / 1000,
        "kind": np.array(["", *kinds.values()], dtype=object)[code],
        "address": np.where(address < 0, address, address - run.base),
        "bytes": rows[:, COLUMN["bytes"]].astype(np.int64),
        "value": rows[:, COLUMN["value"]].astype(np.int64),
        "cause": np.array(run.trace.causes.words, dtype=object)[rows[:, COLUMN["cause"]].astype(np.intp)],
    }


def event_records(run: Run) -> list[dict[str, Any]]:
    """Return `event_columns` as a list of plain dictionaries, one a record."""
    columns = [column.tolist() for column in event_columns(run).values()]
    return [dict(zip(EVENT_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]


def write_events_csv(run: Run, path: str | os.PathLike[str]) -> None:
    """Write the profiler's records as CSV with the columns of `EVENT_COLUMNS`.

    Times carry three decimals (nanoseconds); the same run gives the same bytes.
    """
    columns = event_columns(run)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(EVENT_COLUMNS) + "\n")
        for begin in range(0, len(columns["time_us"]), _CHUNK):
            part = [column[begin : begin + _CHUNK].tolist() for column in columns.values()]
            file.write("".join([csv_line(*row) for row in zip(*part, strict=True)]))
