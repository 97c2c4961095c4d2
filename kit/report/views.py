"""What the controls show of a run beside its pictures: headline figures with their change, and tables."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from kit.report import table
from kit.report.flow_report import Headline, named, report_of
from kit.report.language import GREEN, GRID, INK, MUTED, VERMILION, say_bytes, say_count, say_time

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["Html", "headlines", "headlines_html", "tables_view"]


@dataclass(frozen=True)
class Html:
    """A view that is neither a figure nor a table: its markup."""

    markup: str

    def _repr_html_(self) -> str:
        return self.markup


def headlines(run: Run) -> list[Headline]:
    """Return a run's headline figures: simulated time, what its flow counts, and the two verdicts."""
    time = run.metrics["simulated_us"]
    found = [Headline(time, say_time(time), f"simulated · {say_time(run.wall_s * 1e6)} to compute")]
    found += named(report_of(run).headlines)(run)
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
    grid = f"display:grid;grid-template-columns:repeat({len(cells)},minmax(0,1fr))"
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


def tables_view(run: Run) -> Html:
    """Return the flow's tables: those with a layout of their own as text, the others as tables."""
    parts = []
    for name in report_of(run).shown:
        made = table(run, name)
        if made.printer is not None:
            parts.append(f'<pre style="font-size:12px;line-height:1.35">{escape(made.to_text())}</pre>')
        else:
            parts.append(made._repr_html_())
    return Html(f'<div class="jp-RenderedHTMLCommon" style="overflow:auto">{"".join(parts)}</div>')
