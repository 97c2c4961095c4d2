"""What every flow counts in a trace, and how it finds the spans that it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kit.flows.documented import Conformance
    from kit.flows.run import Integrity
    from kit.flows.session import Session
    from kit.sim.trace import Names, Trace

__all__ = ["SpanColumns", "conformance_metrics", "integrity_metrics", "time_metrics"]


class SpanColumns:
    """The columns of a trace's spans, each read once, and which spans have a word.

    Parameters
    ----------
    trace : Trace
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._columns: dict[str, NDArray[np.float64]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self._columns:
            self._columns[name] = self.trace.spans.column(name)
        return self._columns[name]

    @property
    def duration(self) -> NDArray[np.float64]:
        """How long each span took, in microseconds."""
        return self["end"] - self["start"]

    def of(self, step: str) -> NDArray[np.bool_]:
        """Return which spans are of a step; a step that never ran has none."""
        return self._have("step", self.trace.steps, step)

    def by(self, actor: str) -> NDArray[np.bool_]:
        """Return which spans are an actor's."""
        return self._have("actor", self.trace.actors, actor)

    def because(self, cause: str) -> NDArray[np.bool_]:
        """Return which spans have a cause."""
        return self._have("cause", self.trace.causes, cause)

    def _have(self, column: str, words: Names, word: str) -> NDArray[np.bool_]:
        return np.asarray(self[column] == words.ids.get(word, -1))

    def count(self, step: str) -> int:
        """Return how many spans are of a step."""
        return int(self.of(step).sum())

    def total(self, column: str, which: NDArray[np.bool_]) -> int:
        """Return a column's sum over some spans: bytes, pages, whatever comes in whole numbers."""
        return int(self[column][which].sum())


def time_metrics(session: Session) -> dict[str, float]:
    """Return simulated time, of the run and of each stage, in microseconds."""
    stages = {f"{name}_us": ended - started for name, started, ended in session.stages}
    return {"simulated_us": session.engine.now, **stages}


def conformance_metrics(trace: Trace, conformance: Conformance) -> dict[str, float]:
    """Return how long the trace is and how many documented steps it has."""
    return {
        "spans": len(trace.spans), "moves": len(trace.moves),
        "steps_reached": len(conformance.steps_reached), "steps_documented": conformance.steps_documented,
    }  # fmt: skip


def integrity_metrics(checked: Integrity) -> dict[str, float]:
    """Return what the content check found."""
    return {"pages_checked": checked.pages_checked, "lost_pages": checked.lost}
