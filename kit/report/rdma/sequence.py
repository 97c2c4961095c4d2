"""A sequence chart: who told whom what, from a missing page to the message that went on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, Window, spans_of
from kit.report.language import (
    BLUE,
    DARK,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    say_bytes,
    say_time,
    style,
)

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["ARROWS", "COLUMNS", "Arrow", "arrows_of", "sequence_chart"]

COLUMNS = ("requester", "adapter", "driver", "mm")


@dataclass(frozen=True)
class Arrow:
    """One kind of message: from whom, to whom, in which words (a format of the span's facts) and colour."""

    source: str
    target: str
    words: str
    colour: str = INK


ARROWS = {
    "message": Arrow("requester", "adapter", "{cause}, {bytes}", BLUE),
    "rnr_wait": Arrow("adapter", "requester", "RNR NAK: wait {duration}", VERMILION),
    "retransmit": Arrow("requester", "adapter", "sends again", BLUE),
    "eqe": Arrow("adapter", "driver", "page-fault event", ORANGE),
    "mlx5_ib_eq_pf_int": Arrow("driver", "driver", "interrupt: decode, queue work", PURPLE),
    "mmu_interval_read_begin": Arrow("driver", "mm", "sequence number?", MUTED),
    "hmm_range_fault": Arrow("driver", "mm", "hmm_range_fault, {pages} pages", DARK),
    "handle_mm_fault": Arrow("mm", "mm", "page fault: get a page", GREEN),
    "ib_umem_odp_map_dma_single_page": Arrow("driver", "driver", "map {pages} pages for DMA", PURPLE),
    "umr": Arrow("driver", "adapter", "UMR: {bytes} of translations", ORANGE),
    "implicit_get_child_mr": Arrow("driver", "driver", "make a 1 GiB child", PURPLE),
    "qp_resumed": Arrow("driver", "adapter", "resume", GREEN),
    "mmu_notifier_invalidate_range_start": Arrow("mm", "mm", "is about to change pages: {cause}", VERMILION),
    "mlx5_ib_invalidate_range": Arrow("mm", "driver", "invalidate {pages} pages, {bytes}", VERMILION),
    "ib_umem_odp_unmap_dma_pages": Arrow("driver", "driver", "unmap {pages} pages", PURPLE),
    "completion": Arrow("adapter", "requester", "completion: {cause}{status}", GREEN),
}
_MOST = 28


def sequence_chart(run: Run, fault: int | None = None) -> Figure:
    """Draw what was said around one page fault of the adapter.

    Parameters
    ----------
    run : Run
    fault : int, optional
        Which one, from 0 in order of time; the one that took longest when left out.
    """
    found = arrows_of(run, fault)
    if found is None:
        which = "" if fault is None else f" number {fault}"
        return nothing(
            "sequence_chart", f"The adapter has met no missing page{which}, so there is no conversation to show."
        )
    number, window, rows = found
    place = {name: at for at, name in enumerate(COLUMNS)}
    with style():
        drawn = canvas(90 + 27 * len(rows))
        axes = drawn.subplots()
        for at, name in enumerate(COLUMNS):
            axes.axvline(at, color=GRID, linewidth=6, zorder=0)
            axes.text(at, -1.1, name, ha="center", va="center", fontweight="bold")
        for row, (time, arrow, words) in enumerate(rows):
            left, right = place[arrow.source], place[arrow.target]
            axes.text(-0.42, row, _since(time - window.start), ha="right", va="center", fontsize=8.5, color=MUTED)
            if left == right:
                axes.plot([left], [row], marker="s", color=arrow.colour, markersize=6)
                axes.text(left + 0.06, row, words, va="center", fontsize=9)
                continue
            axes.annotate(
                "", (right, row), (left, row), arrowprops={"arrowstyle": "-|>", "color": arrow.colour, "linewidth": 1.6}
            )
            axes.text((left + right) / 2, row - 0.16, words, ha="center", va="bottom", fontsize=9)
        axes.set_xlim(-1.0, len(COLUMNS) - 0.1)
        axes.set_ylim(len(rows) - 0.3, -1.7)
        axes.axis("off")
        axes.set_title(f"Page fault {number}: {say_time(window.length)} from the missing page to the resumption")
        caption = "Time runs down and is not to scale; the numbers say how long after the start each line happened."
        alt = f"Page fault {number}: " + "; ".join(
            f"after {say_time(time - window.start)} {arrow.source} to {arrow.target}: {words}"
            if arrow.source != arrow.target
            else f"after {say_time(time - window.start)} {arrow.source}: {words}"
            for time, arrow, words in rows
        ) + "."  # fmt: skip
        return finish(drawn, "sequence_chart", caption, alt)


def arrows_of(run: Run, fault: int | None = None) -> tuple[int, Window, list[tuple[float, Arrow, str]]] | None:
    """Return a fault's number, its window, and the arrows (time, arrow, words) in it; None when there is no fault."""
    table = run.trace.spans.array()
    stalled = spans_of(run.trace, table, ("qp_stalled",))
    stalled = stalled[np.argsort(stalled[:, 0], kind="stable")]
    if fault is None and len(stalled):
        fault = int(np.argmax(stalled[:, 1] - stalled[:, 0]))
    if fault is None or not 0 <= fault < len(stalled):
        return None
    window = Window(float(stalled[fault, 0]), float(stalled[fault, 1]))
    around = Window(window.start - 5.0, window.end + 5.0)
    rows = spans_of(run.trace, table, tuple(ARROWS))
    rows = rows[(rows[:, 0] >= around.start) & (rows[:, 0] <= around.end)]
    said = [(float(r[0]), ARROWS[run.trace.steps.words[int(r[COLUMN["step"]])]], r) for r in rows]
    resumed = stalled[(stalled[:, 1] >= around.start) & (stalled[:, 1] <= around.end)]
    said += [(float(r[1]), ARROWS["qp_resumed"], r) for r in resumed]
    said.sort(key=lambda each: each[0])
    lines = [(time, arrow, _say(run, arrow, row)) for time, arrow, row in said]
    return fault, window, _shortened(lines)


def _since(us: float) -> str:
    """Return a time after the start of the fault, or just before it."""
    return f"{'+' if us >= 0 else '-'}{say_time(abs(us))}"


def _say(run: Run, arrow: Arrow, row: NDArray[np.float64]) -> str:
    status = run.trace.statuses.words[int(row[COLUMN["status"]])]
    return arrow.words.format(
        bytes=say_bytes(row[COLUMN["bytes"]]), pages=f"{int(row[COLUMN['pages']]):,}", value=int(row[COLUMN["value"]]),
        cause=run.trace.causes.words[int(row[COLUMN["cause"]])].replace("MMU_NOTIFY_", ""),
        duration=say_time(row[1] - row[0]), status="" if status == "ok" else f" {status}",
    ).replace("invalidate 0 pages, ", "invalidate ").replace(": ,", ":").strip(" ,:")  # fmt: skip


def _shortened(lines: list[tuple[float, Arrow, str]]) -> list[tuple[float, Arrow, str]]:
    """Join repeats of the same line, and leave out the middle of a very long conversation."""
    joined: list[tuple[float, Arrow, str]] = []
    repeats: list[int] = []
    for line in lines:
        if joined and joined[-1][1:] == line[1:]:
            repeats[-1] += 1
        else:
            joined.append(line)
            repeats.append(1)
    joined = [
        (time, arrow, f"{words} (x {count})" if count > 1 else words)
        for (time, arrow, words), count in zip(joined, repeats, strict=True)
    ]
    if len(joined) <= _MOST:
        return joined
    left = len(joined) - _MOST + 1
    middle = (joined[_MOST // 2][0], Arrow("driver", "driver", ""), f"... {left} more lines ...")
    return [*joined[: _MOST // 2], middle, *joined[_MOST // 2 + left :]]
