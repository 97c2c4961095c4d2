"""The result cell: the run's result as JSON for programs, in words for people, and as a file when asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.report.language import say_bytes, say_count, say_time

if TYPE_CHECKING:
    from kit.flows.run import Run

__all__ = ["MIME", "Shown", "show_result", "summary"]

MIME = "application/vnd.farfault.run+json"
_EVENTS = 1000  # a notebook carries at most this many; the result file carries all of them


def summary(run: Run) -> str:
    """Return the result in one line a fact."""
    conformance, integrity = run.conformance, run.integrity
    lines = [f"{run.flow}: {say_time(run.metrics['simulated_us'])} of simulated time"]
    if "faults" in run.metrics and "bytes_moved" in run.metrics:
        lines.append(f"{int(run.metrics['faults']):,} faults, {say_bytes(run.metrics['bytes_moved'])} moved")
    lines.append(
        f"{len(conformance.steps_reached)} of {conformance.steps_documented} documented steps reached, "
        f"{say_count(len(conformance.violations), 'violation')}"
    )
    lines.append(f"{say_count(integrity.pages_checked, 'page')} checked, {integrity.lost:,} lost")
    return "\n".join(lines)


@dataclass(frozen=True)
class Shown:
    """A result as a notebook displays it: JSON under `MIME`, and plain text."""

    data: dict[str, Any]
    text: str

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {MIME: self.data, "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


def show_result(run: Run, result_path: str = "") -> Shown:
    """Return the result for display, and write it where `result_path` says: whole or not at all."""
    whole, text = run.to_json(), summary(run)
    if result_path:
        target = Path(result_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(target.name + ".part")
        building.write_text(whole, "utf-8")
        building.replace(target)
        text += f"\nresult written to {target.name}"
    data: dict[str, Any] = json.loads(whole)
    total = len(data["events"])
    if total > _EVENTS:
        data["events"] = data["events"][:_EVENTS]
        text += f"\n(the notebook keeps the first {_EVENTS:,} of {total:,} events, the file all of them)"
    return Shown(data, text)
