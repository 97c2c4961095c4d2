"""What the panel shows of a run: headline figures with their change, and the pictures and tables as HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from kit.report import figures, table
from kit.report.figures.window import COLUMN, spans_of
from kit.report.language import GREEN, GRID, INK, MUTED, VERMILION, say_bytes, say_count, say_time

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["VIEWS", "Headline", "headlines", "headlines_html"]

_TABLES = ("nvprof", "um_total_sum", "um_sum", "um_cpu_page_faults_sum")


@dataclass(frozen=True)
class Headline:
    """One headline figure: its number, how it reads, what it counts; `good` marks a verdict."""

    value: float
    text: str
    label: str
    good: bool | None = None


def headlines(run: Run) -> list[Headline]:
    """Return a run's headline figures, counted in its trace."""
    rows = run.trace.spans.array()

    def count(step: str) -> int:
        return len(spans_of(run.trace, rows, (step,)))

    def size(actor: str) -> float:
        return float(np.sum(spans_of(run.trace, rows, ("UvmEventTypeMigration",), actor)[:, COLUMN["bytes"]]))

    time = run.metrics["simulated_us"]
    found = [Headline(time, say_time(time), f"simulated · {say_time(run.wall_s * 1e6)} to compute")]
    for step, label in (("UvmEventTypeGpuFault", "GPU fault groups"), ("UvmEventTypeCpuFault", "CPU faults")):
        found.append(Headline(count(step), f"{count(step):,}", label))
    for actor, label in (("copy HtoD", "host to device"), ("copy DtoH", "device to host")):
        found.append(Headline(size(actor), say_bytes(size(actor)), label))
    evicted = count("evict_root_chunk")
    found.append(Headline(evicted, f"{evicted:,}", "chunks evicted"))
    conformance, integrity = run.conformance, run.integrity
    reached, bad = len(conformance.steps_reached), len(conformance.violations)
    label = f"documented steps, {say_count(bad, 'violation')}"
    found.append(Headline(reached, f"{reached} of {conformance.steps_documented}", label, good=not bad))
    label = f"of {integrity.pages_checked:,} pages checked"
    return [*found, Headline(integrity.lost, f"{integrity.lost:,} lost", label, good=not integrity.lost)]


def headlines_html(run: Run, previous: Run | None = None) -> str:
    """Return the headline figures as a row of cells, each with its difference to `previous`."""
    before = headlines(previous) if previous else [None] * 99
    cells = []
    for new, old in zip(headlines(run), before, strict=False):
        colour = INK if new.good is None else GREEN if new.good else VERMILION
        moved = VERMILION if old and new.value != old.value else MUTED
        change = f'<div style="color:{moved};font-style:italic">{_change(new, old)}</div>' if old else ""
        cells.append(
            f'<div style="padding:6px 4px 6px 10px;border-right:1px solid {GRID};font-size:11px;min-width:0;'
            f'line-height:1.35;color:{MUTED}">'
            f'<b style="font-size:17px;white-space:nowrap;color:{colour}">{new.text}</b>'
            f"<div>{escape(new.label)}</div>{change}</div>"
        )
    grid = "display:grid;grid-template-columns:repeat(8,minmax(0,1fr))"
    return f'<div style="{grid};border:1px solid {GRID};background:white">{"".join(cells)}</div>'


def _change(new: Headline, old: Headline) -> str:
    """Say by how much a figure has changed, in its own unit."""
    gap = new.value - old.value
    unit = new.text.rsplit(" ", 1)[-1]
    if unit in ("s", "ms", "µs"):
        words = say_time(abs(gap))
    else:
        words = say_bytes(abs(gap)) if unit in ("B", "KiB", "MiB", "GiB") else f"{abs(gap):,.0f}"
    return f"{'-' if gap < 0 else '+'}{words}" if gap else "no change"


def _tables(run: Run) -> str:
    """Return the profiler tables: nvprof's as its own text, those of nsys as tables."""
    parts = []
    for name in _TABLES:
        made = table(run, name)
        if made.printer is not None:
            parts.append(f'<pre style="font-size:12px;line-height:1.35">{escape(made.to_text())}</pre>')
        else:
            parts.append(made._repr_html_())
    return f'<div class="jp-RenderedHTMLCommon" style="overflow:auto">{"".join(parts)}</div>'


VIEWS: dict[str, Callable[[Run], str]] = {
    "Steps": lambda run: figures.documented_steps(run)._repr_html_(),
    "Tables": _tables,
    "Copy sizes": lambda run: figures.copy_sizes(run)._repr_html_(),
    "Costs": lambda run: figures.cost_breakdown(run)._repr_html_(),
}
"""Title to view, in the order of the tabs; each is rendered when it is first looked at."""
