"""How big the copies were: a histogram by direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, spans_of
from kit.report.flow_report import report_of
from kit.report.language import PLACES, say_bytes, say_count, style

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["copy_sizes"]

_SMALLEST, _LARGEST = 12, 21  # powers of two: a page to a block


def copy_sizes(run: Run) -> Figure:
    """Draw how many copies had which size, in bins that double, one colour a direction."""
    table, directions = run.trace.spans.array(), report_of(run).copies
    found = {
        each.words: spans_of(run.trace, table, (each.step,), each.actor)[:, COLUMN["bytes"]] for each in directions
    }
    if not any(len(sizes) for sizes in found.values()):
        return nothing("copy_sizes", "No copy between host and device so far, so there are no copy sizes to show.")
    bins = np.arange(_SMALLEST, _LARGEST + 2)
    counts = {
        words: np.bincount(
            np.clip(np.log2(np.maximum(sizes, 1)), _SMALLEST, _LARGEST).astype(int) - _SMALLEST, minlength=len(bins) - 1
        )
        for words, sizes in found.items()
    }
    from matplotlib.ticker import MaxNLocator

    with style():
        drawn = canvas(270, 720)
        axes = drawn.subplots()
        for side, each in zip((-0.21, 0.21), directions, strict=True):
            bars = axes.bar(
                bins[:-1] + side, counts[each.words], 0.4, color=PLACES[each.place].colour,
                label=f"{each.words}: {say_count(len(found[each.words]), 'copy', 'copies')}, "
                f"{say_bytes(found[each.words].sum())}",
            )  # fmt: skip
            axes.bar_label(bars, [f"{n:,}" if n else "" for n in counts[each.words]], fontsize=8.5, padding=1)
        axes.set_xticks(bins[:-1], [f"{1 << (b - 10):,}" for b in bins[:-1]])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("copy size (KiB; each bin reaches up to the next)")
        axes.set_ylabel("copies")
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2, borderaxespad=0, handlelength=1.1)
        axes.set_title("How big the copies are", pad=34)
        return finish(drawn, "copy_sizes", "Copies by size and direction; coloured by where they go.", _words(found))


def _words(found: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]) -> str:
    parts = []
    for words, sizes in found.items():
        if len(sizes):
            least, middle, most = (say_bytes(float(f(sizes))) for f in (np.min, np.median, np.max))
            parts.append(
                f"{say_count(len(sizes), 'copy', 'copies')} {words}, {say_bytes(sizes.sum())} in all, "
                f"{least} to {most}, {middle} in the middle"
            )
        else:
            parts.append(f"no copy {words}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."
