"""What each flow brings to the reports: its lanes, tables, events, headline figures and views.

The pictures and exports are the same code for every flow; what differs is listed here as data. A flow's
`registry.Entry` names a module with a `FlowReport` called ``REPORT``. Functions are named as
``"module:function"`` and imported on first use, so that a list of tables costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kit.report.language import Lane

if TYPE_CHECKING:
    from kit.flows.run import Run
    from kit.report.tables import Table

__all__ = ["Activity", "Closeup", "Copies", "FlowReport", "Headline", "TableEntry", "named", "report_for", "report_of"]


def named(reference: str) -> Any:
    """Return what ``"module:name"`` names."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class TableEntry:
    """A table of a flow: one line of what it shows, and ``"module:function"`` that makes it of a run.

    `rows` says that the function has a keyword ``rows``, given as ``name:rows=N``.
    """

    about: str
    maker: str
    rows: bool = False

    def make(self, run: Run, **options: int) -> Table:
        """Return the table of `run`."""
        made: Table = named(self.maker)(run, **options)
        return made


@dataclass(frozen=True)
class Copies:
    """Copies in one direction: which spans they are, and how pictures call them.

    Attributes
    ----------
    step, actor : str
        Of the spans; their ``bytes`` are the size.
    words : str
        The direction, as in ``host to device``.
    place : str
        Key of the place that they go to, whose colour they have.
    to : str
        That place in a sentence: ``the GPU``.
    """

    step: str
    actor: str
    words: str
    place: str
    to: str


@dataclass(frozen=True)
class Activity:
    """Something that hardware does beside the driver: a bar of the cost breakdown."""

    name: str
    steps: tuple[str, ...]
    actor: str
    colour: str


@dataclass(frozen=True)
class Closeup:
    """What `figures.one_batch` shows up close: spans of a step, one at a time.

    Attributes
    ----------
    step : str
        Its spans.
    title : str
        With ``{number}`` and ``{time}``.
    caption : str
        Under the picture.
    nothing : str
        What a run without any says, with ``{which}`` for the one asked for.
    """

    step: str
    title: str
    caption: str
    nothing: str


@dataclass(frozen=True)
class Headline:
    """One headline figure: its number, how it reads, what it counts; `good` marks a verdict."""

    value: float
    text: str
    label: str
    good: bool | None = None


@dataclass(frozen=True)
class FlowReport:
    """What a flow brings.

    Attributes
    ----------
    lanes : tuple of Lane
        Rows of the timeline, from the top.
    actors : tuple of str
        Their order in exports; others follow by name.
    tables : dict of str to TableEntry
        By name, beside those that every flow has (`kit.report.COMMON_TABLES`).
    shown : tuple of str
        Tables that the controls show, in order.
    events : str
        ``"module:function"`` that returns the columns of the profiler's records.
    headlines : str
        The same for the headline figures of the controls, without the two verdicts that every run has.
    views : dict of str to str
        Tabs of the controls: title, and ``"module:function"`` from a run to something with ``_repr_html_``.
    copies : tuple of Copies
        Directions.
    hardware : tuple of str
        Spans that are no steps of a driver.
    event_prefix : str
        What the names of tool events begin with, and nothing else; empty where there are none.
    activities : tuple of Activity
        What the hardware does, for the cost breakdown.
    cost_groups : tuple of (str, str)
        Kind of work, and the pattern of the step names that belong to it; the first that matches counts.
    closeup : Closeup
        What is worth seeing up close.
    program_groups : tuple of str
        Kinds of work in `cost_groups` that are the programs' own, not the driver's.
    idle : dict of str to str
        By stage, what a picture of it says in words when the stage took no time.
    memory : str
        What the pages are called: ``managed memory``.
    untouched : str
        What a run without any moved page says in place of the residency map.
    exports : tuple of str
        Options of ``kit run`` that write files which only this flow can fill.
    """

    lanes: tuple[Lane, ...]
    actors: tuple[str, ...]
    tables: dict[str, TableEntry]
    shown: tuple[str, ...]
    events: str
    headlines: str
    views: dict[str, str]
    copies: tuple[Copies, ...]
    hardware: tuple[str, ...]
    closeup: Closeup
    event_prefix: str = ""
    activities: tuple[Activity, ...] = ()
    cost_groups: tuple[tuple[str, str], ...] = ()
    memory: str = "memory"
    untouched: str = "No page has moved yet: memory that nothing touched is nowhere."
    exports: tuple[str, ...] = ()
    program_groups: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)

    def is_step(self, name: str) -> bool:
        """Tell whether spans of this name are steps of a driver: neither hardware activity nor a tool's event."""
        event = bool(self.event_prefix) and name.startswith(self.event_prefix)
        return not event and name not in self.hardware

    def lane_of(self, actor: str) -> int:
        """Return the place of an actor, from 0 at the top; unknown actors share the last place."""
        return self.actors.index(actor) if actor in self.actors else len(self.actors)

    @cached_property
    def event_columns(self) -> Callable[[Run], dict[str, Any]]:
        """The function that returns the columns of the profiler's records."""
        found: Callable[[Run], dict[str, Any]] = named(self.events)
        return found


def report_for(flow: str) -> FlowReport:
    """Return what a flow brings, by the flow's name."""
    from kit.flows import registry

    found: FlowReport = import_module(registry.entry(flow).report).REPORT
    return found


def report_of(run: Run) -> FlowReport:
    """Return what the flow of `run` brings."""
    return report_for(run.flow)
