"""Linux HMM: a device mirrors a process's address space, and pages move to its memory and back."""

from __future__ import annotations

from collections.abc import Callable

from kit.flows.hmm_mirror.parameters import HmmParameters
from kit.flows.hmm_mirror.session import STAGES, Session
from kit.flows.run import Run

__all__ = ["FLOW", "HmmMirror"]


class HmmMirror:
    """The flow as the registry sees it."""

    name = "hmm_mirror"
    title = "Linux HMM: a device mirrors a process, and pages migrate to its memory and back"
    Parameters = HmmParameters
    stages = STAGES

    def open(self, parameters: HmmParameters, scenario: str = "") -> Session:
        """Return the flow as an object with one method a stage."""
        return Session(parameters, scenario)

    def run(
        self, parameters: HmmParameters, scenario: str = "", progress: Callable[[float, str], None] | None = None
    ) -> Run:
        """Run every stage."""
        return Session(parameters, scenario).finish(progress)


FLOW = HmmMirror()
