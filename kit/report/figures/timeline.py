"""What the host program, the driver and the hardware did when: one lane each, and the overview."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.residency import draw_map, residency_words
from kit.report.figures.window import COLUMN, Window, busy, idle_words, spans_of, window_of, window_of_batch
from kit.report.flow_report import report_of
from kit.report.language import INK, Lane, say_count, say_time, style, time_unit

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["draw_lanes", "lane_rows", "one_batch", "overview", "timeline", "timeline_words"]

_BARS = 1200  # more spans than this in a lane become one strip of shaded cells
_CELLS = 1800
_UNDER = "#e6e6ea"


def timeline(run: Run, stage: str = "") -> Figure:
    """Draw the lanes over simulated time: of one stage, or of the whole run."""
    window = window_of(run, stage)
    if not len(run.trace.spans):
        return nothing("timeline", "Nothing has happened yet: no step of the driver, no activity of the hardware.")
    if words := idle_words(run, stage):
        return nothing("timeline", words)
    with style():
        drawn = canvas(70 + 30 * len(report_of(run).lanes))
        draw_lanes(drawn.subplots(), run, window)
        return finish(drawn, "timeline", "What ran when, one lane an actor.", timeline_words(run, window))


def one_batch(run: Run, batch: int | None = None) -> Figure:
    """Draw the lanes around one fault batch: fetch, service, copies, and the GPU waiting.

    What a batch is in other flows (one migration, one network page fault), their `Closeup` says.

    Parameters
    ----------
    run : Run
    batch : int, optional
        Which one, from 0; the one that took longest when left out.
    """
    found, closeup = window_of_batch(run, batch), report_of(run).closeup
    if found is None:
        return nothing("one_batch", closeup.nothing.format(which="" if batch is None else f" number {batch}"))
    batch, window = found
    with style():
        drawn = canvas(20 + 30 * len(report_of(run).lanes))
        axes = drawn.subplots()
        draw_lanes(axes, run, window)
        axes.set_title(closeup.title.format(number=batch, time=say_time(window.length / 1.16)))
        return finish(drawn, "one_batch", closeup.caption, timeline_words(run, window))


def overview(run: Run, stage: str = "") -> Figure:
    """Draw the residency map above the lanes, both on one time axis: of one stage, or of the whole run."""
    window = window_of(run, stage)
    if not len(run.trace.moves):
        return timeline(run, stage)
    if words := idle_words(run, stage):
        return nothing("overview", words)
    with style():
        drawn = canvas(380 + 30 * len(report_of(run).lanes))
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        draw_map(above, run, window)
        above.tick_params(labelbottom=False)
        draw_lanes(below, run, window)
        caption = (
            "Above: where every page is, one row a page. Below: what ran at the same time. "
            "Where a pixel mixes places, so does its colour."
        )
        return finish(drawn, "overview", caption, f"{residency_words(run, window)} {timeline_words(run, window)}")


def lane_rows(run: Run, table: NDArray[np.float64], lane: Lane) -> NDArray[np.float64]:
    """Return the spans that a lane shows: all of its steps, or the first of them that the trace holds."""
    for actor in lane.others:
        table = table[table[:, COLUMN["actor"]] != run.trace.actors.ids.get(actor, -1)]
    if lane.together:
        return spans_of(run.trace, table, lane.steps, lane.actor)
    found = table[:0]
    for name in lane.steps:
        found = spans_of(run.trace, table, (name,), lane.actor)
        if len(found):
            break
    return found


def draw_lanes(axes: Any, run: Run, window: Window) -> None:
    """Draw every lane into `axes`, whose x axis is simulated time in the fitting unit."""
    unit, lanes = time_unit(window.end), report_of(run).lanes
    table = window.holds(run.trace.spans.array())
    legend: dict[str, str] = {}
    for row, lane in enumerate(lanes):
        rows = lane_rows(run, table, lane)
        marked = _marked(run, rows, lane)
        under = spans_of(run.trace, table, (lane.under,)) if lane.under else rows[:0]
        accent = spans_of(run.trace, table, lane.accent) if lane.accent else rows[:0]
        for bars, colour, words in (
            (under, _UNDER, lane.under_words), (rows[marked], lane.accent_colour, lane.accent_words),
            (rows[~marked], lane.colour, lane.words), (accent, lane.accent_colour, lane.accent_words),
        ):  # fmt: skip
            _bars(axes, bars, row, colour, window, unit.size)
            if len(bars) and words:
                legend[words] = colour
        if lane.steps == ("host_program",):
            _stage_names(axes, run, rows, row, window, unit.size)
    axes.set_yticks(range(len(lanes)), [lane.name for lane in lanes])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(window.start / unit.size, window.end / unit.size)
    axes.set_xlabel(f"simulated time ({unit.word})")
    if legend:
        from matplotlib.patches import Patch

        handles = [Patch(facecolor=colour, label=words) for words, colour in legend.items()]
        axes.figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), handlelength=1.1,
                           handleheight=1.1, columnspacing=1.4)  # fmt: skip


def _marked(run: Run, rows: NDArray[np.float64], lane: Lane) -> NDArray[np.bool_]:
    """Return which of a lane's spans have the cause that takes its accent's colour."""
    cause = run.trace.causes.ids.get(lane.accent_cause, -1) if lane.accent_cause else -1
    return np.asarray(rows[:, COLUMN["cause"]] == cause)


def _bars(axes: Any, rows: NDArray[np.float64], row: int, colour: str, window: Window, unit: float) -> None:
    """Draw spans as bars, or as one shaded strip when they are too many to be told apart."""
    if not len(rows):
        return
    starts, ends = rows[:, COLUMN["start"]], rows[:, COLUMN["end"]]
    if len(rows) > _BARS:
        share = busy(starts - window.start, ends - window.start, window.length, _CELLS)
        rgba = np.zeros((1, _CELLS, 4))
        rgba[0, :, :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        rgba[0, :, 3] = np.where(share > 0, np.maximum(share, 0.25), 0)
        extent = (window.start / unit, window.end / unit, row + 0.38, row - 0.38)
        axes.imshow(rgba, extent=extent, aspect="auto", interpolation="nearest", zorder=2)
        return
    widths = np.maximum(ends - starts, window.length / 900)
    axes.broken_barh(
        list(zip(starts / unit, widths / unit, strict=True)), (row - 0.38, 0.76), facecolor=colour, edgecolor="white",
        linewidth=0.35 if len(rows) < 300 else 0, zorder=2,
    )  # fmt: skip


def _stage_names(axes: Any, run: Run, rows: NDArray[np.float64], row: int, window: Window, unit: float) -> None:
    """Write each stage's name into its bar, where the bar is wide enough to hold it."""
    for line in rows[:200]:
        name = run.trace.causes.words[int(line[COLUMN["cause"]])].replace("_", " ")
        start, stop = max(line[COLUMN["start"]], window.start), min(line[COLUMN["end"]], window.end)
        if (stop - start) / window.length > 0.009 * len(name):
            axes.text((start + stop) / 2 / unit, row, name, ha="center", va="center", fontsize=9, color=INK, zorder=3)


def timeline_words(run: Run, window: Window) -> str:
    """Say what each lane shows: how many spans, and for how long any of them ran."""
    table = window.holds(run.trace.spans.array())
    parts = []
    for lane in report_of(run).lanes:
        shown = [(lane_rows(run, table, lane), lane.words or lane.name)]
        if lane.under_words:
            shown.append((spans_of(run.trace, table, (lane.under,)), lane.under_words))
        for rows, words in shown:
            if len(rows):
                covered = busy(rows[:, 0] - window.start, rows[:, 1] - window.start, window.length, 1)[0]
                parts.append(f"{words} {say_count(len(rows), 'span')} ({say_time(float(covered) * window.length)})")
    return "Lanes: " + ("; ".join(parts) if parts else "nothing ran") + "."
