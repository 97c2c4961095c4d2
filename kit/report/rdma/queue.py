"""How full the page-fault event queue was, and how many workers were busy with what it held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, spans_of, window_of
from kit.report.language import ORANGE, SKY, say_count, say_time, style, time_unit

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["levels", "queue_depth"]


def queue_depth(run: Run, stage: str = "") -> Figure:
    """Draw the entries that wait in the page-fault event queue, and the handlers that run, over time."""
    window = window_of(run, stage)
    table = window.holds(run.trace.spans.array())
    events = spans_of(run.trace, table, ("eqe",))
    if not len(events):
        return nothing("queue_depth", "The adapter has reported no page fault, so its event queue stayed empty.")
    taken = spans_of(run.trace, table, ("mlx5_eq_get_eqe", "queue_work"))
    waiting = spans_of(run.trace, table, ("qp_stalled",))
    handled = spans_of(run.trace, table, ("mlx5_ib_eqe_pf_action",))
    from matplotlib.ticker import MaxNLocator

    unit = time_unit(window.end)
    curves = []
    if len(waiting):
        curves.append(("faults that the adapter waits for", *levels(waiting[:, 0], waiting[:, 1]), ORANGE))
    if len(handled):
        curves.append(("handlers at work", *levels(handled[:, 0], handled[:, 1]), SKY))
    most = int(events[:, COLUMN["value"]].max())
    with style():
        drawn = canvas(240)
        axes = drawn.subplots()
        for name, times, level, colour in curves:
            axes.step(times / unit.size, level, where="post", color=colour, linewidth=1.6, label=name)
        axes.plot(
            events[:, 0] / unit.size, events[:, COLUMN["value"]], "k.", markersize=4,
            label="entries in the queue, as one is added"
        )  # fmt: skip
        axes.set_xlim(window.start / unit.size, window.end / unit.size)
        axes.set_ylim(0, None)
        axes.margins(y=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"simulated time ({unit.word})")
        axes.set_ylabel("number")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0)
        axes.set_title("The page-fault event queue and its workers", pad=24)
        peak = max((int(level.max()) for _name, _times, level, _colour in curves), default=0)
        alt = (
            f"{say_count(len(events), 'page-fault event')} between {say_time(events[:, 0].min())} and "
            f"{say_time(events[:, 0].max())}; at most {say_count(most, 'entry', 'entries')} in the queue, "
            f"at most {peak} "
            f"faults or handlers at a time; the driver looked {say_count(len(taken), 'time')} at the queue."
        )
        caption = "A fault waits from the moment the adapter meets the missing page until the driver resumes it."
        return finish(drawn, "queue_depth", caption, alt)


def levels(starts: NDArray[np.float64], ends: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the times at which a number of open intervals changes, and the number from there on."""
    times = np.concatenate((starts, ends))
    change = np.concatenate((np.ones(len(starts), dtype=np.int64), -np.ones(len(ends), dtype=np.int64)))
    order = np.lexsort((change, times))
    return times[order], np.cumsum(change[order])
