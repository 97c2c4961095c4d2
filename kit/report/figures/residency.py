"""Where every page is over time: pages by time, averaged into one image before anything is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, Pages, Window, idle_words, spans_of, window_of
from kit.report.flow_report import report_of
from kit.report.language import PLACES, bytes_unit, say_bytes, say_count, say_time, style, time_unit

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["CHANNELS", "draw_map", "residency_map", "residency_words", "shares"]

CHANNELS = ("nowhere", "host", "device", "both", "flight")
_FLIGHT = CHANNELS.index("flight")
_CHUNK = 1 << 17  # moves handled at a time: bounds the memory of a million-move run to some tens of MB


def residency_map(run: Run, stage: str = "") -> Figure:
    """Draw where every page is over simulated time: addresses down, time to the right.

    Parameters
    ----------
    run : Run
    stage : str
        Show this stage only; the whole run when empty.
    """
    window = window_of(run, stage)
    if not len(run.trace.moves):
        return nothing("residency_map", report_of(run).untouched)
    if words := idle_words(run, stage):
        return nothing("residency_map", words)
    with style():
        drawn = canvas(360)
        axes = drawn.subplots()
        draw_map(axes, run, window)
        unit = time_unit(window.end)
        axes.set_xlabel(f"simulated time ({unit.word})")
        caption = "Where every page is, one row a page. Where a pixel mixes places, so does its colour."
        return finish(drawn, "residency_map", caption, residency_words(run, window))


def shares(run: Run, pages: Pages, window: Window, rows: int, columns: int) -> NDArray[np.float64]:
    """Return the share of each place in each cell of a grid over pages and time.

    A move takes pages out of one place at its start, into flight, and into another at its end. Each
    of these changes is a step in time over a range of rows; steps add up, so all of them go into
    one difference array (with the fraction of the cell that they cut) and two running sums give
    the exact averages, whatever the number or order of the moves.

    Parameters
    ----------
    run : Run
        Its moves are read.
    pages : Pages
        The managed pages, laid one after the other.
    window : Window
        The time to cover; what happened before it counts in its first moment.
    rows, columns : int
        Cells down (pages) and to the right (time).

    Returns
    -------
    ndarray of float64, shape (rows, columns, len(CHANNELS))
        Each cell sums to 1.
    """
    per_column = window.length / columns
    per_row = pages.total / rows
    grid = np.zeros((rows + 2) * (columns + 2) * len(CHANNELS))
    moves = run.trace.moves.array()
    channel = _channels(moves)
    for at in range(0, len(moves), _CHUNK):
        part, (src, dst) = moves[at : at + _CHUNK], channel[:, at : at + _CHUNK]
        top = pages.position(part[:, 2]) / per_row
        bottom = pages.position(part[:, 2] + part[:, 3]) / per_row
        flight = np.full_like(src, _FLIGHT)
        for time, out, into in ((part[:, 0], src, flight), (part[:, 1], flight, dst)):
            for row, sign in ((top, 1.0), (bottom, -1.0)):
                _add(grid, row, np.clip((time - window.start) / per_column, 0, columns), out, into, sign, columns)
    summed = grid.reshape(rows + 2, columns + 2, len(CHANNELS))
    summed = summed.cumsum(axis=0).cumsum(axis=1)[:rows, :columns]
    summed[:, :, 0] += 1.0  # before anything moves, every page is nowhere
    return np.clip(summed, 0.0, 1.0)


def _channels(moves: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the channel of each move's residency masks before and after, shape (2, moves)."""
    masks = moves[:, 4:6].astype(np.int64).T
    several = (masks & (masks - 1)) != 0
    return np.where(masks == 0, 0, np.where(several, 3, np.where(masks == 1, 1, 2)))


def _add(
    grid: NDArray[np.float64], row: NDArray[np.float64], column: NDArray[np.float64],
    out: NDArray[np.int64], into: NDArray[np.int64], sign: float, columns: int,
) -> None:  # fmt: skip
    """Add steps at (`row`, `column`) to the difference array: `out` loses what `into` gains."""
    r0, c0 = row.astype(np.int64), column.astype(np.int64)
    r_part, c_part = row - r0, column - c0
    for dr, r_weight in ((0, 1.0 - r_part), (1, r_part)):
        for dc, c_weight in ((0, 1.0 - c_part), (1, c_part)):
            cell = ((r0 + dr) * (columns + 2) + c0 + dc) * len(CHANNELS)
            weight = sign * r_weight * c_weight
            np.add.at(grid, cell + into, weight)
            np.subtract.at(grid, cell + out, weight)


def draw_map(axes: Any, run: Run, window: Window) -> None:
    """Draw the map into `axes`, whose x axis is simulated time in the fitting unit."""
    pages = Pages.of(run)
    time, size = time_unit(window.end), bytes_unit(pages.total * 4096)
    left, right = window.start / time.size, window.end / time.size
    cells = shares(run, pages, window, rows=min(pages.total, 400), columns=900)
    palette = np.array([_rgb(PLACES[key].colour) for key in CHANNELS])
    depth = pages.total * 4096 / size.size
    axes.imshow(
        cells @ palette, extent=(left, right, depth, 0), aspect="auto", interpolation="nearest", rasterized=True
    )
    edges = pages.block_edges() * 4096 / size.size
    if len(edges) <= 40:
        axes.hlines(edges, left, right, color="white", linewidth=0.8)
    axes.set_ylabel(f"{report_of(run).memory} ({size.word})")
    _name_allocations(axes, pages, size.size, left)
    _name_stages(axes, run, window, time.size)
    _legend(axes, cells)


def _rgb(colour: str) -> tuple[float, float, float]:
    return (int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255)


def _name_allocations(axes: Any, pages: Pages, size: float, left: float) -> None:
    """Write allocation names inside the left edge, where there is room for them."""
    tops = np.concatenate(([0], np.cumsum(pages.counts)))
    if len(pages.names) > 24:
        return
    for name, top, bottom in zip(pages.names, tops[:-1], tops[1:], strict=True):
        if top:
            axes.axhline(top * 4096 / size, color="black", linewidth=1.1)
        if (bottom - top) / pages.total > 0.05:
            axes.annotate(
                name, (left, top * 4096 / size), xytext=(5, -6), textcoords="offset points", va="top",
                fontweight="bold", bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none", "alpha": 0.85},
            )  # fmt: skip


def _name_stages(axes: Any, run: Run, window: Window, unit: float) -> None:
    """Mark each stage's start with a dotted line, and its name above the map where there is room for it."""
    seen = [stage for stage in run.stages if window.start <= stage[1] < window.end]
    starts = [(start - window.start) / window.length for _name, start, _end in seen]
    for (name, start, _end), at, following in zip(seen, starts, [*starts[1:], 1.02], strict=True):
        axes.axvline(start / unit, color="black", linewidth=0.7, linestyle=(0, (1, 2)))
        if following - at > 0.007 * len(name):
            axes.annotate(
                name.replace("_", " "), (at, 1), xycoords="axes fraction", xytext=(2, 3), textcoords="offset points",
                fontsize=9, color="#444444",
            )  # fmt: skip


def _legend(axes: Any, cells: NDArray[np.float64]) -> None:
    from matplotlib.patches import Patch

    shown = [key for i, key in enumerate(CHANNELS) if i in (0, 1, 2, _FLIGHT) or cells[:, :, i].any()]
    handles = [Patch(facecolor=PLACES[key].colour, label=PLACES[key].words) for key in shown]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.045), ncols=len(handles), borderaxespad=0,
                handlelength=1.1, handleheight=1.1, columnspacing=1.4)  # fmt: skip
    axes.set_title("Where every page is", pad=20)


def residency_words(run: Run, window: Window) -> str:
    """Say what the map shows: what appeared and was copied where, in how many copies, when, and where it all ended."""
    pages = Pages.of(run)
    moves = run.trace.moves.array()
    moves = moves[moves[:, 0] <= window.end]
    src, dst = _channels(moves)
    when = (
        f"from {say_time(window.start)} to {say_time(window.end)}" if window.start else f"over {say_time(window.end)}"
    )
    parts = [f"{say_bytes(pages.total * 4096)} of {report_of(run).memory} {when}."]
    for channel in (1, 2):
        chosen = window.holds(moves[(src == 0) & (dst == channel)])
        if len(chosen):
            where = PLACES[CHANNELS[channel]].words
            parts.append(f"{say_bytes(chosen[:, 3].sum() * 4096)} first appear in {where} {_between(chosen)}.")
    table = run.trace.spans.array()
    for each in report_of(run).copies:
        copies = window.holds(spans_of(run.trace, table, (each.step,), each.actor))
        if len(copies):
            size, count = say_bytes(copies[:, COLUMN["bytes"]].sum()), say_count(len(copies), "copy", "copies")
            parts.append(f"{size} move to {each.to} in {count} {_between(copies)}.")
    pages_of = pages.position(moves[:, 2] + moves[:, 3]) - pages.position(moves[:, 2])
    final = np.bincount(dst, pages_of, len(CHANNELS)) - np.bincount(src, pages_of, len(CHANNELS))
    final[0] += pages.total
    ends = [f"{n / pages.total:.0%} {PLACES[key].words}" for key, n in zip(CHANNELS, final, strict=True)]
    ends = [words for words in ends if not words.startswith("0%")]
    return " ".join(parts) + f" At the end: {', '.join(ends)}."


def _between(rows: NDArray[np.float64]) -> str:
    """Say when rows with start and end in their first two columns lie."""
    return f"between {say_time(rows[:, 0].min())} and {say_time(rows[:, 1].max())}"
