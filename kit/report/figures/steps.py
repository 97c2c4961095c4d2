"""The documented steps: what the run reached, as a call tree that unfolds and as one small picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from kit.report.figures.figure import Figure, canvas, finish, nothing
from kit.report.figures.window import COLUMN, driver_rows
from kit.report.language import FAINT, GREEN, GRID, INK, MUTED, VERMILION, say_count, say_time, style

if TYPE_CHECKING:
    from kit.flows.documented import Documented
    from kit.flows.run import Run

__all__ = ["Edge", "documented_steps", "edges_of", "steps_tree"]

ROOT = ""
_ROW = "padding:1px 0;white-space:nowrap"
_NUMBERS = f"color:{MUTED};font-size:12px;margin-left:10px"


@dataclass(frozen=True)
class Edge:
    """One caller-callee pair of a run: how many calls, and microseconds in them."""

    calls: int
    time: float


def edges_of(run: Run) -> dict[str, dict[str, Edge]]:
    """Return for each step that ran the steps it called; for `ROOT` those that nothing called."""
    trace = run.trace
    table = trace.spans.array()
    driver = driver_rows(run, table)
    rows = table[driver]
    if not len(rows):
        return {}
    parent, step = rows[:, COLUMN["parent"]].astype(np.int64), rows[:, COLUMN["step"]].astype(np.int64)
    known = len(trace.steps.words)
    nested = (parent >= 0) & driver[np.maximum(parent, 0)]
    caller = np.where(nested, table[np.maximum(parent, 0), COLUMN["step"]].astype(np.int64), known)
    pair = caller * known + step
    calls = np.bincount(pair, minlength=(known + 1) * known)
    time = np.bincount(pair, rows[:, COLUMN["end"]] - rows[:, COLUMN["start"]], (known + 1) * known)
    words = [*trace.steps.words, ROOT]
    found: dict[str, dict[str, Edge]] = {}
    for index in np.flatnonzero(calls):
        edge = Edge(int(calls[index]), float(time[index]))
        found.setdefault(words[index // known], {})[words[index % known]] = edge
    return found


def documented_steps(run: Run, documented: Documented | None = None) -> Figure:
    """Show the documented call graph with what the run reached.

    Parameters
    ----------
    run : Run
        Its trace and its conformance are read.
    documented : Documented, optional
        The documented steps; by default those of the run's flow.
    """
    if documented is None:
        from kit.flows.documented import Documented

        documented = Documented.load(run.flow)
    edges = edges_of(run)
    if not edges:
        return nothing("documented_steps", "The driver has not run a step yet: no documented step is reached.")
    reached = set(run.conformance.steps_reached)
    files = Counter(_file(step.source) for step in documented.steps.values())
    got = Counter(_file(step.source) for name, step in documented.steps.items() if name in reached)
    bad = len(run.conformance.violations)
    head = f"{len(reached)} of {len(documented.steps)} documented steps reached, {say_count(bad, 'violation')}"
    with style():
        drawn = canvas(70 + 19 * len(files), 860)
        axes = drawn.subplots()
        names = [name for name, _count in files.most_common()]
        done = np.array([got[name] for name in names])
        left = np.array([files[name] for name in names]) - done
        axes.barh(names, done, color=GREEN, height=0.74, label="reached")
        bars = axes.barh(names, left, left=done, color="#e0e0e4", height=0.74, label="not reached in this run")
        axes.bar_label(bars, [f"{d} of {d + n}" for d, n in zip(done, left, strict=True)], fontsize=8.5, padding=4)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.1)
        axes.set_xlabel("documented steps")
        axes.legend(loc="lower right")
        axes.set_title(head)
        words = "; ".join(f"{name} {got[name]} of {files[name]}" for name in names)
        caption = (
            "The call tree of this run, each step unfolded where it is first called. Grey: documented, and not reached "
            "here; the condition says why."
        )
        alt = f"{head}. By source file: {words}."
        return finish(drawn, "documented_steps", caption, alt, steps_tree(run, documented))


def _file(source: str) -> str:
    """Return the bare file name of a step's source."""
    return source.split(" @ ")[0].rsplit("/", 1)[-1]


def steps_tree(run: Run, documented: Documented) -> str:
    """Return the call tree as HTML: nested ``details``, open near the top."""
    edges, shown = edges_of(run), set[str]()
    reached = set(run.conformance.steps_reached)
    bad = run.conformance.violations
    tree = "".join(_node(name, edge, edges, documented, reached, shown, 0) for name, edge in edges[ROOT].items())
    idle = [name for name in documented.roots if name not in reached]
    colour = VERMILION if bad else GREEN
    head = (
        f'<div style="font-size:14px;margin-bottom:4px"><b style="color:{GREEN}">{len(reached)} of '
        f"{len(documented.steps)}</b> documented steps reached, "
        f'<b style="color:{colour}">{say_count(len(bad), "violation")}</b></div>'
    )
    faults = "".join(f'<div style="color:{VERMILION}">{escape(text)}</div>' for text in bad[:20])
    body = f"{tree}{_absent(idle, documented, 'entry points')}"
    return (
        f'{head}{faults}<div style="font-size:13px;line-height:1.45;color:{INK};background:white;max-height:620px;'
        f'overflow:auto;border:1px solid {GRID};padding:8px 12px">{body}</div>'
    )


def _node(
    name: str, edge: Edge, edges: dict[str, dict[str, Edge]], documented: Documented, reached: set[str],
    shown: set[str], depth: int,
) -> str:  # fmt: skip
    """Return one step and, where it is met for the first time, what it called and might have called."""
    step = documented.steps.get(name)
    title = escape(f"{step.source}:{step.line}" if step else "not a documented step", quote=True)
    colour = INK if step else VERMILION
    label = (
        f'<code title="{title}" style="color:{colour};background:none">{escape(name)}</code>'
        f'<span style="{_NUMBERS}">{say_count(edge.calls, "call")} · {say_time(edge.time)}</span>'
    )
    called = edges.get(name, {})
    absent = [c for c in step.callees() if c not in reached] if step else []
    if name in shown:
        again = f' <span style="color:{FAINT};font-size:12px">unfolded above</span>' if called else ""
        return f'<div style="{_ROW};padding-left:16px">{label}{again}</div>'
    shown.add(name)
    if not called and not absent:
        return f'<div style="{_ROW};padding-left:16px">{label}</div>'
    order = {callee: i for i, callee in enumerate(step.callees())} if step else {}
    inside = "".join(
        _node(callee, called[callee], edges, documented, reached, shown, depth + 1)
        for callee in sorted(called, key=lambda c: order.get(c, len(order)))
    )
    opened = " open" if depth < 3 else ""
    return (
        f'<details{opened}><summary style="{_ROW};cursor:pointer">{label}</summary>'
        f'<div style="margin-left:7px;padding-left:12px;border-left:1px solid {GRID}">{inside}'
        f"{_absent(absent, documented, 'documented calls')}</div></details>"
    )


def _absent(names: list[str], documented: Documented, what: str) -> str:
    """Return the folded grey list of steps that were not reached, each with its condition."""
    if not names:
        return ""
    rows = "".join(
        f'<div style="padding-left:16px"><code style="color:{MUTED};background:none">{escape(name)}</code>'
        f'<span style="{_NUMBERS}">{escape(documented.steps[name].when)}</span></div>'
        for name in names
    )
    title = f"{len(names)} {what if len(names) > 1 else what[:-1]} not reached"
    return f'<details><summary style="color:{MUTED};cursor:pointer">{title}</summary>{rows}</details>'
