"""Tables, figures and exports, in the words of the tools that people already read.

`table` and `table_names` are the way in; everything behind them is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.report.flow_report import TableEntry, report_for, report_of

if TYPE_CHECKING:
    from kit.flows.run import Run
    from kit.report.tables import Table

__all__ = ["COMMON_TABLES", "table", "table_names"]

COMMON_TABLES = {
    "events": TableEntry("the records that a profiler would show", "kit.report.tables:events_table"),
    "metrics": TableEntry("the run's metrics", "kit.report.tables:metrics_table"),
}
"""Tables that every flow has."""


def table_names(flow: str = "cuda_demand_paging") -> dict[str, str]:
    """Return the names of the tables that `table` can make of a flow's runs, each with one line of what it shows."""
    return {name: entry.about for name, entry in _entries(report_for(flow).tables).items()}


def _entries(own: dict[str, TableEntry]) -> dict[str, TableEntry]:
    """Return a flow's tables and the common ones; what was published comes last."""
    published = {name: entry for name, entry in own.items() if name.startswith("measured")}
    return {**{name: entry for name, entry in own.items() if name not in published}, **COMMON_TABLES, **published}


def table(run: Run, name: str) -> Table:
    """Return a table of `run` by its report name, such as ``um_total_sum`` or ``um_sum:rows=20``.

    Raises
    ------
    ParameterError
        No such table, with the closest name; or rows that are not a whole number above 0.
    """
    from kit.errors import ParameterError, did_you_mean

    report, _, option = name.partition(":")
    entries = _entries(report_of(run).tables)
    if report not in entries:
        raise ParameterError("table", name, "one of " + ", ".join(entries), did_you_mean(report, entries))
    if not option:
        return entries[report].make(run)
    key, _, count = option.partition("=")
    if not entries[report].rows or key != "rows" or not count.isdecimal() or int(count) < 1:
        able = " or ".join(f"{each}:rows=N" for each, entry in entries.items() if entry.rows)
        only = "is the only table with an option" if able else "a table's name: none of this flow's has an option"
        raise ParameterError("table", name, f"{able} with N at least 1 {only}" if able else only)
    return entries[report].make(run, rows=int(count))
