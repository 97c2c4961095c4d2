"""One measured figure, its limit, and how they are printed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

from kit.report.tables import Table

__all__ = ["Figure", "best", "report", "timed"]

COLUMNS = ("figure", "measured", "limit", "unit", "ratio", "verdict", "the limit, and what was measured beside it")


@dataclass(frozen=True)
class Figure:
    """One row of the report.

    Attributes
    ----------
    name : str
        What was measured.
    value, limit : float
        The figure, and where it has to be.
    unit : str
        Of both.
    at_least : bool
        The limit is a lower bound; otherwise an upper one.
    beside : str
        Where the limit comes from, and the figure of the same run that helps to judge it.
    """

    name: str
    value: float
    limit: float
    unit: str
    at_least: bool
    beside: str

    @property
    def ratio(self) -> float:
        """How far inside the limit: 1 is just met, below 1 is missed."""
        return self.value / self.limit if self.at_least else self.limit / self.value

    def row(self) -> tuple[str, float, str, str, float, str, str]:
        """Return the cells of the report."""
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.ratio >= 1 else "MISSED"
        return (self.name, self.value, f"{sign} {self.limit:,.4g}", self.unit, self.ratio, verdict, self.beside)


def best(times: int, measure: Callable[[], float]) -> float:
    """Return the smallest of several measurements: what disturbs a measurement only makes it longer."""
    return min(measure() for _ in range(times))


def timed(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds that `work` takes; what earlier work left is cleared away before."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(figures: list[Figure]) -> str:
    """Return the report as text."""
    rows = [figure.row() for figure in figures]
    return Table("benchmarks", COLUMNS, rows, formats=("", ",.4g", "", "", ".2f", "", "")).to_text()
