"""Where simulated time went: the driver's own time by kind of work, the hardware's by activity."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, busy, end_of, self_time, spans_of
from kit.report.flow_report import report_of
from kit.report.language import BLUE, MUTED, SKY, say_time, style, time_unit

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["cost_breakdown", "driver_costs", "hardware_costs"]


def driver_costs(run: Run) -> dict[str, float]:
    """Return microseconds of the driver steps' own time by kind of work, largest first."""
    table = run.trace.spans.array()
    by_step = np.bincount(table[:, COLUMN["step"]].astype(np.int64), self_time(run, table), len(run.trace.steps.words))
    patterns = report_of(run).cost_groups
    groups: dict[str, float] = {}
    for name, spent in zip(run.trace.steps.words, by_step, strict=True):
        if spent > 0:
            group = next((words for words, pattern in patterns if re.search(pattern, name)), "other steps")
            groups[group] = groups.get(group, 0.0) + float(spent)
    return dict(sorted(groups.items(), key=lambda item: -item[1]))


def hardware_costs(run: Run) -> dict[str, float]:
    """Return for how many microseconds each activity of the hardware went on."""
    table, end = run.trace.spans.array(), end_of(run)
    found = {}
    for each in report_of(run).activities:
        rows = spans_of(run.trace, table, each.steps, each.actor)
        if len(rows):
            found[each.name] = float(busy(rows[:, 0], rows[:, 1], end, 1)[0] * end)
    return found


def cost_breakdown(run: Run) -> Figure:
    """Draw where simulated time went, as horizontal bars: the driver above, the hardware below."""
    driver, hardware = driver_costs(run), hardware_costs(run)
    if not driver and not hardware:
        return nothing("cost_breakdown", "No simulated time has been spent yet, so there is nothing to break down.")
    values = [*driver.values(), *hardware.values()]
    unit, whole = time_unit(max(values)), sum(driver.values())
    colours = [BLUE if name == "CPU faults" else SKY for name in driver]
    colours += [each.colour for each in report_of(run).activities if each.name in hardware]
    # Each kind of bar has a heading in a row of its own.
    at = [*range(1, len(driver) + 1), *range(len(driver) + 2, len(values) + 2)]
    labels = [f"{say_time(v)}  ({v / whole:.0%})" for v in driver.values()] + [say_time(v) for v in hardware.values()]
    with style():
        drawn = canvas(90 + 23 * (len(values) + 2), 860)
        axes = drawn.subplots()
        bars = axes.barh(at, [v / unit.size for v in values], color=colours, height=0.72)
        axes.bar_label(bars, labels, fontsize=9, padding=4)
        axes.set_yticks(at, [*driver, *hardware])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(values) + 1.6, -0.6)
        axes.margins(x=0.16)
        axes.set_xlabel(f"simulated time ({unit.word})")
        headings = [(f"the driver's own time: {say_time(whole)}", 0), ("the hardware, meanwhile", len(driver) + 1)]
        for words, row in headings:
            axes.annotate(
                words, (0, row), xytext=(4, 0), textcoords="offset points", va="center", color=MUTED, fontweight="bold"
            )
        axes.set_title("Where the time went")
        caption = f"Each step's own time, without the steps it calls, by kind of work.{_kernels(run)}"
        parts = "; ".join(f"{name} {say_time(value)}" for name, value in (driver | hardware).items())
        return finish(drawn, "cost_breakdown", caption, f"Of {say_time(end_of(run))} in all: {parts}.{_kernels(run)}")


def _kernels(run: Run) -> str:
    """Say for how long kernels ran: too long beside the rest to be a bar of the same picture."""
    rows = spans_of(run.trace, run.trace.spans.array(), ("kernel",))
    spent = say_time(float((rows[:, COLUMN["end"]] - rows[:, COLUMN["start"]]).sum()))
    return f" Kernels ran for {spent} of the run's {say_time(end_of(run))}, stalls included." if len(rows) else ""
