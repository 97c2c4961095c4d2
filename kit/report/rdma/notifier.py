"""The sequence numbers by which a fault handler learns that the page table changed under it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, spans_of, window_of
from kit.report.language import BLUE, VERMILION, say_count, style, time_unit

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["notifier_chart"]

_READ, _RUNS, _SET = "mmu_interval_read_begin", "mlx5_ib_invalidate_range", "mmu_notifier_invalidate_range_start"


def notifier_chart(run: Run, stage: str = "") -> Figure:
    """Draw when sequence numbers were read and when invalidations changed them, over time."""
    window = window_of(run, stage)
    table = window.holds(run.trace.spans.array())
    reads, sets, told = (spans_of(run.trace, table, (name,)) for name in (_READ, _RUNS, _SET))
    if not len(reads) and not len(sets):
        return nothing(
            "notifier_chart", "No sequence number was read or changed: nobody faulted, and no page table entry changed."
        )
    asked = spans_of(run.trace, table, ("ib_umem_odp_map_dma_and_lock",))
    retried = max(len(reads) - len(asked), 0)
    from matplotlib.ticker import MaxNLocator

    unit = time_unit(window.end)
    with style():
        drawn = canvas(260)
        axes = drawn.subplots()
        for row in sets:
            axes.axvspan(
                row[0] / unit.size,
                max(row[1], row[0] + window.length / 900) / unit.size,
                color=VERMILION,
                alpha=0.25,
                linewidth=0,
            )
        changed = told[told[:, COLUMN["value"]] > 0]
        axes.step(
            np.append(changed[:, 0], window.end) / unit.size,
            np.append(changed[:, COLUMN["value"]], changed[-1:, COLUMN["value"]] if len(changed) else [np.nan]),
            where="post", color=VERMILION, linewidth=1.4, label="set by an invalidation",
        )  # fmt: skip
        axes.plot(
            reads[:, 0] / unit.size,
            reads[:, COLUMN["value"]],
            "o",
            color=BLUE,
            markersize=5,
            label="read by a fault handler",
        )
        axes.set_xlim(window.start / unit.size, window.end / unit.size)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, np.floor(low)), max(high, low + 2.0))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"simulated time ({unit.word})")
        axes.set_ylabel("sequence number")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0)
        axes.set_title("MMU interval notifier: sequence numbers", pad=24)
        caption = (
            "A handler reads the number, looks at the page table, and reads the number again before it uses what it "
            "saw. Shaded: an invalidation runs. When one changed the number in between, the handler starts over."
        )
        alt = (
            f"{say_count(len(reads), 'reading')} for {say_count(len(asked), 'request')} of pages, so "
            f"{say_count(retried, 'handler had to start over', 'handlers had to start over')}; "
            f"{say_count(len(sets), 'invalidation')} of the driver's ranges."
        )
        return finish(drawn, "notifier_chart", caption, alt)
