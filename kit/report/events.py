"""The records that a profiler would show, taken from the trace's spans.

`event_columns` gives those of any flow: a flow names the function that makes them (`step_event_columns` for one
whose records are spans of some steps). Everything that speaks a CUDA profiler's words (nvprof text, nsys tables
and SQLite) starts from `um_records`, so that no two of them can disagree. Times become whole nanoseconds here, as
in CUPTI's records.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    "EVENT_COLUMNS",
    "KINDS",
    "Kernel",
    "UmRecords",
    "csv_line",
    "device_name",
    "event_columns",
    "event_records",
    "kernels",
    "step_event_columns",
    "um_event_columns",
    "um_records",
    "write_events_csv",
]

EVENT_COLUMNS = ("time_us", "duration_us", "kind", "address", "bytes", "value", "cause")
csv_line = "{:.3f},{:.3f},{},{},{},{},{}\n".format
"""Makes one line of the events CSV from the values of `EVENT_COLUMNS`."""

HTOD, DTOH, CPU_FAULT, GPU_FAULT, THRASHING, THROTTLING, REMOTE_MAP, DTOD = range(1, 9)
KINDS = {
    HTOD: "BYTES_TRANSFER_HTOD",
    DTOH: "BYTES_TRANSFER_DTOH",
    CPU_FAULT: "CPU_PAGE_FAULT_COUNT",
    GPU_FAULT: "GPU_PAGE_FAULT",
    THRASHING: "THRASHING",
    THROTTLING: "THROTTLING",
    REMOTE_MAP: "REMOTE_MAP",
    DTOD: "BYTES_TRANSFER_DTOD",
}
"""CUPTI's unified memory counter kinds by number."""

_STEPS = {
    "UvmEventTypeMigration": HTOD,  # which way it went is the copy engine's name
    "UvmEventTypeCpuFault": CPU_FAULT,
    "UvmEventTypeGpuFault": GPU_FAULT,
    "UvmEventTypeThrashingDetected": THRASHING,
    "UvmEventTypeThrottlingStart": THROTTLING,
    "UvmEventTypeMapRemote": REMOTE_MAP,
}
_THROTTLING_END = "UvmEventTypeThrottlingEnd"
_COLUMN = {name: i for i, name in enumerate(SPAN_COLUMNS)}
_CHUNK = 65_536
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class UmRecords:
    """Unified memory records by start time, one array element each.

    Attributes
    ----------
    start, end : ndarray of int64
        Nanoseconds.
    kind : ndarray of int64
        CUPTI's counter kind, a key of `KINDS`.
    address : ndarray of int64
        Absolute virtual address in bytes.
    bytes : ndarray of int64
        Bytes moved, thrashing or mapped; 0 for faults and throttling.
    value : ndarray of int64
        What CUPTI calls the counter's value: bytes for transfers, thrashing and remote maps,
        faults for GPU faults, the program counter for CPU faults.
    cause : ndarray of int64
        Index into `words`.
    words : tuple of str
        Migration causes and access types in CUPTI's words.
    """

    start: Ints
    end: Ints
    kind: Ints
    address: Ints
    bytes: Ints
    value: Ints
    cause: Ints
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.start)

    def of(self, *kinds: int) -> UmRecords:
        """Return the records of these kinds, in order."""
        return self._at(np.flatnonzero(np.isin(self.kind, kinds)))

    def _at(self, rows: Ints) -> UmRecords:
        return replace(
            self, start=self.start[rows], end=self.end[rows], kind=self.kind[rows], address=self.address[rows],
            bytes=self.bytes[rows], value=self.value[rows], cause=self.cause[rows],
        )  # fmt: skip

    def cause_ids(self, ids: dict[str, int]) -> Ints:
        """Return each record's cause as a number of `ids`, 0 for words that are not in it."""
        return np.array([ids.get(word, 0) for word in self.words], dtype=np.int64)[self.cause]


@dataclass(frozen=True)
class Kernel:
    """One kernel execution: name, start and end in nanoseconds, launch shape."""

    name: str
    start: int
    end: int
    grid: int
    block: int


def _picked(trace: Trace, codes: dict[str, int]) -> tuple[NDArray[np.float64], Ints]:
    """Return the span rows whose step is in `codes`, and their codes."""
    # A view, not the copy that `Spans.array` makes: a long run has gigabytes of spans that are no tool events.
    rows = trace.spans.array()
    table = np.array([codes.get(word, 0) for word in trace.steps.words] or [0], dtype=np.int64)
    found = table[rows[:, _COLUMN["step"]].astype(np.intp)]
    chosen = np.flatnonzero(found)
    return rows[chosen], found[chosen]


def _ns(microseconds: NDArray[np.float64]) -> Ints:
    return np.rint(microseconds * 1000).astype(np.int64)


def um_records(run: Run) -> UmRecords:
    """Return the run's unified memory records, by start time; equal times keep the trace's order."""
    trace = run.trace
    rows, kind = _picked(trace, _STEPS)
    column = {name: rows[:, i] for name, i in _COLUMN.items()}
    ways = [DTOH if "DtoH" in word else DTOD if "DtoD" in word else HTOD for word in trace.actors.words]
    way = np.array(ways or [0], dtype=np.int64)[column["actor"].astype(np.intp)]
    kind = np.where(kind == HTOD, way, kind)
    start, end = _ns(column["start"]), _ns(column["end"])
    address = column["va"].astype(np.int64)
    throttled = np.flatnonzero((kind == THROTTLING) & (end == start))
    end[throttled] = _throttling_ends(trace, start[throttled], address[throttled])
    faults = (kind == CPU_FAULT) | (kind == GPU_FAULT)
    nbytes = np.where(faults | (kind == THROTTLING), 0, column["bytes"]).astype(np.int64)
    value = np.where(faults, column["value"], nbytes).astype(np.int64)
    cause, words = column["cause"].astype(np.int64), tuple(word.upper() for word in trace.causes.words)
    records = UmRecords(start, end, kind, address, nbytes, value, cause, words)
    return records._at(np.argsort(start, kind="stable"))


def _throttling_ends(trace: Trace, start: Ints, address: Ints) -> Ints:
    """Return when each throttling ended: the n-th start at an address goes with the n-th end there."""
    rows, _ = _picked(trace, {_THROTTLING_END: 1})
    ends, at = _ns(rows[:, _COLUMN["start"]]), rows[:, _COLUMN["va"]].astype(np.int64)
    over = zip(at.tolist(), _rank(at, ends), ends.tolist(), strict=True)
    waiting = {(va, rank): end for va, rank, end in over}
    keys = zip(address.tolist(), _rank(address, start), start.tolist(), strict=True)
    return np.array([waiting.get((va, rank), begun) for va, rank, begun in keys], dtype=np.int64)


def _rank(group: Ints, time: Ints) -> list[int]:
    """Return each row's place in its group by time."""
    order = np.lexsort((time, group))
    ordered = group[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    place = np.arange(len(ordered)) - np.repeat(first, np.diff(np.r_[first, len(ordered)]))
    rank = np.empty_like(order)
    rank[order] = place
    return [int(n) for n in rank]


def kernels(run: Run) -> list[Kernel]:
    """Return the run's kernel executions by start time."""
    rows, _ = _picked(run.trace, {"kernel": 1})
    grid, block = int(run.parameters.get("grid", 1)), int(run.parameters.get("block", 1))
    fallback = str(run.parameters.get("program", "kernel"))
    words = run.trace.causes.words
    found = [
        Kernel(words[int(row[_COLUMN["cause"]])] or fallback, round(row[0] * 1000), round(row[1] * 1000), grid, block)
        for row in rows
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def device_name(run: Run) -> str:
    """Return the GPU's product name: that of the machine's first GPU node, or else the machine's title."""
    for node in run.machine.nodes:
        if str(node.get("id", "")).startswith("gpu") and node.get("name"):
            return str(node["name"])
    return run.machine.title


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
    rows, code = _picked(run.trace, {step: number for number, step in enumerate(words, start=1)})
    start, end = _ns(rows[:, _COLUMN["start"]]), _ns(rows[:, _COLUMN["end"]])
    order = np.argsort(start, kind="stable")
    rows, code, start, end = rows[order], code[order], start[order], end[order]
    address = rows[:, _COLUMN["va"]].astype(np.int64)
    return {
        "time_us": start / 1000,
        "duration_us": (end - start) / 1000,
        "kind": np.array(["", *kinds.values()], dtype=object)[code],
        "address": np.where(address < 0, address, address - run.base),
        "bytes": rows[:, _COLUMN["bytes"]].astype(np.int64),
        "value": rows[:, _COLUMN["value"]].astype(np.int64),
        "cause": np.array(run.trace.causes.words, dtype=object)[rows[:, _COLUMN["cause"]].astype(np.intp)],
    }


def um_event_columns(run: Run) -> dict[str, NDArray[Any]]:
    """Return the columns of `event_columns` for CUDA unified memory: words in CUPTI's spelling."""
    records = um_records(run)
    kinds = np.array([KINDS.get(code, "") for code in range(max(KINDS) + 1)], dtype=object)
    return {
        "time_us": records.start / 1000,
        "duration_us": (records.end - records.start) / 1000,
        "kind": kinds[records.kind],
        "address": records.address - run.base,
        "bytes": records.bytes,
        "value": records.value,
        "cause": np.array(records.words, dtype=object)[records.cause],
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
