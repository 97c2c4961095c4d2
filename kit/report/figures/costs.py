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
    """Return microseconds of the steps' own time by kind of work, largest first; what programs do comes last."""
    table = run.trace.spans.array()
    by_step = np.bincount(table[:, COLUMN["step"]].astype(np.int64), self_time(run, table), len(run.trace.steps.words))
    patterns = report_of(run).cost_groups
    groups: dict[str, float] = {}
    for name, spent in zip(run.trace.steps.words, by_step, strict=True):
        if spent > 0:
            group = next((words for words, pattern in patterns if re.search(pattern, name)), "other steps")
            groups[group] = groups.get(group, 0.0) + float(spent)
    programs = report_of(run).program_groups
    return dict(sorted(groups.items(), key=lambda item: (item[0] in programs, -item[1])))


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
    unit = time_unit(max(values))
    colours = [BLUE if name == "CPU faults" else SKY for name in driver]
    colours += [each.colour for each in report_of(run).activities if each.name in hardware]
    sections = _sections(run, driver, hardware)
    # Each kind of bar has a heading in a row of its own.
    headings: list[tuple[str, int]] = []
    at: list[int] = []
    labels: list[str] = []
    row = 0
    for heading, parts, shared in sections:
        headings.append((heading, row))
        at += range(row + 1, row + 1 + len(parts))
        whole = sum(parts.values())
        labels += [f"{say_time(v)}  ({v / whole:.0%})" if shared else say_time(v) for v in parts.values()]
        row += 1 + len(parts)
    with style():
        drawn = canvas(90 + 23 * row, 860)
        axes = drawn.subplots()
        bars = axes.barh(at, [v / unit.size for v in values], color=colours, height=0.72)
        axes.bar_label(bars, labels, fontsize=9, padding=4)
        axes.set_yticks(at, [*driver, *hardware])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(row - 0.4, -0.6)
        axes.margins(x=0.16)
        axes.set_xlabel(f"simulated time ({unit.word})")
        for words, place in headings:
            axes.annotate(
                words, (0, place), xytext=(4, 0), textcoords="offset points", va="center", color=MUTED,
                fontweight="bold",
            )  # fmt: skip
        axes.set_title("Where the time went")
        caption = f"Each step's own time, without the steps it calls, by kind of work.{_kernels(run)}"
        said = [f"{head}: " + ", ".join(f"{name} {say_time(v)}" for name, v in parts.items())
                for head, parts, _shared in sections]  # fmt: skip
        alt = f"Of {say_time(end_of(run))} in all. {'. '.join(said)}.{_kernels(run)}"
        return finish(drawn, "cost_breakdown", caption, alt)


def _sections(
    run: Run, driver: dict[str, float], hardware: dict[str, float]
) -> list[tuple[str, dict[str, float], bool]]:
    """Return the picture's parts that have bars: heading, time by kind, and whether these add up to a whole."""
    programs = {name: value for name, value in driver.items() if name in report_of(run).program_groups}
    own = {name: value for name, value in driver.items() if name not in programs}
    found = [
        (f"the driver's own time: {say_time(sum(own.values()))}", own, True),
        (f"the programs' own time, waiting included: {say_time(sum(programs.values()))}", programs, True),
        ("the hardware, meanwhile", hardware, False),
    ]
    return [section for section in found if section[1]]


def _kernels(run: Run) -> str:
    """Say for how long kernels ran: too long beside the rest to be a bar of the same picture."""
    rows = spans_of(run.trace, run.trace.spans.array(), ("kernel",))
    spent = say_time(float((rows[:, COLUMN["end"]] - rows[:, COLUMN["start"]]).sum()))
    return f" Kernels ran for {spent} of the run's {say_time(end_of(run))}, stalls included." if len(rows) else ""
