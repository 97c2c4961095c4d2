"""The documented steps of a flow, and whether a run kept to them.

``scenarios/<flow>/flow.yaml`` is data about the real driver: its steps, where each is defined, and
which other steps it calls, in the order of the source. A trace conforms when each of its steps was
called by a documented caller and when the callees of each call come in the documented order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import KitError, did_you_mean
from kit.flows.documented_files import Calls, complete, flat

if TYPE_CHECKING:
    import networkx as nx

    from kit.sim.trace import Trace

__all__ = ["Calls", "Conformance", "Documented", "FlowFileError", "Order", "Step"]


class FlowFileError(KitError, ValueError):
    """A flow.yaml that contradicts itself."""


@dataclass(frozen=True)
class Conformance:
    """What a run did, held against the documented steps.

    Attributes
    ----------
    steps_reached : list of str
        Documented steps that the trace has, in the file's order.
    steps_documented : int
        How many steps the file lists.
    violations : list of str
        Departures from the documented graph in plain words, most frequent first; empty when the
        trace conforms.
    not_reached : dict of str to str
        The other documented steps, each with the condition under which it is reached.
    """

    steps_reached: list[str]
    steps_documented: int
    violations: list[str]
    not_reached: dict[str, str]


class Order:
    """The order in which one step may call others.

    Reading `calls` from left to right gives every call a position. After a callee, a later position
    may follow, or any position of the outermost loop body around it. What may follow is therefore
    always "everything from some position on", and that position is the whole state: taking the
    earliest position that fits is never worse than another choice.
    """

    def __init__(self, calls: Calls) -> None:
        self._next: dict[str, list[tuple[int, int]]] = {}
        self._position = 0
        for call in calls:
            self._place(call, None)

    def _place(self, call: str | Calls, loop_start: int | None) -> None:
        if isinstance(call, str):
            then = self._position + 1 if loop_start is None else loop_start
            self._next.setdefault(call, []).append((self._position, then))
            self._position += 1
            return
        start = self._position if loop_start is None else loop_start
        for inner in call:
            self._place(inner, start)

    def __contains__(self, callee: str) -> bool:
        return callee in self._next

    @property
    def widest(self) -> int:
        """Return how many positions the callee with the most of them has."""
        return max((len(places) for places in self._next.values()), default=0)

    def after(self, state: int, callee: str) -> int | None:
        """Return the state after `callee`, or None when it cannot come at `state` (0: at the start)."""
        return next((then for position, then in self._next[callee] if position >= state), None)


@dataclass(frozen=True)
class Step:
    """One documented function.

    Attributes
    ----------
    name : str
        As in the driver.
    source : str
        File and version that define it.
    line : int
        Line of the definition in that version.
    calls : list
        Direct callees in source order; a nested list is a loop body.
    when : str
        The condition under which it is reached.
    note : str
        What a reader should know beside that, or ``""``.
    requires : dict
        Values of parameters that the step needs, when some keep it out of reach.
    together : bool
        Whether a trace may hold one span for several calls in a row, such as a fault at each of many pages.
    """

    name: str
    source: str
    line: int
    calls: Calls
    when: str
    note: str = ""
    requires: Mapping[str, Any] = field(default_factory=dict)
    together: bool = False

    @cached_property
    def order(self) -> Order:
        """Return the order in which this step may call others; one span of several calls may start it again."""
        return Order([self.calls] if self.together and self.calls else self.calls)

    def callees(self) -> list[str]:
        """Return the direct callees without repetition, by first position."""
        return list(dict.fromkeys(flat(self.calls)))


class Documented:
    """The documented call graph of a flow.

    Parameters
    ----------
    data : mapping
        What flow.yaml holds.

    Raises
    ------
    FlowFileError
        A step is defined twice, calls a step that is not defined, or a root does not exist.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.flow: str = data["flow"]
        self.steps: dict[str, Step] = {}
        for row in data["steps"]:
            if row["name"] in self.steps:
                raise FlowFileError(f"{self.flow}: step {row['name']} is defined twice")
            self.steps[row["name"]] = Step(**row, together=row["name"] in data.get("together", ()))
        self.roots: list[str] = data["roots"]
        self.events: list[str] = data["events"]
        self.hardware: list[str] = data["hardware"]
        self._validate()

    @classmethod
    def load(cls, flow: str, variant: str = "") -> Documented:
        """Read a flow's ``flow.yaml``, in a variant of the system that it names (another version) when one is given."""
        from kit.paths import flow_file

        return cls.read(flow_file(flow), variant)

    @classmethod
    def read(cls, path: Path, variant: str = "") -> Documented:
        """Read a file with documented steps, and what it takes over from others."""
        return cls(complete(path, variant))

    def _validate(self) -> None:
        for step in self.steps.values():
            for callee in step.callees():
                if callee not in self.steps:
                    hint = did_you_mean(callee, self.steps)
                    raise FlowFileError(f"{self.flow}: {step.name} calls {callee}, which is not defined.{hint}")
        for root in self.roots:
            if root not in self.steps:
                raise FlowFileError(f"{self.flow}: root {root} is not defined.{did_you_mean(root, self.steps)}")
        both = self.steps.keys() & {*self.events, *self.hardware}
        if both:
            raise FlowFileError(f"{self.flow}: both a step and an event: {', '.join(sorted(both))}")

    def callers(self, name: str) -> list[str]:
        """Return the steps that call `name`, in the file's order."""
        return [step.name for step in self.steps.values() if name in step.order]

    def graph(self) -> nx.DiGraph[str]:
        """Return the call graph: a node per step with its facts, an edge from caller to callee."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph(name=self.flow)
        for step in self.steps.values():
            graph.add_node(step.name, source=step.source, line=step.line, when=step.when, root=step.name in self.roots)
        graph.add_edges_from((step.name, callee) for step in self.steps.values() for callee in step.callees())
        return graph

    def check(self, trace: Trace) -> Conformance:
        """Hold a trace against the documented steps.

        Every row whose step is neither a tool event nor hardware activity must be a documented
        step; its parent must be a documented caller, or absent (or an event or hardware activity)
        when it is a root; and the children of a row must follow the caller's order.
        """
        from kit.flows.conformance import reached, violations

        seen = reached(trace)
        return Conformance(
            steps_reached=[name for name in self.steps if name in seen],
            steps_documented=len(self.steps),
            violations=violations(self, trace),
            not_reached={step.name: step.when for step in self.steps.values() if step.name not in seen},
        )
