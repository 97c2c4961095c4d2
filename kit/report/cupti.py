"""CUPTI's records of unified memory and of kernel executions, taken from the trace's spans.

Everything that speaks a CUDA profiler's words (nvprof text, nsys tables and SQLite) starts from `um_records`, so that
no two of them can disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.events import COLUMN, Ints, nanoseconds, picked

if TYPE_CHECKING:
    from kit.flows.run import Run
    from kit.sim.trace import Trace

__all__ = [
    "CPU_FAULT", "DTOD", "DTOH", "GPU_FAULT", "HTOD", "KINDS", "REMOTE_MAP", "THRASHING", "THROTTLING", "Kernel",
    "UmRecords", "device_name", "kernels", "um_event_columns", "um_records",
]  # fmt: skip

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


def um_records(run: Run) -> UmRecords:
    """Return the run's unified memory records, by start time; equal times keep the trace's order."""
    trace = run.trace
    rows, kind = picked(trace, _STEPS)
    column = {name: rows[:, i] for name, i in COLUMN.items()}
    ways = [DTOH if "DtoH" in word else DTOD if "DtoD" in word else HTOD for word in trace.actors.words]
    way = np.array(ways or [0], dtype=np.int64)[column["actor"].astype(np.intp)]
    kind = np.where(kind == HTOD, way, kind)
    start, end = nanoseconds(column["start"]), nanoseconds(column["end"])
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
    rows, _ = picked(trace, {_THROTTLING_END: 1})
    ends, at = nanoseconds(rows[:, COLUMN["start"]]), rows[:, COLUMN["va"]].astype(np.int64)
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
    rows, _ = picked(run.trace, {"kernel": 1})
    grid, block = int(run.parameters.get("grid", 1)), int(run.parameters.get("block", 1))
    fallback = str(run.parameters.get("program", "kernel"))
    words = run.trace.causes.words
    found = [
        Kernel(words[int(row[COLUMN["cause"]])] or fallback, round(row[0] * 1000), round(row[1] * 1000), grid, block)
        for row in rows
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def device_name(run: Run) -> str:
    """Return the GPU's product name: that of the machine's first GPU node, or else the machine's title."""
    for node in run.machine.nodes:
        if str(node.get("id", "")).startswith("gpu") and node.get("name"):
            return str(node["name"])
    return run.machine.title


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
