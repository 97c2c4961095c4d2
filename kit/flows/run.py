"""A run: one execution of a scenario, and its result in the contract's shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.sim.trace import Trace

if TYPE_CHECKING:
    from kit.flows.documented import Conformance
    from kit.sim.machine import Machine

__all__ = ["Allocation", "Integrity", "Run"]


@dataclass(frozen=True)
class Allocation:
    """One managed allocation: its name, first byte and length in bytes."""

    name: str
    va: int
    bytes: int


@dataclass(frozen=True)
class Integrity:
    """Whether every page kept its content.

    Attributes
    ----------
    pages_checked : int
        4 KiB pages whose content was compared with what the program last wrote.
    lost : int
        Pages whose content was not that.
    """

    pages_checked: int
    lost: int


@dataclass
class Run:
    """One execution of a scenario.

    Attributes
    ----------
    flow, scenario : str
        Names; `scenario` is ``""`` when parameters were given by hand.
    parameters : dict
        Every parameter, defaults included, as plain types.
    metrics : dict of str to number
        Flat names; simulated times in microseconds end in ``_us``.
    trace : Trace
        Spans and moves.
    conformance : Conformance
        Documented steps reached, and violations.
    integrity : Integrity
        Content check of every page.
    machine : Machine
        What it ran on.
    allocations : list of Allocation
        Managed allocations, ascending by address.
    stages : list of (str, float, float)
        Stage name, start and end in microseconds.
    wall_s : float
        Wall-clock seconds (kept out of the result file, which repeats byte for byte).
    errors : list of str
        What went wrong in the program, in words.
    views : dict
        State that the flow's own pictures show beside the trace, such as copies of page tables; not in the result.
    """

    flow: str
    scenario: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    trace: Trace
    conformance: Conformance
    integrity: Integrity
    machine: Machine
    allocations: list[Allocation]
    stages: list[tuple[str, float, float]]
    wall_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    views: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> int:
        """Address that relative addresses count from: the first byte of the first allocation."""
        return min((a.va for a in self.allocations), default=0)

    def events(self) -> list[dict[str, Any]]:
        """Return the records that a profiler would show (see `kit.report.events`)."""
        from kit.report.events import event_records

        return event_records(self)

    def table(self, name: str) -> Any:
        """Return a profiler table by its report name, such as ``um_total_sum``."""
        from kit.report import table

        return table(self, name)

    def result(self) -> dict[str, Any]:
        """Return the result object of the contract."""
        return {
            "flow": self.flow,
            "parameters": self.parameters,
            "metrics": self.metrics,
            "conformance": {
                "steps_reached": self.conformance.steps_reached,
                "steps_documented": self.conformance.steps_documented,
                "violations": self.conformance.violations,
            },
            "integrity": {"pages_checked": self.integrity.pages_checked, "lost": self.integrity.lost},
            "events": self.events(),
        }

    def to_json(self) -> str:
        """Return `result` as JSON text: the same scenario and seed give the same bytes."""
        return json.dumps(self.result(), indent=1) + "\n"
