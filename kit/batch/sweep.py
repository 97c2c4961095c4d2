"""Every combination of some values, each run once, in one table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kit.batch.summary import amount
from kit.errors import KitError
from kit.flows import registry
from kit.outputs import publish, staged

__all__ = ["TABLE", "Point", "plan", "run_sweep"]

TABLE = "sweep.csv"
Point = dict[str, Any]
_OUTCOME = ("steps_reached", "violations", "pages_checked", "lost", "error")


def plan(flow: str, given: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return every combination's parameters, the last axis running fastest, all validated.

    Raises
    ------
    ParameterError
        One of the combinations is not allowed; nothing has run then.
    """
    found = registry.entry(flow).load()
    points = [{**given, **dict(zip(axes, values, strict=True))} for values in product(*axes.values())]
    for point in points:
        registry.check(found, point)
    return points


def run_point(flow: str, point: Point) -> dict[str, Any]:
    """Run one combination and return its metrics and outcome; a failed one says why in ``error``."""
    try:
        run = registry.run(flow, given=point)
    except KitError as wrong:
        return {"error": " ".join(str(wrong).split())}
    return {
        **run.metrics,
        "steps_reached": amount(run.conformance.steps_reached),
        "violations": amount(run.conformance.violations),
        "pages_checked": run.integrity.pages_checked,
        "lost": run.integrity.lost,
        "error": "",
    }


def _results(flow: str, points: Sequence[Point], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each point's number and outcome as they come."""
    if jobs == 1 or len(points) == 1:
        for number, point in enumerate(points):
            yield number, run_point(flow, point)
        return
    # Fresh interpreters: a fork would copy whatever threads the caller has half-way through something.
    with ProcessPoolExecutor(min(jobs, len(points)), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_point, flow, point): number for number, point in enumerate(points)}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def run_sweep(
    flow: str,
    points: Sequence[Point],
    axes: Sequence[str],
    folder: Path,
    *,
    jobs: int = 1,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Path, int]:
    """Run all points and write ``sweep.csv``: a row a point, in the plan's order.

    Parameters
    ----------
    flow : str
        Name of the flow.
    points : sequence of dict
        What `plan` returned.
    axes : sequence of str
        Parameters that vary: the table's first columns.
    folder : Path
        Where the table goes; made when missing.
    jobs : int
        Runs at a time, each in a process of its own when above 1.
    progress : callable, optional
        Called with the share done and a text.

    Returns
    -------
    tuple of Path and int
        The table, and how many points failed, lost pages or departed from the documented steps.
    """
    outcomes: dict[int, dict[str, Any]] = {}
    for number, outcome in _results(flow, points, jobs):
        outcomes[number] = outcome
        if progress is not None:
            progress(len(outcomes) / len(points), f"{len(outcomes)} of {len(points)} runs")
    ordered = [outcomes[number] for number in range(len(points))]
    metrics = list(dict.fromkeys(name for outcome in ordered for name in outcome if name not in _OUTCOME))
    rows = [{**outcome, **{axis: point[axis] for axis in axes}} for point, outcome in zip(points, ordered, strict=True)]

    def write(file: Path) -> None:
        # Where a metric is called as a parameter is, the column is the parameter's.
        columns = list(dict.fromkeys([*axes, *metrics, *_OUTCOME]))
        with file.open("w", encoding="utf-8", newline="") as sink:
            table = csv.DictWriter(sink, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    with staged(folder):
        publish({str(folder / TABLE): write})
    return folder / TABLE, sum(bool(row["error"] or row["lost"] or row["violations"]) for row in rows)
