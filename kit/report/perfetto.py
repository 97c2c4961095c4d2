"""The run as Chrome JSON trace events, for ui.perfetto.dev and chrome://tracing.

Every actor is a thread of one process, in the lane order of every picture. Spans that overlap
without nesting (two copies in flight, say) get lanes beside each other: the format has no other
way to show them. Residency comes from the moves, as one counter a place.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.files import whole_file
from kit.report.flow_report import FlowReport, report_of
from kit.report.language import PLACES
from kit.sim.trace import MOVE_COLUMNS, SPAN_COLUMNS

if TYPE_CHECKING:
    from kit.flows.run import Run
    from kit.sim.trace import Trace

__all__ = ["resident_bytes", "write_perfetto"]

_CHUNK = 65_536
_PAGE_BYTES = 4096
_PID = 1
Rows = NDArray[np.float64]


def write_perfetto(run: Run, path: str | os.PathLike[str]) -> None:
    """Write the run's spans, faults and residency as a Chrome JSON trace.

    Times are microseconds, as the format wants them. Spans become complete events (``X``), spans
    without a duration instants (``i``), resident bytes by place counters (``C``). The file is
    written in pieces, so that a million spans need no second copy in memory.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        about = {"flow": run.flow, "scenario": run.scenario, "machine": run.machine.name}
        file.write(f'{{"displayTimeUnit":"ns","otherData":{json.dumps(about)},"traceEvents":[\n')
        title = f"{run.flow}: {run.scenario}" if run.scenario else run.flow
        file.write(_json({"name": "process_name", "ph": "M", "pid": _PID, "args": {"name": title}}))
        _write_spans(file, run.trace, report_of(run))
        _write_counters(file, run)
        file.write("\n]}\n")


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def _write_spans(file: IO[str], trace: Trace, report: FlowReport) -> None:
    rows = trace.spans.array()
    track, names = _tracks(trace, rows, report)
    lane = _sublanes(rows, track)
    used = sorted({(int(t), int(n)) for t, n in np.unique(np.stack([track, lane], axis=1), axis=0)})
    order = sorted(used, key=lambda key: (report.lane_of(names[key[0]][0]), names[key[0]], key[1]))
    thread = {key: number for number, key in enumerate(order, start=1)}
    for key, number in thread.items():
        actor, part = names[key[0]]
        label = actor + (f": {part}" if part else "") + (f" ({key[1] + 1})" if key[1] else "")
        where = {"ph": "M", "pid": _PID, "tid": number}
        file.write(",\n" + _json({"name": "thread_name", **where, "args": {"name": label}}))
        file.write(",\n" + _json({"name": "thread_sort_index", **where, "args": {"sort_index": number}}))
    width = int(lane.max(initial=0)) + 1
    numbers = np.zeros((len(names) or 1) * width, dtype=np.int64)
    for (t, n), number in thread.items():
        numbers[t * width + n] = number
    tids = numbers[track * width + lane]
    for begin in range(0, len(rows), _CHUNK):
        piece = slice(begin, begin + _CHUNK)
        file.write("".join(_span_lines(trace, rows[piece], tids[piece], report)))


def _tracks(trace: Trace, rows: Rows, report: FlowReport) -> tuple[NDArray[np.int64], list[tuple[str, str]]]:
    """Return each row's track and the tracks' (actor, part).

    An actor's driver steps nest in each other and share a track; what hardware and tools record
    happens beside them, so each of those steps has a track of its own.
    """
    parts = ["", *(word for word in trace.steps.words if not report.is_step(word))]
    place = {word: i for i, word in enumerate(parts)}
    part = np.array([place.get(word, 0) for word in trace.steps.words] or [0], dtype=np.int64)
    actor = rows[:, SPAN_COLUMNS.index("actor")].astype(np.int64)
    track = actor * len(parts) + part[rows[:, SPAN_COLUMNS.index("step")].astype(np.int64)]
    return track, [(word, name.removeprefix(report.event_prefix)) for word in trace.actors.words for name in parts]


def _sublanes(rows: Rows, track: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a lane within each row's track, so that spans of a lane nest or follow each other."""
    lane = np.zeros(len(rows), dtype=np.int64)
    order = np.lexsort((-rows[:, 1], rows[:, 0], track))
    bounds = np.flatnonzero(np.r_[True, np.diff(track[order]) != 0, True]) if len(order) else np.zeros(1, np.int64)
    for first, last in pairwise(bounds.tolist()):
        members = order[first:last]
        start, end = np.rint(rows[members, 0] * 1000), np.rint(rows[members, 1] * 1000)
        if np.all(start[1:] >= np.maximum.accumulate(end)[:-1]) or _nests(start, end):
            continue
        lane[members] = _beside(start.tolist(), end.tolist())
    return lane


def _nests(start: Rows, end: Rows) -> bool:
    """Tell whether spans, by start and then longest first, all lie within or after each other."""
    open_ends: list[float] = []
    for begin, finish in zip(start.tolist(), end.tolist(), strict=True):
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        if open_ends and finish > open_ends[-1]:
            return False
        open_ends.append(finish)
    return True


def _beside(start: list[float], end: list[float]) -> list[int]:
    """Give each span the lowest lane that is free when it starts."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    lanes: list[int] = []
    for begin, finish in zip(start, end, strict=True):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (finish, lane))
        lanes.append(lane)
    return lanes


def _span_lines(trace: Trace, rows: Rows, tids: NDArray[np.int64], report: FlowReport) -> Iterator[str]:
    """Yield one trace event a span, each with the comma and newline that go before it."""
    steps = [json.dumps(word) for word in trace.steps.words]
    causes = [f',"cause":{json.dumps(word)}' if word else "" for word in trace.causes.words]
    statuses = ["" if word == "ok" else f',"status":{json.dumps(word)}' for word in trace.statuses.words]
    category = ["driver" if report.is_step(word) else "tool" for word in trace.steps.words]
    for row, tid in zip(rows.tolist(), tids.tolist(), strict=True):
        start, end, step, _actor, _parent, va, pages, nbytes, cause, status, value = row
        kind = int(step)
        # Whole nanoseconds on both sides: rounding a duration by itself would let a callee outlive its caller.
        begin, length = round(start * 1000), round(end * 1000) - round(start * 1000)
        when = f'"ph":"X","dur":{length / 1000:.3f}' if length > 0 else '"ph":"i","s":"t"'
        yield (
            f',\n{{"name":{steps[kind]},"cat":"{category[kind]}",{when},"ts":{begin / 1000:.3f},"pid":{_PID},'
            f'"tid":{tid},"args":{{"va":"{f"0x{int(va):x}" if va >= 0 else ""}","pages":{int(pages)},'
            f'"bytes":{int(nbytes)},"value":{value:.15g}{causes[int(cause)]}{statuses[int(status)]}}}}}'
        )


def resident_bytes(run: Run) -> tuple[Rows, dict[str, NDArray[np.int64]]]:
    """Return how many bytes each place holds, at every moment at which that changes.

    Parameters
    ----------
    run : Run
        A run with moves.

    Returns
    -------
    time : ndarray of float64, shape (moments,)
        Microseconds, ascending, each once.
    held : dict of str to ndarray of int64, shape (moments,)
        Bytes from that moment on, by place: host memory, device memory (numbered where there are
        several devices) and in flight.
        A read-duplicated page counts in every place that holds it.
    """
    moves = run.trace.moves.array()
    column = {name: moves[:, i] for i, name in enumerate(MOVE_COLUMNS)}
    source, target = column["src"].astype(np.int64), column["dst"].astype(np.int64)
    size = column["pages"].astype(np.int64) * int(run.parameters.get("page_bytes", _PAGE_BYTES))
    moments = np.concatenate([column["start"], column["end"]])
    order = np.argsort(moments, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(moments[order]) > 0, True]) if len(order) else order
    places = max(int(np.bitwise_or.reduce(source | target, initial=0)).bit_length(), 1)

    def held(at_start: NDArray[np.int64], at_end: NDArray[np.int64]) -> NDArray[np.int64]:
        change = np.concatenate([at_start * size, at_end * size])
        return np.asarray(np.cumsum(change[order])[last], dtype=np.int64)

    result = {}
    for bit in range(places):
        before, after = source >> bit & 1, target >> bit & 1
        # What leaves a place is gone from the start of the move, what comes is there at its end.
        result[_place(bit, places)] = held(np.minimum(after - before, 0), np.maximum(after - before, 0))
    flying = (source != target) & (column["end"] > column["start"])
    result[PLACES["flight"].words] = held(flying.astype(np.int64), -flying.astype(np.int64))
    return moments[order][last], result


def _place(bit: int, places: int) -> str:
    if bit == 0:
        return PLACES["host"].words
    return PLACES["device"].words + (f" {bit - 1}" if places > 2 else "")


def _write_counters(file: IO[str], run: Run) -> None:
    time, held = resident_bytes(run)
    head = f',\n{{"name":"resident bytes","ph":"C","pid":{_PID},"ts":%.3f,"args":{{'
    pattern = head + ",".join(f"{json.dumps(place)}:%d" for place in held) + "}}"
    for begin in range(0, len(time), _CHUNK):
        piece = slice(begin, begin + _CHUNK)
        columns = [time[piece].tolist(), *(values[piece].tolist() for values in held.values())]
        file.write("".join([pattern % row for row in zip(*columns, strict=True)]))
