"""Tables as values: columns, rows, and how each reader gets them (text, CSV, HTML).

Text follows `nsys stats`: a leading blank, centred headings, rules, numbers right with thousands
separated, words left. nvprof's numbers (`nvprof_size`, `nvprof_time`) have their own rule.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from kit.report.events import EVENT_COLUMNS, event_columns

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["ADDRESS", "Table", "events_table", "metrics_table", "nvprof_size", "nvprof_time"]

ADDRESS = "address"
"""Format of a column of virtual addresses: upper-case hexadecimal, as nsys prints them."""
_HTML_ROWS = 200
_SIZES = (("B", 1), ("KB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30))
_TIMES = (("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000))


def _fitted(value: float, units: Sequence[tuple[str, int]], width: int) -> str:
    """Print `value` in the unit that keeps it below 1000, with as many decimals as fit (6 at most)."""
    for place, (unit, scale) in enumerate(units):
        number = value / scale
        if place == 0 and value == int(value):
            decimals = 0  # a base unit is never split
        else:
            decimals = max(0, min(6, width - len(unit) - 1 - len(str(int(number)))))
        text = f"{number:.{decimals}f}"
        if float(text) < 1000 or unit == units[-1][0]:
            return text + unit
    return ""


def nvprof_size(nbytes: float, width: int = 8) -> str:
    """Print bytes as nvprof does: powers of 1024, ``170.67KB``, ``0.9961MB``, ``8.000000MB`` in 10 places."""
    return _fitted(nbytes, _SIZES, width)


def nvprof_time(nanoseconds: float, width: int = 8) -> str:
    """Print a time as nvprof does: ``288ns``, ``10.976us``, ``1.067526ms`` in 10 places."""
    return _fitted(nanoseconds, _TIMES, width)


@dataclass(frozen=True)
class Table:
    """A named table.

    Attributes
    ----------
    title : str
        The report's own name.
    columns : tuple of str
        Column headings, units included, exactly as the tool spells them.
    rows : list of tuple
        Plain values; None where the tool prints nothing.
    caption : str
        One sentence of what it shows.
    formats : tuple of str
        A format specification a column (``,.3f``), `ADDRESS`, or ``""``.
    printer : callable, optional
        Makes the text where the tool has a layout of its own.
    nothing : str
        What follows the caption where there are no rows; empty where the caption says it all.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    caption: str = ""
    formats: tuple[str, ...] = ()
    printer: Callable[[Table], str] | None = None
    nothing: str = "Nothing to show: no such records in this run."

    def records(self) -> list[dict[str, Any]]:
        """Return one dictionary a row, by column heading."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def cells(self, rows: Sequence[tuple[Any, ...]] | None = None, grouped: bool = True) -> list[list[str]]:
        """Return rows as words; `grouped` separates thousands."""
        formats = self.formats or ("",) * len(self.columns)
        formats = formats if grouped else tuple(spec.replace(",", "") for spec in formats)
        chosen = self.rows if rows is None else rows
        return [[_cell(value, spec) for value, spec in zip(row, formats, strict=True)] for row in chosen]

    def to_text(self) -> str:
        """Return the table as the tool prints it on a console."""
        if self.printer is not None:
            return self.printer(self)
        cells = self.cells()
        widths = [max(len(head), *(len(row[i]) for row in cells), 1) for i, head in enumerate(self.columns)]
        right = [self._right(i) for i in range(len(self.columns))]
        lines = ["  ".join(f"{head:^{width}}" for head, width in zip(self.columns, widths, strict=True))]
        lines.append("  ".join("-" * width for width in widths))
        for row in cells:
            places = zip(row, widths, right, strict=True)
            lines.append("  ".join(cell.rjust(width) if end else cell.ljust(width) for cell, width, end in places))
        return "".join(f" {line}\n" for line in lines)

    def to_csv(self) -> str:
        """Return the table as CSV: the same headings, plain numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.cells(grouped=False))
        return out.getvalue()

    def _right(self, column: int) -> bool:
        """Tell whether a column holds numbers."""
        values = [row[column] for row in self.rows if row[column] is not None]
        address = bool(self.formats) and self.formats[column] == ADDRESS
        return not address and all(isinstance(value, (int, float)) for value in values)

    def _repr_html_(self) -> str:
        """Return the table for a notebook; long tables show their first rows and say so, empty ones are a sentence."""
        if not self.rows:
            return f"<p><b>{escape(self.title)}</b>: {escape(f'{self.caption} {self.nothing}'.strip())}</p>"
        align = ["right" if self._right(i) else "left" for i in range(len(self.columns))]
        head = "".join(
            f'<th scope="col" style="text-align:{a}">{escape(name)}</th>'
            for name, a in zip(self.columns, align, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(f'<td style="text-align:{a}">{escape(c)}</td>' for c, a in zip(row, align, strict=True))
            + "</tr>"
            for row in self.cells(self.rows[:_HTML_ROWS])
        )
        hidden = len(self.rows) - _HTML_ROWS
        note = f" The first {_HTML_ROWS:,} of {len(self.rows):,} rows." if hidden > 0 else ""
        caption = f"<caption><b>{escape(self.title)}</b>: {escape(self.caption + note)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        return self.to_text()


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return ""
    if spec == ADDRESS:
        return f"0x{value:X}"
    return format(value, spec) if spec and not isinstance(value, str) else str(value)


def metrics_table(run: Run) -> Table:
    """Return the run's metrics, in the order in which the flow gives them."""
    rows: list[tuple[Any, ...]] = [
        (name, value if isinstance(value, int) else round(value, 3)) for name, value in run.metrics.items()
    ]
    return Table("metrics", ("metric", "value"), rows, "What the run counted; names in _us are simulated microseconds.",
                 ("", ","))  # fmt: skip


def events_table(run: Run) -> Table:
    """Return the records of the events CSV as a table."""
    columns = [column.tolist() for column in event_columns(run).values()]
    rows = list(zip(*columns, strict=True))
    caption = "What a profiler would record; addresses count from the first allocation."
    return Table("events", EVENT_COLUMNS, rows, caption, (",.3f", ",.3f", "", "#x", ",", ",", ""))
