"""What the panel shows of a run: the flow's headline figures, and its views as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.report.flow_report import Headline, named, report_for, report_of
from kit.report.views import headlines, headlines_html

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["Headline", "headlines", "headlines_html", "view_html", "view_titles"]


def view_titles(flow: str) -> tuple[str, ...]:
    """Return the titles of a flow's views, in the order of the tabs."""
    return tuple(report_for(flow).views)


def view_html(run: Run, title: str) -> str:
    """Return one view of `run`; each is rendered when it is first looked at."""
    made: str = named(report_of(run).views[title])(run)._repr_html_()
    return made
